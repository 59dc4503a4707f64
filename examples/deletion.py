"""The deletion test: how fast accuracy falls as the pixels that an explanation ranks first go.

A pixel is removed by setting it to 0, the mean of the training images. Three controls stand beside
the gates: random pixels; the gates of another image, which have the same shapes and places but know
nothing of this image; and gates with random integration weights, which see this image but have
learned nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comparison
import files
import matplotlib.pyplot as plt
import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from scipy import stats
from torch import Tensor, nn

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
RANDOM, OTHER = "random pixels", "gates of another image"
GATES, GRAD_CAM = "highest gates", "Grad-CAM"
UNTRAINED = "gates with random weights"
CURVES = ("removed_first", "fraction", "accuracy", "low", "high")
AREAS = (
    *("removed_first", "mean_accuracy", "than", "than_mean_accuracy"),
    *("difference", "bootstrap_low", "bootstrap_high"),
)
PAIRS = (
    *((GATES, name) for name in (RANDOM, OTHER, UNTRAINED, GRAD_CAM)),
    *((name, RANDOM) for name in (OTHER, UNTRAINED, GRAD_CAM)),
)


def gate_scores(gates: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
    """``[N, H, W]``: the gate maps brought to the image's size, standardized within each map so
    that every layer counts the same, and averaged over the layers."""
    maps = []
    for gate in gates.values():
        resized = nn.functional.interpolate(
            gate.float(), tuple(size), mode="bilinear", align_corners=False
        )
        spread = resized.std((2, 3), keepdim=True)
        centred = resized - resized.mean((2, 3), keepdim=True)
        # What rounding leaves of a constant map must not become a ranking.
        maps.append(torch.where(spread > 1e-5, centred / spread.clamp_min(1e-5), 0.0))
    return torch.stack(maps).mean(0)[:, 0]


def grad_cam_scores(model: nn.Module, layer: nn.Module, images: Tensor, batch: int) -> Tensor:
    """``[N, H, W]``: captum's Grad-CAM of the predicted class."""
    method = LayerGradCam(model, layer)
    maps = []
    for part in images.split(batch):
        with torch.no_grad():
            predicted = model(part).argmax(1)
        cam = method.attribute(part, target=predicted, relu_attributions=True)
        size = tuple(images.shape[2:])
        maps.append(LayerAttribution.interpolate(cam, size, "bilinear").detach()[:, 0])
    return torch.cat(maps)


def ranks(scores: Tensor, generator: torch.Generator) -> Tensor:
    """``[N, H, W]``: 0 for the pixel with the highest score; equal scores in a random order."""
    flat = scores.flatten(1).cpu()
    shuffled = torch.rand(flat.shape, generator=generator).argsort(1)
    order = flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(flat.shape[1]).expand_as(flat)
    found = torch.empty_like(places).scatter_(1, shuffled.gather(1, order), places)
    return found.view(scores.shape)


@torch.no_grad()
def correct_without(
    model: nn.Module, images: Tensor, labels: Tensor, rank: Tensor, batch: int
) -> np.ndarray:
    """``[1 + len(FRACTIONS), N]``: whether each image is classified rightly, at first whole."""
    pixels = rank[0].numel()
    rows = []
    for fraction in (0.0, *FRACTIONS):
        kept = (rank >= round(fraction * pixels)).to(images.device)[:, None]
        parts = zip(images.split(batch), kept.split(batch), labels.split(batch), strict=True)
        rows.append(torch.cat([model(i * k).argmax(1) == y for i, k, y in parts]))
    return torch.stack(rows).double().cpu().numpy()


def run(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    scores: Mapping[str, Sequence[Tensor]],
    draws: int,
    batch: int,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """:func:`correct_without` for everything that ranks pixels, averaged over several rankings.

    To ``scores``, which hold the gates, it adds random pixels and the gates of another image.
    """
    generator = torch.Generator().manual_seed(0)
    (gates,) = scores[GATES]
    shifts = torch.randperm(len(images) - 1, generator=generator)[:draws] + 1
    controls = {
        OTHER: [gates.roll(int(shift), 0) for shift in shifts],
        RANDOM: [torch.zeros_like(gates)] * draws,
    }

    def removed(chosen: Tensor) -> np.ndarray:
        found = correct_without(model, images, labels, ranks(chosen, generator), batch)
        tick()
        return found

    return {
        name: np.mean([removed(one) for one in several], 0)
        for name, several in (dict(scores) | controls).items()
    }


def curves(found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Accuracies with their 95 % interval (Wilson's) for other images of the same kind."""
    rows = []
    for name, correct in found.items():
        for fraction, line in zip((0.0, *FRACTIONS), correct, strict=True):
            count = stats.binomtest(round(line.sum()), len(line))
            interval = count.proportion_ci(method="wilson")
            values = (line.mean(), interval.low, interval.high)
            rounded = (round(float(value), 6) for value in values)
            rows.append(dict(zip(CURVES, (name, fraction, *rounded), strict=True)))
    return rows


def areas(found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Mean accuracies over all fractions, in pairs, with a bootstrap interval over the images.

    A difference below zero says that what is removed first counts more than what it is compared to.
    """
    means = {name: correct[1:].mean(0) for name, correct in found.items()}
    rows = []
    for name, than in PAIRS:
        if name in means and than in means:
            values = (means[name], means[than], means[name] - means[than])
            averages = [float(value.mean()) for value in values]
            interval = comparison.bootstrap_interval(values[2])
            rounded = (round(value, 6) for value in (*averages, *interval))
            keys = (AREAS[1], *AREAS[3:])
            rows.append({AREAS[0]: name, AREAS[2]: than} | dict(zip(keys, rounded, strict=True)))
    return rows


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the areas allow to be said."""
    says = []
    for row in rows:
        low, high = row["bootstrap_low"], row["bootstrap_high"]
        verb = (
            "costs more than" if high < 0 else "costs less than" if low > 0 else "costs as much as"
        )
        figures = f"({row['difference']:+.3f}, interval {low:+.3f} to {high:+.3f})"
        says.append(f"{row['removed_first']}: {verb} {row['than']} {figures}")
    return "Mean accuracy while pixels are removed. " + "; ".join(says) + "."


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    styles = {
        GATES: ("-", "o", "black"),
        GRAD_CAM: ("-", "^", "0.45"),
        OTHER: (":", "s", "black"),
        UNTRAINED: ("-.", "v", "0.25"),
        RANDOM: ("--", "x", "0.45"),
    }
    for name in dict.fromkeys(row["removed_first"] for row in rows):
        shown = [row for row in rows if row["removed_first"] == name]
        line, marker, colour = styles[name]
        accuracy = np.array([row["accuracy"] for row in shown])
        below = accuracy - [row["low"] for row in shown]
        above = [row["high"] for row in shown] - accuracy
        axes.errorbar(
            [row["fraction"] for row in shown],
            accuracy,
            [below.clip(0), above.clip(0)],
            linestyle=line,
            marker=marker,
            color=colour,
            capsize=2,
            elinewidth=0.8,
            label=name,
        )
    axes.set(xlabel="share of the pixels removed", ylabel="accuracy (bars: 95 % intervals)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="removed first")
    files.write_atomically(path, lambda part: figure.savefig(part, dpi=100))
    plt.close(figure)
