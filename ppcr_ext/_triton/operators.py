"""The Triton backend: operators ``torch.ops.ppcr_ext.triton_*``, computed by the kernels of
one_pass.py and two_passes.py.

They run for CUDA tensors; with TRITON_INTERPRET=1, in Triton's interpreter, for CPU tensors too,
slowly, as the tests do. Triton is imported when it is first asked what can run, and the kernels at
the first launch. To torch.compile they are opaque, as the compiled ones are: their launch
parameters depend on sizes in ways that would otherwise become guards, and recompile where sizes
change.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _operators
from .._build import devices
from .._checks import check_arguments
from .._operators import (
    OPERATORS,
    constant_while_tracing,
    gate_like,
    is_channels_last,
    parameter_gradients,
)
from .launch_rule import (
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
_REMEDY = "pip install 'triton>=3.6'"
_FINISH_BLOCK = 1024
_NARROW_OFFSETS = 2**31  # beyond it, offsets inside a tile take 64 bits
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

Plan = tuple[Any, tuple[int], tuple[int, int], dict[str, Any]]


# ---- what can run -----------------------------------------------------------------------------


@constant_while_tracing  # the compiler cannot look into what it asks
def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of a device, or None where they can."""
    if device.type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device.type} tensors"
    reason = _why_no_triton()
    if reason is not None:
        return reason
    if _interpreted():
        is_missing = device.type == "cuda" and devices.count() == 0
        return devices.NO_DEVICE if is_missing else None
    if device.type == "cpu":
        return "Triton kernels run only on CUDA tensors"
    return _why_not_on(device.index or 0)


@functools.cache
def _why_no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {_REMEDY}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_VERSION:
        needed = "{}.{}".format(*MINIMUM_VERSION)
        return f"it needs Triton {needed} or newer, this is {triton.__version__}; {_REMEDY}"
    return None


@devices.remembered
def _why_not_on(index: int) -> str | None:
    if devices.count() == 0:
        return devices.NO_DEVICE
    if torch.version.hip is not None:
        return "its launches are made for NVIDIA GPUs"
    capability = devices.capability(index)
    if capability is None:
        return devices.NOT_ASKED
    if capability < MINIMUM_CAPABILITY:
        has, needed = "{}.{}".format(*capability), "{}.{}".format(*MINIMUM_CAPABILITY)
        return f"device {index} has compute capability {has}, Triton needs {needed}"
    return None


@functools.cache
def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for the compiler.

    That is settled when the kernels are imported.
    """
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _finish() -> Any:
    from .common import ppcr_finish  # which imports Triton

    return ppcr_finish


# ---- launches ---------------------------------------------------------------------------------


def forward(mode: int, x: Tensor, *rest: Any) -> Tensor:
    """(x[, residual], weight, bias, levels, eps) -> y, or for GATE the gate."""
    *maps, weight, bias, levels, eps = rest
    x = _readable(x)
    residual = _in_layout_of(maps[0], x) if maps else x
    out = gate_like(x) if mode == GATE else torch.empty_like(x)
    if x.numel():
        problem = problem_of(mode, False, x, tuple(levels))
        kernel, grid, arguments, options = plan(problem, bias is not None, eps)
        weight = weight.contiguous()
        bias = weight if bias is None else bias
        with torch.cuda.device_of(x):  # Triton launches on the current device and its stream
            kernel[grid](x, residual, weight, bias, out, *arguments, **options)
    return out


def backward(mode: int, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """(grad, x[, y], weight, bias, levels, eps) -> dx[, dresidual], dweight, dbias, which is empty
    without a bias."""
    *maps, weight, bias, levels, eps = rest
    x = _readable(x)
    grad = grad.contiguous() if mode == GATE else _in_layout_of(grad, x)
    y = _in_layout_of(maps[0], x) if maps else x
    dx = torch.empty_like(x)
    d_residual = torch.empty_like(x) if maps else dx
    d_weight, d_bias = parameter_gradients(weight, bias)
    if x.numel():
        has_bias, problem = bias is not None, problem_of(mode, True, x, tuple(levels))
        kernel, grid, arguments, options = plan(problem, has_bias, eps)
        rows = weight.numel() + 1
        partials = x.new_empty((rows, *grid), dtype=torch.promote_types(x.dtype, torch.float32))
        weight = weight.contiguous()
        inputs = (x, grad, y, weight, bias if has_bias else weight)
        constants = {"L": weight.numel(), "HAS_BIAS": has_bias, "ACC": options["ACC"]}
        constants |= {"BLOCK": _FINISH_BLOCK, "num_warps": 4}
        with torch.cuda.device_of(x):
            kernel[grid](*inputs, dx, d_residual, partials, *arguments, **options)
            _finish()[(rows,)](partials, d_weight, d_bias, grid[0], **constants)
    else:
        d_weight.zero_()
        d_bias.zero_()
    return (dx, d_residual, d_weight, d_bias) if maps else (dx, d_weight, d_bias)


def problem_of(mode: int, is_backward: bool, x: Tensor, levels: tuple[int, ...]) -> Problem:
    """What a plan depends on, for an x whose layout the kernels read."""
    images, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    # One pixel a sample is both layouts at once, and channels_last has the longer rows.
    channels_last = pixels == 1 or not x.is_contiguous()
    if channels_last:
        images, pixels = 1, images * pixels
    size = x.element_size()
    return Problem(images, channels, pixels, channels_last, size, levels, mode, is_backward)


@functools.lru_cache(maxsize=4096)
def plan(p: Problem, has_bias: bool, eps: float) -> Plan:
    """The kernel, its grid, its arguments after the tensors, and its constants and options."""
    import triton.language as tl

    from . import one_pass, two_passes

    launch = launch_for(p)
    # The kernel multiplies: units of 32 bits would give a product of 32.
    unit = math.gcd(p.pixels, 16) if p.pixels < 2**31 else 1
    tiles = -(-p.pixels // launch.pixels)
    double = p.element_size == 8
    furthest = p.channels * (launch.pixels if p.channels_last else p.pixels)
    options: dict[str, Any] = {
        # Zero would divide by zero where all contexts agree.
        "EPS": max(eps, torch.finfo(torch.float64 if double else torch.float32).tiny),
        "P": launch.pixels,
        "UNIT": unit,
        "MODE": p.mode,
        "CHANNELS_LAST": p.channels_last,
        "WIDE": furthest >= _NARROW_OFFSETS,
        "HAS_BIAS": has_bias,
        "ACC": tl.float64 if double else tl.float32,
        "num_warps": launch.warps,
    }
    if launch.chunk is None:
        segment = p.channels // 4
        options |= {"S": segment, "SP": power_of_two(segment)}
        kernels = one_pass.ppcr_one_pass_forward, one_pass.ppcr_one_pass_backward
    else:
        contexts = sum(p.levels)
        options |= {"LEVELS": p.levels, "L": contexts, "LP": power_of_two(contexts)}
        options |= {"C": p.channels, "CHUNK": launch.chunk // launch.flat}
        options["ALIGN"] = common_edge_factor(p.levels, p.channels)
        if p.backward:
            options["FLAT"] = launch.flat
        kernels = two_passes.ppcr_two_passes_forward, two_passes.ppcr_two_passes_backward
    return kernels[p.backward], (p.images * tiles,), (p.pixels // unit, tiles), options


def _readable(x: Tensor) -> Tensor:
    """x itself where its layout is one of the two that kernels read, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def _in_layout_of(t: Tensor, x: Tensor) -> Tensor:
    """grad, residual or y in x's layout, copied where it has another."""
    if all(size == 1 or a == b for size, a, b in zip(x.shape, t.stride(), x.stride(), strict=True)):
        return t
    return torch.empty_like(x).copy_(t)


# ---- operators --------------------------------------------------------------------------------


def _checked(mode: int, is_backward: bool, *arguments: Any) -> Any:
    """Forward or backward, after the checks that keep a direct call from reading out of bounds."""
    *maps, weight, bias, levels, eps = arguments
    named = dict(zip(("grad", "x", "y") if is_backward else ("x", "residual"), maps, strict=False))
    x = named.pop("x")
    contexts, _, _ = check_arguments(x, weight, bias, levels, eps, None)
    for name, t in named.items():
        is_gate = name == "grad" and mode == GATE
        shape = (x.shape[0], 1, *x.shape[2:]) if is_gate else x.shape
        if t.shape != torch.Size(shape):
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    reason = _operators.why_too_many(contexts) or why_not(x.device)
    if reason is not None:
        raise RuntimeError(f"backend 'triton' cannot run for {x.device.type} tensors: {reason}")
    return (backward if is_backward else forward)(mode, *arguments)


def define() -> None:
    """Registers the operators, whether or not Triton and the compiled library, which shares the
    namespace, are there."""
    for name, operator in OPERATORS.items():
        if not hasattr(torch.ops.ppcr_ext, f"triton_{name}"):  # they outlive a reload
            of, is_backward, _ = name.partition("_backward")
            kernel = functools.partial(_checked, MODES[of], bool(is_backward))
            tags = (torch.Tag.pt2_compliant_tag,)
            torch.library.define(f"ppcr_ext::triton_{name}", operator.schema, tags=tags)
            torch.library.impl(f"ppcr_ext::triton_{name}", ("cpu", "cuda"), kernel)


# ---- calls from Python ------------------------------------------------------------------------


def _direct(launch: Callable[..., Any], mode: int, registered: Callable[[], Any]) -> Any:
    """A function that launches straight from Python unless something has to see the operator: the
    dispatcher costs as much again as the launch."""
    call_registered = _operators.calling(registered)

    def call(*arguments: Any) -> Any:
        if _plain(arguments[:-2]):
            return launch(mode, *arguments)
        return call_registered(*arguments)

    return call


def _plain(tensors: Sequence[Tensor | None]) -> bool:
    """Tensors in memory, no compiler, and no mode that traces or counts operators."""
    if _operators.is_tracing() or _dispatch_modes():
        return False
    return all(t is None or _in_memory(torch._C._dispatch_keys(t).raw_repr()) for t in tensors)


@functools.cache
def _in_memory(keys: int) -> bool:
    """Whether these are the dispatch keys of a tensor whose memory holds its values.

    Subclasses, batched and functional tensors, zeros without memory and views that negate have
    other keys. PyTorch tells keys apart by their names alone.
    """
    names = str(torch._C.DispatchKeySet.from_raw_repr(keys))
    return set(re.findall(r"\w+", names)) <= {
        "DispatchKeySet",
        "ADInplaceOrView",
        *(f"{of}{device}" for of in ("", "Autograd", "Autocast") for device in ("CPU", "CUDA")),
    }


# By function: its forward and backward.
KERNELS = {
    name: (
        _direct(forward, mode, OPERATORS[name].triton),
        _direct(backward, mode, OPERATORS[f"{name}_backward"].triton),
    )
    for name, mode in MODES.items()
}
