"""What got slower between two runs, beyond the noise."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOISE = 0.10  # medians that differ by no more than this are the same
RULE = (
    f"slower: the quartiles of the two runs do not overlap and the median grew by more than {NOISE:.0%}, "
    "both in time and in time over that of the copy measured in the same rounds"
)
PLACE = ("suite", "operator", "case", "shape", "layout", "dtype", "threads", "levels")

Key = tuple[Any, ...]


@dataclass
class Timed:
    """Median and quartiles in microseconds, and the median of the copy beside it."""

    low: float
    median: float
    high: float
    copy: float


@dataclass
class Old:
    """A run, as far as a comparison asks."""

    environment: dict[str, Any]
    timed: dict[Key, Timed]


def timings(rows: Iterable[dict[str, Any]]) -> dict[Key, Timed]:
    """What was timed, by where and what; the floors and copies are no one's code."""
    rows = list(rows)

    def place(row: dict[str, Any]) -> Key:
        return tuple(
            tuple(row[name]) if isinstance(row[name], list) else row[name] for name in PLACE
        )

    copies = {place(row): row["median_us"] for row in rows if row["kind"] == "copy"}
    return {
        (*place(row), row["what"], row["direction"]): Timed(
            row["low_us"], row["median_us"], row["high_us"], copies[place(row)]
        )
        for row in rows
        if row["kind"] not in ("copy", "floor")
    }


def read(path: Path) -> Old:
    """A JSON file of the operators or the scaling suite; ValueError for another."""
    try:
        content = json.loads(path.read_text())
        return Old(content["environment"], timings(content["rows"]))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot compare with {path}: {error!r}") from error


def slower(old: Timed, new: Timed) -> bool:
    """By :data:`RULE`. A slower machine slows the copy too, a disturbed copy leaves the time: each alone proves nothing."""
    apart = new.low > old.high and new.median > (1 + NOISE) * old.median
    relative = (
        new.low / new.copy > old.high / old.copy
        and new.median / new.copy > (1 + NOISE) * old.median / old.copy
    )
    return apart and relative


def against(old: Old, new: Old) -> tuple[str, list[Key]]:
    """(a report, the keys of what got slower)."""
    lines = []
    for name in ("device", "cpu", "capability", "cores", "torch"):
        if old.environment.get(name) != new.environment.get(name):
            lines.append(
                f"another {name}: {old.environment.get(name)} then, {new.environment.get(name)} now"
            )
    both = [key for key in new.timed if key in old.timed]
    found = [key for key in both if slower(old.timed[key], new.timed[key])]
    faster = [key for key in both if slower(new.timed[key], old.timed[key])]
    found.sort(key=lambda key: -new.timed[key].median / old.timed[key].median)
    for key in found:
        one, other = old.timed[key], new.timed[key]
        words = ", ".join(
            "x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in key
        )
        lines.append(
            f"slower: {words}: {one.median:.1f} us then, {other.median:.1f} us now ({other.median / one.median:.2f} times)"
        )
    only = len(new.timed) - len(both), len(old.timed) - len(both)
    lines.append(
        f"compared {len(both)} timings with commit {old.environment.get('commit')}: {len(found)} slower, {len(faster)} faster; "
        f"{only[0]} only now, {only[1]} only then ({RULE})"
    )
    return "\n".join(lines), found
