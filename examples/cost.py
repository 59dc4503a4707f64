"""What an attention layer costs: parameters, the time of a training step, and its peak memory."""

import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from data import Data
from scipy import stats
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from train import Trainer

COLUMNS = (
    *("attention", "parameters", "parameters_added", "step_ms"),
    *("step_ratio", "step_ratio_low", "step_ratio_high", "peak_bytes", "peak_ratio"),
)
REPEATS = 3  # where its memory lies makes a network a little faster or slower while it lives


def measure(
    options: Mapping[str, Any],
    data: Data,
    rounds: int,
    baseline: str,
    tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """A row for each method of ``options``.

    All methods run in every round, in a new random order, and the ratio to the baseline is taken
    within each round: its median, with the exact 95 % interval of the binomial distribution. The
    networks are made anew three times.
    """
    seconds: dict[str, list[float]] = {method: [] for method in options}
    rows: dict[str, dict[str, Any]] = {}
    shuffle = random.Random(0)  # the same order in all processes
    for repeat in range(REPEATS):
        trainers = {method: Trainer(chosen, data) for method, chosen in options.items()}
        for method, trainer in trainers.items():
            batch = next(iter(trainer.batches))
            trainer.model.train()
            for _ in range(2):  # compiles, and fills caches
                trainer.step(*batch)
            if repeat == 0:
                count = sum(parameter.numel() for parameter in trainer.model.parameters())
                rows[method] = {"attention": method, "parameters": count}
                rows[method]["peak_bytes"] = _peak_bytes(trainer, *batch)
            tick()
        gc.collect()
        gc.disable()
        try:
            for _ in range((rounds + repeat) // REPEATS):
                for method in shuffle.sample(list(trainers), len(trainers)):
                    seconds[method].append(_seconds(trainers[method], *batch))
                tick()
        finally:
            gc.enable()
    base = rows[baseline]
    for method, row in rows.items():
        ratios = [a / b for a, b in zip(seconds[method], seconds[baseline], strict=True)]
        interval = stats.quantile_test(ratios, p=0.5).confidence_interval()
        row["parameters_added"] = row["parameters"] - base["parameters"]
        row["peak_ratio"] = round(row["peak_bytes"] / base["peak_bytes"], 4)
        row["step_ms"] = round(statistics.median(seconds[method]) * 1e3, 3)
        row["step_ratio"] = round(statistics.median(ratios), 4)
        row["step_ratio_low"] = round(float(interval.low), 4)
        row["step_ratio_high"] = round(float(interval.high), 4)
    return list(rows.values())


def steps(rounds: int, methods: int) -> int:
    """How often ``tick`` is called."""
    return rounds + REPEATS * methods


def _seconds(trainer: Trainer, images: Tensor, labels: Tensor) -> float:
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.step(images, labels)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_bytes(trainer: Trainer, images: Tensor, labels: Tensor) -> int:
    """That a step allocates at most, above what was there before."""
    trainer.optimizer.zero_grad()
    if trainer.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.step(images, labels)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.step(images, labels)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    totals = (event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
    return max(totals)
