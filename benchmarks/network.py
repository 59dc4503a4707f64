"""torchvision's ResNet-50 with PPCR in every residual block: after the last batch norm, before the addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

import ppcr_ext


class PPCRBottleneck(Bottleneck):
    """``relu(ppcr(bn3(..)) + identity)``, the recalibration, the addition and the ReLU in one pass."""

    def __init__(self, inplanes: int, planes: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.ppcr = ppcr_ext.PPCR(planes * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.recalibrate(self.bn3(self.conv3(out)), identity)

    def recalibrate(self, x: Tensor, identity: Tensor) -> Tensor:
        """The end of the block, apart from its start so that a benchmark can listen in."""
        return self.ppcr.add_relu(x, identity)


def resnet50() -> ResNet:
    """50 layers, 16 of PPCR, random weights from torch's current seed; the integration weights are drawn too."""
    model = ResNet(PPCRBottleneck, [3, 4, 6, 3])
    for module in model.modules():
        if isinstance(module, ppcr_ext.PPCR):
            torch.nn.init.normal_(module.weight, std=0.5)  # zero, where training starts, would leave every gate equal
    return model
