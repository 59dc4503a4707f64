"""A fault between Python and the kernels: do the tests on emulated devices see it?

Of the CUDA library only what the fault changes is compiled: the entry, or for launches the file of
one dtype, as PTX, which the emulated driver takes for code. tools/mutate.py calls it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
from mutants import Mutant, host

from cuda_host import build

GUARDED = {"CUDA_HOST_GUARD": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The devices, and more settings, of every file of tests.
SETTINGS = {
    host.CALLS: ("9.0 9.0:mb=96", {}),
    host.DEVICES: ("9.0 9.0:sms=24,kb=99,clusters=0 8.0", {}),
    host.MEMORY: ("9.0", GUARDED),
}


def compile_changed(folder: Path, mutant: Mutant | None) -> None:
    """The CUDA library of a copy: what the mutant changes, with the sound objects of the rest."""
    sound = build.library().parent / "nvcc"
    recipe = cuda_build.recipe()
    nvcc, torch = recipe.find_nvcc(), build.torch_folder()
    objects = {name: sound / f"{name}.o" for name in (*recipe.KERNEL_SOURCES, recipe.ENTRY_SOURCE)}
    if mutant is not None:
        if mutant.file == host.LAUNCH:
            source, ptx = "launch_float.cu", recipe.Architectures((), "90")
            flags = [*recipe._kernel_command(nvcc, ptx), "-Xcicc", "-O0"]
        else:
            source, known = recipe.ENTRY_SOURCE, recipe.Architectures(("90",), None)
            flags = [*recipe._entry_command(nvcc, known, torch), "-O0"]
        # First, since of an inline function that several files hold the linker takes the first one.
        objects = {source: folder / f"{source}.o"} | {
            n: o for n, o in objects.items() if n != source
        }
        command = [*flags, "-c", str(folder / "csrc" / "cuda" / source), "-o", str(objects[source])]
        subprocess.run(command, check=True, capture_output=True)
    libraries = [torch / "lib" / f"lib{name}.so" for name in ("torch_cuda", "torch_cpu", "c10")]
    libraries.append(build.runtime_library())
    target = folder / "ppcr_ext" / "_cuda.abi3.so"
    build.link(target, *map(str, [*objects.values(), *libraries]))


def caught_by(mutant: Mutant | None, folder: Path) -> str | None:
    """The first test that fails in a copy with the fault, or how the tests died; else None."""
    libraries = folder / "ppcr_ext"
    shutil.copy(build.ROOT / "ppcr_ext" / "_cpu.abi3.so", libraries)
    compile_changed(folder, mutant)
    for name in [mutant.tests] if mutant and mutant.tests else SETTINGS:
        devices, settings = SETTINGS[name]
        plugins = ["-p", "cuda_host.plugin", "-p", "no:cacheprovider"]
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", *plugins, f"tests/{name}"],
            cwd=folder,
            env=build.environment(devices, **settings),
            capture_output=True,
            text=True,
            timeout=600,
        )
        lines = result.stdout.splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if failed:
            return failed[0].split(" - ")[0]
        if result.returncode < 0:
            return f"{name}: a test killed by signal {-result.returncode}"
        if result.returncode:
            raise SystemExit(f"the tests did not run: {(result.stdout + result.stderr)[-4000:]}")
    return None
