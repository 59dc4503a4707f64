"""Fixtures, and what the runs say at their end."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from ppcr_ext._build import cpu as recipe

ROOT = Path(__file__).resolve().parent.parent
SAID = pytest.StashKey[list[str]]()  # by the processes of pytest-xdist


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


def said() -> list[str]:
    """How close the random inputs came to the bound, and which kernels the CPU executed."""
    lines = []
    properties = sys.modules.get("test_properties")
    if properties is not None and properties.statistics["examples"]:
        s = properties.statistics
        lines.append(
            f"properties: {s['examples']} examples, {s['comparisons']} comparisons; worst error "
            f"{s['worst']:.2f} of {properties.CONSTANT} allowed times the amplified unit roundoff "
            f"({s['of']})"
        )
    triton = sys.modules.get("test_triton")
    if triton is not None and triton.counts:
        counts = ", ".join(f"{count} {what}" for what, count in triton.counts.items())
        lines.append(f"Triton interpreted: {counts}")
    cases = sys.modules.get("cuda_on_cpu.cases")
    if cases is not None and cases.kernels.cache_info().currsize:
        statistics = cases.kernels().statistics()
        launches = statistics["launches"]
        lines.append(
            f"CUDA on CPU: {sum(launches.values())} launches of {len(launches)} kernel variants, "
            f"{statistics['threads'] / 1e6:.1f} M CUDA threads, "
            f"{statistics['switches'] / 1e6:.0f} M switches"
        )
    return lines


def pytest_sessionfinish(session):
    """A process of pytest-xdist hands its lines to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["said"] = said()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash.setdefault(SAID, []).extend(getattr(node, "workeroutput", {}).get("said", []))


def pytest_terminal_summary(terminalreporter, config):
    for line in [*config.stash.get(SAID, []), *said()]:
        terminalreporter.write_line(line)
