"""The JIT build: compiles the libraries with ninja into PyTorch's extension cache.

The cache is keyed by everything that goes into the CPU library: a changed source or flag never
meets an old one. Beside it the folders of CUDA libraries have the names of their architectures,
since machines with different devices may share a cache.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import cpu, cuda, devices


def _name() -> str:
    machine = (torch.__version__, platform.machine(), os.environ.get("CXX", ""))
    digest = cpu.digest(cpu.csrc().rglob("*"), *machine, *cpu.compiler_flags())
    return f"ppcr_ext_cpu_{digest[:16]}"


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


def built_for_cuda(library: Path) -> list[Path]:
    """The CUDA libraries of earlier builds beside a CPU library that some visible device can run:
    first the one that most can run, and the newest of these."""
    found = list(library.parent.glob(f"sm_*/{cuda.LIBRARY}"))
    indexes = range(devices.count() if found else 0)
    seen = [capability for capability in map(devices.capability, indexes) if capability]

    def fits(path: Path) -> int:
        return sum(cuda.why_not_usable(device, path.parent.name) is None for device in seen)

    usable = [path for path in found if fits(path) or not seen]
    return sorted(usable, key=lambda path: (fits(path), path.stat().st_mtime_ns), reverse=True)


def build(
    why_not_loaded: Callable[[Path], str | None], verbose: bool
) -> tuple[Path, list[Path], str | None]:
    """The CPU library and the CUDA libraries to try in turn, compiled unless earlier ones load, and
    why no CUDA library was wanted or could be compiled.

    See :func:`ppcr_ext.build`. ``why_not_loaded`` loads a library, or says why that failed.
    """
    why = cpu.why_no_compiler()
    if why:
        raise RuntimeError(f"ppcr_ext cannot be compiled here: {why}")
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        remedy = "ninja is missing; `pip install ninja`"
        raise RuntimeError(f"ppcr_ext cannot be JIT-compiled here: {remedy}")

    def say(line: str) -> None:
        if verbose:
            print(line, file=sys.stderr)

    name = _name()
    folder = _folder(name)
    path, work = folder / f"{name}.so", folder / "work"
    # Built beside the finished libraries and renamed: an import at the same time, or after a build
    # that was killed, sees all of one or nothing.
    with _lock(folder, say):
        if not path.exists() or why_not_loaded(path):
            say(f"ppcr_ext: compiling {len(cpu.CPU_SOURCES)} files into {work}")
            # torch's lock of a build that was killed: no other build runs, since ours is held here.
            (work / "lock").unlink(missing_ok=True)
            # What torch keeps of an attempt that failed: it would not compile again.
            cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)
            cpp_extension.load(
                name,
                [str(cpu.csrc() / source) for source in cpu.CPU_SOURCES],
                extra_cflags=cpu.compiler_flags(),
                build_directory=str(work),
                is_python_module=False,
                verbose=verbose,
            )
            (work / f"{name}.so").replace(path)
        reason = why_no_cuda()
        if reason:
            say(f"ppcr_ext: CUDA kernels: not built: {reason}")
            return path, built_for_cuda(path), reason
        nvcc = cuda.find_nvcc()
        assert nvcc is not None
        cuda_path = folder / cuda.architectures(nvcc) / cuda.LIBRARY
        if not cuda_path.exists() or why_not_loaded(cuda_path):
            library, of_torch = work / cuda.LIBRARY, Path(torch.__file__).parent
            cuda.build(library, cpu.csrc(), work / "cuda", of_torch, torch.version.cuda, say=say)
            cuda_path.parent.mkdir(exist_ok=True)
            library.replace(cuda_path)
        return path, [cuda_path], None


@contextlib.contextmanager
def _lock(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process builds, the others wait.

    The system releases this lock with its process. The file that torch takes for a lock would
    outlive a build that was killed, and every later one would wait for ever.
    """
    import fcntl

    try:
        (folder / "work").mkdir(parents=True, exist_ok=True)
        with (folder / "build.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"ppcr_ext: waiting for another process that builds in {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno is None:  # PyTorch's, of a library that does not load
            raise
        raise RuntimeError(
            f"ppcr_ext cannot be compiled here: {folder} cannot be written ({error}); "
            "set TORCH_EXTENSIONS_DIR to a folder where you may write"
        ) from error


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
