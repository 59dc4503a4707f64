"""record_gates: the gate maps of every layer, by name, and nothing else changed."""

import asyncio
import contextvars
import threading
import timeit
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import ppcr_ext.module as switch
from ppcr_ext import PPCR, record_gates


class Network(nn.Module):
    """A plain layer, a fused one, and one in a list."""

    def __init__(self, backend=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = PPCR(8, backend=backend)
        self.convolution = nn.Conv2d(8, 8, 3, padding=1)
        self.fused = PPCR(8, (1, 3), backend=backend)
        self.more = nn.ModuleList([PPCR(8, bias=False, backend=backend)])

    def forward(self, x):
        x = self.first(self.stem(x))
        return self.more[0](self.fused(self.convolution(x), x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = Network()
    for module in network.modules():
        if isinstance(module, PPCR):
            nn.init.normal_(module.weight)
    return network


X = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
NAMES = ["first", "fused", "more.0"]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gates_of_every_layer(model, backend):
    inputs = {}
    for layer in (model.first, model.fused, model.more[0]):
        layer.backend = backend
    with record_gates(model) as gates:
        model(X)
    inputs["first"] = model.stem(X)
    x = model.first(inputs["first"])
    inputs["fused"] = model.convolution(x)
    inputs["more.0"] = model.fused.add_relu(inputs["fused"], x)
    assert list(gates) == NAMES
    for name, x in inputs.items():
        (gate,) = gates[name]
        assert gate.shape == (2, 1, 6, 5)
        assert not gate.requires_grad
        assert gate.std() > 0
        torch.testing.assert_close(gate, model.get_submodule(name).gate(x).detach(), rtol=0, atol=0)


def test_results_and_gradients_are_the_same(model):
    def run():
        x = X.clone().requires_grad_()
        y = model(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])

    expected = run()
    with record_gates(model) as gates:
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(len(maps) == 1 for maps in gates.values())


def test_calls_in_order(model):
    with record_gates(model) as gates:
        model(X)
        model(2 * X)
        model.first(torch.zeros(1, 8))
    assert [g.shape for g in gates["first"]] == [(2, 1, 6, 5), (2, 1, 6, 5), (1, 1)]
    assert [len(gates[name]) for name in NAMES] == [3, 2, 2]
    assert not torch.equal(*gates["fused"])


def test_parts_and_nesting(model):
    """The inner block records a part under its own names; the outer one everything under its."""
    with record_gates(model) as outer, record_gates(model.more) as inner:
        model(X)
    assert list(inner) == ["0"]
    assert torch.equal(inner["0"][0], outer["more.0"][0])
    with record_gates(model) as outer:
        with record_gates(model) as inner:
            model(X)
        model(X)
    assert (len(inner["first"]), len(outer["first"])) == (1, 2)


def test_removed_on_exit(model):
    with record_gates(model) as gates:
        model(X)
    model(X)
    assert len(gates["first"]) == 1
    with pytest.raises(RuntimeError, match="channels"), record_gates(model) as gates:
        list(map(model, (X, X[:, :2])))
    model(X)
    assert len(gates["first"]) == 1
    assert switch.recorder is None


def test_threads_record_each_its_own_calls(model):
    """Eight threads record the same network at once, each with other inputs. A ninth runs it and
    does not record."""
    expected, found, barrier = {}, {}, threading.Barrier(9)
    for index in range(8):
        with record_gates(model) as gates:
            model((index + 1) * X)
        expected[index] = gates["fused"]

    def work(index):
        with nullcontext({}) if index == 8 else record_gates(model) as gates:
            barrier.wait()  # all have begun
            for _ in range(2):
                model((index + 1) * X)
            barrier.wait()  # all have run
        if index < 8:
            found[index] = gates["fused"]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {index: len(maps) for index, maps in found.items()} == dict.fromkeys(range(8), 2)
    for index, maps in found.items():
        assert all(torch.equal(gate, expected[index][0]) for gate in maps)
    assert switch.recorder is None


def test_a_block_that_is_left_in_another_context(model):
    """An asynchronous fixture begins in one task and ends in another."""

    async def fixture():
        with record_gates(model) as gates:
            model(X)
            yield gates

    async def run():
        generator = fixture()
        gates = await asyncio.create_task(anext(generator))
        await asyncio.create_task(generator.aclose())
        return gates

    gates = asyncio.run(run())
    assert switch.recorder is None
    assert [len(gates[name]) for name in NAMES] == [1, 1, 1]


def test_a_context_that_outlives_the_block_records_no_more(model):
    context = contextvars.copy_context()
    recording = record_gates(model)
    gates = context.run(recording.__enter__)
    recording.__exit__(None, None, None)
    with record_gates(model) as others:
        context.run(model, X)
    assert (gates, others) == ({}, {})


def test_blocks_that_are_left_in_the_order_of_their_beginning(model):
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(record_gates(model))
        gates = second.enter_context(record_gates(model))
        first.close()
        model(X)
    assert len(gates["fused"]) == 1
    assert switch.recorder is None


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_networks(model, fullgraph):
    """They run eagerly while recording, under the wrapper's names, and are not compiled again."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    expected = compiled(X)
    with torch.compiler.set_stance("fail_on_recompile"):
        with record_gates(compiled) as gates:
            torch.testing.assert_close(compiled(X), expected)
        assert list(gates) == [f"_orig_mod.{name}" for name in NAMES]
        assert torch.equal(compiled(X), expected)
    with pytest.raises(RuntimeError, match=r"torch.compile region"):
        torch.compile(lambda x: record_gates(model).__enter__(), backend="eager")(X)
    assert switch.recorder is None


def test_transforms_and_tracing_raise(model):
    with record_gates(model):
        with pytest.raises(RuntimeError, match=r"record_gates cannot record under torch.func"):
            torch.func.vmap(lambda x: model(x[None]))(X)
        with pytest.raises(RuntimeError, match="or while a network is traced"):
            torch.export.export(model, (X,))
    torch.func.vmap(lambda x: model(x[None]))(X)


TRACERS = {
    "fx": lambda model: torch.fx.symbolic_trace(model),
    "make_fx": lambda model: make_fx(model)(X),
    "jit": lambda model: torch.jit.trace(model, X),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracing_raises_and_records_nothing(model, tracer):
    refused = pytest.raises(RuntimeError, match="while a network is traced")
    with record_gates(model) as gates, refused:
        TRACERS[tracer](model)
    assert gates == {}
    traced = TRACERS[tracer](model)  # and outside the block there is no call too many
    if tracer == "fx":
        assert sum(node.op == "call_function" for node in traced.graph.nodes) == 3
    assert torch.equal(traced(X), model(X))


def test_a_recomputation_is_a_call(model):
    with record_gates(model) as gates:
        y = checkpoint(model, X, use_reentrant=False)
        assert len(gates["fused"]) == 1
        y.sum().backward()
    assert len(gates["fused"]) == 2
    assert torch.equal(*gates["fused"])


def test_half_types(model):
    with torch.autocast("cpu", torch.bfloat16), record_gates(model) as gates:
        model(X)
    assert {gate.dtype for maps in gates.values() for gate in maps} == {torch.bfloat16}


def test_bad_arguments():
    with (
        pytest.raises(ValueError, match="Conv2d has no PPCR layer"),
        record_gates(nn.Conv2d(3, 8, 3)),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"),
        record_gates("resnet18"),
    ):
        pass


def test_bad_input_is_reported_as_without(model):
    with record_gates(model) as gates, pytest.raises(TypeError, match="x must be float32"):
        model.first(torch.zeros(2, 8, 3, dtype=torch.int64))
    for layer in (model.first, model.fused):
        with record_gates(model) as gates:
            with pytest.raises(TypeError, match="x must be a Tensor, got list"):
                layer([1.0])
            with pytest.raises(TypeError, match="x must be a Tensor, got list"):
                layer([1.0], X)
    assert gates == {}


def test_costs_nothing_while_nobody_records():
    """The question costs well under a microsecond."""
    assert switch.recorder is None
    seconds = min(
        timeit.repeat(
            "switch.recorder is None",
            globals={"switch": switch},
            number=10_000,
            repeat=5,
        )
    )
    assert seconds / 10_000 < 1e-6
