"""Builds the emulated CUDA runtime, and a copy of the package with its CUDA library.

The runtime, which holds the kernels of tests/cuda_on_cpu by name, needs g++ and the wheels that
PyTorch for CUDA brings along; the CUDA library needs nvcc. This file as a script builds both;
``environment()`` is what a process needs to run on them.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cuda_on_cpu import build as cuda_on_cpu

from ppcr_ext._build import cuda as recipe

TORCH = Path(torch.__file__).parent
BUILD = ROOT / "build" / "cuda_host"
# Under the name that PyTorch asks for, such as libcudart.so.13.
RUNTIME = BUILD / f"libcudart.so.{(torch.version.cuda or '0').partition('.')[0]}"
DRIVER = BUILD / "libcuda.so.1"
GUARDED = {"CUDA_HOST_GUARD": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The devices, and more settings, of every file of tests.
TESTS: dict[str, tuple[str, dict[str, str]]] = {
    "emulated_calls.py": ("9.0 9.0:mb=96", {}),
    "emulated_devices.py": ("9.0 9.0:sms=24,kb=99,clusters=0 8.0 9.0:sms=1", {}),
    "emulated_memory.py": ("9.0", GUARDED),
    "test_gpu.py": ("9.0 9.0", {}),
}
FLAGS = ("-std=c++20", "-O1", "-g", "-fPIC", "-Wall", "-Wextra")


def names(file: Path, which: str, pattern: str) -> set[str]:
    """Symbols that a file defines or needs."""
    options = ["nm", *(["-D"] if file.suffix == ".so" else []), which, str(file)]
    listed = subprocess.run(options, capture_output=True, text=True, check=True).stdout
    return set(re.findall(rf" [TWU] ({pattern})(?:@\S+)?$", listed, re.MULTILINE))


def link(target: Path, *arguments: str | Path) -> None:
    """A process that runs beside this one sees all of the library or nothing."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    compiler = (os.environ.get("CXX") or "g++").split()
    command = [*compiler, "-shared", *map(str, arguments), "-o", str(partial)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    partial.replace(target)


def stubs() -> Iterator[str]:
    """What PyTorch imports and nobody wrote says so, and fails as not supported."""
    yield 'extern "C" int cuda_host_lacks(const char* name);'
    libraries = (TORCH / "lib").glob("lib*.so")
    pattern = r"(?:_*cuda|cu)[A-Z]\w*"
    wanted = set().union(*(names(file, "--undefined-only", pattern) for file in libraries))
    for name in sorted(wanted):
        stub = f'int {name}() {{ return cuda_host_lacks("{name}"); }}'
        yield f'extern "C" __attribute__((weak)) {stub}'


def kernel_names(objects: Iterable[Path]) -> Iterator[str]:
    """The names of the kernels, and of what is compiled beside them, by address."""
    found = (names(file, "--defined-only", r"_ZN4ppcr4cuda\w+") for file in objects)
    kernels = sorted(set().union(*found))
    yield "#include <map>"
    yield from (f'extern "C" char {name}[];' for name in kernels)
    yield "namespace cuda_host { extern const std::map<const void*, const char*> kKernelNames = {"
    yield from (f'{{{name}, "{name}"}},' for name in kernels)
    yield "}; }"


def build_runtime(objects: list[Path]) -> None:
    folders = TORCH.parent.glob("nvidia/cu*/include")
    headers = [folder for folder in folders if (folder / "cuda_runtime_api.h").exists()]
    if not headers:
        raise SystemExit("no cuda_runtime_api.h beside PyTorch: install one of its CUDA builds")
    generated = BUILD / "generated.cpp"
    generated.write_text("\n".join([*stubs(), *kernel_names(objects)]))
    symbols = BUILD / "runtime.map"
    symbols.write_text(f"{RUNTIME.name} {{ global: cu*; __cuda*; local: *; }};\n")
    sources = [*sorted((HERE / "runtime").glob("*.cpp")), generated]
    includes = [f"-I{HERE / 'runtime'}", "-isystem", headers[0], "-isystem", TORCH / "include"]
    named = f"-Wl,-soname,{RUNTIME.name},--version-script={symbols}"
    link(RUNTIME, *FLAGS, *includes, *sources, *objects, named)
    # The driver's functions are in the runtime; who asks for the driver's library gets this one.
    link(DRIVER, "-Wl,--no-as-needed", RUNTIME, f"-Wl,-soname,{DRIVER.name}")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process or thread builds, the others wait."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> None:
    """What has not changed is not compiled again."""
    with alone():
        fibers = cuda_on_cpu.build().parent
        digest = hashlib.sha256(f"{fibers}{TORCH}{torch.__version__}{FLAGS}".encode())
        for path in sorted([*(HERE / "runtime").rglob("*.*"), Path(__file__)]):
            digest.update(path.read_bytes())
        stamp = BUILD / "stamp"
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            stamp.unlink(missing_ok=True)
            build_runtime(sorted(fibers.glob("run_*.o")))
            stamp.write_text(digest.hexdigest())


def library() -> Path:
    """The CUDA library for sm_90, built as an installation does."""
    output = BUILD / "_cuda.abi3.so"
    with alone():
        work, version = BUILD / "nvcc", torch.version.cuda
        recipe.build(output, ROOT / "csrc", work, TORCH, version, "9.0")
    return output


def checkout() -> Path:
    """A copy of what runs on a GPU, its package with the CUDA library."""
    folder = BUILD / "checkout"
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for part in ("ppcr_ext", "tests", "tools", "benchmarks", "csrc"):
        shutil.rmtree(folder / part, ignore_errors=True)
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for part in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / part, folder)
    shutil.copy(library(), folder / "ppcr_ext" / "_cuda.abi3.so")
    return folder


def environment(devices: str = "9.0 9.0", **settings: str) -> dict[str, str]:
    """Of a process in a checkout, with these devices; runtime/devices.cpp says what they can be."""
    build()
    preloaded = {"LD_PRELOAD": f"{RUNTIME}:{DRIVER}", "CUDA_HOST_DEVICES": devices}
    return {**os.environ, "PYTHONPATH": "tests", **preloaded, **settings}


def run_tests(folder: Path, file: str, *options: str) -> tuple[int, str, str]:
    """Status and output of pytest, in a process in a checkout that sees the devices of a file."""
    devices, own = TESTS[file]
    plugins = ["-p", "cuda_host.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, f"tests/{file}", *options]
    env = environment(devices, **own)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout, done.stderr


if __name__ == "__main__":
    copy = checkout()
    if sys.argv[1:]:  # devices, such as "9.0 9.0", and a command to run on them
        os.chdir(copy)
        os.execvpe(sys.argv[2], sys.argv[2:], environment(sys.argv[1]))
    print(copy)
