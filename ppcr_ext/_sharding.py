"""How the operators run on DTensors. These are split along the batch or a spatial dimension;
otherwise they are gathered.

PyTorch's interface for this is experimental. Where it is missing, DTensor says that it knows no
strategy.
"""

from __future__ import annotations

import sys
from typing import Any

from ._operators import OPERATORS, constant_while_tracing

_registered: set[Any] = set()


@constant_while_tracing
def register() -> None:
    """Tells DTensor about the operators, if the program has imported it.

    It is called at import, and for every x of a subclass of Tensor.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    for name, entry in OPERATORS.items():
        strategy = _backward if name.endswith("_backward") else _forward
        for registered in (entry.native, entry.triton):
            try:
                operator = registered()
            except AttributeError:  # the compiled operators may not be there
                continue
            if operator not in _registered:
                _register(operator, strategy)
                _registered.add(operator)


def _register(operator: Any, strategy: Any) -> None:
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return
    register_sharding(operator)(strategy)


def _forward(x: Any, *others: Any) -> list[tuple[list[Any], list[Any]]]:
    """The choices for (x[, residual], weight, bias, levels, eps) -> y.

    A choice holds the placements of the results, then those of the arguments.
    """
    maps, bias = 1 + (len(others) == 5), others[-3]
    from torch.distributed.tensor import Replicate

    whole = Replicate()
    parameters = [whole, None if bias is None else whole, None, None]
    return [([where], [where] * maps + parameters) for where in _places(x)]


def _backward(grad: Any, *others: Any) -> list[tuple[list[Any], list[Any]]]:
    """The choices for (grad, x[, y], weight, bias, levels, eps) -> dx[, dresidual], dweight, dbias.

    The last two results are sums over all pixels.
    """
    from torch.distributed.tensor import Partial, Replicate

    maps, bias = 1 + (len(others) == 6), others[-3]
    whole = Replicate()
    parameters = [whole, None if bias is None else whole, None, None]
    choices = []
    for where in _places(grad):
        total = whole if where == whole else Partial()
        choices.append(([where] * maps + [total] * 2, [where] * (maps + 1) + parameters))
    return choices


def _places(x: Any) -> list[Any]:
    """The placements of x: gathered, or split along any dimension but that of the channels."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate(), *(Shard(dim) for dim in range(len(x.shape)) if dim != 1)]
