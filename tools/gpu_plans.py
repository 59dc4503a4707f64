"""Times the CUDA kernels as share of a copy: ``python3 tools/gpu_plans.py --out results/gpu``.

For every operation, pass, dtype, layout and ResNet stage: the plan that the planner chooses, and
with --sweep those that PPCR_PLAN can ask for instead. A share is the bandwidth of the bytes that
the call must move over that of ``y.copy_(x)``, timed in the same rounds. What was measured is
written after every group of cells, and not measured again for the same commit and device: as
JSON, and as the tables that ``make results`` makes of plans.json.
"""

from __future__ import annotations

import argparse
import functools
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
from benchmarks import layers, report, results, timing
from benchmarks.baselines import OPERATORS, TRAFFIC
from benchmarks.cases import GPU_STAGES, Case
from ppcr_ext import testing
from ppcr_ext._build import devices

OPS = torch.ops.ppcr_ext
DTYPES = ("float16", "bfloat16", "float32")
SMALL = ((64, 5, 2),)  # the stage of a rehearsal
COPY, CHOSEN = "copy", ""


class Cell(NamedTuple):
    operation: str
    direction: str
    dtype: str
    layout: str
    stage: tuple[int, int, int]  # channels, side, images

    def __str__(self) -> str:
        channels, side, images = self.stage
        shape = f"{images}x{channels}x{side}x{side}"
        return f"{self.operation} {self.direction} {self.dtype} {self.layout} {shape}"


def call_of(cell: Cell, pool: layers.InputPool) -> Callable[[], object]:
    """Runs on each of the pool's inputs in turn."""
    is_backward, has_residual = cell.direction == "backward", cell.operation == "add_relu"
    call = getattr(OPS, OPERATORS[cell.operation] + "_backward" * is_backward)
    parameters = pool.inputs.weight, pool.inputs.bias, pool.inputs.levels, pool.inputs.eps

    def run() -> None:
        x, grad, residual = pool.next()
        maps = [*[grad] * is_backward, x, *[residual] * has_residual]
        pool.keep(call(*maps, *parameters))

    return run


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
    grids, powers = ("", f",clusters={2**30}"), (1, 2, 4, 8)
    choices = itertools.product(sorted(tiles), powers, powers, (8, 13), grids)
    for q, groups, cluster, steps, grid in choices:
        if 4 <= groups * cluster <= 16 and q * size <= 2048:
            named = f"q={q},groups={groups},cluster={cluster},vector={vector},steps={steps}"
            yield named + grid


def measure(
    cell: Cell, pool: layers.InputPool, plans: list[str], by: timing.Clock, small: bool
) -> list[dict[str, object]]:
    """A row for every plan that fits, or for the first three."""
    run, calls = call_of(cell, pool), {}

    def planned(plan: str) -> None:
        os.environ["PPCR_PLAN"] = plan
        run()

    for plan in plans:
        if small and len(calls) == 3:
            break
        try:
            planned(plan)
            calls[plan] = timing.Call(functools.partial(planned, plan))
        except RuntimeError as error:
            if "plan" not in str(error).lower():
                raise
    everything = {COPY: timing.Call(pool.copy), **calls}
    samples, _ = timing.interleave(everything, 1 if small else 5, by=by)
    os.environ.pop("PPCR_PLAN", None)
    (units, _), rows = TRAFFIC[cell.operation, cell.direction], []
    copied = statistics.median(s.seconds for s in samples[COPY])
    for plan in calls:
        took = statistics.median(s.seconds for s in samples[plan])
        host = statistics.median(s.host for s in samples[plan])
        row = {"plan": plan, "microseconds": round(took * 1e6, 2), "host_us": round(host * 1e6, 2)}
        rows.append(cell._asdict() | row | {"share": round(units / 2 * copied / took, 4)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "results" / "gpu")
    add("--sweep", action="store_true", help="other plans as well")
    add("--only", default="", help="cells whose name holds all of these words, with spaces")
    add("--rehearsal", action="store_true", help="one tiny stage")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / ("sweep.json" if options.sweep else "plans.json")
    device = torch.device("cuda")
    by, found = timing.clock(device), results.environment(device) | {"driver": devices.driver()}
    old = json.loads(file.read_text()) if file.exists() else {}
    same = all(old.get(name) == found.get(name) for name in results.SAME)
    rows = old["runs"][0]["rows"] if same else []
    measured = {(*(row[f] for f in Cell._fields[:-1]), tuple(row["stage"])) for row in rows}
    stages, words = SMALL if options.rehearsal else GPU_STAGES, options.only.split()
    found["runs"] = [{"name": file.stem, "about": f"commit {found['commit']}.", "rows": rows}]
    print(found["device"], torch.__version__)
    for stage, dtype, layout in itertools.product(stages, DTYPES, testing.LAYOUTS):
        cells = [Cell(*what, dtype, layout, stage) for what in TRAFFIC if what[0] != "gate"]
        cells = [c for c in cells if c not in measured and all(word in str(c) for word in words)]
        if not cells:
            continue
        channels, side, images = stage
        shape, small = (images, channels, side, side), options.rehearsal
        case = Case("plans", "add_relu", "", shape, layout, dtype, rotate=not small)
        pool = layers.InputPool(case, device)
        for cell in cells:
            plans = [CHOSEN, *(candidates(cell) if options.sweep else ())]
            chosen, *others = measure(cell, pool, plans, by, small)
            rows += [chosen, *others]
            best = sorted(others, key=lambda row: -float(str(row["share"])))[:4]
            text = "; ".join(f"{row['share']} {row['plan']}" for row in best)
            print(f"{chosen['share']:.3f} {cell}; of {len(others)} others: {text}", flush=True)
        file.write_text(json.dumps(found))
        if not options.sweep:
            (options.out / "plans.md").write_text("\n\n".join(report.plans(found)) + "\n")
        del pool


if __name__ == "__main__":
    main()
