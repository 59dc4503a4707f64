"""MONAI's residual blocks, of any number of spatial dimensions, with PPCR.

Imported only where MONAI is, by ``networks``.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck
from torch import Tensor

from .module import PPCR, end_of_block


class PPCRResNetBlock(ResNetBlock):
    """MONAI's ``ResNetBlock``, ending in ``relu(ppcr(bn2(..)) + residual)``. It takes the same
    arguments.

    Attributes:
        ppcr: the :class:`ppcr_ext.PPCR` layer, or any other in its place; all other parameters keep
            their state-dict keys.
        fuse: whether recalibration, addition and ReLU run in one pass, which is the default.
            Otherwise, and while hooks look at the layer's own output or gradients, they run in
            three steps with the same result.
    """

    fuse = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(self.conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        return end_of_block(self, self.bn2(self.conv2(x)), residual, self.act)


class PPCRResNetBottleneck(ResNetBottleneck):
    """MONAI's ``ResNetBottleneck``, ending in ``relu(ppcr(bn3(..)) + residual)``. It takes the same
    arguments, and has the attributes of :class:`PPCRResNetBlock`.
    """

    fuse = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(self.conv3.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        return end_of_block(self, self.bn3(self.conv3(x)), residual, self.act)
