"""The pictures of the operators and the scaling suite, in colours that the colour-blind tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import scaling
from .measure import Row

# Okabe and Ito's colours; the markers tell the series apart without colour.
STYLES: dict[str, tuple[str, str]] = {
    "native": ("#0072B2", "o"),
    "triton": ("#56B4E9", "P"),
    "reference": ("#CC79A7", "X"),
    "pooled once compiled": ("#D55E00", "s"),
    "pooled once": ("#E69F00", "v"),
    "level by level": ("#009E73", "^"),
    "floor": ("#000000", "|"),
    "copy": ("#888888", "D"),
}
NAMES = {
    "pooled once": "pooled once, eager",
    "level by level": "level by level, eager",
    "pooled once compiled": "pooled once, torch.compile",
}
TITLES = {
    "forward": "forward",
    "backward": "backward",
    "step": "training step (forward and backward)",
}


def headline_dtype(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    """The dtype of the pictures and of the README: what is trained in on that device."""
    wanted = "float32" if environment["device"] == "cpu" else "bfloat16"
    return wanted if any(row.dtype == wanted for row in rows) else rows[0].dtype


def inputs(
    rows: Sequence[Row], operator: str, dtype: str
) -> dict[tuple[str, str], dict[tuple[str, str], Row]]:
    """``{(case, layout): {(what, direction): row}}``, without the tiny tensor."""
    found: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row.operator == operator and row.dtype == dtype and not row.case.startswith("tiny"):
            found.setdefault((row.case, row.layout), {})[row.what, row.direction] = row
    return found


def draw_operators(rows: list[Row], out: Path, environment: dict[str, Any]) -> list[Path]:
    """``operators_roofline.png`` and ``operators_speedup.png``; nothing where only the tiny tensor was measured."""
    dtype = headline_dtype(rows, environment)
    grouped = inputs(rows, "ppcr", dtype)
    if not grouped:
        return []
    title = f"ppcr, {dtype}, {_machine(rows, environment)}"
    return [
        _roofline(grouped, out / "operators_roofline.png", title),
        _speedup(grouped, out / "operators_speedup.png", title),
    ]


def draw_scaling(rows: list[Row], out: Path, environment: dict[str, Any]) -> list[Path]:
    """``scaling.png``: a column an axis, the two directions one above the other."""
    plt = _pyplot()
    found, fitted = scaling.series(rows), scaling.fits(rows)
    exponents = {(fit.axis, fit.threads, fit.what, fit.direction): fit for fit in fitted}
    threads = sorted({row.threads for row in rows})
    figure, panels = plt.subplots(
        2, len(scaling.AXES), figsize=(15, 9), layout="constrained", squeeze=False
    )
    for (axis, label), column in zip(scaling.AXES.items(), panels.T, strict=True):
        for direction, panel in zip(("forward", "step"), column, strict=True):
            for (case, number, what, way), points in found.items():
                if (case, way) != (axis, direction) or what == "floor":
                    continue
                colour, marker = STYLES.get(what, ("#CC79A7", "*"))
                fit = exponents.get((case, number, what, way))
                exponent = f": {round(fit.exponent, 2) + 0.0:.2f}" if fit else ""
                first = number == threads[0]
                panel.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle="-" if first else "--",
                    markerfacecolor=colour if first else "white",
                    markersize=6,
                    label=f"{NAMES.get(what, what)}, {number} thread{'s' * (number > 1)}{exponent}",
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel(label)
            panel.set_ylabel("microseconds")
            ranges = {
                (fit.first, fit.last)
                for fit in fitted
                if (fit.axis, fit.direction) == (axis, direction)
            }
            span = ", ".join(f"{first} to {last}" for first, last in sorted(ranges))
            panel.set_title(
                f"{direction}; exponents fitted over {span}" if span else direction, fontsize=9
            )
            panel.grid(color="0.9")
            panel.legend(fontsize=7.5, frameon=False, loc="upper left")
            low, high = panel.get_ylim()
            panel.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    figure.suptitle(
        f"Time against size, with the exponents of a power law. float32, {_machine(rows, environment)}",
        fontsize=11,
    )
    return [_save(figure, out / "scaling.png")]


def _roofline(
    grouped: dict[tuple[str, str], dict[tuple[str, str], Row]], path: Path, title: str
) -> Path:
    figure, panels = _panels(grouped, 3, 0.3)
    for panel, direction in zip(panels, ("forward", "backward", "step"), strict=True):
        for what, (colour, marker) in STYLES.items():
            if what == "copy":
                continue
            points = [
                (row.copy_fraction, i)
                for i, one in enumerate(grouped.values())
                if (row := one.get((what, direction)))
            ]
            if points:
                front = 3 if what in ("native", "triton") else 2
                label = "x * 0.5, x + gy" if what == "floor" else NAMES.get(what, what)
                size = 11 if marker == "|" else 7
                x, y = zip(*points, strict=True)
                panel.plot(
                    x,
                    y,
                    linestyle="none",
                    marker=marker,
                    markersize=size,
                    color=colour,
                    label=label,
                    zorder=front,
                )
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlim(left=0)
        panel.set_title(TITLES[direction])
        panel.set_xlabel("share of the bandwidth of a copy of x")
        panel.grid(color="0.9")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Necessary bytes per second, beside a copy: {title}", fontsize=11)
    return _save(figure, path)


def _speedup(
    grouped: dict[tuple[str, str], dict[tuple[str, str], Row]], path: Path, title: str
) -> Path:
    fused = next(
        (
            what
            for what in ("native", "triton")
            for one in grouped.values()
            if (what, "forward") in one
        ),
        "native",
    )
    wanted = ("pooled once compiled", "pooled once", "level by level")
    peers = [peer for peer in wanted if any((peer, "forward") in one for one in grouped.values())]
    figure, panels = _panels(grouped, 2, 0.45)
    for panel, direction in zip(panels, ("forward", "step"), strict=True):
        for at, peer in enumerate(peers):
            bars = [
                (
                    i + (at - (len(peers) - 1) / 2) * 0.26,
                    one[peer, direction].median_us / one[fused, direction].median_us,
                )
                for i, one in enumerate(grouped.values())
                if (peer, direction) in one and (fused, direction) in one
            ]
            places, ratios = zip(*bars, strict=True) if bars else ((), ())
            panel.barh(places, ratios, height=0.24, color=STYLES[peer][0], label=NAMES[peer])
            for place, ratio in bars:
                panel.text(
                    ratio,
                    place,
                    f" {ratio:.1f}",
                    va="center",
                    fontsize=6.5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                )
        panel.axvline(1, color="black", linewidth=1)
        panel.set_title(TITLES[direction])
        panel.set_xlabel(f"times as long as {fused}")
        panel.margins(x=0.08)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"How many times as long plain PyTorch takes: {title}", fontsize=11)
    return _save(figure, path)


def _panels(grouped: dict[tuple[str, str], Any], count: int, height: float) -> tuple[Any, Any]:
    """Panels beside each other that share a line for every input."""
    labels = [f"{case}, {layout}" for case, layout in grouped]
    figure, panels = _pyplot().subplots(
        1, count, figsize=(15, 2.2 + height * len(labels)), sharey=True, layout="constrained"
    )
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    return figure, panels


def _machine(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    threads = " and ".join(map(str, sorted({row.threads for row in rows})))
    if environment["device"] != "cpu":
        return f"{environment['device']}, torch {environment['torch']}"
    return f"{environment['cpu']}, {threads} {'thread' if threads == '1' else 'threads'}, torch {environment['torch']}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path
