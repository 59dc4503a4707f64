"""What torch.compile makes of the plain formulations in Triton: docs/baseline_traffic.md.

``python tools/baseline_traffic.py [--only 64x56]`` counts kernels and the memory that they move. It
needs no GPU: the formulations are traced with fake tensors and handed to Inductor, which schedules
Triton kernels for them, and what each kernel reads and writes is taken from its scheduler. Nothing
is compiled.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
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
from ppcr_ext import testing
from ppcr_ext.testing import LAYOUTS, LEVELS, STAGES

IMAGES = 256
DTYPES = (torch.float32, torch.float16)
FORMULATIONS = ("pooled once", "level by level")
# Kernels, and passes over the tensor: asserted in tests/test_cuda_plan.py.
OURS = {"forward": (1, 2), "backward": (2, 3)}


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
) -> dict[str, list[dict[str, int]]]:
    """Those of forward and backward, in graphs as torch.compile would cut them."""
    found: dict[str, list[dict[str, int]]] = {}

    def compiler(
        direction: str, graph: torch.fx.GraphModule, inputs: list[Any]
    ) -> Callable[..., Any]:
        found[direction] = kernels_of(graph, inputs)
        return make_boxed_func(graph)

    layer = baselines.plain("ppcr", name, [], LEVELS).layer
    with FakeTensorMode():
        x = testing.to_layout(torch.empty(shape, dtype=dtype), layout).requires_grad_()
        own = [torch.empty(n, dtype=dtype, requires_grad=True) for n in (sum(LEVELS), 1)]
        function = aot_function(
            layer,
            fw_compiler=partial(compiler, "forward"),
            bw_compiler=partial(compiler, "backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        y = function(x, *own)
        y.backward(torch.empty_like(y))
    return found


def rows(stages: tuple[tuple[int, int], ...]) -> list[str]:
    """Lines of the table, a stage, dtype and formulation each, for both layouts if they agree."""
    cases = list(itertools.product(stages, DTYPES, FORMULATIONS, LAYOUTS))
    layouts: dict[tuple[str, str], list[str]] = {}  # of each line, but for its layout
    for (channels, side), dtype, name, layout in cases:
        made = kernels(name, (IMAGES, channels, side, side), layout, dtype)
        unit, total, cells = IMAGES * channels * side * side * dtype.itemsize, 0.0, []
        for accesses in made.values():
            sizes = [size for kernel in accesses for size in kernel.values()]
            passes, units = sum(round(size / unit) for size in sizes), sum(sizes) / unit
            cells += [f"{len(accesses)} | {passes} | {units:.2f}"]
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

Written by `python tools/baseline_traffic.py` with PyTorch {torch.__version__}: the Triton kernels \
that its
compiler would launch for {IMAGES} images, read from the compiler's own accounts. Nothing was run or
timed. A GPU splits the sums over many pixels: a kernel more, and less than 2 % of the bytes.

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
