"""Looks into a network that examples/train.py or compare.py has trained with PPCR.

    python examples/explain.py --run results/compare/runs/seed0/ppcr --out results/explain

It writes the gates by layer and class (gates.csv, histograms.png), their mean maps for right and
wrong predictions (maps.csv, maps.png), and a deletion test against random pixels and Grad-CAM
(deletion.csv, areas.csv, deletion.png). docs/explaining.md says what these show and do not show.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import deletion
import files
import matplotlib.pyplot as plt
import numpy as np
import torch
import train
from files import BadInput
from models import build
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import ppcr_ext

QUANTILES = (0.05, 0.5, 0.95)
COLUMNS = ("layer", "class", "predictions", "images", "mean", "std", *(f"q{q}" for q in QUANTILES))
MAPS = ("layer", "predictions", "row", "column", "mean")
KINDS = ("all", "correct", "wrong")


@dataclass
class Seen:
    """Test images, and what the network makes of them."""

    images: Tensor
    labels: Tensor
    predicted: Tensor
    gates: dict[str, Tensor]  # by layer [N, 1, h, w]
    untrained: list[dict[str, Tensor]]  # the same with random weights, several times

    def chosen(self, kind: str) -> Tensor:
        right = self.predicted == self.labels
        return {"all": torch.ones_like(right), "correct": right, "wrong": ~right}[kind]


def trained(run: Path, device: torch.device) -> tuple[nn.Module, data.Data, Any]:
    """The network of a run, its data without augmentation, and the options it was trained with."""
    state = train.read_checkpoint(run / "checkpoint.pt", "--run")
    options = argparse.Namespace(**state["identity"])
    if options.attention != "ppcr":
        raise BadInput(f"--run: {run} was trained with --attention {options.attention}, not ppcr")
    source = data.load(options.data, False, options.image_size)
    model = build(options.model, options.attention, source.channels, source.classes)
    model.load_state_dict(state["model"])
    return model.to(device).eval(), source, options


class Untrained:
    """Computes what the gates would be with random integration weights, as long as it is entered.

    The network itself keeps its own gates: layers behind see what they were trained on.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        self.maps: list[dict[str, list[Tensor]]] = [{} for _ in range(draws)]
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, ppcr_ext.PPCR)}
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            name: torch.randn(draws, len(layer.weight), generator=generator).to(layer.weight)
            for name, layer in self.layers.items()
        }
        for name, layer in self.layers.items():  # as large as the learned ones
            drawn = self.weights[name]
            drawn *= layer.weight.norm() / drawn.norm(dim=1, keepdim=True)

    def __enter__(self) -> Untrained:
        self.hooks = [
            layer.register_forward_pre_hook(functools.partial(self._record, name))
            for name, layer in self.layers.items()
        ]
        return self

    def _record(self, name: str, layer: ppcr_ext.PPCR, inputs: tuple[Tensor, ...]) -> None:
        options = {"levels": layer.levels, "eps": layer.eps}
        for maps, weight in zip(self.maps, self.weights[name], strict=True):
            gate = ppcr_ext.ppcr_gate(inputs[0], weight, layer.bias, **options)
            maps.setdefault(name, []).append(gate)

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _joined(maps: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {layer: torch.cat(parts).float() for layer, parts in maps.items()}


@torch.no_grad()
def look(
    model: nn.Module, dataset: Any, count: int, draws: int, batch: int, device: torch.device
) -> Seen:
    """At most ``count`` images, drawn at random: the files of a folder come class by class."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(dataset), generator=generator)[:count].sort().values.tolist()
    images, labels, predicted = [], [], []
    with ppcr_ext.record_gates(model) as recorded, Untrained(model, draws) as untrained:
        for some, truth in DataLoader(Subset(dataset, drawn), batch):
            images.append(some.to(device))
            labels.append(truth.to(device))
            predicted.append(model(images[-1]).argmax(1))
    return Seen(
        *(torch.cat(parts) for parts in (images, labels, predicted)),
        _joined(recorded),
        [_joined(maps) for maps in untrained.maps],
    )


def gate_rows(seen: Seen, classes: int) -> list[dict[str, Any]]:
    """Statistics over all pixels, by layer, class and whether the prediction is right."""
    rows = []
    for layer, gates in seen.gates.items():
        for label in range(classes):
            for kind in KINDS:
                chosen = seen.chosen(kind) & (seen.labels == label)
                row = dict.fromkeys(COLUMNS) | {"layer": layer, "class": label}
                row |= {"predictions": kind, "images": int(chosen.sum())}
                if chosen.any():
                    values = gates[chosen].double().cpu().numpy()
                    found = (values.mean(), values.std(), *np.quantile(values, QUANTILES))
                    row |= zip(COLUMNS[4:], (round(float(v), 6) for v in found), strict=True)
                rows.append(row)
    return rows


def mean_maps(seen: Seen) -> dict[str, dict[str, np.ndarray | None]]:
    """``{layer: {kind: [h, w]}}``; None where no prediction is of that kind."""
    return {
        layer: {
            kind: gates[chosen].mean((0, 1)).cpu().numpy() if chosen.any() else None
            for kind in ("correct", "wrong")
            for chosen in [seen.chosen(kind)]
        }
        for layer, gates in seen.gates.items()
    }


def map_rows(maps: Mapping[str, Mapping[str, np.ndarray | None]]) -> list[dict[str, Any]]:
    return [
        dict(zip(MAPS, (layer, kind, row, column, round(float(value), 6)), strict=True))
        for layer, kinds in maps.items()
        for kind, found in kinds.items()
        if found is not None
        for (row, column), value in np.ndenumerate(found)
    ]


def draw_histograms(path: Path, seen: Seen, classes: int, title: str) -> None:
    """A panel for each layer: a line for each class, the darker the more pixels have the gate."""
    columns = min(4, len(seen.gates))
    lines = -(-len(seen.gates) // columns)
    size = (3.1 * columns + 0.8, (1.4 + 0.18 * classes) * lines + 0.8)
    figure, grid = plt.subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained", sharey=True
    )
    for panel, (layer, gates) in zip(grid.flat, seen.gates.items(), strict=False):
        low, high = float(gates.min()), float(gates.max())
        edges = np.linspace(low - 1e-4, high + 1e-4, 41)
        shares = np.full((classes, 40), np.nan)
        for label in range(classes):
            values = gates[seen.labels == label].flatten().cpu().numpy()
            if len(values):
                shares[label] = np.histogram(values, edges)[0] / len(values)
        mesh = panel.pcolormesh(edges, np.arange(classes + 1) - 0.5, shares, cmap="Greys", vmin=0)
        figure.colorbar(mesh, ax=panel, label="share of the pixels")
        panel.set(title=layer, xlabel="gate")
        panel.yaxis.get_major_locator().set_params(integer=True)
    for panel in grid.flat[len(seen.gates) :]:
        panel.set_axis_off()
    for line in grid:
        line[0].set_ylabel("class")
    figure.suptitle(f"Gates by layer and class: {title}")
    files.write_atomically(path, lambda part: figure.savefig(part, dpi=100))
    plt.close(figure)


def draw_maps(
    path: Path, maps: Mapping[str, Mapping[str, np.ndarray | None]], seen: Seen, title: str
) -> None:
    """Mean maps of right and of wrong predictions on one scale a layer, and their difference."""
    size = (2.5 * len(maps) + 0.5, 7)
    figure, grid = plt.subplots(3, len(maps), figsize=size, squeeze=False, layout="constrained")
    for column, (layer, kinds) in enumerate(maps.items()):
        there = [found for found in kinds.values() if found is not None]
        limits = min(found.min() for found in there), max(found.max() for found in there)
        shown = dict(kinds)
        if len(there) == 2:
            shown["correct - wrong"] = kinds["correct"] - kinds["wrong"]  # type: ignore[operator]
        for panel, kind in zip(
            grid[:, column], ("correct", "wrong", "correct - wrong"), strict=True
        ):
            found = shown.get(kind)
            panel.set(xticks=[], yticks=[])
            if found is None:
                panel.annotate("no image", (0.5, 0.5), xycoords="axes fraction", ha="center")
                continue
            difference = kind == "correct - wrong"
            most = max(float(np.abs(found).max()), 1e-6)
            low, high = (-most, most) if difference else limits
            image = panel.imshow(found, cmap="gray", vmin=low, vmax=high)
            label = "difference" if difference else "mean gate"
            figure.colorbar(image, ax=panel, shrink=0.75, label=label)
        grid[0][column].set_title(layer, fontsize=9)
    counts = [int(seen.chosen(kind).sum()) for kind in ("correct", "wrong")]
    for panel, name in zip(
        grid[:, 0],
        (f"correct ({counts[0]} images)", f"wrong ({counts[1]} images)", "correct - wrong"),
        strict=True,
    ):
        panel.set_ylabel(name)
    figure.suptitle(f"Mean gate maps by layer: {title}")
    files.write_atomically(path, lambda part: figure.savefig(part, dpi=100))
    plt.close(figure)


def last_block(model: nn.Module) -> nn.Module:
    """The residual block with the last PPCR layer: what Grad-CAM looks at."""
    names = [name for name, m in model.named_modules() if isinstance(m, ppcr_ext.PPCR)]
    return model.get_submodule(names[-1].rpartition(".")[0])


def arguments() -> Any:
    parser = files.Parser(description="Gates, their maps and a deletion test of a trained network.")
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run with PPCR")
    parser.add_argument("--out", type=Path, default=Path("results/explain"))
    parser.add_argument("--images", type=int, default=1000, help="test images at most (1000)")
    parser.add_argument("--draws", type=int, default=5, help="random drawings of a control (5)")
    parser.add_argument(
        "--layers", help="layers whose gates rank the pixels, with commas between them (all)"
    )
    found = parser.parse_args()
    for name, least in (("images", 2), ("draws", 1)):
        if getattr(found, name) < least:
            raise BadInput(f"--{name} must be at least {least}, got {getattr(found, name)}")
    return found


def main() -> None:
    options = arguments()
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, source, trained_with = trained(options.run, device)
    layers = [name for name, m in model.named_modules() if isinstance(m, ppcr_ext.PPCR)]
    ranking = options.layers.split(",") if options.layers else layers
    for name in ranking:
        if name not in layers:
            raise BadInput(f"--layers: {name!r} is none of {', '.join(layers)}")
    files.make_folder(options.out)
    batch = trained_with.batch
    seen = look(model, source.test, options.images, options.draws, batch, device)
    title = f"{Path(trained_with.data).stem}, {trained_with.model}, {len(seen.images)} test images"
    maps = mean_maps(seen)
    files.write_csv(options.out / "gates.csv", gate_rows(seen, source.classes), COLUMNS)
    files.write_csv(options.out / "maps.csv", map_rows(maps), MAPS)
    draw_histograms(options.out / "histograms.png", seen, source.classes, title)
    draw_maps(options.out / "maps.png", maps, seen, title)

    def scores_of(gates: Mapping[str, Tensor]) -> Tensor:
        chosen = {name: gates[name] for name in ranking}
        return deletion.gate_scores(chosen, seen.images.shape[2:])

    cam = deletion.grad_cam_scores(model, last_block(model), seen.images, batch)
    scores = {
        deletion.GATES: [scores_of(seen.gates)],
        deletion.GRAD_CAM: [cam],
        deletion.UNTRAINED: [scores_of(gates) for gates in seen.untrained],
    }
    with tqdm(total=2 + 3 * options.draws, desc="deletion test", disable=None) as bar:
        found = deletion.run(
            model, seen.images, seen.labels, scores, options.draws, batch, bar.update
        )
    rows, areas = deletion.curves(found), deletion.areas(found)
    files.write_csv(options.out / "deletion.csv", rows, deletion.CURVES)
    files.write_csv(options.out / "areas.csv", areas, deletion.AREAS)
    deletion.draw(options.out / "deletion.png", rows, f"Deletion test: {title}")
    print(deletion.sentence(areas))


if __name__ == "__main__":
    files.run(main)
