"""Builds the CUDA library with nvcc, or says in a sentence why it cannot be built.

Shared by setup.py, the JIT build and the tools, so it imports nothing but its
neighbours and the standard library.

Environment: CUDA_HOME or CUDA_PATH, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1, CXX.
"""

import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from . import devices
from .cpu import TORCH_TARGET, announce, digest, host_compiler, is_debug

LIBRARY = "_cuda.abi3.so"
# The longest first.
KERNEL_SOURCES = ("launch_bfloat16.cu", "launch_half.cu", "launch_float.cu", "launch_double.cu")
ENTRY_SOURCE = "ppcr_cuda.cpp"
# Where no device is visible and none is named: their machine code runs on all of 8.x and 9.x, and
# later devices compile the PTX.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
EVERY_ARCHITECTURE = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
OLDEST = (7, 5)  # the oldest that nvcc 13 and all of these kernels know

# What TORCH_CUDA_ARCH_LIST may name besides numbers, as in torch.utils.cpp_extension.
_NAMED = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}


class CannotBuild(RuntimeError):
    """The CUDA library cannot be built here; the message says why and what would help."""


def why_not_usable(capability: tuple[int, int], architectures: str) -> str | None:
    """Why code compiled for ``architectures`` ("sm_80 sm_90a compute_120") does not run on a
    device, or None where it does."""
    for kind, number, suffix in re.findall(r"(sm|compute)_(\d+)([af]?)", architectures):
        major, minor = int(number[:-1]), int(number[-1])
        if suffix == "a" and capability != (major, minor):
            continue
        # Machine code, and PTX for a family, is for one major version.
        if (kind == "sm" or suffix == "f") and capability[0] != major:
            continue
        if capability >= (major, minor):
            return None
    device = f"{capability[0]}.{capability[1]}"
    built = f"the CUDA library was compiled for {architectures or 'nothing'}"
    cannot = f"which a device of compute capability {device} cannot run"
    return f"{built}, {cannot}; rebuild it with TORCH_CUDA_ARCH_LIST={device}"


def why_not_beside(library: Path, torch_cuda: str) -> str | None:
    """Why a built CUDA library cannot be loaded beside a PyTorch for CUDA ``torch_cuda``, or None.

    The loader itself would bring a second CUDA runtime into the process where it finds one.
    """
    try:
        needed = re.search(rb"libcudart\.so\.(\d+)", library.read_bytes())
    except OSError:
        return None  # the loader's words are better
    major = needed[1].decode() if needed else None
    if major in (None, torch_cuda.split(".")[0]):
        return None
    built = f"{library} was built for CUDA {major}, this PyTorch for CUDA {torch_cuda}"
    return f"{built}; their major versions must agree"


# ---- the compiler -----------------------------------------------------------------------------


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, or of CUDA_PATH, where one is set; else of PATH, or of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = None if home else shutil.which("nvcc")
    nvcc = Path(on_path) if on_path else Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    return nvcc if nvcc.exists() else None


def _run(command: list[str]) -> tuple[int, str, str]:
    """The exit status, stdout and stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"{command[0]} cannot be run ({error})") from None
    return done.returncode, done.stdout, done.stderr


def _call(command: list[str]) -> str:
    """What a program says. Raises CannotBuild where it fails."""
    status, output, errors = _run(command)
    if status != 0:
        raise CannotBuild(f"{' '.join(command)}\nfailed:\n{errors[-8000:]}")
    return output + errors


def nvcc_version(nvcc: Path) -> str:
    """``"13.0"``"""
    output = _call([str(nvcc), "--version"])
    found = re.search(r"release (\d+\.\d+)", output)
    if found is None:
        raise CannotBuild(f"{nvcc} --version names no release: {output.strip()[:200]}")
    return found[1]


def toolkit(nvcc: Path) -> Path:
    """The toolkit's folder, also where nvcc is a script that calls the one of another folder."""
    _, output, errors = _run([str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull])
    found = re.search(r"TOP=(\S+)", errors + output)
    return Path(found[1]).resolve() if found else nvcc.resolve().parents[1]


def why_not(torch_cuda: str | None) -> str | None:
    """Why the CUDA library cannot be built beside a PyTorch for CUDA ``torch_cuda``, or None."""
    if torch_cuda is None:
        remedy = "install a CUDA build of PyTorch, see https://pytorch.org/get-started"
        return f"this PyTorch was built without CUDA; {remedy}"
    nvcc = find_nvcc()
    major = torch_cuda.split(".")[0]
    if nvcc is None:
        home, path = os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")
        unset = "on PATH nor in /usr/local/cuda"
        where = "in CUDA_HOME" if home else "in CUDA_PATH" if path else unset
        remedy = f"install the CUDA {major} toolkit, or set CUDA_HOME to its folder"
        return f"nvcc was not found {where}; {remedy}"
    try:
        version = nvcc_version(nvcc)
        own = version.split(".")[0]
        if own != major:
            both = f"{nvcc} is of CUDA {version}, but PyTorch was built with CUDA {torch_cuda}"
            remedy = (
                f"install the CUDA {major} toolkit and set CUDA_HOME, or a PyTorch for CUDA {own}"
            )
            return f"{both}; their major versions must agree: {remedy}"
        architectures(nvcc)
    except CannotBuild as error:
        return str(error)
    return None


def visible_architectures() -> str | None:
    """The compute capabilities of the devices that PyTorch sees, such as ``"8.0;9.0"``, or None."""
    found = {devices.capability(index) for index in range(devices.count())}
    listed = sorted(capability for capability in found if capability)
    return ";".join(f"{major}.{minor}" for major, minor in listed) or None


def architectures(nvcc: Path, wanted: str | None = None) -> str:
    """What to compile for, such as ``sm_80 sm_90a compute_90a``: ``wanted`` or
    TORCH_CUDA_ARCH_LIST, else the visible devices, else the default list. ``compute_`` is PTX.
    """
    explicit = wanted or os.environ.get("TORCH_CUDA_ARCH_LIST")
    visible = None if explicit else visible_architectures()
    seen = "PyTorch sees a device of compute capability"
    source = "TORCH_CUDA_ARCH_LIST holds" if explicit else seen
    known = re.findall(r"compute_(\d+)", _call([str(nvcc), "--list-gpu-arch"]))
    binaries: list[str] = []
    ptx: list[str] = []
    listing = explicit or visible or DEFAULT_ARCHITECTURES
    names = [item for item in re.split(r"[;\s,]+", listing) if item]
    for item in (item for name in names for item in _NAMED.get(name, name).split(";")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            takes = f"it takes numbers such as 8.0;9.0+PTX, and {', '.join(_NAMED)}"
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST holds {item!r}; {takes}")
        number, suffix = match[1] + match[2], match[3]
        if (int(match[1]), int(match[2])) < OLDEST:
            raise CannotBuild(f"{source} {item}; the kernels need 7.5 (Turing) or newer")
        if number not in known:
            named = ", ".join(sorted((f"{k[:-1]}.{k[-1]}" for k in set(known)), key=float))
            raise CannotBuild(
                f"{source} {item}, which nvcc {nvcc_version(nvcc)} does not know; "
                f"it knows {named}: name one in TORCH_CUDA_ARCH_LIST, as in 9.0+PTX"
            )
        binaries.append(f"sm_{number}{suffix}")
        if match[4]:
            ptx.append(f"compute_{number}{suffix}")
    return " ".join(dict.fromkeys(binaries + ptx))  # each once


# ---- building ---------------------------------------------------------------------------------


def _host_options() -> list[str]:
    """nvcc takes the name of a compiler, and neither a launcher such as ccache before it nor
    options after it."""
    if not os.environ.get("CXX"):
        return []
    words = host_compiler()
    end = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return ["-ccbin", words[end - 1], *(f"-Xcompiler={option}" for option in words[end:])]


def _kernel_command(nvcc: Path, compiled_for: str) -> list[str]:
    # A third of the size; the drivers that CUDA 13 needs can all read it.
    small = ["--compress-mode=size"] if int(nvcc_version(nvcc).split(".")[0]) >= 13 else []
    optimize = ["-O0", "-g", "-lineinfo"] if is_debug() else ["-O3"]
    # Registers and spills stand in the log beside each object.
    options = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    codes = [f"-gencode=arch=compute_{c.partition('_')[2]},code={c}" for c in compiled_for.split()]
    return [str(nvcc), "-std=c++17", *optimize, *_host_options(), *small, *options, *codes]


def _entry_command(nvcc: Path, compiled_for: str, torch_folder: Path) -> list[str]:
    torch = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
    named = f'-DPPCR_CUDA_ARCHITECTURES="{compiled_for}"'
    folders = (torch_folder / "include", toolkit(nvcc) / "include")
    include = [word for folder in folders for word in ("-isystem", str(folder))]
    code = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
    return [*host_compiler(), *code, *torch, named, *include]


def build(
    output: Path,
    csrc: Path,
    work: Path,
    torch_folder: Path,
    torch_cuda: str | None,
    arch_list: str | None = None,
    say: Callable[[str], None] = announce,
) -> None:
    """Compiles and links the CUDA library ``output``.

    ``work`` keeps the objects, of which only those that something changed are compiled again, and
    their logs with registers and spills. ``arch_list`` stands for TORCH_CUDA_ARCH_LIST, and ``say``
    receives a line for every step. Raises CannotBuild, which says why and what would help, or what
    the compiler said.
    """
    reason = why_not(torch_cuda)
    if reason:
        raise CannotBuild(reason)
    nvcc = find_nvcc()
    assert nvcc is not None
    compiled_for = architectures(nvcc, arch_list)
    say(f"ppcr_ext: compiling the CUDA kernels for {compiled_for}")
    say(f"ppcr_ext: for every architecture set TORCH_CUDA_ARCH_LIST='{EVERY_ARCHITECTURE}'")
    work.mkdir(parents=True, exist_ok=True)
    sources = (p for p in csrc.rglob("*") if "cpu" not in p.relative_to(csrc).parts)
    settings = [digest(sources), nvcc_version(nvcc)]
    commands = dict.fromkeys(KERNEL_SOURCES, _kernel_command(nvcc, compiled_for))
    commands[ENTRY_SOURCE] = _entry_command(nvcc, compiled_for, torch_folder)

    def compile_source(source: str) -> Path:
        target, stamp = work / f"{source}.o", work / f"{source}.stamp"
        command = [*commands[source], "-c", str(csrc / "cuda" / source), "-o", str(target)]
        fingerprint = hashlib.sha256(" ".join([*settings, *command]).encode()).hexdigest()
        if target.exists() and stamp.exists() and stamp.read_text() == fingerprint:
            return target
        started = time.monotonic()
        (work / f"{source}.log").write_text(_call(command))
        stamp.write_text(fingerprint)
        say(f"ppcr_ext: compiled {source} for {compiled_for} in {time.monotonic() - started:.0f} s")
        return target

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        objects = list(map(str, pool.map(compile_source, commands)))
    lib64 = toolkit(nvcc) / "lib64"
    cuda_lib = lib64 if lib64.is_dir() else toolkit(nvcc) / "lib"
    # cudart is shared with torch, which has loaded it already: there is one CUDA runtime per
    # process, and the loader refuses a library for another major version. No run path: torch's
    # libraries are found because they are loaded.
    folders = [f"-L{cuda_lib}", f"-L{torch_folder / 'lib'}"]
    libraries = ["-lcudart", "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
    output.parent.mkdir(parents=True, exist_ok=True)
    _call([*host_compiler(), "-shared", *objects, *folders, *libraries, "-o", str(output)])
