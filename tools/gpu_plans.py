"""Times the CUDA kernels as share of a copy: ``python3 tools/gpu_plans.py --out results/gpu``.

For every operator, pass, dtype, layout and ResNet stage: the plan that the planner chooses, and
with --sweep those that PPCR_PLAN can ask for instead. A share is the bandwidth of the bytes that
the call must move over that of ``y.copy_(x)``, timed in the same rounds. The files, plans.json or
sweep.json, are those of the benchmarks: a run goes on where the last one of its commit stopped.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cases, layers, results, runner, timing
from benchmarks.baselines import OPERATORS, TRAFFIC
from ppcr_ext import testing
from ppcr_ext._build import devices

OPS = torch.ops.ppcr_ext
COPY, CHOSEN = "copy", ""


def call_of(case: cases.Case, direction: str, pool: layers.InputPool) -> Callable[[], object]:
    """Runs on each of the pool's inputs in turn."""
    is_backward, has_residual = direction == "backward", case.operator == "add_relu"
    call = getattr(OPS, OPERATORS[case.operator] + "_backward" * is_backward)
    parameters = pool.inputs.weight, pool.inputs.bias, pool.inputs.levels, pool.inputs.eps

    def run() -> None:
        x, grad, residual = pool.next()
        maps = [*[grad] * is_backward, x, *[residual] * has_residual]
        pool.keep(call(*maps, *parameters))

    return run


def candidates(case: cases.Case) -> Iterator[str]:
    """What PPCR_PLAN may say; most of it does not fit, which the planner says at once."""
    size = getattr(torch, case.dtype).itemsize
    vector = 16 // size
    if case.layout == "channels_last":
        for variant, warps in itertools.product(range(8), (2, 4, 8)):
            yield f"variant={variant},warps={warps}"
        return
    pixels = math.prod(case.shape[2:])
    tiles = {pixels, *(run // size for run in (64, 128, 256, 512, 1024))}
    tiles |= {math.ceil(pixels / pieces / vector) * vector for pieces in (2, 3, 4, 7)}
    grids, powers = ("", f",clusters={2**30}"), (1, 2, 4, 8)
    choices = itertools.product(sorted(tiles), powers, powers, (8, 13), grids)
    for q, groups, cluster, steps, grid in choices:
        if 4 <= groups * cluster <= 16 and q * size <= 2048:
            named = f"q={q},groups={groups},cluster={cluster},vector={vector},steps={steps}"
            yield named + grid


def measure(
    case: cases.Case, direction: str, pool: layers.InputPool, plans: list[str], rounds: int
) -> list[results.Row]:
    """A row for every plan that fits; in a rehearsal, which has one round, for the first four."""
    run, calls = call_of(case, direction, pool), {COPY: timing.Call(pool.copy)}

    def planned(plan: str) -> None:
        os.environ["PPCR_PLAN"] = plan
        run()

    for plan in plans:
        if rounds == 1 and len(calls) > 4:
            break
        try:
            planned(plan)
            calls[plan] = timing.Call(functools.partial(planned, plan))
        except RuntimeError as error:
            if "plan" not in str(error).lower():
                raise
    samples, _ = timing.interleave(calls, rounds, timing.clock(pool.inputs.x.device))
    os.environ.pop("PPCR_PLAN", None)
    took = {plan: statistics.median(s.seconds for s in found) for plan, found in samples.items()}
    units, _ = TRAFFIC[case.operator, direction]
    return [
        results.Row(
            *case.place,
            direction=direction,
            what=plan or "native",
            kind="fused",
            rounds=rounds,
            median_us=took[plan] * 1e6,
            host_us=statistics.median(s.host for s in samples[plan]) * 1e6,
            copy_fraction=units / 2 * took[COPY] / took[plan],
        )
        for plan in took
        if plan != COPY
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "results" / "gpu")
    add("--sweep", action="store_true", help="other plans as well")
    add("--rehearsal", action="store_true", help="one tiny stage")
    options = parser.parse_args()
    device, small = torch.device("cuda"), options.rehearsal
    environment = results.environment(device) | {"driver": devices.driver()}
    settings = {"quick": small, "rounds": 1 if small else 5}
    record = results.Record("plans", environment, settings)
    where = options.out / ("sweep" if options.sweep else "plans")
    print(runner.resume(record, where.with_suffix(".json")))
    done = {(*row.place, row.direction) for row in record.rows}
    shapes = [(images, c, side, side) for c, side, images in cases.GPU_STAGES]
    stages = [(2, 64, 5, 5)] if small else shapes
    for dtype, shape, layout in itertools.product(cases.DTYPES[:3], stages, testing.LAYOUTS):
        made = cases.grid(("ppcr", "add_relu"), (shape,), (dtype,), (layout,), rotate=not small)
        made = [dataclasses.replace(case, suite="plans") for case in made]
        passes = [(case, d) for case in made for d in ("forward", "backward")]
        passes = [(case, d) for case, d in passes if (*case.place, d) not in done]
        pool = layers.InputPool(made[-1], device) if passes else None
        for case, direction in passes:
            plans = [CHOSEN, *(candidates(case) if options.sweep else ())]
            rows = measure(case, direction, pool, plans, settings["rounds"])
            record.rows += rows
            rows.sort(key=lambda row: -row.copy_fraction)
            best = "; ".join(f"{row.copy_fraction:.3f} {row.what}" for row in rows[:4])
            print(f"{case.operator} {direction}, {case.label}: {best}", flush=True)
        record.write(where)
        del pool
    record.complete = True
    record.write(where)


if __name__ == "__main__":
    main()
