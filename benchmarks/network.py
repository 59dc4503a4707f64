"""torchvision's ResNet-50 with PPCR in every residual block, and what a training step of it costs: ``python -m benchmarks.network``."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
import torchvision
from torchvision.models.resnet import ResNet

import ppcr_ext

from .timing import Others, keep_memory, quiet

VARIANTS: dict[str, dict[str, object] | None] = {
    "without PPCR": None,
    "PPCR fused": {"fuse": True},
    "PPCR unfused": {"fuse": False},
    "plain PyTorch PPCR": {"fuse": False, "backend": "reference"},
}


def resnet50(**options: object) -> ResNet:
    """50 layers, 16 of PPCR, random weights from torch's current seed; the integration weights are drawn too."""
    model = torchvision.models.resnet50()
    for name in ppcr_ext.insert_ppcr(model, **options):  # type: ignore[arg-type]
        # zero, where training starts, would leave every gate equal
        torch.nn.init.normal_(model.get_submodule(name).weight, std=0.5)
    return model


def steps(batch: int, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step (forward, backward, SGD) of every variant, one of each a round, in random order."""
    x, target = torch.randn(batch, 3, size, size), torch.arange(batch) % 1000
    runs = {}
    for name, options in VARIANTS.items():
        torch.manual_seed(0)
        model = torchvision.models.resnet50() if options is None else resnet50(**options)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        runs[name] = (model, optimizer)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)
    with quiet():
        for round_ in range(rounds + 1):
            shuffle.shuffle(order)
            for name in order:
                model, optimizer = runs[name]
                start = time.perf_counter()
                torch.nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
                optimizer.zero_grad()
                if round_:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/resnet50_step.json"))
    arguments = parser.parse_args()
    keep_memory()
    others = Others()
    seconds = steps(arguments.batch, arguments.size, arguments.rounds)
    base = seconds["without PPCR"]
    report = {}
    for name, values in seconds.items():
        # of pairs from the same round: what slows the machine down for a while slows both
        low, median, high = statistics.quantiles([a / b for a, b in zip(values, base, strict=True)], n=4, method="inclusive")
        report[name] = {"seconds": statistics.median(values), "ratio": median, "low": low, "high": high}
        print(f"{name:20} {report[name]['seconds']:.2f} s, {median:.3f} ({low:.3f} to {high:.3f}) of a step without PPCR")
    share = others.share()
    print(f"other processes took {'an unknown part' if share is None else f'{100 * share:.0f} %'} of the machine")
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "others": share, **vars(arguments)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"facts": facts, "steps": report, "seconds": seconds}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
