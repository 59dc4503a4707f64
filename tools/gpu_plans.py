"""Times the CUDA kernels as share of a copy: ``python3 tools/gpu_plans.py --out results/gpu``.

For every operation, pass, dtype, layout and ResNet stage: the plan that the planner chooses, and with --sweep those that PPCR_PLAN
can ask for instead. A share is the bandwidth of the bytes that the call must move over that of ``y.copy_(x)``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ppcr_ext  # noqa: F401  registers the operators
from benchmarks.shares import STAGES, UNITS

LEVELS = [1, 2, 4]
KEPT = 3  # results that stay alive, so that none is written where a cache still holds the last
OPS = torch.ops.ppcr_ext


class Cell(NamedTuple):
    operation: str
    direction: str
    dtype: str
    layout: str
    stage: tuple[int, int, int]  # channels, side, images

    def __str__(self) -> str:
        channels, side, images = self.stage
        return f"{self.operation} {self.direction} {self.dtype} {self.layout} {images}x{channels}x{side}x{side}"


def cells(dtypes: list[str], layouts: list[str]) -> Iterator[Cell]:
    for stage, dtype, layout, (operation, direction) in itertools.product(
        STAGES, dtypes, layouts, UNITS
    ):
        yield Cell(operation, direction, dtype, layout, stage)


class Inputs:
    """Three sets of tensors of one dtype, layout and stage, which calls take in turn."""

    def __init__(self, dtype: str, layout: str, stage: tuple[int, int, int]) -> None:
        channels, side, images = stage
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        made = [
            torch.randn(
                images, channels, side, side, device="cuda", dtype=getattr(torch, dtype)
            ).to(memory_format=form)
            for _ in range(3 * KEPT)
        ]
        self.x, self.grad, self.other = made[:KEPT], made[KEPT : 2 * KEPT], made[2 * KEPT :]
        self.weight, self.bias = torch.randn(7, device="cuda"), torch.zeros(1, device="cuda")
        self.bytes = made[0].numel() * made[0].element_size()

    def call(self, operation: str, direction: str) -> Callable[[int], object]:
        rest = (self.weight, self.bias, LEVELS, 1e-5)
        if operation == "copy":
            return lambda i: self.other[i].copy_(self.x[i])
        if operation == "ppcr":
            if direction == "forward":
                return lambda i: OPS.ppcr(self.x[i], *rest)
            return lambda i: OPS.ppcr_backward(self.grad[i], self.x[i], *rest)
        if direction == "forward":
            return lambda i: OPS.ppcr_add_relu(self.x[i], self.other[i], *rest)
        return lambda i: OPS.ppcr_add_relu_backward(self.grad[i], self.x[i], self.other[i], *rest)


def microseconds(call: Callable[[int], object], calls: int = 9, rounds: int = 3) -> float:
    """Median over rounds of the device's time per call. The stream is kept busy while Python enqueues."""
    kept: list[object] = [None] * KEPT
    for i in range(2):
        kept[i] = call(i)
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(600_000)
        begin.record()
        for i in range(calls):
            kept[i % KEPT] = call(i % KEPT)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def candidates(cell: Cell) -> Iterator[str]:
    """What PPCR_PLAN may say; most of it does not fit, which the planner says at once."""
    size = getattr(torch, cell.dtype).itemsize
    vector = 16 // size
    if cell.layout == "channels_last":
        for variant, warps in itertools.product(range(8), (2, 4, 8)):
            yield f"variant={variant},warps={warps}"
        return
    pixels = cell.stage[1] ** 2
    tiles = {pixels, *(run // size for run in (64, 128, 256, 512, 1024))}
    tiles |= {math.ceil(pixels / pieces / vector) * vector for pieces in (2, 3, 4, 7)}
    for q, groups, cluster, steps in itertools.product(
        sorted(tiles), (1, 2, 4, 8), (1, 2, 4, 8), (8, 13)
    ):
        if 4 <= groups * cluster <= 16 and q * size <= 2048:
            yield f"q={q},groups={groups},cluster={cluster},vector={vector},steps={steps}"


def measure(cell: Cell, inputs: Inputs, copied: float, plans: list[str]) -> list[dict[str, object]]:
    call, units = inputs.call(cell.operation, cell.direction), UNITS[cell.operation, cell.direction]
    rows: list[dict[str, object]] = []
    for plan in plans:
        os.environ["PPCR_PLAN"] = plan
        try:
            call(0)
        except RuntimeError:
            continue
        took = microseconds(call) if plan == "" else microseconds(call, 5, 1)
        share = units / 2 * copied / took
        rows.append(
            {
                **cell._asdict(),
                "plan": plan,
                "microseconds": round(took, 2),
                "share": round(share, 4),
            }
        )
    os.environ.pop("PPCR_PLAN")
    return rows


def sweep(cell: Cell, inputs: Inputs, copied: float) -> list[dict[str, object]]:
    """All candidates, and the best two of them with a block for every tile."""
    rows = measure(cell, inputs, copied, list(candidates(cell)))
    best = sorted(rows, key=lambda row: -float(str(row["share"])))[:2]
    if cell.layout == "contiguous":
        rows += measure(cell, inputs, copied, [f"{row['plan']},clusters={2**30}" for row in best])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument(
        "--sweep",
        default="",
        help="other plans as well: of ppcr, 'ppcr backward', add_relu .. or all",
    )
    parser.add_argument("--dtypes", default="float16,float32")
    parser.add_argument("--layouts", default="contiguous,channels_last")
    parser.add_argument(
        "--once", help="runs cells whose name holds one of these words once, for a profiler"
    )
    options = parser.parse_args()
    dtypes, layouts = options.dtypes.split(","), options.layouts.split(",")
    if options.once is not None:
        for cell in cells(dtypes, layouts):
            if any(words in str(cell) for words in options.once.split(",")):
                inputs = Inputs(cell.dtype, cell.layout, cell.stage)
                inputs.call(cell.operation, cell.direction)(0)
                torch.cuda.synchronize()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    print(torch.cuda.get_device_name(), torch.__version__)
    for (dtype, layout, stage), group in itertools.groupby(
        cells(dtypes, layouts), lambda cell: cell[2:]
    ):
        inputs = Inputs(dtype, layout, stage)
        copied = microseconds(inputs.call("copy", "forward"))
        channels, side, images = stage
        print(
            f"{dtype} {layout} {images}x{channels}x{side}x{side}: copy {2 * inputs.bytes / copied / 1e6:.2f} TB/s, {copied:.1f} us"
        )
        for cell in group:
            found = measure(cell, inputs, copied, [""])
            if options.sweep in (cell.operation, "all", f"{cell.operation} {cell.direction}"):
                found += sweep(cell, inputs, copied)
            rows += found
            best = sorted(found[1:], key=lambda row: -float(str(row["share"])))[:4]
            text = "; ".join(f"{row['share']} {row['plan']}" for row in best)
            print(
                f"  {cell.operation:8} {cell.direction:8} {found[0]['share']:.3f}  of {len(found) - 1} others: {text}",
                flush=True,
            )
        del inputs
        (options.out / "plans.json").write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=0)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
