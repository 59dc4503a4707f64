"""The other instruction sets that the library holds, each in a process of its own, and the assembly they were compiled to."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ppcr_ext
from ppcr_ext import _native

TESTS = Path(__file__).parent
ORDER = ["default", "avx2", "avx512"]
X86 = platform.machine() == "x86_64"


def narrower():
    best = _native.cpu_capability() or "default"
    return ORDER[: ORDER.index(best)]


@pytest.mark.parametrize("capability", ORDER[:2])
def test_accuracy(capability):
    if capability not in narrower():
        pytest.skip(
            f"this CPU's own capability is {_native.cpu_capability()}: the other tests run it, or nothing can"
        )
    package = Path(ppcr_ext.__file__).parents[1]
    environment = os.environ | {
        "PPCR_CPU_CAPABILITY": capability,
        "PPCR_EXPECTED_CAPABILITY": capability,
        "PYTHONPATH": str(package),
    }
    chosen = "test_against_float64 or test_any_alignment or test_nan_and_inf or test_zero_variance or same_capability"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    files = ["test_accuracy.py", "test_edges.py", "test_capabilities.py"]
    subprocess.run([*command, *files], cwd=TESTS, env=environment, check=True, timeout=600)


def test_same_capability_as_asked_for():
    wanted = os.environ.get("PPCR_EXPECTED_CAPABILITY")
    assert _native.cpu_capability() == wanted if wanted else _native.cpu_capability() in ORDER


@pytest.mark.skipif(not X86 or shutil.which("objdump") is None, reason="needs x86-64 and objdump")
def test_assembly_is_vectorized():
    """One portable binary: each capability's kernels use its registers, and only its own."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(_native.library())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    counts = {}
    for function in re.split(r"\n\n", listing):
        title = re.search(r"<.*?ppcr::(baseline|avx2|avx512)::run<", function.split("\n", 1)[0])
        if title:
            got = counts.setdefault(
                title[1], {"zmm": 0, "ymm": 0, "packed": 0, "scalar": 0, "functions": 0}
            )
            got["functions"] += 1
            got["zmm"] += function.count("%zmm")
            got["ymm"] += function.count("%ymm")
            got["packed"] += len(re.findall(r"\bv?(?:mul|fn?m\w+)p[sd]\b", function))
            got["scalar"] += len(re.findall(r"\bv?(?:mul|fn?m\w+)s[sd]\b", function))
    assert {name: c["functions"] for name, c in counts.items()} == {
        "baseline": 24,
        "avx2": 24,
        "avx512": 24,
    }
    assert counts["baseline"]["ymm"] == counts["baseline"]["zmm"] == counts["avx2"]["zmm"] == 0
    assert counts["avx2"]["ymm"] > 1000
    assert counts["avx512"]["zmm"] > 1000
    for c in counts.values():
        assert c["packed"] > 100
        assert c["scalar"] == 0  # no product of x is left to scalar code
