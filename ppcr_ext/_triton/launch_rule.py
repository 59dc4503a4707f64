"""Which Triton kernel, tile and number of warps for which shape: a rule, and a table of measured exceptions. Needs no Triton."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

from ..reference import bins

SCALE, ADD_RELU, GATE = 0, 1, 2  # as in common.py

# A tile in registers: bytes of x, and in contiguous backward and gate elements, that a thread holds, because more of them spill
# when compiled for sm_90 (docs/triton_kernels.md). Where runs of contiguous memory would be short, a tile gets more warps, up to as many
# as the registers of a multiprocessor serve; runs of less than one 32-byte sector are left to the two passes.
_THREAD_BYTES = 128
_FEW_ELEMENTS = 32
_WARPS = 8
_MAX_WARPS = 16
_LONG_RUN = 64
_SHORT_RUN = 32
# Two passes: eight elements of a chunk per thread, and no more contexts than that. With few pixels (16 in long segments) all tiles
# that run at a time, about two per multiprocessor, fit in the L2 cache, also with 2048 channels.
_TWO_PASSES_WARPS = 8
_TWO_PASSES_CHUNK = 128
_TWO_PASSES_ELEMENTS = 8 * 32 * _TWO_PASSES_WARPS


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a launch depends on. channels_last tensors are one image of all their pixels."""

    images: int
    channels: int
    pixels: int  # of an image
    channels_last: bool
    element_size: int
    levels: tuple[int, ...]
    mode: int = SCALE
    backward: bool = False

    @property
    def standard(self) -> bool:
        """Levels (1, 2, 4) over four equal segments."""
        return self.levels == (1, 2, 4) and self.channels % 4 == 0

    @property
    def padded_channels(self) -> int:
        """Of four segments, each padded to a power of two."""
        return 4 * power_of_two(-(-self.channels // 4))


@dataclasses.dataclass(frozen=True)
class Launch:
    """A tile: its pixels, the warps of its program, and the channels that it reads at a time (None: all stay in registers)."""

    pixels: int
    warps: int
    chunk: int | None = None


Key = tuple[int, bool, bool, int, int, int]
# For levels (1, 2, 4), what `python -m ppcr_ext._triton.tune` printed; empty as long as none of these kernels has run on a GPU.
TABLE: dict[Key, Launch] = {}


def key_of(p: Problem) -> Key:
    """Where TABLE holds a problem: mode, backward, channels_last, element_size, channels, and pixels unless channels_last."""
    return (
        p.mode,
        p.backward,
        p.channels_last,
        p.element_size,
        p.channels,
        0 if p.channels_last else p.pixels,
    )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def longest_segment(levels: tuple[int, ...], channels: int) -> int:
    edges = sorted({edge for level in levels for pair in bins(channels, level) for edge in pair})
    return max(end - begin for begin, end in itertools.pairwise(edges))


def common_edge_factor(levels: tuple[int, ...], channels: int) -> int:
    """The largest power of two, up to 16, that divides every edge of every bin."""
    edges = math.gcd(
        16, *(edge for level in levels for pair in bins(channels, level) for edge in pair)
    )
    return edges & -edges


def launch_for(problem: Problem) -> Launch:
    """The measured launch where TABLE has one, else the rule's."""
    return (TABLE.get(key_of(problem)) if problem.standard else None) or rule(problem)


@functools.lru_cache(maxsize=4096)
def rule(problem: Problem) -> Launch:
    """A tile in registers where there is a good one, else two passes over the channels."""
    p = problem
    return one_pass_rule(p) or two_passes_rule(p)


def one_pass_rule(p: Problem) -> Launch | None:
    """Four segments of [channels, pixels] in registers, or None where that makes no good tile."""
    if not p.standard:
        return None
    held = _THREAD_BYTES // p.element_size
    if (p.backward or p.mode == GATE) and not p.channels_last:
        held = min(held, _FEW_ELEMENTS)
    all_pixels = power_of_two(p.pixels)
    long_run = _SHORT_RUN if p.backward and p.element_size == 2 else _LONG_RUN
    wanted, needed = (
        (1, 1)
        if p.channels_last
        else (min(run // p.element_size, all_pixels) for run in (long_run, _SHORT_RUN))
    )
    most_warps = 2 * _MAX_WARPS if p.element_size == 4 and not p.backward else _MAX_WARPS
    warps = _WARPS
    while warps * 32 * held < wanted * p.padded_channels and warps < most_warps:
        warps *= 2
    pixels = warps * 32 * held // p.padded_channels
    if pixels < needed:
        return None
    while pixels > all_pixels:  # small images: a thread keeps what it holds in a large one
        pixels //= 2
        warps = max(1, warps // 2)
    return Launch(pixels, warps)


def two_passes_rule(p: Problem) -> Launch:
    chunk = min(_TWO_PASSES_CHUNK, power_of_two(longest_segment(p.levels, p.channels)))
    pixels = _TWO_PASSES_ELEMENTS // max(chunk, power_of_two(sum(p.levels)))
    return Launch(min(pixels, power_of_two(p.pixels)), _TWO_PASSES_WARPS, chunk)
