"""What a classifier is judged by, and the tables and pictures of one run and of many."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from comparison import BASELINE, METRICS, Comparison
from files import write_atomically
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, roc_auc_score
from torch import Tensor

COLUMNS = ("epoch", "train_loss", "loss", "accuracy", "macro_f1", "auc", "kappa", "seconds")


def metrics(logits: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Loss, accuracy, macro F1, one-against-rest macro AUC and Cohen's kappa.

    ``logits`` are ``[N, classes]``.

    The AUC is NaN where a class has no image among the labels, or the network puts out NaN.
    """
    found, truth = logits.argmax(1).numpy(), labels.numpy()
    probabilities = logits.double().softmax(1).numpy()
    auc = float("nan")
    if len(np.unique(truth)) == classes > 1 and np.isfinite(probabilities).all():
        auc = roc_auc_score(
            truth, probabilities[:, 1] if classes == 2 else probabilities, multi_class="ovr"
        )
    return {
        "loss": float(torch.nn.functional.cross_entropy(logits, labels)),
        "accuracy": float(accuracy_score(truth, found)),
        "macro_f1": float(f1_score(truth, found, average="macro", zero_division=0)),
        "auc": float(auc),
        "kappa": float(cohen_kappa_score(truth, found, labels=np.arange(classes))),
    }


def draw(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Loss and validation metrics by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for column, label in (("train_loss", "training"), ("loss", "validation")):
        left.plot(epochs, [row[column] for row in rows], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    _log_scale(left)
    for column, label in (
        ("accuracy", "accuracy"),
        ("macro_f1", "macro F1"),
        ("auc", "AUC"),
        ("kappa", "Cohen's kappa"),
    ):
        right.plot(epochs, [row[column] for row in rows], marker=".", label=label)
    right.set(xlabel="epoch", ylabel="on the validation images", title="Metrics")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    write_atomically(path, figure.savefig)
    plt.close(figure)


def _log_scale(axes: Any) -> None:
    """For losses, unless none of them is a number: matplotlib has no such scale."""
    if any(np.isfinite(line.get_ydata()).any() for line in axes.get_lines()):
        axes.set_yscale("log")


def table(found: Comparison, costs: Sequence[Mapping[str, str]]) -> str:
    """Markdown: a line for each method."""
    by_method = {row["attention"]: row for row in costs}
    means = {(row["attention"], row["metric"]): row for row in found.summary()}
    against = {
        row["attention"]: row
        for row in found.differences()
        if row["minus"] == BASELINE and row["metric"] == "accuracy"
    }
    heads = [*METRICS.values(), "accuracy over none (interval)", "seeds won"]
    heads += ["parameters added", "step time over none (interval)", "peak memory over none"]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for method in found.methods:
        cells = []
        for metric in METRICS:
            row = means[method, metric]
            spread = "" if row["std"] is None else f" ± {row['std']:.4f}"
            cells.append("" if row["mean"] is None else f"{row['mean']:.4f}{spread}")
        cells += _difference_cells(against.get(method), len(found.seeds))
        cost = by_method.get(method)
        if cost is None or method == BASELINE:
            cells += [""] * 3
        else:
            names = ("step_ratio", "step_ratio_low", "step_ratio_high", "peak_ratio")
            step, low, high, peak = (f"{float(cost[name]):.2f}" for name in names)
            cells += [cost["parameters_added"], f"{step} ({low} to {high})", peak]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference_cells(row: Mapping[str, Any] | None, seeds: int) -> list[str]:
    if row is None or row["difference"] is None:
        return ["", ""]
    interval = ""
    if row["bootstrap_low"] is not None:
        interval = f" ({row['bootstrap_low']:+.4f} to {row['bootstrap_high']:+.4f})"
    return [f"{row['difference']:+.4f}{interval}", f"{row['won']} of {seeds}"]


def draw_differences(path: Path, found: Comparison, title: str) -> None:
    """Every metric's difference to none: seeds, mean, bootstrap interval, Student's interval."""
    layers = [method for method in found.methods if method != BASELINE]
    rows = {(row["attention"], row["metric"]): row for row in found.differences()
            if row["minus"] == BASELINE}  # fmt: skip
    size = (3.2 * len(METRICS), 1.8 + 0.5 * len(layers))
    figure, panels = plt.subplots(1, len(METRICS), figsize=size, sharey=True, layout="constrained")
    for panel, (metric, name) in zip(panels, METRICS.items(), strict=True):
        panel.axvline(0, color="black", linewidth=1)
        for at, method in enumerate(layers):
            values, row = found.differences_of(method, BASELINE, metric), rows[method, metric]
            if values is None:
                panel.annotate("not available", (0, at), va="center", ha="center", fontsize=8)
                continue
            panel.plot(values, [at + 0.22] * len(values), "|", color="0.35", label="one seed")
            if row["student_low"] is not None:
                ends = [row["student_low"], row["student_high"]]
                panel.plot(ends, [at, at], "|-", color="0.55", lw=1, ms=8, label="Student interval")
                ends = [row["bootstrap_low"], row["bootstrap_high"]]
                panel.plot(ends, [at, at], color="black", lw=4, label="bootstrap interval")
            panel.plot(row["difference"], at, "o", color="white", mec="black", label="mean")
        panel.set(xlabel=f"{name}: layer minus none", yticks=range(len(layers)))
        panel.set_yticklabels(layers)
        panel.grid(axis="x", alpha=0.3)
        panel.margins(x=0.1)
        panel.xaxis.set_major_locator(plt.MaxNLocator(4))
    panels[0].set_ylim(len(layers) - 0.4, -0.6)
    panels[0].set_ylabel("attention layer")
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(f"Differences on the test images, {len(found.seeds)} seeds: {title}")
    write_atomically(path, lambda part: figure.savefig(part, dpi=100))
    plt.close(figure)


def draw_learning_curves(path: Path, found: Comparison, title: str) -> None:
    """A column for each method: mean and range over the seeds, with the mean of none beside it."""
    shown = {"train_loss": "training loss", "accuracy": "validation accuracy"}
    size = (2.6 * len(found.methods) + 0.6, 5.2)
    figure, grid = plt.subplots(
        2, len(found.methods), figsize=size, sharex=True, sharey="row", layout="constrained"
    )
    for line, (column, name) in zip(grid, shown.items(), strict=True):
        for panel, method in zip(line, found.methods, strict=True):
            for drawn in dict.fromkeys((BASELINE, method)):
                runs = [[epoch[column] for epoch in run.epochs] for run in found.of(drawn)]
                values = np.array(runs)
                epochs = np.arange(1, values.shape[1] + 1)
                style = "--" if drawn == BASELINE else "-"
                label = f"{drawn}, mean"
                panel.plot(epochs, values.mean(0), style, color="black", lw=1.4, label=label)
                if drawn == method:
                    band = (values.min(0), values.max(0))
                    panel.fill_between(epochs, *band, color="0.75", label="range of the seeds")
            panel.grid(alpha=0.3)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.legend(fontsize=7)
        line[0].set_ylabel(name)
    for panel, method in zip(grid[0], found.methods, strict=True):
        panel.set_title(method)
    _log_scale(grid[0][0])
    for panel in grid[1]:
        panel.set_xlabel("epoch")
    figure.suptitle(f"Learning curves, {len(found.seeds)} seeds: {title}")
    write_atomically(path, lambda part: figure.savefig(part, dpi=100))
    plt.close(figure)
