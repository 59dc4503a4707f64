"""On a CUDA device: numbers against a float64 evaluation on the CPU, and what PyTorch expects of an
operator there (`make gpu`)."""

import pytest
import torch
from cases import check_numbers, make_case

import ppcr_ext
from ppcr_ext import _native
from ppcr_ext.testing import DTYPES, LAYOUTS, OPERATORS

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

RESNET = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
SHAPES = [
    *((2, channels, side, side) for channels, side in RESNET),
    (3, 20, 5, 5),
    (2, 16, 7),
    (5, 64),
    (2, 8, 3, 4, 5),
    (1, 12, 1, 1),
]
LEVELS = [(1, 2, 4), (1, 3, 7)]


both_backends = pytest.mark.parametrize("backend", ["native", "triton"])


def test_native_kernels_are_there():
    assert _native.why_not(torch.device("cuda")) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(shape, name, levels, dtype, layout):
    check_numbers(make_case(name, shape, levels, dtype, layout, device="cuda"), "native")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck(name, layout):
    case = make_case(name, (2, 8, 3, 3), (1, 2, 4), torch.float64, layout, device="cuda")

    def function(x, weight, bias, residual):
        arguments = (x, residual) if name == "ppcr_add_relu" else (x,)
        return getattr(ppcr_ext, name)(*arguments, weight, bias, backend="native")

    inputs = [t.detach().requires_grad_() for t in (case.x, case.weight, case.bias, case.residual)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_every_time(name):
    case = make_case(name, (16, 64, 56, 56), (1, 2, 4), torch.float16, device="cuda")
    first, second = case.run("native"), case.run("native")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_odd_addresses():
    """A slice that starts one element into its storage."""
    storage = torch.randn(2 * 32 * 64 + 1, device="cuda")
    weight, bias = torch.randn(7, device="cuda"), torch.zeros(1, device="cuda")
    x = storage[1:].view(2, 32, 8, 8)
    torch.testing.assert_close(
        ppcr_ext.ppcr(x, weight, bias), ppcr_ext.ppcr(x.clone(), weight, bias)
    )


@both_backends
def test_side_stream(backend):
    """The kernels run on torch's current stream: they see what was enqueued there before."""
    stream = torch.cuda.Stream()
    x = torch.zeros(64, 64, 56, 56, device="cuda")
    weight, bias = torch.zeros(7, device="cuda"), torch.zeros(1, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.fill_(2.0)
        y = ppcr_ext.ppcr(x, weight, bias, backend=backend)
    stream.synchronize()
    assert torch.equal(y, torch.ones_like(y))


@both_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_capture_and_replay(layout, backend):
    case = make_case("ppcr", (4, 64, 14, 14), (1, 2, 4), torch.float32, layout, device="cuda")
    x, weight, bias, grad = case.x, case.weight, case.bias, case.grad
    name = {"native": "ppcr", "triton": "triton_ppcr"}[backend]
    run_forward, run_backward = (
        getattr(torch.ops.ppcr_ext, name),
        getattr(torch.ops.ppcr_ext, f"{name}_backward"),
    )
    arguments = (weight, bias, [1, 2, 4], 1e-5)
    warmup = (
        torch.cuda.Stream()
    )  # Triton's kernels are compiled at their first call, which a capture would not allow
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        run_forward(x, *arguments)
        run_backward(grad, x, *arguments)
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_forward(x, *arguments)
        gradients = run_backward(grad, x, *arguments)
    x.copy_(torch.randn_like(x))
    grad.copy_(torch.randn_like(grad))
    graph.replay()
    assert torch.equal(y, run_forward(x, *arguments))
    for captured, expected in zip(gradients, run_backward(grad, x, *arguments), strict=True):
        assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@both_backends
def test_second_device(backend):
    """The current device stays what it was, and the result is where x is."""
    x = torch.randn(2, 64, 14, 14)
    weight, bias = torch.randn(7), torch.randn(1)
    y = ppcr_ext.ppcr(x.to("cuda:1"), weight.to("cuda:1"), bias.to("cuda:1"), backend=backend)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y.cpu(), ppcr_ext.ppcr(x, weight, bias, backend="reference"))


def test_autocast():
    """float32 parameters beside half activations, as autocast leaves them."""
    layer = ppcr_ext.PPCR(64, backend="native").cuda()
    convolution = torch.nn.Conv2d(3, 64, 3).cuda()
    with torch.autocast("cuda", torch.float16):
        y = layer(convolution(torch.randn(2, 3, 16, 16, device="cuda")))
    assert y.dtype == torch.float16
    y.float().square().mean().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of free device memory")
    weight, bias = torch.randn(7, device="cuda"), torch.zeros(1, device="cuda")
    for last in (False, True):
        x = torch.empty(2, 64, 4096, 4100, dtype=torch.float16, device="cuda")
        x = x.to(memory_format=torch.channels_last) if last else x
        x.normal_()
        assert x.numel() > 2**31
        corner = x[-1:, :, -1:].float()
        y = ppcr_ext.ppcr(x, weight, bias, backend="native")
        torch.testing.assert_close(
            y[-1:, :, -1:].float(),
            ppcr_ext.ppcr(corner, weight, bias, backend="reference"),
            rtol=2e-3,
            atol=2e-3,
        )
        del x, y


def test_empty_tensors():
    weight = torch.randn(7, device="cuda", requires_grad=True)
    bias = torch.zeros(1, device="cuda", requires_grad=True)
    for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
        x = torch.empty(shape, device="cuda", requires_grad=True)
        y = ppcr_ext.ppcr(x, weight, bias, backend="native")
        assert y.shape == x.shape
        dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert dx.shape == x.shape
        assert not dweight.any()
        assert not dbias.any()
