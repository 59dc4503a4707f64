"""The way from Python to the CUDA kernel on an emulated CUDA runtime (`make cuda-host`).

PyTorch and the CUDA library, both unchanged, run on tests/cuda_host, which executes the kernels on
the CPU. Its README says what that cannot see.
"""

from __future__ import annotations

import concurrent.futures
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import build, mutation
from mutants import host

from ppcr_ext._build import cuda

pytestmark = pytest.mark.full
# Files of tests, with more options.
RUNS = {
    "calls": [host.CALLS],
    "devices": [host.DEVICES],
    "memory": [host.MEMORY],
    # What a GPU runs, but for the Triton kernels.
    "gpu": ["test_gpu.py", "-m", "gpu", "-k", "not triton"],
}
SETTINGS = mutation.SETTINGS | {"test_gpu.py": ("9.0 9.0", {})}
SKIPPED = {"gpu": 1}  # a tensor of 20 GB
SHARDS = {"gpu": 2}


@pytest.fixture(scope="module")
def folder():
    reason = cuda.why_not(torch.version.cuda)
    if reason:
        pytest.skip(f"the CUDA library cannot be built here: {reason}")
    return build.checkout(build.library())


def run(folder: Path, name: str, shard: str = "0/1") -> str:
    """The output of pytest in a process that sees the emulated devices."""
    file, *options = RUNS[name]
    devices, settings = SETTINGS[file]
    plugins = ["-p", "cuda_host.plugin", "-p", "shard", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", *plugins, f"tests/{file}", *options],
        cwd=folder,
        env=build.environment(devices, PPCR_SHARD=shard, **settings),
        capture_output=True,
        text=True,
    )
    output = result.stdout[-20000:] + result.stderr[-20000:]
    assert result.returncode == 0, f"{name}: exit status {result.returncode}\n{output}"
    return result.stdout


def count(output: str, what: str) -> int:
    found = re.search(rf"(\d+) {what}", output.splitlines()[-1])
    return int(found[1]) if found else 0


@pytest.mark.parametrize("name", RUNS)
def test_emulated(folder, name):
    shards = SHARDS.get(name, 1)
    with concurrent.futures.ThreadPoolExecutor(shards) as pool:
        outputs = list(pool.map(lambda i: run(folder, name, f"{i}/{shards}"), range(shards)))
    assert sum(count(output, "passed") for output in outputs) > 5
    assert sum(count(output, "skipped") for output in outputs) == SKIPPED.get(name, 0)
    print(*outputs, sep="\n")


def test_import_starts_nothing(folder):
    """Neither the import nor the question for backends starts CUDA: a fork may follow."""
    code = "import torch, ppcr_ext; ppcr_ext.backends(); print(torch.cuda.is_initialized())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=build.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"
