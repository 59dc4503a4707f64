"""What nvcc made of the kernels: registers, spills, occupancy, access widths, as docs/cuda_kernels.md (and of Triton: docs/triton_kernels.md).

``python tools/cuda_report.py [--output docs/cuda_kernels.md]`` compiles for sm_90 (what is unchanged is not compiled again) and needs
nvcc and cuobjdump (of the CUDA toolkit or of Triton's package), but no GPU.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import cuda_build

ARCHITECTURE = "9.0"
MODES = {"0": "scale", "1": "add_relu", "2": "gate"}
DTYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32", "double": "float64"}
DTYPE_ORDER = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass
class Kernel:
    name: str  # contiguous_pipelined_forward
    dtype: str
    mode: str
    variant: str  # V=8, 13 steps, standard levels
    standard: bool
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    loads: collections.Counter[str]
    stores: collections.Counter[str]
    code: list[str]  # opcodes, in order

    @property
    def instructions(self) -> int:
        return len(self.code)

    @property
    def threads(self) -> int:
        return 512 if self.name == "finish_parameters" else 256

    @property
    def blocks(self) -> int:
        """Blocks of full size that the registers of a multiprocessor (65536, dealt out in units of 256 per warp) hold."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(65536 // (per_warp * (self.threads // 32)), 2048 // self.threads)


def find_cuobjdump() -> Path | None:
    """cuobjdump of Triton's package, beside nvcc, or on PATH."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return bundled
    on_path = shutil.which("cuobjdump")
    return Path(on_path) if on_path else None


def demangle(names: list[str]) -> list[str]:
    return subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


def parse_name(demangled: str) -> tuple[str, str, str, str, bool]:
    """name, dtype, mode, variant, standard levels"""
    found = re.match(r"(?:void )?(?:ppcr::cuda::)?(\w+)<(.*?)>\(", demangled)
    assert found is not None, demangled
    name = found[1]
    arguments = [argument.strip() for argument in re.split(r",(?![^<]*>)", found[2])]
    plain = [re.sub(r"^\((?:int|ppcr::cuda::Operation)\)", "", argument) for argument in arguments]
    dtype = DTYPES[plain[0]]
    standard = "AnyBins" not in demangled
    levels = "(1, 2, 4)" if standard else "any"
    if name.startswith("contiguous_pipelined"):
        return (
            name,
            dtype,
            MODES[plain[4]],
            f"vectors of {plain[1]}, {plain[2]} steps, levels {levels}",
            standard,
        )
    if name.startswith("channels_last"):
        variant = f"vectors of {plain[1]}, {plain[2]} steps, {plain[3]} pixels, {plain[4]} lanes"
        return name, dtype, MODES[plain[5]], variant, standard
    if name.startswith("channels_last_shared"):
        staged = plain[3] in ("true", "(bool)1", "1")
        return (
            name,
            dtype,
            MODES[plain[2]],
            f"levels {levels}{'' if staged else ', not staged'}",
            standard,
        )
    return name, dtype, "", "", standard


def parse_log(log: str) -> dict[str, tuple[int, int, int, int]]:
    """By mangled name, from ``-Xptxas -v``: registers, stack, spill stores, spill loads."""
    pattern = (
        r"Compiling entry function '(\S+)' for '\S+'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\nptxas info\s+: Used (\d+) registers"
    )
    return {m[1]: (int(m[5]), int(m[2]), int(m[3]), int(m[4])) for m in re.finditer(pattern, log)}


def parse_sass(sass: str) -> dict[str, list[str]]:
    """By mangled name: the opcodes in order."""
    functions = re.split(r"\n\s*Function : ", sass)[1:]
    opcode = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    return {function.split("\n", 1)[0].strip(): opcode.findall(function) for function in functions}


def width(opcode: str) -> str:
    """Bytes of a global access: LDG.E.128.CONSTANT -> 16."""
    bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", opcode)
    return {"8": "1", "16": "2", "64": "8", "128": "16"}.get(bits[1] if bits else "", "4")


def kernels(work: Path = cuda_build.WORK) -> list[Kernel]:
    """Of the objects in ``work``, which a build for one architecture left there."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit(
            "cuobjdump was not found: install triton, or put the CUDA toolkit's bin folder on PATH"
        )
    result = []
    for source in cuda_build.recipe().KERNEL_SOURCES:
        resources = parse_log((work / f"{source}.log").read_text())
        dump = subprocess.run(
            [cuobjdump, "--dump-sass", work / f"{source}.o"],
            capture_output=True,
            text=True,
            check=True,
        )
        opcodes = parse_sass(dump.stdout)
        for mangled, demangled in zip(resources, demangle(list(resources)), strict=True):
            registers, stack, spill_stores, spill_loads = resources[mangled]
            name, dtype, mode, variant, standard = parse_name(demangled)
            code = opcodes[mangled]
            loads = collections.Counter(
                width(op) for op in code if op.startswith("LDG") and op != "LDGDEPBAR"
            )
            stores = collections.Counter(width(op) for op in code if op.startswith("STG"))
            result.append(
                Kernel(
                    name,
                    dtype,
                    mode,
                    variant,
                    standard,
                    registers,
                    stack,
                    spill_stores,
                    spill_loads,
                    loads,
                    stores,
                    code,
                )
            )
    return sorted(result, key=lambda k: (k.name, k.mode, k.variant, DTYPE_ORDER.index(k.dtype)))


def widest(accesses: collections.Counter[str]) -> str:
    return ", ".join(f"{accesses[w]} x {w} B" for w in sorted(accesses, key=int, reverse=True))


def render(found: list[Kernel], nvcc: str) -> str:
    standard = [k for k in found if k.standard and k.dtype != "float64"]
    spilling = [k for k in standard if k.spill_stores or k.spill_loads]
    lines = [
        "# What nvcc makes of the kernels",
        "",
        f"Written by `make cuda-report`: nvcc {nvcc}, sm_90, {len(found)} kernels. Counted in the machine code, not measured on a GPU.",
        "",
        f"- Kernels of the levels (1, 2, 4) for float32, float16 and bfloat16: {len(standard)}, of which {len(spilling)} spill.",
        "- blocks: how many blocks of full size (256 threads, `finish_parameters` 512) the registers of a multiprocessor hold.",
        "- stack: bytes of local memory per thread; kernels for any levels keep their contexts there.",
        "- loads, stores: global memory instructions by width. Narrow ones beside wide ones read weight and bias, or write partial sums;",
        "  kernels with vectors of 1 and the tail of a pixel tile are for tensors of any alignment.",
    ]
    for name in sorted({k.name for k in found}):
        lines += [
            "",
            f"## {name}",
            "",
            "| mode | variant | dtype | registers | blocks | stack | spills | instructions | loads | stores |",
        ]
        lines += ["| --- | --- | --- | --: | --: | --: | --: | --: | --- | --- |"]
        for k in found:
            if k.name == name:
                lines.append(
                    f"| {k.mode} | {k.variant} | {k.dtype} | {k.registers} | {k.blocks} | {k.stack} | {k.spill_stores + k.spill_loads} "
                    f"| {k.instructions} | {widest(k.loads)} | {widest(k.stores)} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=cuda_build.ROOT / "docs" / "cuda_kernels.md")
    options = parser.parse_args()
    work = cuda_build.ROOT / "build" / "cuda_report"
    try:
        cuda_build.build(work / "report.so", ARCHITECTURE, work)
    except RuntimeError as error:
        raise SystemExit(f"the kernels cannot be compiled: {error}") from None
    recipe = cuda_build.recipe()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(render(kernels(work), recipe.nvcc_version(recipe.find_nvcc())))
    print(f"wrote {options.output}")
    if importlib.util.find_spec("triton") is not None:
        import triton_report

        triton_report.main(options.output.with_name("triton_kernels.md"))


if __name__ == "__main__":
    main()
