"""Gate maps on two real pictures: a fundus photograph and an immunohistochemical stain.

Both are bundled with scikit-image. For each picture a small residual network with PPCR learns to
remove noise from patches of it, which needs no labels. Its gate maps on the whole picture are then
drawn over the picture and summed up in gates.csv:

    python examples/gate_maps.py --out results/gates      # two minutes
"""

from pathlib import Path
from typing import Any

import files
import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import skimage.transform
import torch
from torch import Tensor, nn
from tqdm import tqdm

import ppcr_ext

PICTURES = {
    "retina": skimage.data.retina,
    "immunohistochemistry": skimage.data.immunohistochemistry,
}
QUANTILES = (0.05, 0.5, 0.95)
COLUMNS = (
    "picture",
    "layer",
    "mean",
    "std",
    "minimum",
    *(f"quantile_{q}" for q in QUANTILES),
    "maximum",
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.ppcr = ppcr_ext.PPCR(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.ppcr(self.body(x), x)


class Denoiser(nn.Module):
    """Predicts the noise in an RGB picture ``[N, 3, H, W]``."""

    def __init__(self, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.end = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.blocks(self.stem(x)))


def picture(name: str, side: int) -> Tensor:
    """``[1, 3, side, side]`` in [0, 1]."""
    image = skimage.transform.resize(PICTURES[name](), (side, side), anti_aliasing=True)
    return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]


def train(
    image: Tensor, steps: int, sigma: float = 0.1, patch: int = 32, batch: int = 16
) -> Denoiser:
    """A denoiser of patches of one picture; ``sigma`` is the standard deviation of the noise."""
    torch.manual_seed(0)
    model, side = Denoiser(), image.shape[-1]
    # The integration weights start at zero and steps are few: a higher rate lets them grow.
    gates = [p for name, p in model.named_parameters() if ".ppcr." in name]
    others = [p for name, p in model.named_parameters() if ".ppcr." not in name]
    optimizer = torch.optim.Adam([{"params": others, "lr": 3e-3}, {"params": gates, "lr": 6e-2}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [3e-3, 6e-2], total_steps=steps + 1)
    bar = tqdm(range(steps), "training", disable=None)
    for _ in bar:
        corners = torch.randint(0, side - patch + 1, (batch, 2)).tolist()
        clean = torch.cat(
            [image[..., top : top + patch, left : left + patch] for top, left in corners]
        )
        noise = sigma * torch.randn_like(clean)
        loss = nn.functional.mse_loss(model(clean + noise), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(unexplained=f"{loss.item() / sigma**2:.3f}")
    return model.eval()


def draw(path: Path, image: Tensor, gates: dict[str, np.ndarray], title: str) -> None:
    """The picture, and every layer's gate map over it, on a colour scale of the layer's own."""
    rows = -(-(len(gates) + 1) // 3)
    figure, grid = plt.subplots(
        rows, 3, figsize=(12, 4.2 * rows), layout="constrained", sharex=True, sharey=True
    )
    axes = grid.flat
    for panel in axes[len(gates) + 1 :]:
        panel.set_visible(False)
    shown = image[0].permute(1, 2, 0).numpy()
    axes[0].imshow(shown)
    axes[0].set(title="picture")
    for panel, (name, gate) in zip(axes[1 : len(gates) + 1], gates.items(), strict=True):
        low, high = np.quantile(gate, (0.01, 0.99))
        panel.imshow(shown.mean(-1), cmap="gray", vmin=0, vmax=1)
        overlay = panel.imshow(gate, cmap="viridis", alpha=0.75, vmin=low, vmax=high)
        panel.set(title=name)
        bar = figure.colorbar(overlay, ax=panel, shrink=0.8, extend="both")
        bar.set_label("gate")
        bar.solids.set_alpha(1)
    figure.supxlabel("column (pixels)")
    figure.supylabel("row (pixels)")
    figure.suptitle(title)
    files.write_atomically(path, lambda part: figure.savefig(part, dpi=110))
    plt.close(figure)


def statistics(name: str, layer: str, gate: Tensor) -> dict[str, Any]:
    quantiles = torch.quantile(gate.flatten(), torch.tensor(QUANTILES)).tolist()
    values = (
        name,
        layer,
        *(f"{v:.5f}" for v in (gate.mean(), gate.std(), gate.min(), *quantiles, gate.max())),
    )
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = files.Parser(description="Gate maps on two real pictures.")
    parser.add_argument("--out", type=Path, default=Path("results/gates"))
    parser.add_argument("--steps", type=int, default=400, help="training steps for each picture")
    parser.add_argument(
        "--side", type=int, default=256, help="side in pixels to which the pictures are brought"
    )
    options = parser.parse_args()
    if options.steps < 1 or options.side < 32:
        raise files.BadInput("--steps must be at least 1 and --side at least 32")
    files.make_folder(options.out)
    rows = []
    for name in PICTURES:
        image = picture(name, options.side)
        model = train(image, options.steps)
        with torch.no_grad(), ppcr_ext.record_gates(model) as recorded:
            model(image)
        gates = {layer: maps[0][0, 0] for layer, maps in recorded.items()}
        draw(
            options.out / f"{name}.png",
            image,
            {layer: gate.numpy() for layer, gate in gates.items()},
            f"PPCR gates of a denoiser: {name}",
        )
        rows += [statistics(name, layer, gate) for layer, gate in gates.items()]
        print(f"{options.out / name}.png: {len(gates)} layers")
    files.write_csv(options.out / "gates.csv", rows, COLUMNS)


if __name__ == "__main__":
    files.run(main)
