"""The compiled kernels: finds and loads their libraries, and keeps the reason if it cannot."""

import ctypes
import json
import os
import struct
from importlib import metadata
from pathlib import Path

import torch

from ._build import cuda, devices, jit
from ._operators import OPERATORS, constant_while_tracing

# pip keeps what it once built in its cache, and installs that again where more could be built.
_CUDA_REMEDY = "build it with PPCR_BUILD_CUDA=1 (pip: and --no-cache-dir)"
_REMEDY = "call ppcr_ext.build(), or set PPCR_JIT=1, or install again (pip: with --no-cache-dir)"

library: Path | None = None  # the loaded one
_reason: str | None = "not loaded yet"
cuda_library: Path | None = None
_cuda_reason: str | None = "the CUDA library is not built"


# ---- what can run -----------------------------------------------------------------------------


def why_not(device: torch.device) -> str | None:
    """Why the compiled kernels cannot run on tensors of a device, or None where they can."""
    if library is None:
        return _reason
    kind = device.type
    if kind == "cpu":
        return None
    if kind == "cuda":
        return _cuda_reason or why_not_on(device.index or 0)
    return f"there are no compiled kernels for {kind} tensors"


def can_run(x: torch.Tensor) -> bool:
    """Whether the compiled kernels can run on a tensor: ``why_not`` without a string on the CPU."""
    return library is not None if x.is_cpu else x.is_cuda and why_not(x.device) is None


@constant_while_tracing
def why_not_on(index: int) -> str | None:
    """Why the CUDA library cannot run on a device of this machine, or None where it can."""
    return _why_not_on(index)


@devices.remembered
def _why_not_on(index: int) -> str | None:
    if devices.count() == 0:
        return devices.NO_DEVICE
    capability = devices.capability(index)
    if capability is None:
        return devices.NOT_ASKED
    return cuda.why_not_usable(capability, cuda_architectures() or "")


def cuda_architectures() -> str | None:
    """What the CUDA library was compiled for, such as ``sm_80 sm_90 compute_90``, or None."""
    return None if cuda_library is None else _text(cuda_library, "ppcr_cuda_architectures")


def cpu_capability() -> str | None:
    """The instruction set of the CPU kernels here: ``default``, ``avx2`` or ``avx512``."""
    return None if library is None else _text(library, "ppcr_cpu_capability")


def _text(library: Path, function: str) -> str:
    """Calls a function of a library that takes nothing and returns a C string."""
    query = getattr(ctypes.CDLL(str(library)), function)
    query.restype = ctypes.c_char_p
    return str(query().decode())


def is_pure_build() -> bool:
    """Whether this was installed without compiled kernels, and none were compiled since."""
    return library is None and bool(_build_record().get("cpu"))


def _build_record() -> dict[str, str | None]:
    """What setup.py wrote about the build: for each part None, or why it was not built."""
    path = Path(__file__).parent / "_build.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


# ---- loading ----------------------------------------------------------------------------------


def build(verbose: bool) -> Path:
    """Compiles the libraries, or takes an earlier build, and loads them: see ppcr_ext.build."""
    if library is not None:
        # Beside a library in the cache the CUDA library can still be built.
        is_complete = cuda_library is not None or library != jit.built()
        if is_complete or jit.why_no_cuda() is not None:
            return library
    return _adopt(*jit.build(_why_not_loaded, verbose))


def load() -> None:
    """Loads the built library, or keeps the reason why it cannot."""
    global _reason
    if library is not None:  # the package is reloaded, its modules are not
        return
    if os.environ.get("PPCR_JIT", "0") not in ("", "0"):
        build(verbose=True)
        return
    beside = sorted(Path(__file__).parent.glob("_cpu*.so"))
    path = beside[0] if beside else jit.built()
    if path is None:
        why = _build_record().get("cpu") or _why_not_compiled() or "no library beside the package"
        reason: str | None = f"the extension is not built ({why})"
    else:
        reason = _why_not_loaded(path)
    if path is None or reason:
        _reason = f"{reason}; {_REMEDY}"
    else:
        found = [path.parent / cuda.LIBRARY] if beside else jit.built_for_cuda(path)
        _adopt(path, found, _build_record().get("cuda"))


def _why_not_compiled() -> str | None:
    """What is wrong where these are the sources, imported from the current folder after an
    installation."""
    here = Path(__file__).parent
    for found in metadata.distributions(name="ppcr_ext"):
        other = Path(str(found.locate_file("ppcr_ext")))
        if other.resolve() != here and any(other.glob("_cpu*.so")):
            return f"the sources in {here} hide the package in {other}: go to another folder"
    return None


def _why_not_loaded(path: Path) -> str | None:
    """Loads a library. Returns None, or the reason why that failed."""
    key = "CUDA" if path.name == cuda.LIBRARY else "CPU"
    if key == "CUDA" and (reason := cuda.why_not_beside(path, torch.version.cuda or "")):
        return reason
    if _is_cut_off(path):
        why = "it is cut off, as by a full disk or a copy that was interrupted"
        return f"{path} does not load: {why}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:  # RuntimeError: torch refuses what it registers
        said = str(error.__cause__ or error)  # torch says only that it could not
        other = f": it was built for another PyTorch than {torch.__version__}"
        return f"{path} does not load{other if 'undefined symbol' in said else ''} ({said})"
    registered = set(torch._C._dispatch_get_registrations_for_dispatch_key(key))
    missing = ", ".join(name for name in OPERATORS if f"ppcr_ext::{name}" not in registered)
    return f"{path} is of another version of ppcr_ext: it lacks {missing}" if missing else None


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before its section headers, which are its last part.

    Loading such a file would kill the process (SIGBUS).
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
    except OSError:
        return False  # the loader's words are better
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return False
    (offset,) = struct.unpack_from("<Q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return bool(path.stat().st_size < offset + size * count)


def _adopt(path: Path, cuda_paths: list[Path], why_no_cuda: str | None) -> Path:
    """Takes the loaded CPU library, which holds the schemas, and loads a CUDA library: the first of
    ``cuda_paths`` that can be."""
    global library, _reason, cuda_library, _cuda_reason
    library, _reason = path, None
    if torch.version.cuda is None:  # nothing that could be built would help
        _cuda_reason = cuda.why_not(None)
        return path
    reasons = []
    for candidate in filter(Path.exists, cuda_paths):
        why = _why_not_loaded(candidate)
        if why is None:
            cuda_library, _cuda_reason = candidate, None
            return path
        reasons.append(why)
    not_built = f"the CUDA library is not built ({why_no_cuda or 'none beside the CPU library'})"
    _cuda_reason = f"{reasons[0] if reasons else not_built}; {_CUDA_REMEDY}"
    return path
