"""What can run here, and why not."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import native, triton_ops

NAMES = ("native", "triton", "reference")  # best first
MAX_CONTEXTS = 64  # what the native and Triton kernels take

_warned: set[str] = set()


def why_not(name: str, device_type: str, contexts: int) -> str | None:
    """Why a backend cannot run for tensors of a device type with L contexts, or None where it can."""
    if name == "reference":
        return None
    if contexts > MAX_CONTEXTS:
        return f"it takes at most {MAX_CONTEXTS} contexts, the levels have {contexts}"
    return native.why_not(device_type) if name == "native" else triton_ops.why_not(device_type)


def choose(name: str | None, x: Tensor, contexts: int) -> str:
    """The backend to run: ``name`` if it can, else RuntimeError with the reason; for None the best one that can."""
    device_type = x.device.type
    if name is None and contexts <= MAX_CONTEXTS and native.why_not(device_type) is None:
        return "native"
    if name is not None:
        reason = why_not(name, device_type, contexts)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run for {device_type} tensors: {reason}")
        return name
    best = (
        "triton"
        if device_type == "cuda" and why_not("triton", device_type, contexts) is None
        else "reference"
    )
    if contexts <= MAX_CONTEXTS and device_type in ("cpu", "cuda"):
        warn_once(device_type, best)
    return best


@torch.compiler.assume_constant_result  # said while tracing: a call in the graph would break it
def warn_once(device_type: str, best: str, stacklevel: int = 5) -> None:
    if device_type in _warned:
        return
    _warned.add(device_type)
    what, reason = "Triton kernels instead of the compiled ones", native.why_not(device_type)
    if best == "reference":
        what = "slow PyTorch reference"
        reason = (
            f"{reason}; nor Triton's: {triton_ops.why_not(device_type)}"
            if device_type == "cuda"
            else reason
        )
    warnings.warn(
        f"ppcr_ext runs its {what} for {device_type} tensors: {reason}",
        RuntimeWarning,
        stacklevel=stacklevel,
    )


def backends() -> dict[str, str]:
    """Every backend, best first, with what it can run on here and the reason where it cannot."""
    devices = []
    for device_type in ("cpu", "cuda"):
        reason = native.why_not(device_type)
        detail = f" ({native.cpu_capability()})" if device_type == "cpu" and reason is None else ""
        devices.append(f"{device_type}{detail}: {reason or 'usable'}")
    return {
        "native": "; ".join(devices),
        "triton": f"cuda: {triton_ops.why_not('cuda') or 'usable'}",
        "reference": "usable on every device: plain PyTorch, slow",
    }


def available_backends() -> tuple[str, ...]:
    """The names of the backends that can run on some device of this machine, best first."""
    return tuple(
        name for name in NAMES if any(why_not(name, d, 2) is None for d in ("cpu", "cuda"))
    )
