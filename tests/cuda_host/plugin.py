"""PyTorch's own CUDA operators on the emulated runtime: the CPU operators on the same memory.

A pytest plugin (``-p cuda_host.plugin``), or ``install()`` before a script. Allocation, views and
plain copies stay PyTorch's own for CUDA, as do the operators of other libraries, such as ppcr_ext.
"""

import ctypes
import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_map

# What allocates, makes views, or looks at a tensor without reading its elements.
OWN = {
    *("empty", "empty_strided", "as_strided", "view", "_reshape_alias", "unfold", "set_"),
    *("resize_", "resize_as_", "record_stream", "is_pinned", "_pin_memory", "is_set_to", "alias"),
    *("view_as_real", "view_as_complex", "_efficientzerotensor", "_local_scalar_dense"),
}
# Composites without a CUDA kernel of their own, which would choose cuDNN or cuBLAS.
COMPOSITES = {
    *("convolution_overrideable", "convolution", "convolution_backward"),
    *("native_batch_norm", "native_batch_norm_backward"),
}
runtime = ctypes.CDLL(None)  # what LD_PRELOAD has brought in
calls: Counter[str] = Counter()  # of operators of PyTorch
_library = torch.library.Library("aten", "IMPL")  # what it replaces lives as long


def on_host(t: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of a CUDA tensor."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(whole, t.storage_offset(), t.size(), t.stride())


def wait(device: torch.device) -> None:
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        if runtime.cuda_host_wait(ctypes.c_void_p(stream.cuda_stream)):
            raise RuntimeError("cuda_host: an operator of PyTorch in a capture, or after an error")


def replacement(name: str, op: torch._ops.OpOverload) -> Callable[..., object]:
    tensors = [isinstance(argument.type, torch.TensorType) for argument in op._schema.arguments]

    def run(*args: object, **kwargs: object) -> object:
        calls[name] += 1
        lowered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        devices: list[torch.device] = []

        def lower(value: object) -> object:
            if isinstance(value, torch.Tensor) and value.is_cuda:
                devices.append(value.device)
                host = on_host(value)
                lowered[id(host)] = (host, value)
                return host
            if isinstance(value, torch.device) and value.type == "cuda":
                devices.append(value)
                return torch.device("cpu")
            if isinstance(value, torch.Generator) and value.device.type == "cuda":
                return None
            return value

        def lift(value: object) -> object:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in lowered:
                return lowered[id(value)][1]
            like = {"dtype": value.dtype, "device": devices[0]}
            lifted = torch.empty_strided(value.size(), value.stride(), **like)
            if value.numel():
                on_host(lifted).copy_(value)
            return lifted

        # Numbers that PyTorch wraps into tensors, in double precision, arrive here as numbers.
        wide = any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in args)
        wrapped = [
            torch.tensor(value, dtype=torch.float64 if wide else None)
            if is_tensor and isinstance(value, (int, float))
            else value
            for value, is_tensor in zip(args, tensors, strict=False)
        ]
        host_args, host_kwargs = tree_map(lower, wrapped), tree_map(lower, kwargs)
        if len(set(devices)) > 1 and name != "copy_":
            found = sorted(map(str, set(devices)))
            raise RuntimeError(f"Expected all tensors on the same device, {name} got {found}")
        for device in set(devices):
            wait(device)
        results = op(*host_args, **host_kwargs)
        for host, original in lowered.values():  # an out= that the operator has resized
            if host.size() != original.size():
                original.resize_(host.size())
                on_host(original).copy_(host)
        return tree_map(lift, results)

    return run


def replacement_of_copy() -> Callable[..., object]:
    own = torch.library.get_kernel("aten::copy_", "CUDA")
    on_cpu = replacement("copy_", torch.ops.aten.copy_.default)

    def copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> object:
        dense = to.stride() == torch.empty_like(to, device="meta").stride()
        plain = to.dtype == source.dtype and to.size() == source.size()
        if plain and dense and to.stride() == source.stride():  # cudaMemcpyAsync
            return own.call_boxed(torch._C._dispatch_keys(to), to, source, non_blocking)
        return on_cpu(to, source, non_blocking)

    return copy


def sleep(cycles: int) -> None:
    """In the place of torch.cuda._sleep's kernel: a piece of work that does nothing."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    runtime.cudaMemsetAsync(None, 0, ctypes.c_size_t(0), stream)


def install() -> None:
    torch.backends.cudnn.enabled = False
    torch._C._cuda_sleep = sleep
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    on_cpu = {name.removeprefix("aten::") for name in registered("CPU")}
    on_cuda = {name.removeprefix("aten::") for name in registered("CUDA") if "aten::" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        for name in sorted(on_cuda | COMPOSITES):
            base, _, overload = name.partition(".")
            known = name in on_cpu or name in COMPOSITES or base.startswith("_foreach_")
            op = getattr(getattr(torch.ops.aten, base), overload or "default", None)
            if known and op is not None and base not in OWN and name != "copy_":
                _library.impl(name, replacement(name, op), "CUDA", allow_override=True)
        _library.impl("copy_", replacement_of_copy(), "CUDA", allow_override=True)
    torch.cuda.init()  # there is no NVML that could tell of the devices before


pytest_configure = install


@pytest.fixture(autouse=True)
def _fresh():
    """A test begins with the first device, and with nothing that another one has left behind."""
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    runtime.cuda_host_forget()
    yield
    torch.cuda.synchronize()


def pytest_terminal_summary(terminalreporter: object) -> None:
    kernels = runtime.cuda_host_calls(b"cudaLaunchKernelExC")
    terminalreporter.write_line(  # type: ignore[attr-defined]
        f"emulated CUDA: {kernels} launches; {sum(calls.values())} operators of PyTorch on the CPU"
    )
