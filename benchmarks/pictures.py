"""The pictures of a record, in colours that the colour-blind tell apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import report
from .baselines import LOWER_BOUND, WITH_AUTOGRAD
from .cases import AXES, VARIANTS
from .report import Input, fused_of, headline_dtype, inputs, over
from .results import Record, Row

# Okabe and Ito's colours; the markers tell the series apart without colour, compiled ones are
# hollow.
STYLES: dict[str, tuple[str, str]] = {
    "native": ("#0072B2", "o"),
    "triton": ("#56B4E9", "P"),
    "reference": ("#CC79A7", "X"),
    "pooled once": ("#E69F00", "s"),
    "level by level": ("#009E73", "^"),
    "matmul": ("#D55E00", "v"),
    LOWER_BOUND: ("#000000", "|"),
    WITH_AUTOGRAD: ("#000000", "+"),
    "copy": ("#888888", "D"),
    "PPCR fused": ("#0072B2", "o"),
    "PPCR unfused": ("#56B4E9", "P"),
    "PPCR plain": ("#D55E00", "v"),
    "SE": ("#E69F00", "s"),
    "CBAM": ("#CC79A7", "X"),
}
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

Value = tuple[float, float, float]  # a point, and the ends of a line through it
Line = tuple[str, dict[tuple[str, str], Value]]  # a label, and the values by panel and series


def draw(record: Record, out: Path) -> list[Path]:
    """All pictures of a record; those of layers show the dtype of the README."""
    rows, command = [row for row in record.rows if row.rounds], record.command.replace("-", "_")
    if command == "scaling":
        return [_scaling(rows, out / "scaling.png", f"float32, {report.machine(record)}")]
    if command == "end_to_end":
        path, title = out / "end_to_end.png", report.machine(record)
        label = "time over that of the network without attention (lines: 95 % intervals)"
        return [_dots(_networks(rows), ("step", "inference"), path, label, title, log=False)]
    dtype, fused = headline_dtype(record), fused_of(rows)
    found = list(inputs(rows, "ppcr", dtype).values())
    if not found:
        return []
    title = f"ppcr, {dtype}, {report.machine(record)}"

    def share(one: Input, what: str, direction: str) -> float | None:
        row = one.get((what, direction))
        shown = row is not None and row.kind not in ("copy", "other layer")
        return row.copy_fraction if row is not None and shown else None

    def beside(one: Input, what: str, direction: str) -> float | None:
        plain = (what, direction) in one and one[what, direction].kind == "plain"
        return over(one, what, fused, direction) if plain else None

    def above(one: Input, what: str, direction: str) -> float | None:
        return None if what == LOWER_BOUND else over(one, what, LOWER_BOUND, direction)

    three, two = ("forward", "backward", "step"), ("forward", "step")
    wanted: list[tuple[Callable[..., float | None], Sequence[str], str, str, bool]] = [
        (share, three, "operators_roofline", "share of the bandwidth of a copy of x", False),
        (beside, two, "operators_speedup", f"times as long as {fused} (log scale)", True),
    ]
    if command != "operators":
        wanted = [(above, two, command, "time over the lower bound (log scale)", True)]
    return [
        _dots(_lines(found, value, panels), panels, out / f"{name}.png", label, title, log=log)
        for value, panels, name, label, log in wanted
    ]


def _lines(
    found: Iterable[Input], value: Callable[..., float | None], panels: Sequence[str]
) -> list[Line]:
    made = []
    for one in found:
        row = next(iter(one.values()))
        values = {
            (panel, what): (v, v, v)
            for panel in panels
            for what in dict.fromkeys(what for what, _ in one)
            if (v := value(one, what, panel)) is not None
        }
        made.append((f"{row.case}, {row.layout}", values))
    return made


def _networks(rows: Sequence[Row]) -> list[Line]:
    made: dict[str, dict[tuple[str, str], Value]] = {}
    for row in rows:
        label = f"{row.case}\n{row.layout}" + (f", {row.dtype}" if row.dtype != "float32" else "")
        if row.what in VARIANTS[1:] and row.ratio is not None:
            value = row.ratio, row.ratio_low or row.ratio, row.ratio_high or row.ratio
            made.setdefault(label, {})[row.direction, row.what] = value
    return list(made.items())


def _dots(
    lines: Sequence[Line], panels: Sequence[str], path: Path, label: str, title: str, *, log: bool
) -> Path:
    """Panels beside each other that share a line for every input, a marker for every series."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    whats = list(dict.fromkeys(what for _, values in lines for _, what in values))
    apart = any(low < high for _, values in lines for _, low, high in values.values())
    size = (15, 2.4 + (0.6 if apart else 0.36) * len(lines))
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    axes[0, 0].set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=9)
    axes[0, 0].set_ylim(len(lines) - 0.4, -0.6)
    for panel, axis in zip(panels, axes[0], strict=True):
        for number, what in enumerate(whats):
            colour, marker = STYLES.get(what.split(" compiled")[0], ("#CC79A7", "*"))
            found = [(i, v[panel, what]) for i, (_, v) in enumerate(lines) if (panel, what) in v]
            shift = (number / max(1, len(whats) - 1) - 0.5) * 0.5 * apart
            places = [i + shift for i, _ in found]
            lengths = [
                [v - low for _, (v, low, _) in found],
                [high - v for _, (v, _, high) in found],
            ]
            axis.errorbar(
                [value for _, (value, _, _) in found], places,
                xerr=lengths if apart else None, linestyle="none", marker=marker,
                color=colour, markerfacecolor="white" if " compiled" in what else colour,
                markersize=11 if marker in "|+" else 7, label=what,
                zorder=4 if what in ("native", "triton", "PPCR fused") else 3,
            )  # fmt: skip
        axis.axvline(1, color="black", linewidth=1)
        if log:
            axis.set_xscale("log")
            low, high = axis.get_xlim()
            axis.set_xticks([tick for tick in TICKS if low <= tick <= high])
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        elif "share" in label:
            axis.set_xlim(left=0)
        axis.set_title(panel if apart else report.words(panel))
        axis.set_xlabel(label)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = min(5, max(1, len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return _save(figure, path, title)


def _scaling(rows: Sequence[Row], path: Path, title: str) -> Path:
    """A column for every axis, the two directions one above the other."""
    plt, found = _pyplot(), report.series(rows)
    threads = sorted({row.threads for row in rows})
    figure, panels = plt.subplots(
        2, len(AXES), figsize=(16, 9.5), layout="constrained", squeeze=False
    )
    for (axis, label), column in zip(AXES.items(), panels.T, strict=True):
        for direction, panel in zip(("forward", "step"), column, strict=True):
            ranges = set()
            for (case, number, what, way), points in found.items():
                if (case, way) != (axis, direction) or what in (LOWER_BOUND, WITH_AUTOGRAD):
                    continue
                colour, marker = STYLES.get(what, ("#CC79A7", "*"))
                name = f"{what}, {number} thread{'s' * (number > 1)}"
                if fitted := report.fit(points):
                    name += f": {round(fitted[0], 2) + 0.0:.2f}"
                    ranges.add(f"{fitted[2]} to {fitted[3]}")
                first = number == threads[0]
                panel.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=6,
                    linestyle="-" if first else "--", label=name,
                    markerfacecolor=colour if first else "white",
                )  # fmt: skip
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel(label)
            panel.set_ylabel("microseconds")
            panel.set_title(
                f"{report.words(direction)}; exponents over {', '.join(ranges)}", fontsize=9
            )
            panel.grid(color="0.9")
            panel.legend(fontsize=8, frameon=False, loc="upper left")
            low, high = panel.get_ylim()
            panel.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    return _save(figure, path, f"Time against size, with the exponents of a power law. {title}")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path, title: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path
