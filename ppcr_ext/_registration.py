"""Registers the operators with PyTorch, in one place: when the package is imported, and after a
build what it brought.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from . import _autograd, _native, _sharding
from ._checks import check_bool
from ._operators import OPERATORS
from ._triton import operators as _triton


def load() -> None:
    """Loads the compiled libraries and registers all. The import of the package calls it."""
    _native.load()
    _register()


def build(verbose: bool = True) -> Path:
    """Compiles the extension now, with ninja, into PyTorch's extension cache, and loads it.

    The cache is keyed by the sources, the flags and the version of PyTorch. A second call, in this
    process or a later one, compiles nothing, and later imports of ppcr_ext find the library by
    themselves. The CUDA library is built too where a CUDA device is visible or PPCR_BUILD_CUDA=1,
    for that device or TORCH_CUDA_ARCH_LIST. The cache keeps one for each list of architectures, and
    an import takes one that the visible devices can run. CXX, MAX_JOBS, DEBUG and
    TORCH_EXTENSIONS_DIR are honoured.

    Args:
        verbose: whether to show the progress of the compiler, one line for each file.

    Returns:
        The path of the loaded CPU library. If a library is loaded already, it is that one, since a
        process cannot exchange it. Beside one in the cache the CUDA library is still built, unless
        one is loaded; PPCR_JIT=1 builds before anything is loaded.

    Raises:
        TypeError: verbose is not a bool.
        ValueError: PPCR_BUILD_CUDA has a value other than auto, 0 and 1.
        RuntimeError: there is no compiler or no ninja, the compiler failed, or the cache cannot be
            written; the message holds the remedy.

    Example:
        >>> library = ppcr_ext.build(verbose=False)  # doctest: +SKIP
        >>> library.suffix  # doctest: +SKIP
        '.so'
    """
    check_bool("verbose", verbose)
    path = _native.build(verbose)
    _register()
    return path


def _register() -> None:
    """Registers Triton's operators, whether or not Triton is there, then the fake kernels and
    derivatives of all operators, and how they are split over devices. All of it outlives a reload.
    """
    _triton.define()
    if _native.library is not None:
        _register_for_tracing("native", "")
    _register_for_tracing("triton", "triton_")
    _sharding.register()


def _register_for_tracing(backend: str, prefix: str) -> None:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("Autograd")
    if f"ppcr_ext::{prefix}ppcr" in registered:
        compiler: Any = sys.modules.get("torch._dynamo.symbolic_convert")
        if hasattr(compiler, "_import_module"):
            # torch.compile keeps modules by name, also those of before a purge of sys.modules.
            compiler._import_module.cache_clear()
        return
    for name, operator in OPERATORS.items():
        torch.library.register_fake(f"ppcr_ext::{prefix}{name}", operator.fake)
    for operations in _autograd.OPERATIONS.values():
        _autograd.register(operations[backend])
