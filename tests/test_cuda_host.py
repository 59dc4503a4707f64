"""The way from Python to the CUDA kernel on an emulated CUDA runtime (`make cuda-host`).

PyTorch and the CUDA library, both unchanged, run on tests/cuda_host, which executes the kernels on
the CPU. Its README says what that cannot see.
"""

import re
import subprocess
import sys

import pytest
import torch
from cuda_host import build

from ppcr_ext._build import cuda

pytestmark = pytest.mark.full
# Of what a GPU runs all but the Triton kernels.
OPTIONS = {"test_gpu.py": ["-m", "gpu", "-k", "not triton", "-n", "2"]}
SKIPPED = {"test_gpu.py": 1}  # a tensor of 20 GB


@pytest.fixture(scope="module")
def folder():
    reason = cuda.why_not(torch.version.cuda)
    if reason:
        pytest.skip(f"the CUDA library cannot be built here: {reason}")
    return build.checkout()


def count(output: str, what: str) -> int:
    found = re.search(rf"(\d+) {what}", output.splitlines()[-1])
    return int(found[1]) if found else 0


@pytest.mark.parametrize("file", build.TESTS)
def test_emulated(folder, file):
    options = ["--tb=short", *OPTIONS.get(file, [])]
    status, output, errors = build.run_tests(folder, file, *options)
    assert status == 0, f"exit status {status}\n{output[-20000:]}{errors[-20000:]}"
    assert count(output, "passed") > 5
    assert count(output, "skipped") == SKIPPED.get(file, 0)
    print(output)


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
