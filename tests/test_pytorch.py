"""At home in PyTorch: opcheck, torch.compile, export, autocast, checkpointing, the module's life."""

import copy
import io
import pickle

import pytest
import torch
from conftest import LAYOUTS, OPERATORS, make_case, run, to_layout
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import ppcr_ext
from ppcr_ext import PPCR, native


def operator_samples(name, layout, dtype=torch.float32, bias=True):
    """Arguments of the operator and of its backward."""
    case = make_case(name, (2, 8, 3, 5), (1, 2, 4), dtype, layout, bias=bias)
    parameters = (case.weight, case.bias, [1, 2, 4], 1e-5)
    forward = (case.x, case.residual, *parameters) if name == "ppcr_add_relu" else (case.x, *parameters)
    backward = (case.grad, case.x, case.residual, *parameters) if name == "ppcr_add_relu" else (case.grad, case.x, *parameters)
    return forward, backward


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, layout, dtype, bias):
    forward, backward = operator_samples(name, layout, dtype, bias)
    operators = torch.ops.ppcr_ext
    with_grad = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in forward]
    opcheck(getattr(operators, name).default, with_grad)
    opcheck(getattr(operators, name).default, forward)
    opcheck(getattr(operators, name + "_backward").default, backward)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_of_strides_that_are_copied(name):
    forward, backward = operator_samples(name, "channel-major")
    x = torch.randn(2, 8, 5, 3).transpose(2, 3)
    opcheck(getattr(torch.ops.ppcr_ext, name).default, (x, *forward[1:]))
    opcheck(getattr(torch.ops.ppcr_ext, name + "_backward").default, (backward[0], x, *backward[2:]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_compile(name, dynamic):
    """One graph, forward and backward, the same bits and strides as eager."""
    torch.compiler.reset()

    def f(x, residual, weight, bias):
        return run(name, x, residual, weight, bias)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 8, 5, 3), (4, 8, 6, 7)):
        for layout in LAYOUTS:
            case = make_case(name, shape, (1, 2, 4), torch.float32, layout)
            for t in case.inputs:
                t.requires_grad_()
            expected = case.run(None)
            y = compiled(case.x, case.residual, case.weight, case.bias)
            got = (y, *torch.autograd.grad(y, case.inputs, case.grad))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert [t.stride() for t in got] == [t.stride() for t in expected]
            with torch.no_grad():
                assert torch.equal(compiled(case.x, case.residual, case.weight, case.bias), expected[0])


@pytest.mark.full
def test_compile_with_inductor_does_not_recompile():
    torch.compiler.reset()
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), PPCR(8), torch.nn.ReLU())
    compiled = torch.compile(network, fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    compiled(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            y = compiled(torch.randn(2, 3, 8, 8))
            y.sum().backward()
    torch.testing.assert_close(compiled(x), network(x))


def test_what_runs_on_the_devices_is_asked_outside_the_graph(monkeypatch):
    """The answer comes from the driver and the library, which the compiler cannot trace."""
    monkeypatch.setattr(native, "_why_no_device", native.cpu_capability)  # asks a library, too
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return x + 1 if native.why_no_device() is None else x - 1

    assert f(torch.zeros(1)).item() == -1


def test_export():
    module = PPCR(8, init_gate=0.9)
    x = torch.randn(2, 8, 4, 6)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n"), 3: torch.export.Dim("w")}})
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    other = torch.randn(3, 8, 4, 9)
    assert torch.equal(loaded(other), module(other))
    assert any("ppcr_ext" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The convolution hands on the half type; the layer keeps it, and its parameters and their gradients stay float32."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), PPCR(8))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype):
        y = network(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert network[1].weight.grad.dtype == torch.float32
    assert network[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_module_to_dtype(dtype):
    module = PPCR(8).to(dtype)
    y = module(torch.randn(2, 8, 3, dtype=dtype))
    y.sum().backward()
    assert (y.dtype, module.weight.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    case = make_case("ppcr", (2, 8, 5, 5), (1, 2, 4), torch.float64)
    expected = case.run(None)
    y = checkpoint(
        lambda x, r, w, b: run("ppcr", x, r, w, b),
        *(case.x, case.residual, case.weight, case.bias),
        use_reentrant=use_reentrant,
    )
    got = torch.autograd.grad(y, case.inputs, case.grad) if not use_reentrant else y.backward(case.grad)
    got = got or (case.x.grad, case.weight.grad, case.bias.grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))


class TestModule:
    def test_starts_with_equal_gates_and_a_gradient(self):
        for init_gate in (0.5, 0.9):
            module = PPCR(8, init_gate=init_gate)
            x = torch.randn(2, 8, 3, 3)
            torch.testing.assert_close(module.gate(x), torch.full((2, 1, 3, 3), init_gate))
            module(x).square().sum().backward()
            assert module.weight.grad.abs().max() > 0

    def test_without_bias(self):
        module = PPCR(8, bias=False)
        assert list(module.state_dict()) == ["weight"]
        module(torch.randn(2, 8, 3)).sum().backward()
        assert module.weight.grad is not None

    def test_add_relu(self):
        module, x, r = PPCR(8), torch.randn(2, 8, 3), torch.randn(2, 8, 3)
        torch.testing.assert_close(module.add_relu(x, r), (module(x) + r).relu())

    @pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, through):
        module = PPCR(12, (1, 3), eps=1e-3, init_gate=0.7)
        x = torch.randn(2, 12, 4)
        other = through(module)
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)

    def test_state_dict(self):
        module, other = PPCR(8, init_gate=0.8), PPCR(8)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.bias, module.bias)
        assert set(module.state_dict()) == {"weight", "bias"}

    def test_sync_batch_norm_conversion_leaves_it_alone(self):
        network = torch.nn.Sequential(torch.nn.BatchNorm2d(8), PPCR(8))
        converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        assert isinstance(converted[1], PPCR)

    def test_factory_arguments(self):
        module = PPCR(8, device="meta", dtype=torch.float64)
        assert module.weight.device.type == "meta"
        assert module.weight.dtype == torch.float64
        assert "8, levels=(1, 2, 4)" in repr(PPCR(8))

    def test_meta_tensors_get_a_shape(self):
        assert PPCR(8, device="meta")(torch.empty(2, 8, 3, device="meta")).shape == (2, 8, 3)


def test_layouts_agree():
    case = make_case("ppcr", (2, 24, 5, 6), (1, 2, 4), torch.float64)
    a = run("ppcr", case.x, case.residual, case.weight, case.bias)
    b = run("ppcr", to_layout(case.x, "pixel-major"), case.residual, case.weight, case.bias)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_version():
    assert ppcr_ext.__version__.count(".") == 2
