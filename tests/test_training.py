"""Training with the fused layer follows training with the definition."""

import pytest
import torch
from torch import nn

from ppcr_ext import PPCR

pytestmark = pytest.mark.full
datasets = pytest.importorskip("sklearn.datasets")


class Block(nn.Module):
    """A residual block that ends in the fused add and ReLU."""

    def __init__(self, channels, backend):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.ppcr = PPCR(channels, backend=backend)

    def forward(self, x):
        return self.ppcr.add_relu(self.norm(self.conv(x)), x)


def losses(backend, memory_format):
    torch.manual_seed(0)
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), PPCR(16, backend=backend), nn.ReLU(), Block(16, backend),
        nn.MaxPool2d(2), Block(16, backend),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).to(memory_format=memory_format)  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    found = []
    for step in range(30):
        batch = slice(64 * step % 1728, 64 * step % 1728 + 64)
        loss = nn.functional.cross_entropy(
            network(images[batch].contiguous(memory_format=memory_format)), labels[batch]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    weights = [m.weight for m in network.modules() if isinstance(m, PPCR)]
    return torch.tensor(found), weights


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_thirty_steps_on_digits(memory_format):
    fused, fused_weights = losses("native", memory_format)
    plain, plain_weights = losses("reference", memory_format)
    # Rounding differences grow from a unit roundoff at the start to a thousand after 30 steps.
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=0)
    assert plain[-5:].mean() < 0.8 * plain[0]
    for a, b in zip(fused_weights, plain_weights, strict=True):
        assert b.abs().max() > 1e-3  # the layer itself has learnt
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)
