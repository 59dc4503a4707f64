"""Runs the kernels as programs without the torch library: under sanitizers, as the oldest compilers
make them, or for 64-bit Arm.

``python tools/sanitize.py [beginning of a name ...]`` builds the programs below, without a name
those of the sanitizers. Each runs over edge shapes, and then with faults planted, which it must
report: a sanitizer that is blind would be clean, too. The others, ``old`` and ``arm``, have the
flags of the package, ``old`` with -O1 to save time; those for Arm are cross-compiled and emulated.
Exit status 1 where a tool is missing or anything is not as it should be.
"""

import concurrent.futures
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "ppcr_ext"))  # for _build without the package, which imports torch
from _build.cpu import CPU_SOURCES, compiler_flags, digest

WORK = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "g++")
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
OLDEST = ("g++-11", "clang++-14")  # that the README promises
PACKAGES = {  # of Debian and Ubuntu
    ARM_COMPILER: "g++-aarch64-linux-gnu",
    EMULATOR: "qemu-user",
    "g++-11": "g++-11",
    "clang++-14": "clang-14",
}

WITH_TORCH = ("register.cpp", "cpu/ppcr_cpu.cpp")
WITHOUT_TORCH = tuple(source for source in CPU_SOURCES if source not in WITH_TORCH)
CPU = ("tests/sanitize/cpu_kernels.cpp", *(f"csrc/{name}" for name in WITHOUT_TORCH))
CUDA = (
    "tests/sanitize/cuda_kernels.cpp",
    "tests/cuda_on_cpu/run_bfloat16.cpp",
    "tests/cuda_on_cpu/run_float.cpp",
)
HERE = (COMPILER, "-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-pthread")
ADDRESS = (*HERE, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = (*HERE, "-fsanitize=thread")
PACKAGED = (*compiler_flags(), f"-I{ROOT / 'csrc' / 'cpu'}", "-pthread")
ARM = (ARM_COMPILER, *PACKAGED, "-static")  # so that they need no Arm libraries
OVERRUN, RACE = "heap-buffer-overflow", "data race"
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


class Program(NamedTuple):
    sources: tuple[str, ...]
    compiler: tuple[str, ...]  # with its flags
    # By planted fault, or NAME=value of the environment: what the program must say. It must fail
    # but for "". What has no runs is compiled only.
    runs: dict[str, str]


# Those of AddressSanitizer take longest and come first. To optimize the CPU kernels under it takes
# longer than it saves.
PROGRAMS = {
    "cpu-address": Program(CPU, (*ADDRESS, "-O0"), {"": "cases", "overrun": OVERRUN}),
    "cuda-address": Program(
        CUDA,
        ADDRESS,
        {"": "cases", "overrun": OVERRUN, "shared": OVERRUN, "misaligned": "misaligned"},
    ),
    "cpu-thread": Program(CPU, THREAD, {"": "cases", "race": RACE}),
    "cuda-thread": Program(CUDA, THREAD, {"": "cases", "race": RACE, "blocks": RACE}),
    "arm-kernels": Program(
        CPU,
        ARM,
        {
            "": "cases of the CPU kernels (default)",
            "PPCR_CPU_CAPABILITY=avx2": "'avx2' is not one of default on this CPU",
        },
    ),
    "arm-simd": Program(("tests/cpu/simd.cpp",), ARM, {"": "vector operations are right"}),
    "arm-torch": Program(tuple(f"csrc/{name}" for name in WITH_TORCH), ARM, {}),
}
for oldest in OLDEST:
    command = (oldest, *PACKAGED, "-O1")
    PROGRAMS[f"old-{oldest}"] = Program(CPU, command, {"": "cases of the CPU kernels"})
    PROGRAMS[f"old-{oldest}-torch"] = PROGRAMS["arm-torch"]._replace(compiler=command)


def why_not(*tools: str) -> str | None:
    """Which of these are missing here, with the remedy, or None."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    install = f"apt-get install {' '.join(PACKAGES[tool] for tool in missing)}"
    return f"no {' and no '.join(missing)} on PATH: {install}" if missing else None


def torch_headers() -> Path:
    """The headers of the installed torch, where the kernels take their 16-bit types from."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed")
    return Path(spec.origin).parent / "include"


@functools.cache
def state(compiler: str) -> str:
    """Changes with the sources, and where another compiler comes under the same name."""
    asked = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    folders = ("csrc", "tests/cpu", "tests/sanitize", "tests/cuda_on_cpu")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return digest(sources, asked.stdout)


def compile_source(name: str, source: str) -> Path:
    """The object of one source; it is not compiled again while nothing has changed."""
    include = ["-isystem", str(torch_headers())]
    command = [*PROGRAMS[name].compiler, *include, "-c", str(ROOT / source)]
    target = WORK / name / f"{Path(source).stem}.o"
    stamp = target.with_suffix(".stamp")
    current = f"{state(command[0])} {' '.join(command)}"
    if not (target.exists() and stamp.exists() and stamp.read_text() == current):
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-o", str(target)], check=True)
        stamp.write_text(current)
    return target


def build(pool: concurrent.futures.Executor, wanted: list[str]) -> None:
    """Compiles the objects of all programs side by side, then links them."""
    jobs = [(name, source) for name in wanted for source in PROGRAMS[name].sources]
    objects = dict(zip(jobs, pool.map(lambda job: compile_source(*job), jobs), strict=True))
    for name in wanted:
        sources, compiler, runs = PROGRAMS[name]
        linked = [str(objects[name, source]) for source in sources]
        if runs:
            subprocess.run([*compiler, *linked, "-o", str(WORK / name / "run")], check=True)


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


def run(name: str, program: Path, argument: str = "") -> subprocess.CompletedProcess[str]:
    """A program on its machine, with a planted fault or a setting."""
    before = [EMULATOR] if name.startswith("arm") else fixed_addresses() if "thread" in name else []
    settings, (variable, given, value) = os.environ | ENVIRONMENT, argument.partition("=")
    if given:
        settings[variable] = value
    command = [*before, str(program), *([argument] if argument and not given else [])]
    return subprocess.run(
        command,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )


def main() -> None:
    chosen = tuple(sys.argv[1:]) or ("cpu", "cuda")
    wanted = [name for name in PROGRAMS if name.startswith(chosen)]
    if not wanted:
        raise SystemExit(f"there are {', '.join(PROGRAMS)}")
    tools = {PROGRAMS[name].compiler[0] for name in wanted} & PACKAGES.keys()
    if ARM_COMPILER in tools:
        tools.add(EMULATOR)
    if reason := why_not(*sorted(tools)):
        raise SystemExit(f"the kernels cannot be run here: {reason}")
    started, wrong = time.monotonic(), 0
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        build(pool, wanted)
        print(f"built {len(wanted)} programs in {time.monotonic() - started:.0f} s", flush=True)
        runs = [(name, argument) for name in wanted for argument in PROGRAMS[name].runs]
        runs.sort(key=lambda one: one[1] != "")  # those without a fault take longest
        results = pool.map(lambda one: run(one[0], WORK / one[0] / "run", one[1]), runs)
        for (name, argument), done in zip(runs, results, strict=True):
            words = PROGRAMS[name].runs[argument]
            right = (done.returncode != 0) == bool(argument) and words in done.stdout
            wrong += not right
            said = words if right and argument else done.stdout.strip()[-2000:]
            state = "" if right else "NOT AS IT SHOULD BE: "
            print(f"{name} {argument or 'clean'}: {state}{said}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
