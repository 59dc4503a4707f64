"""Looks inside: the gate maps of the PPCR layers of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from . import _recording
from .module import PPCR


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Records the gate maps of every PPCR layer of a network that runs within the ``with`` block.

    Yields a dict that fills while the network runs: the layer's name (as in ``model.named_modules()``) to one gate map
    ``[N, 1, *spatial]`` per call of the layer, in the order of the calls, in the dtype and on the device of its input, detached.
    Layers that have not run are not in it. Outputs and gradients do not change; each map costs one more pass over the layer's
    input, and nothing once the block is left, by an exception too. Fused layers, called with a
    residual, are recorded like all others.

    Only calls from the thread (the context of ``contextvars``) that entered the block are recorded, so threads can record the same
    network at the same time, each its own calls. Blocks may be nested. A recomputation by activation checkpointing within the
    block is a call. Within the block, whatever ``torch.compile`` has compiled runs eagerly, in all threads, and is compiled again
    neither then nor afterwards. Exported programs and graphs of ``torch.fx`` have no PPCR layers
    any more; within the block ``torch.export``, ``torch.fx``, ``make_fx``, ``torch.jit.trace`` and
    ``torch.func`` transforms raise RuntimeError.

    Args:
        model: the network, or a compiled, DistributedDataParallel or other wrapper of it: names are those of ``model`` as given.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no PPCR layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    collector = _recording.Collector(
        {module: name for name, module in model.named_modules() if isinstance(module, PPCR)}
    )
    if not collector.names:
        raise ValueError(f"{type(model).__name__} has no PPCR layer to record")
    with _recording.collecting(collector):
        yield collector.gates
