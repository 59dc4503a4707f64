"""Builds the emulated CUDA runtime, and a copy of the package with its CUDA library.

The runtime (libcudart, libcuda, and the kernels of tests/cuda_on_cpu by name) needs g++ and the
wheels that PyTorch for CUDA brings along; the CUDA library needs nvcc. This file as a script builds
both; ``environment()`` is what a process needs to run on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import cuda_build
from cuda_on_cpu import build as cuda_on_cpu

RUNTIME = HERE / "runtime"
BUILD = ROOT / "build" / "cuda_host"
FLAGS = ("-std=c++20", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", f"-I{RUNTIME}")


def torch_folder() -> Path:
    """Found, not imported, which would load its libraries without the emulated runtime."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def cuda_headers() -> Path:
    for folder in torch_folder().parent.glob("nvidia/cu*/include"):
        if (folder / "cuda_runtime_api.h").exists():
            return folder
    raise SystemExit("no cuda_runtime_api.h beside PyTorch: install one of its CUDA builds")


def names(library: Path, which: str, pattern: str) -> set[str]:
    """Symbols that a library defines or needs."""
    options = ["nm", *(["-D"] if library.suffix == ".so" else []), which, str(library)]
    listed = subprocess.run(options, capture_output=True, text=True, check=True).stdout
    return set(re.findall(rf" [TWU] ({pattern})(?:@\S+)?$", listed, re.MULTILINE))


def compiler(*arguments: str) -> None:
    command = [*(os.environ.get("CXX") or "g++").split(), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")


def compile_sources(sources: Iterable[Path], *flags: str) -> list[str]:
    objects = [BUILD / f"{source.name}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        compiler(
            *FLAGS, *flags, "-isystem", str(cuda_headers()), "-c", str(source), "-o", str(target)
        )
    return [str(target) for target in objects]


def stubs(name: str, wanted: Iterable[str]) -> Path:
    """Functions that PyTorch imports and nobody wrote: they say so, and fail as not supported."""
    lines = ['extern "C" int cuda_host_lacks(const char* name);']
    lines += [f'extern "C" int {n}() {{ return cuda_host_lacks("{n}"); }}' for n in sorted(wanted)]
    path = BUILD / f"{name}_stubs.cpp"
    path.write_text("\n".join(lines) + "\n")
    return path


def link(target: Path, *arguments: str) -> Path:
    """A process that runs beside this one sees all of the library or nothing."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    compiler("-shared", *arguments, "-o", str(partial))
    partial.replace(target)
    return target


def build_runtime() -> tuple[Path, Path]:
    """libcudart under the name that PyTorch asks for, and libcuda."""
    libraries = sorted((torch_folder() / "lib").glob("lib*.so"))
    needed = subprocess.run(
        ["readelf", "-d", str(torch_folder() / "lib" / "libc10_cuda.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    soname = re.search(r"\[(libcudart\.so\.\d+)\]", needed)
    if soname is None:
        raise SystemExit("this PyTorch brings no CUDA runtime as a library of its own")
    script = BUILD / "runtime.map"
    script.write_text(f"{soname[1]} {{ global: cuda*; __cuda*; local: *; }};\n")

    def objects(sources: list[Path], pattern: str) -> list[str]:
        written = compile_sources(sources)
        defined = set().union(*(names(Path(o), "--defined-only", r"\w+") for o in written))
        wanted = set().union(*(names(lib, "--undefined-only", pattern) for lib in libraries))
        return [*written, *compile_sources([stubs(sources[0].stem, wanted - defined)])]

    sources = [RUNTIME / f"{name}.cpp" for name in ("devices", "memory", "streams", "launches")]
    runtime = link(
        BUILD / soname[1],
        *objects(sources, r"_*cuda[A-Z]\w*"),
        f"-Wl,-soname,{soname[1]},--version-script={script}",
        "-ldl",
    )
    driver = link(
        BUILD / "libcuda.so.1",
        *objects([RUNTIME / "driver.cpp"], r"cu(?!das|bl|dn)[A-Z]\w*"),
        "-Wl,-soname,libcuda.so.1",
        str(runtime),
    )
    return runtime, driver


def build_kernels(objects: list[Path]) -> Path:
    """The library of kernels, from the objects of tests/cuda_on_cpu, with their names beside it."""
    own = compile_sources([RUNTIME / "kernels.cpp"], "-isystem", str(torch_folder() / "include"))
    library = link(BUILD / "libkernels.so", *own, *map(str, objects))
    listed = subprocess.run(
        ["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    kernels = re.findall(r"^([0-9a-f]+) \w (_ZN4ppcr4cuda\w+)$", listed, re.MULTILINE)
    (BUILD / "libkernels.so.names").write_text("".join(f"{at} {name}\n" for at, name in kernels))
    return library


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process or thread builds, the others wait."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """The folder of the libraries; what has not changed is not compiled again."""
    with alone():
        fibers = cuda_on_cpu.build().parent
        digest = hashlib.sha256(f"{fibers}{torch_folder()}{FLAGS}".encode())
        for path in sorted([*RUNTIME.rglob("*.*"), Path(__file__)]):
            digest.update(path.read_bytes())
        stamp = BUILD / "stamp"
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            stamp.unlink(missing_ok=True)
            build_runtime()
            build_kernels(sorted(fibers.glob("run_*.o")))
            stamp.write_text(digest.hexdigest())
    return BUILD


def runtime_library() -> Path:
    (runtime,) = build().glob("libcudart.so.[0-9][0-9]")
    return runtime


def library() -> Path:
    """The CUDA library for sm_90, built as an installation does."""
    output = BUILD / "_cuda.abi3.so"
    with alone():
        cuda_build.build(output, "9.0", BUILD / "nvcc")
    return output


def checkout(cuda_library: Path, folder: Path = BUILD / "checkout") -> Path:
    """A copy of what runs on a GPU, its package with that CUDA library."""
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for part in ("ppcr_ext", "tests", "tools", "benchmarks", "csrc"):
        shutil.rmtree(folder / part, ignore_errors=True)
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    for part in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / part, folder)
    shutil.copy(cuda_library, folder / "ppcr_ext" / "_cuda.abi3.so")
    return folder


def environment(devices: str = "9.0 9.0", **settings: str) -> dict[str, str]:
    """Of a process in a checkout, with these devices; runtime/devices.cpp says what they can be."""
    folder = build()
    return {
        **os.environ,
        "PYTHONPATH": "tests",
        "LD_PRELOAD": f"{runtime_library()}:{folder / 'libcuda.so.1'}",
        "CUDA_HOST_KERNELS": str(folder / "libkernels.so"),
        "CUDA_HOST_DEVICES": devices,
        **settings,
    }


if __name__ == "__main__":
    copy = checkout(library())
    if sys.argv[1:]:  # devices, such as "9.0 9.0", and a command to run on them
        os.chdir(copy)
        os.execvpe(sys.argv[2], sys.argv[2:], environment(sys.argv[1]))
    print(copy)
