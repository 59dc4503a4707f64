"""Collects the gate maps of the PPCR layers of a network while it runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import functional, module
from ._operators import is_tracing


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Records the gate maps of every PPCR layer of a network that runs within the ``with`` block.

    Outputs and gradients do not change. Each map costs one more pass over the layer's input, and
    nothing once the block is left, by an exception too. Fused layers, which are called with a
    residual, are recorded like all others.

    Only calls from the thread (the context of ``contextvars``) that entered the block are recorded.
    Threads can record the same network at the same time, each its own calls. Blocks may be nested.
    A recomputation by activation checkpointing within the block counts as a call.

    Within the block, functions that ``torch.compile`` has compiled run eagerly, in all threads.
    They need not be compiled again afterwards. Exported programs and graphs of ``torch.fx`` have no
    PPCR layers any more, so nothing of them is recorded.

    Args:
        model: the network, or a compiled, DistributedDataParallel or other wrapper of it. The names
            are those of ``model`` as given.

    Yields:
        A dict that fills while the network runs. It maps the layer's name (as in
        ``model.named_modules()``) to one gate map ``[N, 1, *spatial]`` for each call of the layer,
        in the order of the calls. A map has the dtype and device of the layer's input, and is
        detached. Layers that have not run are not in it.

    Raises:
        TypeError: model is not a module.
        ValueError: model has no PPCR layer.
        RuntimeError: a layer runs within the block under a ``torch.func`` transform, or while
            ``torch.export``, ``torch.fx``, ``make_fx`` or ``torch.jit.trace`` records the network.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), ppcr_ext.PPCR(8))
        >>> with ppcr_ext.record_gates(model) as gates:
        ...     y = model(torch.randn(2, 3, 10, 10))
        >>> gates["1"][0].shape
        torch.Size([2, 1, 8, 8])
    """
    global _count, _eager
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {layer: name for name, layer in model.named_modules() if isinstance(layer, module.PPCR)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no PPCR layer to record")
    gates: dict[str, list[Tensor]] = {}
    own = found, gates
    with _lock:
        if _count == 0:
            _eager = torch.compiler.set_stance("force_eager")
        _count += 1
        module.recorder = _record
    _collectors.set((*_collectors.get(), own))
    try:
        yield gates
    finally:
        # Not by a token: the block may be left in another context, as an async generator is that
        # two tasks begin and end. Contexts that still hold the collector find no layer in it.
        found.clear()
        _collectors.set(tuple(other for other in _collectors.get() if other is not own))
        with _lock:
            _count -= 1
            if _count == 0:
                module.recorder = None
                _eager.__exit__(None, None, None)


# Of each ``with`` block: the names of its layers, and the gates by name.
_Collector = tuple[dict[module.PPCR, str], dict[str, list[Tensor]]]
_collectors: ContextVar[tuple[_Collector, ...]] = ContextVar("ppcr_collectors", default=())
_lock = threading.Lock()
_count = 0  # of the blocks that any thread is in
_eager: Any = None  # what makes compiled functions run eagerly: graphs do not call the recorder


def _record(layer: module.PPCR, x: Tensor) -> None:
    """A layer calls it for each of its inputs while anyone records."""
    found = [
        (name, gates)
        for names, gates in _collectors.get()
        if (name := names.get(layer)) is not None
    ]
    # The layer itself refuses what is no tensor.
    if not found or not isinstance(x, (Tensor, torch.fx.Proxy)):
        return
    # By torch.fx, export or jit, or make_fx.
    is_traced = isinstance(x, torch.fx.Proxy) or is_tracing() or get_proxy_mode() is not None
    if is_traced or functional.transforms_active():
        where = "under torch.func transforms or while a network is traced"
        raise RuntimeError(f"record_gates cannot record {where}")
    with torch.no_grad():
        gate = layer.gate(x.detach())
    for name, gates in found:
        gates.setdefault(name, []).append(gate)
