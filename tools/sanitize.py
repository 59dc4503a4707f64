"""Runs the CPU kernels, and the CUDA kernels on the CPU, under AddressSanitizer + UndefinedBehaviorSanitizer and ThreadSanitizer.

``python tools/sanitize.py [program ...]``: builds four programs from tests/sanitize (g++, no torch library), runs each over edge
shapes, then with faults planted, which it must report: a sanitizer that is blind would be clean, too. Exit status 1 where anything is
not as it should be.
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
WORK = ROOT / "build" / "sanitize"

CPU = (
    "tests/sanitize/cpu_kernels.cpp",
    *(
        f"csrc/cpu/{name}.cpp"
        for name in ("plan", "processor", "kernels_default", "kernels_avx2", "kernels_avx512")
    ),
)
CUDA = (
    "tests/sanitize/cuda_kernels.cpp",
    "tests/cuda_on_cpu/run_bfloat16.cpp",
    "tests/cuda_on_cpu/run_float.cpp",
)
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)

# program: sources, flags, and the planted faults with a word of the report that each must get
PROGRAMS = {
    "cpu-address": (CPU, ADDRESS, {"overrun": "heap-buffer-overflow"}),
    "cpu-thread": (CPU, THREAD, {"race": "data race"}),
    "cuda-address": (
        CUDA,
        ADDRESS,
        {
            "overrun": "heap-buffer-overflow",
            "shared": "heap-buffer-overflow",
            "misaligned": "misaligned",
        },
    ),
    "cuda-thread": (CUDA, THREAD, {"race": "data race", "blocks": "data race"}),
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def torch_headers() -> Path:
    """The headers of the installed torch, which itself is not imported: the kernels take its 16-bit types from there."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed")
    return Path(spec.origin).parent / "include"


def fingerprint(flags: list[str]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for folder in ("csrc", "tests/sanitize", "tests/cuda_on_cpu"):
        for path in sorted((ROOT / folder).rglob("*.[ch]*")):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def build(pool: concurrent.futures.Executor, wanted: list[str]) -> dict[str, Path]:
    """The programs, with all their objects compiled side by side; unchanged sources are not compiled again."""
    compiler = os.environ.get("CXX", "g++")
    common = [
        "-std=c++17",
        "-O1",
        "-g1",
        "-fno-omit-frame-pointer",
        "-isystem",
        str(torch_headers()),
    ]
    objects: dict[str, list[concurrent.futures.Future[Path]]] = {}

    def compile_source(source: str, flags: list[str], target: Path) -> Path:
        stamp, digest = target.with_suffix(".stamp"), fingerprint([compiler, source, *flags])
        if not (target.exists() and stamp.exists() and stamp.read_text() == digest):
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [compiler, *flags, "-c", str(ROOT / source), "-o", str(target)], check=True
            )
            stamp.write_text(digest)
        return target

    for name in wanted:
        sources, sanitizer, _ = PROGRAMS[name]
        objects[name] = [
            pool.submit(
                compile_source,
                source,
                [*common, *sanitizer],
                WORK / name / f"{Path(source).stem}.o",
            )
            for source in sources
        ]
    programs = {}
    for name, futures in objects.items():
        programs[name] = WORK / name / "run"
        link = [
            *PROGRAMS[name][1],
            "-pthread",
            *(str(future.result()) for future in futures),
            "-o",
            str(programs[name]),
        ]
        subprocess.run([compiler, *link], check=True)
    return programs


@functools.cache
def fixed_addresses() -> tuple[str, ...]:
    """Some Linux kernels place memory where this ThreadSanitizer has its shadow, unless told not to; some containers forbid to tell."""
    command = ("setarch", platform.machine(), "-R")
    try:
        return (
            command
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0
            else ()
        )
    except FileNotFoundError:
        return ()


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(fixed_addresses() if "thread" in program.parent.name else ()),
        str(program),
        *arguments,
    ]
    return subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )


def main() -> None:
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    wanted = sys.argv[1:] or sorted(
        PROGRAMS
    )  # those of AddressSanitizer take longest and come first
    started, wrong = time.monotonic(), 0
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        programs = build(pool, wanted)
        print(f"built {len(programs)} programs in {time.monotonic() - started:.0f} s", flush=True)
        runs = {name: pool.submit(run, program) for name, program in programs.items()}
        faults = {
            (name, f): pool.submit(run, programs[name], f)
            for name in wanted
            for f in PROGRAMS[name][2]
        }
        for name, future in runs.items():
            result = future.result()
            wrong += result.returncode != 0
            print(
                f"{name}: {'clean: ' + result.stdout.strip() if result.returncode == 0 else result.stdout + result.stderr}"
            )
        for (name, fault), future in faults.items():
            result, word = future.result(), PROGRAMS[name][2][fault]
            seen = result.returncode != 0 and word in result.stderr
            wrong += not seen
            print(
                f"{name}: planted {fault}: {f'reported as {word}' if seen else f'NOT reported as {word}: {result.stderr[-2000:]}'}"
            )
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
