"""Bank conflicts of shared memory, counted while the CUDA kernels run on the CPU.

tests/cuda_on_cpu/bank_conflicts.cpp says what the model counts and what it does not see.
"""

import ctypes
import dataclasses
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

pytest.importorskip("pybind11")

from cuda_on_cpu import build, cases

from ppcr_ext import testing

pytestmark = pytest.mark.full

STAGES = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))


class Place(NamedTuple):
    """An access in the source: cycles of all its warps' instructions, and without conflicts."""

    offset: int
    instructions: int
    cycles: int
    lower_bound: int


@functools.cache
def counted() -> tuple[ModuleType, ctypes.CDLL, Path]:
    path = build.build(("-g1",), left_out=("bfloat16", "double"), bank_conflicts=True)
    library = ctypes.CDLL(str(path))
    library.bank_conflicts_end.restype = ctypes.c_char_p
    return build.load(path), library, path


def line_of(place: Place) -> str:
    command = ["addr2line", "-e", str(counted()[2]), hex(place.offset - 1)]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("/")[-1].strip()


def places(case: cases.Case, forced: tuple[str, str]) -> Iterator[list[Place]]:
    """The accesses of block 0 forward, then backward."""
    library, y = counted()[1], None
    for backward in (False, True):
        case = dataclasses.replace(case, forced=forced[backward])
        tensors = cases.Tensors(case)
        library.bank_conflicts_begin()
        outputs, _ = tensors.run(backward, y=y)
        text = library.bank_conflicts_end().decode()
        y = outputs.get("y")
        yield [Place(*map(int, line.split())) for line in text.splitlines()]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage[0]}x{stage[1]}")
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_conflicts(layout, stage, dtype, monkeypatch):
    """Of every planned cell: cycles of all accesses over their lower bound.

    Where conflicts stay: eight 16-bit elements have eight float32 sums, two 16-byte words a thread,
    so that the words of neighbours lie two apart; images of 49 pixels, whose rows are no whole
    words; and rows that several lanes sum.
    """
    module = counted()[0]
    most = 1.05 if layout == "channels_last" else {"float16": 1.4, "float32": 1.25}[dtype]
    monkeypatch.setattr(cases, "kernels", lambda: module)
    channels, side = stage
    for operator in ("ppcr", "ppcr_add_relu"):
        case = cases.Case(
            dtype, 256, channels, side * side, layout == "channels_last", operator=operator
        )
        forced = cases.forced_plan(case.fields(False)), cases.forced_plan(case.fields(True))
        # What is counted is block 0: a few clusters are enough.
        one = dataclasses.replace(case, images=2, only_blocks=8)
        for direction, found in zip(("forward", "backward"), places(one, forced), strict=True):
            cycles, bound = (sum(place[i] for place in found) for i in (2, 3))
            worst = max(found, key=lambda place: place.cycles - place.lower_bound)
            assert bound > 20
            assert cycles <= most * bound, f"{operator} {direction}: {line_of(worst)}, {worst}"
