"""Which Triton kernel, tile and number of warps a shape gets. It needs no Triton."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

from ..reference import bins

SCALE, ADD_RELU, GATE = 0, 1, 2  # as in common.py

# One pass: the bytes of x that a thread keeps in registers, and the elements of contiguous tensors
# in the backward pass and of the gate. With more of them registers spill when the kernels are
# compiled for sm_90 (make cuda-report). Where runs of contiguous memory would be short, a tile gets
# more warps, up to as many as the registers of a multiprocessor serve. Runs shorter than a sector
# of 32 bytes are left to the two passes.
_THREAD_BYTES = 128
_FEW_ELEMENTS = 32
_WARPS = 8
_MAX_WARPS = 16
_LONG_RUN = 64
_SHORT_RUN = 32
# Two passes: a thread has eight elements of a chunk, and no more contexts than that. With so few
# pixels (16 in long segments) all tiles that run at a time, about two for each multiprocessor, fit
# into the L2 cache, also with 2048 channels.
_TWO_PASSES_WARPS = 8
_TWO_PASSES_CHUNK = 128
_TWO_PASSES_ELEMENTS = 8 * 32 * _TWO_PASSES_WARPS
# Backward, small images whose rows are no whole vectors: a thread has 16 elements of a chunk. One
# program does an image, so that there should be as many as multiprocessors.
_FLAT_ELEMENTS = 16 * 32 * _TWO_PASSES_WARPS
_FLAT_ROW = 512
_FLAT_IMAGES = 128


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
    """A tile: its pixels, the warps of its program, and how many channels it reads at a time.

    None means one pass: all channels stay in registers. A row of the tile is `flat` channels with
    all their pixels.
    """

    pixels: int
    warps: int
    chunk: int | None = None
    flat: int = 1


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _edges(levels: tuple[int, ...], channels: int) -> list[int]:
    """The channels at which bins begin or end."""
    return sorted({edge for level in levels for pair in bins(channels, level) for edge in pair})


def longest_segment(levels: tuple[int, ...], channels: int) -> int:
    return max(end - begin for begin, end in itertools.pairwise(_edges(levels, channels)))


def common_edge_factor(levels: tuple[int, ...], channels: int) -> int:
    """The largest power of two, up to 16, that divides every edge of every bin."""
    common = math.gcd(16, *_edges(levels, channels))
    return common & -common


@functools.lru_cache(maxsize=4096)
def launch_for(problem: Problem) -> Launch:
    """A tile in registers where there is a good one, else two passes over the channels."""
    return one_pass_rule(problem) or two_passes_rule(problem)


def one_pass_rule(p: Problem) -> Launch | None:
    """Four segments of [channels, pixels] in registers, or None where that makes no good tile."""
    if not p.standard:
        return None
    elements = _THREAD_BYTES // p.element_size  # of a thread
    all_pixels, most_warps = power_of_two(p.pixels), _MAX_WARPS
    wanted = needed = 1  # pixels of a tile
    if not p.channels_last:
        if p.backward or p.mode == GATE:
            elements = min(elements, _FEW_ELEMENTS)
        long_run = _SHORT_RUN if p.backward and p.element_size == 2 else _LONG_RUN
        wanted = min(long_run // p.element_size, all_pixels)
        needed = min(_SHORT_RUN // p.element_size, all_pixels)
    if p.element_size == 4 and not p.backward:
        most_warps *= 2
    warps = _WARPS
    while warps * 32 * elements < wanted * p.padded_channels and warps < most_warps:
        warps *= 2
    pixels = warps * 32 * elements // p.padded_channels
    if pixels < needed:
        return None
    while pixels > all_pixels:  # a small image: a thread has as many elements as in a large one
        pixels //= 2
        warps = max(1, warps // 2)
    return Launch(pixels, warps)


def two_passes_rule(p: Problem) -> Launch:
    flat = flat_channels(p)
    if flat > 1:
        pixels = power_of_two(p.pixels)
        return Launch(pixels, _TWO_PASSES_WARPS, _FLAT_ELEMENTS // (flat * pixels) * flat, flat)
    chunk = min(_TWO_PASSES_CHUNK, power_of_two(longest_segment(p.levels, p.channels)))
    pixels = _TWO_PASSES_ELEMENTS // max(chunk, power_of_two(sum(p.levels)))
    return Launch(min(pixels, power_of_two(p.pixels)), _TWO_PASSES_WARPS, chunk)


def flat_channels(p: Problem) -> int:
    """How many channels of a small image are whole vectors of 16 bytes, so that they can be read
    side by side; 1 where a channel alone is, or where that is not done."""
    vector = 16 // p.element_size
    flat, pixels = vector // math.gcd(vector, p.pixels), power_of_two(p.pixels)
    possible = p.backward and not p.channels_last and p.images >= _FLAT_IMAGES and p.pixels > 1
    fits = pixels * max(flat, power_of_two(sum(p.levels)) // 4) <= _FLAT_ROW
    whole = common_edge_factor(p.levels, p.channels) % flat == 0
    return flat if possible and fits and whole else 1
