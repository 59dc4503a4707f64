"""Tables of a result: ratios to the floor first, then times, errors and a summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import timing
from .suite import FLOOR, Result, Row

MODES = {"forward": "forward", "step": "forward+backward"}


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first ones left, numbers right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if text[:1].isdigit() or text == "-" else text.ljust(width)

    rule = "  ".join("-" * width for width in widths)
    text = ["  ".join(map(cell, line, widths)).rstrip() for line in lines]
    return "\n".join([text[0], rule, *text[1:]])


@dataclass
class Worst:
    """Where a fused column does worst against the fastest plain one."""

    ratio: float
    case: str
    layout: str
    mode: str
    peer: str


@dataclass
class Summary:
    """What a result says in a few figures; all dictionaries are by column."""

    forward: dict[str, float]  # geometric means of the ratios to the floor
    step: dict[str, float]
    worst: dict[str, Worst]
    half: dict[
        str, float
    ]  # geometric means of a half type's forward time over float32's of the same backend
    half_worst: dict[str, float]


def inputs(result: Result) -> dict[tuple[str, str], dict[str, Row]]:
    """``{(case, layout): {column: row}}``."""
    grouped: dict[tuple[str, str], dict[str, Row]] = {}
    for row in result.rows:
        grouped.setdefault((row.case, row.layout), {})[row.column] = row
    return grouped


def column_names(result: Result, *, floor: bool = False, half: bool = False) -> list[str]:
    names = dict.fromkeys(
        row.column
        for row in result.rows
        if (floor or row.column != FLOOR) and (half or row.dtype == "float32")
    )
    return list(names)


def summarize(result: Result) -> Summary:
    grouped = inputs(result)
    means: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    worst: dict[str, Worst] = {}
    for name in column_names(result):
        rows = [columns[name] for columns in grouped.values()]
        for mode in MODES:
            means[mode][name] = geometric_mean(getattr(row, f"{mode}_ratio") for row in rows)
    for (case, layout), columns in grouped.items():
        plain = [row for row in columns.values() if row.kind == "plain"]
        for row in columns.values():
            if row.kind != "fused" or row.dtype != "float32":
                continue
            for mode in MODES:
                best = min(plain, key=lambda peer: getattr(peer, f"{mode}_ms"))
                ratio = getattr(row, f"{mode}_ms") / getattr(best, f"{mode}_ms")
                if row.column not in worst or ratio > worst[row.column].ratio:
                    worst[row.column] = Worst(ratio, case, layout, MODES[mode], best.column)
    half: dict[str, list[float]] = {}
    for columns in grouped.values():
        for row in columns.values():
            if row.dtype != "float32":
                same = columns[row.column.removesuffix(f" {row.dtype}")]
                half.setdefault(row.column, []).append(row.forward_ms / same.forward_ms)
    return Summary(
        means["forward"],
        means["step"],
        worst,
        {name: geometric_mean(ratios) for name, ratios in half.items()},
        {name: max(ratios) for name, ratios in half.items()},
    )


def ratio_table(result: Result, mode: str) -> str:
    """Ratios to the floor, an input a line, and their geometric means."""
    names, grouped, summary = column_names(result), inputs(result), summarize(result)
    lines = [
        [case, layout, *(f"{getattr(columns[name], f'{mode}_ratio'):.2f}" for name in names)]
        for (case, layout), columns in grouped.items()
    ]
    lines.append(["geometric mean", "", *(f"{getattr(summary, mode)[name]:.2f}" for name in names)])
    return table(["input", "layout", *names], lines)


def time_table(result: Result, mode: str) -> str:
    names = column_names(result, floor=True, half=mode == "forward")
    names.sort(key=lambda name: name != FLOOR)
    lines = [
        [case, layout, *(f"{getattr(columns[name], f'{mode}_ms'):.3f}" for name in names)]
        for (case, layout), columns in inputs(result).items()
    ]
    return table(["input", "layout", *names], lines)


def error_table(result: Result) -> str:
    """The largest error of each backend and dtype over all inputs of a layout, beside its tolerance."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for key in dict.fromkeys((row.backend, row.dtype, row.layout) for row in result.errors):
        rows = [row for row in result.errors if (row.backend, row.dtype, row.layout) == key]
        cells = []
        for quantity in ("y", "dx", "parameters"):
            # NaN must show, and max() would lose it
            largest = max(
                (getattr(row.errors, quantity) for row in rows), key=lambda e: (math.isnan(e), e)
            )
            cells += [f"{largest:.1e}", f"{getattr(rows[0].limits, quantity):.0e}"]
        groups[key] = [*cells, "yes" if all(row.ok for row in rows) else "NO"]
    header = [
        "backend",
        "dtype",
        "layout",
        "y",
        "may be",
        "dx",
        "may be",
        "dweight, dbias",
        "may be",
        "within",
    ]
    return table(header, [[*key, *cells] for key, cells in groups.items()])


def summary_text(result: Result) -> str:
    summary = summarize(result)
    lines = ["geometric means of the ratios to the floor (forward, forward+backward):"]
    width = max(map(len, summary.forward), default=0)
    lines += [
        f"  {name:{width}}  {summary.forward[name]:6.2f} {summary.step[name]:6.2f}"
        for name in summary.forward
    ]
    for name, worst in summary.worst.items():
        where = f"{worst.case}, {worst.layout}, {worst.mode}"
        lines.append(
            f"{name}: at worst {worst.ratio:.2f} times the fastest plain formulation ({worst.peer}; {where})"
        )
    for name, mean in summary.half.items():
        lines.append(
            f"{name}: forward {mean:.2f} times float32's time, at worst {summary.half_worst[name]:.2f}"
        )
    return "\n".join(lines)


def disturbances(result: Result) -> str:
    """A warning that names the inputs whose timing other processes disturbed, or nothing."""
    rows = [columns[FLOOR] for columns in inputs(result).values()]
    lines = [
        f"  {row.case}, {row.layout}: {row.others:.0%}"
        for row in rows
        if row.others is not None and row.others > timing.DISTURBED
    ]
    if not lines:
        return ""
    return "\n".join(
        ["WARNING: other processes used the processor meanwhile; do not trust the times of", *lines]
    )


def full_report(result: Result) -> str:
    parts = []
    for mode, title in MODES.items():
        parts += [
            f"{title}, ratio to the floor (1 is the least any layer can take)",
            ratio_table(result, mode),
        ]
    for mode, title in MODES.items():
        parts += [f"{title}, milliseconds (medians)", time_table(result, mode)]
    parts += [
        "largest errors against float64 (relative L2)",
        error_table(result),
        summary_text(result),
    ]
    return "\n\n".join(part for part in [*parts, disturbances(result)] if part)
