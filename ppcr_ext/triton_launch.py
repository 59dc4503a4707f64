"""Which Triton kernel, tile and number of warps for which shape: a rule, and a table of measured exceptions. Needs no Triton."""

from __future__ import annotations

import dataclasses
import functools
import math

from .reference import bins

SCALE, ADD_RELU, GATE = 0, 1, 2  # as in triton_kernels.py

# A tile in registers: bytes of x per thread, with 8 warps, and the most with more. Backward holds the gradient and needs the rest
# for x on its way; found by compiling for sm_90 (docs/triton_kernels.md), where more of either spills.
_TILE_BYTES = 128 * 256
_TILE_WARPS = 8
_RUN_BYTES = 64  # shorter runs of contiguous memory waste half of what the L2 cache sends
_CHUNK_BYTES = 32 * 512
_WALK_WARPS = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a launch depends on. Pixel-major tensors are one image of all their pixels."""

    images: int
    channels: int
    pixels: int  # of an image
    pixel_major: bool
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


# (channels, pixels, pixel_major, element_size, backward) -> Launch, for levels (1, 2, 4); what `python -m ppcr_ext.triton_tune` prints.
TABLE: dict[tuple[int, int, bool, int, bool], Launch] = {}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def longest_segment(levels: tuple[int, ...], channels: int) -> int:
    edges = sorted({edge for level in levels for pair in bins(channels, level) for edge in pair})
    return max(b - a for a, b in zip(edges, edges[1:], strict=False))


def common_edge_factor(levels: tuple[int, ...], channels: int) -> int:
    """The largest power of two, up to 16, that divides every edge of every bin."""
    edges = math.gcd(16, *(edge for level in levels for pair in bins(channels, level) for edge in pair))
    return edges & -edges


def launch_for(problem: Problem) -> Launch:
    """The measured launch where TABLE has one, else the rule's."""
    p = problem
    if p.standard and p.mode == SCALE:
        found = TABLE.get((p.channels, p.pixels, p.pixel_major, p.element_size, p.backward))
        if found is not None:
            return found
    return rule(problem)


@functools.lru_cache(maxsize=4096)
def rule(problem: Problem) -> Launch:
    """Tiles of 32 KiB in registers where runs of memory are long enough, else two passes over the channels."""
    p = problem
    return tile_rule(p) or walk_rule(p)


def tile_rule(p: Problem) -> Launch | None:
    if not p.standard:
        return None
    pixels = _TILE_BYTES // (p.padded_channels * p.element_size)
    warps = _TILE_WARPS
    if not p.pixel_major:
        shortest = min(_RUN_BYTES // p.element_size, power_of_two(p.pixels))
        while pixels < shortest and warps < 16:
            warps *= 2
            pixels = max(1, 2 * pixels)
        if pixels < shortest:
            return None
    pixels = min(pixels, power_of_two(p.pixels))
    if pixels < 1:
        return None
    while warps > 1 and pixels * p.padded_channels * p.element_size <= _TILE_BYTES // _TILE_WARPS * warps // 2:
        warps //= 2  # small tensors: a thread keeps what it has in a large one
    return Launch(pixels, warps)


def walk_rule(p: Problem) -> Launch:
    contexts = power_of_two(sum(p.levels))
    longest = power_of_two(longest_segment(p.levels, p.channels))
    pixels = 16 if p.pixel_major else 32
    pixels = min(pixels, power_of_two(p.pixels))
    chunk = min(longest, max(1, _CHUNK_BYTES // (pixels * max(p.element_size, 4))))
    del contexts
    return Launch(pixels, _WALK_WARPS, chunk)
