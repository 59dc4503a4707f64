"""What a layer does to the training step and the inference of a whole network: ``python -m benchmarks end-to-end``.

torchvision's ResNets, unchanged (*none*) and with a layer after the last normalization of every residual block: PPCR *fused* with the
addition and the ReLU, *unfused*, in *plain* PyTorch (the best formulation of :mod:`benchmarks.peers`), and timm's SE and CBAM.
All variants of a network run in every round, in a new random order, and every few rounds the networks are made anew; the ratio to
*none* is taken within each round, and what is reported is the median of these ratios with its 95 % confidence interval.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import files, session, timing
from .inputs import LAYOUTS
from .network import OWN, VARIANTS, check, network, saved_bytes

SITTING = 5  # rounds; see sittings()
NETWORKS = {
    "resnet18": (16, 32),
    "resnet50": (4, 224),
}  # images of a batch and their side, on a CPU
CUDA_IMAGES = {"resnet18": 1024, "resnet50": 256}


@dataclass
class Setting:
    """What is timed together."""

    network: str
    images: int
    side: int
    layout: str
    amp: bool
    compiled: bool

    @classmethod
    def of(cls, row: Row) -> Setting:
        return cls(**{field.name: getattr(row, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        extras = [
            name
            for name, used in (("bfloat16 autocast", self.amp), ("compiled", self.compiled))
            if used
        ]
        return ", ".join(
            [f"{self.network} {self.images}x3x{self.side}x{self.side}", self.layout, *extras]
        )


@dataclass
class Row(Setting):
    """One variant of one setting, ``mode`` being step (forward, loss, backward, SGD) or inference."""

    variant: str
    mode: str
    ms: float
    ms_low: float
    ms_high: float
    ratio: float  # to "none", within each round; the median over the rounds
    ratio_low: float  # of its 95 % confidence interval
    ratio_high: float
    saved_bytes: int | None  # that autograd keeps for backward (step)
    peak_bytes: int | None  # allocated at most in a step, above what was there before (CUDA)
    error: float | None  # see check()
    others: float | None  # share of the processor time that other processes took


class Program:
    """Training step and inference of one variant."""

    def __init__(self, model: nn.Module, setting: Setting, x: Tensor, target: Tensor) -> None:
        self.model, self.setting, self.x, self.target = model, setting, x, target
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self.forward = torch.compile(model, dynamic=False) if setting.compiled else model

    def step(self) -> None:
        self.model.train()
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.setting.amp):
            loss = F.cross_entropy(self.forward(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def inference(self) -> None:
        self.model.eval()
        with (
            torch.no_grad(),
            torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.setting.amp),
        ):
            self.forward(self.x)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the bounds of its 95 % confidence interval: order statistics, from the binomial distribution (exact for any
    distribution of the values). With fewer than six values the whole range, whose confidence is smaller."""
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < n // 2:
        below += math.comb(n, rank) / 2**n
        if below > 0.025:
            break
        rank += 1
    rank = max(rank, 1)
    return statistics.median(ordered), ordered[rank - 1], ordered[n - rank]


@dataclass
class Sitting:
    """What one set of freshly made networks showed."""

    took: dict[tuple[str, str], list[float]]  # seconds, by variant and mode
    share: float | None  # see timing.rounds_of
    peaks: dict[str, int]
    saved: dict[str, int]
    errors: dict[str, float]


def sit(
    setting: Setting,
    variants: Sequence[str],
    rounds: int,
    device: str,
    tick: Callable[[int], object],
    first: bool = True,
) -> Sitting:
    """All variants of one setting, interleaved; checked in the first sitting."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(setting.images, 3, setting.side, setting.side, generator=generator).to(device)
    target = torch.arange(setting.images, device=device) % 10
    form = LAYOUTS[setting.layout]
    x = x.contiguous(memory_format=form)
    models = {
        name: network(setting.network, name).to(device, memory_format=form) for name in variants
    }  # type: ignore[call-overload]
    few = slice(0, min(setting.images, 16))
    errors = (
        check(models, x[few], target[few], setting.amp)
        if first and set(OWN) <= set(variants)
        else {}
    )
    saved = (
        {name: saved_bytes(model, x, target, setting.amp) for name, model in models.items()}
        if first
        else {}
    )
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    for name, model in models.items():
        program = Program(model, setting, x, target)
        calls[name, "step"], calls[name, "inference"] = program.step, program.inference
    peaks: dict[str, int] = {}
    for (name, mode), call in calls.items():  # compiles, and fills caches
        call()
        call()
        if device == "cuda" and mode == "step":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            peaks[name] = torch.cuda.max_memory_allocated() - before
        tick(1)
    with timing.quiet():
        timed = {key: partial(seconds, call, device) for key, call in calls.items()}
        took, share = timing.rounds_of(timed, rounds, tick=partial(tick, len(calls)))
    return Sitting(took, share, peaks, saved, errors)


def sittings(setting: Setting, rounds: int) -> list[int]:
    """The rounds of each sitting. Where its memory happens to lie makes a network some percent faster or slower than its twin, for as
    long as it lives; so the networks are made anew every few rounds, unless that would compile them anew."""
    count = 1 if setting.compiled else math.ceil(rounds / SITTING)
    return [(rounds + i) // count for i in range(count)]


def measure(
    setting: Setting,
    variants: Sequence[str],
    rounds: int,
    device: str,
    tick: Callable[[int], object],
) -> list[Row]:
    """All variants of one setting in all sittings, each with its variants in another order."""
    found: list[Sitting] = []
    shuffle = random.Random(0)
    for n in sittings(setting, rounds):
        found.append(
            sit(setting, shuffle.sample(variants, len(variants)), n, device, tick, first=not found)
        )
        gc.collect()
    took = {
        key: [value for one in found for value in one.took[key]]
        for key in itertools.product(variants, ("step", "inference"))
    }
    shares = [one.share for one in found if one.share is not None]
    rows = []
    for (name, mode), values in took.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        ratio, ratio_low, ratio_high = median_interval(
            [a / b for a, b in zip(values, took["none", mode], strict=True)]
        )
        step = mode == "step"
        rows.append(
            Row(
                **asdict(setting), variant=name, mode=mode, ms=median * 1e3, ms_low=low * 1e3, ms_high=high * 1e3, ratio=ratio,
                ratio_low=ratio_low, ratio_high=ratio_high, saved_bytes=found[0].saved[name] if step else None,
                peak_bytes=found[0].peaks.get(name) if step else None, error=found[0].errors.get(name),
                others=statistics.fmean(shares) if shares else None,
            )
        )  # fmt: skip
    return rows


def settings(device: str, everything: bool) -> list[tuple[Setting, tuple[str, ...]]]:
    """On a CPU both networks eagerly in both layouts, and ResNet-18 compiled without the neighbours; else, or with --all, the
    product of networks, layouts, precisions and compilation."""
    sizes = {
        name: (CUDA_IMAGES[name] if device == "cuda" else images, side)
        for name, (images, side) in NETWORKS.items()
    }
    made: list[tuple[Setting, tuple[str, ...]]] = []
    for (name, (images, side)), layout, amp, compiled in itertools.product(
        sizes.items(), LAYOUTS, (False, True), (False, True)
    ):
        variants: tuple[str, ...] = VARIANTS
        if not everything:
            if amp or (compiled and (name != "resnet18" or layout != "channels_last")):
                continue
            if compiled:
                variants = VARIANTS[:4]
        made.append((Setting(name, images, side, layout, amp, compiled), variants))
    return made


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """``{(setting, mode): {variant: row}}``."""
    grouped: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault((str(Setting.of(row)), row.mode), {})[row.variant] = row
    return grouped


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each setting and mode, the ratios to "none" with their intervals."""
    lines = ["| | " + " | ".join(VARIANTS[1:]) + " |", "| --- |" + " ---: |" * (len(VARIANTS) - 1)]
    for (setting_name, mode), found in _grouped(rows).items():
        cells = [
            f"{r.ratio:.3f} ({r.ratio_low:.3f} to {r.ratio_high:.3f})"
            if (r := found.get(v))
            else ""
            for v in VARIANTS[1:]
        ]
        lines.append(f"| {setting_name}, {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Bars of the ratios to "none", with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(
        zip(VARIANTS[1:], ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7"), strict=True)
    )  # Okabe and Ito's
    grouped = _grouped(rows)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.85 * len(grouped)), layout="constrained")
    height = 0.8 / len(colours)
    for i, (variant, colour) in enumerate(colours.items()):
        for j, found in enumerate(grouped.values()):
            if variant not in found:
                continue
            row, at = found[variant], j + (i - (len(colours) - 1) / 2) * height
            axes.barh(
                at, row.ratio - 1, height, left=1, color=colour, label=variant if j == 0 else None
            )
            axes.plot([row.ratio_low, row.ratio_high], [at, at], color="black", linewidth=1)
            beside = (max(row.ratio_high, 1), at)
            axes.annotate(
                f"{row.ratio:.2f}", beside, (4, 0), textcoords="offset points", va="center", size=7
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(
        range(len(grouped)), [f"{setting}\n{mode}" for setting, mode in grouped], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel(
        "time over that of the network without attention (bars: medians; lines: 95 % intervals)"
    )
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.margins(x=0.06, y=0.01)
    figure.legend(fontsize=8, frameon=False, ncols=len(colours), loc="outside lower center")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def write(rows: Sequence[Row], where: Path, about: dict[str, Any]) -> list[Path]:
    """``where``.csv, .json and .png; returns what was written."""
    where.parent.mkdir(parents=True, exist_ok=True)
    with where.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    where.with_suffix(".json").write_text(
        json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    env = about["environment"]
    title = f"{env['cpu'] if env['device'] == 'cpu' else env['device']}, PyTorch {env['torch']}, {about['rounds']} rounds"
    return [
        where.with_suffix(".csv"),
        where.with_suffix(".json"),
        draw(rows, where.with_suffix(".png"), title),
    ]


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What :func:`write` wrote."""
    content = json.loads(path.read_text())
    return content, [Row(**row) for row in content["rows"]]


def run(argv: Sequence[str] | None = None) -> int:
    """The command: measures, prints the table, writes end_to_end.csv, .json and .png."""
    parser = argparse.ArgumentParser("python -m benchmarks end-to-end", description=__doc__)
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        metavar="N",
        help="timing rounds of each setting (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="ResNet-18 in one layout, few rounds")
    parser.add_argument("--network", choices=list(NETWORKS), help="one of the networks, eagerly")
    parser.add_argument(
        "--all", action="store_true", help="the whole product of settings, as on a GPU"
    )
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N", help="CPU threads (%(default)s)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the settings of an interrupted run of the same commit and device",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where files go (%(default)s)",
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    timing.keep_memory()
    chosen = settings(device, args.all or device == "cuda")
    if args.network:
        chosen = [one for one in chosen if one[0].network == args.network and not one[0].compiled]
    if args.quick:
        chosen, args.rounds = chosen[:1], min(args.rounds, 7)
    where = args.out / "end_to_end"
    about = {
        "command": "end-to-end", "complete": False, "rounds": args.rounds, "settings": {"quick": args.quick, "network": args.network},
        "environment": files.environment(torch.device(device)),
    }  # fmt: skip
    rows = resumed(where.with_suffix(".json"), about) if args.resume else []
    done = {str(Setting.of(row)) for row in rows}
    left = [(setting, variants) for setting, variants in chosen if str(setting) not in done]
    total = sum(
        2 * len(variants) * (len(sittings(setting, args.rounds)) + args.rounds)
        for setting, variants in left
    )
    with tqdm(
        total=total,
        bar_format="{l_bar}{bar}| {elapsed}, {remaining} left",
        smoothing=0,
        file=sys.stderr,
    ) as bar:
        try:
            for setting, variants in left:
                bar.set_description(str(setting))
                rows += measure(setting, variants, args.rounds, device, bar.update)
                write(rows, where, about)
            about["complete"] = True
        except KeyboardInterrupt:
            print("\ninterrupted: what was measured is written", file=sys.stderr)
    if rows:
        print(table(rows))
        print("wrote " + ", ".join(map(str, write(rows, where, about))))
    return 0 if about["complete"] else session.INTERRUPTED


def resumed(path: Path, about: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run that may stand beside new ones; says so."""
    old: dict[str, Any] = {"environment": {}}
    rows: list[Row] = []
    if path.is_file():
        old, rows = read(path)
    same = all(old["environment"].get(name) == about["environment"][name] for name in session.SAME)
    same = same and all(old.get(name) == about[name] for name in ("rounds", "settings"))
    if not same or about["environment"]["commit"].endswith(("+", "unknown")):
        print(f"not resumed: {path} is not of this commit, device and settings")
        return []
    print(f"resumed {len(rows)} rows of {path}")
    return rows


if __name__ == "__main__":
    sys.exit(run())
