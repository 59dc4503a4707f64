"""The functional API: checks its arguments, chooses a backend, and routes the call through PyTorch's autograd, compiler or transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad

from . import native, reference, triton_ops
from ._arguments import Levels, check_arguments, check_residual
from .backends import choose

transforms_active: Callable[[], bool] = getattr(
    torch._C,
    "_are_functorch_transforms_active",
    lambda: False,
)
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

# torch.fx records these functions as single calls instead of tracing their checks.
for _name in ("ppcr", "ppcr_gate", "ppcr_add_relu", "ppcr_or_add_relu"):
    torch.fx.wrap(_name)


def ppcr(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    levels: Levels = (1, 2, 4),
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Pyramid pixel context recalibration: gates every pixel of x by its own multi-scale channel context, ``y = x * g``.

    Args:
        x: ``[N, C, *spatial]`` with any number of spatial dimensions, float32, float16, bfloat16 or float64. Contiguous and
            channels_last layouts (of any rank) are read as they are; any other stride costs one copy.
        weight: ``[L]``, the shared weights of pixel context integration, ``L = sum(levels)``; float32, or x's dtype (float64 for
            a float64 x).
        bias: ``[1]`` with the same dtypes, or None.
        levels: bins of each level of cross-channel pyramid pooling, each from 1 to C, with L >= 2 in all. The fused backends
            take L <= 64.
        eps: added to the variance in pixel normalization; positive.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the best that can run.

    Returns:
        y: shape, dtype and memory format of x. Differentiable in x, weight and bias; for backward only x is kept.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: the named backend cannot run; the message says why.
    """
    contexts, levels, eps = check_arguments(x, weight, bias, levels, eps, backend)
    return _run(_PPCR, (x, weight, bias), contexts, levels, eps, backend)


def ppcr_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    levels: Levels = (1, 2, 4),
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The gate g of every pixel alone: ``[N, 1, *spatial]``, values in [0, 1], dtype of x. Arguments and errors as for :func:`ppcr`."""
    contexts, levels, eps = check_arguments(x, weight, bias, levels, eps, backend)
    return _run(_GATE, (x, weight, bias), contexts, levels, eps, backend)


def ppcr_add_relu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    levels: Levels = (1, 2, 4),
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """``relu(x * g + residual)``, the end of a residual block, in the same single pass as :func:`ppcr`.

    Args:
        residual: shape and device of x, and its dtype (under autocast it is cast to it); its layout is brought to x's.

    The other arguments, the result and the errors are those of :func:`ppcr`; for backward x and y are kept.
    """
    contexts, levels, eps = check_arguments(x, weight, bias, levels, eps, backend)
    residual = check_residual(residual, x)
    return _run(_ADD_RELU, (x, weight, bias, residual), contexts, levels, eps, backend)


def ppcr_or_add_relu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """What torch.fx records where only a run of the graph tells whether there is a residual."""
    if residual is None:
        return ppcr(x, weight, bias, **options)
    return ppcr_add_relu(x, residual, weight, bias, **options)


# ---- operators ----------------------------------------------------------------------------------------------------------------------


class _Operator:
    """One of the three functions on one backend: its composite in plain PyTorch and its registered forward and backward.

    Tensors come in the order (x, weight, bias) or (x, weight, bias, residual), and so do their gradients.
    """

    def __init__(
        self, name: str, composite: Callable[..., Tensor], has_residual: bool = False
    ) -> None:
        self.name = name
        self.function: type[_Fused] = type(name, (_Fused,), {})  # names the node of autograd
        self._composite = composite
        self.has_residual = has_residual

    def composite(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *residual: Tensor,
        levels: Levels,
        eps: float,
    ) -> Tensor:
        return self._composite(x, *residual, weight, bias, levels, eps)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *residual: Tensor,
        levels: Levels,
        eps: float,
    ) -> Tensor:
        operator = getattr(torch.ops.ppcr_ext, self.name).default
        try:
            result: Tensor = operator(x, *residual, weight, bias, levels, eps)
        except RuntimeError as error:
            raise native.of_its_type(error, x) from None
        return result

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *y: Tensor,
        levels: Levels,
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and, where y is given, residual."""
        operator = getattr(torch.ops.ppcr_ext, self.name + "_backward").default
        try:
            dx, *d_residual, d_weight, d_bias = operator(grad, x, *y, weight, bias, levels, eps)
        except RuntimeError as error:
            raise native.of_its_type(error, x) from None
        return dx, d_weight, None if bias is None else d_bias, *d_residual

    def differentiable_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *y: Tensor,
        levels: Levels,
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        """The same in plain PyTorch, recorded by autograd: for second and higher derivatives."""
        d_residual: tuple[Tensor, ...] = ()
        composite = self._composite
        if self.has_residual:  # the derivative of relu is piecewise constant: y only selects
            grad = torch.where(y[0] <= 0, 0, grad)
            d_residual = (grad,)
            composite = reference.ppcr
        inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad(
                composite(x, weight, bias, levels, eps), inputs, grad, create_graph=True
            )
            if inputs
            else ()
        )
        return *(
            next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias)
        ), *d_residual


class _TritonOperator(_Operator):
    """Launches its kernels straight from Python unless someone watches the dispatcher, which costs as much again as the launch."""

    def __init__(
        self, name: str, composite: Callable[..., Tensor], has_residual: bool = False
    ) -> None:
        super().__init__("triton_" + name, composite, has_residual)
        self._mode = triton_ops.MODES[name]

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *residual: Tensor,
        levels: Levels,
        eps: float,
    ) -> Tensor:
        if not _plain(x, weight, bias, *residual):
            return super().forward(x, weight, bias, *residual, levels=levels, eps=eps)
        return triton_ops.forward(
            self._mode, x, residual[0] if residual else None, weight, bias, levels, eps
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *y: Tensor,
        levels: Levels,
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        if not _plain(grad, x, weight, bias, *y):
            return super().backward(grad, x, weight, bias, *y, levels=levels, eps=eps)
        found = triton_ops.backward(
            self._mode, grad, x, y[0] if y else None, weight, bias, levels, eps
        )
        dx, *d_residual, d_weight, d_bias = found
        return dx, d_weight, None if bias is None else d_bias, *d_residual


def _plain(*tensors: Tensor | None) -> bool:
    """Tensors in memory: no subclass, no compiler, no mode that traces or counts operators."""
    if is_tracing() or _dispatch_modes():
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


class _Fused(torch.autograd.Function):
    """Autograd around the raw operators: cheaper than a registered formula, and complete to any order."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: _Operator,
        levels: tuple[int, ...],
        eps: float,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *residual: Tensor,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = operator.forward(x, weight, bias, *residual, levels=levels, eps=eps)
        ctx.operator, ctx.levels, ctx.eps = operator, levels, eps
        ctx.save_for_backward(x, weight, bias, *((y,) if operator.has_residual else ()))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operator: _Operator = ctx.operator
        saved = (
            ctx.saved_tensors
        )  # may run the network again, with autograd, where activations are checkpointed
        if torch.is_grad_enabled():  # create_graph=True
            grads = operator.differentiable_backward(grad, *saved, levels=ctx.levels, eps=ctx.eps)
        elif torch.compiler.is_compiling():  # compiled autograd, which cannot trace the guard
            grads = operator.backward(grad, *saved, levels=ctx.levels, eps=ctx.eps)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = operator.backward(grad, *saved, levels=ctx.levels, eps=ctx.eps)
        return None, None, None, *grads


def _by_backend(
    name: str,
    composite: Callable[..., Tensor],
    has_residual: bool = False,
) -> dict[str, _Operator]:
    kinds = {"native": _Operator, "triton": _TritonOperator}
    return {backend: kind(name, composite, has_residual) for backend, kind in kinds.items()}


_PPCR = _by_backend("ppcr", reference.ppcr)
_GATE = _by_backend("ppcr_gate", reference.ppcr_gate)
_ADD_RELU = _by_backend("ppcr_add_relu", reference.ppcr_add_relu, has_residual=True)


def _run(
    operators: dict[str, _Operator],
    tensors: tuple[Any, ...],
    contexts: int,
    levels: Levels,
    eps: float,
    backend: str | None,
) -> Tensor:
    backend = choose(backend, tensors[0], contexts)
    # The order matters: transforms and dual tensors are only right through the composite, even while compiling.
    tracing = is_tracing()
    if backend == "reference" or _needs_composite(tracing):
        return operators["native"].composite(*tensors, levels=levels, eps=eps)
    operator = operators[backend]
    if tracing:
        return operator.forward(*tensors, levels=levels, eps=eps)
    if torch.is_grad_enabled():
        for t in tensors:  # any() takes twice as long
            if t is not None and t.requires_grad:
                y: Tensor = operator.function.apply(operator, levels, eps, *tensors)
                return y
    with torch._C._AutoDispatchBelowAutograd():
        return operator.forward(*tensors, levels=levels, eps=eps)


def _needs_composite(tracing: bool) -> bool:
    """torch.func transforms, forward-mode AD and ONNX export see plain PyTorch, which they differentiate, batch and translate."""
    if transforms_active() or getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    return tracing and torch.onnx.is_in_onnx_export()  # which alone costs 2 us a call


def is_tracing() -> bool:
    """Whether torch.compile, export or jit records the call, with the registered operator."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def register_derivatives(backend: str) -> None:
    """Gives a backend's operators their autograd formula: for torch.compile and direct calls."""
    for operators in (_PPCR, _GATE, _ADD_RELU):
        _register_derivative(operators[backend])


def _register_derivative(operator: _Operator) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *residual, weight, bias, levels, eps = inputs
        ctx.levels, ctx.eps = levels, eps
        ctx.save_for_backward(x, weight, bias, *((output,) if residual else ()))

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rule = operator.differentiable_backward if torch.is_grad_enabled() else operator.backward
        dx, d_weight, d_bias, *d_residual = rule(
            grad, *ctx.saved_tensors, levels=ctx.levels, eps=ctx.eps
        )
        return dx, *d_residual, d_weight, d_bias, None, None

    torch.library.register_autograd(
        f"ppcr_ext::{operator.name}", backward, setup_context=setup_context
    )
