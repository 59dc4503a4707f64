"""The registered operators ``torch.ops.ppcr_ext.*``: schemas, fake kernels, and calls of them.

Every operator exists twice with one schema: under its own name for the compiled kernels, which
csrc/register.cpp defines, and with the prefix ``triton_`` for Triton's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

MAX_CONTEXTS = 64  # what the native and Triton kernels take


def why_too_many(contexts: int) -> str | None:
    """Why L contexts are too many for the native and Triton kernels, or None."""
    if contexts <= MAX_CONTEXTS:
        return None
    return f"it takes at most {MAX_CONTEXTS} contexts, the levels have {contexts}"


# ---- layouts, and what the kernels allocate ---------------------------------------------------
# Those that take the rest of an operator's arguments are its fake kernels.


def is_channels_last(x: Tensor) -> bool:
    """Whether x is channels_last without gaps, at any rank. Dimensions of size 1 do not matter."""
    return x.movedim(1, -1).is_contiguous()


def output_like(x: Tensor, *rest: Any) -> Tensor:
    """An output of x's shape: in x's strides where the kernels read them, else contiguous."""
    if x.is_contiguous() or is_channels_last(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gate_like(x: Tensor, *rest: Any) -> Tensor:
    """An output for gates, ``[N, 1, *spatial]``, contiguous."""
    return x.new_empty((x.shape[0], 1, *x.shape[2:]))


def parameter_gradients(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """dweight, and dbias, which is empty without a bias."""
    like, count = (weight, 0) if bias is None else (bias, 1)
    return weight.new_empty(weight.shape), like.new_empty((count,))


def _gradients_like(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The gradients of x, of the residual if y is among the arguments, and of the parameters."""
    *y, weight, bias, _, _ = rest
    return *(output_like(x) for _ in (x, *y)), *parameter_gradients(weight, bias)


# ---- the table --------------------------------------------------------------------------------


class Operator(NamedTuple):
    """A schema and its fake kernel, and the two registered operators once they exist."""

    schema: str
    fake: Callable[..., Any]
    native: Callable[[], Any]
    triton: Callable[[], Any]


_PARAMETERS = "Tensor weight, Tensor? bias, int[] levels, float eps"

OPERATORS = {
    "ppcr": Operator(
        f"(Tensor x, {_PARAMETERS}) -> Tensor",
        output_like,
        lambda: torch.ops.ppcr_ext.ppcr.default,
        lambda: torch.ops.ppcr_ext.triton_ppcr.default,
    ),
    "ppcr_backward": Operator(
        f"(Tensor grad, Tensor x, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
        _gradients_like,
        lambda: torch.ops.ppcr_ext.ppcr_backward.default,
        lambda: torch.ops.ppcr_ext.triton_ppcr_backward.default,
    ),
    "ppcr_gate": Operator(
        f"(Tensor x, {_PARAMETERS}) -> Tensor",
        gate_like,
        lambda: torch.ops.ppcr_ext.ppcr_gate.default,
        lambda: torch.ops.ppcr_ext.triton_ppcr_gate.default,
    ),
    "ppcr_gate_backward": Operator(
        f"(Tensor grad, Tensor x, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
        _gradients_like,
        lambda: torch.ops.ppcr_ext.ppcr_gate_backward.default,
        lambda: torch.ops.ppcr_ext.triton_ppcr_gate_backward.default,
    ),
    "ppcr_add_relu": Operator(
        f"(Tensor x, Tensor residual, {_PARAMETERS}) -> Tensor",
        output_like,
        lambda: torch.ops.ppcr_ext.ppcr_add_relu.default,
        lambda: torch.ops.ppcr_ext.triton_ppcr_add_relu.default,
    ),
    "ppcr_add_relu_backward": Operator(
        f"(Tensor grad, Tensor x, Tensor y, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)",
        _gradients_like,
        lambda: torch.ops.ppcr_ext.ppcr_add_relu_backward.default,
        lambda: torch.ops.ppcr_ext.triton_ppcr_add_relu_backward.default,
    ),
}


def calling(registered: Callable[[], Any]) -> Callable[..., Any]:
    """A function that calls a registered operator.

    All errors of the compiled operators are RuntimeError. A lack of device memory gets the type
    that PyTorch has for it.
    """

    def call(*arguments: Any) -> Any:
        try:
            return registered()(*arguments)
        except RuntimeError as error:
            if arguments[0].is_cuda and "out of memory" in str(error):
                raise torch.OutOfMemoryError(*error.args) from None
            raise

    return call


def constant_while_tracing(function: Function) -> Function:
    """Lets the compiler take what a function returns for a constant, without looking into it.

    It is torch.compiler.assume_constant_result, which imports the whole compiler to set this mark:
    a second and more of every import of the package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_tracing() -> bool:
    """Whether torch.compile, export or jit records the call, with the registered operator."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
