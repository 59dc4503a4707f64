"""What a test asks of the emulated runtime and plants in it, by functions of devices.cpp."""

import ctypes
from typing import NamedTuple

from .plugin import calls, runtime

# Errors of the CUDA runtime, by number.
INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES, CLUSTER_SIZE = 1, 9, 701, 912
# What waits for a device (a copy only where memory is not pinned); the rest is not emulated.
WAITING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
WAITING += ("cudaEventQuery", "cudaMemcpyAsync")
QUESTIONS = ("cudaOccupancyMaxActiveClusters",)
QUESTIONS += ("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",)
runtime.cuda_host_log.restype = ctypes.c_char_p
runtime.cuda_host_allowances.restype = ctypes.c_char_p
runtime.cuda_host_kernels.restype = ctypes.c_char_p


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


def allowances() -> list[tuple[int, int, str]]:
    """Device, bytes and kernel of every limit of shared memory set since the last forget()."""
    lines = (line.split("\t") for line in runtime.cuda_host_allowances().decode().splitlines())
    return [(int(device), int(limit), kernel) for device, limit, kernel in lines]


def forget() -> None:
    """Launches so far, planted errors, and errors that the last test may have left."""
    runtime.cuda_host_forget()
    calls.clear()


def plant(function: str, error: int, nth: int = 1) -> None:
    """The nth call from now on fails."""
    runtime.cuda_host_plant(function.encode(), nth, error)


def waits() -> int:
    return sum(runtime.cuda_host_calls(name.encode()) for name in WAITING)


def questions() -> int:
    """How often was asked how many blocks a device holds."""
    return sum(runtime.cuda_host_calls(name.encode()) for name in QUESTIONS)


def pending() -> int:
    return runtime.cuda_host_pending()


def kernels() -> list[tuple[str, bool]]:
    """The registered kernels, and whether each has fibers."""
    lines = (line.split("\t") for line in runtime.cuda_host_kernels().decode().splitlines())
    return [(name, has_fibers == "1") for has_fibers, name in lines]
