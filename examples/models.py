"""Networks with an attention layer of one's choice in every residual block: a small one, and the ResNets of torchvision and timm."""

from __future__ import annotations

import functools
from collections.abc import Callable

import timm
import torchvision
from files import BadInput
from timm.layers import create_attn
from torch import Tensor, nn

import ppcr_ext

# Without a minimum of channels in the bottleneck SE and CBAM would have one or two in a small network.
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "se": functools.partial(create_attn, "se", rd_divisor=4),
    "cbam": functools.partial(create_attn, "cbam", rd_divisor=4),
}
ATTENTION = ("ppcr", *LAYERS, "none")


class Block(nn.Module):
    """A residual block whose attention layer stands behind the last norm; PPCR does the addition and the ReLU, too."""

    def __init__(self, channels: int, out: int, attention: str) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.attention = (
            ppcr_ext.PPCR(out) if attention == "ppcr" else LAYERS.get(attention, nn.Identity)(out)
        )
        self.shortcut = (
            nn.Identity()
            if channels == out
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = self.body(x), self.shortcut(x)
        if isinstance(self.attention, ppcr_ext.PPCR):
            return self.attention(y, shortcut)
        return (self.attention(y) + shortcut).relu()


def small(channels: int, classes: int, attention: str, width: int = 32) -> nn.Sequential:
    """Four residual blocks in two stages, for images of 8 to 64 pixels."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        Block(width, width, attention), Block(width, width, attention),
        Block(width, 2 * width, attention), Block(2 * width, 2 * width, attention),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
    )  # fmt: skip


def build(name: str, attention: str, channels: int, classes: int) -> nn.Module:
    """``small``, ``torchvision/NAME`` or ``timm/NAME``, the last two for residual networks, with random weights."""
    if name == "small":
        return small(channels, classes, attention)
    library, _, architecture = name.partition("/")
    try:
        if library == "timm":
            model = timm.create_model(architecture, in_chans=channels, num_classes=classes)
        elif library == "torchvision":
            model = torchvision.models.get_model(architecture, weights=None, num_classes=classes)
            if channels != 3:
                first = model.conv1
                model.conv1 = nn.Conv2d(
                    channels,
                    first.out_channels,
                    first.kernel_size,
                    first.stride,
                    first.padding,
                    bias=False,
                )
        else:
            raise BadInput(f"--model: {name!r} is not small, torchvision/NAME or timm/NAME")
        if attention == "ppcr":
            ppcr_ext.insert_ppcr(model)
        elif attention != "none":
            _insert(model, LAYERS[attention])
    except (AttributeError, RuntimeError, ValueError) as error:
        raise BadInput(
            f"--model: {name} cannot be built with --attention {attention}: {error}"
        ) from None
    return model


def _insert(model: nn.Module, layer: Callable[[int], nn.Module]) -> None:
    """Puts another layer where insert_ppcr puts PPCR: behind the last norm of every residual block."""
    last = {timm.models.resnet.BasicBlock: "bn2", timm.models.resnet.Bottleneck: "bn3",
            torchvision.models.resnet.BasicBlock: "bn2", torchvision.models.resnet.Bottleneck: "bn3"}  # fmt: skip
    blocks = [block for block in model.modules() if type(block) in last]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no residual block of torchvision's or timm's ResNets"
        )
    for block in blocks:
        norm = getattr(block, last[type(block)])
        if hasattr(block, "se"):
            block.se = layer(norm.num_features)
        else:
            setattr(block, last[type(block)], nn.Sequential(norm, layer(norm.num_features)))
