"""What Triton makes of its kernels for sm_90: registers, spills, access widths, as docs/triton_kernels.md. `make cuda-report` runs it.

Needs triton with its own ptxas and cuobjdump, but no GPU: kernels are compiled for a device that is not there, never run.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import cuda_report

from ppcr_ext._triton import launch_rule, operators

RESNET = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
IMAGES = 256
LAYOUTS = ("contiguous", "channels_last")
MODES = {
    launch_rule.SCALE: "scale",
    launch_rule.ADD_RELU: "add_relu",
    launch_rule.GATE: "gate",
}
DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
DATA = ("x", "residual", "out", "grad", "y", "dx", "d_residual")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One call of an operator, forward or backward, on aligned tensors."""

    channels: int
    side: int
    dtype: torch.dtype
    layout: str
    mode: int
    backward: bool
    levels: tuple[int, ...] = (1, 2, 4)

    @property
    def aligned(self) -> bool:
        """Whether rows and segments begin at multiples of 16 bytes, as vectors of 16 bytes need it."""
        row = (
            self.side**2
            if self.layout == "contiguous"
            else launch_rule.common_edge_factor(self.levels, self.channels)
        )
        return row * self.dtype.itemsize % 16 == 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    variant: Variant
    kernel: str
    pixels: int
    warps: int
    registers: int
    stack: int
    spills: int  # instructions that read or write local memory
    shared: int
    instructions: int
    loads: collections.Counter[str]
    stores: collections.Counter[str]


class _Target:
    """In place of Triton's driver, which wants a GPU."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_variant(variant: Variant) -> Compiled:
    import triton
    from triton.compiler import ASTSource

    triton.runtime.driver.set_active(_Target())
    x = torch.empty(
        IMAGES, variant.channels, variant.side, variant.side, dtype=variant.dtype, device="meta"
    )
    if variant.layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    kernel, _, arguments, options = operators.plan(
        variant.mode, variant.backward, x, True, variant.levels, 1e-5
    )
    constants = {name: value for name, value in options.items() if name != "num_warps"}
    data = DTYPES[variant.dtype]
    numbers = dict(zip(("pixel_units", "tiles"), arguments, strict=True))
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):  # specialized as a launch would
        divisible = [["tt.divisibility", 16]]
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        elif name in numbers:
            if numbers[name] == 1:
                signature[name], constexprs[(i,)] = "constexpr", 1
                continue
            signature[name] = "i32"
            if numbers[name] % 16 == 0:
                attributes[(i,)] = divisible
        else:
            signature[name] = "*" + (data if name in DATA or data == "fp64" else "fp32")
            attributes[(i,)] = divisible
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(
        source, target=_Target().get_current_target(), options={"num_warps": options["num_warps"]}
    )
    cuobjdump = cuda_report.find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit("cuobjdump was not found: it comes with triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [cuobjdump, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    (opcodes,) = cuda_report.parse_sass(sass).values()
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, usage
    return Compiled(
        variant, kernel.__name__, options["P"], options["num_warps"], int(resources[1]), int(resources[2]),
        sum(op.startswith(("LDL", "STL")) for op in opcodes), compiled.metadata.shared, len(opcodes),
        collections.Counter(cuda_report.width(op) for op in opcodes if op.startswith("LDG")),
        collections.Counter(cuda_report.width(op) for op in opcodes if op.startswith("STG")),
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    for backward in (False, True):
        for mode in MODES:
            for layout in LAYOUTS:
                for channels, side in RESNET:
                    for dtype in DTYPES if mode == launch_rule.SCALE else list(DTYPES)[:3]:
                        yield Variant(channels, side, dtype, layout, mode, backward)
        for layout in LAYOUTS:
            for levels in ((1, 2, 4, 8), (1, 3, 7)):
                for dtype in (torch.float32, torch.float16):
                    yield Variant(256, 56, dtype, layout, launch_rule.SCALE, backward, levels)


def render(found: list[Compiled], version: str) -> str:
    small = [c for c in found if c.variant.levels == (1, 2, 4) and c.variant.dtype != torch.float64]
    lines = [
        "# What Triton makes of its kernels",
        "",
        f"Written by `make cuda-report`: Triton {version}, sm_90, {len(found)} launches of the operators on {IMAGES} images. Counted in the",
        "machine code, not measured on a GPU.",
        "",
        f"- Levels (1, 2, 4) in float32, float16 and bfloat16: {len(small)}, of which {sum(c.spills > 0 for c in small)} spill.",
        f"- Of {sum(c.variant.aligned for c in small)} with rows aligned to 16 bytes, {sum(c.variant.aligned and not vectorized(c) for c in small)} "
        "have narrower accesses than 16 bytes to whole feature maps.",
        "- `ppcr_one_pass_*` keep a tile of pixels in registers, `ppcr_two_passes_*` read it twice; pixels: of a tile; spills: instructions on local memory.",
        "- Narrow loads and stores beside wide ones are of weights, partial sums, and gates.",
    ]
    for backward in (False, True):
        for mode, name in MODES.items():
            lines += ["", f"## {name}, {'backward' if backward else 'forward'}", ""]
            lines += [
                "| layout | shape | levels | dtype | kernel | pixels | warps | registers | spills | instructions | loads | stores |"
            ]
            lines += ["| --- | --- | --- | --- | --- | --: | --: | --: | --: | --: | --- | --- |"]
            for c in found:
                v = c.variant
                if (v.backward, v.mode) == (backward, mode):
                    lines.append(
                        f"| {v.layout} | {v.channels}x{v.side}x{v.side} | {v.levels} | {str(v.dtype).removeprefix('torch.')} | {c.kernel} "
                        f"| {c.pixels} | {c.warps} | {c.registers} | {c.spills} | {c.instructions} "
                        f"| {cuda_report.widest(c.loads)} | {cuda_report.widest(c.stores)} |"
                    )
    return "\n".join(lines) + "\n"


def vectorized(c: Compiled) -> bool:
    """Whether all accesses but those to parameters, partial sums and gates are 16 bytes wide."""
    weights = sum(c.variant.levels) + 1
    gates = c.pixels if c.variant.mode == launch_rule.GATE else 0
    narrow_loads = sum(n for w, n in c.loads.items() if w != "16")
    narrow_stores = sum(n for w, n in c.stores.items() if w != "16")
    return (
        c.loads["16"] > 0 and narrow_loads <= weights + gates and narrow_stores <= weights + gates
    )


def main(output: Path) -> None:
    import triton

    found = [compile_variant(variant) for variant in variants()]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(found, triton.__version__))
    print(f"wrote {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "triton_kernels.md")
    main(parser.parse_args().output)
