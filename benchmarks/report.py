"""Tables of what was measured: for the terminal, for the README, and for a page of each device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppcr_ext import testing

from .baselines import LOWER_BOUND, WITH_AUTOGRAD
from .cases import VARIANTS, Place, size_of
from .results import Record, Row, read

START, END = "<!-- results:start -->", "<!-- results:end -->"
FITTED = 4  # the largest points: what a call costs at least hides the slope of the small ones
BASELINES = ("reference", "plain", "other layer")  # kinds that are compared with the fused backend
HEADLINE = (("ppcr", "forward"), ("ppcr", "step"), ("add_relu", "forward"), ("add_relu", "step"))
FASTER = "Bold: faster than `{}`."

Input = dict[tuple[str, str], Row]  # the rows of one case, by what and direction


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown whose columns line up."""
    cells = [list(header), *map(list, lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    first, *rest = (
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]
        for line in cells
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in (first, rule, *rest))


def mean_and_range(ratios: Sequence[float], form: str = ".2f") -> str:
    """Geometric mean and range, ``-`` of nothing."""
    if not ratios:
        return "-"
    mean, low, high = geometric_mean(ratios), min(ratios), max(ratios)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def machine(record: Record) -> str:
    """Where, with what and when."""
    env = record.environment
    threads = " and ".join(map(str, sorted({row.threads for row in record.rows})))
    where = f"{env['cpu']} ({env['capability']}), {threads} threads"
    if env["device"] != "cpu":
        where = str(env["device"])
    date, commit = env["date"][:10], env["commit"]
    return f"{where}, PyTorch {env['torch']}, {date}, commit {commit}"


def words(direction: str) -> str:
    return "forward+backward" if direction == "step" else direction


def inputs(
    rows: Sequence[Row], operator: str | None = None, dtype: str | None = None, tiny: bool = False
) -> dict[Place, Input]:
    """The timed rows of an operator and dtype, by place; the tiny input only where asked for."""
    found: dict[Place, Input] = {}
    for row in rows:
        wanted = operator in (None, row.operator) and dtype in (None, row.dtype) and row.rounds
        if wanted and row.case.startswith("tiny") == tiny:
            found.setdefault(row.place, {})[row.what, row.direction] = row
    return found


def fused_of(rows: Sequence[Row]) -> str:
    """The backend that all others are compared with."""
    names = {row.what for row in rows if row.kind == "fused"}
    return "native" if "native" in names or not names else min(names)


def headline_dtype(record: Record) -> str:
    """What is trained in on that device."""
    wanted = "float32" if record.environment["device"] == "cpu" else "bfloat16"
    return wanted if any(row.dtype == wanted for row in record.rows) else record.rows[0].dtype


def over(one: Input, what: str, base: str, direction: str) -> float | None:
    """The time of one over that of another; None where one of the two was not measured."""
    row, other = one.get((what, direction)), one.get((base, direction))
    if row is None or other is None:
        return None
    if base == LOWER_BOUND and row.ratio is not None:
        return row.ratio
    return row.median_us / other.median_us


def ratios(found: Iterable[Input], what: str, base: str, direction: str) -> list[float]:
    return [r for one in found if (r := over(one, what, base, direction)) is not None]


def names(found: Iterable[Input], *kinds: str) -> list[str]:
    return list(dict.fromkeys(w for one in found for (w, _), r in one.items() if r.kind in kinds))


# ---- layers --------------------------------------------------------------------------------------


def ratio_table(
    rows: Sequence[Row], dtype: str, columns: Sequence[tuple[str, str]], kinds: Sequence[str]
) -> str:
    """The fused backend beside its lower bounds, then how many times as long the others take."""
    fused = fused_of(rows)
    found = [list(inputs(rows, operator, dtype).values()) for operator, _ in columns]
    directions = [direction for _, direction in columns]
    both = list(zip(found, directions, strict=True))

    def shares(one: Sequence[Input], direction: str) -> list[float]:
        own = [i[fused, direction].copy_fraction for i in one if (fused, direction) in i]
        return [share for share in own if share is not None]

    spreads = [[i[LOWER_BOUND, d].spread for i in one if (LOWER_BOUND, d) in i] for one, d in both]
    lines = [
        [f"**{fused}** over the lower bound",
         *(mean_and_range(ratios(one, fused, LOWER_BOUND, d)) for one, d in both)],
        ["spread of the lower bound", *(mean_and_range(s, ".1%") for s in spreads)],
        [f"**{fused}** over the lower bound with autograd",
         *(mean_and_range(ratios(one, fused, WITH_AUTOGRAD, d)) for one, d in both)],
        [f"**{fused}**, share of a copy's bandwidth",
         *(mean_and_range(shares(one, d)) for one, d in both)],
    ]  # fmt: skip
    others = []
    for what in dict.fromkeys(w for one in found for w in names(one, *kinds) if w != fused):
        cells = [marked(ratios(one, what, fused, d)) for one, d in both]
        if any(cell != "-" for cell in cells):
            mean = geometric_mean(ratios(found[0], what, fused, directions[0]))
            others.append((mean, [f"{what} over {fused}", *cells]))
    lines += [line for _, line in sorted(others, key=lambda other: other[0])]
    return table(["", *(f"{o} {words(d)}" for o, d in columns)], lines)


def marked(found: Sequence[float]) -> str:
    """Mean and range, in bold with the number of inputs where it is faster than ours."""
    faster = sum(ratio < 1 for ratio in found)
    cell = mean_and_range(found)
    return f"**{cell}, {faster} of {len(found)} faster**" if faster else cell


def input_table(rows: Sequence[Row], dtype: str) -> str:
    """Ratios to the lower bound, an input a line, forward / forward+backward."""
    found, fused = inputs(rows, dtype=dtype), fused_of(rows)
    whats = names(found.values(), "fused", "reference", "plain")

    def cell(one: Input, what: str, direction: str, base: str = LOWER_BOUND) -> str:
        ratio, beside = over(one, what, base, direction), over(one, what, fused, direction)
        if ratio is None:
            return "-"
        own = what == fused or one[what, direction].kind == LOWER_BOUND
        faster = beside is not None and beside < 1 and not own
        return f"**{ratio:.2f}**" if faster else f"{ratio:.2f}"

    def pair(one: Input, what: str, base: str = LOWER_BOUND) -> str:
        return " / ".join(cell(one, what, d, base) for d in ("forward", "step"))

    lines = []
    for one in found.values():
        row = next(iter(one.values()))
        bounds = [one.get((LOWER_BOUND, d)) for d in ("forward", "step")]
        spread = " / ".join("-" if b is None else f"{b.spread:.1%}" for b in bounds)
        line = [f"{row.case}, {row.layout}", spread, cell(one, WITH_AUTOGRAD, "step")]
        lines.append(line + [pair(one, what) for what in whats])
    header = ["forward / forward+backward", "spread of the lower bound", WITH_AUTOGRAD, *whats]
    return table(header, lines)


def worst(rows: Sequence[Row]) -> str:
    """Where the fused backend does worst beside the fastest plain formulation."""
    found = []
    for one in inputs(rows).values():
        plain = names([one], "plain")
        for (what, direction), row in one.items():
            times = {w: one[w, direction].median_us for w in plain if (w, direction) in one}
            if what == fused_of(rows) and times:
                best = min(times, key=lambda w: times[w])
                place = f"{row.operator} {row.case}, {row.layout}, {row.dtype}, {words(direction)}"
                found.append((row.median_us / times[best], f"{best}; {place}"))
    if not found:
        return ""
    ratio, where = max(found)
    return (
        f"Where `{fused_of(rows)}` does worst it takes {ratio:.2f} times as long as the fastest "
        f"plain formulation ({where})."
    )


def half_types(rows: Sequence[Row]) -> str:
    wide = {(r.case, r.layout, r.what): r for r in rows if r.dtype == "float32" and is_forward(r)}
    found: dict[str, list[float]] = {}
    for row in rows:
        same = wide.get((row.case, row.layout, row.what))
        if row.dtype != "float32" and row.kind == "fused" and is_forward(row) and same:
            name = f"{row.what} {row.dtype}"
            found.setdefault(name, []).append(row.median_us / same.median_us)
    means = ", ".join(f"{name} {mean_and_range(values)}" for name, values in found.items())
    return f"Half types, forward time over float32's: {means}." if means else ""


def is_forward(row: Row) -> bool:
    return row.direction == "forward" and row.operator == "ppcr" and row.rounds > 0


def error_table(rows: Sequence[Row]) -> str:
    """The largest error of each backend and dtype beside its tolerance."""
    lines = []
    checked = [row for row in rows if row.kind in ("fused", "reference")]
    for what, dtype in dict.fromkeys((row.what, row.dtype) for row in checked):
        same, cells = [row for row in checked if (row.what, row.dtype) == (what, dtype)], []
        limits = testing.tolerance(getattr(torch, dtype))
        for name in ("y", "dx", "parameters"):
            errors = [e for row in same if (e := getattr(row, f"error_{name}")) is not None]
            # NaN must show, and max() would lose it
            largest = max(errors, key=lambda e: (math.isnan(e), e), default=math.nan)
            cells.append(f"{largest:.1e} (may be {getattr(limits, name):.0e})")
        within = "yes" if all(row.within for row in same) else "**NO**"
        lines.append([f"{what}, {dtype}", *cells, within])
    return table(["", "y", "dx", "dweight, dbias", "within"], lines)


def latency_table(rows: Sequence[Row]) -> str:
    """What a call costs: microseconds on the tiny tensor."""
    lines, directions = [], ("forward", "backward", "step")
    for one in inputs(rows, tiny=True).values():
        operator = next(iter(one.values())).operator
        bounds = [WITH_AUTOGRAD] if (LOWER_BOUND, "step") in one else []
        for what in dict.fromkeys([*(what for what, _ in one if what != "copy"), *bounds]):
            cells = []
            for direction in directions:
                row, ratio = one.get((what, direction)), over(one, what, fused_of(rows), direction)
                text = "-" if row is None else f"{row.median_us:.1f}"
                judged = row is not None and row.kind in BASELINES
                cells.append(f"**{text}**" if judged and ratio and ratio < 1 else text)
            lines.append([f"{operator}, {what}", *cells])
    return table(["", *map(words, directions)], lines)


def host_table(rows: Sequence[Row]) -> str:
    """Microseconds that the host spends to launch a call, of the largest input."""
    lines = []
    for one in inputs(rows).values():
        for (what, direction), row in one.items():
            if row.host_us is not None and row.kind == "fused":
                name = f"{row.operator} {row.case}, {row.layout}, {row.dtype}, {what}"
                lines.append([f"{name}, {words(direction)}", f"{row.host_us:.1f}",
                              f"{row.median_us:.1f}"])  # fmt: skip
    return table(["", "host", "device"], lines) if lines else ""


def memory_table(rows: Sequence[Row]) -> str:
    """Peak memory above the inputs, in multiples of x's bytes: means over the inputs."""
    lines, directions = [], ("forward", "step")
    for operator in dict.fromkeys(row.operator for row in rows):
        found = inputs(rows, operator, rows[0].dtype).values()
        for what in names(found, "fused", "reference", "plain"):
            cells = []
            for direction in directions:
                timed = [one[what, direction] for one in found if (what, direction) in one]
                sizes = [r.peak_bytes / r.tensor_bytes for r in timed if r.peak_bytes is not None]
                cells.append(f"{sum(sizes) / len(sizes):.2f}" if sizes else "-")
            if cells != ["-", "-"]:
                lines.append([f"{operator}, {what}", *cells])
    return table(["", *map(words, directions)], lines) if lines else ""


METHOD = (
    "Times over those of `{fused}`, geometric means and ranges over all inputs; at most {rounds} "
    "rounds. The lower bound is `x * 0.5` forward and `x + gy` backward (with a residual `x + "
    "residual`, `x + gy` and `residual * 0.5`), for small inputs also with a run of the autograd "
    "engine through an identity; its spread is the distance of its quartiles over its median. "
)


def _layers(record: Record) -> list[str]:
    rows, fused = record.rows, fused_of(record.rows)
    parts = [METHOD.format(fused=fused, rounds=record.settings["rounds"]) + FASTER.format(fused)]
    timed = [row for row in rows if row.rounds and not row.case.startswith("tiny")]
    directions = list(dict.fromkeys(row.direction for row in timed if row.kind == "fused"))
    beside = [row for row in timed if row.kind in BASELINES]
    for dtype, operator in dict.fromkeys((row.dtype, row.operator) for row in beside):
        columns = [(operator, direction) for direction in directions]
        made = ratio_table(rows, dtype, columns, (*BASELINES, "fused"))
        parts += [f"{operator}, {dtype}:", made]
    parts += [worst(rows), half_types(rows)]
    if record.command in ("shapes", "retina"):
        parts += ["Time over the lower bound:", input_table(rows, "float32")]
    parts += ["Largest relative errors against float64:", error_table(rows)]
    if inputs(rows, tiny=True):
        parts += ["What a call costs: microseconds on a tensor of 1x8x2x2.", latency_table(rows)]
    for title, made in (
        ("Microseconds of the host that launches a call, beside the device's.", host_table(rows)),
        ("Peak memory above the inputs, results included, in multiples of x's bytes; means over "
         "the inputs.", memory_table(rows)),
    ):  # fmt: skip
        parts += [title, made] if made else []
    return [part for part in parts if part]


# ---- scaling -------------------------------------------------------------------------------------

Series = tuple[str, int, str, str]  # axis, threads, what, direction


def series(rows: Sequence[Row]) -> dict[Series, list[tuple[int, float]]]:
    """``{..: [(size, microseconds), ..]}``, in order of size."""
    found: dict[Series, list[tuple[int, float]]] = {}
    for row in rows:
        size = size_of(row.case, row.shape, row.levels)
        key = (row.case, row.threads, row.what, row.direction)
        found.setdefault(key, []).append((size, row.median_us))
    return {key: sorted(points) for key, points in found.items()}


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float, int, int] | None:
    """Exponent, factor, first and last size of a power law through the largest points."""
    last = points[-FITTED:]
    if len(last) < 2:
        return None
    sizes, times = np.log(np.array(last, dtype=float)).T
    exponent, constant = np.polyfit(sizes, times, 1)
    return float(exponent), float(np.exp(constant)), last[0][0], last[-1][0]


def _scaling(record: Record) -> list[str]:
    lines = []
    for (axis, threads, what, direction), points in series(record.rows).items():
        found = fit(points)
        if found and what not in ("copy", LOWER_BOUND, WITH_AUTOGRAD):
            exponent, _, first, last = found
            name = f"{what}, {words(direction)}, {threads} thread{'s' * (threads > 1)}"
            lines.append([name, axis, f"{round(exponent, 2) + 0.0:.2f}", f"{first} to {last}"])
    text = (
        f"Time as a power of one quantity while the others stay, fitted to the largest {FITTED} "
        "sizes: 1 is proportional. "
    )
    fused = fused_of(record.rows)
    slow = [
        f"{what}: {row.case} {size_of(row.case, row.shape, row.levels)}, {words(d)}, "
        f"{row.threads} thread{'s' * (row.threads > 1)}"
        for one in inputs(record.rows).values()
        for (what, d), row in one.items()
        if row.kind == "plain" and row.median_us < one[fused, d].median_us
    ]
    faster = [f"Faster than `{fused}`: {'; '.join(slow)}."] if slow else []
    return [text, table(["", "of", "exponent", "range"], lines), *faster]


# ---- whole networks ------------------------------------------------------------------------------


def network_table(rows: Sequence[Row]) -> str:
    """Ratios to the network without attention with their intervals; bold: faster than fused."""
    lines = []
    grouped: dict[tuple[Place, str], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault((row.place, row.direction), {})[row.what] = row
    for (_, direction), found in grouped.items():
        one, cells = next(iter(found.values())), []
        own = found.get("PPCR fused")
        for name in VARIANTS[1:]:
            row = found.get(name)
            text = "-"
            if row and row.ratio is not None:
                text = f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})"
                if own and own.ratio is not None and row.ratio < own.ratio:
                    text = f"**{text}**"
            cells.append(text)
        label = ", ".join([one.case, one.layout, *([one.dtype] * (one.dtype != "float32"))])
        lines.append([f"{label}, {direction}", *cells])
    return table(["", *VARIANTS[1:]], lines)


def saved_table(rows: Sequence[Row]) -> str:
    kept: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.saved_bytes is not None and "compiled" not in row.case:
            label = ", ".join([row.case, row.layout, *([row.dtype] * (row.dtype != "float32"))])
            kept.setdefault(label, {})[row.what] = row.saved_bytes
    lines = [
        [label, *(f"{found[v] / 2**20:.0f}" if v in found else "-" for v in VARIANTS)]
        for label, found in kept.items()
    ]
    return table(["", *VARIANTS], lines)


NETWORKS = (
    "Time over that of the network without attention in the same round: medians, with their 95 % "
    "confidence intervals. A step is forward, loss, backward and SGD. "
    + FASTER.format("PPCR fused")
)


def _networks(record: Record) -> list[str]:
    saved = ["MB that autograd keeps from forward to backward:", saved_table(record.rows)]
    text = f"{record.settings['rounds']} rounds. {NETWORKS}"
    return [text, network_table(record.rows), *saved]


# ---- pages ---------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[str, Any]] = {
    "operators": ("Operators", _layers),
    "end_to_end": ("Whole networks", _networks),
    "scaling": ("Scaling", _scaling),
    "shapes": ("Eight shapes", _layers),
    "retina": ("A photograph's feature maps (`make bench`)", _layers),
}
PICTURES = {
    "operators": ("operators_roofline", "operators_speedup"),
    **{name: (name,) for name in ("end_to_end", "scaling", "shapes", "retina")},
}


def console(record: Record) -> str:
    return "\n\n".join(SECTIONS[record.command.replace("-", "_")][1](record))


def page(folder: Path) -> str:
    """Everything measured on the device of a folder."""
    parts = [f"# Measured on {folder.name}", "Written by `make results` from the files beside it."]
    for stem, (title, section) in SECTIONS.items():
        path = folder / f"{stem}.json"
        if path.is_file():
            record = read(path)
            parts += [f"## {title}", f"{machine(record)}.", *section(record)]
            parts += [f"![{title}]({name}.png)" for name in PICTURES[stem]]
    return "\n\n".join(parts) + "\n"


def headline(folder: Path) -> str:
    """The README's few lines on the device of a folder."""
    parts = []
    stem = "operators" if (folder / "operators.json").is_file() else "shapes"
    if (folder / f"{stem}.json").is_file():
        record = read(folder / f"{stem}.json")
        rows, dtype, fused = record.rows, headline_dtype(record), fused_of(record.rows)
        columns = HEADLINE if stem == "operators" else HEADLINE[:2]
        count = len({place[2] for place in inputs(rows, dtype=dtype)})
        picture = f"benchmarks/results/{folder.name}/{PICTURES[stem][-1]}.png"
        parts += [
            f"Time over that of the `{fused}` backend: geometric means over up to {count} shapes "
            f"in both layouts, with the range; {dtype}, {machine(record)}. {FASTER.format(fused)}",
            ratio_table(rows, dtype, columns, ("plain",)),
            f"![Times as long as {fused}, input by input]({picture})",
        ]
    if (folder / "end_to_end.json").is_file():
        record = read(folder / "end_to_end.json")
        large = [row for row in record.rows if row.operator == "resnet50"] or record.rows
        parts += [f"Whole networks ({machine(record)}). {NETWORKS}", network_table(large)]
    return "\n\n".join(parts) or "No measured files yet."
