"""The pictures of a record, in colours that the colour-blind tell apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .baselines import LOWER_BOUND, WITH_AUTOGRAD
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
    if name in ("scaling", "plans"):
        return []
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
    import matplotlib
    from matplotlib.figure import Figure

    of = ("passes", "label", "what")
    panels, names, whats = (list(dict.fromkeys(getattr(row, one) for row in rows)) for one in of)
    networks = rows[0].kind == "network"
    size = (15, 2.4 + (0.6 if networks else 0.36) * len(names))
    matplotlib.rc("axes", titlesize=10, grid=True, axisbelow=True)
    matplotlib.rc("grid", color="0.9")
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    for panel, axis in zip(panels, axes, strict=True):
        for number, what in enumerate(whats):
            found = [row for row in rows if (row.passes, row.what) == (panel, what)]
            at = np.array([names.index(row.label) for row in found], dtype=float)
            interval = None
            if networks:  # whose lines would cover each other
                at += (number / max(1, len(whats) - 1) - 0.5) * 0.5
                ends = [(row.ratio_low, row.ratio, row.ratio_high) for row in found]
                interval = np.diff(np.array(ends, dtype=float)).T
            colour, marker = STYLES.get(what.removesuffix(" compiled"), ("#CC79A7", "*"))
            style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
            style |= {"markersize": 11 if marker in "|+" else 7}
            style |= {"markerfacecolor": "white" if " compiled" in what else colour}
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
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=min(6, len(whats)), frameon=False)
    figure.savefig(path, dpi=110)
    return path
