"""The SIMD sigmoid and the 16-bit conversions of every instruction set that this CPU runs, compiled
alone and called directly."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ppcr_ext import _native
from ppcr_ext._build import cpu as recipe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
CAPABILITIES = ["default", "avx2", "avx512"]
ULPS = 2.5  # of the float32 sigmoid, over all float32 values


@pytest.fixture(scope="module", params=CAPABILITIES)
def probe(request, tmp_path_factory):
    best = _native.cpu_capability() or "default"
    if CAPABILITIES.index(request.param) > CAPABILITIES.index(best):
        pytest.skip(f"this CPU runs {best} at the most")
    library = tmp_path_factory.mktemp("probe") / f"{request.param}.so"
    source = Path(__file__).parent / "cpu" / "sigmoid.cpp"
    width = {"default": 16, "avx2": 32, "avx512": 64}[request.param]
    flags = [
        "-std=c++17",
        "-O3",
        "-shared",
        "-fPIC",
        f"-DPPCR_SIMD_BYTES={width}",
        f"-I{recipe.csrc() / 'cpu'}",
    ]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.worst_float.restype = ctypes.c_double
    loaded.worst_float.argtypes = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64]
    loaded.sigmoid_double.restype = ctypes.c_double
    loaded.sigmoid_double.argtypes = [ctypes.c_double]
    loaded.sigmoid_float.restype = ctypes.c_float
    loaded.sigmoid_float.argtypes = [ctypes.c_float]
    loaded.pairs = width > 16  # whether narrow_pairs does anything
    loaded.widen_half.restype = ctypes.c_float
    loaded.widen_half.argtypes = [ctypes.c_uint16]
    return loaded


def test_float32_sample(probe):
    """Every 61st float32 of all 2^32: normal, subnormal, infinite, NaN, both signs."""
    assert probe.worst_float(0, 61, 2**32 // 61) <= ULPS


@pytest.mark.slow
def test_float32_all(probe):
    assert probe.worst_float(0, 1, 2**32) <= ULPS


def test_float32_ends(probe):
    assert probe.sigmoid_float(math.inf) == 1
    assert probe.sigmoid_float(-math.inf) == 0
    assert math.isnan(probe.sigmoid_float(math.nan))
    assert probe.sigmoid_float(0.0) == 0.5


def test_float64(probe):
    assert probe.sigmoid_double(math.inf) == 1
    assert probe.sigmoid_double(-math.inf) == 0
    assert math.isnan(probe.sigmoid_double(math.nan))
    for z in np.concatenate(
        [np.linspace(-700, 700, 20011), np.random.default_rng(0).normal(size=20000)]
    ):
        exact = float(1 / (1 + np.exp(np.longdouble(-z))))
        assert abs(probe.sigmoid_double(z) - exact) <= 4 * np.spacing(exact)


def test_half_to_float(probe):
    bits = np.arange(2**16, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    got = np.array([probe.widen_half(int(b)) for b in bits], dtype=np.float32)
    assert np.array_equal(got, expected, equal_nan=True)


def test_float_to_16_bits(probe):
    """Round to nearest even, ties, overflow, subnormals and NaN: as torch does."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    exponents = np.ldexp(1 + rng.random(2**18), rng.integers(-28, 18, 2**18)).astype(np.float32)
    steps = (
        np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    )  # finite, positive
    ties = np.concatenate([steps[:-1] + (steps[1:] - steps[:-1]) / 2, [np.float32(0)]]).astype(
        np.float32
    )
    values = np.concatenate([anything, exponents, -exponents, steps, ties, -ties])
    values = values[: len(values) // 32 * 32]
    half, bfloat16, pairs = (np.zeros(len(values), np.uint16) for _ in range(3))
    back = np.zeros_like(values)
    of, count = (lambda a: a.ctypes.data_as(ctypes.c_void_p)), ctypes.c_int64(len(values))
    probe.narrow_all(of(values), of(half), of(bfloat16), count)
    results = [(half, torch.float16), (bfloat16, torch.bfloat16)]
    if probe.pairs:
        probe.narrow_pairs(of(values), of(pairs), of(back), count)
        results.append((pairs, torch.bfloat16))
        widened = torch.from_numpy(pairs.view(np.int16)).view(torch.bfloat16).float()
        assert np.array_equal(back, widened.numpy(), equal_nan=True)
    for got, dtype in results:
        expected = torch.from_numpy(values).to(dtype)
        assert torch.equal(
            torch.from_numpy(got.view(np.int16)).view(dtype).isnan(), expected.isnan()
        )
        same = torch.from_numpy(got.view(np.int16)) == expected.view(torch.int16)
        assert bool((same | expected.isnan()).all())
