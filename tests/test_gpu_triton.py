"""The Triton kernels on a CUDA device: numbers, and agreement with the CUDA library (`make gpu`).

Fewer combinations than test_gpu.py: Triton compiles each for a second.
"""

import pytest
import torch
from cases import check_numbers, make_case, run

import ppcr_ext
from ppcr_ext import _native
from ppcr_ext._triton import operators
from ppcr_ext.testing import DTYPES, LAYOUTS, OPERATORS, relative, tolerance

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

RESNET = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))


def test_triton_is_there():
    assert operators.why_not(torch.device("cuda")) is None
    assert "triton" in ppcr_ext.available_backends()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [(1, 2, 4), (1, 3, 7)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_numbers(name, levels, dtype, layout):
    check_numbers(make_case(name, (3, 20, 5, 5), levels, dtype, layout, device="cuda"), "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("channels", "side"), RESNET)
def test_shapes_of_resnet50(channels, side, dtype, layout):
    case = make_case("ppcr", (2, channels, side, side), (1, 2, 4), dtype, layout, device="cuda")
    results = check_numbers(case, "triton")
    if _native.why_not(torch.device("cuda")) is None:
        allowed = tolerance(dtype)
        y, dx, *_ = case.run("native")
        assert relative(results[0], y.double()) <= 2 * allowed.y
        assert relative(results[1], dx.double()) <= 2 * allowed.dx


def test_same_bits_every_time():
    case = make_case("ppcr_add_relu", (16, 64, 56, 56), (1, 2, 4), torch.float16, device="cuda")
    assert all(
        torch.equal(a, b) for a, b in zip(case.run("triton"), case.run("triton"), strict=True)
    )


def test_compile_with_inductor():
    torch.compiler.reset()
    case = make_case(
        "ppcr_add_relu", (4, 64, 14, 14), (1, 2, 4), torch.float32, "channels_last", device="cuda"
    )
    compiled = torch.compile(
        lambda x, r, w, b: run("ppcr_add_relu", x, r, w, b, backend="triton"), fullgraph=True
    )
    expected = case.run("triton")
    y = compiled(case.x, case.residual, case.weight, case.bias)
    got = (y, *torch.autograd.grad(y, case.inputs, case.grad))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 64, 4096, 4100), (1, 8, 16400, 16400)], ids=str)
def test_more_than_2_to_the_31_elements(shape, layout):
    """From image to image, and within one image, where a tile spans more than 32 bits."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of free device memory")
    weight, bias = torch.randn(7, device="cuda"), torch.zeros(1, device="cuda")
    x = torch.empty(shape, dtype=torch.float16, device="cuda")
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    x.normal_()
    assert x.numel() > 2**31
    corner = x[-1:, :, -1:].float()
    y = ppcr_ext.ppcr(x, weight, bias, backend="triton")
    expected = ppcr_ext.ppcr(corner, weight, bias, backend="reference")
    torch.testing.assert_close(y[-1:, :, -1:].float(), expected, rtol=2e-3, atol=2e-3)
