"""torchvision's ResNet-50 with PPCR in every residual block."""

from __future__ import annotations

import torch
import torchvision
from torchvision.models.resnet import ResNet

import ppcr_ext


def resnet50() -> ResNet:
    """50 layers, 16 of PPCR, random weights from torch's current seed; the integration weights are drawn too."""
    model = torchvision.models.resnet50()
    for name in ppcr_ext.insert_ppcr(model):
        # zero, where training starts, would leave every gate equal
        torch.nn.init.normal_(model.get_submodule(name).weight, std=0.5)
    return model
