"""Fixtures, and what the runs say at their end."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from ppcr_ext._build import cpu as recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources with nothing built."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "ppcr_ext", folder / "ppcr_ext", ignore=ignored)
    shutil.copytree(recipe.csrc(), folder / "csrc")
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    """Most inputs are tiny; what depends on threads sets their number itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    """Says what the random inputs came to, and what the runs of the Triton and CUDA kernels on the CPU executed."""
    properties = sys.modules.get("test_properties")
    if properties is not None and properties.statistics["examples"]:
        s = properties.statistics
        terminalreporter.write_line(
            f"properties: {s['examples']} examples, {s['comparisons']} comparisons; worst error {s['worst']:.2f} of {properties.CONSTANT} "
            f"allowed times the amplified unit roundoff ({s['of']})"
        )
    triton = sys.modules.get("test_triton")
    if triton is not None and triton.counts:
        terminalreporter.write_line(
            "Triton interpreted: "
            + ", ".join(f"{count} {what}" for what, count in triton.counts.items())
        )
    cases = sys.modules.get("cuda_on_cpu.cases")
    if cases is None or not cases.kernels.cache_info().currsize:
        return
    statistics = cases.kernels().statistics()
    launches = statistics["launches"]
    terminalreporter.write_line(
        f"CUDA on CPU: {sum(launches.values())} launches of {len(launches)} kernel variants, "
        f"{statistics['threads'] / 1e6:.1f} M CUDA threads, {statistics['switches'] / 1e6:.0f} M switches"
    )
