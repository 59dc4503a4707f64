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
from cuda_host import build

from ppcr_ext._build import cuda

pytestmark = pytest.mark.full
WITHOUT_CACHE = {"CUDA_HOST_GUARD": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Files of tests, the devices that they see, more settings, and what they may skip.
RUNS = {
    "calls": (["emulated_calls.py"], "9.0", {}, 0),
    "devices": (["emulated_devices.py"], "9.0 9.0:sms=24,kb=99,clusters=0 8.0", {}, 0),
    "memory": (["emulated_memory.py"], "9.0", WITHOUT_CACHE, 0),
    # What a GPU runs, but for the Triton kernels, and for a tensor of 20 GB.
    "gpu": (["test_gpu.py", "-m", "gpu", "-k", "not triton"], "9.0 9.0", {}, 1),
}
SHARDS = {"gpu": 2}


@pytest.fixture(scope="module")
def folder():
    reason = cuda.why_not(torch.version.cuda)
    if reason:
        pytest.skip(f"the CUDA library cannot be built here: {reason}")
    return build.checkout(build.library())


def run(folder: Path, name: str, shard: str = "0/1") -> str:
    """The output of pytest in a process that sees the emulated devices."""
    (file, *options), devices, settings, _ = RUNS[name]
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
    assert sum(count(output, "skipped") for output in outputs) <= RUNS[name][3]
    print(*outputs, sep="\n")


def test_import_starts_nothing(folder):
    """Neither the import nor the question which backends there are starts CUDA: a fork may follow."""
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
