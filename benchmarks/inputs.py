"""What is measured: real feature maps of a photograph in a ResNet-50, or random ones of many shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppcr_ext

LEVELS = (1, 2, 4)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SWEEP = (
    (8, 64, 56, 56),
    (8, 256, 56, 56),
    (8, 512, 28, 28),
    (8, 1024, 14, 14),
    (8, 2048, 7, 7),
    (1, 64, 224, 224),
    (64, 32, 32, 32),
    (32, 64, 8, 8),
)


@dataclass
class Case:
    """One input of the layer, float32 and contiguous; ``gy`` is the gradient that comes back to its output."""

    name: str
    x: Tensor
    gy: Tensor
    weight: Tensor
    bias: Tensor

    def tensors(self, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x and gy in a layout and dtype of :data:`LAYOUTS` and torch."""
        memory_format = LAYOUTS[layout]
        x, gy = (t.to(dtype).contiguous(memory_format=memory_format) for t in (self.x, self.gy))
        return x, gy


def sweep_cases() -> list[Case]:
    """Random inputs of :data:`SWEEP`: channels drawn from 1.5 + 2 N(0, 1), gradients from N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (
        torch.randn(sum(LEVELS), generator=generator),
        torch.randn(1, generator=generator),
    )
    cases = []
    for shape in SWEEP:
        x = 1.5 + 2 * torch.randn(shape, generator=generator)
        cases.append(
            Case(
                "x".join(map(str, shape)), x, torch.randn(shape, generator=generator), weight, bias
            )
        )
    return cases


def retina_batch(size: int = 224) -> Tensor:
    """``[8, 3, size, size]``: the fundus photograph that scikit-image bundles, whole in four flips, and four crops."""
    import skimage.data

    photograph = torch.from_numpy(skimage.data.retina()).permute(2, 0, 1)[None].float() / 255
    side, crop = photograph.shape[-1], photograph.shape[-1] * 2 // 3
    corners = [(top, left) for top in (0, side - crop) for left in (0, side - crop)]
    crops = [photograph[..., top : top + crop, left : left + crop] for top, left in corners]
    flips = [photograph.flip(dims) for dims in ((), (2,), (3,), (2, 3))]
    batch = torch.cat(
        [
            F.interpolate(view, (size, size), mode="bilinear", antialias=True)
            for view in flips + crops
        ]
    )
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]),
        torch.tensor([0.229, 0.224, 0.225]),
    )  # ImageNet's, as usual
    return (batch - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def retina_cases() -> list[Case]:
    """What the PPCR layers see on the photograph in a training step of ResNet-50: of each stage, the last block's.

    x is that layer's real input and gy the real gradient of its output, scaled to a mean square of one.
    """
    from .network import resnet50

    torch.manual_seed(0)
    model = resnet50().train()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(stage: str, layer: ppcr_ext.PPCR) -> None:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            y.retain_grad()
            # Of the layer alone: where a hook looks, the block adds by itself.
            seen[stage] = (inputs[0], y)

        layer.register_forward_hook(keep)

    layers = {
        stage: getattr(model, stage)[-1].ppcr for stage in ("layer1", "layer2", "layer3", "layer4")
    }
    for stage, layer in layers.items():
        listen(stage, layer)
    batch = retina_batch()
    F.cross_entropy(model(batch), torch.arange(len(batch))).backward()

    cases = []
    for stage, (x, y) in seen.items():
        assert y.grad is not None
        gy = y.grad
        gy = gy / gy.square().mean().sqrt()
        layer = layers[stage]
        name = f"{stage} {'x'.join(map(str, x.shape))}"
        cases.append(
            Case(
                name,
                x.detach().contiguous(),
                gy.detach().contiguous(),
                layer.weight.data,
                layer.bias.data,
            )
        )
    return cases
