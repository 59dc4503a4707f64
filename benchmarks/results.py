"""What a run leaves behind: rows, their files, where they were measured, and comparisons."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .baselines import LOWER_BOUND
from .cases import PLACE, Place, name_of

NOISE = 0.10  # medians that differ by no more than this are the same
RULE = (
    f"slower: the quartiles of the two runs do not overlap and the median grew by more than "
    f"{NOISE:.0%}, both in time and in time over that of the copy measured in the same rounds"
)
# Of two environments whose rows may stand in one file.
SAME = ("commit", "device", "cpu", "cores", "capability", "torch", "ppcr_ext")


@dataclass
class Row:
    """One implementation in one direction on one case, in microseconds per call."""

    suite: str
    operator: str
    case: str
    shape: list[int]
    layout: str
    dtype: str
    threads: int
    levels: list[int]
    direction: str
    what: str
    kind: str  # fused, reference, plain, other layer, lower bound, copy or network
    median_us: float
    low_us: float  # quartiles
    high_us: float
    lowest_us: float | None = None  # deciles
    highest_us: float | None = None
    rounds: int = 0  # 0: only its errors are known
    # To the lower bound, or to the network without attention, within each round: the median over
    # the rounds, and its 95 % confidence interval.
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    host_us: float | None = None  # what the host spends to launch the call, where that is apart
    necessary_bytes: int | None = None  # see baselines.Operator
    gb_per_s: float | None = None
    copy_fraction: float | None = None  # of the bandwidth of a copy of x, timed in the same rounds
    peak_bytes: int | None = None  # allocated above the inputs, the results included
    saved_bytes: int | None = None  # that autograd keeps for backward, in whole networks
    error_y: float | None = None
    error_dx: float | None = None
    error_parameters: float | None = None
    within: bool = True  # the errors, their limits
    other_load: float | None = None  # see timing.OtherLoad

    @property
    def place(self) -> Place:
        values = (getattr(self, name) for name in PLACE)
        return tuple(tuple(v) if isinstance(v, list) else v for v in values)

    @property
    def tensor_bytes(self) -> int:
        """The bytes of x."""
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize

    @property
    def spread(self) -> float:
        """The quartiles' distance as share of the median."""
        return (self.high_us - self.low_us) / self.median_us


@dataclass
class Record:
    """Everything a suite measured, as its JSON file has it."""

    command: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    complete: bool = False
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def write(self, where: Path) -> list[Path]:
        """``where``.json and ``where``.csv; returns them."""
        where.parent.mkdir(parents=True, exist_ok=True)
        table, everything = where.with_suffix(".csv"), where.with_suffix(".json")
        new = where.with_suffix(".json.new")  # an interruption leaves the old file or the new one
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
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def read(path: Path) -> Record:
    """What :meth:`Record.write` wrote, now or in an older form; ValueError for something else."""
    try:
        content = json.loads(path.read_text())
        environment, settings = content["environment"], content.get("settings", {})
        environment.setdefault("device", "cpu")
        settings = settings | {k: content[k] for k in ("rounds",) if k in content}
        found = [Row(**row) for row in _translated(content, path.stem)]
        complete, skipped = content.get("complete", True), content.get("skipped", [])
        return Record(content["command"], environment, settings, complete, found, skipped)
    except (OSError, AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of these benchmarks: {error!r}") from error


# ---- older forms ---------------------------------------------------------------------------------

KINDS = {"floor": LOWER_BOUND, "neighbour": "other layer"}


def _translated(content: dict[str, Any], suite: str) -> Iterable[dict[str, Any]]:
    """Rows of today's columns. Before, layers, operators and networks had columns of their own."""
    threads = content["environment"]["threads"]
    for row in content["rows"]:
        row = dict(row)
        if "others" in row:
            row["other_load"] = row.pop("others")
        row["kind"] = KINDS.get(row.get("kind", "network"), row.get("kind", "network"))
        if "variant" in row:
            yield _network(row, threads)
        elif "column" in row:
            yield from _layer(row, suite, threads)
        else:
            yield row | {"what": KINDS.get(row["what"], row["what"])}
    for error in content.get("errors", ()):  # of half types and the reference, not with the times
        if error["dtype"] != "float32":
            yield {
                **{name: error[name] for name in ("case", "layout", "dtype")},
                **{f"error_{name}": value for name, value in error["errors"].items()},
                **{"suite": suite, "operator": "ppcr", "shape": [1, 1], "threads": threads},
                **{"levels": [1, 2, 4], "direction": "step", "what": error["backend"]},
                **dict.fromkeys(("median_us", "low_us", "high_us"), math.nan),
                "kind": "reference" if error["backend"] == "reference" else "fused",
                "within": error["ok"],
            }


def _network(row: dict[str, Any], threads: int) -> dict[str, Any]:
    new = {name: row[name] for name in ("layout", "ratio", "ratio_low", "ratio_high")}
    new |= {name: row[name] for name in ("kind", "saved_bytes", "peak_bytes", "other_load")}
    shape = [row["images"], 3, row["side"], row["side"]]
    return new | {
        "suite": "end_to_end",
        "operator": row["network"],
        "case": f"{row['network']} {name_of(shape)}" + (", compiled" if row["compiled"] else ""),
        "shape": shape,
        "dtype": "bfloat16 autocast" if row["amp"] else "float32",
        "threads": threads,
        "levels": [1, 2, 4],
        "direction": row["mode"],
        "what": row["variant"],
        "error_dx": row["error"],
        "median_us": row["ms"] * 1e3,
        "low_us": row["ms_low"] * 1e3,
        "high_us": row["ms_high"] * 1e3,
        "rounds": 1,
    }


def _layer(row: dict[str, Any], suite: str, threads: int) -> Iterable[dict[str, Any]]:
    new = {name: row[name] for name in ("case", "shape", "layout", "dtype", "kind", "other_load")}
    what = KINDS.get(row["column"], row["column"].removesuffix(f" {row['dtype']}"))
    if what == "reference":
        new["kind"] = what
    for direction in ("forward", "step"):
        if row[f"{direction}_ms"] is None:
            continue
        errors = {f"error_{name}": row[f"error_{name}"] for name in ("y", "dx", "parameters")}
        times = {"median_us": "", "low_us": "_low", "high_us": "_high"}
        yield {
            **new,
            **(errors if direction == "step" else {}),
            **{key: row[f"{direction}{mark}_ms"] * 1e3 for key, mark in times.items()},
            **{"suite": suite, "operator": "ppcr", "threads": threads, "levels": [1, 2, 4]},
            **{"direction": direction, "what": what, "rounds": 1},
            "ratio": row[f"{direction}_ratio"] if row["dtype"] == "float32" else None,
        }


# ---- where a run was made ------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a run is made."""
    cuda = device.type == "cuda"
    affinity = getattr(os, "sched_getaffinity", None)
    packages = ("timm", "torchvision", "numpy", "ppcr_ext", *(("triton",) if cuda else ()))
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The working tree's commit, with ``+`` where files other than measured ones differ from it."""
    try:
        measured = (":(top,exclude)benchmarks/results", ":(top,exclude)README.md")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *measured)
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    command, root = ["git", *args], Path(__file__).parent
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---- comparison ----------------------------------------------------------------------------------


def timings(record: Record) -> dict[Place, tuple[Row, float]]:
    """The rows by place, what and direction, each with the time that its machine is judged by.

    That is the copy's; in whole networks the one without attention, in older files of layers the
    lower bound. Copies and lower bounds are not judged.
    """
    rows = [row for row in record.rows if row.rounds]
    bases: dict[Place, float] = {}
    for kind in (LOWER_BOUND, "copy"):  # the copy where there is one
        bases |= {row.place: row.median_us for row in rows if row.kind == kind}
    bases |= {row.place: row.median_us for row in rows if row.what == "none"}
    return {
        (*row.place, row.what, row.direction): (row, bases[row.place])
        for row in rows
        if row.place in bases and row.kind not in ("copy", LOWER_BOUND)
    }


def slower(old: tuple[Row, float], new: tuple[Row, float]) -> bool:
    """By :data:`RULE`: a slower machine slows the copy too, and a disturbed copy changes alone."""

    def grew(old: tuple[float, float], new: tuple[float, float]) -> bool:
        """From the median and the upper quartile to the median and the lower one."""
        return new[1] > old[1] and new[0] > (1 + NOISE) * old[0]

    (a, then), (b, now) = old, new
    return grew((a.median_us, a.high_us), (b.median_us, b.low_us)) and grew(
        (a.median_us / then, a.high_us / then), (b.median_us / now, b.low_us / now)
    )


def compare(old: Record, new: Record) -> tuple[str, list[Place]]:
    """(a report, the keys of what got slower)."""
    lines = []
    for name in ("device", "cpu", "capability", "cores", "torch"):
        then, now = old.environment.get(name), new.environment.get(name)
        if then != now:
            lines.append(f"another {name}: {then} then, {now} now")
    before, after = timings(old), timings(new)
    both = [key for key in after if key in before]
    found = [key for key in both if slower(before[key], after[key])]
    faster = [key for key in both if slower(after[key], before[key])]
    times = {key: (before[key][0].median_us, after[key][0].median_us) for key in found}
    for key, (then, now) in sorted(times.items(), key=lambda item: -item[1][1] / item[1][0]):
        words = ", ".join(name_of(p) if isinstance(p, tuple) else str(p) for p in key)
        lines.append(f"slower: {words}: {then:.1f} us then, {now:.1f} us now ({now / then:.2f}x)")
    lines.append(
        f"compared {len(both)} timings with commit {old.environment.get('commit')}: "
        f"{len(found)} slower, {len(faster)} faster; {len(after) - len(both)} only now, "
        f"{len(before) - len(both)} only then ({RULE})"
    )
    return "\n".join(lines), found
