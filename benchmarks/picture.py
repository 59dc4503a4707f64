"""The picture of a result: every column's ratio to the floor, an input a line."""

from __future__ import annotations

from pathlib import Path

from .report import MODES, column_names, inputs, summarize
from .suite import Result

# Okabe and Ito's colours, told apart by the colour-blind too; the markers tell the columns apart without colour.
STYLES = [
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
]


def draw(result: Result, path: Path, title: str) -> Path:
    """Two panels, forward and forward+backward, on a logarithmic axis. Compiled columns are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    grouped, summary, names = inputs(result), summarize(result), column_names(result)
    labels = [f"{case}\n{layout}" for case, layout in grouped]
    eager = [name for name in names if not name.endswith(" compiled")]
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(eager)}
    figure, axes = plt.subplots(
        1, 2, figsize=(13, 2.2 + 0.42 * len(labels)), sharey=True, layout="constrained"
    )
    for axis, (mode, mode_title) in zip(axes, MODES.items(), strict=True):
        for name in names:
            colour, marker = styles[name.removesuffix(" compiled")]
            compiled = name.endswith(" compiled")
            ratios = [getattr(columns[name], f"{mode}_ratio") for columns in grouped.values()]
            axis.plot(
                ratios,
                range(len(labels)),
                linestyle="none",
                marker=marker,
                markersize=8,
                color=colour,
                markerfacecolor="white" if compiled else colour,
                label=f"{name} (mean {getattr(summary, mode)[name]:.2f})",
                zorder=3 if columns_fused(result, name) else 2,
            )
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(mode_title)
        axis.set_xlabel("time / floor (log scale)")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        low, high = axis.get_xlim()
        axis.set_xticks(
            [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if low <= tick <= high]
        )
        axis.grid(axis="both", color="0.9")
        axis.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.10), ncols=2, frameon=False
        )
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def columns_fused(result: Result, name: str) -> bool:
    return any(row.kind == "fused" for row in result.rows if row.column == name)
