"""Building and installing: JIT, without a compiler, as the environment asks; and the wheel."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ppcr_ext
from ppcr_ext import _native
from ppcr_ext._build import cpu as recipe
from ppcr_ext._build import jit

ROOT = Path(__file__).resolve().parent.parent
SMOKE = (
    "import torch, ppcr_ext; "
    "print(ppcr_ext.available_backends(), ppcr_ext.ppcr(torch.ones(1, 4), torch.zeros(7)).tolist())"
)

# Without optimization, which is sooner. make package compiles and runs the wheel as published.
QUICK = {"DEBUG": "1", "MAX_JOBS": "2"}


def call(*command, cwd, code=0, **environment):
    """stdout and stderr of a Python command; a variable set to None is removed."""
    merged = {
        k: v
        for k, v in (os.environ | {"PPCR_BUILD_CUDA": "0"} | environment).items()
        if v is not None
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=merged, capture_output=True, text=True, timeout=900
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def without_compiler(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir(exist_ok=True)
    return {"PATH": str(empty), "CXX": None, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}


@pytest.mark.full
def test_jit_build(checkout, tmp_path):
    cache = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), **QUICK}
    first = call("-c", SMOKE, cwd=checkout, PPCR_JIT="1", **cache)
    assert f"compiling {len(recipe.CPU_SOURCES)} files into {tmp_path}" in first
    assert f"[{len(recipe.CPU_SOURCES)}/" in first  # ninja's progress
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
    program = "import ppcr_ext\ntry: ppcr_ext.build()\n"
    program += "except RuntimeError as error: print('said:', error)"
    output = call("-c", program, cwd=checkout, **without_compiler(tmp_path))
    assert "said: ppcr_ext cannot be compiled here: no C++ compiler: 'c++' is not on PATH" in output


NO_COMPILER = "no C++ compiler: 'c++' is not on PATH"


@pytest.mark.full
def test_install_without_a_compiler_is_pure_python_and_says_so(checkout, tmp_path):
    """Plain pip shows it, the wheel is one for any machine, and the first import says it, once."""
    environment = without_compiler(tmp_path)
    site = tmp_path / "site"
    offline = ["--no-deps", "--no-index", "--no-cache-dir"]
    wheel = ["-m", "pip", "wheel", "--no-build-isolation", *offline, "-w", str(tmp_path), "."]
    output = call(*wheel, cwd=checkout, **environment)
    assert f"ppcr_ext: CPU kernels: not built: {NO_COMPILER}" in output
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"ppcr_ext-{ppcr_ext.__version__}-py3-none-any.whl"
    call("-m", "pip", "install", *offline, "--target", str(site), str(wheel), cwd=tmp_path)
    words = "RuntimeWarning: ppcr_ext runs its slow PyTorch reference for cpu tensors: "
    words += f"the extension is not built ({NO_COMPILER}"
    assert words in call("-c", "import ppcr_ext", cwd=site, **environment)
    output = call("-c", SMOKE, cwd=site, **environment)
    assert output.count(words) == output.count(NO_COMPILER) == 1
    assert "('reference',) [[0.5, 0.5, 0.5, 0.5]]" in output
    report = call("-W", "ignore", "-m", "ppcr_ext", cwd=site, **environment)
    assert f"cpu: the extension is not built ({NO_COMPILER}" in report
    assert f"; {_native._REMEDY}" in report
    assert "available        reference" in report
    assert "cpp_extension" not in report  # PyTorch's module would warn at every import


@pytest.mark.full
def test_pure_package_is_compiled_later(checkout, tmp_path):
    """What was installed without a compiler holds the sources; compiled, it is as any other."""
    call("setup.py", "build_ext", "--inplace", cwd=checkout, **without_compiler(tmp_path))
    record = json.loads((checkout / "ppcr_ext" / "_build.json").read_text())
    assert record["cpu"].startswith(NO_COMPILER)
    cache = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), **QUICK}
    program = "import ppcr_ext; ppcr_ext.build(verbose=False)"
    call("-W", "ignore", "-c", program, cwd=checkout, **cache)
    output = call("-c", SMOKE, cwd=checkout, **cache)
    assert "('native', 'reference')" in output
    assert "slow" not in output


def test_the_cuda_library_is_built_beside_a_loaded_one(monkeypatch):
    """Where that is in the cache, and where the CUDA library is wanted and can be built."""
    library, calls = Path("cache", "cpu.so"), []
    monkeypatch.setattr(_native, "library", library)
    monkeypatch.setattr(_native, "cuda_library", None)
    monkeypatch.setattr(_native, "_adopt", lambda path, *_: path)
    monkeypatch.setattr(jit, "built", lambda: library)
    monkeypatch.setattr(jit, "build", lambda *_: calls.append("build") or (library, None, None))
    monkeypatch.setattr(jit.cuda, "why_not", lambda version: None)

    def built(wanted):
        calls.clear()
        monkeypatch.setenv("PPCR_BUILD_CUDA", wanted)
        assert _native.build(verbose=False) == library
        return calls == ["build"]

    assert built("1")
    assert not built("0")
    monkeypatch.setattr(_native, "cuda_library", Path("cache", "cuda.so"))
    assert not built("1")
    monkeypatch.setattr(_native, "cuda_library", None)
    monkeypatch.setattr(jit.cuda, "why_not", lambda version: "no nvcc")
    with pytest.raises(RuntimeError, match=r"PPCR_BUILD_CUDA=1, but .* cannot be built: no nvcc"):
        built("1")
    monkeypatch.setattr(jit, "built", lambda: None)  # it stands beside the package
    assert not built("1")


@pytest.mark.parametrize(
    ("says", "words"),
    [("exit 1", "exit status 1"), ("echo 'no such standard' >&2; exit 1", "no such standard")],
)
def test_compiler_that_is_too_old(says, words, tmp_path, monkeypatch):
    (tmp_path / "g++-4").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "g++-4").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "g++-4"))
    reason = f"no C++17 compiler: '{tmp_path}/g++-4' cannot compile a line of it ({words}); "
    assert recipe.why_no_compiler().startswith(reason)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")
def test_old_setuptools():
    """It cannot read pyproject.toml; what it says of that is a page."""
    program = "import setuptools; setuptools.__version__ = '65.5.0'; exec(open('setup.py').read())"
    output = call("-c", program, cwd=ROOT, code=1)
    needed = "77 or newer is needed: pip install 'setuptools>=77'"
    assert output == f"ppcr_ext: setuptools is 65.5.0, and {needed}\n"
    install = (ROOT / "README.md").read_text().partition("\n## Install\n")[2]
    assert "\npip install torch 'setuptools>=77' ninja\n" in install


@pytest.mark.full
def test_editable_install(checkout, tmp_path):
    """In an environment of its own, which sees the packages of this one."""
    call("-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(packages))
    install = [
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--editable",
        ".",
    ]
    call(*install, cwd=checkout, **QUICK)
    ask = [python, "-c", SMOKE + "; print(ppcr_ext.__file__)"]
    done = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True)
    assert f"('native', 'reference') [[0.5, 0.5, 0.5, 0.5]]\n{checkout}" in done.stdout, done.stderr
    objects = {path: path.stat().st_mtime_ns for path in checkout.glob("build/**/*.o")}
    assert len(objects) == len(recipe.CPU_SOURCES)
    os.utime(checkout / "csrc" / "register.cpp")
    call(*install, cwd=checkout, **QUICK)
    compiled = [path.name for path in objects if path.stat().st_mtime_ns != objects[path]]
    assert compiled == ["register.o"]


@pytest.mark.full
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_set_up_of_an_environment_without_pip(tmp_path):
    """As uv makes it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    recipes = ("setup.py", "pyproject.toml", "ppcr_ext/_build.py", "ppcr_ext/_cuda_build.py")
    for name in ("requirements/dev.txt", *recipes):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    call("-m", "venv", "--without-pip", ".venv", cwd=tmp_path)
    command = ["make", ".venv/.installed-pinned"]
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "TORCH")  # of the make that runs this
    settings = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob(".venv/lib/python*/site-packages/pip"))
    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)  # some systems' Python has no ensurepip
    bare = tmp_path / ".venv" / "bin" / "python"
    program = 'import sys; exec(sys.argv[2] if sys.argv[1] == "-c" else "1/0")'
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -S -c '{program}' \"$@\"\n")
    bare.chmod(0o755)
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode != 0
    assert ".venv has no pip: install one there, or remove .venv and let make" in done.stderr


@pytest.mark.full
def test_cuda_is_demanded_where_it_cannot_be_built(checkout, tmp_path):
    (tmp_path / "none").mkdir()
    environment = {"CUDA_HOME": str(tmp_path / "none"), "PPCR_BUILD_CUDA": "1"}
    output = call("setup.py", "build_ext", "--inplace", cwd=checkout, code=1, **environment)
    assert (
        "PPCR_BUILD_CUDA=1, but the CUDA library cannot be built: nvcc was not found in CUDA_HOME"
        in output
    )
    output = call("setup.py", "build_ext", "--inplace", cwd=checkout, code=1, PPCR_BUILD_CUDA="yes")
    assert "PPCR_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in output


@pytest.mark.full
def test_wheel(checkout, tmp_path):
    wheels = tmp_path / "wheels"
    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    output = call(*build, "-w", str(wheels), ".", cwd=checkout, **QUICK)
    # though pip shows nothing of a build
    assert f"ppcr_ext: compiling the CPU kernels, {len(recipe.CPU_SOURCES)} files" in output
    assert "ppcr_ext: CPU kernels: built" in output
    assert "ppcr_ext: CUDA kernels: not built: PPCR_BUILD_CUDA=0" in output
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.startswith(f"ppcr_ext-{ppcr_ext.__version__}-cp310-abi3-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("ppcr_ext/_build.json"))
    assert record == {"cpu": None, "cuda": "PPCR_BUILD_CUDA=0"}
    expected = {
        "__init__.py",
        "py.typed",
        "_cpu.abi3.so",
        "csrc/ppcr_pixel.h",
        "csrc/cpu/kernels_impl.h",
        "csrc/register.cpp",
    }
    assert {f"ppcr_ext/{name}" for name in expected} <= names
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)


def test_module_report():
    output = call("-m", "ppcr_ext", cwd=Path(ppcr_ext.__file__).parents[1])
    for words in (
        ppcr_ext.__version__,
        torch.__version__,
        "CPU capability",
        "CUDA archs",
        "native",
        "reference",
    ):
        assert words in output


def test_debug_flag(monkeypatch):
    assert "-O3" in recipe.compiler_flags()
    monkeypatch.setenv("DEBUG", "1")
    assert {"-O0", "-g"} <= set(recipe.compiler_flags())
