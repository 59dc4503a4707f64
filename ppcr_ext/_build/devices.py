"""The CUDA devices that PyTorch sees, asked without starting CUDA.

A process that has started it cannot fork any more into children that use it, and neither the
import of the package nor a question about its backends may do that. NVIDIA's management library
answers instead; its devices are those of the machine, of which CUDA_VISIBLE_DEVICES shows some.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

Question = Callable[[int], "str | None"]
NO_DEVICE = "PyTorch sees no CUDA device"
NOT_ASKED = (
    "PyTorch has not started CUDA, and NVIDIA's management library, which would know the device"
    " without, does not answer; after torch.cuda.init() it is known"
)


def count() -> int:
    """The number of devices that PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def capability(index: int) -> tuple[int, int] | None:
    """The compute capability of a device, or None where only starting CUDA would tell."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.get_device_capability(index)
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    try:
        from torch.cuda import _get_nvml_device_index  # private: it follows CUDA_VISIBLE_DEVICES

        at, found = _get_nvml_device_index(index), (ctypes.byref(major), ctypes.byref(minor))
        with _management() as nvml:
            failed = nvml.nvmlDeviceGetHandleByIndex_v2(at, ctypes.byref(handle))
            failed = failed or nvml.nvmlDeviceGetCudaComputeCapability(handle, *found)
    except (ImportError, OSError, AttributeError, RuntimeError):
        return None
    return None if failed else (major.value, minor.value)


def driver() -> str | None:
    """The version of NVIDIA's driver, also where PyTorch refuses it, or None."""
    text = ctypes.create_string_buffer(96)
    try:
        with _management() as nvml:
            failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
    except (OSError, AttributeError):
        return None
    return None if failed else text.value.decode()


def _nvml() -> ctypes.CDLL:
    return ctypes.CDLL("libnvidia-ml.so.1")


@contextlib.contextmanager
def _management() -> Iterator[ctypes.CDLL]:
    """NVIDIA's management library. Raises OSError where it is missing or does not start."""
    nvml = _nvml()
    if nvml.nvmlInit_v2() != 0:
        raise OSError
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def remembered(question: Question) -> Question:
    """Remembers what was answered for a device, from the time when CUDA has started.

    Before that the management library answers, which may count the devices in another order.
    """
    answers: dict[int, str | None] = {}

    @functools.wraps(question)
    def ask(index: int) -> str | None:
        import torch

        try:
            return answers[index]
        except KeyError:
            answer = question(index)
            if torch.cuda.is_initialized():
                answers[index] = answer
            return answer

    ask.cache_clear = answers.clear  # type: ignore[attr-defined]
    return ask
