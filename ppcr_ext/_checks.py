"""Checks of arguments. They raise ValueError or TypeError with the argument's name before any
kernel runs.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Levels = Sequence[int]
BACKENDS = ("native", "triton", "reference")  # best first
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DENSE = torch.strided


def is_integer(value: Any) -> bool:
    """Whether a value is an int or an integer of NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a float, an int, or a number of NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_levels(levels: Levels, channels: int) -> tuple[int, tuple[int, ...]]:
    """Returns L, the number of contexts, and the levels as a tuple of ints.

    Raises TypeError or ValueError if they do not fit C channels.
    """
    listed = isinstance(levels, (tuple, list, Sequence))
    if not listed or isinstance(levels, (str, bytes, bytearray)):
        raise TypeError(f"levels must be a sequence of ints such as (1, 2, 4), got {levels!r}")
    if len(levels) == 0:
        raise ValueError("levels must not be empty")
    levels = tuple(levels)
    if any(type(level) is not int for level in levels):  # a tuple of ints stays the same object
        if not all(map(is_integer, levels)):
            raise TypeError(f"levels must be ints, got {levels!r}")
        levels = tuple(map(int, levels))
    if min(levels) < 1 or max(levels) > channels:
        between = f"between 1 and the {channels} channels of x"
        raise ValueError(f"levels must lie {between}, got {levels}")
    contexts = sum(levels)
    if contexts < 2:
        why = "one alone normalizes to zero"
        raise ValueError(f"levels need at least 2 contexts in all ({why}), got {levels}")
    return contexts, levels


def check_eps(eps: float) -> float:
    if type(eps) is not float:
        if not is_number(eps):
            raise TypeError(f"eps must be a float, got {eps!r}")
        eps = float(eps)
    if not 0 < eps < math.inf:  # false for NaN
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return eps


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")


def check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Levels, eps: float, backend: str | None
) -> tuple[int, tuple[int, ...], float]:
    """Returns L, and the levels and eps as numbers of Python. Raises TypeError or ValueError."""
    shape = _shape_of("x", x)
    dtype, device = x.dtype, x.device  # each look costs as much as ten comparisons
    if dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {dtype}")
    if len(shape) < 2:
        raise ValueError(f"x must have shape [N, C, *spatial], got {list(shape)}")
    contexts, levels = check_levels(levels, shape[1])
    _check_parameter("weight", weight, contexts, dtype, device)
    if bias is not None:
        _check_parameter("bias", bias, 1, dtype, device)
    if backend is not None:
        check_backend(backend)
    return contexts, levels, check_eps(eps)


def _shape_of(name: str, value: Tensor) -> torch.Size:
    """The shape of a dense tensor. Raises TypeError if the value is something else."""
    if not isinstance(value, Tensor):
        wanted = "a Tensor or None" if name == "bias" else "a Tensor"
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    if value.layout is not _DENSE:
        raise _not_dense(name, value)
    try:
        return value.shape
    except RuntimeError:  # a nested tensor has none; asking it each time would cost more
        raise _not_dense(name, value) from None


def _not_dense(name: str, value: Tensor) -> TypeError:
    if value.is_nested:
        remedy = "pass its parts one by one, or padded to one shape"
        return TypeError(f"{name} must not be a nested tensor: {remedy}")
    remedy = f"convert it with {name}.to_dense()"
    return TypeError(f"{name} must be dense, got the layout {value.layout}; {remedy}")


def _check_parameter(
    name: str, value: Tensor, count: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises where weight or bias does not fit an x of a dtype on a device."""
    shape = _shape_of(name, value)
    own = value.dtype
    if own != dtype and (own != torch.float32 or dtype == torch.float64):
        allowed = str(dtype) if dtype.itemsize > 2 else f"torch.float32 or {dtype}"
        convert_x = f"x with x.to({own}), or " if own in DTYPES else ""
        remedy = f"convert {convert_x}{name} (a layer as a whole) with .to({dtype})"
        raise TypeError(f"{name} must be {allowed} where x is {dtype}, got {own}; {remedy}")
    if shape != (count,):
        why = " (one per context: the sum of levels)" if name == "weight" else ""
        raise ValueError(f"{name} must have shape [{count}]{why}, got {list(shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {value.device}")


def check_residual(residual: Tensor, x: Tensor) -> Tensor:
    shape = _shape_of("residual", residual)
    if shape != x.shape:
        raise ValueError(f"residual must have x's shape {list(x.shape)}, got {list(shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual must be on x's device {x.device}, got {residual.device}")
    if residual.dtype != x.dtype:
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
        residual = residual.to(x.dtype)
    return residual
