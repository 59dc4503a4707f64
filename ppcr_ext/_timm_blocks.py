"""timm's residual blocks with PPCR in their ``se`` slot, fused with the addition and the ReLU. Imported only where timm is."""

from __future__ import annotations

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor

from .module import PPCR


class PPCRBasicBlock(BasicBlock):
    """timm's ``BasicBlock`` without stochastic depth and with ReLU; ``se`` is a :class:`ppcr_ext.PPCR`."""

    se: PPCR

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))  # type: ignore[misc]
        return self.se.add_relu(self.bn2(self.conv2(x)), shortcut)


class PPCRBottleneck(Bottleneck):
    """timm's ``Bottleneck`` without stochastic depth and with ReLU; ``se`` is a :class:`ppcr_ext.PPCR`."""

    se: PPCR

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))  # type: ignore[misc]
        return self.se.add_relu(self.bn3(self.conv3(x)), shortcut)
