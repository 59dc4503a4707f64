"""The inputs of the tests, the benchmarks and a check of a build: see ppcr_ext.testing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The names of the three functions.
OPERATORS = ("ppcr", "ppcr_gate", "ppcr_add_relu")
# The layouts that kernels read, at any rank.
LAYOUTS = ("contiguous", "channels_last")
# The default levels.
LEVELS = (1, 2, 4)
# The default eps.
EPS = 1e-5
# Channels and side at the end of every stage, for pictures of 224 x 224.
STAGES = {
    "ResNet-18": ((64, 56), (128, 28), (256, 14), (512, 7)),
    "ResNet-50": ((256, 56), (512, 28), (1024, 14), (2048, 7)),
}
# The eight shapes whose speed is reported.
SHAPES = (
    (8, 64, 56, 56),
    (8, 256, 56, 56),
    (8, 512, 28, 28),
    (8, 1024, 14, 14),
    (8, 2048, 7, 7),
    (1, 64, 224, 224),
    (64, 32, 32, 32),
    (32, 64, 8, 8),
)


def to_layout(t: Tensor, layout: str) -> Tensor:
    """A tensor in a layout. channels_last is defined here at any rank.

    Args:
        t: ``[N, C, *spatial]``.
        layout: one of :data:`LAYOUTS`.

    Returns:
        The same values and shape; t itself where it has the layout already.

    Raises:
        ValueError: layout is another word.

    Example:
        >>> testing.to_layout(torch.randn(2, 3, 4, 5), "channels_last").stride()
        (60, 1, 15, 3)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if layout == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.contiguous()


@dataclasses.dataclass
class Inputs:
    """The inputs of one call of an operator, and the gradient that comes back to its output.

    Args:
        operator: one of :data:`OPERATORS`.
        x: ``[N, C, *spatial]``.
        residual: like x. It is an input of ppcr_add_relu alone; the other operators ignore it.
        weight: ``[L]``.
        bias: ``[1]``, or None.
        grad: like the output: x, or for ppcr_gate ``[N, 1, *spatial]``.
        levels, eps: of the operator.

    Example:
        >>> inputs = testing.make_inputs("ppcr_gate", (2, 8, 5, 5)).to(torch.half, "channels_last")
        >>> inputs.grad.shape, inputs.has_residual
        (torch.Size([2, 1, 5, 5]), False)
    """

    operator: str
    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor
    levels: tuple[int, ...] = LEVELS
    eps: float = EPS

    @property
    def has_residual(self) -> bool:
        """Whether the operator takes the residual."""
        return self.operator == "ppcr_add_relu"

    def to(self, dtype: torch.dtype, layout: str) -> Inputs:
        """x, residual and grad in another dtype and layout; the parameters stay.

        Args:
            dtype: of the new tensors.
            layout: of the new tensors, one of :data:`LAYOUTS`.

        Returns:
            New inputs.

        Raises:
            ValueError: layout is another word.
        """
        maps = {name: getattr(self, name) for name in ("x", "residual", "grad")}
        moved: dict[str, Any] = {
            name: to_layout(t.detach().to(dtype), layout) for name, t in maps.items()
        }
        return dataclasses.replace(self, **moved)


def make_inputs(
    operator: str,
    shape: Sequence[int],
    levels: Sequence[int] = LEVELS,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    *,
    parameter_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random inputs: x from 1.5 + 2 N(0, 1), all others from N(0, 1).

    Args:
        operator: one of :data:`OPERATORS`.
        shape: of x, ``[N, C, *spatial]``.
        levels: of the operator.
        dtype: of x, the residual and the gradient.
        layout: of x, the residual and the gradient, one of :data:`LAYOUTS`.
        parameter_dtype: of weight and bias. None stands for float32, or float64 for a float64 x.
        bias: whether there is one.
        device: where the tensors are put. The values do not depend on it.
        seed: of the random values.

    Returns:
        The inputs.

    Raises:
        ValueError: layout is another word.

    Example:
        >>> testing.make_inputs("ppcr", (2, 8, 5, 5), dtype=torch.bfloat16).weight.dtype
        torch.float32
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    kind = parameter_dtype or torch.promote_types(dtype, torch.float32)
    like_y = (shape[0], 1, *shape[2:]) if operator == "ppcr_gate" else shape
    return Inputs(
        operator,
        x=to_layout((1.5 + 2 * draw(*shape)).to(device, dtype), layout),
        residual=to_layout(draw(*shape).to(device, dtype), layout),
        weight=draw(sum(levels)).to(device, kind),
        bias=draw(1).to(device, kind) if bias else None,
        grad=to_layout(draw(*like_y).to(device, dtype), layout),
        levels=tuple(levels),
    )
