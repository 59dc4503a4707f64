"""torchvision's residual blocks with PPCR. Imported only where torchvision is, by ``networks``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from .module import PPCR, can_fuse


class PPCRBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's ``BasicBlock``, ending in ``relu(ppcr(bn2(..)) + identity)``.

    It takes the same arguments.

    Attributes:
        ppcr: the :class:`ppcr_ext.PPCR` layer, or any other in its place; all other parameters
            keep their state-dict keys.
        fuse: recalibration, addition and ReLU in one pass (the default). Else, and where hooks
            look at the layer's own output or gradients, three steps with the same result.
    """

    fuse = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(self.conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return _end(self, self.bn2(self.conv2(x)), identity)


class PPCRBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's ``Bottleneck``, ending in ``relu(ppcr(bn3(..)) + identity)``.

    ResNet-50 and larger, ResNeXt and Wide ResNet are made of it. Arguments and attributes as for
    :class:`PPCRBasicBlock`.
    """

    fuse = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(self.conv3.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return _end(self, self.bn3(self.conv3(x)), identity)


def _end(block: PPCRBasicBlock | PPCRBottleneck, x: Tensor, identity: Tensor) -> Tensor:
    fused = block.fuse and can_fuse(block.ppcr)
    y: Tensor = block.ppcr(x, residual=identity) if fused else block.relu(block.ppcr(x) + identity)
    return y
