"""timm's residual blocks with PPCR in their ``se`` slot, which ``networks`` imports."""

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor

from .module import ResidualBlock


class PPCRBasicBlock(ResidualBlock, BasicBlock):
    """timm's ``BasicBlock``, ending in ``relu(ppcr(bn2(..)) + shortcut)``.

    Attributes:
        se: the :class:`ppcr_ext.PPCR` layer, or any other in its place.
        fuse: whether recalibration, addition and ReLU run in one pass, which needs a block without
            stochastic depth and with ReLU. Otherwise, and while hooks look at the layer's own
            output or gradients, they run in three steps.
    """

    _layer, _activation = "se", "act2"

    def _branch(self: Any, x: Tensor) -> Any:
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return self.bn2(self.conv2(x))


class PPCRBottleneck(ResidualBlock, Bottleneck):
    """timm's ``Bottleneck``, ending in ``relu(ppcr(bn3(..)) + shortcut)``. Its attributes
    are those of :class:`PPCRBasicBlock`.
    """

    _layer, _activation = "se", "act3"

    def _branch(self: Any, x: Tensor) -> Any:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        return self.bn3(self.conv3(x))
