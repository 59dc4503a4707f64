"""Markdown of measured files: a few lines a device for the README, a page with everything beside the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import end_to_end, files, network, pictures, report, scaling, session
from .measure import Row
from .suite import Result

START, END = "<!-- results:start -->", "<!-- results:end -->"
COLUMNS = (("ppcr", "forward"), ("ppcr", "step"), ("add_relu", "forward"), ("add_relu", "step"))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(environment: dict[str, Any], threads: object) -> str:
    """Where, with what and when."""
    where = f"{environment['cpu']} ({environment['capability']}), {threads} threads"
    if environment.get("device", "cpu") != "cpu":
        where = str(environment["device"])
    return f"{where}, PyTorch {environment['torch']}, {environment['date'][:10]}, commit {environment['commit']}"


def headline(folder: Path) -> str:
    """The README's few lines on the device of a folder, from the operators suite or, where that was not run, from the shapes."""
    operators, shapes = folder / "operators.json", folder / "shapes.json"
    if operators.is_file():
        return "\n\n".join(
            [_operators_headline(folder, session.read(operators)), *_end_to_end_headline(folder)]
        )
    if shapes.is_file():
        content, result = files.read(shapes)
        return "\n\n".join([*_shapes_headline(content, result), *_end_to_end_headline(folder)])
    return "No measured files yet."


def page(folder: Path) -> str:
    """Everything measured on the device of a folder."""
    parts = [f"# Measured on {folder.name}", "Written by `make results` from the files beside it."]
    for stem, section in SECTIONS.items():
        path = folder / f"{stem}.json"
        if path.is_file():
            parts.append(section(path))
    return "\n\n".join(parts) + "\n"


# ---- operators ----------------------------------------------------------------------------------------------------------------------


def spread(ratios: Sequence[float]) -> str:
    """Geometric mean and range, ``-`` of nothing."""
    return (
        f"{report.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        if ratios
        else "-"
    )


def ratios(
    rows: Sequence[Row], dtype: str, operator: str, direction: str, what: str, fused: str
) -> list[float]:
    """Times of ``what`` over those of the fused backend, on every input where both were measured."""
    grouped = pictures.inputs(rows, operator, dtype).values()
    both = [
        (one[what, direction], one[fused, direction])
        for one in grouped
        if {(what, direction), (fused, direction)} <= one.keys()
    ]
    return [other.median_us / own.median_us for other, own in both]


def _fused(rows: Sequence[Row]) -> str:
    names = {row.what for row in rows if row.kind == "fused"}
    return "native" if "native" in names or not names else min(names)


def _operators_headline(folder: Path, record: session.Record) -> str:
    rows, environment = record.rows, record.environment
    dtype, fused = pictures.headline_dtype(rows, environment), _fused(record.rows)
    count = len(
        {row.case for row in rows if row.dtype == dtype and not row.case.startswith("tiny")}
    )
    return "\n\n".join(
        [
            f"How many times as long plain PyTorch takes as the `{fused}` backend: geometric means over up to {count} shapes in both "
            f"layouts, with the range; {dtype}, {machine(environment, rows[0].threads)}.",
            _ratio_table(rows, dtype, fused, COLUMNS, ("plain",)),
            f"![Times as long as {fused}, input by input]({_address(folder)}/operators_speedup.png)",
        ]
    )


def _ratio_table(
    rows: Sequence[Row],
    dtype: str,
    fused: str,
    columns: Sequence[tuple[str, str]],
    kinds: Sequence[str],
) -> str:
    """The fused backend's share of a copy's bandwidth, then the ratios of the others to it, fastest first."""
    own = []
    for operator, direction in columns:
        inputs = pictures.inputs(rows, operator, dtype).values()
        shares = [
            one[fused, direction].copy_fraction for one in inputs if (fused, direction) in one
        ]
        own.append(
            f"1, at {report.geometric_mean(shares):.2f} of a copy's bandwidth" if shares else "-"
        )
    lines = []
    for what in dict.fromkeys(
        row.what
        for row in rows
        if row.kind in kinds and row.dtype == dtype and not row.case.startswith("tiny")
    ):
        found = [ratios(rows, dtype, *column, what, fused) for column in columns]
        if any(found):
            lines.append((report.geometric_mean(found[0]), [what, *map(spread, found)]))
    lines.sort(key=lambda line: line[0])
    header = [
        "",
        *(
            f"{operator} {'forward+backward' if direction == 'step' else direction}"
            for operator, direction in columns
        ),
    ]
    return markdown_table(header, [[f"**{fused}**", *own], *(line for _, line in lines)])


def _operators(path: Path) -> str:
    record = session.read(path)
    rows, fused = record.rows, _fused(record.rows)
    parts = [
        "## Operators",
        f"{machine(record.environment, rows[0].threads)}; at most {record.settings['rounds']} rounds. Times over those of `{fused}`, "
        "geometric means and ranges over all inputs. Bytes are those that an operator needs; the copy is one of x, timed in the same "
        "rounds. SE, ECA and CBAM's spatial gate compute something else. `operators.csv` holds every timing, with quantiles, bytes, "
        "peak memory and errors.",
    ]
    kinds = ("fused", "reference", "plain", "neighbour", "floor")
    for dtype in dict.fromkeys(row.dtype for row in rows if not row.case.startswith("tiny")):
        for operator in ("ppcr", "gate", "add_relu"):
            if pictures.inputs(rows, operator, dtype):
                columns = [(operator, direction) for direction in ("forward", "backward", "step")]
                parts += [
                    f"{operator}, {dtype}:",
                    _ratio_table(rows, dtype, fused, columns, [k for k in kinds if k != "fused"]),
                ]
    parts += ["What a call costs: microseconds on a tensor of 1x8x2x2.", _latency_table(rows)]
    parts += [
        "Peak memory above the inputs, results included, in multiples of x's bytes; means over the inputs.",
        _memory_table(rows),
    ]
    parts += [
        f"![Share of a copy's bandwidth]({path.stem}_roofline.png)",
        f"![Speed beside plain PyTorch]({path.stem}_speedup.png)",
    ]
    return "\n\n".join(parts)


def _latency_table(rows: Sequence[Row]) -> str:
    tiny = [row for row in rows if row.case.startswith("tiny")]
    found = {(row.operator, row.what, row.direction): row for row in tiny}
    lines = []
    for operator, what in dict.fromkeys(
        (row.operator, row.what) for row in tiny if row.kind not in ("copy", "floor")
    ):
        cells = [
            f"{found[operator, what, d].median_us:.1f}" for d in ("forward", "backward", "step")
        ]
        lines.append([what if what.startswith("F.") else f"{operator}, {what}", *cells])
    return markdown_table(["", "forward", "backward", "forward+backward"], lines)


def _memory_table(rows: Sequence[Row]) -> str:
    lines = []
    dtype = rows[0].dtype
    for operator in ("ppcr", "gate", "add_relu"):
        inputs = pictures.inputs(rows, operator, dtype).values()
        whats = dict.fromkeys(
            what
            for one in inputs
            for (what, _), row in one.items()
            if row.kind in ("fused", "reference", "plain")
        )
        for what in whats:
            cells = []
            for direction in ("forward", "step"):
                found = [one[what, direction] for one in inputs if (what, direction) in one]
                sizes = [(row.peak_bytes or 0) / row.tensor_bytes for row in found]
                cells.append(f"{sum(sizes) / len(sizes):.2f}" if sizes else "-")
            lines.append([f"{operator}, {what}", *cells])
    return markdown_table(["", "forward", "forward+backward"], lines)


# ---- scaling ------------------------------------------------------------------------------------------------------------------------


def _scaling(path: Path) -> str:
    record = session.read(path)
    lines = [
        [
            f"{fit.what}, {fit.direction}, {fit.threads} threads",
            fit.axis,
            f"{round(fit.exponent, 2) + 0.0:.2f}",
            f"{fit.first} to {fit.last}",
        ]
        for fit in scaling.fits(record.rows)
        if fit.what not in ("floor", "copy")
    ]
    threads = " and ".join(map(str, sorted({row.threads for row in record.rows})))
    text = (
        f"{machine(record.environment, threads)}. Time as a power of one quantity while the others stay, fitted to the largest "
        f"{scaling.FITTED} sizes: 1 is proportional."
    )
    return "\n\n".join(
        [
            "## Scaling",
            text,
            "![Time against size](scaling.png)",
            markdown_table(["", "of", "exponent", "range"], lines),
        ]
    )


# ---- whole networks -----------------------------------------------------------------------------------------------------------------


def _end_to_end(path: Path) -> str:
    content, rows = end_to_end.read(path)
    kept: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.saved_bytes is not None and not row.compiled:
            kept.setdefault(str(end_to_end.Setting.of(row)), {})[row.variant] = row.saved_bytes
    memory = [
        [setting, *(f"{found[v] / 2**20:.0f}" if v in found else "-" for v in network.VARIANTS)]
        for setting, found in kept.items()
    ]
    return "\n\n".join(
        [
            "## Whole networks",
            f"{machine(content['environment'], content['environment']['threads'])}, {content['rounds']} rounds. Time over that of the "
            "network without attention in the same round: medians, with their 95 % confidence intervals. A step is forward, loss, "
            "backward and SGD.",
            end_to_end.table(rows),
            "![Time over that of the network without attention](end_to_end.png)",
            "MB that autograd keeps from forward to backward:",
            markdown_table(["", *network.VARIANTS], memory),
        ]
    )


def _end_to_end_headline(folder: Path) -> list[str]:
    path = folder / "end_to_end.json"
    if not path.is_file():
        return []
    content, rows = end_to_end.read(path)
    return [
        "Training and inference of whole networks over those of the same network without attention: medians within the same round, with "
        f"95 % confidence intervals ({machine(content['environment'], content['environment']['threads'])}).",
        end_to_end.table([row for row in rows if row.network == "resnet50"] or rows),
    ]


# ---- retina and shapes --------------------------------------------------------------------------------------------------------------


def _layer_machine(content: dict[str, Any]) -> str:
    environment = content["environment"]
    return f"{machine(environment, environment['threads'])}, {content['rounds']} rounds"


def _shapes_headline(content: dict[str, Any], result: Result) -> list[str]:
    summary = report.summarize(result)
    count = len({row.case for row in result.rows})
    rows = [
        [
            f"**{name}**" if name in summary.worst else name,
            f"{summary.forward[name]:.2f}",
            f"{step:.2f}",
        ]
        for name, step in summary.step.items()
    ]
    return [
        f"Time over the floor (`x * 0.5`; for forward+backward `x * 0.5` plus `x + gy`), float32, geometric means over "
        f"{count} shapes in both layouts. Smaller is better, 1 is the least that any such layer can take. "
        f"{_layer_machine(content)}.",
        markdown_table(["", "forward", "forward+backward"], rows),
    ]


def _shapes(path: Path) -> str:
    content, result = files.read(path)
    summary = report.summarize(result)
    parts = ["## Eight shapes", *_shapes_headline(content, result)]
    for name, worst in summary.worst.items():
        if not name.endswith(" compiled"):
            parts.append(
                f"On the shape where `{name}` does worst it takes {worst.ratio:.2f} times as long as the fastest plain "
                f"formulation ({worst.peer}; {worst.case}, {worst.layout}, {worst.mode})."
            )
    if summary.half:
        half = ", ".join(f"{name} {mean:.2f}" for name, mean in summary.half.items())
        parts.append(f"Half types, forward time over float32's: {half}.")
    return "\n\n".join([*parts, f"![Time over the floor, input by input]({path.stem}.png)"])


def _retina(path: Path) -> str:
    content, result = files.read(path)
    return "\n\n".join(
        [
            "## A photograph's feature maps",
            f"Time over the floor on what the PPCR layers of a ResNet-50 see (`make bench`; {_layer_machine(content)}):",
            _real_table(result),
            "Largest relative errors against float64 there:",
            _error_table(result),
        ]
    )


def _real_table(result: Result) -> str:
    names = report.column_names(result)
    rows = []
    for (case, layout), columns in report.inputs(result).items():
        cells = [
            f"{columns[name].forward_ratio:.2f} / {columns[name].step_ratio:.2f}" for name in names
        ]
        rows.append([f"{case}, {layout}", *cells])
    return markdown_table(["forward / forward+backward", *names], rows)


def _error_table(result: Result) -> str:
    rows = []
    for backend, dtype in dict.fromkeys((row.backend, row.dtype) for row in result.errors):
        same = [row for row in result.errors if (row.backend, row.dtype) == (backend, dtype)]
        cells = []
        for quantity in ("y", "dx", "parameters"):
            largest = max(getattr(row.errors, quantity) for row in same)
            cells.append(f"{largest:.1e} (may be {getattr(same[0].limits, quantity):.0e})")
        rows.append([f"{backend}, {dtype}", *cells])
    return markdown_table(["", "y", "dx", "dweight, dbias"], rows)


def _address(folder: Path) -> str:
    return f"benchmarks/results/{folder.name}"


# What a page is made of, by the name of the JSON file.
SECTIONS: dict[str, Callable[[Path], str]] = {
    "operators": _operators,
    "end_to_end": _end_to_end,
    "scaling": _scaling,
    "shapes": _shapes,
    "retina": _retina,
}
