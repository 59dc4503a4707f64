"""Does the test-suite see faults? Plants those of tests/mutants one at a time in a copy of the sources and runs the tests there.

``python tools/mutate.py [sample | cpu | cuda | text of a name ...]``: prints every mutant with the test that fails, the score, and the
survivors with the reason why none can. Exit status 1 where a mutant passes unseen, or is seen although its reason says that none can.

Of the CPU library only what a mutant changes is compiled, for one instruction set; of the CUDA kernels one dtype. A mutant that a
first choice of quick tests does not see gets more of them.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(
    0, str(ROOT / "ppcr_ext")
)  # for _build/, without the package around it, which would import torch

import sanitize
from _build import cpu as _build
from mutants import Mutant, cpu, cuda

WORK = ROOT / "build" / "mutants"
PROCESSES = multiprocessing.get_context("forkserver")
# What is compiled again for a file of csrc: of the kernels those of the one instruction set that the tests then use.
DEPENDENT = {
    "ppcr_types.h": ("cpu/ppcr_cpu.cpp", "cpu/plan.cpp", "cpu/kernels_avx2.cpp"),
    "ppcr_pixel.h": ("cpu/kernels_avx2.cpp",),
    "cpu/kernels_impl.h": ("cpu/kernels_avx2.cpp",),
    "cpu/simd.h": ("cpu/kernels_avx2.cpp",),
    "cpu/plan.cpp": ("cpu/plan.cpp",),
    "cpu/ppcr_cpu.cpp": ("cpu/ppcr_cpu.cpp",),
    "checks.h": ("cpu/ppcr_cpu.cpp",),
}
# Files and options of pytest, quick ones first.
QUICK_CPU = (
    (
        "test_definition.py",
        "test_edges.py",
        "test_errors.py",
        "test_properties.py",
        "-k",
        "not missing_native_library",
    ),
)
WIDE_CPU = (*QUICK_CPU, ("test_accuracy.py", "test_autograd.py", "test_sigmoid.py"))
QUICK_CUDA = ("test_cuda_plan.py", "test_cuda_on_cpu.py")
NOT_QUICK = "not float16 and not float64 and not resnet and not full_depth and not more_than_2 and not executed and not bfloat16"


def compile_cpu(csrc: Path, source: str, target: Path) -> Path:
    flags = [
        "-std=c++20",
        *_build.compiler_flags(),
        "-O0",
        "-fPIC",
        "-isystem",
        str(sanitize.torch_headers()),
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [os.environ.get("CXX", "g++"), *flags, "-c", str(csrc / source), "-o", str(target)],
        check=True,
    )
    return target


@functools.cache
def sound_objects() -> dict[str, Path]:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        targets = {
            source: WORK / "sound" / f"{Path(source).stem}.o" for source in _build.CPU_SOURCES
        }
        list(pool.map(lambda item: compile_cpu(ROOT / "csrc", *item), targets.items()))
    return targets


def link_cpu(folder: Path, changed: tuple[str, ...]) -> None:
    objects = sound_objects() | {
        s: compile_cpu(folder / "csrc", s, folder / f"{Path(s).stem}.o") for s in changed
    }
    torch_lib = sanitize.torch_headers().parent / "lib"
    link = ["-shared", *map(str, objects.values()), f"-L{torch_lib}", "-ltorch_cpu", "-lc10"]
    subprocess.run(
        [os.environ.get("CXX", "g++"), *link, "-o", str(folder / "ppcr_ext" / "_cpu.abi3.so")],
        check=True,
    )


def copy_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("csrc", "tests", "ppcr_ext", "tools"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", folder)


def first_failure(folder: Path, arguments: tuple[str, ...], **environment: str) -> str | None:
    """The first failing test, or how the tests died; None where all pass."""
    files = [
        f"tests/{a}" if a.endswith(".py") else a
        for a in arguments
        if not a.endswith(".py") or (folder / "tests" / a).exists()
    ]
    settings = {"MAX_JOBS": "1", "PPCR_CPU_CAPABILITY": "avx2"} | environment
    output = folder / "output.txt"
    process = PROCESSES.Process(target=run_tests, args=(folder, files, settings, output))
    process.start()
    process.join(1200)
    if process.exitcode is None:
        process.kill()
        return "tests that do not end"
    if process.exitcode in (0, 5):  # 5: no test of that name
        return None
    said = output.read_text()
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if failed:
        return failed[0].split(" - ")[0]
    if process.exitcode < 0:
        return f"a test killed by signal {-process.exitcode}"
    raise SystemExit(f"the tests did not run: {said[-4000:]}")


def run_tests(folder: Path, arguments: list[str], settings: dict[str, str], output: Path) -> None:
    """In a process of its own, into which torch has been imported already."""
    os.environ.update(settings)
    os.chdir(folder)
    beside = {str(ROOT / part) for part in ("tools", "tests", "ppcr_ext", "")}
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry.rstrip("/") not in beside)]
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("mutants", "_build", "sanitize")
    ]:
        del sys.modules[name]
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    code = int(
        pytest.main(
            ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={folder}", *arguments]
        )
    )
    sys.stdout.flush()
    os._exit(code)


def first_failure_of_cpu(folder: Path, mutant: Mutant | None, wide: bool) -> str | None:
    link_cpu(folder, DEPENDENT[mutant.file] if mutant else ())
    if mutant and mutant.tests == "sanitize":
        command = [sys.executable, "tools/sanitize.py", "cpu-address"]
        result = subprocess.run(
            command, cwd=folder, env=os.environ | {"MAX_JOBS": "1"}, capture_output=True, text=True
        )
        return (
            "make sanitize: AddressSanitizer"
            if "ERROR: AddressSanitizer" in result.stdout
            else None
        )
    for arguments in WIDE_CPU if wide else QUICK_CPU:
        failure = first_failure(folder, arguments)
        if failure:
            return failure
    return None


def first_failure_of_cuda(folder: Path, mutant: Mutant | None, wide: bool) -> str | None:
    if mutant and mutant.tests:
        return first_failure(
            folder, (*QUICK_CUDA, "-k", mutant.tests), CUDA_ON_CPU_LEFT_OUT="float,bfloat16,double"
        )
    failure = first_failure(
        folder, (*QUICK_CUDA, "-k", NOT_QUICK), CUDA_ON_CPU_LEFT_OUT="half,bfloat16,double"
    )
    return failure or (first_failure(folder, QUICK_CUDA) if wide else None)


def caught_by(mutant: Mutant, folder: Path, wide: bool) -> str | None:
    """What sees a mutant, or None."""
    copy_tree(folder)
    mutant.plant(folder / "csrc")
    return (first_failure_of_cuda if mutant in cuda.MUTANTS else first_failure_of_cpu)(
        folder, mutant, wide
    )


def chosen(words: list[str]) -> list[Mutant]:
    everything = [*cpu.MUTANTS, *cuda.MUTANTS]
    groups = {
        "sample": [m for m in everything if m.sample],
        "cpu": list(cpu.MUTANTS),
        "cuda": list(cuda.MUTANTS),
    }
    if not words:
        return everything
    return [
        m for m in everything if any(m in groups[w] if w in groups else w in m.name for w in words)
    ]


def main() -> None:
    mutants = chosen(sys.argv[1:])
    if not mutants:
        raise SystemExit("no mutant of that name")
    started = time.monotonic()
    folders: queue.Queue[Path] = queue.Queue()
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    for index in range(jobs):
        folders.put(WORK / f"copy{index}")
    for mutant in mutants:  # all texts are there, before anything takes time
        copy = WORK / "texts"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", copy)
        mutant.plant(copy)
    sound_objects()
    PROCESSES.set_forkserver_preload(
        [
            "torch",
            "torch.utils.cpp_extension",
            "torch._dynamo",
            "pytest",
            "numpy",
            "hypothesis",
            "pybind11",
        ]
    )

    def run(mutant: Mutant) -> tuple[str | None, float]:
        folder, begin = folders.get(), time.monotonic()
        try:
            return caught_by(
                mutant, folder, wide="sample" not in sys.argv[1:]
            ), time.monotonic() - begin
        finally:
            folders.put(folder)

    copy_tree(WORK / "copy0")  # what fails without a mutant sees none
    for engine, of in ((first_failure_of_cpu, cpu.MUTANTS), (first_failure_of_cuda, cuda.MUTANTS)):
        if set(of) & set(mutants) and (failure := engine(WORK / "copy0", None, wide=False)):
            raise SystemExit(f"without any mutant a test fails: {failure}")
    caught, unseen, wrong = 0, [], 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, mutant): mutant for mutant in mutants}
        for future in concurrent.futures.as_completed(futures):
            mutant, (failure, seconds) = futures[future], future.result()
            name = f"{mutant.file}: {mutant.name}"
            caught += failure is not None
            if failure is None:
                unseen.append(f"{name}: {mutant.survives or 'NO TEST SEES IT'}")
            wrong += (failure is None) != bool(mutant.survives)
            print(
                f"{'caught' if failure else 'unseen'} {seconds:4.0f} s  {name}: {failure or mutant.survives or 'NO TEST'}",
                flush=True,
            )
    print(
        f"{caught} of {len(mutants)} mutants caught in {time.monotonic() - started:.0f} s; survivors:",
        *unseen or ["none"],
        sep="\n  ",
    )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
