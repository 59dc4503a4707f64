"""Operators ``torch.ops.ppcr_ext.triton_*``: the native operators' schemas, computed by the kernels of triton_tile.py and triton_walk.py.

They run for CUDA tensors; with TRITON_INTERPRET=1, in Triton's interpreter, for CPU tensors too, slowly, as the tests do. Triton is
imported when a kernel is first asked for. To torch.compile they are opaque, as the native ones are: their launch parameters depend
on sizes in ways that would otherwise become guards, and recompile where sizes change.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .triton_launch import (
    ADD_RELU,
    GATE,
    SCALE,
    Problem,
    common_edge_factor,
    launch_for,
    power_of_two,
)

MODES = {"ppcr": SCALE, "ppcr_add_relu": ADD_RELU, "ppcr_gate": GATE}
MINIMUM_VERSION = (3, 6)
MINIMUM_CAPABILITY = (8, 0)
_REMEDY = "pip install 'ppcr_ext[triton]'"
_FINISH_BLOCK = 1024
_NARROW_OFFSETS = 2**31  # beyond it, offsets inside a tile take 64 bits

Levels = Sequence[int]


# ---- what can run -------------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # the compiler cannot look into what it asks
def why_not(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on tensors of a device type, or None where they can."""
    if device_type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device_type} tensors"
    reason = _why_no_triton()
    if reason is not None or _interpreted():
        return reason
    return _why_no_device() if device_type == "cuda" else "its kernels take CUDA tensors"


@functools.cache
def _why_no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {_REMEDY}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_VERSION:
        return f"it needs Triton {MINIMUM_VERSION[0]}.{MINIMUM_VERSION[1]} or newer, this is {triton.__version__}; {_REMEDY}"
    return None


@functools.cache
def _why_no_device() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.hip is not None:
        return "its launches are made for NVIDIA GPUs"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < MINIMUM_CAPABILITY:
            needed = "{}.{}".format(*MINIMUM_CAPABILITY)
            return f"device {index} has compute capability {capability[0]}.{capability[1]}, Triton needs {needed}"
    return None


@functools.cache
def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for the compiler, which is settled when the kernels are imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _kernels() -> dict[str, Any]:
    """By name; importing them imports Triton."""
    from . import triton_common, triton_tile, triton_walk

    found = (
        triton_tile.ppcr_tile_forward,
        triton_tile.ppcr_tile_backward,
        triton_walk.ppcr_walk_forward,
        triton_walk.ppcr_walk_backward,
        triton_common.ppcr_finish,
    )
    return {kernel.__name__: kernel for kernel in found}


# ---- launches -----------------------------------------------------------------------------------------------------------------------


def forward(
    mode: int,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    levels: Levels,
    eps: float,
) -> Tensor:
    """y, or for GATE the gate."""
    x = _readable(x)
    residual = x if residual is None else _in_layout_of(residual, x)
    out = native.gate_like(x) if mode == GATE else torch.empty_like(x)
    if x.numel():
        kernel, grid, arguments, options = plan(
            mode, False, x, bias is not None, tuple(levels), eps
        )
        weight = weight.contiguous()
        with _device(x):
            kernel[grid](
                x, residual, weight, weight if bias is None else bias, out, *arguments, **options
            )
    return out


def backward(
    mode: int,
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    levels: Levels,
    eps: float,
) -> tuple[Tensor, ...]:
    """dx, for ADD_RELU dresidual, dweight, dbias (empty without a bias)."""
    x = _readable(x)
    grad = grad.contiguous() if mode == GATE else _in_layout_of(grad, x)
    y = x if y is None else _in_layout_of(y, x)
    dx = torch.empty_like(x)
    d_residual = torch.empty_like(x) if mode == ADD_RELU else dx
    d_weight, d_bias = native.parameter_gradients(weight, bias)
    if x.numel():
        kernel, grid, arguments, options = plan(mode, True, x, bias is not None, tuple(levels), eps)
        rows = weight.numel() + 1
        partials = x.new_empty((rows, *grid), dtype=reference.accumulation_dtype(x.dtype))
        weight = weight.contiguous()
        constants = {"L": weight.numel(), "HAS_BIAS": bias is not None, "ACC": options["ACC"]}
        with _device(x):
            kernel[grid](
                x,
                grad,
                y,
                weight,
                weight if bias is None else bias,
                dx,
                d_residual,
                partials,
                *arguments,
                **options,
            )
            _kernels()["ppcr_finish"][(rows,)](
                partials, d_weight, d_bias, grid[0], BLOCK=_FINISH_BLOCK, num_warps=4, **constants
            )
    else:
        d_weight.zero_()
        d_bias.zero_()
    return (dx, d_residual, d_weight, d_bias) if mode == ADD_RELU else (dx, d_weight, d_bias)


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def plan(
    mode: int, is_backward: bool, x: Tensor, has_bias: bool, levels: tuple[int, ...], eps: float
) -> tuple[Any, tuple[int], tuple[int, int], dict[str, Any]]:
    """The kernel for an x that it can read, its grid, its arguments after the tensors, and its constants and options."""
    return _plan(problem_of(mode, is_backward, x, levels), has_bias, eps)


def problem_of(mode: int, is_backward: bool, x: Tensor, levels: tuple[int, ...]) -> Problem:
    pixels = math.prod(x.shape[2:])
    # One pixel a sample: both layouts at once, and pixel-major is the one with long rows.
    pixel_major = pixels == 1 or not x.is_contiguous()
    images = x.shape[0]
    if pixel_major:
        images, pixels = 1, images * pixels
    return Problem(
        images, x.shape[1], pixels, pixel_major, x.element_size(), levels, mode, is_backward
    )


def forget_plans() -> None:
    """After a change of triton_launch.TABLE."""
    _plan.cache_clear()


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem, has_bias: bool, eps: float
) -> tuple[Any, tuple[int], tuple[int, int], dict[str, Any]]:
    import triton.language as tl

    p = problem
    launch = launch_for(p)
    unit = (
        math.gcd(p.pixels, 16) if p.pixels < 2**31 else 1
    )  # the kernel multiplies: units of 32 bits would give a product of 32
    tiles = -(-p.pixels // launch.pixels)
    wide = p.element_size == 8
    furthest = p.channels * (launch.pixels if p.pixel_major else p.pixels)
    options: dict[str, Any] = {
        # Zero would divide by zero where all contexts agree.
        "EPS": max(eps, torch.finfo(torch.float64 if wide else torch.float32).tiny),
        "P": launch.pixels,
        "UNIT": unit,
        "MODE": p.mode,
        "PIXEL_MAJOR": p.pixel_major,
        "WIDE": furthest >= _NARROW_OFFSETS,
        "HAS_BIAS": has_bias,
        "ACC": tl.float64 if wide else tl.float32,
        "num_warps": launch.warps,
    }
    if launch.chunk is None:
        segment = p.channels // 4
        options |= {"S": segment, "SP": power_of_two(segment)}
        family = "tile"
    else:
        contexts = sum(p.levels)
        options |= {
            "LEVELS": p.levels,
            "L": contexts,
            "LP": power_of_two(contexts),
            "C": p.channels,
            "CHUNK": launch.chunk,
        }
        options["ALIGN"] = common_edge_factor(p.levels, p.channels)
        family = "walk"
    kernel = _kernels()[f"ppcr_{family}_{'backward' if p.backward else 'forward'}"]
    return kernel, (p.images * tiles,), (p.pixels // unit, tiles), options


def _readable(x: Tensor) -> Tensor:
    """x itself where its layout is one of the two that kernels read, else its one contiguous copy."""
    return x if x.is_contiguous() or native.is_pixel_major(x) else x.contiguous()


def _in_layout_of(t: Tensor, x: Tensor) -> Tensor:
    """grad, residual or y in x's layout, copied where it has another."""
    if all(size == 1 or a == b for size, a, b in zip(x.shape, t.stride(), x.stride(), strict=True)):
        return t
    return torch.empty_like(x).copy_(t)


# ---- operators ----------------------------------------------------------------------------------------------------------------------


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None, levels: Levels, eps: float) -> None:
    """What keeps a direct call from reading out of bounds."""
    from ._arguments import check_arguments
    from .backends import choose

    choose("triton", x, check_arguments(x, weight, bias, levels, eps, "triton")[0])


def _check_like(name: str, t: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    if list(t.shape) != list(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")


def _ppcr(x: Tensor, weight: Tensor, bias: Tensor | None, levels: Levels, eps: float) -> Tensor:
    _checked(x, weight, bias, levels, eps)
    return forward(SCALE, x, None, weight, bias, levels, eps)


def _ppcr_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, levels: Levels, eps: float
) -> tuple[Tensor, ...]:
    _checked(x, weight, bias, levels, eps)
    _check_like("grad", grad, x, x.shape)
    return backward(SCALE, grad, x, None, weight, bias, levels, eps)


def _ppcr_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, levels: Levels, eps: float
) -> Tensor:
    _checked(x, weight, bias, levels, eps)
    return forward(GATE, x, None, weight, bias, levels, eps)


def _ppcr_gate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, levels: Levels, eps: float
) -> tuple[Tensor, ...]:
    _checked(x, weight, bias, levels, eps)
    _check_like("grad", grad, x, (x.shape[0], 1, *x.shape[2:]))
    return backward(GATE, grad, x, None, weight, bias, levels, eps)


def _ppcr_add_relu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, levels: Levels, eps: float
) -> Tensor:
    _checked(x, weight, bias, levels, eps)
    _check_like("residual", residual, x, x.shape)
    return forward(ADD_RELU, x, residual, weight, bias, levels, eps)


def _ppcr_add_relu_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    levels: Levels,
    eps: float,
) -> tuple[Tensor, ...]:
    _checked(x, weight, bias, levels, eps)
    _check_like("grad", grad, x, x.shape)
    _check_like("y", y, x, x.shape)
    return backward(ADD_RELU, grad, x, y, weight, bias, levels, eps)


_PARAMETERS = "Tensor weight, Tensor? bias, int[] levels, float eps"
_OPERATORS: dict[str, Callable[..., Any]] = {
    f"triton_ppcr(Tensor x, {_PARAMETERS}) -> Tensor": _ppcr,
    f"triton_ppcr_backward(Tensor grad, Tensor x, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)": _ppcr_backward,
    f"triton_ppcr_gate(Tensor x, {_PARAMETERS}) -> Tensor": _ppcr_gate,
    f"triton_ppcr_gate_backward(Tensor grad, Tensor x, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)": _ppcr_gate_backward,
    f"triton_ppcr_add_relu(Tensor x, Tensor residual, {_PARAMETERS}) -> Tensor": _ppcr_add_relu,
    f"triton_ppcr_add_relu_backward(Tensor grad, Tensor x, Tensor y, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)": (
        _ppcr_add_relu_backward
    ),
}


def register() -> None:
    """Called when the package is imported.

    Whether or not Triton and the native library, which shares the namespace, are there.
    """
    for schema, function in _OPERATORS.items():
        name, _, rest = schema.partition("(")
        if not hasattr(torch.ops.ppcr_ext, name):  # operators outlive a reload of the package
            tags = (torch.Tag.pt2_compliant_tag,)
            torch.library.define(f"ppcr_ext::{name}", f"({rest}", tags=tags)
            torch.library.impl(f"ppcr_ext::{name}", ("cpu", "cuda"), function)
    native.register_for_tracing("triton")
