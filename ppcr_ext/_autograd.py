"""The derivatives of the operators: the autograd Function of eager calls, the formula of compiled
ones, and plain PyTorch for second and higher derivatives.

Tensors come in the order of the operators' schemas: (x, weight, bias), or (x, residual, weight,
bias) for ppcr_add_relu, and the gradients come in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._operators import OPERATORS, calling
from ._triton import operators as _triton


@dataclass(frozen=True)
class Operation:
    """One of the three functions on one backend."""

    name: str  # of the registered operator, and of the node in autograd's graph
    composite: Callable[..., Tensor]  # the function in plain PyTorch
    forward: Callable[..., Tensor]  # (*tensors, levels, eps) -> y
    # (grad, x[, y], weight, bias, levels, eps) -> dx[, dresidual], dweight, dbias (empty for None)
    backward: Callable[..., tuple[Tensor, ...]]
    function: type[Fused]


class Fused(torch.autograd.Function):
    """Autograd around the raw operators. It is cheaper than a registered formula, and complete to
    any order.
    """

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, levels: tuple[int, ...], eps: float, x: Tensor, *rest: Any
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = operation.forward(x, *rest, levels, eps)
        ctx.operation, ctx.levels, ctx.eps = operation, levels, eps
        ctx.save_for_backward(x, *_y_for_residual(y, rest))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operation: Operation = ctx.operation
        # With checkpointed activations this may run the network again, with autograd.
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiable_backward(operation, grad, *saved, ctx.levels, ctx.eps)
        elif torch.compiler.is_compiling():  # compiled autograd, which cannot trace the guard
            grads = _backward(operation, grad, *saved, ctx.levels, ctx.eps)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = _backward(operation, grad, *saved, ctx.levels, ctx.eps)
        return None, None, None, *grads


def _y_for_residual(y: Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is kept beside x: (weight, bias), or (y, weight, bias) where there is a residual."""
    return rest if len(rest) == 2 else (y, *rest[1:])


def _backward(operation: Operation, *arguments: Any) -> tuple[Any, ...]:
    *grads, d_bias = operation.backward(*arguments)
    return *grads, None if arguments[-3] is None else d_bias


def differentiable_backward(
    operation: Operation, grad: Tensor, x: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """The gradients in plain PyTorch, recorded by autograd: for second and higher derivatives."""
    *y, weight, bias, levels, eps = rest
    composite, d_residual = operation.composite, tuple(y)
    if y:  # the derivative of relu is piecewise constant: y only selects
        grad = torch.where(y[0] <= 0, 0, grad)
        composite, d_residual = reference.ppcr, (grad,)
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    gradients: tuple[Tensor, ...] = ()
    if inputs:
        result = composite(x, weight, bias, levels, eps)
        gradients = torch.autograd.grad(result, inputs, grad, create_graph=True)
    left = iter(gradients)
    dx, d_weight, d_bias = (
        next(left) if t is not None and t.requires_grad else None for t in (x, weight, bias)
    )
    return dx, *d_residual, d_weight, d_bias


def _by_backend(composite: Callable[..., Tensor]) -> dict[str, Operation]:
    name, triton = composite.__name__, f"triton_{composite.__name__}"
    native = calling(OPERATORS[name].native), calling(OPERATORS[f"{name}_backward"].native)
    return {
        "native": Operation(name, composite, *native, type(name, (Fused,), {})),
        "triton": Operation(triton, composite, *_triton.KERNELS[name], type(triton, (Fused,), {})),
    }


# By function and backend.
OPERATIONS = {
    function.__name__: _by_backend(function)
    for function in (reference.ppcr, reference.ppcr_gate, reference.ppcr_add_relu)
}


def register(operation: Operation) -> None:
    """Gives an operator its formula: for torch.compile and for direct calls."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest, ctx.levels, ctx.eps = inputs
        ctx.save_for_backward(x, *_y_for_residual(output, tuple(rest)))

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rule = differentiable_backward if torch.is_grad_enabled() else _backward
        return *rule(operation, grad, *ctx.saved_tensors, ctx.levels, ctx.eps), None, None

    name = f"ppcr_ext::{operation.name}"
    torch.library.register_autograd(name, backward, setup_context=setup_context)
