"""``python -m ppcr_ext._triton.tune [CHANNELSxHEIGHTxWIDTH ...]``: measures launches on a GPU.

Prints those that beat the rule as lines for ``launch_rule.TABLE``. Calls of the operators never
tune.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from . import launch_rule, operators
from .launch_rule import Launch, Problem

GAIN = 0.97  # a launch is better when it takes less than this share of the rule's time
_SHAPES = ("64x56x56", "256x56x56", "512x28x28", "1024x14x14", "2048x7x7")

Timer = Callable[[Problem, Launch], float]


def candidates(problem: Problem) -> list[Launch]:
    """The rule's launch first, then smaller and larger tiles with fewer and more warps."""
    found = [launch_rule.rule(problem)]
    for base in (launch_rule.one_pass_rule(problem), launch_rule.two_passes_rule(problem)):
        if base is None:
            continue
        tiles = (base.pixels // 2, base.pixels, base.pixels * 2)
        for pixels, warps in itertools.product(tiles, (4, 8, 16, 32)):
            channels = base.chunk or problem.padded_channels
            thread_bytes = pixels * channels * problem.element_size / (32 * warps)
            flat = base.flat if pixels == base.pixels else 1  # a tile is then a whole image
            launch = Launch(pixels, warps, base.chunk, flat)
            if pixels >= 1 and 16 <= thread_bytes <= 256 and launch not in found:
                found.append(launch)
    return found


def best(problem: Problem, seconds: Timer) -> Launch | None:
    """The fastest candidate that can be launched, or None where none beats the rule's launch."""
    rule, *others = candidates(problem)
    least, winner = GAIN * seconds(problem, rule), None
    for launch in others:
        try:
            took = seconds(problem, launch)
        except Exception as error:  # out of registers or shared memory, or the compiler's faults
            print(f"# {launch}: {type(error).__name__}")
            continue
        if took < least:
            least, winner = took, launch
    return winner


def problems(shape: str, images: int) -> Iterator[tuple[Problem, torch.Tensor]]:
    """Forward and backward of ppcr in both layouts and two dtypes, with an x."""
    channels, height, width = (int(part) for part in shape.split("x"))
    for form in (torch.channels_last, torch.contiguous_format):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(images, channels, height, width, dtype=dtype, device="cuda")
            x = x.to(memory_format=form)
            for backward in (False, True):
                yield operators.problem_of(launch_rule.SCALE, backward, x, (1, 2, 4)), x


def measure(x: torch.Tensor, problem: Problem, launch: Launch) -> float:
    """Milliseconds of one call of an operator with this launch, the median of many."""
    from triton.testing import do_bench

    weight, bias = torch.randn(7, device=x.device), torch.zeros(1, device=x.device)
    arguments = (weight, bias, (1, 2, 4), 1e-5)

    def call() -> object:
        if problem.backward:
            return operators.backward(problem.mode, x, x, *arguments)
        return operators.forward(problem.mode, x, *arguments)

    key = launch_rule.key_of(problem)
    before = launch_rule.TABLE.get(key)
    launch_rule.TABLE[key] = launch
    operators.plan.cache_clear()
    try:
        return float(do_bench(call, return_mode="median"))
    finally:
        del launch_rule.TABLE[key]
        if before is not None:
            launch_rule.TABLE[key] = before
        operators.plan.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=_SHAPES, help="CHANNELSxHEIGHTxWIDTH")
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    reason = operators.why_not(torch.device("cuda"))
    if reason is not None:
        raise SystemExit(f"nothing to tune: {reason}")
    print(f"# {torch.cuda.get_device_name()}, {options.images} images")
    for shape in options.shapes:
        for problem, x in problems(shape, options.images):
            winner = best(problem, functools.partial(measure, x))
            if winner is not None:
                print(f"    {launch_rule.key_of(problem)}: {winner},", flush=True)


if __name__ == "__main__":
    main()
