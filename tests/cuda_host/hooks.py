"""What a test asks of the emulated runtime and plants in it, by functions of devices.cpp."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from .plugin import calls, runtime

# Errors of the CUDA runtime, by number.
INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES, CLUSTER_SIZE = 1, 9, 701, 912
# Functions that wait for a device; the asynchronous copies wait only for memory that is not pinned.
WAITING = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaStreamQuery",
    "cudaEventQuery",
    "cudaMemcpy",
    "cudaMemcpyAsync",
)
runtime.cuda_host_log.restype = ctypes.c_char_p
runtime.cuda_host_stream_number.restype = ctypes.c_ulonglong


class Launch(NamedTuple):
    device: int
    stream: int
    blocks: int
    threads: int
    cluster: int
    shared: int
    early: bool
    kernel: str


def launches() -> list[Launch]:
    """Since the last call of forget()."""
    lines = [line.split("\t") for line in runtime.cuda_host_log().decode().splitlines()]
    return [Launch(*map(int, line[:6]), line[6] == "1", line[7]) for line in lines]


def forget() -> None:
    """Launches so far, planted errors, and errors that the last test may have left."""
    runtime.cuda_host_forget()
    calls.clear()


def plant(function: str, error: int, nth: int = 1) -> None:
    """The nth call from now on fails."""
    runtime.cuda_host_plant(function.encode(), nth, error)


def waits() -> int:
    return sum(runtime.cuda_host_calls(name.encode()) for name in WAITING)


def pending() -> int:
    return runtime.cuda_host_pending()


def stream_number(stream: torch.cuda.Stream) -> int:
    with torch.cuda.device(stream.device):
        return runtime.cuda_host_stream_number(ctypes.c_void_p(stream.cuda_stream))


def kernels() -> tuple[int, str]:
    """How many kernels of ours are registered, and the names of those without fibers."""
    missing = ctypes.create_string_buffer(1 << 20)
    return runtime.cuda_host_kernels_of(
        b"ppcr::cuda", missing, len(missing)
    ), missing.value.decode()
