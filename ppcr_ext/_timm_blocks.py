"""timm's residual blocks with PPCR in their ``se`` slot, which ``networks`` imports."""

from __future__ import annotations

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .module import can_fuse


class PPCRBasicBlock(BasicBlock):
    """timm's ``BasicBlock``, ending in ``relu(ppcr(bn2(..)) + shortcut)``.

    Attributes:
        se: the :class:`ppcr_ext.PPCR` layer, or any other in its place.
        fuse: whether recalibration, addition and ReLU run in one pass, which needs a block without
            stochastic depth and with ReLU. Otherwise, and while hooks look at the layer's own
            output or gradients, they run in three steps.
    """

    fuse = True

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))  # type: ignore[misc]
        return _end(self, self.bn2(self.conv2(x)), shortcut, self.act2)


class PPCRBottleneck(Bottleneck):
    """timm's ``Bottleneck``, ending in ``relu(ppcr(bn3(..)) + shortcut)``. Its attributes
    are those of :class:`PPCRBasicBlock`.
    """

    fuse = True

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))  # type: ignore[misc]
        return _end(self, self.bn3(self.conv3(x)), shortcut, self.act3)


def _end(
    block: PPCRBasicBlock | PPCRBottleneck, x: Tensor, shortcut: Tensor, activation: nn.Module
) -> Tensor:
    if block.fuse and can_fuse(block.se):
        y: Tensor = block.se(x, residual=shortcut)
        return y
    x = x if block.se is None else block.se(x)
    x = x if block.drop_path is None else block.drop_path(x)
    y = activation(x + shortcut)  # not in place, where backward hooks of the layer would fail
    return y
