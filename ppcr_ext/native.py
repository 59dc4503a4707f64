"""Finds or JIT-builds the compiled extension, registers its operators with PyTorch, and keeps the reason where it cannot."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _build, _cuda_build

_CUDA_NAME = "_cuda.abi3.so"
# pip keeps what it once built in its cache, and installs that again where more could be built.
_CUDA_REMEDY = "build it with PPCR_BUILD_CUDA=1 (pip: and --no-cache-dir)"
_REMEDY = "call ppcr_ext.build(), or set PPCR_JIT=1, or install again (pip: with --no-cache-dir)"

OPERATORS = (
    "ppcr",
    "ppcr_backward",
    "ppcr_gate",
    "ppcr_gate_backward",
    "ppcr_add_relu",
    "ppcr_add_relu_backward",
)

_library: Path | None = None
_reason: str | None = "not loaded yet"
_cuda_library: Path | None = None
_cuda_reason: str | None = "the CUDA library is not built"


def why_not(device_type: str) -> str | None:
    """Why the compiled kernels cannot run on tensors of a device type ("cpu", "cuda"), or None where they can."""
    if _library is None:
        return _reason
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        return _cuda_reason or why_no_device()
    return f"there are no compiled kernels for {device_type} tensors"


@torch.compiler.assume_constant_result  # the compiler cannot look into what it asks
def why_no_device() -> str | None:
    """Why the CUDA library cannot run on the devices of this machine, or None where it can."""
    return _why_no_device()


@functools.cache
def _why_no_device() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    for index in range(torch.cuda.device_count()):
        reason = _cuda_build.why_not_usable(
            torch.cuda.get_device_capability(index), cuda_architectures() or ""
        )
        if reason:
            return reason
    return None


def cuda_architectures() -> str | None:
    """What the CUDA library was compiled for, such as ``sm_80 sm_90 compute_90``; None where there is none."""
    return None if _cuda_library is None else _text(_cuda_library, "ppcr_cuda_architectures")


def _text(library: Path, function: str) -> str:
    """What a function of a loaded library that takes nothing and returns a C string says."""
    query = getattr(ctypes.CDLL(str(library)), function)
    query.restype = ctypes.c_char_p
    return str(query().decode())


def of_its_type(error: RuntimeError, x: Tensor) -> RuntimeError:
    """An error of the compiled operators, all RuntimeError, in the type that PyTorch has for it."""
    if x.is_cuda and "out of memory" in str(error):
        return torch.OutOfMemoryError(*error.args)
    return error


def library() -> Path | None:
    """The loaded CPU library."""
    return _library


def cpu_capability() -> str | None:
    """The instruction set that the CPU kernels use here: ``default``, ``avx2`` or ``avx512``."""
    return None if _library is None else _text(_library, "ppcr_cpu_capability")


def _build_record() -> dict[str, str | None]:
    """What setup.py wrote about the build: for each part None, or why it was not built."""
    path = Path(__file__).parent / "_build.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_pure_build() -> bool:
    """Whether this was installed without compiled kernels, and none were compiled since."""
    return _library is None and bool(_build_record().get("cpu"))


def _jit_name() -> str:
    """Names the JIT build by everything that goes into it, so that a changed source or flag never meets an old library."""
    digest = hashlib.sha256(
        repr((torch.__version__, _build.compiler_flags(), os.environ.get("CXX"))).encode()
    )
    for path in sorted(_build.csrc().rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            digest.update(path.name.encode() + path.read_bytes())
    return f"ppcr_ext_cpu_{digest.hexdigest()[:16]}"


def _jit_folder(name: str) -> Path:
    """In PyTorch's extension cache. Asked at every import without a library; PyTorch's own module,
    which would tell it, is slow and warns at its import."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions") / name


def build(verbose: bool = True) -> Path:
    """JIT-compiles the extension now, with ninja, into PyTorch's extension cache, and loads it.

    The cache is keyed by the sources, the flags and the version of PyTorch: a second call, in this process or a later one, compiles
    nothing, and later imports of ppcr_ext find it by themselves. The CUDA library is built too where a CUDA device is visible or
    PPCR_BUILD_CUDA=1, for that device or TORCH_CUDA_ARCH_LIST. Honours CXX, MAX_JOBS, DEBUG and TORCH_EXTENSIONS_DIR.

    Args:
        verbose: show the progress of the compiler, one line a file.

    Returns:
        The loaded CPU library. Where one is loaded already that one: a process cannot exchange it.

    Raises:
        RuntimeError: no compiler or no ninja, the compiler failed, or the cache cannot be written; the message holds the remedy.
    """
    if _library is not None:
        return _library
    why = _build.why_no_compiler()
    if why:
        raise RuntimeError(f"ppcr_ext cannot be compiled here: {why}")
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        raise RuntimeError(
            "ppcr_ext cannot be JIT-compiled here: ninja is missing; `pip install ninja`"
        )
    name = _jit_name()
    folder = _jit_folder(name)
    try:
        with _lock(folder, verbose):
            return _build_in(folder, name, verbose)
    except OSError as error:
        raise RuntimeError(
            f"ppcr_ext cannot be compiled here: {folder} cannot be written ({error}); "
            "set TORCH_EXTENSIONS_DIR to a folder where you may write"
        ) from error


@contextlib.contextmanager
def _lock(folder: Path, verbose: bool) -> Iterator[None]:
    """One process builds, the others wait. The kernel releases this lock with its process; the file that torch takes for a lock would
    outlive a build that was killed, and have every later one wait for ever."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if verbose:
                print(
                    f"ppcr_ext: waiting for another process that builds in {folder}",
                    file=sys.stderr,
                )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_in(folder: Path, name: str, verbose: bool) -> Path:
    """Builds beside the finished libraries and renames: an import at the same time, or after a kill, sees all of one or nothing."""
    from torch.utils import cpp_extension

    path, cuda, work = folder / f"{name}.so", folder / _CUDA_NAME, folder / "work"
    reason = _why_not_loaded(path) if path.exists() else "not built yet"
    if reason:
        if verbose:
            print(
                f"ppcr_ext: compiling {len(_build.CPU_SOURCES)} files into {work}", file=sys.stderr
            )
        work.mkdir(exist_ok=True)
        (work / "lock").unlink(
            missing_ok=True
        )  # torch's, of a build that was killed: no other runs, we hold ours
        cpp_extension.load(
            name,
            [str(_build.csrc() / source) for source in _build.CPU_SOURCES],
            extra_cflags=_build.compiler_flags(),
            build_directory=str(work),
            is_python_module=False,
            verbose=verbose,
        )
        (work / f"{name}.so").replace(path)
    why_no_cuda = _why_not_jit_cuda()
    if why_no_cuda is None and not cuda.exists():
        say = (lambda line: print(line, file=sys.stderr)) if verbose else (lambda line: None)
        torch_folder = Path(torch.__file__).parent
        library, version = work / _CUDA_NAME, torch.version.cuda
        _cuda_build.build(library, _build.csrc(), work / "cuda", torch_folder, version, say=say)
        (work / _CUDA_NAME).replace(cuda)
    elif verbose and why_no_cuda:
        print(f"ppcr_ext: CUDA kernels: not built: {why_no_cuda}", file=sys.stderr)
    return _adopt(path, why_no_cuda)


def _why_not_jit_cuda() -> str | None:
    """Why :func:`build` leaves the CUDA library out, or None. Raises RuntimeError where it is demanded and cannot be built."""
    wanted = _build.cuda_wanted()
    if wanted == "0":
        return "PPCR_BUILD_CUDA=0"
    reason = _cuda_build.why_not(torch.version.cuda)
    if reason and wanted == "1":
        raise RuntimeError(f"PPCR_BUILD_CUDA=1, but the CUDA library cannot be built: {reason}")
    if reason is None and wanted == "auto" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; set PPCR_BUILD_CUDA=1 to build it all the same"
    return reason


def load() -> None:
    """Called when the package is imported: loads the built library, or keeps why it cannot."""
    global _reason
    if _library is not None:  # the package is reloaded, its modules are not
        return
    if os.environ.get("PPCR_JIT", "0") not in ("", "0"):
        build()
        return
    built = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not built:
        name = _jit_name()
        built = [
            path for path in [_jit_folder(name) / f"{name}.so"] if os.path.exists(path)
        ]  # Path.exists raises where it may not look
    if not built:
        _reason = f"the extension is not built ({_build_record().get('cpu') or 'no library beside the package'}); {_REMEDY}"
        return
    reason = _why_not_loaded(built[0])
    if reason:
        _reason = f"{reason}; {_REMEDY}"
        return
    _adopt(built[0], _build_record().get("cuda"))


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before its section headers, which stand last: loading it would kill the process (SIGBUS)."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
    except OSError:
        return False  # the loader's words are better
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return False
    offset, size, count = (
        *struct.unpack_from("<Q", header, 0x28),
        *struct.unpack_from("<HH", header, 0x3A),
    )
    return bool(path.stat().st_size < offset + size * count)


def _why_not_loaded(path: Path) -> str | None:
    """Loads a library; None, or why that failed."""
    if _is_cut_off(path):
        return (
            f"{path} does not load: it is cut off, as by a full disk or a copy that was interrupted"
        )
    try:
        torch.ops.load_library(str(path))
    except (
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: torch refuses what the library registers
        said = str(error.__cause__ or error)  # torch says only that it could not
        other = (
            f": it was built for another PyTorch than {torch.__version__}"
            if "undefined symbol" in said
            else ""
        )
        return f"{path} does not load{other} ({said})"
    key = "CUDA" if path.name == _CUDA_NAME else "CPU"
    registered = set(torch._C._dispatch_get_registrations_for_dispatch_key(key))
    missing = [name for name in OPERATORS if f"ppcr_ext::{name}" not in registered]
    return (
        f"{path} is of another version of ppcr_ext: it lacks {', '.join(missing)}"
        if missing
        else None
    )


def _adopt(path: Path, why_no_cuda: str | None) -> Path:
    """Takes the loaded CPU library, which holds the schemas, and the CUDA library beside it."""
    global _library, _reason
    _library, _reason = path, None
    _load_cuda(path.parent / _CUDA_NAME, why_no_cuda)
    register_for_tracing("native")
    return path


def _load_cuda(path: Path, why_not_built: str | None) -> None:
    global _cuda_library, _cuda_reason
    if torch.version.cuda is None:  # nothing that could be built would help
        _cuda_reason = _cuda_build.why_not(None)
        return
    if not path.exists():
        _cuda_reason = f"the CUDA library is not built ({why_not_built or 'none beside the CPU library'}); {_CUDA_REMEDY}"
        return
    reason = _cuda_build.why_not_beside(path, torch.version.cuda) or _why_not_loaded(path)
    if reason:
        _cuda_reason = f"{reason}; {_CUDA_REMEDY}"
        return
    _cuda_library, _cuda_reason = path, None


# ---- shapes and strides for tracing ------------------------------------------------------------------------------------------------


def is_pixel_major(x: Tensor) -> bool:
    expected = 1
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[dim] != 1 and x.stride(dim) != expected:
            return False
        expected = expected * x.shape[dim]
    return True


def _output_like(x: Tensor) -> Tensor:
    """As the kernels allocate: x's strides where its layout is one they read, else contiguous."""
    if x.is_contiguous() or is_pixel_major(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gate_like(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 1, *x.shape[2:]))


def parameter_gradients(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(
        (0,)
    ) if bias is None else bias.new_empty((1,))


def register_for_tracing(backend: str) -> None:
    """Fake kernels and autograd formulas of a backend's operators.

    Once a process: they outlive a reload of the package.
    """
    prefix = "triton_" if backend == "triton" else ""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("Autograd")
    if f"ppcr_ext::{prefix}ppcr" in registered:
        compiler: Any = sys.modules.get("torch._dynamo.symbolic_convert")
        if hasattr(compiler, "_import_module"):
            # torch.compile keeps modules by name, also those of before a purge of sys.modules.
            compiler._import_module.cache_clear()
        return
    register_fakes(prefix)
    from . import functional

    functional.register_derivatives(backend)


def register_fakes(prefix: str) -> None:
    """Fake kernels, which torch.compile and torch.export run in place of the real ones. ``triton_`` has the same schemas."""

    @torch.library.register_fake(f"ppcr_ext::{prefix}ppcr")
    def _(
        x: Tensor, weight: Tensor, bias: Tensor | None, levels: Sequence[int], eps: float
    ) -> Tensor:
        return _output_like(x)

    @torch.library.register_fake(f"ppcr_ext::{prefix}ppcr_gate")
    def _(
        x: Tensor, weight: Tensor, bias: Tensor | None, levels: Sequence[int], eps: float
    ) -> Tensor:
        return gate_like(x)

    @torch.library.register_fake(f"ppcr_ext::{prefix}ppcr_add_relu")
    def _(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        levels: Sequence[int],
        eps: float,
    ) -> Tensor:
        return _output_like(x)

    def backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        levels: Sequence[int],
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _output_like(x), *parameter_gradients(weight, bias)

    torch.library.register_fake(f"ppcr_ext::{prefix}ppcr_backward", backward)
    torch.library.register_fake(f"ppcr_ext::{prefix}ppcr_gate_backward", backward)

    @torch.library.register_fake(f"ppcr_ext::{prefix}ppcr_add_relu_backward")
    def _(
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        levels: Sequence[int],
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _output_like(x), _output_like(x), *parameter_gradients(weight, bias)
