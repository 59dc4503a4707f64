"""What can be wrong with an installation ends in one sentence that says what it is and what helps, and the reference runs meanwhile."""

import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_build import SMOKE, call

import ppcr_ext
from ppcr_ext import _build, native

pytestmark = pytest.mark.full
REMEDY = "build it with `python setup.py build_ext --inplace` (a checkout), or call ppcr_ext.build(), or set PPCR_JIT=1"


def compile_library(path, source):
    folder = Path(torch.__file__).parent
    source_file = path.with_suffix(".cpp")
    source_file.write_text(source)
    flags = [
        f"-DTORCH_TARGET_VERSION={_build.TORCH_TARGET}",
        "-DTORCH_STABLE_ONLY",
        "-std=c++20",
        "-isystem",
        str(folder / "include"),
    ]
    link = ["-o", str(path), f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", "-fPIC", *flags, str(source_file), *link], check=True)


REPORT = SMOKE + "\nfrom ppcr_ext.__main__ import main; main()"


def report(checkout):
    """What ``python -m ppcr_ext`` says; plain Python computes the same all the while, with a warning."""
    text = call("-c", REPORT, cwd=checkout)
    assert "('reference',) [[0.5, 0.5, 0.5, 0.5]]" in text
    assert "ppcr_ext runs its slow PyTorch reference for cpu tensors: " in text
    assert REMEDY in text
    return text


def test_broken_library(checkout):
    path = checkout / "ppcr_ext" / "_cpu.abi3.so"
    path.write_bytes(b"")
    assert f"cpu: {path} does not load ({path}: file too short); " in report(checkout)


def test_library_that_is_cut_off(checkout):
    """The loader maps what is missing and dies of SIGBUS."""
    path = checkout / "ppcr_ext" / "_cpu.abi3.so"
    path.write_bytes(Path(native.library()).read_bytes()[:100_000])
    assert f"cpu: {path} does not load: it is cut off, as by a full disk or a copy that was interrupted; " in report(checkout)


def test_library_of_another_pytorch(checkout):
    """One that needs what this PyTorch does not have, or no longer has."""
    path = checkout / "ppcr_ext" / "_cpu.abi3.so"
    compile_library(path, 'extern "C" int aoti_torch_of_another_version();\nint value = aoti_torch_of_another_version();\n')
    said = report(checkout)
    assert f"cpu: {path} does not load: it was built for another PyTorch than {torch.__version__} (" in said
    assert "undefined symbol: aoti_torch_of_another_version" in said


STALE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
torch::stable::Tensor forward(torch::stable::Tensor x) { return x; }
STABLE_TORCH_LIBRARY(ppcr_ext, m) { m.def("ppcr(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(ppcr_ext, CPU, m) { m.impl("ppcr", TORCH_BOX(&forward)); }
"""


def test_stale_library(checkout):
    path = checkout / "ppcr_ext" / "_cpu.abi3.so"
    compile_library(path, STALE)
    missing = ", ".join(name for name in native.OPERATORS if name != "ppcr")
    assert f"cpu: {path} is of another version of ppcr_ext: it lacks {missing}; " in report(checkout)


def test_stale_cuda_library(checkout):
    shutil.copy(native.library(), checkout / "ppcr_ext")
    path = checkout / "ppcr_ext" / "_cuda.abi3.so"
    compile_library(path, "int value;\n")
    text = call("-m", "ppcr_ext", cwd=checkout)
    assert "native         cpu (" in text
    assert f"cuda: {path} is of another version of ppcr_ext: it lacks ppcr, " in text
    assert "; build it with PPCR_BUILD_CUDA=1" in text


BUILD = "import ppcr_ext\ntry: print(ppcr_ext.build())\nexcept RuntimeError as error: print('said:', error)"


def test_cache_that_cannot_be_written(checkout, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    output = call("-c", BUILD, cwd=checkout, TORCH_EXTENSIONS_DIR=str(blocked))
    assert f"said: ppcr_ext cannot be compiled here: {blocked}/ppcr_ext_cpu_" in output
    assert "cannot be written (" in output
    assert "; set TORCH_EXTENSIONS_DIR to a folder where you may write" in output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_without_permission(checkout, tmp_path):
    for mode in (0o500, 0o000):
        cache = tmp_path / f"{mode}"
        cache.mkdir(mode=mode)
        assert "set TORCH_EXTENSIONS_DIR" in call("-c", BUILD, cwd=checkout, TORCH_EXTENSIONS_DIR=str(cache))


def test_cache_that_cannot_even_be_looked_at(checkout):
    """A plain import asks for the JIT-built library; no answer is no library."""
    assert "('reference',)" in call("-W", "ignore", "-c", SMOKE, cwd=checkout, TORCH_EXTENSIONS_DIR="/" + "x" * 5000)


def test_jit_without_a_compiler_at_import(checkout, tmp_path):
    output = call("-c", SMOKE, cwd=checkout, code=1, PPCR_JIT="1", CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert "RuntimeError: ppcr_ext cannot be compiled here: no C++ compiler: 'no-such-compiler' is not on PATH" in output


def test_interrupted_jit_build(checkout, tmp_path):
    """Killed in the middle, the build leaves torch's lock behind. Two processes that come later build once, between them."""
    settings = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "MAX_JOBS": "2", "PPCR_BUILD_CUDA": "0", "DEBUG": "1"}  # compiles sooner
    environment = os.environ | settings

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", BUILD], cwd=checkout, env=environment, text=True, stdout=-1, stderr=-2, start_new_session=True
        )

    killed = start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/work/lock")):
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(tmp_path.glob("*/work/lock"))
    assert not list(tmp_path.glob("*/*.so"))

    both = [start(), start()]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert sorted("ppcr_ext: compiling" in output for output in outputs) == [False, True], outputs
    (library,) = tmp_path.glob("*/*.so")
    assert all(output.strip().endswith(str(library)) for output in outputs), outputs
    assert "('native', 'reference')" in call("-c", SMOKE, cwd=checkout, **settings)

    # One that was damaged afterwards is built again, from the objects that are there.
    library.write_bytes(b"")
    assert str(library) in call("-c", BUILD, cwd=checkout, **settings)


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/sys/vm/overcommit_memory").exists(), reason="Linux")
def test_out_of_memory():
    """torch's own error, with its size; nothing stays allocated."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this machine promises any amount of memory")
    count = 2**38  # 1 TiB of float32, none of it touched
    reserved = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    x = torch.frombuffer(reserved, dtype=torch.float32).view(1, 4, -1)
    w, b = torch.zeros(7), torch.zeros(1)
    parameters = (w, b, (1, 2, 4), 1e-5)
    ops = torch.ops.ppcr_ext
    calls = [
        lambda: ppcr_ext.ppcr(x, w, b),
        lambda: ppcr_ext.ppcr_add_relu(x, x, w, b),
        lambda: ppcr_ext.ppcr_gate(x, w, b),
        lambda: ppcr_ext.ppcr(x[..., ::2], w, b),  # the copy of odd strides
        lambda: ops.ppcr_backward(x, x, *parameters),
        lambda: ops.ppcr_add_relu_backward(x, x, x, *parameters),
    ]
    before = virtual_bytes()
    for function in calls:
        with pytest.raises(RuntimeError, match=r"can't allocate memory: you tried to allocate \d{12,} bytes"):
            function()
    assert virtual_bytes() - before < 2**30
    assert ppcr_ext.ppcr(torch.ones(1, 4), w, b).tolist() == [[0.5] * 4]
