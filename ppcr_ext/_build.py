"""What the extension is compiled from and how: shared by setup.py and the JIT build, so it imports nothing but the standard library."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# The LibTorch stable ABI of PyTorch 2.10: one binary loads in every later version.
TORCH_TARGET = "0x020a000000000000"

CPU_SOURCES = (
    "register.cpp",
    "cpu/ppcr_cpu.cpp",
    "cpu/plan.cpp",
    "cpu/kernels_default.cpp",
    "cpu/kernels_avx2.cpp",
    "cpu/kernels_avx512.cpp",
)


def csrc() -> Path:
    """The folder of the C++ sources: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def compiler_flags() -> list[str]:
    """Flags for every C++ file; ``DEBUG=1`` in the environment asks for -O0 and debug symbols."""
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    optimize = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    return [*optimize, "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY"]


def why_no_compiler() -> str | None:
    """Why no C++ file can be compiled here, or None."""
    compiler = os.environ.get("CXX", "c++")
    program = compiler.split()[0] if compiler.split() else compiler
    if shutil.which(program) is None:
        return f"no C++ compiler: {program!r} is not on PATH; install g++ 10 or newer, or name a compiler in CXX"
    return None


def cuda_wanted() -> str:
    """PPCR_BUILD_CUDA: ``auto`` (where it can be built), ``0`` (never) or ``1`` (fail where it cannot)."""
    value = os.environ.get("PPCR_BUILD_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise ValueError(f"PPCR_BUILD_CUDA must be auto, 0 or 1, got {value!r}")
    return value
