"""Runs a suite: progress, what stays on disk after every group, interruption, resumption, and the comparison with an older run."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import compare, files, timing
from .measure import Group, Measured, Row, measure
from .suite import usable_backends

COMPILING = 9.0  # seconds that the two programs of one compiled contender take, about: only the progress bar asks
CHECKING = 1.5  # and inputs, float64, memory
INTERRUPTED = 130  # exit status, as a shell has it
SAME = (
    "commit",
    "device",
    "cpu",
    "cores",
    "capability",
    "torch",
    "ppcr_ext",
)  # of two environments whose rows may stand in one file

Draw = Callable[[list[Row], Path, dict[str, Any]], list[Path]]


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
        content = asdict(self)
        new = everything.with_suffix(
            ".json.new"
        )  # so that an interruption leaves the old file or the new one
        new.write_text(json.dumps(files.rounded(content), indent=1, allow_nan=True) + "\n")
        new.replace(everything)
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f.name for f in fields(Row)])
            for row in self.rows:
                cells = asdict(row) | {
                    "shape": "x".join(map(str, row.shape)),
                    "levels": "-".join(map(str, row.levels)),
                }
                writer.writerow([files.rounded(cell) for cell in cells.values()])
        return [table, everything]


def read(path: Path) -> Record:
    """What :meth:`Record.write` wrote; ValueError where the file is something else."""
    try:
        content = json.loads(path.read_text())
        rows = [Row(**row) for row in content.pop("rows")]
        return Record(**content, rows=rows)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a file of the operators or the scaling suite: {error}"
        ) from error


def resume(record: Record, path: Path) -> str:
    """Takes over the rows of an earlier run where they may stand beside new ones; says what it did."""
    if not path.is_file():
        return f"nothing to resume: no {path}"
    old = read(path)
    differing = [name for name in SAME if old.environment.get(name) != record.environment.get(name)]
    if record.environment["commit"] == "unknown" or record.environment["commit"].endswith("+"):
        return "not resumed: the working tree differs from its commit, so that nobody knows what the old rows measured"
    if differing or old.settings != record.settings:
        return f"not resumed: other {', '.join(differing) or 'settings'} than those of {path}"
    record.rows, record.skipped = old.rows, old.skipped
    return f"resumed {len(old.rows)} rows of {path}"


def seconds_of(group: Group, limit: float) -> float:
    return limit * 1.5 + CHECKING + COMPILING * len(group.modes) * len(group.compiled)


def run(
    suite: str,
    groups: Sequence[Group],
    device: torch.device,
    out: Path,
    *,
    rounds: int,
    limit: float,
    draw: Draw,
    quick: bool = False,
    resuming: bool = False,
    against: Path | None = None,
    measuring: Callable[..., Measured] = measure,
) -> int:
    """Measures all groups into ``out``/``suite``.*; 0, 1 (an error too large, or slower than ``against``), or 130 (interrupted)."""
    begin = time.perf_counter()
    older = (
        compare.read(against) if against is not None else None
    )  # before anything is measured or overwritten
    timing.keep_memory()
    backends, reasons = usable_backends(device)
    record = Record(
        suite,
        files.environment(device),
        {"rounds": rounds, "seconds_per_group": limit, "quick": quick},
    )
    where = out / suite
    env = record.environment
    print(
        f"{env['device']}, {env['cpu']} ({env['capability']}), torch {env['torch']}; backends: {', '.join(backends)}"
    )
    for name, reason in reasons.items():
        print(f"  {name}: {reason}")
    if resuming:
        print(resume(record, where.with_suffix(".json")))
    done = {row.group for row in record.rows}
    left = [group for group in groups if group.key not in done]
    interrupted = False
    try:
        with _progress(sum(seconds_of(group, limit) for group in left)) as bar:
            for group in left:
                bar.set_description(
                    f"{group.operator} {group.case}, {group.layout}, {group.dtype}, {group.threads} threads"
                )
                got = measuring(group, backends, device, rounds, limit)
                record.rows += got.rows
                record.skipped += got.skipped
                bar.update(seconds_of(group, limit))
                record.write(where)
    except KeyboardInterrupt:
        interrupted = True
    record.complete = not interrupted
    written = record.write(where)
    if record.rows:
        written += draw(record.rows, out, env)
    seconds = time.perf_counter() - begin
    print(
        f"{'INTERRUPTED, incomplete: ' if interrupted else ''}wrote {', '.join(map(str, written))} in {seconds:.0f} s"
    )
    return _judge(record, older) or (INTERRUPTED if interrupted else 0)


def _progress(total: float) -> tqdm[Any]:
    form = "{l_bar}{bar}| {elapsed}, {remaining} left"
    return tqdm(total=math.ceil(total), bar_format=form, smoothing=0, file=sys.stderr)


def _judge(record: Record, older: compare.Old | None) -> int:
    """Prints what was skipped, what is wrong and what got slower."""
    for one in {(s["what"], s["reason"]): s for s in record.skipped}.values():
        print(f"skipped {one['what']} ({one['case']} and the like): {one['reason']}")
    disturbed = [row for row in record.rows if (row.others or 0) > timing.DISTURBED]
    if disturbed:
        print(
            f"WARNING: other processes used the processor during {len(disturbed)} of {len(record.rows)} rows; do not trust their times"
        )
    wrong = [row for row in record.rows if not row.within]
    for row in wrong:
        found = f"y {row.error_y}, dx {row.error_dx}, dweight and dbias {row.error_parameters}"
        print(
            f"error above tolerance: {row.what}, {row.operator} {row.direction}, {row.case}, {row.layout}, {row.dtype}: {found}"
        )
    slower: list[compare.Key] = []
    if older is not None:
        report, slower = compare.against(
            older,
            compare.Old(record.environment, compare.timings([asdict(row) for row in record.rows])),
        )
        print(report)
    return 1 if wrong or slower else 0
