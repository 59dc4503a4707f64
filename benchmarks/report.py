"""Tables of what was measured: for the terminal, for the README, and for a page of each device."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, linear_regression, median
from typing import Any

import numpy as np
import torch

from ppcr_ext import testing

from .baselines import LOWER_BOUND, WITH_AUTOGRAD
from .cases import VARIANTS
from .results import Record, Row, read
from .timing import DISTURBED

FITTED = 4  # the largest points: what a call costs at least hides the slope of the small ones
BOUND = "native / lower bound"
BEST_PLAIN = ("plain PyTorch / native", "`torch.compile` / native")
SPREAD = "spread of the lower bound"
FASTER = "Bold: faster than `{0}`."
METHOD = (
    "Times over those of `{0}`, geometric means and ranges over all inputs; {1} rounds. "
    "[docs/benchmarks.md](../../../docs/benchmarks.md) has the lower bounds and the baselines; the "
    "spread is the distance of the quartiles over the median. " + FASTER
)
NETWORKS = (
    "Time over that of the network without attention in the same round: medians over the rounds, "
    "with their 95 % confidence intervals. A step is forward, loss, backward and SGD. "
) + FASTER.format("PPCR fused")
DEVICES = (
    "Times of a call as ratios: geometric means over all shapes in both layouts, and their ranges. "
    "The lower bound is the plainest operation that moves the same bytes, such as `x * 0.5`. Of "
    "plain PyTorch, as it is and compiled, each shape counts the fastest formulation. Each device "
    "has a page with every figure. Below stands what is faster than this package there: in how "
    "many of the timed calls, and its shortest time over ours."
)
PLANS = (
    "The bandwidth at which the CUDA kernels move what they must, over that of `y.copy_(x)`, by "
    "device time. Values above 1 are possible: a copy is half writing, and reading is faster. "
    "Driver {driver}; `tools/gpu_plans.py`."
)
COSTS = "What a call costs: microseconds on a tensor of 1x8x2x2."
MEMORY = "Peak memory above the inputs, results included, in multiples of x's bytes."
HOST = "Microseconds of the host that launches a call / of the device."

Cell = tuple[str, str, Any]  # line, column, one of the values that meet there


def summary(line: str, column: str, values: list[Any]) -> str:
    """What a cell says: all of its texts, or the mean of its numbers."""
    if isinstance(values[0], str):
        return " / ".join(values)
    if SPREAD in line + column:  # may be 0
        return f"{median(values):.1%} ({min(values):.1%} to {max(values):.1%})"
    return f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def pivot(
    cells: Iterable[Cell],
    text: Callable[[str, str, list[Any]], str] = summary,
    lines: Iterable[str] = (),
    columns: Iterable[str] = (),
) -> str:
    """A Markdown table: what ``text`` makes of a cell's values, ``-`` where there are none."""
    # Lines and columns, after those that are given, are in the order of the cells; empty ones go.
    found: dict[tuple[str, str], list[Any]] = {}
    for line, column, value in cells:
        if value is not None:
            found.setdefault((line, column), []).append(value)
    down, across = (dict.fromkeys(at[i] for at in found) for i in (0, 1))
    header = [column for column in dict.fromkeys([*columns, *across]) if column in across]
    texts = [["", *header]]
    for line in (line for line in dict.fromkeys([*lines, *down]) if line in down):
        cells_of = ((column, found.get((line, column))) for column in header)
        texts.append([line, *(text(line, c, values) if values else "-" for c, values in cells_of)])
    widths = [max(3, *map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)])
    form = " | ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(f"| {form.format(*line)} |" for line in texts)


def bold(text: str, row: Row) -> str:
    return f"**{text}**" if row.is_faster else text


def faster(rows: Iterable[Row]) -> str:
    """All cells in which a baseline is faster, with its time over ours."""
    found = [row for row in rows if row.is_faster]
    texts = [f"{r.what}, {r.operator} {r.passes}, {r.label} ({r.over_fused:.2f})" for r in found]
    return "; ".join(texts) or "none"


def fastest(rows: Iterable[Row]) -> str:
    """Everything that is faster than ours in some call: in how many, and its least time."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.over_fused and row.kind not in ("copy", LOWER_BOUND) and row.what != "none":
            ratios.setdefault(row.what, []).append(row.over_fused)
    texts = [
        f"{what} {sum(value < 1 for value in values)} of {len(values)} ({min(values):.2f})"
        for what, values in ratios.items()
        if min(values) < 1
    ]
    return ", ".join(texts) or "none"


def ratio_table(rows: Sequence[Row], fused: str, in_float32: dict[Any, float]) -> str:
    """The fused backend beside its lower bounds, then how many times as long the others take."""
    # ``in_float32`` has its times in that dtype, by case, layout and call.
    cells, ratios = list[Cell](), dict[str, list[float]]()
    bound, share = f"**{fused}** over the lower bound", f"**{fused}**, share of a copy's bandwidth"
    autograd = f"{bound} with autograd"
    for row in rows:
        at, ratio = f"{row.operator} {row.passes}", row.over_fused
        if row.what == fused:
            cells += [(bound, at, row.ratio), (share, at, row.copy_fraction)]
            if row.dtype != "float32" and (time := in_float32.get((row.case, row.layout, at))):
                cells += [(f"**{fused}** over its time in float32", at, row.median_us / time)]
        elif row.what == LOWER_BOUND:
            cells += [(SPREAD, at, row.spread)]
        elif row.what == WITH_AUTOGRAD:
            cells += [(autograd, at, 1 / ratio if ratio else None)]
        elif ratio:
            cells += [(f"{row.what} over {fused}", at, ratio)]
            ratios.setdefault(cells[-1][0], []).append(ratio)

    def text(line: str, column: str, values: list[float]) -> str:
        """Bold, and with the number of inputs, where something is faster than ours."""
        found = summary(line, column, values)
        count = sum(value < 1 for value in values) if line in ratios else 0
        return f"**{found}, {count} of {len(values)} faster**" if count else found

    slowest_last = sorted(ratios, key=lambda line: geometric_mean(ratios[line]))
    return pivot(cells, text, [bound, SPREAD, autograd, share, *slowest_last])


def bound_table(rows: Sequence[Row]) -> str:
    """Ratios to the lower bound, an input a line, forward / forward+backward."""
    cells: list[Cell] = []
    for row in rows:
        if row.what == LOWER_BOUND:
            cells.append((row.label, SPREAD, f"{row.spread:.1%}"))
        elif row.ratio is not None and row.kind != "other layer":
            cells.append((row.label, row.what, bold(f"{row.ratio:.2f}", row)))
    return pivot(cells, columns=(SPREAD, WITH_AUTOGRAD))


def error_table(rows: Iterable[Row]) -> str:
    """The largest error of each backend and dtype beside its tolerance."""
    cells: list[Cell] = []
    for row in rows:
        if row.kind in ("fused", "reference"):
            name, limits = f"{row.what}, {row.dtype}", testing.tolerance(getattr(torch, row.dtype))
            for of, title in (("y", "y"), ("dx", "dx"), ("parameters", "dweight, dbias")):
                error, limit = getattr(row, f"error_{of}"), getattr(limits, of)
                cells.append((name, title, None if error is None else (error, limit)))
            cells.append((name, "within", row.within))

    def text(_: str, column: str, values: list[Any]) -> str:
        if column == "within":
            return "yes" if all(values) else "**NO**"
        # NaN must show, and max() would lose it
        error, limit = max(values, key=lambda value: (math.isnan(value[0]), value[0]))
        return f"{error:.1e} (may be {limit:.0e})"

    return pivot(cells, text, columns=("y", "dx"))


def _layers(record: Record) -> list[str]:
    rows, fused = record.timed, record.fused
    counts = sorted({row.rounds for row in rows})
    parts = [METHOD.format(fused, " to ".join(map(str, sorted({*counts[:1], *counts[-1:]}))))]
    in_float32 = {
        (row.case, row.layout, f"{row.operator} {row.passes}"): row.median_us
        for row in rows
        if (row.what, row.dtype) == (fused, "float32")
    }
    for operator, dtype in dict.fromkeys((row.operator, row.dtype) for row in rows):
        same = [row for row in rows if (row.operator, row.dtype) == (operator, dtype)]
        parts += [f"{operator}, {dtype}:", ratio_table(same, fused, in_float32)]
    parts.append(f"Faster than `{fused}`: {faster(rows)}.")
    if record.command in ("shapes", "retina"):
        wide = [row for row in rows if row.dtype == "float32"]
        parts += ["Time over the lower bound, forward / forward+backward:", bound_table(wide)]
    parts += ["Largest relative errors against float64:", error_table(record.rows)]
    costs: dict[str, list[Cell]] = {COSTS: [], MEMORY: [], HOST: []}
    for row in record.rows:
        name, at = f"{row.operator}, {row.what}", row.passes
        if row.case.startswith("tiny") and row.kind != "copy":
            costs[COSTS].append((name, at, bold(f"{row.median_us:.1f}", row)))
        elif row.kind in ("fused", "reference", "plain"):
            if row.peak_bytes is not None and row.dtype == rows[0].dtype:
                size = math.prod(row.shape) * getattr(torch, row.dtype).itemsize
                costs[MEMORY].append((name, at, row.peak_bytes / size))
            if row.host_us is not None and row.kind == "fused":
                both = f"{row.host_us:.1f} / {row.median_us:.1f}"
                costs[HOST].append((f"{name}, {row.label}", at, bold(both, row)))
    for title, cells in costs.items():
        parts += [title, pivot(cells)] if cells else []
    return parts


def exponent(points: Sequence[tuple[int, float]]) -> str:
    """That of a power law through the largest points, and their range."""
    last = points[-FITTED:]
    if len(last) < 2:
        return "nan (a single size)"
    slope = linear_regression(*np.log(last).T).slope
    # without the sign of a zero
    return f"{round(slope, 2) + 0.0:.2f} ({last[0][0]} to {last[-1][0]})"


def _scaling(record: Record) -> list[str]:
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in record.rows:
        if row.kind not in ("copy", LOWER_BOUND):
            line = f"{row.what}, {row.on_threads}, {row.passes}"
            points.setdefault((line, row.case), []).append((row.size, row.median_us))
    text = (
        f"Exponents of time as a power of one quantity while the others stay, fitted to the "
        f"largest {FITTED} sizes, which are in brackets: 1 is proportional. "
        f"Faster than `{record.fused}`: {faster(record.rows)}."
    )
    return [text, pivot([(*at, exponent(sorted(found))) for at, found in points.items()])]


def network_table(rows: Iterable[Row]) -> str:
    cells = list[Cell]()
    for row in (row for row in rows if row.what in VARIANTS[1:]):
        text = f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})"
        cells.append((f"{row.label}, {row.direction}", row.what, bold(text, row)))
    return pivot(cells, columns=VARIANTS[1:])


def _networks(record: Record) -> list[str]:
    saved = [
        (row.label, row.what, f"{row.saved_bytes / 2**20:.0f}")
        for row in record.rows
        if row.saved_bytes is not None and "compiled" not in row.case
    ]
    parts = [f"{record.settings['rounds']} rounds. {NETWORKS}", network_table(record.rows)]
    memory = "MB that autograd keeps from forward to backward:"
    return [*parts, memory, pivot(saved, columns=VARIANTS)]


def _plans(record: Record) -> list[str]:
    """What tools/gpu_plans.py measured: a table for every layout."""
    parts = [PLANS.format(**record.environment)]
    for layout in testing.LAYOUTS:
        cells = [
            (f"{row.case}, {row.dtype}", f"{row.operator} {row.passes}", f"{row.copy_fraction:.2f}")
            for row in record.rows
            if row.layout == layout
        ]
        parts += [f"{layout}:", pivot(cells)]
    return parts


# By the name of the file.
SECTIONS: dict[str, tuple[str, Callable[[Record], list[str]]]] = {
    "plans": ("CUDA kernels beside a copy", _plans),
    "operators": ("Operators", _layers),
    "end_to_end": ("Whole networks", _networks),
    "scaling": ("Scaling", _scaling),
    "shapes": ("Eight shapes", _layers),
    "retina": ("A photograph's feature maps", _layers),
}


def console(record: Record) -> str:
    """The tables of a record, and which of its rounds were disturbed."""
    parts, disturbed = SECTIONS[record.command][1](record), dict[str, str]()
    for row in record.rows:
        if (row.other_load or 0) > DISTURBED:
            disturbed[f"{row.operator} {row.label}"] = f"{row.other_load:.1%}"
    if disturbed:
        found = ", ".join(f"{name} ({share})" for name, share in disturbed.items())
        parts.append(f"Other processes used the processor, do not trust the times of: {found}.")
    return "\n\n".join(parts)


def records(folder: Path) -> dict[str, Record]:
    """What was measured on the device of a folder."""
    files = {stem: folder / f"{stem}.json" for stem in SECTIONS}
    return {stem: read(file) for stem, file in files.items() if file.is_file()}


def page(folder: Path) -> str:
    """Everything measured on the device of a folder."""
    parts = [f"# Measured on {folder.name}", "Written by `make results` from the files beside it."]
    for stem, record in records(folder).items():
        title, _ = SECTIONS[stem]
        parts += [f"## {title}", f"{record.machine}.", console(record)]
        parts += [f"![{title}]({path.name})" for path in sorted(folder.glob(f"{stem}*.png"))]
    return "\n\n".join(parts) + "\n"


def headline(found: Mapping[str, Record]) -> Record | None:
    """The file of a device that the README speaks of."""
    return found.get("shapes") or found.get("operators")


def best_plain(record: Record) -> dict[tuple[str, str], list[float]]:
    """Of the fastest plain formulation on each input, eager or compiled, the time over ours, by
    column of the README and direction."""
    best: dict[Any, float] = {}
    for row in record.headline:
        if row.kind == "plain" and row.direction != "backward" and row.over_fused:
            at = BEST_PLAIN[row.what.endswith(" compiled")], row.direction, row.place
            best[at] = min(best.get(at, math.inf), row.over_fused)
    found: dict[tuple[str, str], list[float]] = {}
    for (column, direction, _), ratio in best.items():
        found.setdefault((column, direction), []).append(ratio)
    return found


def section(folders: Iterable[Path]) -> str:
    """The README's results: two lines for each device, and below them with what they were measured
    and what is faster there."""
    cells, devices = list[Cell](), list[str]()
    for folder in folders:
        found = records(folder)
        if record := headline(found):
            rows = [row for row in record.headline if row.direction != "backward"]
            name = f"{folder.name}, {record.rows[0].dtype}, {record.environment['date'][:10]}"
            lines = {row.direction: f"{name}, {row.passes}" for row in rows}
            for row in rows:
                if row.what == record.fused:
                    cells.append((lines[row.direction], BOUND, row.ratio))
                elif row.what == LOWER_BOUND:
                    cells.append((lines[row.direction], SPREAD, row.spread))
            for (column, direction), ratios in best_plain(record).items():
                cells += [(lines[direction], column, ratio) for ratio in ratios]
            link = f"[{folder.name}](benchmarks/results/{folder.name}/README.md)"
            calls = [row for one in found.values() for row in one.rows if row.kind != "network"]
            text = f"- {link}: {record.machine}. Faster than `{record.fused}`: {fastest(calls)}."
            if networks := found.get("end_to_end"):
                text += f" In networks, faster than `PPCR fused`: {fastest(networks.rows)}."
            devices.append(text)
    columns = (BOUND, SPREAD, *BEST_PLAIN)
    return "\n\n".join((DEVICES, pivot(cells, columns=columns), "\n".join(devices)))
