"""What torch.compile makes of the plain formulations in Triton: docs/baseline_traffic.md.

``python tools/baseline_traffic.py [--only 64x56]`` counts kernels and the memory that they move,
and writes the page's table and its version of PyTorch. It needs no GPU: the formulations are traced
with fake tensors and handed to Inductor, which schedules Triton kernels for them, and what each
kernel reads and writes is taken from its scheduler. Nothing is compiled.
"""

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import baselines
from benchmarks.cases import PICTURES, PLAIN
from ppcr_ext import testing
from ppcr_ext.testing import LAYOUTS, LEVELS

IMAGES = 256
DTYPES = (torch.float32, torch.float16)
# What the fused kernels read and write in a step, in tensors of x's size: tests/test_cuda_plan.py.
OURS = sum(baselines.TRAFFIC["ppcr", direction][0] for direction in ("forward", "backward"))


def kernels_of(graph: torch.fx.GraphModule, inputs: list[Any]) -> list[dict[str, int]]:
    """The bytes of every tensor that each kernel touches, as Inductor would fuse a graph."""
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

    options = {"cpu_backend": "triton", "compile_threads": 1, "fx_graph_cache": False}
    with (
        torch._inductor.config.patch(options),
        mock.patch.object(GraphLowering, "codegen", look),
        torch.no_grad(),
    ):
        try:
            compile_fx_inner(graph, inputs)
        except Exception:
            if not found:
                raise
    return found


def kernels(
    name: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> list[list[dict[str, int]]]:
    """Those of forward and of backward, in graphs as torch.compile would cut them."""
    found: list[list[dict[str, int]]] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(kernels_of(graph, inputs))
        return make_boxed_func(graph)

    layer = baselines.plain("ppcr", name, [], LEVELS).layer
    with FakeTensorMode():
        x = testing.to_layout(torch.empty(shape, dtype=dtype), layout).requires_grad_()
        own = [torch.empty(n, dtype=dtype, requires_grad=True) for n in (sum(LEVELS), 1)]
        function = aot_function(
            layer,
            fw_compiler=compiler,  # and bw_compiler, which is called later
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        y = function(x, *own)
        y.backward(torch.empty_like(y))
    return found


def rows(stages: tuple[tuple[int, int], ...]) -> list[str]:
    """Lines of the table, a stage, dtype and formulation each, for both layouts if they agree."""
    cases = list(itertools.product(stages, DTYPES, PLAIN, LAYOUTS))
    layouts: dict[tuple[str, str], list[str]] = {}  # of each line, but for its layout
    for (channels, side), dtype, name, layout in cases:
        unit, total, cells = IMAGES * channels * side * side * dtype.itemsize, 0.0, []
        for accesses in kernels(name, (IMAGES, channels, side, side), layout, dtype):
            sizes = [size for kernel in accesses for size in kernel.values()]
            passes, units = sum(round(size / unit) for size in sizes), sum(sizes) / unit
            cells += [f"{len(accesses)} | {passes} | {units:.2f}"]
            total += units
        bytes_of = [f"{count * unit / 1e6:.0f}" for count in (total, OURS)]
        start = f"| {channels}x{side}x{side} | {str(dtype).removeprefix('torch.')} | {name}"
        end = " | ".join([*cells, *bytes_of, f"{total / OURS:.2f} |"])
        layouts.setdefault((start, end), []).append(layout)
    return [
        f"{start} | {'both' if len(same) == len(LAYOUTS) else same[0]} | {end}"
        for (start, end), same in layouts.items()
    ]


def main() -> None:
    if sys.argv[1:2] == ["--only"]:  # one stage, printed and not written
        channels, side = map(int, sys.argv[2].split("x"))
        print("\n".join(rows(((channels, side),))))
        return
    page = ROOT / "docs" / "baseline_traffic.md"
    words, rule, _ = page.read_text().partition(": | --: |\n")  # before the first line
    if not rule:
        raise SystemExit(f"{page} has no head of a table to write below")
    words = re.sub(r"PyTorch \S+:", f"PyTorch {torch.__version__}:", words)
    page.write_text(words + rule + "\n".join(rows(PICTURES)) + "\n")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
