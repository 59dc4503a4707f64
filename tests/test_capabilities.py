"""The instruction sets and methods that the library holds, each in a process of its own.

Also the assembly they were compiled to.
"""

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
from ppcr_ext._build import cpu as recipe

TESTS = Path(__file__).parent
ORDER = ["default", "avx2", "avx512"]
X86 = platform.machine() == "x86_64"
CHOSEN = (
    "test_against_float64 or test_any_alignment or test_nan_and_inf or test_zero_variance"
    " or same_capability or small_planes"
)


def run_checks(**settings):
    """The tests of accuracy and edges in a process with these settings."""
    package = Path(ppcr_ext.__file__).parents[1]
    environment = os.environ | settings | {"PYTHONPATH": str(package)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN]
    files = ["test_accuracy.py", "test_edges.py", "test_capabilities.py"]
    subprocess.run([*command, *files], cwd=TESTS, env=environment, check=True, timeout=600)


def skip_unless_here(capability):
    best = _native.cpu_capability() or "default"
    if capability not in ORDER[: ORDER.index(best) + 1]:
        pytest.skip(f"this CPU's own capability is {best}")


@pytest.mark.parametrize(
    ("capability", "method"),
    [
        ("default", "grouped"),
        ("avx2", "sequential"),
        ("avx512", "grouped"),
        ("avx512", "sequential"),
    ],
)
def test_accuracy(capability, method):
    """Every set and every method once; make sanitize runs all pairs, against double precision."""
    skip_unless_here(capability)
    run_checks(
        PPCR_CPU_METHOD=method,
        PPCR_CPU_CAPABILITY=capability,
        PPCR_EXPECTED_CAPABILITY=capability,
    )


UNKNOWN = {
    "PPCR_CPU_CAPABILITY": "'fastest' is not one of default.* on this CPU",
    "PPCR_CPU_METHOD": "'fastest' is not one of grouped, sequential on this CPU",
}


@pytest.mark.parametrize("names", [*((name,) for name in UNKNOWN), tuple(UNKNOWN)], ids=str)
def test_unknown_settings(names):
    """They are an error of every call, which lists what is known."""
    call = "import torch, ppcr_ext; ppcr_ext.ppcr(torch.ones(1, 4, 2), torch.ones(7))"
    environment = os.environ | dict.fromkeys(names, "fastest")
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert re.search("; ".join(f"{name}: {UNKNOWN[name]}" for name in names), done.stderr)


def test_same_capability_as_asked_for():
    wanted = os.environ.get("PPCR_EXPECTED_CAPABILITY")
    assert _native.cpu_capability() == wanted if wanted else _native.cpu_capability() in ORDER


@pytest.mark.skipif(not X86 or shutil.which("objdump") is None, reason="needs x86-64 and objdump")
def test_assembly_is_vectorized():
    """One portable binary: each capability's kernels use its registers, and only its own."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(_native.library)],
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


@pytest.mark.skipif(not X86 or shutil.which("g++") is None, reason="needs x86-64 and g++")
@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_system_headers_are_compiled_for_any_processor(capability):
    """The linker may take an inline function of theirs from any file, for all."""
    source = recipe.csrc() / "cpu" / f"kernels_{capability}.cpp"
    command = ["g++", "-std=c++17", "-E", str(source)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, pragma, after = text.rpartition("#pragma GCC target")  # the headers have their own
    lines_of_a_file = r'^# \d+ "(/.+?)".*\n((?:(?!# \d).*\n)*)'
    others_before, others_after = (
        {
            name
            for name, lines in re.findall(lines_of_a_file, part, re.MULTILINE)
            if lines.strip() and not name.startswith(str(recipe.csrc()))
        }
        for part in (before, after)
    )
    assert pragma
    assert others_before
    assert others_after == set()
