"""The page of what tools/gpu_plans.py measured: CUDA kernels as share of a copy's bandwidth."""

from __future__ import annotations

from itertools import product
from typing import Any

from ppcr_ext.testing import LAYOUTS

from .baselines import DIRECTIONS, OPERATORS
from .cases import PICTURES
from .report import table

STAGES = ((64, 112, 128), *((channels, side, 256) for channels, side in PICTURES))  # and images
CALLS = tuple(product(("ppcr", "add_relu"), DIRECTIONS[:2]))
UNITS: dict[tuple[str, str], int] = {
    call: getattr(OPERATORS[call[0]], call[1])[0] for call in CALLS
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
    named, shares = ("dtype", "layout", "operation", "direction"), dict[Any, str]()
    for number, run in enumerate(results["runs"]):
        for row in run["rows"]:
            at = (number, *(row[name] for name in named), *row["stage"])
            shares[at] = f"{row['share']:.2f}" + "°" * (row.get("build") == "earlier")
    abouts = (f"- {run['name']}: {run['about']}" for run in results["runs"])
    lines, runs = [HEAD.format(**results), *abouts], range(len(results["runs"]))
    for layout in LAYOUTS:
        rows = []
        for (c, side, n), dtype in product(STAGES, ("float16", "float32")):
            places = [(dtype, layout, *call, c, side, n) for call in CALLS]
            cells = [" → ".join(shares.get((run, *at), "-") for run in runs) for at in places]
            rows.append([f"{n}x{c}x{side}x{side}", dtype, *cells])
        header = ["images x channels x side", "dtype", *map(" ".join, CALLS)]
        lines += [f"\n## {layout}, before → after\n", table(header, rows)]
    return "\n".join(lines) + "\n"
