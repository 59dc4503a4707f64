"""The page of what tools/gpu_plans.py measured: CUDA kernels as share of a copy's bandwidth."""

from __future__ import annotations

import itertools
from typing import Any

from .report import table

# channels, side, images
STAGES = (
    (64, 112, 128), (64, 56, 256), (256, 56, 256), (512, 28, 256), (1024, 14, 256), (2048, 7, 256)
)  # fmt: skip
UNITS = {
    ("ppcr", "forward"): 2,
    ("ppcr", "backward"): 3,
    ("add_relu", "forward"): 3,
    ("add_relu", "backward"): 5,
}
HEAD = """\
# CUDA kernels on an {device}

Share of a copy's bandwidth: bytes that the call must move over its time, over those of \
`y.copy_(x)`.
PyTorch {torch}, driver {driver}, {date}; `tools/gpu_plans.py`, device time.
Above 1: more reading than in a copy, which is faster than writing.
"""


def page(results: dict[str, Any]) -> str:
    """A Markdown page of committed results: for every layout a table, shares before and after."""
    named = ("dtype", "layout", "operation", "direction")
    shares = [
        {
            (*(row[name] for name in named), *row["stage"]): f"{row['share']:.2f}"
            + "°" * (row.get("build") == "earlier")
            for row in run["rows"]
        }
        for run in results["runs"]
    ]
    lines = [
        HEAD.format(**results),
        *(f"- {run['name']}: {run['about']}" for run in results["runs"]),
    ]
    header = ["images x channels x side", "dtype", *map(" ".join, UNITS)]
    for layout in ("contiguous", "channels_last"):
        rows = []
        for stage, dtype in itertools.product(STAGES, ("float16", "float32")):
            channels, side, images = stage
            places = [(dtype, layout, *what, *stage) for what in UNITS]
            cells = [" → ".join(one.get(place, "-") for one in shares) for place in places]
            rows.append([f"{images}x{channels}x{side}x{side}", dtype, *cells])
        lines += [f"\n## {layout}, before → after\n", table(header, rows)]
    return "\n".join(lines) + "\n"
