"""Memory between two pages that no one may touch: reading or writing beyond it is a segmentation fault."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def guarded(count: int, dtype: torch.dtype, at_end: bool = True) -> Tensor:
    """``count`` zeros that, to 16 bytes, end where such a page begins, or else begin where one ends."""
    size = -(-max(1, count * dtype.itemsize) // 16) * 16
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + mmap.PAGESIZE + pages):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
            raise OSError("mprotect failed")
    offset = mmap.PAGESIZE + (pages - size if at_end else 0)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)[: count * dtype.itemsize].view(dtype)
