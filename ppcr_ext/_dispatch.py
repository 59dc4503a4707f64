"""What can run here, and why not."""

import warnings

import torch
from torch import Tensor

from . import _native
from ._build import devices
from ._checks import BACKENDS
from ._operators import MAX_CONTEXTS, constant_while_tracing, why_too_many
from ._triton import operators as _triton

_WHY_NOT = {"native": _native.why_not, "triton": _triton.why_not}

_warned: set[torch.device] = set()


def why_not(name: str, device: torch.device, contexts: int) -> str | None:
    """Why a backend cannot run for tensors of a device with L contexts, or None where it can."""
    if name == "reference":
        return None
    return why_too_many(contexts) or _WHY_NOT[name](device)


def choose(name: str | None, x: Tensor, contexts: int) -> str:
    """The backend to run: ``name``, or for None the best one that can.

    Raises RuntimeError with the reason where the named one cannot.
    """
    device = x.device
    if name is None and contexts <= MAX_CONTEXTS and _native.why_not(device) is None:
        return "native"
    if name is not None:
        reason = why_not(name, device, contexts)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run for {device.type} tensors: {reason}")
        return name
    is_cuda = device.type == "cuda"
    best = "triton" if is_cuda and why_not("triton", device, contexts) is None else "reference"
    if contexts <= MAX_CONTEXTS and device.type in ("cpu", "cuda"):
        warn_once(device, best)
    return best


@constant_while_tracing  # said while tracing: a call in the graph would break it
def warn_once(device: torch.device, best: str, stacklevel: int = 6) -> None:
    if device in _warned:
        return
    _warned.add(device)
    what, reason = "Triton kernels instead of the compiled ones", _native.why_not(device)
    if best == "reference":
        what = "slow PyTorch reference"
        if device.type == "cuda":
            reason = f"{reason}; nor Triton's: {_triton.why_not(device)}"
    text = f"ppcr_ext runs its {what} for {device.type} tensors: {reason}"
    warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)


def _devices() -> list[torch.device]:
    """The CPU and every CUDA device. Where there is no CUDA device, one is listed all the same, so
    that backends can say why it is not usable.
    """
    indexes = range(max(1, devices.count()))
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in indexes)]


def _on_cuda(name: str) -> str:
    """What a backend says of the CUDA devices, in one phrase if they are alike."""
    states = {str(d): why_not(name, d, 2) or "usable" for d in _devices()[1:]}
    if len(set(states.values())) == 1:
        return f"cuda: {states['cuda:0']}"
    return "; ".join(f"{device}: {state}" for device, state in states.items())


def backends() -> dict[str, str]:
    """Every backend, best first, with what it can run on here, and the reason where it cannot.

    The question does not start CUDA, so that the process may still fork.

    Returns:
        A dict of the names ``"native"``, ``"triton"`` and ``"reference"`` to a sentence on each.

    Example:
        >>> ppcr_ext.backends()["reference"]
        'usable on every device: plain PyTorch, slow'
    """
    reason = _native.why_not(torch.device("cpu"))
    cpu = f"cpu: {reason}" if reason else f"cpu ({_native.cpu_capability()}): usable"
    return {
        "native": f"{cpu}; {_on_cuda('native')}",
        "triton": _on_cuda("triton"),
        "reference": "usable on every device: plain PyTorch, slow",
    }


def available_backends() -> tuple[str, ...]:
    """The names of the backends that can run on some device of this machine, best first.

    The question does not start CUDA, so that the process may still fork.

    Returns:
        Some of ``"native"``, ``"triton"`` and ``"reference"``; the last is always there.

    Example:
        >>> ppcr_ext.available_backends()[-1]
        'reference'
    """
    found = _devices()
    return tuple(name for name in BACKENDS if any(why_not(name, d, 2) is None for d in found))
