"""The switch between the PPCR layers and :func:`ppcr_ext.record_gates`: who records what, in which thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import functional

if TYPE_CHECKING:
    from .module import PPCR

enabled = False  # whether anyone records, in any thread: all that an idle layer asks
_count = 0
_lock = threading.Lock()
_eager: Any = None  # what lets compiled functions run eagerly while anyone records: they have no place where Python could listen


@dataclass
class Collector:
    """What one ``with`` block records."""

    names: dict[PPCR, str]
    gates: dict[str, list[Tensor]] = field(default_factory=dict)


_collectors: ContextVar[tuple[Collector, ...]] = ContextVar("ppcr_collectors", default=())


@contextmanager
def collecting(collector: Collector) -> Iterator[None]:
    _begin()
    token = _collectors.set((*_collectors.get(), collector))
    try:
        yield
    finally:
        _collectors.reset(token)
        _end()


def _begin() -> None:
    global _count, _eager, enabled
    with _lock:
        if _count == 0:
            _eager = torch.compiler.set_stance("force_eager")
        _count += 1
        enabled = True


def _end() -> None:
    global _count, enabled
    with _lock:
        _count -= 1
        if _count == 0:
            enabled = False
            _eager.__exit__(None, None, None)


def record(layer: PPCR, x: Tensor) -> None:
    """Called by a layer for each of its inputs while ``enabled``."""
    names = [
        (collector, collector.names[layer])
        for collector in _collectors.get()
        if layer in collector.names
    ]
    if not names:
        return
    if functional.transforms_active() or _is_traced(x):
        raise RuntimeError(
            "record_gates cannot record under torch.func transforms or while a network is traced"
        )
    with torch.no_grad():
        gate = functional.ppcr_gate(
            x.detach(), layer.weight.detach(), None if layer.bias is None else layer.bias.detach(),
            levels=layer.levels, eps=layer.eps, backend=layer.backend,
        )  # fmt: skip
    for collector, name in names:
        collector.gates.setdefault(name, []).append(gate)


def _is_traced(x: Tensor) -> bool:
    """Whether a graph is made of what is computed from x: by torch.fx, make_fx, export or jit."""
    return isinstance(x, torch.fx.Proxy) or functional.is_tracing() or get_proxy_mode() is not None
