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
    """The float64 results, and for the parameters the sum of absolute terms (``[L + 1]``, bias last).

    ``dx_scale`` stands for the gate alone, whose dx is a sum of terms that cancel; ``dresidual`` for add_relu alone.
    """

    y: Tensor
    dx: Tensor
    parameters: Tensor
    scale: Tensor
    dx_scale: Tensor | None = None
    dresidual: Tensor | None = None


def truth(
    x: Tensor,
    gy: Tensor,
    weight: Tensor,
    bias: Tensor,
    levels: tuple[int, ...],
    operator: str = "ppcr",
    residual: Tensor | None = None,
) -> Truth:
    """The formulas of ppcr, gate or add_relu and their gradients by hand, in float64."""
    x, gy, weight, bias = (t.detach().double().contiguous() for t in (x, gy, weight, bias))
    edges = [edge for level in levels for edge in bins(x.shape[1], level)]
    contexts = torch.stack([x[:, begin:end].mean(1) for begin, end in edges], 1)
    centred = contexts - contexts.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    normalized = centred / deviation
    column = weight.view(-1, *[1] * (x.dim() - 2))
    gate = ((normalized * column).sum(1, keepdim=True) + bias).sigmoid()

    y = gate if operator == "gate" else x * gate
    if residual is not None:
        y = (y + residual.detach().double()).relu()
        gy = torch.where(y <= 0, 0, gy)
    dgate = gy if operator == "gate" else (gy * x).sum(1, keepdim=True)
    dz = dgate * gate * (1 - gate)
    dn = dz * column
    dt = dn - dn.mean(1, keepdim=True) - normalized * (dn * normalized).mean(1, keepdim=True)
    dt = dt / deviation
    dx = torch.zeros_like(x) if operator == "gate" else gy * gate
    dx_scale = torch.zeros_like(x) if operator == "gate" else None
    for context, (begin, end) in enumerate(edges):
        dx[:, begin:end] += dt[:, context : context + 1] / (end - begin)
    if dx_scale is not None:
        largest = (
            column.abs()
            + column.abs().mean()
            + normalized.abs() * (column * normalized).abs().mean(1, keepdim=True)
        )
        largest = largest * dz.abs() / deviation
        for context, (begin, end) in enumerate(edges):
            dx_scale[:, begin:end] += largest[:, context : context + 1] / (end - begin)
    terms = torch.cat([dz * normalized, dz], 1).movedim(1, 0).flatten(1)
    return Truth(
        y, dx, terms.sum(1), terms.abs().sum(1), dx_scale, gy if residual is not None else None
    )


def measure(
    layer: Layer, x: Tensor, gy: Tensor, weight: Tensor, bias: Tensor, exact: Truth
) -> Errors:
    """The errors of one layer in the layout and dtype of x."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = layer(*leaves)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, gy)
    return Errors(
        relative(y.detach(), exact.y),
        relative(dx, exact.dx),
        max(
            relative(dweight, exact.parameters[:-1], exact.scale[:-1]),
            relative(dbias, exact.parameters[-1:], exact.scale[-1:]),
        ),
    )


def relative(got: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """L2 norm of the difference over that of ``scale`` (the exact values where none is given)."""
    scale = exact if scale is None else scale
    return float((got.double() - exact).norm() / scale.norm().clamp_min(1e-300))
