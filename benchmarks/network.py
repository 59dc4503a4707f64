"""torchvision's ResNets with PPCR, with other attention layers, and without."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

import ppcr_ext

from . import peers
from .inputs import LEVELS

VARIANTS = ("none", "PPCR fused", "PPCR unfused", "PPCR plain", "SE", "CBAM")
OWN = VARIANTS[1:4]  # the same network three times over
TOLERANCE = {
    torch.float32: 0.02,
    torch.bfloat16: 0.2,
}  # relative L2 error of a whole network's loss gradient; see check()


def resnet50() -> ResNet:
    """50 layers, 16 of PPCR, random weights from torch's current seed; the integration weights are drawn too."""
    model = torchvision.models.resnet50()
    insert_drawn(model)
    return model


def insert_drawn(model: nn.Module, fuse: bool = True) -> None:
    """PPCR in every residual block, its integration weights drawn: zero, where training starts, would leave every gate equal."""
    for name in ppcr_ext.insert_ppcr(model, fuse=fuse):
        nn.init.normal_(model.get_submodule(name).weight, std=0.5)  # type: ignore[arg-type]


class Plain(nn.Module):
    """PPCR in plain PyTorch, with the parameters of a :class:`ppcr_ext.PPCR`."""

    def __init__(self, layer: ppcr_ext.PPCR) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return peers.pooled_once(x, self.weight, self.bias, LEVELS)


def network(name: str, variant: str) -> nn.Module:
    """A network with random weights, the same for all variants; PPCR's integration weights are drawn too."""
    from timm.layers.cbam import CbamModule
    from timm.layers.squeeze_excite import SEModule

    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(num_classes=10)
    if name == "resnet18":  # for small pictures, as usual: no early reduction
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    if variant in OWN:
        insert_drawn(model, fuse=variant == "PPCR fused")
    if variant in OWN[2:]:
        for block in list(model.modules()):
            if isinstance(getattr(block, "ppcr", None), ppcr_ext.PPCR):
                block.ppcr = Plain(block.ppcr)  # type: ignore[arg-type]
    if variant in ("SE", "CBAM"):
        attention = SEModule if variant == "SE" else CbamModule
        for block in model.modules():
            last = "bn3" if hasattr(block, "bn3") else "bn2"
            if hasattr(block, "downsample"):
                norm = getattr(block, last)
                setattr(block, last, nn.Sequential(norm, attention(norm.num_features)))
    return model


def loss_gradient(model: nn.Module, x: Tensor, target: Tensor, amp: bool = False) -> Tensor:
    """Gradient of a training step's loss with respect to the pictures."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(model(x).to(x.dtype), target)
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def check(models: dict[str, nn.Module], x: Tensor, target: Tensor, amp: bool) -> dict[str, float]:
    """Relative L2 error, against the reference in float64, of the gradient that a training step of each PPCR network sends to the
    pictures: it has passed through every layer twice. Raises AssertionError where one is off: a wrong program is not timed.

    Rounding grows with depth, and where it takes a value across zero, a ReLU lets its gradient pass or not: with a few pictures one such
    value is some 1e-3 of the whole, whoever computes it. So float32 is held to 0.02 and bfloat16 to 0.2, or to three times the error that
    the reference makes in the same precision; a wrong gate, sign or bin changes the gradient by more than its half.
    """
    reference = copy.deepcopy(models["PPCR unfused"])
    for layer in reference.modules():
        if isinstance(layer, ppcr_ext.PPCR):
            layer.backend = "reference"
    expected = loss_gradient(copy.deepcopy(reference).double(), x.double(), target)

    def error(model: nn.Module) -> float:
        got = loss_gradient(copy.deepcopy(model), x, target, amp).double()
        return float((got - expected).norm() / expected.norm())

    limit = min(0.5, max(TOLERANCE[torch.bfloat16 if amp else torch.float32], 3 * error(reference)))
    found = {}
    for name in OWN:
        found[name] = error(models[name])
        if not found[name] <= limit:  # no assert: python -O would time it
            raise AssertionError(f"{name} is off by {found[name]:.2e}, allowed {limit}")
    return found


def saved_bytes(model: nn.Module, x: Tensor, target: Tensor, amp: bool) -> int:
    """Bytes that autograd keeps from forward to backward, parameters and the pictures left out."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # a freed storage's address could come back

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(x.device.type, torch.bfloat16, enabled=amp),
    ):
        F.cross_entropy(model(x).to(x.dtype), target)
    return sum(kept.values())
