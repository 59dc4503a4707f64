"""What runs of several attention layers say about each other: means, differences, a verdict."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files
import numpy as np
from scipy import stats

METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "auc": "AUC", "kappa": "Cohen's kappa"}
RUNS = ("seed", "attention", "diverged", *METRICS)
SUMMARY = ("attention", "metric", "seeds", "mean", "std")
DIFFERENCES = (
    *("attention", "minus", "metric", "seeds", "difference"),
    *("bootstrap_low", "bootstrap_high", "student_low", "student_high", "won", "lost"),
)
BASELINE = "none"


@dataclass
class Run:
    """A finished run: its metrics on the test images, and its epochs."""

    seed: int
    attention: str
    test: dict[str, float]
    epochs: list[dict[str, float]]

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.test["loss"])


def folder(out: Path, seed: int, attention: str) -> Path:
    return out / "runs" / f"seed{seed}" / attention


def finished(out: Path, seed: int, attention: str) -> bool:
    return (folder(out, seed, attention) / "test.csv").exists()


def read(out: Path, methods: Sequence[str], seeds: Iterable[int]) -> list[Run]:
    """The runs of all seeds for which every method is finished, so that all have equally many."""

    def numbers(path: Path) -> list[dict[str, float]]:
        return [{k: float(v) for k, v in row.items()} for row in files.read_csv(path)]

    runs = []
    for seed in seeds:
        if all(finished(out, seed, method) for method in methods):
            for method in methods:
                where = folder(out, seed, method)
                (test,) = numbers(where / "test.csv")
                runs.append(Run(seed, method, test, numbers(where / "metrics.csv")))
    return runs


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean: percentiles of the means of resampled seeds."""
    found = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=9999,
        batch=1000,  # less memory where there are many values
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def student_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean, for normally distributed values."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


class Comparison:
    """Tables of a list of runs. A method that diverged with any seed has no mean or difference."""

    def __init__(self, runs: Sequence[Run], methods: Sequence[str]) -> None:
        self.runs, self.methods = runs, methods
        self.seeds = sorted({run.seed for run in runs})
        self._by_name = {(run.attention, run.seed): run for run in runs}

    def of(self, method: str) -> list[Run]:
        return [self._by_name[method, seed] for seed in self.seeds]

    def values(self, method: str, metric: str) -> np.ndarray | None:
        """By seed, or None where one of them is not a number."""
        values = np.array([run.test[metric] for run in self.of(method)])
        usable = not any(run.diverged for run in self.of(method)) and np.isfinite(values).all()
        return values if usable and len(values) else None

    def differences_of(self, method: str, minus: str, metric: str) -> np.ndarray | None:
        ours, theirs = self.values(method, metric), self.values(minus, metric)
        return None if ours is None or theirs is None else ours - theirs

    def run_rows(self) -> list[dict[str, Any]]:
        return [
            {"seed": run.seed, "attention": run.attention, "diverged": run.diverged}
            | {metric: _rounded(run.test[metric]) for metric in METRICS}
            for run in self.runs
        ]

    def summary(self) -> list[dict[str, Any]]:
        rows = []
        for method in self.methods:
            for metric in METRICS:
                row = dict.fromkeys(SUMMARY) | {"attention": method, "metric": metric}
                row["seeds"] = len(self.seeds)
                values = self.values(method, metric)
                if values is not None:
                    row["mean"] = _rounded(values.mean())
                    row["std"] = _rounded(values.std(ddof=1)) if len(values) > 1 else None
                rows.append(row)
        return rows

    def pairs(self) -> list[tuple[str, str]]:
        """Every layer against none, and PPCR against every other layer."""
        layers = [method for method in self.methods if method != BASELINE]
        pairs = [(method, BASELINE) for method in layers if BASELINE in self.methods]
        return pairs + [("ppcr", m) for m in layers if m != "ppcr" and "ppcr" in layers]

    def differences(self) -> list[dict[str, Any]]:
        rows = []
        for method, minus in self.pairs():
            for metric in METRICS:
                row = dict.fromkeys(DIFFERENCES)
                row |= {"attention": method, "minus": minus, "metric": metric}
                row["seeds"] = len(self.seeds)
                values = self.differences_of(method, minus, metric)
                if values is not None:
                    row["difference"] = _rounded(values.mean())
                    row["won"], row["lost"] = int((values > 0).sum()), int((values < 0).sum())
                if values is not None and len(values) > 1:
                    for name, interval in (
                        ("bootstrap", bootstrap_interval(values)),
                        ("student", student_interval(values)),
                    ):
                        row[f"{name}_low"], row[f"{name}_high"] = map(_rounded, interval)
                rows.append(row)
        return rows

    def notes(self) -> list[str]:
        """A line for everything that leaves a gap in the tables."""
        lines = []
        for method in self.methods:
            seeds = [str(run.seed) for run in self.of(method) if run.diverged]
            if seeds:
                lines.append(
                    f"{method} trained to NaN or infinity with seed {', '.join(seeds)}: "
                    "it has no mean and no difference"
                )
        if len(self.seeds) == 1:
            lines.append("One seed: no standard deviation and no interval.")
        return lines

    def verdict(self) -> str:
        """What the intervals of the accuracy allow to be said."""
        count = len(self.seeds)
        if count == 0:
            return "No seed has all its runs finished: nothing can be said yet."
        if count == 1:
            return "One seed says nothing about others: no layer can be told apart from another."
        rows = [row for row in self.differences() if row["metric"] == "accuracy"]
        found: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row["difference"] is None:
                continue
            low = min(row["bootstrap_low"], row["student_low"])
            high = max(row["bootstrap_high"], row["student_high"])
            says = (
                "is above" if low > 0 else "is below" if high < 0 else "cannot be told apart from"
            )
            points = (100 * row[key] for key in ("difference", "bootstrap_low", "bootstrap_high"))
            figures = "{:+.2f} points, bootstrap interval {:+.2f} to {:+.2f}".format(*points)
            won = f"{row['won']} of {count} seeds won"
            found.setdefault((says, row["minus"]), []).append(
                f"{row['attention']} ({figures}, {won})"
            )
        sentences = []
        for (says, minus), layers in found.items():
            verb = says if len(layers) == 1 else says.replace("is ", "are ")
            sentences.append(f"{_listed(layers)} {verb} {minus}.")
        return " ".join(
            [
                f"Test accuracy over {count} seeds:",
                *sentences,
                "A layer is said to be above or below another only if both its intervals exclude "
                f"zero. Of two equal layers one wins all {count} seeds in "
                f"{2.0 ** (1 - count):.1%} of all comparisons. The seeds stand for initial weights "
                "and batches; other images would add to the uncertainty.",
            ]
        )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _rounded(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
