"""Estimated share of a copy's bandwidth for every plan of the CUDA kernels, without a GPU.

``python tools/cuda_estimates.py`` asks the planner (csrc/cuda/plan.h) for its plan of every device,
dtype, stage, layout, operation and direction, and writes results/cuda_estimates.json. The estimate
is the planner's score times a correction for what the score leaves out. Both were fitted to an H200
(benchmarks/results/h200); tests/test_cuda_plan.py compares them with what was measured there, and
lists the cells that stayed below their goal. H100, A100 and float64 are estimates by the same rule.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from cuda_on_cpu import build
from cuda_on_cpu.cases import AMPERE, HOPPER

from benchmarks.baselines import OPERATORS, TRAFFIC
from benchmarks.cases import DTYPES, GPU_STAGES
from benchmarks.report import pivot
from ppcr_ext.testing import LAYOUTS

DEVICES = {"H100": HOPPER, "H200": HOPPER, "A100": AMPERE}
# Of the score, in turn: contiguous in clusters (small images, a cluster each, whose blocks wait for
# each other once or twice a tile), contiguous otherwise, and channels_last (where a copy is half
# writing, which is slower than reading).
FACTORS = {
    ("ppcr", "forward"): (0.91, 1.01, 0.975),
    ("ppcr", "backward"): (0.94, 1.0, 1.0),
    ("add_relu", "forward"): (1.2, 1.05, 1.035),
    ("add_relu", "backward"): (1.17, 1.02, 0.99),
}
MOST_OF_CLUSTERS = 0.93
# Of the gate alone. The kernel in channels_last has not been timed; Triton's reach 0.72 to 1.00.
MOST_OF_GATES = {"contiguous_pipelined": 0.83, "channels_last_gate": 0.71}
PLAN = ("method", "vector", "steps", "q", "groups", "cluster", "variant", "threads", "blocks")
PLAN += ("shared_bytes",)


def share(plan: dict[str, Any], operation: str, direction: str, side: int) -> float:
    score = float(plan["score"])
    if operation == "gate":
        return min(MOST_OF_GATES[plan["method"]], score)
    clusters, contiguous, channels_last = FACTORS[operation, direction]
    if plan["method"] != "contiguous_pipelined":
        return score * channels_last
    whole = plan["q"] == side * side
    if side < 28 and plan["cluster"] > 2 and (whole or operation == "add_relu"):
        return min(MOST_OF_CLUSTERS, score * clusters)
    return score * contiguous


def rows() -> Iterator[dict[str, Any]]:
    kernels = build.load(build.build(left_out=("bfloat16", "half", "float", "double")))
    for (device, limits), dtype, stage, layout, (operation, direction) in itertools.product(
        DEVICES.items(), DTYPES, GPU_STAGES, LAYOUTS, TRAFFIC
    ):
        (channels, side, images), size = stage, getattr(torch, dtype).itemsize
        workload = {
            "images": images,
            "channels": channels,
            "image_pixels": side * side,
            "element_size": size,
            "channels_last": layout == "channels_last",
            "operator": OPERATORS[operation],
            "backward": direction == "backward",
        }
        plan = kernels.plan({**workload, **limits})
        yield {
            "device": device,
            "dtype": dtype,
            "stage": f"{channels}x{side}x{side}",
            "images": images,
            "layout": layout,
            "operation": operation,
            "direction": direction,
            "plan": {name: plan[name] for name in PLAN},
            "share": round(share(plan, operation, direction, side), 3),
        }


def table(estimates: list[dict[str, Any]], device: str) -> str:
    """A line for every dtype, stage and layout; a column for every operation and direction."""
    cells = [
        (
            "{stage}, {layout}, {dtype}".format(**row),
            "{operation} {direction}".format(**row),
            f"{row['share']:.2f}",
        )
        for row in estimates
        if row["device"] == device
    ]
    return f"{device}, estimated share of a copy's bandwidth\n\n{pivot(cells)}"


def main() -> None:
    output, estimates = ROOT / "results" / "cuda_estimates.json", list(rows())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(estimates, indent=1) + "\n")
    print("\n\n".join(table(estimates, device) for device in DEVICES))


if __name__ == "__main__":
    main()
