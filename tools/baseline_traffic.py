"""What torch.compile makes of the plain formulations on a GPU: docs/baseline_traffic.md.

``python tools/baseline_traffic.py [--only 64x56]`` counts kernels and the memory that they move. It
needs no GPU: the formulations are traced with fake tensors and handed to Inductor, which is told
that it compiles for an H200, and what each kernel reads and writes is taken from Inductor's own
scheduler. Nothing is compiled by Triton. PyTorch is told lies about its devices, so that this runs
in a process of its own.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import baselines
from ppcr_ext.testing import LEVELS, STAGES

IMAGES = 256
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float16)
FORMULATIONS = ("pooled once", "level by level")
# Kernels, and passes over the tensor: asserted in tests/test_cuda_plan.py.
OURS = {"forward": (1, 2), "backward": (2, 3)}


def traced(
    name: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> dict[str, torch.fx.GraphModule]:
    """The graphs of forward and backward as torch.compile would cut them, for the CPU."""
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: dict[str, torch.fx.GraphModule] = {}

    def keep(direction: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs[direction] = graph
            return make_boxed_func(graph)

        return compiler

    layer = baselines.plain("ppcr", name, [], LEVELS).layer
    with FakeTensorMode():
        x = torch.empty(shape, dtype=dtype).to(memory_format=LAYOUTS[layout]).requires_grad_()
        own = [torch.empty(n, dtype=dtype, requires_grad=True) for n in (sum(LEVELS), 1)]
        function = aot_function(
            layer,
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        y = function(x, *own)
        y.backward(torch.empty_like(y))
    return graphs


def pretend_gpu() -> None:
    """From here on PyTorch believes in an H200, as far as Inductor asks before it compiles."""
    import torch._subclasses.fake_tensor
    import torch.utils._triton
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    # fmt: off
    h200 = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30,
        warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=48 << 10, L2_cache_size=50 << 20,
        shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
        gcnArchName="", clock_rate=1980000, memory_clock_rate=3201000, memory_bus_width=6144,
        is_integrated=0, uuid="",
    )
    triton.runtime.driver.set_active(types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_stream=lambda device=None: 0, get_device_interface=lambda: torch.cuda,
    ))
    answers = {
        **dict.fromkeys(("is_available", "is_bf16_supported", "is_triton_capable"), True),
        **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), 0),
        **dict.fromkeys(("synchronize", "raise_if_triton_unavailable", "_lazy_init"), None),
        **dict.fromkeys(("set_rng_state", "set_device"), None),
        "device_count": 1, "get_device_properties": h200, "get_device_capability": (9, 0),
        "get_compute_capability": 90, "is_initialized": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    # fmt: on
    for target, (name, value) in itertools.product(
        (torch.cuda, CudaInterface, CudaInterface.Worker), answers.items()
    ):
        if hasattr(target, name):
            answer = lambda *_, value=value, **__: value  # noqa: E731
            setattr(target, name, answer if target is torch.cuda else staticmethod(answer))
    # PyTorch 2.11 would allocate on the device.
    torch._subclasses.fake_tensor.init_gpu_context = lambda *_: None
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):  # what it answered before
            function.cache_clear()


def kernels_of(graph: torch.fx.GraphModule, backward: bool) -> list[dict[str, int]]:
    """The bytes of every tensor that each kernel touches, as Inductor would fuse a graph."""
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode, device, inputs = FakeTensorMode(), torch.device("cuda:0"), []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            with mode:
                options = {"dtype": value.dtype, "device": device}
                inputs.append(torch.empty_strided(value.shape, value.stride(), **options))
        elif "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    graph.recompile()
    found: list[dict[str, int]] = []

    class Scheduled(Exception):
        pass

    def look(lowering: GraphLowering) -> None:
        lowering._update_scheduler()
        both = {"include_reads": True, "include_writes": True}
        for node in lowering.scheduler.nodes:
            if accesses := node.get_read_write_buffer_accesses(**both):
                found.append(accesses)  # a concatenation that its parts write into is no kernel
        raise Scheduled

    original = GraphLowering.codegen
    GraphLowering.codegen = look  # type: ignore[assignment, method-assign]
    try:
        with torch.no_grad(), torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False):
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
            compile_fx_inner(graph, inputs, is_backward=backward)
    except Exception:
        if not found:
            raise
    finally:
        GraphLowering.codegen = original  # type: ignore[method-assign]
    return found


def rows(stages: tuple[tuple[int, int], ...]) -> list[str]:
    """Lines of the table, a stage, dtype and formulation each, for both layouts if they agree."""
    cases = list(itertools.product(stages, DTYPES, FORMULATIONS, LAYOUTS))
    graphs = [
        traced(name, (IMAGES, c, side, side), layout, dtype)
        for (c, side), dtype, name, layout in cases
    ]
    pretend_gpu()  # tracing comes before: it would ask the device for random numbers
    layouts: dict[tuple[str, str], list[str]] = {}  # of each line, but for its layout
    for ((channels, side), dtype, name, layout), made in zip(cases, graphs, strict=True):
        unit, total, cells = IMAGES * channels * side * side * dtype.itemsize, 0.0, []
        for direction, graph in made.items():
            kernels = kernels_of(graph, direction == "backward")
            sizes = [size for kernel in kernels for size in kernel.values()]
            passes, units = sum(round(size / unit) for size in sizes), sum(sizes) / unit
            cells += [f"{len(kernels)} | {passes} | {units:.2f}"]
            total += units
        ours = sum(units for _, units in OURS.values())
        bytes_of = [f"{count * unit / 1e6:.0f}" for count in (total, ours)]
        start = f"| {channels}x{side}x{side} | {str(dtype).removeprefix('torch.')} | {name}"
        end = " | ".join([*cells, *bytes_of, f"{total / ours:.2f} |"])
        layouts.setdefault((start, end), []).append(layout)
    return [
        f"{start} | {'both' if len(same) == len(LAYOUTS) else same[0]} | {end}"
        for (start, end), same in layouts.items()
    ]


PAGE = f"""\
# What the plain formulations move under torch.compile

Written by `python tools/baseline_traffic.py` with PyTorch {torch.__version__}: what its compiler \
would
launch on an H200 for {IMAGES} images, read from the compiler's own accounts. \
Nothing was run or timed.

- A unit is the size of x. Passes are reads and writes of tensors as large as x. Units are all
  bytes, with the contexts and gates that are written and read between the kernels; each kernel
  reads a tensor once.
- The fused kernels take {OURS["forward"][0]} kernel and {OURS["forward"][1]} units forward, and \
{OURS["backward"][0]} kernels and {OURS["backward"][1]} units backward (and less
  than 1 % for the parameters' gradients), for every shape, layout and dtype of the table.
- The last column is what a step would gain if all kernels used memory equally well.

| x | dtype | formulation | layout | forward: kernels | passes | units | \
backward: kernels | passes | units | step, MB | fused, MB | times |
| --- | --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |
"""


def main() -> None:
    if sys.argv[1:2] == ["--only"]:  # one stage, printed and not written
        channels, side = map(int, sys.argv[2].split("x"))
        print("\n".join(rows(((channels, side),))))
        return
    page = ROOT / "docs" / "baseline_traffic.md"
    page.write_text(PAGE + "\n".join(rows(((64, 56), *STAGES["ResNet-50"]))) + "\n")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
