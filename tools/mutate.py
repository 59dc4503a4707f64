"""Plants the faults of tests/mutants one at a time in a copy of the sources and tests the copy.

``python tools/mutate.py [sample | a file of tests/mutants | text of a name ...]`` prints every
mutant with the test that fails, the score, and the survivors with the reason why none can. Exit
status 1 where a mutant passes unseen, or is seen although its reason says that none can.

Of the CPU library only what a mutant changes is compiled, for one instruction set; of the CUDA
kernels one dtype. A mutant that a first choice of quick tests does not see gets more of them.
"""

import concurrent.futures
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

import sanitize
from _build import cpu as recipe
from mutants import Mutant, first_failure
from mutants import host as host_mutants
from mutants import triton as triton_mutants

WORK = ROOT / "build" / "mutants"
GROUPS = {
    path.stem: importlib.import_module(f"mutants.{path.stem}").MUTANTS
    for path in sorted((ROOT / "tests" / "mutants").glob("[a-z]*.py"))
}
# Files and options of pytest.
QUICK_CPU = ("test_definition.py", "test_edges.py", "test_errors.py", "test_properties.py")
WIDE_CPU = ("test_accuracy.py", "test_autograd.py", "test_sigmoid.py")
QUICK_CUDA = ("test_cuda_plan.py", "test_cuda_on_cpu.py")
SLOW_CUDA = ("float16", "float64", "bfloat16", "resnet", "full_depth", "more_than_2", "executed")


# ---- the CPU library --------------------------------------------------------------------------


def included(path: Path) -> set[Path]:
    """A source and all files of ours that it includes."""
    found = {path.resolve()}
    for name in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
        found |= included(path.parent / name)
    return found


def dependents(csrc: Path, file: str) -> list[str]:
    """What is compiled again: of the kernels those of the instruction set that the tests use."""
    others = {"cpu/kernels_default.cpp", "cpu/kernels_avx512.cpp"}
    changed = (csrc / file).resolve()
    return [s for s in recipe.CPU_SOURCES if s not in others and changed in included(csrc / s)]


def compile_cpu(csrc: Path, source: str, target: Path, flag: str) -> Path:
    headers = ["-isystem", str(sanitize.torch_headers())]
    settings = ["-std=c++20", *recipe.compiler_flags(), "-O0", flag, *headers]
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sanitize.COMPILER, *settings, "-c", str(csrc / source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@functools.cache
def sound_objects(sources: Iterable[str], flag: str) -> dict[str, Path]:
    with concurrent.futures.ThreadPoolExecutor(sanitize.JOBS) as pool:
        targets = [WORK / f"sound{flag}" / f"{Path(s).stem}.o" for s in sources]
        compile_sound = functools.partial(compile_cpu, ROOT / "csrc", flag=flag)
        return dict(zip(sources, pool.map(compile_sound, sources, targets), strict=True))


def objects(folder: Path, mutant: Mutant | None, sources: Iterable[str], flag: str) -> list[str]:
    """The sound ones, and of what a mutant changed those of the copy."""
    changed = dependents(folder / "csrc", mutant.file) if mutant else []
    made = {s: compile_cpu(folder / "csrc", s, folder / f"{Path(s).stem}.o", flag) for s in changed}
    found = sound_objects(sources, flag) | made
    return [str(found[source]) for source in sources]


# ---- tests in a copy --------------------------------------------------------------------------


def copy_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for part in ("csrc", "tests", "ppcr_ext", "tools", "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_copy(folder: Path, *arguments: str, **environment: str) -> str | None:
    """The first failing test of a copy, or how the tests died; None where all pass."""
    files = [f"tests/{a}" if a.endswith(".py") else a for a in arguments]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    settings = os.environ | {"MAX_JOBS": "1", "PPCR_CPU_CAPABILITY": "avx2"} | environment
    command += files
    try:
        done = subprocess.run(
            command, cwd=folder, env=settings, capture_output=True, text=True, timeout=1200
        )
    except subprocess.TimeoutExpired:
        return "tests that do not end"
    return first_failure(done.returncode, done.stdout + done.stderr)


# ---- what sees a mutant -----------------------------------------------------------------------


def seen_on_cpu(folder: Path, mutant: Mutant | None) -> str | None:
    linked = objects(folder, mutant, recipe.CPU_SOURCES, "-fPIC")
    libraries = [f"-L{sanitize.torch_headers().parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    output = ["-o", str(folder / "ppcr_ext" / "_cpu.abi3.so")]
    subprocess.run([sanitize.COMPILER, "-shared", *linked, *libraries, *output], check=True)
    return run_copy(folder, *QUICK_CPU, "-k", "not missing_native_library")


def seen_by_sanitizer(folder: Path, mutant: Mutant | None) -> str | None:
    """What the program of ``make sanitize`` says, compiled without optimization to be fast."""
    source, program, flag = "sanitize/cpu_kernels.cpp", folder / "sanitized", "-fsanitize=address"
    driver = compile_cpu(folder / "tests", source, folder / "driver.o", flag)
    linked = [str(driver), *objects(folder, mutant, sanitize.WITHOUT_TORCH, flag)]
    subprocess.run([sanitize.COMPILER, flag, "-pthread", *linked, "-o", str(program)], check=True)
    settings = os.environ | {"PPCR_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([program], env=settings, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    words = re.search("AddressSanitizer: .*|wrong result: .*", done.stderr)
    return f"make sanitize: {words[0] if words else done.returncode}"


def seen_by_cuda_on_cpu(folder: Path, mutant: Mutant | None) -> str | None:
    if mutant and mutant.tests:
        left_out = "float,bfloat16,double"
        chosen = (*QUICK_CUDA, "-k", mutant.tests)
        return run_copy(folder, *chosen, CUDA_ON_CPU_LEFT_OUT=left_out)
    chosen = (*QUICK_CUDA, "-k", " and ".join(f"not {word}" for word in SLOW_CUDA))
    return run_copy(folder, *chosen, CUDA_ON_CPU_LEFT_OUT="half,bfloat16,double")


def seen_in_triton(folder: Path, mutant: Mutant | None) -> str | None:
    tests = triton_mutants.TESTS
    chosen = tests[mutant.file] if mutant else " or ".join(f"({text})" for text in tests.values())
    arguments = ("triton_interpreted.py", "-o", "addopts=", "-k", chosen)
    return run_copy(folder, *arguments, TRITON_INTERPRET="1")


def seen_on_emulated_devices(folder: Path, mutant: Mutant | None) -> str | None:
    return host_mutants.caught_by(mutant, folder)


ENGINES = {"shared": seen_on_cpu, "cpu": seen_on_cpu, "sanitize": seen_by_sanitizer}
ENGINES |= {"cuda": seen_by_cuda_on_cpu, "triton": seen_in_triton, "host": seen_on_emulated_devices}
# What a mutant gets that those do not see, unless it names its tests.
WIDER = {"shared": WIDE_CPU, "cpu": WIDE_CPU, "cuda": QUICK_CUDA}


def caught_by(group: str, mutant: Mutant | None, folder: Path, wide: bool) -> str | None:
    copy_tree(folder)
    if mutant:
        mutant.plant(folder / ("ppcr_ext" if mutant.file.endswith(".py") else "csrc"))
    wider = WIDER.get(group) if wide and mutant and not mutant.tests else None
    return ENGINES[group](folder, mutant) or (run_copy(folder, *wider) if wider else None)


def main() -> None:
    words = sys.argv[1:]
    chosen = [
        (mutant.tests if mutant.tests in ENGINES else group, mutant)
        for group, mutants in GROUPS.items()
        for mutant in mutants
        if not words
        or any(w in mutant.name or w == group or (w == "sample" and mutant.sample) for w in words)
    ]
    if not chosen:
        raise SystemExit("no mutant of that name")
    started, wide = time.monotonic(), "sample" not in words

    def run(group: str, mutant: Mutant) -> tuple[str | None, float]:
        folder, begin = WORK / threading.current_thread().name, time.monotonic()
        return caught_by(group, mutant, folder, wide), time.monotonic() - begin

    for group in dict.fromkeys(group for group, _ in chosen):
        if failure := caught_by(group, None, WORK / "copy_0", wide=False):
            raise SystemExit(f"without any mutant a test fails: {failure}")
    caught, unseen, wrong = 0, [], 0
    with concurrent.futures.ThreadPoolExecutor(sanitize.JOBS, "copy") as pool:  # copy_0, copy_1
        futures = {pool.submit(run, *one): one for one in chosen}
        for future in concurrent.futures.as_completed(futures):
            (_, mutant), (failure, seconds) = futures[future], future.result()
            name, reason = f"{mutant.file}: {mutant.name}", mutant.survives or "NO TEST SEES IT"
            caught += failure is not None
            wrong += (failure is None) != bool(mutant.survives)
            if failure is None:
                unseen.append(f"{name}: {reason}")
            verdict = "caught" if failure else "unseen"
            print(f"{verdict} {seconds:4.0f} s  {name}: {failure or reason}", flush=True)
    took = f"{time.monotonic() - started:.0f} s"
    score = f"{caught} of {len(chosen)} mutants caught in {took}; survivors:"
    print(score, *unseen or ["none"], sep="\n  ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
