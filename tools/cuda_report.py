"""What nvcc made of the kernels: registers, spills, occupancy and access widths, as a CSV table.

``python tools/cuda_report.py`` compiles for sm_90 (what is unchanged is not compiled again) and
writes results/cuda_kernels.csv. It needs nvcc and cuobjdump (of the CUDA toolkit or of Triton's
package), but no GPU. tests/test_cuda_build.py checks what the table must show.
"""

import collections
import csv
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ppcr_ext._build import cuda as recipe

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "9.0"
WORK = ROOT / "build" / "cuda_report"
LOADS = ("LDG", "LDGSTS")  # from global memory, into registers or beyond
OPERATIONS = ("ppcr", "gate", "add_relu")  # in the order of enum Operation
DTYPES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16", "double": "float64"}
VARIANTS = {
    "contiguous_pipelined": "vectors of {1}, {2} steps",
    "channels_last_registers": "vectors of {1}, {2} steps, {3} pixels, {4} lanes",
    "channels_last_gate": "vectors of {1}, {2} lanes",
    "channels_last_shared": "staged {3}",
}


# ---- machine code, also of Triton's kernels ---------------------------------------------------


def find_cuobjdump() -> str | None:
    """cuobjdump of Triton's package, else on PATH."""
    triton = importlib.util.find_spec("triton")
    folders = [os.environ["PATH"]]
    if triton is not None and triton.origin is not None:
        folders.insert(0, str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def cuobjdump(option: str, file: str | Path) -> str:
    program = find_cuobjdump()
    if program is None:
        raise SystemExit("cuobjdump was not found: install triton, or put the CUDA toolkit on PATH")
    command = [program, option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code_of(file: str | Path) -> dict[str, list[str]]:
    """By mangled name of every kernel in an object: its instructions in order, such as
    ``LDG.E.128 R4, desc[UR6][R2.64]``, without what they are predicated on."""
    functions = re.split(r"\n\s*Function : ", cuobjdump("--dump-sass", file))[1:]
    code = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*?)\s*;")
    return {function.split("\n", 1)[0].strip(): code.findall(function) for function in functions}


def widths(code: list[str], *names: str) -> collections.Counter[int]:
    """How many instructions of these names move so many bytes, such as 16 in LDG.E.128.CONSTANT."""
    accesses = [op for op in (op.split()[0] for op in code) if op.split(".")[0] in names]
    bits = [re.search(r"\.[US]?(8|16|64|128)\b", op) for op in accesses]
    return collections.Counter(int(found[1]) // 8 if found else 4 for found in bits)


def as_text(accesses: collections.Counter[int]) -> str:
    return ", ".join(f"{accesses[w]} x {w} B" for w in sorted(accesses, reverse=True))


def write_table(output: Path, rows: Iterable[Mapping[str, object]]) -> None:
    rows = list(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(f"wrote {output}: {len(rows)} kernels")


# ---- the compiled CUDA kernels ----------------------------------------------------------------


@dataclasses.dataclass
class Kernel:
    name: str  # contiguous_pipelined_forward
    dtype: str
    operation: str
    variant: str
    standard: bool  # levels (1, 2, 4) over four equal segments
    registers: int
    stack: int  # bytes of local memory per thread
    spills: int  # bytes of spill stores and loads
    code: list[str]  # instructions, in order

    @property
    def loads(self) -> collections.Counter[int]:
        return widths(self.code, *LOADS)

    @property
    def stores(self) -> collections.Counter[int]:
        return widths(self.code, "STG")

    def resident(self, threads: int) -> int:
        """How many blocks the 65536 registers of a multiprocessor hold; warps get 256 at a time."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(65536 // (per_warp * (threads // 32)), 2048 // threads)

    def row(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        code = fields.pop("code")
        threads = 512 if self.name == "finish_parameters" else 256
        counts = {"blocks": self.resident(threads), "instructions": len(code)}
        return fields | counts | {"loads": as_text(self.loads), "stores": as_text(self.stores)}


def parse_name(demangled: str) -> tuple[str, str, str, str, bool]:
    """name, dtype, operation, variant, standard"""
    found = re.match(r"(?:void )?(?:ppcr::cuda::)?(\w+)<(.*?)>\(", demangled)
    assert found is not None, demangled
    name, arguments = found[1], re.split(r",\s*(?![^<]*>)", found[2])
    plain = [re.sub(r"^\((?:int|bool)\)", "", argument) for argument in arguments]
    variant = VARIANTS.get(name.rpartition("_")[0], "").format(*plain)
    operation = re.search(r"\(ppcr::Operation\)(\d)", demangled)
    of = OPERATIONS[int(operation[1])] if operation else ""
    return name, DTYPES[plain[0]], of, variant, "AnyBins" not in demangled


def kernels(work: Path = WORK) -> list[Kernel]:
    """Of the objects in ``work``, which a build for one architecture left there."""
    resources = re.compile(  # of -Xptxas -v
        r"Compiling entry function '(\S+)' for '\S+'\n.*\n\s*(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\nptxas info\s+: Used (\d+) registers"
    )
    result = []
    for source in recipe.KERNEL_SOURCES:
        code = code_of(work / f"{source}.o")
        found = resources.findall((work / f"{source}.log").read_text())
        for name, *numbers in found:
            stack, spill_stores, spill_loads, registers = map(int, numbers)
            usage = (registers, stack, spill_stores + spill_loads, code[name])
            result.append(Kernel(*parse_name(torch._C._demangle(name)), *usage))
    return sorted(result, key=lambda k: (k.name, k.operation, k.standard, k.variant, k.dtype))


def build() -> Path:
    """The CUDA library, and in ``WORK`` its objects; raises CannotBuild with the reason."""
    library, of_torch = WORK / "report.so", Path(torch.__file__).parent
    recipe.build(library, ROOT / "csrc", WORK, of_torch, torch.version.cuda, ARCHITECTURE)
    return library


def main() -> None:
    try:
        build()
    except recipe.CannotBuild as error:
        raise SystemExit(f"the kernels cannot be compiled: {error}") from None
    output = ROOT / "results" / "cuda_kernels.csv"
    write_table(output, (kernel.row() for kernel in kernels()))


if __name__ == "__main__":
    main()
