"""The functional API: checks its arguments, chooses a backend, and routes the call through
PyTorch's autograd, compiler or transforms."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _native, _sharding
from ._autograd import OPERATIONS, Operation
from ._checks import Levels, check_arguments, check_residual
from ._dispatch import choose
from ._operators import is_tracing

# Private, and without a default: if PyTorch lost it, results under transforms would be wrong.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# torch.fx records these functions, where a layer calls them, as single calls instead of tracing
# their checks. A module that calls them itself has to name them to torch.fx.wrap as well.
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
    """Pyramid pixel context recalibration, ``y = x * g``: multiplies every pixel of x by a gate
    that is computed from the pixel's own channels.

    It is differentiable in x, weight and bias, as often as wanted. For backward only x is kept.

    Args:
        x: ``[N, C, *spatial]`` with any number of spatial dimensions, float32, float16, bfloat16 or
            float64. Contiguous and channels_last layouts (of any rank) are read as they are; any
            other stride costs one copy.
        weight: ``[L]``, the weights of pixel context integration, which all pixels share, with ``L
            = sum(levels)``; float32, or x's dtype (float64 for a float64 x).
        bias: ``[1]``, the bias of pixel context integration, with the same dtypes; or None.
        levels: the number of bins of each level of cross-channel pyramid pooling, each from 1 to C,
            with L >= 2 in all. The fused backends take L <= 64.
        eps: added to the variance in pixel normalization, in units of x squared; positive.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for the best that can run.

    Returns:
        y, with the shape, dtype and memory format of x.

    Raises:
        TypeError: an argument has a type, dtype or layout that is not as above; the message names
            it.
        ValueError: a shape, device or value is not as above; the message names it.
        RuntimeError: the named backend cannot run; the message says why.

    Example:
        >>> x, weight = torch.randn(2, 8, 5, 5), torch.zeros(7)
        >>> torch.equal(ppcr_ext.ppcr(x, weight), 0.5 * x)
        True
    """
    return _run(OPERATIONS["ppcr"], (x, weight, bias), levels, eps, backend)


def ppcr_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    levels: Levels = (1, 2, 4),
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The gate g of every pixel alone: the sigmoid of its integrated context.

    It is differentiable in x, weight and bias.

    Args:
        x, weight, bias, levels, eps, backend: as for :func:`ppcr_ext.ppcr`.

    Returns:
        The gates ``[N, 1, *spatial]``, with values in [0, 1] and the dtype of x, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`ppcr_ext.ppcr`.

    Example:
        >>> x, weight, bias = torch.randn(2, 8, 5), torch.zeros(7), torch.tensor([100.0])
        >>> ppcr_ext.ppcr_gate(x, weight, bias).mean(), ppcr_ext.ppcr_gate(x, weight).shape
        (tensor(1.), torch.Size([2, 1, 5]))
    """
    return _run(OPERATIONS["ppcr_gate"], (x, weight, bias), levels, eps, backend)


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
    """``relu(x * g + residual)``, the end of a residual block, in the same single pass as
    :func:`ppcr_ext.ppcr`.

    It is differentiable in x, residual, weight and bias. For backward x and y are kept.

    Args:
        x: as for :func:`ppcr_ext.ppcr`.
        residual: shape and device of x, and its dtype (under autocast it is cast to it). Its layout
            is brought to x's.
        weight, bias, levels, eps, backend: as for :func:`ppcr_ext.ppcr`.

    Returns:
        y, with the shape, dtype and memory format of x.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`ppcr_ext.ppcr`.

    Example:
        >>> x, weight = torch.ones(1, 8, 2), torch.zeros(7)
        >>> ppcr_ext.ppcr_add_relu(x, -x, weight).sum(), ppcr_ext.ppcr_add_relu(x, x, weight).sum()
        (tensor(0.), tensor(24.))
    """
    return _run(OPERATIONS["ppcr_add_relu"], (x, residual, weight, bias), levels, eps, backend)


def ppcr_or_add_relu(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, **options: Any
) -> Tensor:
    """What torch.fx records if only a run of the graph tells whether there is a residual."""
    if residual is None:
        return ppcr(x, weight, bias, **options)
    return ppcr_add_relu(x, residual, weight, bias, **options)


# Tuples of levels that have been checked, by identity: (True, 2) equals (1, 2).
_checked: dict[int, Levels] = {}


def _run(
    operations: dict[str, Operation],
    tensors: tuple[Any, ...],
    levels: Levels,
    eps: float,
    backend: str | None,
) -> Tensor:
    """Checks take longer than the rest of a small call. A compiled operator refuses by itself what
    they find in plain tensors, and only then are they made, to name the argument."""
    known = not is_tracing() and id(levels) in _checked
    if not (known and (backend is None or backend == "native") and _are_plain(tensors, eps)):
        return _check_and_run(operations, tensors, levels, eps, backend)
    try:
        return _run_fused(operations["native"], tensors, levels, eps)
    except Exception:
        try:
            _check(tensors, levels, eps, backend)
        except (TypeError, ValueError) as error:
            raise error from None
        raise


def _are_plain(tensors: tuple[Any, ...], eps: float) -> bool:
    """Whether the operator of the compiled kernels is what an eager call runs in any case, and
    whether it refuses whatever may be wrong with the tensors."""
    x = tensors[0]
    for t in tensors:
        if t is not None and ((type(t) is not Tensor and type(t) is not Parameter) or t.is_meta):
            return False
    return (
        type(x) is Tensor
        and type(eps) is float
        and 0 < eps < math.inf
        and getattr(tensors[-3], "dtype", None) is x.dtype  # of a residual that autocast converts
        and not _needs_composite(False)
        and _native.can_run(x)
    )


def _check(
    tensors: tuple[Any, ...], levels: Levels, eps: float, backend: str | None
) -> tuple[tuple[Any, ...], int, Levels, float]:
    x, *residual, weight, bias = tensors
    contexts, levels, eps = check_arguments(x, weight, bias, levels, eps, backend)
    if residual:
        tensors = (x, check_residual(residual[0], x), weight, bias)
    return tensors, contexts, levels, eps


def _check_and_run(
    operations: dict[str, Operation],
    tensors: tuple[Any, ...],
    levels: Levels,
    eps: float,
    backend: str | None,
) -> Tensor:
    given = levels
    tensors, contexts, levels, eps = _check(tensors, levels, eps, backend)
    x = tensors[0]
    if type(x) is not Tensor:
        _sharding.register()
    backend = choose(backend, x, contexts)
    # The order matters: transforms and dual tensors are only right through the composite, even
    # while compiling.
    tracing = is_tracing()
    if backend == "reference" or _needs_composite(tracing):
        return operations["native"].composite(*tensors, levels, eps)
    operation = operations[backend]
    if tracing:
        return operation.forward(*tensors, levels, eps)
    if levels is given:  # a tuple, and not too many contexts for the compiled kernels
        if len(_checked) >= 64:
            _checked.clear()
        _checked[id(levels)] = levels
    return _run_fused(operation, tensors, levels, eps)


def _run_fused(
    operation: Operation, tensors: tuple[Any, ...], levels: Levels, eps: float
) -> Tensor:
    if torch.is_grad_enabled():
        for t in tensors:  # any() takes twice as long
            if t is not None and t.requires_grad:
                y: Tensor = operation.function.apply(operation, levels, eps, *tensors)
                return y
    with torch._C._AutoDispatchBelowAutograd():
        return operation.forward(*tensors, levels, eps)


def _needs_composite(tracing: bool) -> bool:
    """Whether the call must be plain PyTorch, which torch.func transforms and forward-mode AD
    differentiate and batch, and which ONNX export translates.
    """
    if transforms_active() or forward_ad._current_level >= 0:
        return True
    return tracing and torch.onnx.is_in_onnx_export()  # which alone costs 2 us a call
