"""The definition of PPCR in plain PyTorch: every backend is checked against these functions.

For one pixel of ``x`` (``[N, C, *spatial]``) with ``levels = (k_1, .., k_m)`` and
``L = k_1 + .. + k_m``:

* cross-channel pyramid pooling: level k cuts the C channels into k bins by the
  adaptive-average-pooling rule. Bin i is channels ``floor(i C / k) .. ceil((i + 1) C / k) - 1``,
  and context ``t_l`` is the mean of x over its bin;
* pixel normalization: ``n_l = (t_l - mean(t)) / sqrt(var(t) + eps)``, with the biased variance over
  the L contexts;
* pixel context integration: ``z = sum_l weight_l n_l + bias``;
* recalibration: ``g = sigmoid(z)``, ``y = x g``.

Any dtype, layout, rank and L; differentiable as often as wanted, in reverse and forward mode, and
under ``torch.func``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def bins(channels: int, level: int) -> list[tuple[int, int]]:
    """``(first channel, one past the last)`` of each of the ``level`` bins of C channels."""
    return [(i * channels // level, -(-(i + 1) * channels // level)) for i in range(level)]


def _per_pixel(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """x and the gate ``[N, 1, *spatial]``, both in the dtype in which the layer computes."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # float64 stays
    x = x.to(dtype)
    edges = [pair for level in levels for pair in bins(x.shape[1], level)]
    contexts = torch.stack([x[:, begin:end].mean(1) for begin, end in edges], 1)  # [N, L, *spatial]
    centred = contexts - contexts.mean(1, keepdim=True)
    variance = (centred * centred).mean(1, keepdim=True)
    # Zero would divide by zero where all contexts agree.
    normalized = centred / (variance + max(eps, torch.finfo(dtype).tiny)).sqrt()
    z = (normalized * weight.to(dtype).reshape(-1, *[1] * (x.dim() - 2))).sum(1, keepdim=True)
    if bias is not None:
        z = z + bias.to(dtype)
    return x, z.sigmoid()


def ppcr(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Sequence[int], eps: float
) -> Tensor:
    """``x * g``: shape, dtype and memory format of x."""
    wide, gate = _per_pixel(x, weight, bias, levels, eps)
    return (wide * gate).to(x.dtype)


def ppcr_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Sequence[int], eps: float
) -> Tensor:
    """``g``: ``[N, 1, *spatial]``, dtype of x."""
    return _per_pixel(x, weight, bias, levels, eps)[1].to(x.dtype)


def ppcr_add_relu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    levels: Sequence[int],
    eps: float,
) -> Tensor:
    """``relu(x * g + residual)``: shape, dtype and memory format of x."""
    wide, gate = _per_pixel(x, weight, bias, levels, eps)
    # What is rounded to zero gets no gradient: backward looks at the stored output.
    return (wide * gate + residual.to(wide.dtype)).to(x.dtype).relu()
