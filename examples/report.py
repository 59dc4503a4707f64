"""What a classifier is judged by, and the picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from files import write_atomically
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, roc_auc_score
from torch import Tensor

COLUMNS = ("epoch", "train_loss", "loss", "accuracy", "macro_f1", "auc", "kappa", "seconds")


def metrics(logits: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Loss, accuracy, macro F1, one-against-rest macro AUC and Cohen's kappa of logits ``[N, classes]``.

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
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log", title="Loss")
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
