"""What can be wrong with an installation is said in one sentence, with the remedy. The reference
runs meanwhile."""

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

from ppcr_ext import _native
from ppcr_ext._build import cpu as recipe
from ppcr_ext._operators import OPERATORS

pytestmark = pytest.mark.full
REMEDY = "call ppcr_ext.build(), or set PPCR_JIT=1, or install again (pip: with --no-cache-dir)"


def compile_library(path, source):
    folder = Path(torch.__file__).parent
    source_file = path.with_suffix(".cpp")
    source_file.write_text(source)
    flags = [
        f"-DTORCH_TARGET_VERSION={recipe.TORCH_TARGET}",
        "-DTORCH_STABLE_ONLY",
        "-std=c++20",
        "-isystem",
        str(folder / "include"),
    ]
    link = ["-o", str(path), f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", "-fPIC", *flags, str(source_file), *link], check=True)


REPORT = SMOKE + "\nfrom ppcr_ext.__main__ import main; main()"


def report(checkout):
    """What ``python -m ppcr_ext`` says, while plain PyTorch computes the same, with a warning."""
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
    path.write_bytes(Path(_native.library).read_bytes()[:100_000])
    assert (
        f"cpu: {path} does not load: it is cut off, as by a full disk or a copy that was "
        "interrupted; " in report(checkout)
    )


def test_library_of_another_pytorch(checkout):
    """One that needs what this PyTorch does not have, or no longer has."""
    path = checkout / "ppcr_ext" / "_cpu.abi3.so"
    compile_library(
        path,
        'extern "C" int aoti_torch_of_another_version();\n'
        "int value = aoti_torch_of_another_version();\n",
    )
    said = report(checkout)
    assert (
        f"cpu: {path} does not load: it was built for another PyTorch than {torch.__version__} ("
        in said
    )
    assert "undefined symbol: aoti_torch_of_another_version" in said


def test_sources_that_hide_the_installed_package(checkout, tmp_path, monkeypatch):
    """As after ``pip install .`` in a clone, where the current folder comes first."""
    site = tmp_path / "site"
    (site / "ppcr_ext").mkdir(parents=True)
    about = site / "ppcr_ext-0.1.0.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: ppcr_ext\nVersion: 0.1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    hidden = f"the sources in {checkout / 'ppcr_ext'} hide the package in {site / 'ppcr_ext'}: go"
    assert hidden not in report(checkout)  # nothing is compiled there either
    (site / "ppcr_ext" / "_cpu.abi3.so").touch()
    assert f"the extension is not built ({hidden} to another folder); {REMEDY}" in report(checkout)


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
    missing = ", ".join(name for name in OPERATORS if name != "ppcr")
    assert f"cpu: {path} is of another version of ppcr_ext: it lacks {missing}; " in report(
        checkout
    )


def test_stale_cuda_library(checkout):
    shutil.copy(_native.library, checkout / "ppcr_ext")
    path = checkout / "ppcr_ext" / "_cuda.abi3.so"
    compile_library(path, "int value;\n")
    text = call("-m", "ppcr_ext", cwd=checkout)
    assert "native         cpu (" in text
    assert f"cuda: {path} is of another version of ppcr_ext: it lacks ppcr, " in text
    assert "; build it with PPCR_BUILD_CUDA=1 (pip: and --no-cache-dir)" in text


CUDA_TEXT = """
import sys, torch
torch.version.cuda = sys.argv[1] or None
import ppcr_ext
print(ppcr_ext.backends()["native"])
"""


def test_cuda_library_of_another_major_version(checkout):
    """The loader finds the runtime that it wants, and there would be two in one process."""
    shutil.copy(_native.library, checkout / "ppcr_ext")
    path, runtime = checkout / "ppcr_ext" / "_cuda.abi3.so", checkout / "libcudart.so.12"
    for target, flags in (
        (runtime, [f"-Wl,-soname,{runtime.name}"]),
        (path, ["-Wl,--no-as-needed", str(runtime), f"-Wl,-rpath,{checkout}"]),
    ):
        link = ["g++", "-shared", "-fPIC", "-x", "c++", os.devnull, "-x", "none", *flags]
        subprocess.run([*link, "-o", str(target)], check=True)
    refused = f"cuda: {path} was built for CUDA 12, this PyTorch for CUDA 13.0; their major"
    assert refused in call("-c", CUDA_TEXT, "13.0", cwd=checkout)
    loaded = "is of another version of ppcr_ext: it lacks ppcr"
    assert loaded in call("-c", CUDA_TEXT, "12.8", cwd=checkout)


def test_cuda_library_beside_a_pytorch_without_cuda(checkout):
    """No library that could be built would help."""
    shutil.copy(_native.library, checkout / "ppcr_ext")
    words = "usable; cuda: this PyTorch was built without CUDA; install a CUDA build of PyTorch, "
    words += "see https://pytorch.org/get-started\n"
    assert call("-c", CUDA_TEXT, "", cwd=checkout).endswith(words)
    (checkout / "ppcr_ext" / "_cuda.abi3.so").write_bytes(b"")
    assert call("-c", CUDA_TEXT, "", cwd=checkout).endswith(words)


BUILD = "import ppcr_ext\ntry: print(ppcr_ext.build())\n"
BUILD += "except RuntimeError as error: print('said:', error)"


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
        assert "set TORCH_EXTENSIONS_DIR" in call(
            "-c", BUILD, cwd=checkout, TORCH_EXTENSIONS_DIR=str(cache)
        )


def test_cache_that_cannot_even_be_looked_at(checkout):
    """A plain import asks for the JIT-built library; no answer is no library."""
    assert "('reference',)" in call(
        "-W", "ignore", "-c", SMOKE, cwd=checkout, TORCH_EXTENSIONS_DIR="/" + "x" * 5000
    )


def test_jit_without_a_compiler_at_import(checkout, tmp_path):
    output = call(
        "-c",
        SMOKE,
        cwd=checkout,
        code=1,
        PPCR_JIT="1",
        CXX="no-such-compiler",
        TORCH_EXTENSIONS_DIR=str(tmp_path),
    )
    assert (
        "RuntimeError: ppcr_ext cannot be compiled here: no C++ compiler: "
        "'no-such-compiler' is not on PATH" in output
    )


def test_interrupted_jit_build(checkout, tmp_path):
    """A build that is killed leaves torch's lock behind. Two processes that come later build once
    between them."""
    settings = {
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "MAX_JOBS": "2",
        "PPCR_BUILD_CUDA": "0",
        "DEBUG": "1",
    }  # compiles sooner
    environment = os.environ | settings

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", BUILD],
            cwd=checkout,
            env=environment,
            text=True,
            stdout=-1,
            stderr=-2,
            start_new_session=True,
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
