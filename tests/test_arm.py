"""64-bit Arm: how the package is compiled there, and the machine code of the kernels.

``make arm`` runs the kernels under emulation.
"""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import Mutant

from ppcr_ext._build import cpu as recipe

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "tools").is_dir():
    pytest.skip("the tools are part of a checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

import sanitize

COMPILER, EMULATOR = sanitize.ARM_COMPILER, sanitize.EMULATOR
WHY_NOT = sanitize.why_not(COMPILER)
cross_compiled = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
SIMD = ROOT / "tests" / "cpu" / "simd.cpp"

# What the vector operations of tests/cpu/simd.cpp are compiled to.
INSTRUCTIONS = {
    "half_to_float": r"\bfcvtl\s+v\d+\.4s",
    "float_to_half": r"\bfcvtn\s+v\d+\.4h",
    "bfloat16_to_float": r"\bu(?:xtl|shll)\s+v\d+\.4s",
    "float_to_bfloat16": r"\bshrn\s+v\d+\.4h",
    "multiply_add_float": r"\bfmla\s+v\d+\.4s",
    "multiply_add_double": r"\bfmla\s+v\d+\.2d",
    "inv_sqrt_float": r"\bfsqrt\s+v\d+\.4s",
    "inv_sqrt_double": r"\bfsqrt\s+v\d+\.2d",
}
# What the compiler does not find by itself in portable code.
NEON_ONLY = {"half_to_float", "float_to_half", "bfloat16_to_float"}
# A lane on its way through a general register, or a call: of memcpy, or of sqrt.
LANE_BY_LANE = r"\bmov\s+v\d+\.[hs]\[\d\], w|\bbl\s"


def functions_of(path):
    """The machine code of every function of an object file or program, by name."""
    command = ["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    blocks = (block.partition(">:\n") for block in listing.split("\n\n"))
    return {head.partition(" <")[2]: code for head, _, code in blocks}


def slow_operations(path):
    """The operations of tests/cpu/simd.cpp that are not one vector instruction each."""
    code = functions_of(path)
    return {
        name
        for name, wanted in INSTRUCTIONS.items()
        if not re.search(wanted, code[name]) or re.search(LANE_BY_LANE, code[name])
    }


def compile_planted(tmp_path, *mutants):
    """tests/cpu/simd.cpp with faults in simd.h."""
    shutil.copytree(recipe.csrc(), tmp_path / "csrc")
    for mutant in mutants:
        mutant.plant(tmp_path / "csrc")
    flags = [*recipe.compiler_flags(), "-static", f"-I{tmp_path / 'csrc' / 'cpu'}"]
    subprocess.run([COMPILER, *flags, str(SIMD), "-o", str(tmp_path / "simd")], check=True)
    return tmp_path / "simd"


@cross_compiled
def test_vector_operations_are_single_instructions(tmp_path):
    assert slow_operations(compile_planted(tmp_path)) == set()


@cross_compiled
@pytest.mark.parametrize(
    ("text", "replacement", "slow"),
    [
        ("defined(__aarch64__) PPCR_INLINE", "defined(NEVER)\nPPCR_INLINE", NEON_ONLY),
        ("vmovl_u16(h)", "__builtin_convertvector(h, VU)", {"bfloat16_to_float"}),
        ("std::sqrt(v[i])", "(i ? v[i] : std::sqrt(v[i]))", {"inv_sqrt_float", "inv_sqrt_double"}),
    ],
)
def test_portable_code_is_noticed(tmp_path, text, replacement, slow):
    """Without NEON's own instruction the compiler takes lanes apart."""
    planted = Mutant("portable code", "cpu/simd.h", text, replacement)
    assert slow_operations(compile_planted(tmp_path, planted)) == slow


@cross_compiled
@pytest.mark.parametrize(
    ("text", "replacement", "said"),
    [
        ("vfmaq_f32(c, a, b)", "vfmaq_f32(a, c, b)", "a * b + c"),
        ("vcvt_f16_f32(v)", "vcvt_f16_f32(v * 1.0005f)", "float to half"),
        ("if (n & part) std", "if (n == part) std", "partial store"),
        ("&high, q + four, 2", "&high, q, 2", "partial load"),
        ("part * sizeof(T)", "(part + 1) * sizeof(T)", "Segmentation fault"),
    ],
)
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"no {EMULATOR}")
def test_planted_fault_is_noticed(tmp_path, text, replacement, said):
    planted = Mutant("fault", "cpu/simd.h", text, replacement)
    done = sanitize.run("arm-simd", compile_planted(tmp_path, planted))
    assert done.returncode != 0
    assert said in done.stdout


@pytest.mark.full
@cross_compiled
def test_kernels_use_vector_registers():
    """No product of x is left to scalar code, and no lane is moved by itself."""
    compiled = sanitize.compile_source("arm-kernels", "csrc/cpu/kernels_default.cpp")
    kernels = {
        found[1]: code
        for name, code in functions_of(compiled).items()
        if (found := re.search(r"ppcr::baseline::(run<.*>|GateStep<.*>)\(", name))
    }
    runs = {name: code for name, code in kernels.items() if name.startswith("run<")}
    assert len(runs) == 24
    for name, code in kernels.items():
        lanes = "2d" if "double" in name else "4s"
        packed = re.findall(rf"\b(?:fmul|fmla|fadd)\s+v\d+\.{lanes}", code)
        assert len(packed) > 20, name
        assert not re.search(r"\bmov\s+v\d+\.[hs]\[\d\], w|<sqrtf?>", code), name
        if name in runs:
            assert not re.search(r"\b(?:fmul|fmla|fn?m(?:add|sub))\s+[hsd]\d", code), name
            conversions = re.findall(r"\bfcvt(?:l|n)\s+v\d+\.4[hs]", code)
            assert (len(conversions) > 50) == ("Half" in name), name
            widened = re.findall(r"\bu(?:xtl|shll)\s+v\d+\.4s, v\d+\.4h", code)
            assert (len(widened) > 20) == ("BFloat16" in name), name
        else:
            assert re.search(rf"\bfsqrt\s+v\d+\.{lanes}", code), name


def test_flags_fit_any_processor(monkeypatch):
    """The baseline of the processor family: no flag names an instruction set."""
    here = recipe.compiler_flags()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert recipe.compiler_flags() == here
    assert not any(flag.startswith("-m") for flag in here)


def test_missing_tools_are_named(tmp_path):
    """With what to install."""
    command = [sys.executable, str(ROOT / "tools" / "sanitize.py"), "arm"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    words = f"no {COMPILER} and no {EMULATOR} on PATH: apt-get install g++-aarch64"
    assert words in done.stderr
