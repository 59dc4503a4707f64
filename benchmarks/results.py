"""What a run leaves behind: rows, their files, where they were measured, and comparisons."""

import csv
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .baselines import LOWER_BOUND
from .cases import Key, Place, name_of

NOISE = 0.10  # medians that differ by no more than this are the same
RULE = (
    f"slower: the quartiles of the two runs do not overlap and the median grew by more than "
    f"{NOISE:.0%}, both in time and in time over that of the copy measured in the same rounds"
)
# Of two environments whose rows may stand in one file.
SAME = ("commit", "device", "cpu", "cores", "capability", "torch", "ppcr_ext")
PACKAGES = ("timm", "torchvision", "numpy", "triton", "ppcr_ext")


@dataclass(kw_only=True)
class Row(Place):
    """One implementation in one direction on one case, in microseconds per call."""

    direction: str
    what: str
    kind: str  # fused, reference, plain, other layer, lower bound, copy, network
    median_us: float = math.nan
    low_us: float = math.nan  # quartiles
    high_us: float = math.nan
    rounds: int = 0  # 0, in some older files: only its errors are known
    # To the lower bound, or to the network without attention, within each round: the median over
    # the rounds, and its 95 % confidence interval. Without one, in older files: of the medians.
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    over_fused: float | None = None  # the time over that of our fused backend
    host_us: float | None = None  # what the host spends to launch the call, where that is apart
    necessary_bytes: int | None = None  # see baselines.TRAFFIC
    copy_fraction: float | None = None  # of the bandwidth of a copy of x, timed in the same rounds
    peak_bytes: int | None = None  # allocated above the inputs, the results included
    saved_bytes: int | None = None  # that autograd keeps for backward, in whole networks
    error_y: float | None = None
    error_dx: float | None = None
    error_parameters: float | None = None
    within: bool = True  # the errors, their limits
    other_load: float | None = None  # see timing.other_load

    def __post_init__(self) -> None:
        self.shape, self.levels = tuple(self.shape), tuple(self.levels)

    @property
    def spread(self) -> float:
        return (self.high_us - self.low_us) / self.median_us

    @property
    def is_faster(self) -> bool:
        """Whether it is faster than our fused backend, which every table marks."""
        return self.kind not in (LOWER_BOUND, "copy") and (self.over_fused or 1) < 1

    @property
    def passes(self) -> str:
        step = "training step" if self.kind == "network" else "forward+backward"
        return step if self.direction == "step" else self.direction


def derived(rows: list[Row]) -> list[Row]:
    """The rows with those ratios that follow from the other rows of their case."""

    def time(row: Row) -> float:  # networks are compared within each round
        return row.ratio if row.kind == "network" and row.ratio is not None else row.median_us

    timed = [row for row in rows if row.rounds and row.kind != "copy"]
    bounds = {(*r.place, r.direction): time(r) for r in timed if r.what == LOWER_BOUND}
    ours = [row for row in timed if row.kind == "fused" or row.what == "PPCR fused"]
    fused = {(*row.place, row.direction): time(row) for row in reversed(ours)}  # the first one
    for row in timed:
        at = (*row.place, row.direction)
        row.over_fused = time(row) / fused[at] if at in fused else None
        if row.ratio is None and at in bounds:
            row.ratio = time(row) / bounds[at]
    return rows


@dataclass
class Record:
    """Everything a suite measured, as its JSON file has it."""

    command: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    complete: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def machine(self) -> str:
        """Where, with what and when."""
        env, where = self.environment, self.environment["device"]
        if where == "cpu":
            threads = " and ".join(sorted({row.on_threads for row in self.rows}))
            where = f"{env['cpu']} ({env['capability']}), {threads}"
        return f"{where}, PyTorch {env['torch']}, {env['date'][:10]}, commit {env['commit']}"

    @property
    def fused(self) -> str:
        """The backend that all others are compared with."""
        return next((row.what for row in self.rows if row.over_fused == 1), "native")

    @property
    def timed(self) -> list[Row]:
        """The rows with times, without the tiny input."""
        return [row for row in self.rows if row.rounds and not row.case.startswith("tiny")]

    @property
    def headline(self) -> list[Row]:
        """The timed rows of ppcr in the dtype that is measured first."""
        wanted = ("ppcr", self.rows[0].dtype)
        return [row for row in self.timed if (row.operator, row.dtype) == wanted]

    def write(self, where: Path) -> list[Path]:
        """``where``.json and ``where``.csv; returns them."""
        where.parent.mkdir(parents=True, exist_ok=True)
        table, everything, new = map(where.with_suffix, (".csv", ".json", ".json.new"))
        # an interruption leaves the old file or the new one
        new.write_text(json.dumps(rounded(asdict(self)), indent=1) + "\n")
        new.replace(everything)
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            for row in self.rows:
                words = {"shape": name_of(row.shape), "levels": "-".join(map(str, row.levels))}
                writer.writerow(rounded(asdict(row) | words))
        return [table, everything]


def rounded(value: Any) -> Any:
    """Five significant digits: more would be noise."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"))


def read(path: Path) -> Record:
    """What :meth:`Record.write` wrote; ValueError for something else."""
    try:
        record = Record(**json.loads(path.read_text()))
        record.rows = derived([Row(**row) for row in record.rows])  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of these benchmarks: {error!r}") from error
    return record


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a run is made."""
    cuda = device.type == "cuda"
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        **{one.name: one.version for one in metadata.distributions() if one.name in PACKAGES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": named[1] if named else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """The working tree's commit, with ``+`` where files other than measured ones differ from it."""
    try:
        measured = (":(top,exclude)benchmarks/results", ":(top,exclude)README.md")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *measured)
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    options: dict[str, Any] = {"cwd": Path(__file__).parent, "text": True, "check": True}
    return subprocess.run(["git", *args], capture_output=True, **options).stdout.strip()


def timings(record: Record) -> dict[Key, Any]:
    """Every timing's quartiles and median: in microseconds, and over those of a base."""
    # That is a copy of as many bytes, which tells how fast the machine was; of whole networks the
    # one without attention, in older files the lower bound. Copies and bounds have no entry.
    found: dict[Key, Any] = {}
    for row in record.rows:
        over = 1 / row.copy_fraction if row.copy_fraction else row.ratio
        if over and row.kind not in ("copy", LOWER_BOUND):
            times = np.array((row.low_us, row.median_us, row.high_us))
            found[(*row.place, row.what, row.direction)] = times, times / row.median_us * over
    return found


def slower(old: Any, new: Any) -> bool:
    """By :data:`RULE`: a slower machine slows the copy too, and a disturbed copy changes alone."""
    pairs = zip(old, new, strict=True)
    return all(b[0] > a[2] and b[1] > (1 + NOISE) * a[1] for a, b in pairs)


def compare(old: Record, new: Record) -> tuple[str, list[Key]]:
    """(a report, the keys of what got slower)."""
    was, now = old.environment, new.environment
    others = [name for name in SAME[1:] if was.get(name) != now.get(name)]
    lines = [f"another {name}: {was.get(name)} then, {now.get(name)} now" for name in others]
    before, after = timings(old), timings(new)
    both = [key for key in after if key in before]
    found = [key for key in both if slower(before[key], after[key])]
    faster = sum(slower(after[key], before[key]) for key in both)
    for key in found:
        words = ", ".join(name_of(p) if isinstance(p, tuple) else str(p) for p in key)
        a, b = before[key][0][1], after[key][0][1]
        lines.append(f"slower: {words}: {a:.1f} us then, {b:.1f} us now ({b / a:.2f}x)")
    lines.append(
        f"compared {len(both)} timings with commit {was.get('commit')}: {len(found)} slower, "
        f"{faster} faster; {len(after) - len(both)} only now, {len(before) - len(both)} only then "
        f"({RULE})"
    )
    return "\n".join(lines), found
