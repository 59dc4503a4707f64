"""What the CPU library is compiled from and how.

Shared by setup.py and the JIT build, so it imports nothing but the standard library.
"""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# The LibTorch stable ABI of PyTorch 2.10: one binary loads in every later version.
TORCH_TARGET = "0x020a000000000000"

CPU_SOURCES = (
    "register.cpp",
    "cpu/ppcr_cpu.cpp",
    "cpu/plan.cpp",
    "cpu/processor.cpp",
    "cpu/kernels_default.cpp",
    "cpu/kernels_avx2.cpp",
    "cpu/kernels_avx512.cpp",
)


def csrc() -> Path:
    """The folder of the C++ sources: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def digest(sources: Iterable[Path], *settings: str) -> str:
    """Changes with the text of a source of ours, with its name, and with the settings."""
    found = hashlib.sha256(repr(settings).encode())
    for path in sorted(sources):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def is_debug() -> bool:
    """Whether ``DEBUG=1`` in the environment asks for -O0 and debug symbols."""
    return os.environ.get("DEBUG", "0") not in ("", "0")


def host_compiler() -> list[str]:
    """The command of CXX, or ``c++``."""
    return os.environ.get("CXX", "").split() or ["c++"]


def compiler_flags() -> list[str]:
    """Flags for every C++ file."""
    # A loop of a few instructions takes up to a fifth longer where it straddles cache lines. The
    # kernels' vectors are written by hand: to vectorize what is left of their loops adds two fifths
    # to the time to compile and to the library's size, and makes nothing faster. Square roots of
    # all lanes become one instruction where none of them has to set errno.
    vectors = ["-fno-tree-vectorize", "-ftree-slp-vectorize", "-fno-math-errno"]
    fast = ["-O3", "-g0", "-falign-loops=32", *vectors]
    optimize = ["-O0", "-g"] if is_debug() else fast
    # Enough for the headers of the stable ABI, also where PyTorch compiles extensions as C++20.
    standard = ["-std=c++17", "-fvisibility=hidden"]
    return [*standard, *optimize, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY"]


def why_no_compiler() -> str | None:
    """Why no C++ file can be compiled here, or None."""
    command = host_compiler()
    remedy = "install g++ 11, clang 14 or newer, or name a compiler in CXX"
    if shutil.which(command[0]) is None:
        return f"no C++ compiler: {command[0]!r} is not on PATH; {remedy}"
    trial = [*command, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
    line = "#include <optional>\nstd::optional<int> x;\n"
    done = subprocess.run(trial, input=line, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        return f"no C++17 compiler: {command[0]!r} cannot compile a line of it ({said}); {remedy}"
    return None


def cuda_wanted() -> str:
    """PPCR_BUILD_CUDA: ``auto`` (where it can be built), ``0`` (never) or ``1`` (it must be)."""
    value = os.environ.get("PPCR_BUILD_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise ValueError(f"PPCR_BUILD_CUDA must be auto, 0 or 1, got {value!r}")
    return value


def announce(line: str) -> None:
    """Says a line to whoever installs.

    pip and uv keep to themselves what a build prints, unless it fails: there the line goes to where
    their own errors go, if that is a terminal or a pipe.
    """
    if "setuptools.build_meta" in sys.modules:  # they call it; `python setup.py` does not
        front_end = f"/proc/{os.getppid()}/fd/2"
        try:
            found = os.stat(front_end)
            shown = stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)
            if shown and not os.path.samestat(found, os.fstat(2)):
                flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK  # nobody may be reading
                with open(os.open(front_end, flags), "w") as stream:
                    begin = "\n" if stream.isatty() else ""  # a terminal is in the middle of a line
                    print(begin + line, file=stream)
                return
        except OSError:
            pass
    print(line, file=sys.stderr, flush=True)
