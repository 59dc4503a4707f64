"""What a run leaves behind: rows, their files, where they were measured, and comparisons."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
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
    shape: Sequence[int]
    layout: str
    dtype: str
    threads: int
    levels: Sequence[int]
    direction: str
    what: str
    kind: str  # fused, reference, plain, other layer, lower bound, copy, network
    median_us: float = math.nan
    low_us: float = math.nan  # quartiles
    high_us: float = math.nan
    lowest_us: float | None = None  # deciles
    highest_us: float | None = None
    rounds: int = 0  # 0: only its errors are known
    # To the lower bound, or to the network without attention, within each round: the median over
    # the rounds, and its 95 % confidence interval.
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    over_fused: float | None = None  # the time over that of our fused backend
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
    other_load: float | None = None  # see timing.other_load

    def __post_init__(self) -> None:
        self.shape, self.levels = tuple(self.shape), tuple(self.levels)

    @property
    def place(self) -> Place:
        return tuple(getattr(self, name) for name in PLACE)

    @property
    def tensor_bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize

    @property
    def spread(self) -> float:
        return (self.high_us - self.low_us) / self.median_us


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
    skipped: list[dict[str, str]] = field(default_factory=list)

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
    cuda, found = device.type == "cuda", dict[str, Any]()
    affinity = getattr(os, "sched_getaffinity", None)
    for package in ("timm", "torchvision", "numpy", "triton", "ppcr_ext"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": _commit()}
    found |= {"device": torch.cuda.get_device_name(device) if cuda else "cpu"}
    found |= {"cpu": _cpu_model(), "cores": len(affinity(0)) if affinity else os.cpu_count()}
    found |= {"capability": torch.backends.cpu.get_cpu_capability()}
    found |= {"cuda": torch.version.cuda if cuda else None, "threads": torch.get_num_threads()}
    found |= {"system": platform.platform(terse=True), "python": platform.python_version()}
    return found | {"torch": torch.__version__}


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


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def timings(record: Record) -> dict[Place, tuple[Row, float]]:
    """The rows by place, what and direction, each with the time that its machine is judged by.

    That is the copy's; in whole networks the one without attention, in older files of layers the
    lower bound. Copies and lower bounds are not judged.
    """
    bases: dict[Place, float] = {}
    for base in (LOWER_BOUND, "none", "copy"):  # the last that there is
        bases |= {row.place: row.median_us for row in record.rows if row.what == base}
    judged = [row for row in record.rows if row.rounds and row.kind not in ("copy", LOWER_BOUND)]
    found = {(*row.place, row.what, row.direction): (row, bases.get(row.place)) for row in judged}
    return {key: (row, base) for key, (row, base) in found.items() if base is not None}


def slower(old: tuple[Row, float], new: tuple[Row, float]) -> bool:
    """By :data:`RULE`: a slower machine slows the copy too, and a disturbed copy changes alone."""
    (a, then), (b, now) = old, new
    return all(
        b.low_us / y > a.high_us / x and b.median_us / y > (1 + NOISE) * a.median_us / x
        for x, y in ((1, 1), (then, now))
    )


def compare(old: Record, new: Record) -> tuple[str, list[Place]]:
    """(a report, the keys of what got slower)."""
    names = ("device", "cpu", "capability", "cores", "torch")
    then, now = ({name: one.environment.get(name) for name in names} for one in (old, new))
    others = [name for name in names if then[name] != now[name]]
    lines = [f"another {name}: {then[name]} then, {now[name]} now" for name in others]
    before, after = timings(old), timings(new)
    both = [key for key in after if key in before]
    found = [key for key in both if slower(before[key], after[key])]
    faster = sum(slower(after[key], before[key]) for key in both)
    times = {key: (before[key][0].median_us, after[key][0].median_us) for key in found}
    for key, (a, b) in sorted(times.items(), key=lambda one: -one[1][1] / one[1][0]):
        words = ", ".join(name_of(p) if isinstance(p, tuple) else str(p) for p in key)
        lines.append(f"slower: {words}: {a:.1f} us then, {b:.1f} us now ({b / a:.2f}x)")
    lines.append(
        f"compared {len(both)} timings with commit {old.environment.get('commit')}: {len(found)} "
        f"slower, {faster} faster; {len(after) - len(both)} only now, {len(before) - len(both)} "
        f"only then ({RULE})"
    )
    return "\n".join(lines), found
