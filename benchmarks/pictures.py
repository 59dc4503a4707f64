"""The pictures of a record, in colours that the colour-blind tell apart."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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


def draw(record: Record, out: Path) -> list[Path]:
    """All pictures of a record; those of layers show ppcr in the dtype of the README."""
    title, name = record.machine, record.command
    if name == "scaling":
        return [_scaling(record, out / "scaling.png", title)]
    if name == "end_to_end":
        rows = [row for row in record.rows if row.what != "none"]
        label = "time over that of the network without attention (lines: 95 % intervals)"
        return [_dots(rows, "ratio", out / "end_to_end.png", label, title)]
    rows = [row for row in record.headline if row.kind not in ("copy", "other layer")]
    both = [row for row in rows if row.direction != "backward"]
    above = [row for row in both if row.what != LOWER_BOUND]
    wanted = [(above, "ratio", "", "time over the lower bound (log scale)")]
    if name == "operators":
        plain = [row for row in both if row.kind == "plain"]
        times = f"times as long as {record.fused} (log scale)"
        wanted = [(rows, "copy_fraction", "_roofline", "share of a copy's bandwidth")]
        wanted += [(plain, "over_fused", "_speedup", times)]
    return [
        _dots(some, value, out / f"{name}{end}.png", label, f"ppcr, {some[0].dtype}, {title}")
        for some, value, end, label in wanted
        if some
    ]


def _dots(rows: Sequence[Row], value: str, path: Path, label: str, title: str) -> Path:
    """A panel for forward, backward or both, a line for every input, a marker for every series."""
    of = ("passes", "label", "what")
    panels, names, whats = (list(dict.fromkeys(getattr(row, one) for row in rows)) for one in of)
    networks = rows[0].kind == "network"
    size = (15, 2.4 + (0.6 if networks else 0.36) * len(names))
    figure, axes = _figure(1, len(panels), size, title, sharey=True)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    for panel, axis in zip(panels, axes[0], strict=True):
        for number, what in enumerate(whats):
            found = [row for row in rows if (row.passes, row.what) == (panel, what)]
            at = np.array([names.index(row.label) for row in found], dtype=float)
            interval = None
            if networks:  # whose lines would cover each other
                at += (number / max(1, len(whats) - 1) - 0.5) * 0.5
                ends = [(row.ratio_low, row.ratio, row.ratio_high) for row in found]
                interval = np.diff(np.array(ends, dtype=float)).T
            style = _style(what.removesuffix(" compiled"), hollow=" compiled" in what)
            style |= {"markersize": 11 if style["marker"] in "|+" else 7, "linestyle": "none"}
            style |= {"zorder": 4 if "native" in what or "fused" in what else 3}
            x = np.array([getattr(row, value) for row in found], dtype=float)  # None becomes NaN
            axis.errorbar(x, at, xerr=interval, label=what, **style)
        axis.axvline(1, color="black", linewidth=1)
        if "log" in label:
            axis.set_xscale("log", subs=())
            axis.xaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 3, 4, 6, 8))
            axis.xaxis.set_major_formatter("{x:g}")
        elif not networks:
            axis.set_xlim(left=0)
        axis.set(title=panel, xlabel=label)
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=min(6, len(whats)), frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _scaling(record: Record, path: Path, title: str) -> Path:
    """A column for every axis, the two directions one above the other."""
    title = f"Time against size, with the exponents of a power law. {title}"
    figure, axes = _figure(2, len(AXES), (16, 9.5), title)
    places = itertools.product(("forward", "forward+backward"), AXES)
    panels = dict(zip(places, axes.flat, strict=True))
    for (axis, passes, name), points in report.series(record.rows).items():
        several = not name.endswith(" 1 thread")
        style = _style(name.split(",")[0], hollow=several) | {"linestyle": "--" if several else "-"}
        style["label"] = f"{name}: {report.exponent(points)}"
        panels[passes, axis].plot(*zip(*points, strict=True), **style)
    for (passes, axis), panel in panels.items():
        panel.set(title=passes, xlabel=AXES[axis], ylabel="microseconds", yscale="log")
        panel.set_xscale("log", base=2)
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
