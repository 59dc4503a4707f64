"""The networks that insert_ppcr knows by itself, one row a kind, and what tests of them share."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import monai.networks.nets as monai
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet

from ppcr_ext import PPCR

SHALLOW = [1, 1, 1, 1]
WIDTHS = [16, 32, 48, 64]


@dataclass(frozen=True)
class Host:
    """How to build a network, the slot that the layer takes in a block, and an input's shape."""

    build: Callable[[], nn.Module]
    slot: str = "ppcr"
    shape: tuple[int, ...] = (4, 3, 64, 64)


HOSTS = {
    "torchvision resnet18": Host(lambda: torchvision.models.resnet18()),
    "torchvision resnet50": Host(lambda: torchvision.models.resnet50()),
    "torchvision resnext": Host(lambda: bottlenecks(groups=32, width_per_group=4)),
    "torchvision wide resnet": Host(lambda: bottlenecks(width_per_group=128)),
    "timm resnet18": Host(lambda: of_timm("resnet18"), "se"),
    "timm resnet50": Host(lambda: of_timm("resnet50"), "se"),
    "timm resnetblur": Host(lambda: of_timm("resnetblur50", layers=SHALLOW), "se"),
    "timm resnext": Host(lambda: of_timm("resnext50_32x4d", layers=SHALLOW), "se"),
    "monai resnet18 2d": Host(
        lambda: monai.resnet18(spatial_dims=2, n_input_channels=1, num_classes=4),
        shape=(4, 1, 64, 64),
    ),
    "monai basic 3d": Host(lambda: of_monai("basic", 3), shape=(2, 1, 32, 32, 32)),
    "monai bottleneck 3d": Host(lambda: of_monai("bottleneck", 3), shape=(2, 1, 32, 32, 32)),
    "monai shortcut A": Host(
        lambda: of_monai("basic", 2, shortcut_type="A", bias_downsample=False),
        shape=(4, 1, 64, 64),
    ),
    "monai flexible unet": Host(
        lambda: monai.FlexibleUNet(3, 2, "resnet18", decoder_channels=(32, 16, 16, 8, 8)),
        shape=(2, 3, 64, 64),
    ),
    "smp resnet encoder": Host(lambda: smp.encoders.get_encoder("resnet18", weights=None)),
    "smp resnext encoder": Host(
        lambda: smp.encoders.get_encoder("resnext50_32x4d", weights=None),
        shape=(2, 3, 64, 64),
    ),
    "smp unet": Host(lambda: smp.Unet("resnet34", encoder_weights=None), shape=(2, 3, 64, 64)),
    "smp deeplab": Host(
        lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_aspp_dropout=0),
    ),
    "smp unet, timm encoder": Host(
        lambda: smp.Unet("tu-resnet18", encoder_weights=None, zero_init_last=False),
        "se",
    ),
}


def bottlenecks(**options) -> nn.Module:
    return resnet.ResNet(resnet.Bottleneck, SHALLOW, **options)


def of_timm(name: str, **options) -> nn.Module:
    return timm.create_model(name, zero_init_last=False, **options)


def of_monai(block: str, dims: int, **options) -> nn.Module:
    return monai.ResNet(block, SHALLOW, WIDTHS, spatial_dims=dims, n_input_channels=1, **options)


def batch(shape: tuple[int, ...] = (4, 3, 64, 64)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def draw_weights(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, PPCR):
            nn.init.normal_(module.weight, generator=generator)


def hooked(host, names, model, inserted):
    """The host with the layers of ``model`` behind the named modules as hooks: an insertion that
    needs no block of ours."""
    layers = nn.ModuleList(copy.deepcopy(model.get_submodule(name)) for name in inserted)
    for name, layer in zip(names, layers, strict=True):
        host.get_submodule(name).register_forward_hook(lambda m, inputs, y, layer=layer: layer(y))
    return host, layers


def step(model: nn.Module, x: Tensor) -> Tensor:
    """All outputs in a row, after backward from the sum of their squares."""
    y = model(x)
    y = torch.cat([part.flatten() for part in y]) if isinstance(y, (list, tuple)) else y
    y.square().sum().backward()
    return y


BLOCKS = ("BasicBlock", "Bottleneck", "Bottle2neck", "ResNetBlock", "ResNetBottleneck")


def last_norms(model: nn.Module) -> list[str]:
    """The last normalization of every residual block, in the order of ``named_modules()``."""
    blocks = [(n, block) for n, block in model.named_modules() if type(block).__name__ in BLOCKS]
    return [f"{name}.bn{3 if hasattr(block, 'bn3') else 2}" for name, block in blocks]
