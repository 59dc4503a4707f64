"""At home in PyTorch: opcheck, torch.compile, export, autocast, checkpointing, the module's life."""

import copy
import io
import pickle

import pytest
import torch
from cases import DEVICES, make_case, run
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import ppcr_ext
from ppcr_ext import PPCR, _native
from ppcr_ext.testing import LAYOUTS, OPERATORS, to_layout


def operator_samples(name, layout, dtype=torch.float32, bias=True):
    """Arguments of the operator and of its backward."""
    case = make_case(name, (2, 8, 3, 5), (1, 2, 4), dtype, layout, bias=bias)
    parameters = (case.weight, case.bias, [1, 2, 4], 1e-5)
    forward = (
        (case.x, case.residual, *parameters) if name == "ppcr_add_relu" else (case.x, *parameters)
    )
    backward = (
        (case.grad, case.x, case.residual, *parameters)
        if name == "ppcr_add_relu"
        else (case.grad, case.x, *parameters)
    )
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
    forward, backward = operator_samples(name, "contiguous")
    x = torch.randn(2, 8, 5, 3).transpose(2, 3)
    opcheck(getattr(torch.ops.ppcr_ext, name).default, (x, *forward[1:]))
    opcheck(
        getattr(torch.ops.ppcr_ext, name + "_backward").default, (backward[0], x, *backward[2:])
    )


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
                assert torch.equal(
                    compiled(case.x, case.residual, case.weight, case.bias), expected[0]
                )


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
    # A question that asks a library, too.
    monkeypatch.setattr(_native, "_why_not_on", lambda index: _native.cpu_capability())
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return x + 1 if _native.why_not_on(0) is None else x - 1

    assert f(torch.zeros(1)).item() == -1


def test_export():
    module = PPCR(8, init_gate=0.9)
    x = torch.randn(2, 8, 4, 6)
    program = torch.export.export(
        module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n"), 3: torch.export.Dim("w")}}
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    other = torch.randn(3, 8, 4, 9)
    assert torch.equal(loaded(other), module(other))
    assert any("ppcr_ext" in str(node.target) for node in program.graph.nodes)


class Residual(torch.nn.Module):
    """A small residual network: convolution, fused block, linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = (
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.Conv2d(8, 8, 3, padding=1),
        )
        self.ppcr, self.head = PPCR(8), torch.nn.Linear(8, 4)
        torch.nn.init.normal_(self.ppcr.weight)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.ppcr(self.body(x), x).mean((2, 3)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestMixedPrecision:
    def test_autocast(self, dtype, device):
        """The convolution hands on the half type; the layer keeps it, and its parameters and their gradients stay float32."""
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), PPCR(8)).to(device)
        torch.nn.init.normal_(network[1].weight)
        x = torch.randn(2, 3, 8, 8, device=device)
        with torch.autocast(device, dtype):
            y = network(x)
            seen = network[0](x)
        assert (seen.dtype, y.dtype) == (dtype, dtype)
        y.float().square().sum().backward()
        # in float64 from what the layer saw; the gradient it was given is y's, rounded once more
        wide = PPCR(8, dtype=torch.float64, device=device)
        wide.load_state_dict(network[1].state_dict())
        expected = wide(seen.detach().double())
        torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        expected.square().sum().backward()
        for got, e in zip(network[1].parameters(), wide.parameters(), strict=True):
            assert got.grad.dtype == torch.float32
            torch.testing.assert_close(
                got.grad.double(),
                e.grad,
                rtol=0,
                atol=8 * torch.finfo(dtype).eps * float(e.grad.abs().max()),
            )

    def test_autocast_casts_the_residual(self, dtype, device):
        x, residual = (
            torch.randn(2, 8, 4, device=device, dtype=dtype),
            torch.randn(2, 8, 4, device=device, requires_grad=True),
        )
        layer = PPCR(8, device=device)
        with torch.autocast(device, dtype):
            y = layer.add_relu(x, residual)
        assert torch.equal(y, layer.add_relu(x, residual.to(dtype)))
        y.float().sum().backward()
        assert residual.grad.dtype == torch.float32
        assert torch.equal(residual.grad, (y > 0).float())

    def test_training_with_a_gradient_scaler(self, dtype, device):
        """Three steps; a step whose loss is infinite is skipped and lowers the scale."""
        torch.manual_seed(0)
        network = Residual().to(device)
        optimizer, scaler = (
            torch.optim.SGD(network.parameters(), lr=0.1),
            torch.amp.GradScaler(device, init_scale=1024.0),
        )
        x, target = torch.randn(16, 3, 8, 8, device=device), torch.arange(16, device=device) % 4
        losses, weights = [], []
        for factor in (1, 1, float("inf"), 1):
            with torch.autocast(device, dtype):
                loss = torch.nn.functional.cross_entropy(network(x), target)
            optimizer.zero_grad()
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            weights.append(network.ppcr.weight.detach().clone())
        assert losses[1] < losses[0]
        assert torch.equal(weights[2], weights[1])
        assert not torch.equal(weights[3], weights[2])
        assert scaler.get_scale() == 512
        assert network.ppcr.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)],
)
def test_network_to_dtype(convert, dtype):
    torch.manual_seed(0)
    network, x = Residual(), torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(network).double()(x.double()).detach()
    network = getattr(network, convert)()
    y = network(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(),
        expected,
        rtol=0,
        atol=8 * torch.finfo(dtype).eps * float(expected.abs().max()) + 1e-12,
    )
    y.square().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in network.parameters())
    assert network.ppcr.weight.grad.abs().max() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    case = make_case("ppcr", (2, 8, 5, 5), (1, 2, 4), torch.float64)
    expected = case.run(None)
    y = checkpoint(
        lambda x, r, w, b: run("ppcr", x, r, w, b),
        *(case.x, case.residual, case.weight, case.bias),
        use_reentrant=use_reentrant,
    )
    got = (
        torch.autograd.grad(y, case.inputs, case.grad)
        if not use_reentrant
        else y.backward(case.grad)
    )
    got = got or (case.x.grad, case.weight.grad, case.bias.grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_activation_checkpointing_of_what_stands_around_the_layer(name, use_reentrant):
    """Backward asks for x, which makes autograd run the convolution and the layer again and record both."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.ppcr = torch.nn.Conv2d(3, 8, 3, padding=1), PPCR(8)
            torch.nn.init.normal_(self.ppcr.weight)

        def forward(self, x):
            y = self.convolution(x)
            return run(
                name, y, y.sin(), self.ppcr.weight, self.ppcr.bias
            )  # the last: its backward asks first

    torch.manual_seed(0)
    network, x = Network(), torch.randn(2, 3, 5, 5, requires_grad=True)
    inputs = [x, *network.parameters()]
    expected = torch.autograd.grad(network(x).square().sum(), inputs)
    for chain in (network, torch.nn.Sequential(network, torch.nn.Identity())):
        for t in inputs:
            t.grad = None
        checkpoint(chain, x, use_reentrant=use_reentrant).square().sum().backward()
        assert all(torch.equal(t.grad, e) for t, e in zip(inputs, expected, strict=True))


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
    b = run("ppcr", to_layout(case.x, "channels_last"), case.residual, case.weight, case.bias)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_version():
    assert ppcr_ext.__version__.count(".") == 2
