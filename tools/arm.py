"""Compiles the CPU kernels for 64-bit Arm and runs them under emulation: ``python tools/arm.py``.

Two programs are built with the flags of the package, without the torch library. The driver of
tests/sanitize runs every operation, dtype, layout and method over edge shapes, against an
evaluation in double. tests/cpu/simd.cpp runs the vector operations by themselves. What binds the
kernels to PyTorch is compiled only. Exit status 1 where a tool is missing or a result is wrong.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import sanitize
from _build import cpu as recipe

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
INSTALL = "apt-get install g++-aarch64-linux-gnu qemu-user"
WORK = sanitize.WORK / "arm"
PROGRAMS = {"kernels": sanitize.CPU, "simd": ("tests/cpu/simd.cpp",)}
# Settings, exit status, and words of what the programs say.
RUNS = (
    ("simd", {}, 0, "vector operations are right"),
    ("kernels", {}, 0, "cases of the CPU kernels (default)"),
    ("kernels", {"PPCR_CPU_CAPABILITY": "avx2"}, 2, "'avx2' is not one of default on this CPU"),
)


def why_not(*tools: str) -> str | None:
    """What is missing here, with the remedy, or None."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return f"no {' and no '.join(missing)} on PATH: {INSTALL}" if missing else None


def compile_source(source: str) -> Path:
    flags = (*recipe.compiler_flags(), f"-I{sanitize.ROOT / 'csrc' / 'cpu'}")
    return sanitize.compile_source("arm", source, (COMPILER, *flags))


def build() -> None:
    """Compiles all sources, and links the programs: static, so that they need no Arm libraries."""
    sources = {f"csrc/{name}" for name in recipe.CPU_SOURCES}.union(*PROGRAMS.values())
    with concurrent.futures.ThreadPoolExecutor(sanitize.JOBS) as pool:
        objects = dict(zip(sources, map(str, pool.map(compile_source, sources)), strict=True))
    for name, needed in PROGRAMS.items():
        linked = [objects[source] for source in needed]
        command = [COMPILER, "-static", "-pthread", *linked, "-o", str(WORK / name)]
        subprocess.run(command, check=True)


def run(program: Path, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EMULATOR, str(program)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )


def main() -> None:
    if reason := why_not(COMPILER, EMULATOR):
        raise SystemExit(f"the kernels cannot be run for Arm here: {reason}")
    started, wrong = time.monotonic(), 0
    build()
    print(f"built {len(PROGRAMS)} programs in {time.monotonic() - started:.0f} s", flush=True)
    for name, settings, status, words in RUNS:
        done = run(WORK / name, settings)
        right = done.returncode == status and words in done.stdout
        wrong += not right
        told = done.stdout.strip()
        print(f"{name} {settings or ''}: {'' if right else 'NOT AS EXPECTED: '}{told}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
