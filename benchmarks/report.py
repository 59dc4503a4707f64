"""Tables of what was measured: for the terminal, for the README, and for a page of each device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppcr_ext import testing

from .baselines import LOWER_BOUND, WITH_AUTOGRAD
from .cases import VARIANTS, size_of
from .results import Record, Row, read

START, END = "<!-- results:start -->", "<!-- results:end -->"
FITTED = 4  # the largest points: what a call costs at least hides the slope of the small ones
BACKENDS = ("fused", "reference")
HEADLINE = (("ppcr", "forward"), ("ppcr", "step"), ("add_relu", "forward"), ("add_relu", "step"))
FASTER = "Bold: faster than `{0}`."
METHOD = (
    "Times over those of `{0}`, geometric means and ranges over all inputs; at most {1} rounds. The "
    "lower bound is `x * 0.5` forward and `x + gy` backward (with a residual `x + residual`, `x + "
    "gy` and `residual * 0.5`), for small inputs also with a run of the autograd engine through an "
    "identity. Its spread is the distance of its quartiles over its median. " + FASTER
)
NETWORKS = (
    "Time over that of the network without attention in the same round: medians, with their 95 % "
    "confidence intervals. A step is forward, loss, backward and SGD. "
    + FASTER.format("PPCR fused")
)

Cell = Callable[[list[Row]], str]


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown whose columns line up."""
    cells = [list(header), *map(list, lines)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    text = [f"{{:{'<' if i == 0 else '>'}{width}}}" for i, width in enumerate(widths)]
    made = [" | ".join(text).format(*line) for line in cells]
    return "\n".join(f"| {line} |" for line in (made[0], " | ".join(rule), *made[1:]))


def pivot(
    rows: Iterable[Row],
    line: Callable[[Row], str],
    column: Callable[[Row], str],
    cell: Cell,
    columns: Iterable[str] = (),
) -> str:
    """A table with a cell of the rows that share a line and a column, ``-`` where there are none.

    Lines and columns, after those that are given, are in the order of the rows.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    header = dict.fromkeys(columns)
    for row in rows:
        header.setdefault(column(row))
        found.setdefault(line(row), {}).setdefault(column(row), []).append(row)
    lines = (
        [name, *(cell(at[c]) if c in at else "-" for c in header)] for name, at in found.items()
    )
    return table(["", *header], lines)


def words(direction: str) -> str:
    return "forward+backward" if direction == "step" else direction


def direction_of(row: Row) -> str:
    return words(row.direction)


def what_of(row: Row) -> str:
    return row.what


def label(row: Row) -> str:
    return ", ".join([row.case, row.layout, *([row.dtype] * (row.dtype != "float32"))])


def mean_and_range(values: Sequence[float], form: str = ".2f") -> str:
    """Geometric mean and range, ``-`` of nothing."""
    if not values:
        return "-"
    return f"{geometric_mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def bold(text: str, row: Row) -> str:
    """A baseline that is faster than ours is marked."""
    judged = row.kind in ("plain", "other layer", "network", "reference") and row.what != "none"
    return f"**{text}**" if judged and (row.over_fused or 1) < 1 else text


def machine(record: Record) -> str:
    """Where, with what and when."""
    env = record.environment
    threads = " and ".join(map(str, sorted({row.threads for row in record.rows})))
    where = f"{env['cpu']} ({env['capability']}), {threads} thread{'s' * (threads != '1')}"
    if env["device"] != "cpu":
        where = env["device"]
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


# ---- layers --------------------------------------------------------------------------------------


def ratio_table(rows: Sequence[Row], columns: Sequence[str], kinds: Sequence[str]) -> str:
    """The fused backend beside its lower bounds, then how many times as long the others take."""
    fused = fused_of(rows)

    def line(values: Callable[[Row], float | None], name: str, what: str, form: str) -> list[str]:
        found: dict[str, list[float]] = {column: [] for column in columns}
        for row in rows:
            if row.what == what and name_of(row) in found and (v := values(row)) is not None:
                found[name_of(row)].append(v)
        return [name, *(mean_and_range(values, form) for values in found.values())]

    def inverse(row: Row) -> float | None:
        return 1 / row.over_fused if row.over_fused else None

    lines = [
        line(lambda row: row.ratio, f"**{fused}** over the lower bound", fused, ".2f"),
        line(lambda row: row.spread, "spread of the lower bound", LOWER_BOUND, ".1%"),
        line(inverse, f"**{fused}** over the lower bound with autograd", WITH_AUTOGRAD, ".2f"),
        line(
            lambda row: row.copy_fraction, f"**{fused}**, share of a copy's bandwidth", fused, ".2f"
        ),
    ]
    others: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.kind in kinds and row.what != fused and row.over_fused is not None:
            others.setdefault(row.what, {}).setdefault(name_of(row), []).append(row.over_fused)
    for what, at in sorted(
        others.items(), key=lambda item: geometric_mean(item[1].get(columns[0], ()))
    ):
        lines.append([f"{what} over {fused}", *(marked(at.get(c, [])) for c in columns)])
    return table(["", *columns], lines)


def name_of(row: Row) -> str:
    return f"{row.operator} {direction_of(row)}"


def marked(ratios: Sequence[float]) -> str:
    """Mean and range, in bold with the number of inputs on which it is faster than ours."""
    text, faster = mean_and_range(ratios), sum(ratio < 1 for ratio in ratios)
    return f"**{text}, {faster} of {len(ratios)} faster**" if faster else text


def bound_table(rows: Sequence[Row]) -> str:
    """Ratios to the lower bound, an input a line, forward / forward+backward."""
    shown = [row for row in rows if row.kind in ("fused", *BACKENDS, "plain", LOWER_BOUND)]
    shown.sort(key=lambda row: (row.kind != LOWER_BOUND, row.what == WITH_AUTOGRAD))
    spread, bound = "spread of the lower bound", WITH_AUTOGRAD

    def cell(found: list[Row]) -> str:
        is_bound = found[0].what == LOWER_BOUND
        texts = [
            f"{row.spread:.1%}" if is_bound else bold(f"{row.ratio:.2f}", row) for row in found
        ]
        return " / ".join(texts)

    def column(row: Row) -> str:
        return spread if row.what == LOWER_BOUND else row.what

    return pivot(shown, label, column, cell, [spread, bound])


def worst(rows: Sequence[Row]) -> str:
    """Where the fused backend does worst beside the fastest plain formulation."""
    plain = [row for row in rows if row.kind == "plain" and row.over_fused]
    if not plain:
        return ""
    row = min(plain, key=lambda row: row.over_fused or math.inf)
    return (
        f"Where `{fused_of(rows)}` does worst it takes {1 / (row.over_fused or math.nan):.2f} times "
        f"as long as the fastest plain formulation ({row.what}; {name_of(row)}, {label(row)})."
    )


def half_types(rows: Sequence[Row]) -> str:
    def of(wide: bool) -> dict[tuple[str, ...], Row]:
        return {
            (row.case, row.layout, row.what, *([] if wide else [row.dtype])): row
            for row in rows
            if name_of(row) == "ppcr forward" and row.kind == "fused"
            and (row.dtype == "float32") == wide
        }  # fmt: skip

    found: dict[str, list[float]] = {}
    for (*place, dtype), row in of(False).items():
        if same := of(True).get(tuple(place)):
            found.setdefault(f"{row.what} {dtype}", []).append(row.median_us / same.median_us)
    means = ", ".join(f"{name} {mean_and_range(values)}" for name, values in found.items())
    return f"Other types, forward time over float32's: {means}." if means else ""


def error_table(rows: Iterable[Row]) -> str:
    """The largest error of each backend and dtype beside its tolerance."""
    names, found = ("y", "dx", "parameters"), dict[tuple[str, str], list[Row]]()
    for row in rows:
        if row.kind in BACKENDS:
            found.setdefault((row.what, row.dtype), []).append(row)
    lines = []
    for (what, dtype), same in found.items():
        limits, cells = testing.tolerance(getattr(torch, dtype)), []
        for name in names:
            errors = [e for row in same if (e := getattr(row, f"error_{name}")) is not None]
            # NaN must show, and max() would lose it
            largest = max(errors, key=lambda e: (math.isnan(e), e), default=math.nan)
            cells.append(f"{largest:.1e} (may be {getattr(limits, name):.0e})")
        within = "yes" if all(row.within for row in same) else "**NO**"
        lines.append([f"{what}, {dtype}", *cells, within])
    return table(["", "y", "dx", "dweight, dbias", "within"], lines)


def _layers(record: Record) -> list[str]:
    everything, rows = record.rows, timed(record.rows)
    fused, parts = fused_of(everything), [""]
    for operator, dtype in dict.fromkeys((row.operator, row.dtype) for row in rows):
        same = [row for row in rows if (row.operator, row.dtype) == (operator, dtype)]
        columns = list(dict.fromkeys(name_of(row) for row in same if row.kind == "fused"))
        if any(row.kind == "plain" for row in same):
            kinds = ("fused", "reference", "plain", "other layer")
            parts += [f"{operator}, {dtype}:", ratio_table(same, columns, kinds)]
    parts[0] = METHOD.format(fused, record.settings["rounds"])
    parts += [worst(rows), half_types(rows)]
    if record.command in ("shapes", "retina"):
        wide = [row for row in rows if row.dtype == "float32"]
        parts += ["Time over the lower bound:", bound_table(wide)]
    parts += ["Largest relative errors against float64:", error_table(everything)]

    def line(row: Row) -> str:
        return f"{row.operator}, {row.what}"

    def mean_bytes(found: list[Row]) -> str:
        return f"{sum((r.peak_bytes or 0) / r.tensor_bytes for r in found) / len(found):.2f}"

    tiny = [row for row in everything if row.case.startswith("tiny") and row.kind != "copy"]
    memory = [
        row for row in rows
        if row.peak_bytes is not None and row.kind in (*BACKENDS, "plain")
        and row.dtype == rows[0].dtype and row.direction != "backward"
    ]  # fmt: skip
    host = [row for row in rows if row.host_us is not None and row.kind == "fused"]
    for title, shown, name, cell in (
        ("What a call costs: microseconds on a tensor of 1x8x2x2.", tiny, line,
         lambda found: bold(f"{found[0].median_us:.1f}", found[0])),
        ("Peak memory above the inputs, results included, in multiples of x's bytes; means over "
         "the inputs.", memory, line, mean_bytes),
        ("Microseconds of the host that launches a call, and of the device.", host,
         lambda row: f"{line(row)}, {label(row)}",
         lambda found: f"{found[0].host_us:.1f} / {found[0].median_us:.1f}"),
    ):  # fmt: skip
        parts += [title, pivot(shown, name, direction_of, cell)] if shown else []
    return [part for part in parts if part]


# ---- scaling and whole networks ------------------------------------------------------------------

Series = tuple[str, int, str, str]  # axis, threads, what, direction


def series(rows: Iterable[Row]) -> dict[Series, list[tuple[int, float]]]:
    """``{..: [(size, microseconds), ..]}``, in order of size; without the lower bounds."""
    found: dict[Series, list[tuple[int, float]]] = {}
    for row in rows:
        if row.kind != LOWER_BOUND:
            key = (row.case, row.threads, row.what, row.direction)
            point = (size_of(row.case, row.shape, row.levels), row.median_us)
            found.setdefault(key, []).append(point)
    return {key: sorted(points) for key, points in found.items()}


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float, int, int] | None:
    """Exponent, factor, first and last size of a power law through the largest points."""
    last = points[-FITTED:]
    if len(last) < 2:
        return None
    sizes, times = np.log(np.array(last, dtype=float)).T
    exponent, constant = np.polyfit(sizes, times, 1)
    return float(exponent), float(np.exp(constant)), last[0][0], last[-1][0]


def series_name(what: str, threads: int) -> str:
    return f"{what}, {threads} thread{'s' * (threads > 1)}"


def _scaling(record: Record) -> list[str]:
    lines, slow = [], []
    for (axis, threads, what, direction), points in series(record.rows).items():
        found = fit(points)
        if found and what != "copy":
            name = f"{series_name(what, threads)}, {words(direction)}"
            lines.append([name, axis, f"{found[0] + 0.0:.2f}", f"{found[2]} to {found[3]}"])
    for row in record.rows:
        if row.kind == "plain" and (row.over_fused or 1) < 1:
            at = f"{row.case} {size_of(row.case, row.shape, row.levels)}, {direction_of(row)}"
            slow.append(f"{series_name(row.what, row.threads)}, {at} ({row.over_fused:.2f})")
    text = (
        f"Time as a power of one quantity while the others stay, fitted to the largest {FITTED} "
        "sizes: 1 is proportional."
    )
    faster = [f"Faster than `{fused_of(record.rows)}`: {'; '.join(slow)}."] if slow else []
    return [text, table(["", "of", "exponent", "range"], lines), *faster]


def network_table(rows: Iterable[Row]) -> str:
    def cell(found: list[Row]) -> str:
        row = found[0]
        return bold(f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})", row)

    shown = [row for row in rows if row.what != "none"]
    return pivot(shown, lambda row: f"{label(row)}, {row.direction}", what_of, cell, VARIANTS[1:])


def _networks(record: Record) -> list[str]:
    saved = [r for r in record.rows if r.saved_bytes is not None and "compiled" not in r.case]
    megabytes = pivot(
        saved, label, what_of, lambda r: f"{(r[0].saved_bytes or 0) / 2**20:.0f}", VARIANTS
    )
    text = f"{record.settings['rounds']} rounds. {NETWORKS}"
    memory = ["MB that autograd keeps from forward to backward:", megabytes]
    return [text, network_table(record.rows), *memory]


# ---- pages ---------------------------------------------------------------------------------------

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


def page(folder: Path) -> str:
    """Everything measured on the device of a folder."""
    parts = [f"# Measured on {folder.name}", "Written by `make results` from the files beside it."]
    for stem, (title, section, pictures) in SECTIONS.items():
        if (folder / f"{stem}.json").is_file():
            record = read(folder / f"{stem}.json")
            parts += [f"## {title}", f"{machine(record)}.", *section(record)]
            parts += [f"![{title}]({name}.png)" for name in pictures]
    return "\n\n".join(parts) + "\n"


def headline(folder: Path) -> str:
    """The README's few lines on the device of a folder."""
    parts: list[Any] = []
    stem = "operators" if (folder / "operators.json").is_file() else "shapes"
    if (folder / f"{stem}.json").is_file():
        record = read(folder / f"{stem}.json")
        dtype, fused = headline_dtype(record), fused_of(record.rows)
        rows = [row for row in timed(record.rows) if row.dtype == dtype]
        columns = [f"{o} {words(d)}" for o, d in HEADLINE if any(row.operator == o for row in rows)]
        count, picture = len({row.case for row in rows}), SECTIONS[stem][2][-1]
        parts += [
            f"Time over that of `{fused}`: geometric means over up to {count} shapes in both "
            f"layouts, with the range; {dtype}, {machine(record)}. {FASTER.format(fused)}",
            ratio_table(rows, columns, ("plain",)),
            f"![Time, input by input](benchmarks/results/{folder.name}/{picture}.png)",
        ]
    if (folder / "end_to_end.json").is_file():
        record = read(folder / "end_to_end.json")
        large = [row for row in record.rows if row.operator == "resnet50"] or record.rows
        parts += [f"Whole networks ({machine(record)}). {NETWORKS}", network_table(large)]
    return "\n\n".join(parts) or "No measured files yet."
