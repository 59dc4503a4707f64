"""What is measured: the backends, plain PyTorch, other layers, and the lower bounds of the time."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppcr_ext
from ppcr_ext.reference import bins

EPS = 1e-5
DIRECTIONS = ("forward", "backward", "step")
LOWER_BOUND = "lower bound"
WITH_AUTOGRAD = "lower bound with autograd"

Layer = Callable[..., Tensor]  # of x, the residual of add_relu, and parameters


# The operators with their functions in ppcr_ext; and what each pass has to read and write at least
# once, in tensors of x's size and in gates, without the parameters.
# ppcr: read x, write y; read x and gy, write dx. gate: read x, write g; read x and gy, write dx.
# add_relu: read x and the residual, write y; read x, y and gy, write dx and d_residual.
OPERATORS = {"ppcr": "ppcr", "gate": "ppcr_gate", "add_relu": "ppcr_add_relu"}
TRAFFIC = {
    **{("ppcr", "forward"): (2, 0), ("ppcr", "backward"): (3, 0)},
    **{("gate", "forward"): (1, 1), ("gate", "backward"): (2, 1)},
    **{("add_relu", "forward"): (3, 0), ("add_relu", "backward"): (5, 0)},
}


def necessary_bytes(operator: str, direction: str, x: Tensor) -> int:
    passes = DIRECTIONS[:2] if direction == "step" else (direction,)
    counts = [TRAFFIC[operator, one] for one in passes]
    return sum(tensors * x.nbytes + gates * x[:, 0].nbytes for tensors, gates in counts)


@dataclass
class Implementation:
    """Something that computes an operator, or another layer that is often used in its place."""

    name: str
    kind: str  # fused, reference, plain (the operator in plain PyTorch) or other layer
    layer: Layer
    parameters: list[Tensor] = field(default_factory=list)
    is_compiled: bool = False


def backend(operator: str, name: str, own: list[Tensor], levels: Sequence[int]) -> Implementation:
    function = getattr(ppcr_ext, OPERATORS[operator])
    layer = functools.partial(function, levels=levels, eps=EPS, backend=name)
    return Implementation(name, "reference" if name == "reference" else "fused", layer, own)


def plain(operator: str, name: str, own: list[Tensor], levels: Sequence[int]) -> Implementation:
    contexts_of = FORMULATIONS[name]

    def layer(x: Tensor, *others: Tensor) -> Tensor:
        *residual, weight, bias = others
        gate = gate_of(x, contexts_of(x, levels), weight, bias)
        if operator == "gate":
            return gate
        return torch.relu(x * gate + residual[0]) if residual else x * gate

    return Implementation(name, "plain", layer, own)


# Of a half x the formulations take the means in float32 and go on in it: in float16 the gradient
# of the normalization would overflow. The matmul stays in x's dtype, and is timed in float32 alone.


def gate_of(x: Tensor, centred: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gate, in x's dtype, from the contexts less their mean, ``[N, L, *spatial]``."""
    # Written for speed: ``torch.var_mean`` would take five times as long on a CPU, and dividing by
    # the deviation after the sum over the contexts saves a pass over them.
    variance = (centred * centred).mean(1, keepdim=True)
    integrated = (centred * weight.view(-1, *[1] * (x.dim() - 2))).sum(1, keepdim=True)
    return torch.sigmoid(integrated * torch.rsqrt(variance + EPS) + bias).to(x.dtype)


def _centre(contexts: list[Tensor]) -> Tensor:
    joined = torch.cat(contexts, 1)
    return joined - joined.mean(1, keepdim=True)


def level_by_level(x: Tensor, levels: Sequence[int]) -> Tensor:
    """The formulas as they stand: one mean over x for every level, so that each reads x."""
    wide, contexts = torch.promote_types(x.dtype, torch.float32), []
    for level in levels:
        if x.shape[1] % level == 0:
            contexts.append(x.unflatten(1, (level, -1)).mean(2, dtype=wide))
        else:
            edges = bins(x.shape[1], level)
            contexts += [x[:, begin:end].mean(1, keepdim=True, dtype=wide) for begin, end in edges]
    return _centre(contexts)


def pooled_once(x: Tensor, levels: Sequence[int]) -> Tensor:
    """Reads x once, for the finest bins, which give the coarser ones: on most inputs the best."""
    # Where the levels do not divide the finest one, or that one the channels, it is level by level.
    finest = max(levels)
    if x.shape[1] % finest or any(finest % level for level in levels):
        return level_by_level(x, levels)
    means = x.unflatten(1, (finest, -1)).mean(2, dtype=torch.promote_types(x.dtype, torch.float32))
    return _centre([means if k == finest else means.unflatten(1, (k, -1)).mean(2) for k in levels])


def as_matmul(x: Tensor, levels: Sequence[int]) -> Tensor:
    """Pooling and centring as one matrix product: ``[L, C]`` times every pixel's channels."""
    matrix = centred_pooling(x.shape[1], tuple(levels), x.device, x.dtype)
    return torch.einsum("lc,ncp->nlp", matrix, x.flatten(2)).unflatten(2, x.shape[2:])


@functools.cache
def centred_pooling(channels: int, levels: tuple[int, ...], *where: Any) -> Tensor:
    """``[L, C]``: 1/|bin| where context l holds channel c, less the mean over l."""
    pixels = torch.eye(channels, dtype=torch.float64).unsqueeze(2)  # each has a channel of its own
    return level_by_level(pixels, levels).squeeze(2).T.contiguous().to(*where)


FORMULATIONS = {"pooled once": pooled_once, "level by level": level_by_level, "matmul": as_matmul}


def other_layer(name: str, x: Tensor) -> Implementation:
    """timm's squeeze-and-excitation, efficient channel attention or the spatial gate of CBAM."""
    # Training mode where autograd records, else evaluation mode. ``F.layer_norm`` is PyTorch's own.
    if name == "F.layer_norm":
        own = [torch.full_like(x[0], fill) for fill in (1.0, 0.0)]
        norm: Layer = lambda x, *own: F.layer_norm(x, x.shape[1:], *own)  # noqa: E731
        return Implementation(name, "other layer", norm, own)
    from timm.layers import cbam, eca, squeeze_excite

    made: dict[str, Callable[[], nn.Module]] = {
        "SE": lambda: squeeze_excite.SEModule(x.shape[1]),
        "ECA": lambda: eca.EcaModule(x.shape[1]),
        "CBAM spatial gate": cbam.SpatialAttn,
    }
    training = made[name]().to(x).train()
    frozen = copy.deepcopy(training).eval()

    def layer(x: Tensor, *own: Tensor) -> Tensor:
        return (training if torch.is_grad_enabled() else frozen)(x)

    return Implementation(name, "other layer", layer, list(training.parameters()))


Bound = Callable[..., tuple[Tensor, ...]]  # of x, gy and the residual of add_relu

# One elementwise call for each pass, with the operator's own number of tensors read and written.
# The gate has none: no elementwise call reads a tensor and writes a gate.
BOUNDS: dict[tuple[str, str], Bound] = {
    ("ppcr", "forward"): lambda x, gy: (x * 0.5,),
    ("ppcr", "backward"): lambda x, gy: (x + gy,),
    ("ppcr", "step"): lambda x, gy: (x * 0.5, x + gy),
    ("add_relu", "forward"): lambda x, gy, residual: (x + residual,),
    ("add_relu", "backward"): lambda x, gy, residual: (x + gy, residual * 0.5),
    ("add_relu", "step"): lambda x, gy, residual: (x + residual, x + gy, residual * 0.5),
}


def with_autograd(bound: Bound, x: Tensor, gy: Tensor, *residual: Tensor) -> object:
    """A bound, and in it one run of the autograd engine through an identity that copies nothing."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = leaf.view_as(leaf)
    return bound(x, gy, *residual), torch.autograd.grad(y, leaf, gy)
