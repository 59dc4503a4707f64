"""Runs the CPU kernels, and the CUDA kernels on the CPU, under three sanitizers.

``python tools/sanitize.py [program ...]`` builds four programs from tests/sanitize, with g++ and
without the torch library, for AddressSanitizer + UndefinedBehaviorSanitizer and ThreadSanitizer.
Each runs over edge shapes, then with faults planted, which it must report: a sanitizer that is
blind would be clean, too. Exit status 1 where anything is not as it should be.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "ppcr_ext"))  # for _build without the package, which imports torch
from _build.cpu import CPU_SOURCES

WORK = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "g++")
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

WITHOUT_TORCH = tuple(s for s in CPU_SOURCES if s not in ("register.cpp", "cpu/ppcr_cpu.cpp"))
CPU = ("tests/sanitize/cpu_kernels.cpp", *(f"csrc/{name}" for name in WITHOUT_TORCH))
CUDA = (
    "tests/sanitize/cuda_kernels.cpp",
    "tests/cuda_on_cpu/run_bfloat16.cpp",
    "tests/cuda_on_cpu/run_float.cpp",
)
FLAGS = ("-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
OVERRUN, RACE = "heap-buffer-overflow", "data race"

# program: sources, flags, and the planted faults with a word of the report that each must get.
# Those of AddressSanitizer take longest and come first. To optimize the CPU kernels under it takes
# longer than it saves.
PROGRAMS = {
    "cpu-address": (CPU, (*ADDRESS, "-O0"), {"overrun": OVERRUN}),
    "cuda-address": (
        CUDA,
        ADDRESS,
        {"overrun": OVERRUN, "shared": OVERRUN, "misaligned": "misaligned"},
    ),
    "cpu-thread": (CPU, THREAD, {"race": RACE}),
    "cuda-thread": (CUDA, THREAD, {"race": RACE, "blocks": RACE}),
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def torch_headers() -> Path:
    """The headers of the installed torch, where the kernels take their 16-bit types from."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed")
    return Path(spec.origin).parent / "include"


@functools.cache
def sources_digest() -> bytes:
    digest = hashlib.sha256()
    for folder in ("csrc", "tests/cpu", "tests/sanitize", "tests/cuda_on_cpu"):
        for path in sorted((ROOT / folder).rglob("*.[ch]*")):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.digest()


def compile_source(folder: str, source: str, compiler: tuple[str, ...]) -> Path:
    """The object of one source; it is not compiled again while all sources are the same."""
    command = [*compiler, "-isystem", str(torch_headers()), "-c", str(ROOT / source)]
    target = WORK / folder / f"{Path(source).stem}.o"
    stamp = target.with_suffix(".stamp")
    digest = hashlib.sha256(" ".join(command).encode() + sources_digest()).hexdigest()
    if not (target.exists() and stamp.exists() and stamp.read_text() == digest):
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-o", str(target)], check=True)
        stamp.write_text(digest)
    return target


def build(pool: concurrent.futures.Executor, wanted: list[str]) -> None:
    """Compiles the objects of all programs side by side, then links them."""
    jobs = [(name, source) for name in wanted for source in PROGRAMS[name][0]]
    compilers = {name: (COMPILER, *FLAGS, *PROGRAMS[name][1]) for name in wanted}
    compiled = pool.map(lambda job: compile_source(*job, compilers[job[0]]), jobs)
    objects = dict(zip(jobs, compiled, strict=True))
    for name in wanted:
        sources, flags, _ = PROGRAMS[name]
        linked = [str(objects[name, source]) for source in sources]
        command = [COMPILER, *flags, "-pthread", *linked, "-o", str(WORK / name / "run")]
        subprocess.run(command, check=True)


@functools.cache
def fixed_addresses() -> list[str]:
    """What keeps Linux from placing memory where this ThreadSanitizer has its shadow.

    Some containers forbid it.
    """
    command = ["setarch", platform.machine(), "-R"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return command if allowed else []


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*(fixed_addresses() if "thread" in name else []), str(WORK / name / "run")]
    settings = os.environ | ENVIRONMENT
    return subprocess.run(
        [*command, *arguments], env=settings, capture_output=True, text=True, timeout=1200
    )


def main() -> None:
    wanted = sys.argv[1:] or list(PROGRAMS)
    started, wrong = time.monotonic(), 0
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        build(pool, wanted)
        print(f"built {len(wanted)} programs in {time.monotonic() - started:.0f} s", flush=True)
        clean = {name: pool.submit(run, name) for name in wanted}
        planted = {
            (name, fault, word): pool.submit(run, name, fault)
            for name in wanted
            for fault, word in PROGRAMS[name][2].items()
        }
        for name, future in clean.items():
            result = future.result()
            wrong += result.returncode != 0
            said = f"clean: {result.stdout.strip()}" if result.returncode == 0 else result.stdout
            print(f"{name}: {said}{result.stderr if result.returncode else ''}")
        for (name, fault, word), future in planted.items():
            result = future.result()
            seen = result.returncode != 0 and word in result.stderr
            wrong += not seen
            said = f"reported as {word}" if seen else f"NOT as {word}: {result.stderr[-2000:]}"
            print(f"{name}: planted {fault}: {said}")
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
