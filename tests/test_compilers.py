"""Whole networks through PyTorch's compilers and exporters: Inductor, AOTInductor, ONNX, and
transforms inside compiled functions."""

import subprocess
import sys

import pytest
import torch
from cases import make_case, run
from torch.func import grad, jvp, vmap

from ppcr_ext import PPCR, ppcr_gate

N, H = torch.export.Dim("n", min=2, max=64), torch.export.Dim("h", min=4, max=256)


class Network(torch.nn.Module):
    """All three operators: a layer, a fused residual end, and a gate that weighs the pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = (
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.Conv2d(8, 8, 3, padding=1),
        )
        self.first, self.end, self.pool = PPCR(8), PPCR(8, (2, 3), init_gate=0.9), PPCR(8, (1, 8))
        self.head = torch.nn.Linear(8, 4)
        for layer in (self.first, self.end, self.pool):
            torch.nn.init.normal_(layer.weight)

    def forward(self, x):
        x = self.first(self.stem(x))
        x = self.end(self.body(x), x)
        return self.head((x * self.pool.gate(x)).mean((2, 3)))


class Small(torch.nn.Module):
    """A residual end with little around it: each of Inductor's kernels is compiled for seconds.

    No convolution: those of the CPU are compiled anew for other sizes, with PPCR or without.
    """

    def __init__(self):
        super().__init__()
        self.scale, self.ppcr = torch.nn.Parameter(torch.randn(3, 1, 1)), PPCR(3, (1, 2))
        torch.nn.init.normal_(self.ppcr.weight)

    def forward(self, x):
        return self.ppcr(self.scale * x.sin(), x)


@pytest.fixture
def network():
    torch.manual_seed(0)
    torch.compiler.reset()
    return Network()


def batch(n=2, h=8, w=6):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(n * h))


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_forward_and_backward(dynamic):
    """There is one graph without breaks. With dynamic shapes the second size compiles nothing, with
    static ones neither does the first size when it comes again."""
    torch.manual_seed(0)
    torch.compiler.reset()
    network = Small()
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic)
    parameters = list(network.parameters())
    for index, x in enumerate((batch(), batch(3, 5, 7) if dynamic else 2 * batch())):
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            y = compiled(x)
        gradients = torch.autograd.grad(y.square().sum(), parameters)
        expected = network(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        for got, e in zip(
            gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True
        ):
            torch.testing.assert_close(got, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()))


@pytest.mark.parametrize("name", ["ppcr", "ppcr_add_relu"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_inside_a_compiled_function(name, transform):
    torch.compiler.reset()
    case = make_case(name, (3, 8, 4), (1, 2, 4), torch.float64)

    def evaluate(x, weight, backend=None):
        def f(x, weight, residual=case.residual):
            return run(name, x, residual, weight, case.bias, backend=backend)

        if transform == "grad":
            return grad(lambda weight: f(x, weight).square().sum())(weight)
        if transform == "jvp":
            return jvp(f, (x, weight), (x**2, weight**2))[1]
        return vmap(lambda x, residual: f(x[None], weight, residual[None]))(x, case.residual)

    expected = evaluate(case.x, case.weight, "reference")
    assert expected.abs().sum() > 0
    compiled = torch.compile(evaluate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.x, case.weight), expected, rtol=1e-10, atol=1e-12)


def test_export_saves_and_loads(network, tmp_path):
    """The fused operators stay in the exported program, which takes other sizes."""
    program = torch.export.export(network, (batch(),), dynamic_shapes=({0: N, 2: H},))
    called = {str(node.target) for node in program.graph.nodes if "ppcr_ext" in str(node.target)}
    assert called == {f"ppcr_ext.{name}.default" for name in ("ppcr", "ppcr_add_relu", "ppcr_gate")}
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for x in (batch(), batch(5, 11)):
        assert torch.equal(loaded(x), network(x))


@pytest.mark.full
def test_aot_inductor_package(tmp_path):
    torch.manual_seed(0)
    network = Small()
    with torch.no_grad():
        program = torch.export.export(network, (batch(),), dynamic_shapes=({0: N, 2: H},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "network.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for x in (batch(), batch(5, 11)):
            torch.testing.assert_close(loaded(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_onnx_runs_in_onnxruntime(network, dtype, tmp_path):
    """Operators of the ONNX standard alone, so that any runtime takes the file."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network = network.to(dtype).eval()
    program = torch.onnx.export(
        network, (batch().to(dtype),), dynamo=True, dynamic_shapes=({0: N, 2: H},), verbose=False
    )
    program.save(tmp_path / "network.onnx")
    model = onnx.load(tmp_path / "network.onnx")
    onnx.checker.check_model(model)
    assert {function.domain for function in model.graph.node} == {""}
    session = onnxruntime.InferenceSession(
        tmp_path / "network.onnx", providers=["CPUExecutionProvider"]
    )
    for x in (batch(), batch(5, 11)):
        (got,) = session.run(None, {session.get_inputs()[0].name: x.to(dtype).numpy()})
        expected = network(x.to(dtype)).detach()
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            torch.from_numpy(got),
            expected,
            rtol=tolerance,
            atol=tolerance * float(expected.abs().max()),
        )


JIT = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:FutureWarning")


@JIT
@pytest.mark.parametrize("with_grad", [False, True])
def test_jit_trace(network, with_grad, tmp_path):
    """The trace holds the registered operators, is the same twice over, and after saving still
    takes other batches and has gradients."""
    with torch.set_grad_enabled(with_grad):
        traced = torch.jit.trace(network, batch())
    for name in ("ppcr", "ppcr_add_relu", "ppcr_gate"):
        assert f"ppcr_ext::{name}(" in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "network.pt")
    loaded = torch.jit.load(tmp_path / "network.pt")
    for x in (batch(), batch(5, 11)):
        assert torch.equal(loaded(x), network(x))
    parameters = dict(network.named_parameters())
    expected = torch.autograd.grad(network(batch()).square().sum(), parameters.values())
    found = dict(loaded.named_parameters())
    got = torch.autograd.grad(loaded(batch()).square().sum(), [found[name] for name in parameters])
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


JIT_WARNINGS = """
import torch, ppcr_ext, warnings
with warnings.catch_warnings(record=True) as said:
    torch.jit.trace(ppcr_ext.PPCR(8), (torch.randn(2, 8, 3), torch.randn(2, 8, 3)))
print([str(w.message) for w in said if issubclass(w.category, torch.jit.TracerWarning)])
"""


def test_jit_trace_does_not_warn_of_checks_of_shapes():
    """In a process of its own: pytest has filters of its own."""
    said = subprocess.check_output([sys.executable, "-c", JIT_WARNINGS], text=True)
    assert said.strip() == "[]"


@JIT
def test_jit_script_says_to_trace(network):
    for module in (PPCR(8), network, torch.nn.Sequential(PPCR(8))):
        with pytest.raises(TypeError, match=r"script: record .*torch.jit.trace.* or torch.export"):
            torch.jit.script(module)
    assert network(batch()).shape == (2, 4)


@pytest.mark.parametrize("name", ["ppcr", "ppcr_gate", "ppcr_add_relu"])
def test_compiled_autograd_in_one_graph(name):
    torch.compiler.reset()
    case = make_case(name, (2, 8, 3, 5), (1, 2, 4), torch.float64)
    expected = case.run(None)[1:]
    for t in case.inputs:
        t.grad = None
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        run(name, case.x, case.residual, case.weight, case.bias).backward(case.grad)
    assert all(torch.equal(t.grad, e) for t, e in zip(case.inputs, expected, strict=True))


torch.fx.wrap("ppcr_gate")


class CallsAFunction(torch.nn.Module):
    def forward(self, x, weight):
        return ppcr_gate(x, weight)


def test_fx_records_a_function_that_its_caller_names():
    traced, x, weight = torch.fx.symbolic_trace(CallsAFunction()), torch.randn(2, 8), torch.randn(7)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [ppcr_gate]
    assert torch.equal(traced(x, weight), ppcr_gate(x, weight))


def test_fx_records_a_layer_by_itself_with_or_without_a_residual():
    layer, x = PPCR(8), torch.randn(2, 8, 3)
    traced = torch.fx.symbolic_trace(layer)
    assert torch.equal(traced(x), layer(x))
    assert torch.equal(traced(x, x), layer(x, x))
