"""Compiles the CUDA kernels for the CPU into a Python module.

That takes g++, pybind11 and torch's headers, and no CUDA toolkit.
"""

import concurrent.futures
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = (
    "run_bfloat16.cpp",
    "run_half.cpp",
    "run_float.cpp",
    "run_double.cpp",
    "binding.cpp",
)  # the longest first
# Dtypes that need not be compiled, such as "half,double", for the many runs of tools/mutate.py.
LEFT_OUT = tuple(filter(None, os.environ.get("CUDA_ON_CPU_LEFT_OUT", "").split(",")))
FLAGS = (
    "-std=c++17",
    "-O0" if LEFT_OUT else "-O1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
)
# A call at every access to memory, the harness told nothing of it, 16-byte structs kept whole.
INSTRUMENTED = ("-fsanitize=thread", "-U__SANITIZE_THREAD__", "-fno-tree-sra", "-w")


def _include_flags() -> list[str]:
    import pybind11
    import torch

    folders = (
        pybind11.get_include(),
        sysconfig.get_path("include"),
        Path(torch.__file__).parent / "include",
    )
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


def _fingerprint(flags: list[str]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode() + sys.version.encode())
    for folder, pattern in (
        (HERE, "*.[ch]*"),
        (ROOT / "csrc", "*.h"),
        (ROOT / "csrc" / "cuda", "*.[ch]*"),
    ):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(
    extra_flags: tuple[str, ...] = (),
    left_out: tuple[str, ...] = LEFT_OUT,
    bank_conflicts: bool = False,
) -> Path:
    """Path of the compiled module. Unchanged sources are not compiled again.

    ``extra_flags`` such as ``("-fsanitize=undefined",)`` go to every file. ``bank_conflicts`` makes
    the kernels call bank_conflicts.cpp at every access to memory.
    """
    flags = [*FLAGS, *extra_flags, *_include_flags()]
    what = [*flags, *left_out, str(bank_conflicts)]
    folder = ROOT / "build" / "cuda_on_cpu" / _fingerprint(what)
    sources = [*SOURCES, *(["bank_conflicts.cpp"] if bank_conflicts else [])]
    module = folder / f"ppcr_cuda_on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    hour_ago = time.time() - 3600
    for old in folder.parent.iterdir():  # of earlier sources; a younger one may be under way
        if old != folder and old.stat().st_mtime < hour_ago:
            shutil.rmtree(old, ignore_errors=True)
    compiler = os.environ.get("CXX", "g++")

    def compile_source(source: str) -> Path:
        object_file = folder / f"{source}.o"
        own = []
        if source.removeprefix("run_").removesuffix(".cpp") in left_out:
            own += ["-DCUDA_ON_CPU_LEFT_OUT"]
        if bank_conflicts and source.startswith("run_"):
            own += INSTRUMENTED
        command = [compiler, *flags, *own, "-c", str(HERE / source), "-o", str(object_file)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        if result.stderr:
            print(result.stderr, file=sys.stderr)
        return object_file

    jobs = int(os.environ.get("MAX_JOBS", min(len(sources), os.cpu_count() or 1)))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_source, sources))
    partial = module.with_name(f"{module.name}.{os.getpid()}")
    subprocess.run(
        [compiler, "-shared", *extra_flags, *map(str, objects), "-o", str(partial)], check=True
    )
    partial.replace(module)  # a test run beside this one sees all of it or nothing
    return module


def load(path: Path | None = None) -> ModuleType:
    """The compiled module, built if need be."""
    path = path or build()
    # A name for every build: pybind11 returns the first module that it loaded under a name.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.ppcr_cuda_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())
