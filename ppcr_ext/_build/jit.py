"""The JIT build: compiles the libraries with ninja into PyTorch's extension cache.

The cache is keyed by everything that goes into the CPU library: a changed source or flag never
meets an old one.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import cpu, cuda, devices


def _name() -> str:
    settings = (torch.__version__, *cpu.compiler_flags(), os.environ.get("CXX", ""))
    return f"ppcr_ext_cpu_{cpu.digest(cpu.csrc().rglob('*'), *settings)[:16]}"


def _folder(name: str) -> Path:
    """In PyTorch's extension cache.

    Asked at every import without a library. PyTorch's own module, which would tell the folder, is
    slow to import and warns.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions") / name


def built() -> Path | None:
    """The CPU library of an earlier build, if there is one."""
    name = _name()
    path = _folder(name) / f"{name}.so"
    return path if os.path.exists(path) else None  # Path.exists raises where it may not look


def build(why_not_loaded: Callable[[Path], str | None], verbose: bool) -> tuple[Path, str | None]:
    """The CPU library, compiled unless an earlier one loads, and why there is no CUDA library.

    See :func:`ppcr_ext.build`. ``why_not_loaded`` loads a library, or says why that failed.
    """
    why = cpu.why_no_compiler()
    if why:
        raise RuntimeError(f"ppcr_ext cannot be compiled here: {why}")
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        remedy = "ninja is missing; `pip install ninja`"
        raise RuntimeError(f"ppcr_ext cannot be JIT-compiled here: {remedy}")
    name = _name()
    folder = _folder(name)
    try:
        with _lock(folder, verbose):
            return _build_in(folder, name, why_not_loaded, verbose)
    except OSError as error:
        raise RuntimeError(
            f"ppcr_ext cannot be compiled here: {folder} cannot be written ({error}); "
            "set TORCH_EXTENSIONS_DIR to a folder where you may write"
        ) from error


@contextlib.contextmanager
def _lock(folder: Path, verbose: bool) -> Iterator[None]:
    """One process builds, the others wait.

    The system releases this lock with its process. The file that torch takes for a lock would
    outlive a build that was killed, and every later one would wait for ever.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if verbose:
                what = f"waiting for another process that builds in {folder}"
                print(f"ppcr_ext: {what}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_in(
    folder: Path, name: str, why_not_loaded: Callable[[Path], str | None], verbose: bool
) -> tuple[Path, str | None]:
    """Builds beside the finished libraries and renames them: an import at the same time, or after
    a build that was killed, sees all of one or nothing."""
    from torch.utils import cpp_extension

    def say(line: str) -> None:
        if verbose:
            print(line, file=sys.stderr)

    path, cuda_path, work = folder / f"{name}.so", folder / cuda.LIBRARY, folder / "work"
    sources = [str(cpu.csrc() / source) for source in cpu.CPU_SOURCES]
    if not path.exists() or why_not_loaded(path):
        say(f"ppcr_ext: compiling {len(sources)} files into {work}")
        work.mkdir(exist_ok=True)
        # torch's lock of a build that was killed: no other build runs, since ours is held here.
        (work / "lock").unlink(missing_ok=True)
        cpp_extension.load(
            name,
            sources,
            extra_cflags=cpu.compiler_flags(),
            build_directory=str(work),
            is_python_module=False,
            verbose=verbose,
        )
        (work / f"{name}.so").replace(path)
    reason = why_no_cuda()
    if reason:
        say(f"ppcr_ext: CUDA kernels: not built: {reason}")
    elif not cuda_path.exists():
        torch_folder = Path(torch.__file__).parent
        library, version = work / cuda.LIBRARY, torch.version.cuda
        cuda.build(library, cpu.csrc(), work / "cuda", torch_folder, version, say=say)
        library.replace(cuda_path)
    return path, reason


def why_no_cuda() -> str | None:
    """Why the CUDA library is left out, or None.

    Raises RuntimeError where it is demanded and cannot be built.
    """
    wanted = cpu.cuda_wanted()
    if wanted == "0":
        return "PPCR_BUILD_CUDA=0"
    reason = cuda.why_not(torch.version.cuda)
    if reason and wanted == "1":
        raise RuntimeError(f"PPCR_BUILD_CUDA=1, but the CUDA library cannot be built: {reason}")
    if reason is None and wanted == "auto" and devices.count() == 0:
        return f"{devices.NO_DEVICE}; set PPCR_BUILD_CUDA=1 to build it all the same"
    return reason
