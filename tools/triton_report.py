"""What Triton makes of its kernels for sm_90: registers, spills and access widths, as a CSV table.

``python tools/triton_report.py`` writes results/triton_kernels.csv. It needs Triton, whose package
has ptxas and cuobjdump, but no GPU: kernels are compiled for a device that is not there, and never
run. tests/test_triton.py checks a sample of them.
"""

import collections
import dataclasses
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import cuda_report

from benchmarks.cases import PICTURES
from ppcr_ext import testing
from ppcr_ext._triton import launch_rule, operators

IMAGES = 256
MODES = {number: name for name, number in operators.MODES.items()}
MAPS = ("x", "residual", "out", "grad", "y", "dx", "d_residual")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One call of an operator, forward or backward, on aligned tensors."""

    channels: int
    side: int
    dtype: torch.dtype
    layout: str
    mode: int
    backward: bool
    levels: tuple[int, ...] = testing.LEVELS

    @property
    def aligned(self) -> bool:
        """Whether rows and segments begin at multiples of 16 bytes, as wide vectors need it."""
        edges = launch_rule.common_edge_factor(self.levels, self.channels)
        row = self.side**2 if self.layout == "contiguous" else edges
        return row * self.dtype.itemsize % 16 == 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    variant: Variant
    kernel: str  # ppcr_one_pass_*: a tile stays in registers; ppcr_two_passes_*: it is read twice
    pixels: int  # of a tile
    flat: bool  # rows of a tile are several channels with all their pixels
    warps: int
    registers: int
    stack: int
    spills: int  # instructions that read or write local memory
    instructions: int
    loads: collections.Counter[int]
    stores: collections.Counter[int]

    def row(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        variant = fields.pop("variant") | {"mode": MODES[self.variant.mode]}
        texts = {name: cuda_report.as_text(getattr(self, name)) for name in ("loads", "stores")}
        return variant | {"aligned": self.variant.aligned} | fields | texts


def compile_variant(variant: Variant) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    driver = types.SimpleNamespace(  # in place of Triton's, which wants a GPU
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    shape = (IMAGES, variant.channels, variant.side, variant.side)
    x = testing.to_layout(torch.empty(shape, dtype=variant.dtype, device="meta"), variant.layout)
    problem = operators.problem_of(variant.mode, variant.backward, x, variant.levels)
    kernel, grid, arguments, options = operators.plan(problem, True, testing.EPS)
    pointers = kernel.arg_names[: kernel.arg_names.index("pixel_units")]
    wide = torch.promote_types(variant.dtype, torch.float32)
    # Triton takes a dtype for an aligned tensor of it.
    tensors = [variant.dtype if name in MAPS else wide for name in pointers]
    compiled = kernel.warmup(*tensors, *arguments, grid=grid, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = cuda_report.cuobjdump("--dump-resource-usage", file.name)
        (code,) = cuda_report.code_of(file.name).values()
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, usage
    registers, stack = map(int, resources.groups())
    spills = sum(op.startswith(("LDL", "STL")) for op in code)
    loads, stores = cuda_report.widths(code, *cuda_report.LOADS), cuda_report.widths(code, "STG")
    tile = (kernel.__name__, options["P"], options.get("FLAT", 1) > 1, options["num_warps"])
    return Compiled(variant, *tile, registers, stack, spills, len(code), loads, stores)


def variants() -> Iterator[Variant]:
    for backward in (False, True):
        for mode in MODES:
            for layout in testing.LAYOUTS:
                for channels, side in PICTURES:
                    for dtype in testing.DTYPES[: 4 if mode == launch_rule.SCALE else 3]:
                        yield Variant(channels, side, dtype, layout, mode, backward)
        for layout in testing.LAYOUTS:
            for levels in ((1, 2, 4, 8), (1, 3, 7)):
                for dtype in (torch.float32, torch.float16):
                    yield Variant(256, 56, dtype, layout, launch_rule.SCALE, backward, levels)


def main() -> None:
    output = ROOT / "results" / "triton_kernels.csv"
    cuda_report.write_table(output, (compile_variant(v).row() for v in variants()))


if __name__ == "__main__":
    main()
