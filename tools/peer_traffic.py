"""How many kernels torch.compile makes of the plain formulations on a GPU, and what they move through memory: docs/peer_traffic.md.

``python tools/peer_traffic.py [--output docs/peer_traffic.md] [--only 64x56]`` needs no GPU. The formulations are traced with fake
tensors and handed to Inductor, which is told that it compiles for an H200; what each of its kernels reads and writes is taken from
Inductor's own scheduler, and nothing is compiled by Triton. Runs in a process of its own: PyTorch is told lies about its devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import peers

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 256
SHAPES = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float16)
PEERS = ("pooled once", "level by level")
OURS = {
    "forward": (1, 2),
    "backward": (2, 3),
}  # kernels, passes over the tensor: asserted in tests/test_cuda_plan.py


@dataclasses.dataclass
class Traffic:
    kernels: int
    passes: int  # over tensors as large as x
    units: float  # all bytes, small tensors too, over those of x


def traced(
    peer: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> dict[str, torch.fx.GraphModule]:
    """The graphs of forward and backward as torch.compile would cut them, for the CPU."""
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: dict[str, torch.fx.GraphModule] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs[name] = graph
            return make_boxed_func(graph)

        return compiler

    with FakeTensorMode():
        x = torch.empty(shape, dtype=dtype).to(memory_format=LAYOUTS[layout]).requires_grad_()
        weight, bias = (torch.empty(size, dtype=dtype, requires_grad=True) for size in (7, 1))
        function = aot_function(
            lambda x, weight, bias: peers.PEERS[peer](x, weight, bias, (1, 2, 4)),
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        y = function(x, weight, bias)
        y.backward(torch.empty_like(y))
    return graphs


def pretend_gpu() -> None:
    """From here on PyTorch believes in an H200, as far as Inductor asks before it would compile a kernel."""
    import torch._subclasses.fake_tensor
    import torch.utils._triton
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    h200 = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
        L2_cache_size=50 << 20, gcnArchName="", clock_rate=1980000, memory_clock_rate=3201000, memory_bus_width=6144,
        is_integrated=0, uuid="",
    )  # fmt: skip
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_device=lambda: 0, get_current_stream=lambda device=None: 0, get_device_interface=lambda: torch.cuda,
    )  # fmt: skip
    triton.runtime.driver.set_active(driver)
    no_state = torch.zeros(16, dtype=torch.uint8)
    for target in (torch.cuda, CudaInterface, CudaInterface.Worker):
        for name, value in {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": h200, "synchronize": None,
            "get_device_capability": (9, 0), "get_compute_capability": 90, "is_bf16_supported": True, "is_triton_capable": True,
            "raise_if_triton_unavailable": None, "_lazy_init": None, "is_initialized": False, "get_rng_state": no_state,
            "set_rng_state": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None,
        }.items():  # fmt: skip
            if hasattr(target, name):
                answer = lambda *_, value=value, **__: value  # noqa: E731
                setattr(target, name, answer if target is torch.cuda else staticmethod(answer))
    # PyTorch 2.11 would allocate on the device
    torch._subclasses.fake_tensor.init_gpu_context = lambda *_: None
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):  # what it answered before
            function.cache_clear()


def traffic(graph: torch.fx.GraphModule, tensor_bytes: int, backward: bool) -> Traffic:
    """Of the kernels into which Inductor would fuse a graph."""
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode()
    inputs = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            with mode:
                inputs.append(
                    torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device="cuda:0"
                    )
                )
        elif "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.recompile()
    found: list[dict[str, int]] = []

    class Scheduled(Exception):
        pass

    def look(lowering: GraphLowering) -> None:
        lowering._update_scheduler()
        accesses = [
            node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
            for node in lowering.scheduler.nodes
        ]
        found.extend(
            kernel for kernel in accesses if kernel
        )  # a concatenation that its parts write into is no kernel
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
    big = sum(round(count / tensor_bytes) for kernel in found for count in kernel.values())
    return Traffic(len(found), big, sum(sum(kernel.values()) for kernel in found) / tensor_bytes)


def rows(shapes: tuple[tuple[int, int], ...]) -> list[str]:
    """Lines of the table, a shape, layout, dtype and formulation each."""
    cases = list(itertools.product(shapes, DTYPES, PEERS, LAYOUTS))
    graphs = [
        traced(peer, (IMAGES, c, side, side), layout, dtype)
        for (c, side), dtype, peer, layout in cases
    ]
    pretend_gpu()  # tracing comes before: it would ask the device for random numbers
    layouts: dict[tuple[str, str], list[str]] = {}  # of each line, but for its layout
    for ((channels, side), dtype, peer, layout), made in zip(cases, graphs, strict=True):
        tensor_bytes = IMAGES * channels * side * side * dtype.itemsize
        cells, total, ours = [], 0.0, 0.0
        for direction, graph in made.items():
            of = traffic(graph, tensor_bytes, direction == "backward")
            cells += [f"{of.kernels}", f"{of.passes}", f"{of.units:.2f}"]
            total += of.units
            ours += OURS[direction][1]
        name = f"{channels}x{side}x{side}"
        start = f"| {name} | {str(dtype).removeprefix('torch.')} | {peer}"
        end = f"{' | '.join(cells)} | {total * tensor_bytes / 1e6:.0f} | {ours * tensor_bytes / 1e6:.0f} | {total / ours:.2f} |"
        layouts.setdefault((start, end), []).append(layout)
    return [
        f"{start} | {'both' if len(same) == len(LAYOUTS) else same[0]} | {end}"
        for (start, end), same in layouts.items()
    ]


def render(lines: list[str]) -> str:
    return "\n".join(
        [
            "# What the plain formulations move under torch.compile",
            "",
            f"Written by `python tools/peer_traffic.py` with PyTorch {torch.__version__}: what its compiler would launch on an H200 for",
            f"{IMAGES} images, read from the compiler's own accounts. Nothing here was run or timed.",
            "",
            "- A unit is the size of x. passes: reads and writes of tensors as large as x; units: all bytes, the contexts and gates that",
            "  are written and read between the kernels included, each kernel reading a tensor once.",
            f"- The fused kernels: forward {OURS['forward'][0]} kernel and {OURS['forward'][1]} units, backward {OURS['backward'][0]} and "
            f"{OURS['backward'][1]} (and under 1 % for the parameters'",
            "  gradients), for every shape, layout and dtype of the table.",
            "- The last column is what a step would gain if all kernels used memory equally well.",
            "",
            "| x | dtype | formulation | layout | forward: kernels | passes | units | backward: kernels | passes | units "
            "| step, MB | fused, MB | times |",
            "| --- | --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "peer_traffic.md")
    parser.add_argument("--only", metavar="64x56", help="one shape, printed and not written")
    options = parser.parse_args()
    if options.only:
        channels, side = map(int, options.only.split("x"))
        print("\n".join(rows(((channels, side),))))
        return
    options.output.write_text(render(rows(SHAPES)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
