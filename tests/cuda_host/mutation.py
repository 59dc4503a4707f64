"""Plants a fault in the code between Python and the kernels: do the tests on emulated devices see it?

Of the CUDA library only what the fault changes is compiled: the entry, or for launches the file of
one dtype, as PTX, which the emulated driver takes for code. tools/mutate.py calls it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from cuda_host import build
from mutants import Mutant, host

SETTINGS = {
    host.CALLS: ("9.0", {}),
    host.DEVICES: ("9.0 9.0:sms=24,kb=99,clusters=0 8.0", {}),
    host.MEMORY: ("9.0", {"CUDA_HOST_GUARD": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
}


def compile_changed(csrc: Path, mutant: Mutant | None, folder: Path) -> Path:
    """The CUDA library with what the mutant changes, linked with the sound objects of the rest."""
    sys.path.insert(0, str(build.ROOT / "tools"))
    import cuda_build

    recipe = cuda_build.recipe()
    nvcc, torch = recipe.find_nvcc(), build.torch_folder()
    sound = build.BUILD / "nvcc"
    objects = {name: sound / f"{name}.o" for name in (*recipe.KERNEL_SOURCES, recipe.ENTRY_SOURCE)}
    if mutant is not None:
        is_launch = mutant.file == host.LAUNCH
        source = "launch_float.cu" if is_launch else recipe.ENTRY_SOURCE
        if is_launch:
            ptx = recipe.Architectures((), "90")
            flags = [*recipe.kernel_flags(nvcc, ptx), "-Xcicc", "-O0"]
        else:
            known = recipe.Architectures(("90",), None)
            flags = [*recipe.entry_flags(nvcc, known, [str(torch / "include")]), "-O0"]
        objects[source] = folder / f"{source}.o"
        command = [*flags, "-c", str(csrc / "cuda" / source), "-o", str(objects[source])]
        subprocess.run(command, check=True, capture_output=True)
    (runtime,) = build.BUILD.glob("libcudart.so.[0-9][0-9]")
    libraries = [runtime, *(torch / "lib" / f"lib{name}.so" for name in ("torch_cuda", "c10"))]
    libraries.append(torch / "lib" / "libtorch_cpu.so")
    return build.link(folder / "_cuda.abi3.so", *map(str, [*objects.values(), *libraries]))


def caught_by(mutant: Mutant | None, folder: Path, file: str | None = None) -> str | None:
    """The first test that fails, or how the tests died; None where all pass."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(build.ROOT / "csrc", folder / "csrc")
    if mutant is not None:
        mutant.plant(folder / "csrc")
    library = compile_changed(folder / "csrc", mutant, folder)
    checkout = build.checkout(library, folder / "checkout")
    chosen = file or (mutant and mutant.tests)
    for name in [chosen] if chosen else SETTINGS:
        devices, settings = SETTINGS[name]
        plugins = ["-p", "cuda_host.plugin", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", *plugins]
        result = subprocess.run(
            [*command, f"tests/{name}"],
            cwd=checkout,
            env=build.environment(devices, **settings),
            capture_output=True,
            text=True,
            timeout=600,
        )
        failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERR"))]
        if failed:
            return failed[0].split(" - ")[0]
        if result.returncode < 0:
            return f"{name}: a test killed by signal {-result.returncode}"
        if result.returncode:
            raise SystemExit(f"the tests did not run: {(result.stdout + result.stderr)[-4000:]}")
    return None


if __name__ == "__main__":
    for one in host.MUTANTS:
        if not sys.argv[1:] or any(word in one.name for word in sys.argv[1:]):
            print(one.name, "->", caught_by(one, build.BUILD / "mutant"), flush=True)
