"""Building and installing: JIT, without a compiler, with what the environment asks for, and what the wheel holds."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ppcr_ext
from ppcr_ext import _build

ROOT = Path(__file__).resolve().parent.parent
SMOKE = "import torch, ppcr_ext; print(ppcr_ext.available_backends(), ppcr_ext.ppcr(torch.ones(1, 4), torch.zeros(7)).tolist())"


def call(*command, cwd, code=0, **environment):
    """stdout and stderr of a Python command; a variable set to None is removed."""
    merged = {k: v for k, v in (os.environ | {"PPCR_BUILD_CUDA": "0"} | environment).items() if v is not None}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=merged, capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def without_compiler(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir(exist_ok=True)
    return {"PATH": str(empty), "CXX": None, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}


@pytest.mark.full
def test_jit_build(checkout, tmp_path):
    cache = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "MAX_JOBS": "2"}
    first = call("-c", SMOKE, cwd=checkout, PPCR_JIT="1", **cache)
    assert f"compiling {len(_build.CPU_SOURCES)} files into {tmp_path}" in first
    assert f"[{len(_build.CPU_SOURCES)}/" in first  # ninja's progress
    assert "('native', 'reference') [[0.5, 0.5, 0.5, 0.5]]" in first
    # A later import finds it by itself, and compiles nothing.
    second = call("-c", SMOKE, cwd=checkout, **cache)
    assert "('native', 'reference')" in second
    assert "compiling" not in second
    report = call("-m", "ppcr_ext", cwd=checkout, **cache)
    assert str(tmp_path / "cache") in report
    # Another source is another library.
    with (checkout / "csrc" / "register.cpp").open("a") as file:
        file.write("// changed\n")
    assert "('reference',)" in call("-W", "ignore", "-c", SMOKE, cwd=checkout, **cache)


def test_jit_build_without_a_compiler_says_so(checkout, tmp_path):
    program = "import ppcr_ext\ntry: ppcr_ext.build()\nexcept RuntimeError as error: print('said:', error)"
    output = call("-c", program, cwd=checkout, **without_compiler(tmp_path))
    assert "said: ppcr_ext cannot be compiled here: no C++ compiler: 'c++' is not on PATH" in output


@pytest.mark.full
def test_install_without_a_compiler_is_pure_python_and_says_so(checkout, tmp_path):
    environment = without_compiler(tmp_path)
    target = tmp_path / "site"
    install = ["-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target), "."]
    output = call(*install, cwd=checkout, **environment)
    assert "ppcr_ext: CPU kernels: not built: no C++ compiler" in output
    report = call("-m", "ppcr_ext", cwd=target, **environment)
    assert "the extension is not built (no C++ compiler: 'c++' is not on PATH" in report
    assert "available        reference" in report
    assert "('reference',) [[0.5, 0.5, 0.5, 0.5]]" in call("-W", "ignore", "-c", SMOKE, cwd=target, **environment)


@pytest.mark.full
def test_cuda_is_demanded_where_it_cannot_be_built(checkout, tmp_path):
    (tmp_path / "none").mkdir()
    environment = {"CUDA_HOME": str(tmp_path / "none"), "PPCR_BUILD_CUDA": "1"}
    output = call("setup.py", "build_ext", "--inplace", cwd=checkout, code=1, **environment)
    assert "PPCR_BUILD_CUDA=1, but the CUDA library cannot be built: nvcc was not found in CUDA_HOME" in output
    output = call("setup.py", "build_ext", "--inplace", cwd=checkout, code=1, PPCR_BUILD_CUDA="yes")
    assert "PPCR_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in output


@pytest.mark.full
def test_wheel(checkout, tmp_path):
    wheels = tmp_path / "wheels"
    build = ["-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(wheels), "."]
    output = call(*build, cwd=checkout, PPCR_BUILD_CUDA="0", MAX_JOBS="2")
    assert "ppcr_ext: CPU kernels: built" in output
    assert "ppcr_ext: CUDA kernels: not built: PPCR_BUILD_CUDA=0" in output
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.startswith(f"ppcr_ext-{ppcr_ext.__version__}-cp310-abi3-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("ppcr_ext/_build.json"))
    assert record == {"cpu": None, "cuda": "PPCR_BUILD_CUDA=0"}
    expected = {"__init__.py", "py.typed", "_cpu.abi3.so", "csrc/ppcr_pixel.h", "csrc/cpu/kernels_impl.h", "csrc/register.cpp"}
    assert {f"ppcr_ext/{name}" for name in expected} <= names
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)


def test_module_report():
    output = call("-m", "ppcr_ext", cwd=Path(ppcr_ext.__file__).parents[1])
    for words in (ppcr_ext.__version__, torch.__version__, "CPU capability", "CUDA archs", "native", "reference"):
        assert words in output


def test_debug_flag(monkeypatch):
    assert "-O3" in _build.compiler_flags()
    monkeypatch.setenv("DEBUG", "1")
    assert {"-O0", "-g"} <= set(_build.compiler_flags())
