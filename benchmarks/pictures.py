"""The pictures of a record, in colours that the colour-blind tell apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from . import report
from .baselines import LOWER_BOUND, WITH_AUTOGRAD
from .cases import AXES
from .results import Record, Row

# Okabe and Ito's colours; markers tell the series apart without colour. Compiled ones are hollow.
STYLES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("native", "PPCR fused"), ("#0072B2", "o")),
    **dict.fromkeys(("triton", "PPCR unfused"), ("#56B4E9", "P")),
    **dict.fromkeys(("reference", "CBAM"), ("#CC79A7", "X")),
    **dict.fromkeys(("pooled once", "SE"), ("#E69F00", "s")),
    **dict.fromkeys(("matmul", "PPCR plain"), ("#D55E00", "v")),
    **{"level by level": ("#009E73", "^"), "copy": ("#888888", "D")},
    **{LOWER_BOUND: ("#000000", "|"), WITH_AUTOGRAD: ("#000000", "+")},
}
Value = Callable[[Row], float | None]


def draw(record: Record, out: Path) -> list[Path]:
    """All pictures of a record; those of layers show ppcr in the dtype of the README."""
    title, name = report.machine(record), record.command
    if name == "scaling":
        return [_scaling(record, out / "scaling.png", title)]
    rows, ratio = report.timed(record.rows), attrgetter("ratio")
    if name == "end_to_end":
        rows = [row for row in rows if row.what != "none"]
        label = "time over that of the network without attention (lines: 95 % intervals)"
        return [_dots(rows, ratio, out / "end_to_end.png", label, title)]
    dtype, hidden = report.headline_dtype(record), ("copy", "other layer")
    rows = [row for row in rows if (row.operator, row.dtype) == ("ppcr", dtype)]
    rows = [row for row in rows if row.kind not in hidden]
    both = [row for row in rows if row.direction != "backward"]
    plain = [row for row in both if row.kind == "plain"]
    above = [row for row in both if row.what != LOWER_BOUND]
    times = f"times as long as {report.fused_of(rows)} (log scale)"
    wanted: list[tuple[list[Row], Value, str, str]] = [
        (rows, attrgetter("copy_fraction"), "_roofline", "share of a copy's bandwidth"),
        (plain, attrgetter("over_fused"), "_speedup", times),
    ]
    if name != "operators":
        wanted = [(above, ratio, "", "time over the lower bound (log scale)")]
    title = f"ppcr, {dtype}, {title}"
    return [
        _dots(one, v, out / f"{name}{end}.png", label, title)
        for one, v, end, label in wanted
        if one
    ]


def _dots(rows: Sequence[Row], value: Value, path: Path, label: str, title: str) -> Path:
    """A panel for every direction, a line for every input, a marker for every series."""
    of = (attrgetter("direction"), report.label, attrgetter("what"))
    panels, names, whats = (list(dict.fromkeys(map(one, rows))) for one in of)
    networks = rows[0].kind == "network"
    size = (15, 2.4 + (0.6 if networks else 0.36) * len(names))
    figure, axes = _figure(1, len(panels), size, title, sharey=True)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    for panel, axis in zip(panels, axes[0], strict=True):
        for number, what in enumerate(whats):
            shown = [row for row in rows if (row.direction, row.what) == (panel, what)]
            points = [(v, row) for row in shown if (v := value(row)) is not None]
            # the lines of networks would cover each other
            shift = (number / max(1, len(whats) - 1) - 0.5) * 0.5 * networks
            ends = [(v - (row.ratio_low or v), (row.ratio_high or v) - v) for v, row in points]
            style = _style(what.split(" compiled")[0], hollow=" compiled" in what)
            style |= {"markersize": 11 if style["marker"] in "|+" else 7, "linestyle": "none"}
            axis.errorbar(
                [v for v, _ in points],
                [names.index(report.label(row)) + shift for _, row in points],
                xerr=list(zip(*ends, strict=True)) if networks else None,
                label=what,
                zorder=4 if "native" in what or "fused" in what else 3,
                **style,
            )
        axis.axvline(1, color="black", linewidth=1)
        if "log" in label:
            axis.set_xscale("log", subs=())
            axis.xaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 3, 4, 6, 8))
            axis.xaxis.set_major_formatter("{x:g}")
        elif not networks:
            axis.set_xlim(left=0)
        step = networks and panel == "step"
        axis.set(title="training step" if step else report.words(panel), xlabel=label)
    found = axes[0, 0].get_legend_handles_labels()
    figure.legend(*found, loc="outside lower center", ncols=min(6, len(whats)), frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _scaling(record: Record, path: Path, title: str) -> Path:
    """A column for every axis, the two directions one above the other."""
    title = f"Time against size, with the exponents of a power law. {title}"
    found, (figure, panels) = report.series(record.rows), _figure(2, len(AXES), (16, 9.5), title)
    for (axis, label), column in zip(AXES.items(), panels.T, strict=True):
        for direction, panel in zip(("forward", "step"), column, strict=True):
            shown = {key: points for key, points in found.items() if key[::3] == (axis, direction)}
            spans = set()
            for (_, threads, what, _), points in shown.items():
                name = report.series_name(what, threads)
                if fitted := report.fit(points):
                    name += f": {fitted[0]:.2f}"
                    spans.add(f"{fitted[2]} to {fitted[3]}")
                style = _style(what, hollow=threads > 1)
                style |= {"linestyle": "--" if threads > 1 else "-", "label": name}
                panel.plot(*zip(*points, strict=True), **style)
            panel.set(xlabel=label, ylabel="microseconds", yscale="log")
            panel.set_xscale("log", base=2)
            panel.set_title(f"{report.words(direction)}; exponents over {', '.join(sorted(spans))}")
            panel.legend(fontsize=8, frameon=False, loc="upper left")
            low, high = panel.get_ylim()
            panel.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    figure.savefig(path, dpi=110)
    return path


def _style(what: str, *, hollow: bool) -> dict[str, Any]:
    colour, marker = STYLES.get(what, ("#CC79A7", "*"))
    return {"color": colour, "marker": marker, "markerfacecolor": "white" if hollow else colour}


def _figure(rows: int, columns: int, size: tuple[float, float], title: str, **options: Any) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rc("axes", titlesize=10, grid=True, axisbelow=True)
    matplotlib.rc("grid", color="0.9")
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)
