"""Memory for tests of where kernels read and write: between pages whose use is an error, and more
of it than the machine has."""

import ctypes
import mmap

import torch
from torch import Tensor

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python names it since 3.13


def guarded(count: int, dtype: torch.dtype, at_end: bool = True) -> Tensor:
    """``count`` zeros between two pages whose use is a segmentation fault.

    To 16 bytes, they end where one page begins, or begin where the other ends.
    """
    size = -(-max(1, count * dtype.itemsize) // 16) * 16
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + mmap.PAGESIZE + pages):
        if (
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0)
            != 0
        ):
            raise OSError("mprotect failed")
    offset = mmap.PAGESIZE + (pages - size if at_end else 0)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)[
        : count * dtype.itemsize
    ].view(dtype)


def sparse(count: int, dtype: torch.dtype) -> Tensor:
    """``count`` zeros that take memory only where they are touched."""
    memory = mmap.mmap(
        -1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    )
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
