"""What Triton makes of its kernels for sm_90: registers, spills and access widths, as a CSV table.

``python tools/triton_report.py [--output results/triton_kernels.csv]`` needs Triton, whose package
has ptxas and cuobjdump, but no GPU: kernels are compiled for a device that is not there, and never
run. tests/test_triton.py checks a sample of them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import cuda_report

from ppcr_ext import testing
from ppcr_ext._triton import launch_rule, operators

STAGES = ((64, 56), *testing.STAGES["ResNet-50"])
IMAGES = 256
MODES = {number: name for name, number in operators.MODES.items()}
DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
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


class _Target:
    """In place of Triton's driver, which wants a GPU."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_variant(variant: Variant) -> Compiled:
    import triton
    from triton.compiler import ASTSource

    triton.runtime.driver.set_active(_Target())
    shape = (IMAGES, variant.channels, variant.side, variant.side)
    x = torch.empty(shape, dtype=variant.dtype, device="meta")
    if variant.layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    problem = operators.problem_of(variant.mode, variant.backward, x, variant.levels)
    kernel, _, arguments, options = operators.plan(problem, True, testing.EPS)
    constants = {name: value for name, value in options.items() if name != "num_warps"}
    data = DTYPES[variant.dtype]
    numbers = dict(zip(("pixel_units", "tiles"), arguments, strict=True))
    constants |= {name: 1 for name, number in numbers.items() if number == 1}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):  # specialized as a launch would
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        is_number = name in numbers
        pointer = "*" + (data if name in MAPS or data == "fp64" else "fp32")
        signature[name] = "i32" if is_number else pointer
        if not is_number or numbers[name] % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    warps = options["num_warps"]
    compiled = triton.compile(
        source, target=_Target().get_current_target(), options={"num_warps": warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = cuda_report.cuobjdump("--dump-resource-usage", file.name)
        (code,) = cuda_report.code_of(file.name).values()
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, usage
    registers, stack = map(int, resources.groups())
    spills = sum(op.startswith(("LDL", "STL")) for op in code)
    loads, stores = cuda_report.loads_of(code), cuda_report.stores_of(code)
    tile = (kernel.__name__, options["P"], options.get("FLAT", 1) > 1, warps)
    return Compiled(variant, *tile, registers, stack, spills, len(code), loads, stores)


def variants() -> Iterator[Variant]:
    for backward in (False, True):
        for mode in MODES:
            for layout in testing.LAYOUTS:
                for channels, side in STAGES:
                    for dtype in list(DTYPES)[: 4 if mode == launch_rule.SCALE else 3]:
                        yield Variant(channels, side, dtype, layout, mode, backward)
        for layout in testing.LAYOUTS:
            for levels in ((1, 2, 4, 8), (1, 3, 7)):
                for dtype in (torch.float32, torch.float16):
                    yield Variant(256, 56, dtype, layout, launch_rule.SCALE, backward, levels)


def vectorized(c: Compiled) -> bool:
    """Whether all accesses but those to parameters, partial sums and gates are 16 bytes wide."""
    gates = c.pixels if c.variant.mode == launch_rule.GATE else 0
    narrow = sum(c.variant.levels) + 1 + gates
    return c.loads[16] > 0 and all(n.total() - n[16] <= narrow for n in (c.loads, c.stores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "triton_kernels.csv")
    options = parser.parse_args()
    cuda_report.write_table(options.output, (compile_variant(v).row() for v in variants()))


if __name__ == "__main__":
    main()
