"""Starts the programs of examples/ as their users do, and makes small data for them."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
STARTED = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SPLITS = ("train", "val", "test")


def command(program, *arguments, start=STARTED):
    return [*start, str(ROOT / "examples" / program), *map(str, arguments)]


def run(program, *arguments, start=STARTED, cwd=None):
    options = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(
        command(program, *arguments, start=start), cwd=cwd, env=ENVIRONMENT, **options
    )


def caller(monkeypatch, capsys):
    """Runs a program's main in this process; its exit status and what it said on stderr."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def run_here(program, *arguments):
        import files

        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            files.run(importlib.import_module(program.removesuffix(".py")).main)
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    return run_here


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def medmnist(path, n=20, **changes):
    generator = np.random.default_rng(0)
    arrays = {f"{s}_images": generator.integers(0, 256, (n, 28, 28, 3), np.uint8) for s in SPLITS}
    arrays |= {f"{s}_labels": np.arange(n).reshape(-1, 1) % 3 for s in SPLITS}
    np.savez_compressed(
        path, **{key: value for key, value in (arrays | changes).items() if value is not None}
    )


def bars(path, n=60, side=12, **changes):
    """A MedMNIST file that can be learned: a bar somewhere in noise, its direction the class.

    Returns where the bars of the test images are, ``[n, side, side]``.
    """
    generator = np.random.default_rng(1)
    arrays = {}
    for split in SPLITS:
        labels = np.arange(n) % 3
        images = generator.normal(60, 10, (n, side, side))
        where = np.zeros((n, side, side))
        for image, mask, label in zip(images, where, labels, strict=True):
            y, x = generator.integers(0, side - 5, 2)
            bar = np.zeros((5, 5))
            line = np.arange(5)
            bar[(np.full(5, 2), line, line)[label], (line, np.full(5, 2), line)[label]] = 150
            image[y : y + 5, x : x + 5] += bar
            mask[y : y + 5, x : x + 5] = 1
        arrays[f"{split}_images"] = images.clip(0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.reshape(-1, 1)
    np.savez_compressed(path, **(arrays | changes))
    return where
