"""Errors against a float64 evaluation of the same stored inputs, and what they may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppcr_ext.reference import bins

from .peers import EPS

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Errors:
    """Relative L2 errors; of dweight and dbias the larger one, both relative to the sums of their absolute terms."""

    y: float
    dx: float
    parameters: float

    def __str__(self) -> str:
        return f"y {self.y:.1e}, dx {self.dx:.1e}, dweight and dbias {self.parameters:.1e}"

    def within(self, limits: Errors) -> bool:
        """False too where an error is NaN."""
        return self.y <= limits.y and self.dx <= limits.dx and self.parameters <= limits.parameters


TOLERANCES = {  # for the default levels; the half types lose one rounding of the output
    torch.float64: Errors(1e-11, 1e-11, 1e-11),
    torch.float32: Errors(1e-5, 5e-5, 1e-5),
    torch.float16: Errors(7e-4, 7e-4, 7e-4),
    torch.bfloat16: Errors(5e-3, 5e-3, 5e-3),
}


@dataclass
class Truth:
    """The float64 results, and for the parameters the sum of absolute terms (``[L + 1]``, bias last)."""

    y: Tensor
    dx: Tensor
    parameters: Tensor
    scale: Tensor


def truth(x: Tensor, gy: Tensor, weight: Tensor, bias: Tensor, levels: tuple[int, ...]) -> Truth:
    """The formulas and their gradients by hand, in float64."""
    x, gy, weight, bias = (t.detach().double().contiguous() for t in (x, gy, weight, bias))
    edges = [edge for level in levels for edge in bins(x.shape[1], level)]
    contexts = torch.stack([x[:, begin:end].mean(1) for begin, end in edges], 1)
    centred = contexts - contexts.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    normalized = centred / deviation
    column = weight.view(-1, *[1] * (x.dim() - 2))
    gate = ((normalized * column).sum(1, keepdim=True) + bias).sigmoid()

    dz = (gy * x).sum(1, keepdim=True) * gate * (1 - gate)
    dn = dz * column
    dt = dn - dn.mean(1, keepdim=True) - normalized * (dn * normalized).mean(1, keepdim=True)
    dt = dt / deviation
    dx = gy * gate
    for context, (begin, end) in enumerate(edges):
        dx[:, begin:end] += dt[:, context : context + 1] / (end - begin)
    terms = torch.cat([dz * normalized, dz], 1).movedim(1, 0).flatten(1)
    return Truth(x * gate, dx, terms.sum(1), terms.abs().sum(1))


def measure(layer: Layer, x: Tensor, gy: Tensor, weight: Tensor, bias: Tensor, exact: Truth) -> Errors:
    """The errors of one layer in the layout and dtype of x."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = layer(*leaves)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, gy)
    return Errors(
        _relative(y.detach(), exact.y),
        _relative(dx, exact.dx),
        max(
            _relative(dweight, exact.parameters[:-1], exact.scale[:-1]),
            _relative(dbias, exact.parameters[-1:], exact.scale[-1:]),
        ),
    )


def _relative(got: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    scale = exact if scale is None else scale
    return float((got.double() - exact).norm() / scale.norm().clamp_min(1e-300))
