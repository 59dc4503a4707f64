"""The page of what tools/gpu_plans.py measured: CUDA kernels as share of a copy's bandwidth."""

from __future__ import annotations

import itertools
from typing import Any

STAGES = (
    (64, 112, 128),
    (64, 56, 256),
    (256, 56, 256),
    (512, 28, 256),
    (1024, 14, 256),
    (2048, 7, 256),
)
UNITS = {
    ("ppcr", "forward"): 2,
    ("ppcr", "backward"): 3,
    ("add_relu", "forward"): 3,
    ("add_relu", "backward"): 5,
}
DIRECTIONS = [f"{operation} {direction}" for operation, direction in UNITS]


def page(results: dict[str, Any]) -> str:
    """A Markdown page of committed results: for every layout a table, shares before and after."""

    def share(run: dict[str, Any], dtype: str, layout: str, stage: list[int], what: str) -> str:
        for row in run["rows"]:
            named = (
                row["dtype"],
                row["layout"],
                row["stage"],
                f"{row['operation']} {row['direction']}",
            )
            if named == (dtype, layout, stage, what):
                return f"{row['share']:.2f}" + ("°" if row.get("build") == "earlier" else "")
        return "-"

    lines = [
        f"# CUDA kernels on an {results['device']}",
        "",
        "Share of a copy's bandwidth: bytes that the call must move over its time, over those of `y.copy_(x)`.",
        f"PyTorch {results['torch']}, driver {results['driver']}, {results['date']}; `tools/gpu_plans.py`, device time.",
        "Above 1: more reading than in a copy, which is faster than writing.",
        "",
        *(f"- {run['name']}: {run['about']}" for run in results["runs"]),
    ]
    for layout in ("contiguous", "channels_last"):
        lines += [
            "",
            f"## {layout}, before → after",
            "",
            "| images x channels x side | dtype | " + " | ".join(DIRECTIONS) + " |",
        ]
        lines += ["| --- | --- |" + " ---: |" * len(DIRECTIONS)]
        for (channels, side, images), dtype in itertools.product(STAGES, ("float16", "float32")):
            stage = [channels, side, images]
            cell = (
                " → ".join(share(run, dtype, layout, stage, what) for run in results["runs"])
                for what in DIRECTIONS
            )
            lines.append(
                f"| {images}x{channels}x{side}x{side} | {dtype} | " + " | ".join(cell) + " |"
            )
    return "\n".join(lines) + "\n"
