"""Tables of what was measured: for the terminal, for the README, and for a page of each device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np
import torch

from ppcr_ext import testing

from .baselines import LOWER_BOUND, WITH_AUTOGRAD
from .cases import VARIANTS, size_of
from .results import Record, Row, read

START, END = "<!-- results:start -->", "<!-- results:end -->"
FITTED = 4  # the largest points: what a call costs at least hides the slope of the small ones
BASELINES = ("reference", "plain", "other layer", "network")
HEADLINE = tuple(f"{o} {d}" for o in ("ppcr", "add_relu") for d in ("forward", "forward+backward"))
SPREAD = "spread of the lower bound"
BEST_COMPILED = "pooled once compiled"
FASTER = "Bold: faster than `{0}`."
METHOD = (
    "Times over those of `{0}`, geometric means and ranges over all inputs; at most {1} rounds. "
    "The lower bound is `x * 0.5` forward and `x + gy` backward (with a residual `x + residual`, "
    "`x + gy` and `residual * 0.5`), for small inputs also with a run of the autograd engine "
    "through an identity. Its spread is the distance of its quartiles over its median. " + FASTER
)
NETWORKS = (
    "Time over that of the network without attention in the same round: medians, with their 95 % "
    "confidence intervals. A step is forward, loss, backward and SGD. "
) + FASTER.format("PPCR fused")
COSTS = "What a call costs: microseconds on a tensor of 1x8x2x2."
MEMORY = "Peak memory above the inputs, results included, in multiples of x's bytes; means over "
HOST = "Microseconds of the host that launches a call / of the device."

Cell = tuple[str, str, Any]  # line, column, one of the values that meet there


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown whose columns line up."""
    cells = [list(header), *map(list, lines)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    form = " | ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    rule = ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)]
    return "\n".join(f"| {form.format(*line)} |" for line in (cells[0], rule, *cells[1:]))


def pivot(
    cells: Iterable[Cell],
    text: Callable[[str, list[Any]], str] = lambda line, values: values[0],
    lines: Iterable[str] = (),
    columns: Iterable[str] = (),
) -> str:
    """A table with the text of the values of each line and column, ``-`` where there are none.

    Lines and columns, after those that are given, are in the order of the cells.
    """
    found: dict[str, dict[str, list[Any]]] = {line: {} for line in lines}
    header = dict.fromkeys(columns)
    for line, column, value in cells:
        header.setdefault(column)
        values = found.setdefault(line, {}).setdefault(column, [])
        values += [] if value is None else [value]
    body = (
        [text(line, v) if (v := at.get(c)) else "-" for c in header] for line, at in found.items()
    )
    return table(["", *header], ([line, *texts] for line, texts in zip(found, body, strict=True)))


def words(direction: str) -> str:
    return "forward+backward" if direction == "step" else direction


def call_of(row: Row) -> str:
    return f"{row.operator} {words(row.direction)}"


def label(row: Row) -> str:
    return ", ".join([row.case, row.layout, *([row.dtype] * (row.dtype != "float32"))])


def mean_and_range(values: Sequence[float], form: str = ".2f") -> str:
    return f"{geometric_mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def is_faster(row: Row) -> bool:
    """Whether it is a baseline that is faster than ours, which every table marks."""
    return row.kind in BASELINES and (row.over_fused or 1) < 1


def bold(text: str, row: Row) -> str:
    return f"**{text}**" if is_faster(row) else text


def machine(record: Record) -> str:
    """Where, with what and when."""
    env, where = record.environment, record.environment["device"]
    if where == "cpu":
        threads = " and ".join(map(str, sorted({row.threads for row in record.rows})))
        where = f"{env['cpu']} ({env['capability']}), {threads} thread{'s' * (threads != '1')}"
    return f"{where}, PyTorch {env['torch']}, {env['date'][:10]}, commit {env['commit']}"


def fused_of(rows: Iterable[Row]) -> str:
    """The backend that all others are compared with."""
    return next((row.what for row in rows if row.over_fused == 1), "native")


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows with times, without the tiny input."""
    return [row for row in rows if row.rounds and not row.case.startswith("tiny")]


def headline_dtype(record: Record) -> str:
    """What is trained in on that device."""
    wanted = "float32" if record.environment["device"] == "cpu" else "bfloat16"
    return wanted if any(row.dtype == wanted for row in record.rows) else record.rows[0].dtype


def ratio_table(rows: Sequence[Row], kinds: Sequence[str], columns: Iterable[str] = ()) -> str:
    """The fused backend beside its lower bounds, then how many times as long the others take."""
    fused, cells, ratios = fused_of(rows), list[Cell](), dict[str, list[float]]()
    bound, share = f"**{fused}** over the lower bound", f"**{fused}**, share of a copy's bandwidth"
    autograd = f"{bound} with autograd"
    for row in rows:
        at, ratio = call_of(row), row.over_fused
        if row.what == fused:
            cells += [(bound, at, row.ratio), (share, at, row.copy_fraction)]
        elif row.what == LOWER_BOUND:
            cells += [(SPREAD, at, row.spread)]
        elif row.what == WITH_AUTOGRAD:
            cells += [(autograd, at, 1 / ratio if ratio else None)]
        elif row.kind in kinds and ratio:
            cells += [(f"{row.what} over {fused}", at, ratio)]
            ratios.setdefault(cells[-1][0], []).append(ratio)

    def text(line: str, values: list[float]) -> str:
        """Bold, and with the number of inputs, where a baseline is faster than ours."""
        found = mean_and_range(values, ".1%" if line == SPREAD else ".2f")
        faster = sum(value < 1 for value in values) if line in ratios else 0
        return f"**{found}, {faster} of {len(values)} faster**" if faster else found

    slowest_last = sorted(ratios, key=lambda line: geometric_mean(ratios[line]))
    return pivot(cells, text, [bound, SPREAD, autograd, share, *slowest_last], columns)


def bound_table(rows: Sequence[Row]) -> str:
    """Ratios to the lower bound, an input a line, forward / forward+backward."""
    cells: list[Cell] = []
    for row in rows:
        if row.what == LOWER_BOUND:
            cells.append((label(row), SPREAD, f"{row.spread:.1%}"))
        elif row.ratio is not None and row.kind != "other layer":
            cells.append((label(row), row.what, bold(f"{row.ratio:.2f}", row)))
    return pivot(cells, lambda _, texts: " / ".join(texts), (), (SPREAD, WITH_AUTOGRAD))


def worst(rows: Sequence[Row]) -> str:
    """Where the fused backend does worst beside the fastest plain formulation."""
    found = [(r.over_fused, r) for r in rows if r.kind == "plain" and r.over_fused is not None]
    if not found:
        return ""
    ratio, row = min(found, key=lambda one: one[0])
    return (
        f"Where `{fused_of(rows)}` does worst it takes {1 / ratio:.2f} times as long as the "
        f"fastest plain formulation ({row.what}; {call_of(row)}, {label(row)})."
    )


def other_types(rows: Iterable[Row]) -> str:
    """Forward time of the fused backends over that in float32."""
    fused = [row for row in rows if call_of(row) == "ppcr forward" and row.kind == "fused"]
    times = {(row.case, row.layout, row.what, row.dtype): row.median_us for row in fused}
    found: dict[str, list[float]] = {}
    for (case, layout, what, dtype), time in times.items():
        if dtype != "float32" and (wide := times.get((case, layout, what, "float32"))):
            found.setdefault(f"{what} {dtype}", []).append(time / wide)
    means = ", ".join(f"{name} {mean_and_range(found[name])}" for name in sorted(found))
    return f"Other types, forward time over float32's: {means}." if means else ""


def error_table(rows: Iterable[Row]) -> str:
    """The largest error of each backend and dtype beside its tolerance."""
    cells: list[Cell] = []
    for row in rows:
        if row.kind in ("fused", "reference"):
            name, limits = f"{row.what}, {row.dtype}", testing.tolerance(getattr(torch, row.dtype))
            for of, title in (("y", "y"), ("dx", "dx"), ("parameters", "dweight, dbias")):
                error, limit = getattr(row, f"error_{of}"), getattr(limits, of)
                cells.append((name, title, None if error is None else (error, limit)))
            cells.append((name, "within", (not row.within, None)))

    def text(_: str, values: list[tuple[float, float | None]]) -> str:
        # NaN must show, and max() would lose it
        error, limit = max(values, key=lambda value: (math.isnan(value[0]), value[0]))
        if limit is None:
            return "**NO**" if error else "yes"
        return f"{error:.1e} (may be {limit:.0e})"

    return pivot(cells, text)


def _layers(record: Record) -> list[str]:
    rows = timed(record.rows)
    parts = [METHOD.format(fused_of(rows), record.settings["rounds"])]
    for operator, dtype in dict.fromkeys((row.operator, row.dtype) for row in rows):
        same = [row for row in rows if (row.operator, row.dtype) == (operator, dtype)]
        if any(row.kind == "plain" for row in same):
            parts += [f"{operator}, {dtype}:", ratio_table(same, (*BASELINES, "fused"))]
    parts += [worst(rows), other_types(rows)]
    if record.command in ("shapes", "retina"):
        wide = [row for row in rows if row.dtype == "float32"]
        parts += ["Time over the lower bound, forward / forward+backward:", bound_table(wide)]
    parts += ["Largest relative errors against float64:", error_table(record.rows)]
    costs, memory, host = list[Cell](), list[Cell](), list[Cell]()
    for row in record.rows:
        name, at = f"{row.operator}, {row.what}", words(row.direction)
        if row.case.startswith("tiny") and row.kind != "copy":
            costs.append((name, at, bold(f"{row.median_us:.1f}", row)))
        elif row.rounds and row.kind in ("fused", "reference", "plain"):
            if row.peak_bytes is not None and row.dtype == rows[0].dtype:
                memory.append((name, at, row.peak_bytes / row.tensor_bytes))
            if row.host_us is not None and row.kind == "fused":
                both = f"{row.host_us:.1f} / {row.median_us:.1f}"
                host.append((f"{name}, {label(row)}", at, both))
    bounds = [f"{o}, {WITH_AUTOGRAD}" for o in ("ppcr", "add_relu")]
    if costs:
        parts += [COSTS, pivot(costs, lines=[*(line for line, *_ in costs), *bounds])]
    if memory:
        mean = pivot(memory, lambda _, values: f"{fmean(values):.2f}")
        parts += [MEMORY + "the inputs.", mean]
    return [part for part in [*parts, *([HOST, pivot(host)] if host else [])] if part]


Series = tuple[str, int, str, str]  # axis, threads, what, direction


def series(rows: Iterable[Row]) -> dict[Series, list[tuple[int, float]]]:
    """``{..: [(size, microseconds), ..]}``, in order of size; without the lower bounds."""
    found: dict[Series, list[tuple[int, float]]] = {}
    for row in rows:
        if row.kind != LOWER_BOUND:
            point = (size_of(row.case, row.shape, row.levels), row.median_us)
            found.setdefault((row.case, row.threads, row.what, row.direction), []).append(point)
    return {key: sorted(points) for key, points in found.items()}


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float, int, int] | None:
    """Exponent, factor, first and last size of a power law through the largest points."""
    last = points[-FITTED:]
    if len(last) < 2:
        return None
    sizes, times = np.log(np.array(last, dtype=float)).T
    exponent, constant = np.polyfit(sizes, times, 1)
    # without the sign of a zero
    return round(float(exponent), 2) + 0.0, float(np.exp(constant)), last[0][0], last[-1][0]


def series_name(what: str, threads: int) -> str:
    return f"{what}, {threads} thread{'s' * (threads > 1)}"


def _scaling(record: Record) -> list[str]:
    lines = []
    for (axis, threads, what, direction), points in series(record.rows).items():
        if what != "copy" and (found := fit(points)):
            name = f"{series_name(what, threads)}, {words(direction)}"
            lines.append([name, axis, f"{found[0]:.2f}", f"{found[2]} to {found[3]}"])
    faster = "; ".join(
        f"{series_name(row.what, row.threads)}, {row.case} "
        f"{size_of(row.case, row.shape, row.levels)}, {words(row.direction)} ({row.over_fused:.2f})"
        for row in filter(is_faster, record.rows)
    )
    text = (
        f"Time as a power of one quantity while the others stay, fitted to the largest {FITTED} "
        f"sizes: 1 is proportional. Faster than `{fused_of(record.rows)}`: {faster or 'none'}."
    )
    return [text, table(["", "of", "exponent", "range"], lines)]


def network_table(rows: Iterable[Row]) -> str:
    cells: list[Cell] = []
    for row in rows:
        if row.what != "none":
            text = f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})"
            cells.append((f"{label(row)}, {row.direction}", row.what, bold(text, row)))
    return pivot(cells, columns=VARIANTS[1:])


def _networks(record: Record) -> list[str]:
    saved = [
        (label(row), row.what, f"{row.saved_bytes / 2**20:.0f}")
        for row in record.rows
        if row.saved_bytes is not None and "compiled" not in row.case
    ]
    parts = [f"{record.settings['rounds']} rounds. {NETWORKS}", network_table(record.rows)]
    memory = "MB that autograd keeps from forward to backward:"
    return [*parts, memory, pivot(saved, columns=VARIANTS)]


# By the name of the file: title, section, pictures.
SECTIONS: dict[str, tuple[str, Callable[[Record], list[str]], Sequence[str]]] = {
    "operators": ("Operators", _layers, ("operators_roofline", "operators_speedup")),
    "end_to_end": ("Whole networks", _networks, ("end_to_end",)),
    "scaling": ("Scaling", _scaling, ("scaling",)),
    "shapes": ("Eight shapes", _layers, ("shapes",)),
    "retina": ("A photograph's feature maps", _layers, ("retina",)),
}


def console(record: Record) -> str:
    return "\n\n".join(SECTIONS[record.command][1](record))


def records(folder: Path) -> dict[str, Record]:
    """What was measured on the device of a folder."""
    files = {stem: folder / f"{stem}.json" for stem in SECTIONS}
    return {stem: read(file) for stem, file in files.items() if file.is_file()}


def page(folder: Path) -> str:
    """Everything measured on the device of a folder."""
    parts = [f"# Measured on {folder.name}", "Written by `make results` from the files beside it."]
    for stem, record in records(folder).items():
        title, _, pictures = SECTIONS[stem]
        parts += [f"## {title}", f"{machine(record)}.", console(record)]
        parts += [f"![{title}]({name}.png)" for name in pictures]
    return "\n\n".join(parts) + "\n"


def processors(folders: Iterable[Path]) -> str:
    """A line for each CPU on which the shapes were measured."""
    cells = list[Cell]()
    for folder in folders:
        record = records(folder).get("shapes")
        if record is None or record.environment["device"] != "cpu":
            continue
        line = f"{folder.name}: {machine(record)}"
        rows = [row for row in timed(record.rows) if row.dtype == "float32"]
        fused = fused_of(rows)
        for row in rows:
            if row.what == fused:
                cells.append((line, f"{words(row.direction)} over the lower bound", row.ratio))
            elif row.what == BEST_COMPILED and row.over_fused:
                at = f"{row.what} over {fused}, {words(row.direction)}"
                cells.append((line, at, row.over_fused))
        lost = {(row.case, row.layout, row.direction) for row in rows if is_faster(row)}
        cells.append((line, "cells where a baseline is faster", float(len(lost))))

    def text(_: str, values: list[Any]) -> str:
        return mean_and_range(values) if len(values) > 1 else f"{values[0]:.0f}"

    return pivot(cells, text)


def headline(folder: Path) -> str:
    """The README's few lines on the device of a folder."""
    found, parts = records(folder), list[str]()
    if record := found.get("operators") or found.get("shapes"):
        dtype, fused = headline_dtype(record), fused_of(record.rows)
        rows = [row for row in timed(record.rows) if row.dtype == dtype]
        rows = [row for row in rows if call_of(row) in HEADLINE]
        columns = [call for call in HEADLINE if call in map(call_of, rows)]
        count = len({row.case for row in rows})
        parts += [
            f"Time over that of `{fused}`: geometric means over up to {count} shapes in both "
            f"layouts, with the range; {dtype}, {machine(record)}. {FASTER.format(fused)}",
            ratio_table(rows, ("plain",), columns),
        ]
    if record := found.get("end_to_end"):
        large = [row for row in record.rows if row.operator == "resnet50"] or record.rows
        parts += [f"Whole networks ({machine(record)}). {NETWORKS}", network_table(large)]
    return "\n\n".join(parts) or "No measured files yet."
