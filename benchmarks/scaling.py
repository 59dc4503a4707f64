"""The scaling suite: time against pixels, channels, levels and batch, and the exponent of a power law fitted to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .measure import Group, Row

AXES = {
    "pixels": "pixels per image",
    "channels": "channels",
    "levels": "contexts (sum of the levels)",
    "batch": "images",
}
FITTED = 4  # the largest points: what a call costs at the least hides the slope of the small ones


def groups(device: torch.device, *, quick: bool, threads: Sequence[int]) -> list[Group]:
    """One axis grows while the rest stays; all doublings of a series are one apart, in ``--quick`` two."""
    base = 8 if device.type == "cuda" else 1  # a GPU needs more to fill it
    series: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
        "pixels": [((base, 64, side, side), (1, 2, 4)) for side in (8, 16, 32, 64, 128, 256)],
        "channels": [
            ((base, channels, 28, 28), (1, 2, 4))
            for channels in (32, 64, 128, 256, 512, 1024, 2048)
        ],
        "levels": [((2 * base, 256, 28, 28), tuple(2**i for i in range(n))) for n in range(2, 7)],
        "batch": [((batch * base, 256, 14, 14), (1, 2, 4)) for batch in (1, 2, 4, 8, 16, 32, 64)],
    }
    made = []
    for number in threads:
        for axis, points in series.items():
            few = points[:: -2 if axis != "levels" else -1][::-1] if quick else points
            for shape, levels in few:
                made.append(
                    Group(
                        "scaling", "ppcr", axis, shape, "contiguous", threads=number, levels=levels,
                        directions=("forward", "step"), plain=("pooled once",), backends=("native", "triton"),
                    )
                )  # fmt: skip
    return made


def size(row: Row) -> int:
    """Where a row stands on the axis that its case names."""
    return {
        "pixels": torch.Size(row.shape[2:]).numel(),
        "channels": row.shape[1],
        "levels": sum(row.levels),
        "batch": row.shape[0],
    }[row.case]


@dataclass
class Fit:
    """``time = factor * size ** exponent`` between ``first`` and ``last``, by least squares of the logarithms."""

    axis: str
    threads: int
    what: str
    direction: str
    exponent: float
    factor: float  # microseconds at size 1
    first: int
    last: int


def series(rows: Sequence[Row]) -> dict[tuple[str, int, str, str], list[tuple[int, float]]]:
    """``{(axis, threads, what, direction): [(size, microseconds), ..]}``, in order of size."""
    found: dict[tuple[str, int, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        found.setdefault((row.case, row.threads, row.what, row.direction), []).append(
            (size(row), row.median_us)
        )
    return {key: sorted(points) for key, points in found.items()}


def fits(rows: Sequence[Row]) -> list[Fit]:
    """A power law through the :data:`FITTED` largest points of every series with two at the least."""
    made = []
    for key, points in series(rows).items():
        last = points[-FITTED:]
        if len(last) < 2:
            continue
        sizes, times = np.log(np.array(last, dtype=float)).T
        exponent, constant = np.polyfit(sizes, times, 1)
        made.append(Fit(*key, float(exponent), float(np.exp(constant)), last[0][0], last[-1][0]))
    return made
