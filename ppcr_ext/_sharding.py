"""How the operators run on DTensors. These are split along the batch or a spatial dimension;
otherwise they are gathered.

PyTorch's interface for this is experimental. Where it is missing, DTensor says that it knows no
strategy.
"""

import sys
from functools import partial
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
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return
    for name, entry in OPERATORS.items():
        strategy = partial(_choices, name.endswith("_backward"))
        for registered in (entry.native, entry.triton):
            try:
                operator = registered()
            except AttributeError:  # the compiled operators may not be there
                continue
            if operator not in _registered:
                register_sharding(operator)(strategy)
                _registered.add(operator)


def _choices(backward: bool, x: Any, *others: Any) -> list[tuple[list[Any], list[Any]]]:
    """The placements that an operator takes: those of its results, then those of its arguments.

    Forward is (x[, residual], weight, bias, levels, eps) -> y, and backward (grad, x[, y], weight,
    bias, levels, eps) -> dx[, dresidual], dweight, dbias, of which the last two are sums over all
    pixels. Maps are gathered, or split along any dimension but that of the channels.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, maps, bias = Replicate(), len(others) - 3, others[-3]
    parameters: list[Any] = [whole, None if bias is None else whole, None, None]
    choices: list[tuple[list[Any], list[Any]]] = []
    for where in (whole, *(Shard(dim) for dim in range(len(x.shape)) if dim != 1)):
        total = whole if where == whole else Partial()
        results: list[Any] = [where] * (maps - 1) + [total] * 2 if backward else [where]
        choices.append((results, [where] * maps + parameters))
    return choices
