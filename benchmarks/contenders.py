"""Who is measured on an operator: the backends, plain PyTorch, the neighbours, and the copies that no layer can beat."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppcr_ext

from . import peers

LEVELS = (1, 2, 4)
DIRECTIONS = ("forward", "backward", "step")

# (x, residual or None, parameters) -> y
Layer = Callable[[Tensor, "Tensor | None", Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Operator:
    """One function of ppcr_ext, and the bytes it needs: in tensors of x's size and in gates (one value per pixel)."""

    function: str
    forward: tuple[int, int]
    backward: tuple[int, int]

    def necessary_bytes(self, direction: str, shape: Sequence[int], dtype: torch.dtype) -> int:
        """What has to be read and written once at the least; parameters, some hundred bytes, are left out."""
        both = tuple(a + b for a, b in zip(self.forward, self.backward, strict=True))
        tensors, gates = {"forward": self.forward, "backward": self.backward, "step": both}[
            direction
        ]
        elements = torch.Size(shape).numel()
        return dtype.itemsize * (tensors * elements + gates * elements // shape[1])


# ppcr: read x, write y; read x and gy, write dx. gate: read x, write g; read x and gy, write dx. add_relu: read x and the
# residual, write y; read x, y and gy, write dx and dresidual.
OPERATORS = {
    "ppcr": Operator("ppcr", (2, 0), (3, 0)),
    "gate": Operator("ppcr_gate", (1, 1), (2, 1)),
    "add_relu": Operator("ppcr_add_relu", (3, 0), (5, 0)),
}


@dataclass
class Contender:
    """Something that computes an operator, or a neighbour of it.

    ``kind`` is fused, reference, plain (the operator in plain PyTorch) or neighbour (another layer, often used in its place). ``mode`` is
    the mode of torch.compile, None for eager. ``exact`` computes a neighbour in float64; for the others the operator is exact.
    """

    name: str
    kind: str
    layer: Layer
    parameters: list[Tensor] = field(default_factory=list)
    mode: str | None = None
    exact: Layer | None = None

    def compiled(self, mode: str) -> Contender:
        short = "compiled" if mode == "default" else f"compiled ({mode})"
        return Contender(
            f"{self.name} {short}", self.kind, self.layer, self.parameters, mode, self.exact
        )

    def program(self) -> Layer:
        """The layer, under torch.compile if so wanted: one program for each direction, so that none evicts another."""
        return (
            self.layer
            if self.mode is None
            else torch.compile(self.layer, mode=self.mode, dynamic=False, fullgraph=True)
        )


def parameters(dtype: torch.dtype, device: torch.device, levels: Sequence[int]) -> list[Tensor]:
    """weight and bias, drawn from N(0, 1); float32 beside half types, as autocast keeps them."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.randn(n, generator=generator, dtype=torch.float64).to(device, wide)
        for n in (sum(levels), 1)
    ]


def backend(operator: str, name: str, drawn: list[Tensor], levels: Sequence[int]) -> Contender:
    function = getattr(ppcr_ext, OPERATORS[operator].function)

    def layer(x: Tensor, residual: Tensor | None, own: Sequence[Tensor]) -> Tensor:
        tensors = (x,) if residual is None else (x, residual)
        return function(*tensors, *own, levels=levels, eps=peers.EPS, backend=name)

    return Contender(name, "reference" if name == "reference" else "fused", layer, drawn)


def plain(operator: str, name: str, drawn: list[Tensor], levels: Sequence[int]) -> Contender:
    gate_of = peers.GATES[name]

    def layer(x: Tensor, residual: Tensor | None, own: Sequence[Tensor]) -> Tensor:
        gate = gate_of(x, own[0], own[1], levels)
        if operator == "gate":
            return gate
        return x * gate if residual is None else torch.relu(x * gate + residual)

    return Contender(name, "plain", layer, drawn)


def neighbours(channels: int, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """timm's squeeze-and-excitation, efficient channel attention and the spatial gate of CBAM, for images."""
    from timm.layers.cbam import SpatialAttn
    from timm.layers.eca import EcaModule
    from timm.layers.squeeze_excite import SEModule

    torch.manual_seed(0)
    modules = {
        "SE": SEModule(channels),
        "ECA": EcaModule(channels=channels),
        "CBAM spatial gate": SpatialAttn(),
    }
    return [_module(name, module.to(device, dtype)) for name, module in modules.items()]


def _module(name: str, module: nn.Module) -> Contender:
    """Training mode for a step; evaluation mode, with batch norm folded to constants, for a forward alone."""

    def either(training: nn.Module, frozen: nn.Module) -> Layer:
        return lambda x, residual, own: (training if torch.is_grad_enabled() else frozen)(x)

    wide = copy.deepcopy(module).double()
    exact = either(wide.train(), copy.deepcopy(wide).eval())
    frozen = copy.deepcopy(module).eval()
    return Contender(
        name, "neighbour", either(module.train(), frozen), list(module.parameters()), exact=exact
    )


def layer_norm(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Contender:
    """PyTorch's own fused normalization, for the cost of a call on a tiny tensor."""
    own = [
        torch.ones(list(shape[1:]), dtype=dtype, device=device),
        torch.zeros(list(shape[1:]), dtype=dtype, device=device),
    ]

    def layer(x: Tensor, residual: Tensor | None, own: Sequence[Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[1:], own[0], own[1])

    return Contender("F.layer_norm", "neighbour", layer, own, exact=layer)


Floor = Callable[..., tuple[Tensor, ...]]  # (x, gy, residual or None)

# One elementwise call for each pass, with the operator's own number of tensors read and written; the gate's reads have none.
FLOORS: dict[str, dict[str, Floor]] = {
    "ppcr": {
        "forward": lambda x, gy, residual: (x * 0.5,),
        "backward": lambda x, gy, residual: (x + gy,),
        "step": lambda x, gy, residual: peers.floor_step(x, gy),
    },
    "gate": {},
    "add_relu": {
        "forward": lambda x, gy, residual: (x + residual,),
        "backward": lambda x, gy, residual: (x + gy, residual * 0.5),
        "step": lambda x, gy, residual: (x + residual, x + gy, residual * 0.5),
    },
}
