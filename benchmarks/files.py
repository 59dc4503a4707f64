"""What stays on disk: CSV and JSON."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from dataclasses import asdict, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import errors
from .report import summarize
from .suite import ErrorRow, Result, Row


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what a run was made."""
    import numpy
    import torchvision

    import ppcr_ext

    cuda = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "timm": _version("timm"),
        "triton": _version("triton") if cuda else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "ppcr_ext": getattr(ppcr_ext, "__version__", "unknown"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the working tree, with ``+`` where files differ from it, the measured ones and the README's tables apart."""
    try:
        measured = (":(top,exclude)benchmarks/results", ":(top,exclude)README.md")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *measured)
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    root = Path(__file__).parent
    return subprocess.run(
        ["git", *args], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(result: Result, where: Path, about: dict[str, Any]) -> list[Path]:
    """``where``.csv with a line per column and input, ``where``.json with everything; returns what was written."""
    where.parent.mkdir(parents=True, exist_ok=True)
    table, everything = where.with_suffix(".csv"), where.with_suffix(".json")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        for row in result.rows:
            cells = asdict(row) | {"shape": "x".join(map(str, row.shape))}
            writer.writerow([rounded(cell) for cell in cells.values()])
    content = about | {"summary": asdict(summarize(result))} | result.as_json()
    everything.write_text(json.dumps(rounded(content), indent=1) + "\n")
    return [table, everything]


def read(path: Path) -> tuple[dict[str, Any], Result]:
    """What :func:`write` wrote, as (everything, the result in it)."""
    content = json.loads(path.read_text())
    result = Result([Row(**row) for row in content["rows"]])
    for row in content["errors"]:
        row["errors"], row["limits"] = (
            errors.Errors(**row["errors"]),
            errors.Errors(**row["limits"]),
        )
        result.errors.append(ErrorRow(**row))
    return content, result


def rounded(value: Any) -> Any:
    """Five significant digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value
