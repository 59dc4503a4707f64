"""The Triton operators in PyTorch, in Triton's interpreter. test_triton.py runs this file as it
runs triton_interpreted.py."""

import os

import pytest
import torch
from cases import make_case, run
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import ppcr_ext
from ppcr_ext import _native
from ppcr_ext._dispatch import choose
from ppcr_ext._triton import operators
from ppcr_ext.testing import LAYOUTS, OPERATORS

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_triton.py runs this"
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, layout):
    case = make_case(name, (2, 8, 1, 3), (1, 2, 4), torch.float32, layout)
    parameters = (case.weight, case.bias, [1, 2, 4], 1e-5)
    y = (case.residual,) if name == "ppcr_add_relu" else ()
    operators = torch.ops.ppcr_ext
    forward = [
        t.clone().requires_grad_() if isinstance(t, Tensor) else t
        for t in (case.x, *y, *parameters)
    ]
    opcheck(getattr(operators, f"triton_{name}").default, forward)
    opcheck(
        getattr(operators, f"triton_{name}_backward").default, (case.grad, case.x, *y, *parameters)
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_compile(name, dynamic):
    """One graph, forward and backward, with the operator in it; the bits and strides of eager."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(
        lambda x, r, w, b: run(name, x, r, w, b, backend="triton"),
        fullgraph=True,
        dynamic=dynamic,
        backend=backend,
    )
    for shape, layout in zip(((1, 8, 5, 3), (2, 8, 2, 3)), LAYOUTS, strict=True):
        case = make_case(name, shape, (1, 2, 4), torch.float32, layout)
        expected = case.run("triton")
        y = compiled(case.x, case.residual, case.weight, case.bias)
        got = (y, *torch.autograd.grad(y, case.inputs, case.grad))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert [t.stride() for t in got] == [t.stride() for t in expected]
    assert f"ppcr_ext.triton_{name}" in graphs[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives(name):
    case = make_case(name, (1, 4, 2), (1, 2), torch.float64)
    inputs = [
        t.detach().clone().requires_grad_() for t in (case.x, case.residual, case.weight, case.bias)
    ]

    def f(x, residual, weight, bias):
        return run(name, x, residual, weight, bias, levels=(1, 2), backend="triton")

    if name != "ppcr_add_relu":
        inputs[1].requires_grad_(False)
    assert torch.autograd.gradcheck(f, inputs, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(f, inputs, eps=1e-6, atol=1e-6)


def test_direct_calls_cannot_read_out_of_bounds():
    x, w, b, levels = torch.randn(2, 8, 3), torch.randn(7), torch.randn(1), [1, 2, 4]
    operators = torch.ops.ppcr_ext
    for call, error, words in (
        (
            lambda: operators.triton_ppcr(x, w[:3], b, levels, 1e-5),
            ValueError,
            "weight must have shape",
        ),
        (
            lambda: operators.triton_ppcr(x.int(), w, b, levels, 1e-5),
            TypeError,
            "x must be float32",
        ),
        (
            lambda: operators.triton_ppcr(x, w, b, [1, 9], 1e-5),
            ValueError,
            "levels must lie between",
        ),
        (
            lambda: operators.triton_ppcr(torch.randn(1, 99), torch.randn(65), b, [65], 1e-5),
            RuntimeError,
            "at most 64 contexts",
        ),
        (
            lambda: operators.triton_ppcr_gate(x, w, torch.ones(2), levels, 1e-5),
            ValueError,
            "bias must have shape",
        ),
        (
            lambda: operators.triton_ppcr_backward(x[:1], x, w, b, levels, 1e-5),
            ValueError,
            "grad must have shape",
        ),
        (
            lambda: operators.triton_ppcr_gate_backward(x, x, w, b, levels, 1e-5),
            ValueError,
            r"grad must have shape \[2, 1, 3\]",
        ),
        (
            lambda: operators.triton_ppcr_add_relu(x, x.half(), w, b, levels, 1e-5),
            TypeError,
            "residual must have x's dtype",
        ),
        (
            lambda: operators.triton_ppcr_add_relu_backward(x, x, x[:, :4], w, b, levels, 1e-5),
            ValueError,
            "y must have shape",
        ),
    ):
        with pytest.raises(error, match=words):
            call()


def test_automatic_choice_stays_native_on_the_cpu():
    assert _native.why_not(torch.device("cpu")) is None
    assert choose(None, torch.zeros(1, 8), 7) == "native"
    assert "triton" in ppcr_ext.available_backends()


def test_modes_that_watch_operators_see_the_operator():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    names = []
    with Names():
        make_case("ppcr", (1, 8, 3), (1, 2, 4), torch.float32).run("triton")
    assert {"ppcr_ext::triton_ppcr", "ppcr_ext::triton_ppcr_backward"} <= set(names)


def differentiable(name):
    """x, y and a gradient of y."""
    case = make_case(name, (1, 8, 3), (1, 2, 4), torch.float32)
    x = case.x.clone().requires_grad_()
    return x, run(name, x, case.residual, case.weight, case.bias, backend="triton"), case.grad


def gradients_of_batches(y, x, grads):
    return torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]


def gradients_under_vmap(y, x, grads):
    return torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(grads)


def gradients_functionalized(y, x, grads):
    def of_one(grad):
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    return torch.stack([torch.func.functionalize(of_one)(grad) for grad in grads])


@pytest.mark.parametrize(
    "gradients", [gradients_of_batches, gradients_under_vmap, gradients_functionalized]
)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_that_are_no_plain_tensors(name, gradients):
    """Their type is Tensor all the same."""
    x, y, grad = differentiable(name)
    grads = torch.stack([grad, -grad, torch.zeros_like(grad)])
    expected = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads]
    assert torch.equal(gradients(y, x, grads), torch.stack(expected))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_gradient_without_memory(name):
    x, y, _ = differentiable(name)
    (dx,) = torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape))
    assert not dx.any()


def test_what_is_launched_without_the_dispatcher():
    """A kernel that reads a view that negates from memory gets the sign wrong."""
    x = torch.randn(2, 8)
    with torch.inference_mode():
        inference = torch.randn(2, 8)
    for t in (x, torch.nn.Parameter(x), x.clone().requires_grad_() * 2, inference):
        assert operators._plain([t, None, x])
    functional = torch._to_functional_tensor(x)
    for t in (torch._neg_view(x), torch._efficientzerotensor(2, 8), functional, x.to("meta")):
        assert type(t) is Tensor
        assert not operators._plain([x, None, t])
