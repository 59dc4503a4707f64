"""MONAI's residual blocks, of any number of spatial dimensions, with PPCR.

Imported only where MONAI is, by ``networks``.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck
from torch import Tensor

from .module import PPCR, ResidualBlock


class PPCRResNetBlock(ResidualBlock, ResNetBlock):
    """MONAI's ``ResNetBlock``, ending in ``relu(ppcr(bn2(..)) + residual)``. It takes the same
    arguments.

    Attributes:
        ppcr: the :class:`ppcr_ext.PPCR` layer, or any other in its place; all other parameters keep
            their state-dict keys.
        fuse: whether recalibration, addition and ReLU run in one pass, which is the default.
            Otherwise, and while hooks look at the layer's own output or gradients, they run in
            three steps with the same result.
    """

    _activation = "act"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(self.conv2.out_channels)

    def _branch(self, x: Tensor) -> Any:
        x = self.act(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class PPCRResNetBottleneck(ResidualBlock, ResNetBottleneck):
    """MONAI's ``ResNetBottleneck``, ending in ``relu(ppcr(bn3(..)) + residual)``. It takes the same
    arguments, and has the attributes of :class:`PPCRResNetBlock`.
    """

    _activation = "act"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(self.conv3.out_channels)

    def _branch(self, x: Tensor) -> Any:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))
