"""The plain PyTorch formulations that the fused layer is compared with, and the floor that nothing can beat.

Each peer is a function ``(x, weight, bias, levels) -> y`` that autograd differentiates; all compute what
``ppcr_ext.reference`` defines. Of a half x they take the means in float32 and go on in it: in float16 the gradient of the
normalization would overflow. GATES are the same up to the gate, in x's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppcr_ext.reference import accumulation_dtype, bins

EPS = 1e-5

Peer = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def _gate(x: Tensor, centred: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gate, in x's dtype, from the contexts less their mean, ``[N, L, *spatial]``: pixel normalization and integration.

    Written for speed: ``torch.var_mean`` over the contexts would take five times as long on a CPU, and dividing by the
    deviation after the sum over the contexts saves a pass over them.
    """
    variance = (centred * centred).mean(1, keepdim=True)
    integrated = (centred * weight.view(-1, *[1] * (x.dim() - 2))).sum(1, keepdim=True)
    return torch.sigmoid(integrated * torch.rsqrt(variance + EPS) + bias).to(x.dtype)


def _centre(contexts: list[Tensor]) -> Tensor:
    joined = torch.cat(contexts, 1)
    return joined - joined.mean(1, keepdim=True)


def level_by_level_gate(x: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    """The formulas written down as they stand: one mean over x for every level, so that x is read once per level."""
    wide, contexts = accumulation_dtype(x.dtype), []
    for level in levels:
        if x.shape[1] % level == 0:
            contexts.append(x.unflatten(1, (level, -1)).mean(2, dtype=wide))
        else:
            contexts += [
                x[:, begin:end].mean(1, keepdim=True, dtype=wide)
                for begin, end in bins(x.shape[1], level)
            ]
    return _gate(x, _centre(contexts), weight, bias)


def pooled_once_gate(x: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    """The best formulation: x is read once for the finest bins, whose means give the coarser ones."""
    finest = max(levels)
    if x.shape[1] % finest or any(finest % level for level in levels):
        raise ValueError(
            f"pooled_once needs levels that divide the finest one, and channels that this one divides: "
            f"got levels {tuple(levels)} and {x.shape[1]} channels"
        )
    finest_means = x.unflatten(1, (finest, -1)).mean(2, dtype=accumulation_dtype(x.dtype))
    contexts = [
        finest_means if level == finest else finest_means.unflatten(1, (level, -1)).mean(2)
        for level in levels
    ]
    return _gate(x, _centre(contexts), weight, bias)


def as_matmul(x: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    """Pooling and centring as one matrix product: ``[L, C]`` times every pixel's channels."""
    matrix = centred_pooling(x.shape[1], tuple(levels), x.dtype, x.device)
    centred = torch.einsum("lc,ncp->nlp", matrix, x.flatten(2)).unflatten(2, x.shape[2:])
    return x * _gate(x, centred, weight, bias)


@functools.cache
def centred_pooling(
    channels: int, levels: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``[L, C]``: 1/|bin| where context l holds channel c, less the mean over l. A layer would keep it in a buffer."""
    matrix = torch.zeros(sum(levels), channels, dtype=torch.float64)
    edges = [edge for level in levels for edge in bins(channels, level)]
    for row, (begin, end) in zip(matrix, edges, strict=True):
        row[begin:end] = 1 / (end - begin)
    return (matrix - matrix.mean(0)).to(device, dtype)


def level_by_level(x: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    return x * level_by_level_gate(x, weight, bias, levels)


def pooled_once(x: Tensor, weight: Tensor, bias: Tensor, levels: Sequence[int]) -> Tensor:
    return x * pooled_once_gate(x, weight, bias, levels)


GATES: dict[str, Peer] = {"pooled once": pooled_once_gate, "level by level": level_by_level_gate}
PEERS: dict[str, Peer] = {
    "pooled once": pooled_once,
    "level by level": level_by_level,
    "matmul": as_matmul,
}


def floor_forward(x: Tensor) -> Tensor:
    """One read and one write of x: what any recalibration costs at the least."""
    return x * 0.5


def floor_step(x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward at the least: read x, write y; read x and gy, write dx."""
    return x * 0.5, x + gy
