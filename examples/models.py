"""Residual networks with an attention layer of one's choice in every block.

Two networks for small images, and the ResNets of torchvision and timm. The layer always stands
behind the last normalization of a block, before the addition.
"""

import functools
from collections.abc import Callable

import timm
import torchvision
from files import BadInput
from timm.layers import create_attn
from torch import Tensor, nn

import ppcr_ext

# Without rd_divisor the bottlenecks of a small network would have one channel or two.
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "ppcr": ppcr_ext.PPCR,
    "se": functools.partial(create_attn, "se", rd_divisor=4),
    "eca": functools.partial(create_attn, "eca"),
    "cbam": functools.partial(create_attn, "cbam", rd_divisor=4),
}
ATTENTION = (*LAYERS, "none")
SMALL = {"small": (2, 32), "small-resnet18": (4, 64)}  # stages of two blocks, and their first width


class Block(nn.Module):
    """A residual block. PPCR does its addition and its ReLU as well."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.attention: nn.Module = nn.Identity()
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


def small(channels: int, classes: int, stages: int, width: int) -> nn.Sequential:
    """A ResNet for images of 8 to 64 pixels: its first stage works at full resolution."""
    widths = [width * 2**stage for stage in range(stages)]
    blocks: list[nn.Module] = []
    for before, after in zip([width, *widths], widths, strict=False):
        blocks += [Block(before, after), Block(after, after)]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )


def build(name: str, attention: str, channels: int, classes: int) -> nn.Module:
    """A network with random weights, which outside the attention layers do not depend on these.

    ``small``, ``small-resnet18``, either with a width (``small-resnet18/16``), or
    ``torchvision/NAME`` and ``timm/NAME`` for residual networks.
    """
    try:
        model = _plain(name, channels, classes)
        # Only now: what the layers draw from the random generator comes after all other weights.
        if attention != "none":
            _insert(model, attention)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise BadInput(
            f"--model: {name} cannot be built with --attention {attention}: {error}"
        ) from None
    return model


def _plain(name: str, channels: int, classes: int) -> nn.Module:
    library, _, architecture = name.partition("/")
    if library in SMALL:
        stages, width = SMALL[library]
        width = int(architecture) if architecture else width
        if width < 4:
            raise ValueError(f"its width must be at least 4, got {width}")
        return small(channels, classes, stages, width)
    if library == "timm":
        return timm.create_model(architecture, in_chans=channels, num_classes=classes)
    if library == "torchvision":
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
        return model
    names = ", ".join((*SMALL, "torchvision/NAME", "timm/NAME"))
    raise BadInput(f"--model: {name!r} is none of {names}")


def _insert(model: nn.Module, attention: str) -> None:
    """Puts a layer behind the last norm of every residual block, where insert_ppcr puts PPCR."""
    own = [block for block in model.modules() if isinstance(block, Block)]
    for block in own:
        block.attention = LAYERS[attention](block.body[-1].num_features)
    if own:
        return
    if attention == "ppcr":
        ppcr_ext.insert_ppcr(model)
        return
    last = {
        timm.models.resnet.BasicBlock: "bn2",
        timm.models.resnet.Bottleneck: "bn3",
        torchvision.models.resnet.BasicBlock: "bn2",
        torchvision.models.resnet.Bottleneck: "bn3",
    }
    blocks = [block for block in model.modules() if type(block) in last]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no residual block of torchvision's or timm's ResNets"
        )
    for block in blocks:
        norm = getattr(block, last[type(block)])
        layer = LAYERS[attention](norm.num_features)
        if hasattr(block, "se"):
            block.se = layer
        else:
            setattr(block, last[type(block)], nn.Sequential(norm, layer))
