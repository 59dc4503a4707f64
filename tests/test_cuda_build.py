"""The CUDA library, built by nvcc for one architecture. Nothing runs on a GPU here.

It loads beside a PyTorch without a GPU, registers its operators, and its machine code is what the
kernels were written for.
"""

import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

cuda_report = pytest.importorskip("cuda_report", reason="tools/ is part of a checkout")
from cuda_on_cpu.cases import KERNEL_COUNT

from ppcr_ext._build import cuda as recipe

pytestmark = pytest.mark.full
needs_nvcc = pytest.mark.skipif(
    recipe.why_not(torch.version.cuda) is not None, reason=str(recipe.why_not(torch.version.cuda))
)

WORK = cuda_report.WORK
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}  # bytes


@pytest.fixture(scope="module")
def library() -> Path:
    started = time.monotonic()
    path = cuda_report.build()
    took, size = time.monotonic() - started, path.stat().st_size / 2**20
    print(f"\nbuilt {path.name} for sm_90 in {took:.0f} s, {size:.1f} MB")
    return path


@pytest.fixture(scope="module")
def kernels(library) -> list[cuda_report.Kernel]:
    if cuda_report.find_cuobjdump() is None:
        pytest.skip("cuobjdump was not found (it comes with triton)")
    return cuda_report.kernels(WORK)


LOAD = """
import ctypes, sys, torch
schemas = torch.library.Library("ppcr_ext", "FRAGMENT")
parameters = "Tensor weight, Tensor? bias, int[] levels, float eps"
one, three, four = "Tensor", "(Tensor, Tensor, Tensor)", "(Tensor, Tensor, Tensor, Tensor)"
operators = {
    "ppcr": ("Tensor x", one), "ppcr_backward": ("Tensor grad, Tensor x", three),
    "ppcr_gate": ("Tensor x", one), "ppcr_gate_backward": ("Tensor grad, Tensor x", three),
    "ppcr_add_relu": ("Tensor x, Tensor residual", one),
    "ppcr_add_relu_backward": ("Tensor grad, Tensor x, Tensor y", four),
}
for name, (tensors, result) in operators.items():
    schemas.define(f"{name}({tensors}, {parameters}) -> {result}")
torch.ops.load_library(sys.argv[1])
for name in operators:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ppcr_ext::{name}", "CUDA"), name
query = ctypes.CDLL(sys.argv[1]).ppcr_cuda_architectures
query.restype = ctypes.c_char_p
print(query().decode())
"""


@needs_nvcc
def test_loads_and_registers(library):
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "sm_90"


@needs_nvcc
def test_kernel_count(kernels):
    """Those that tests/test_cuda_on_cpu.py executes."""
    assert len(kernels) == KERNEL_COUNT


def variant_of(plan: dict) -> str:
    """As cuda_report names the kernel of a plan."""
    if plan["method"] == "channels_last_gate":
        return f"vectors of {plan['vector']}, {plan['variant']} lanes"
    tile = (ROOT / "csrc" / "cuda" / "tile.h").read_text()
    table = re.search(r"kLaneVariants\[\] = \{(.*?)\};", tile, re.DOTALL)
    assert table is not None
    lanes, _, pixels = re.findall(r"\{(\d+), (\d+), (\d+)\}", table[1])[plan["variant"]]
    layout = cuda_report.VARIANTS[plan["method"]]
    return layout.format(None, plan["vector"], plan["steps"], pixels, lanes).replace(
        f"staged {pixels}", "staged true"
    )


@pytest.fixture(scope="module")
def planned(kernels) -> list[tuple[cuda_report.Kernel, list[dict]]]:
    """The kernels that run ResNet's stages, with all their plans and the limits of the device."""
    pytest.importorskip("pybind11")
    import cuda_estimates

    cells: dict[tuple, list[dict]] = {}
    for row in cuda_estimates.rows():
        plan, dtype = row["plan"], row["dtype"]
        key = (f"{plan['method']}_{row['direction']}", dtype, row["operation"], variant_of(plan))
        cells.setdefault(key, []).append(plan | {"device": cuda_estimates.DEVICES[row["device"]]})
    by_key = {(k.name, k.dtype, k.operation, k.variant): k for k in kernels if k.standard}
    return [(by_key[key], plans) for key, plans in cells.items()]


def first_load(k: cuda_report.Kernel) -> int:
    return next(i for i, op in enumerate(k.code) if op.startswith("LDG"))


@needs_nvcc
def test_no_spills(kernels):
    spilling = [k for k in kernels if k.standard and k.dtype != "float64" and k.spills]
    assert not spilling, spilling


@needs_nvcc
def test_accesses_of_16_bytes(kernels):
    """Kernels with 16-byte vectors move whole tensors in 16-byte instructions.

    Narrower ones are for parameters, partial sums and the end of a tile.
    """
    for k in kernels:
        if k.variant == "staged 1" or k.variant == "staged true":
            assert k.loads[16] > 0, k
            gate = k.name == "channels_last_shared_forward" and k.operation == "gate"
            assert k.stores[16] > 0 or gate, k
        if k.operation == "gate" or f"vectors of {16 // SIZES[k.dtype]}," not in k.variant:
            continue
        assert min(k.loads[16], k.stores[16]) > 0, k
        partials = 1 if k.name.endswith("backward") else 0
        assert k.stores.total() - k.stores[16] <= partials, k
        # Weight and bias, of two types, in a loop that may be unrolled.
        assert k.loads.total() - k.loads[16] <= 12, k


@needs_nvcc
def test_planned_kernels(planned):
    """What stands before the first load, and in which order stores come."""
    assert {k.dtype for k, _ in planned} == set(SIZES)
    assert {k.operation for k, _ in planned} == set(cuda_report.OPERATIONS)
    for k, _ in planned:
        first = first_load(k)
        divisions = [op for op in k.code[:first] if op.startswith(("I2F", "F2I", "MUFU.RCP"))]
        assert not divisions, k
        # With sixteen vectors of each tensor, zeroing their registers takes 32 to 64 instructions.
        assert first <= (100 if "16 steps" in k.variant else 92), k
        assert sum(op.startswith("MEMBAR") for op in k.code) <= 1, k
        if k.name.startswith("contiguous") and k.dtype != "float64":
            assert any(op.startswith("STS.128") for op in k.code), k
        if k.name.endswith("backward"):
            wide, narrow = ([], [])
            for i, op in enumerate(k.code):
                if op.startswith("STG"):
                    (wide if ".128" in op.split()[0] else narrow).append(i)
            assert wide, k
            # A shared tile may end in elements that are stored one by one.
            assert wide[0] < narrow[-1 if "shared" in k.name else 0], k


@needs_nvcc
def test_memory_is_read_after_the_wait(kernels):
    """A kernel that is let in early touches no memory before those before it are done (ACQBULK)."""
    memory = re.compile(r"(LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP)\b")
    for k in kernels:
        waits = [i for i, op in enumerate(k.code) if op.startswith("ACQBULK")]
        assert len(waits) == 1, k
        assert not [op for op in k.code[: waits[0]] if memory.match(op)], k


def loads_before_use(code: list[str]) -> int:
    """How many 16-byte loads are issued before an instruction reads what one of them loaded."""
    loaded: set[str] = set()
    count = 0
    for instruction in code:
        opcode, _, operands = instruction.partition(" ")
        registers = re.findall(r"\bR\d+", operands)
        if re.match(r"LDG\b.*\.128\b", opcode):
            loaded.add(registers[0])
            count += 1
        elif loaded & set(registers):
            break
    return count


def loads_in_flight(k: cuda_report.Kernel) -> int:
    """16-byte loads that a thread issues before it waits for one, into registers or beyond."""
    waits = [i for i, op in enumerate(k.code) if op.startswith("DEPBAR")]
    if waits:
        return cuda_report.widths(k.code[: waits[0]], *cuda_report.LOADS)[16]
    return loads_before_use(k.code)


@needs_nvcc
def test_loads_in_flight(planned):
    """All tensors that a thread reads before the gate are under way before the first use."""
    for k, plans in planned:
        steps, found = plans[0]["steps"], loads_in_flight(k)
        backward, added = k.name.endswith("backward"), k.operation == "add_relu"
        if k.name.startswith("channels_last_registers"):
            wanted = steps * tile_pixels(k) * (1 + backward + (backward and added))
            # Of backward's three streams in 128 registers the last vectors may come later.
            assert found >= wanted - (2 if backward and added else 0), k
        elif k.name.startswith("contiguous"):
            assert found == steps * (1 if k.operation == "gate" else 1 + added + backward), k
        # The latency of an H200 times its bandwidth asks for 29 KB on each multiprocessor.
        for plan in plans:
            device, threads = plan["device"], plan["threads"]
            by_memory = (device["shared_bytes"] + 1024) // (plan["shared_bytes"] + 1024)
            of_grid = -(-plan["blocks"] // device["multiprocessors"])
            resident = min(k.resident(threads), by_memory, of_grid)
            assert found * 16 * threads * resident >= 64 << 10, (k.name, plan)


@needs_nvcc
def test_second_block(planned):
    """Of channels_last a multiprocessor holds two blocks: one loads while the other stores."""
    for k, plans in planned:
        if k.name.startswith("channels_last"):
            assert all(k.resident(plan["threads"]) >= 2 for plan in plans), k


def tile_pixels(k: cuda_report.Kernel) -> int:
    found = re.search(r"(\d+) pixels", k.variant)
    assert found is not None, k
    return int(found[1])


@needs_nvcc
def test_contiguous_tensors_are_copied_ahead(kernels):
    """All vectors of a tile are under way before the first is used, behind nothing slow."""
    checked = 0
    for k in kernels:
        found = re.fullmatch(r"vectors of (\d+), (\d+) steps", k.variant)
        if k.operation == "gate" or found is None:
            continue
        vector, steps = map(int, found.groups())
        copies = [op for op in k.code if op.startswith("LDGSTS")]
        if vector * SIZES[k.dtype] != 16:
            assert not copies, k
            continue
        streams = 1 + (k.operation == "add_relu" or (k.name.endswith("backward") and steps <= 8))
        # Of the first tile, and of the next one in the loop.
        assert len(copies) == 2 * streams * steps, k
        assert all(".128" in op for op in copies), k
        assert first_load(k) <= (92 if k.standard else 110), k
        assert not any(op.startswith("MEMBAR") for op in k.code), k
        checked += 1
    assert checked == 44


@needs_nvcc
def test_report(kernels, tmp_path):
    """The table that ``make cuda-report`` writes: a line per kernel, with what was counted."""
    output = tmp_path / "folder" / "kernels.csv"
    cuda_report.write_table(output, (k.row() for k in kernels))
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == KERNEL_COUNT
    assert (
        len(
            {
                (row["name"], row["dtype"], row["operation"], row["variant"], row["standard"])
                for row in rows
            }
        )
        == KERNEL_COUNT
    )
    for row in rows:
        if row["name"] != "finish_parameters":
            assert row["operation"] in cuda_report.OPERATIONS
            assert row["variant"]
        assert 1 <= int(row["blocks"]) <= 8
        assert int(row["registers"]) <= 255
        assert int(row["instructions"]) > 100
        assert re.fullmatch(r"\d+ x \d+ B(, \d+ x \d+ B)*", row["loads"]), row


# ---- sentences that say why a build is not possible; no nvcc needed ---------------------------


def fake_nvcc(folder: Path, release: str, architectures: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    listed = "\n".join(f"compute_{number}" for number in architectures.split())
    nvcc.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; '
        f'then echo "Cuda compilation tools, release {release}, V{release}.88"; '
        f'else echo "{listed}"; fi\n'
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def nvcc_12(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return fake_nvcc(tmp_path, "12.6", "75 80 86 89 90")


def test_pytorch_without_cuda():
    assert "this PyTorch was built without CUDA" in recipe.why_not(None)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_missing_nvcc(variable, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert recipe.why_not("13.0") == (
        f"nvcc was not found in {variable}; "
        "install the CUDA 13 toolkit, or set CUDA_HOME to its folder"
    )


def test_majors_disagree(nvcc_12):
    reason = recipe.why_not("13.0")
    assert "is of CUDA 12.6, but PyTorch was built with CUDA 13.0" in reason
    assert "install the CUDA 13 toolkit and set CUDA_HOME, or a PyTorch for CUDA 12" in reason
    assert recipe.why_not("12.8") is None


def test_architectures(nvcc_12, monkeypatch):
    monkeypatch.setattr(recipe, "visible_architectures", lambda: None)
    assert recipe.architectures(nvcc_12) == "sm_80 sm_90 compute_90"  # each takes long
    assert recipe.architectures(nvcc_12, "9.0") == "sm_90"
    assert recipe.architectures(nvcc_12, "8.0 9.0+PTX") == "sm_80 sm_90 compute_90"
    both = "sm_80 sm_86 sm_90 compute_86 compute_90"  # of each list its own PTX
    assert recipe.architectures(nvcc_12, "Ampere;Hopper") == both
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert (
        "TORCH_CUDA_ARCH_LIST holds 10.0, which nvcc 12.6 does not know; it knows 7.5, 8.0"
        in recipe.why_not("12.6")
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    assert "the kernels need 7.5 (Turing) or newer" in recipe.why_not("12.6")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "fast")
    assert (
        "TORCH_CUDA_ARCH_LIST holds 'fast'; it takes numbers such as 8.0;9.0+PTX"
        in recipe.why_not("12.6")
    )


def test_architectures_of_what_is_there(nvcc_12, monkeypatch):
    """Without a word of the user, the visible devices'; none of them newer than the compiler."""
    devices = [(8, 6), (9, 0), (8, 6)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    assert recipe.architectures(nvcc_12) == "sm_86 sm_90"
    assert recipe.architectures(nvcc_12, "8.0") == "sm_80"
    devices.append((12, 0))
    reason = recipe.why_not("12.6")
    assert reason.startswith("PyTorch sees a device of compute capability 12.0, which nvcc 12.6 ")
    assert "does not know; it knows 7.5, 8.0" in reason
    assert reason.endswith("name one in TORCH_CUDA_ARCH_LIST, as in 9.0+PTX")


def test_what_is_compiled_is_said_first(nvcc_12, tmp_path, monkeypatch):
    """With how to get more; this nvcc compiles nothing."""
    monkeypatch.setattr(recipe, "visible_architectures", lambda: None)
    nvcc_12.write_text(nvcc_12.read_text() + 'case "$*" in *" -c "*) exit 1;; esac\n')
    said: list[str] = []
    output, work, of_torch = tmp_path / "x.so", tmp_path / "work", Path(torch.__file__).parent
    with pytest.raises(recipe.CannotBuild, match="failed"):
        recipe.build(output, ROOT / "csrc", work, of_torch, "12.6", say=said.append)
    assert said[0] == "ppcr_ext: compiling the CUDA kernels for sm_80 sm_90 compute_90"
    assert said[1].endswith(" set TORCH_CUDA_ARCH_LIST='8.0;8.6;8.9;9.0;10.0;12.0+PTX'")


@pytest.mark.parametrize(
    ("capability", "compiled", "usable"),
    [
        ((9, 0), "sm_80 sm_90", True),
        ((8, 9), "sm_80", True),  # machine code runs on later devices of its major version
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80 compute_80", True),  # PTX runs on every later device
        ((10, 0), "sm_90", False),
        ((10, 0), "sm_90a compute_90a", False),  # a: for this one architecture
        ((7, 5), "sm_80 compute_80", False),
        ((10, 3), "sm_100f compute_100f", True),  # f: for later ones of this family alone
        ((12, 0), "sm_100f compute_100f", False),
        ((10, 0), "sm_103f compute_103f", False),
    ],
)
def test_usable_architectures(capability, compiled, usable):
    reason = recipe.why_not_usable(capability, compiled)
    assert (reason is None) == usable
    if reason:
        assert f"rebuild it with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}" in reason
