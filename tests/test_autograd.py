"""Derivatives: of first and second order, in both modes, through torch.func, deterministic, and with nothing kept but x."""

import itertools
from collections import UserList

import pytest
import torch
from cases import DEVICES, make_case, run
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

import ppcr_ext
from ppcr_ext.testing import LAYOUTS, OPERATORS, to_layout

LEVELS = [(1, 2, 4), (2, 3)]


def function(case, backend="native"):
    def call(x, weight, bias, residual):
        return run(case.operator, x, residual, weight, bias, levels=case.levels, backend=backend)

    return call


def tensors(case):
    return tuple(
        t.detach().requires_grad_() for t in (case.x, case.weight, case.bias, case.residual)
    )


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
class TestGradcheck:
    def case(self, device, name, layout, levels):
        return make_case(name, (2, 8, 3, 2), levels, torch.float64, layout, device=device)

    def test_first_order(self, device, name, layout, levels):
        case = self.case(device, name, layout, levels)
        assert gradcheck(function(case), tensors(case), nondet_tol=0)

    def test_second_order(self, device, name, layout, levels):
        case = self.case(device, name, layout, levels)
        assert gradgradcheck(function(case), tensors(case))

    def test_forward_mode(self, device, name, layout, levels):
        case = self.case(device, name, layout, levels)
        assert gradcheck(
            function(case), tensors(case), check_forward_ad=True, check_backward_ad=False
        )


@pytest.mark.parametrize("name", OPERATORS)
def test_direct_calls_of_the_operators_differentiate(name):
    case = make_case(name, (2, 8, 3), (1, 2, 4), torch.float64)
    operator = getattr(torch.ops.ppcr_ext, name).default

    def call(x, weight, bias, residual):
        return operator(
            *((x, residual) if name == "ppcr_add_relu" else (x,)), weight, bias, [1, 2, 4], 1e-5
        )

    assert gradcheck(call, tensors(case))
    assert gradgradcheck(call, tensors(case))


@pytest.mark.parametrize("name", OPERATORS)
class TestTransforms:
    """Each against the reference's value, none of which is zero."""

    def both(self, name, evaluate):
        case = make_case(name, (3, 8, 4), (1, 2, 4), torch.float64)
        got, expected = (
            evaluate(function(case, backend), *tensors(case)) for backend in ("native", "reference")
        )
        for a, b in zip(
            torch.utils._pytree.tree_leaves(got),
            torch.utils._pytree.tree_leaves(expected),
            strict=True,
        ):
            assert b.abs().sum() > 0
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def test_grad(self, name):
        self.both(name, lambda f, *t: grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))(*t))

    def test_vjp(self, name):
        def evaluate(f, *t):
            y, pull = vjp(f, *t)
            return pull(torch.ones_like(y))[:3]

        self.both(name, evaluate)

    def test_jvp(self, name):
        self.both(name, lambda f, *t: jvp(f, t, tuple(i.detach() ** 2 for i in t))[1])

    def test_vmap_over_x(self, name):
        self.both(name, lambda f, x, w, b, r: vmap(lambda x, r: f(x[None], w, b, r[None]))(x, r))

    def test_vmap_over_weight(self, name):
        self.both(
            name, lambda f, x, w, b, r: vmap(lambda w: f(x, w, b, r))(torch.stack([w, 2 * w]))
        )

    def test_vmap_over_x_and_weight(self, name):
        """An ensemble: every sample with weights of its own."""

        def evaluate(f, x, w, b, r):
            return vmap(lambda x, w, b, r: f(x[None], w, b, r[None]))(
                x, torch.stack([w, 2 * w, -w]), b.expand(3, 1), r
            )

        self.both(name, evaluate)

    def test_per_sample_gradients(self, name):
        def evaluate(f, x, w, b, r):
            return vmap(
                grad(lambda w, x, r: f(x[None], w, b, r[None]).sum()), in_dims=(None, 0, 0)
            )(w, x, r)

        self.both(name, evaluate)

    def test_hessian(self, name):
        self.both(name, lambda f, x, w, b, r: hessian(lambda w: f(x, w, b, r).square().sum())(w))

    def test_hessian_over_x_and_weight(self, name):
        def evaluate(f, x, w, b, r):
            (xx, _), (wx, ww) = hessian(
                lambda x, w: f(x, w, b, r[:1]).square().sum(), argnums=(0, 1)
            )(x[:1], w)
            return xx, wx, ww

        self.both(name, evaluate)

    def test_dual_parameters(self, name):
        def evaluate(f, x, w, b, r):
            with forward_ad.dual_level():
                duals = (forward_ad.make_dual(t, t.detach() ** 2) for t in (w, b))
                return forward_ad.unpack_dual(f(x, *duals, r)).tangent

        self.both(name, evaluate)

    def test_dual_tensors(self, name):
        def evaluate(f, x, w, b, r):
            with forward_ad.dual_level():
                # not a constant: the gate does not feel one
                return forward_ad.unpack_dual(
                    f(forward_ad.make_dual(x, x.detach() ** 2), w, b, r)
                ).tangent

        self.both(name, evaluate)


def test_functional_call_of_the_module():
    module = ppcr_ext.PPCR(8).double()
    x = torch.randn(4, 8, 3, dtype=torch.float64)
    weights = {
        "weight": torch.randn(7, dtype=torch.float64),
        "bias": torch.ones(1, dtype=torch.float64),
    }
    got = grad(lambda w: functional_call(module, w, (x,)).square().sum())(weights)
    assert all(g.abs().sum() > 0 for g in got.values())


@pytest.mark.parametrize("name", ["forward", "add_relu"])
def test_gradient_penalty_trains(name):
    """The norm of the input's gradient in the loss, a double backward in each of three training steps of a small network."""
    x = torch.randn(
        4,
        3,
        6,
        6,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
        requires_grad=True,
    )
    networks = {}
    for backend in ("native", "reference"):
        torch.manual_seed(1)
        layers = (
            torch.nn.Conv2d(3, 8, 3, padding=1),
            ppcr_ext.PPCR(8, backend=backend),
            torch.nn.Conv2d(8, 2, 3),
        )
        networks[backend] = network = torch.nn.ModuleList(layers).double()
        start, layer, end = layers
        torch.nn.init.normal_(layer.weight)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(3):
            y = start(x)
            z = end(layer(y) if name == "forward" else layer.add_relu(y, y.flip(1)))
            (dx,) = torch.autograd.grad(z.square().mean(), x, create_graph=True)
            optimizer.zero_grad()
            (z.square().mean() + 100 * dx.square().sum()).backward()
            assert layer.weight.grad.abs().max() > 0
            optimizer.step()
    pairs = zip(*(network.parameters() for network in networks.values()), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_every_pattern_of_requires_grad():
    for name in OPERATORS:
        case = make_case(name, (2, 8, 5), (1, 2, 4), torch.float64)
        f = function(case)
        full = tensors(case)
        used = full if name == "ppcr_add_relu" else full[:3]
        expected = torch.autograd.grad(f(*full), used, case.grad)
        for pattern in itertools.product([False, True], repeat=len(used)):
            inputs = [
                t.detach().requires_grad_(wanted)
                for t, wanted in zip(full, [*pattern, False], strict=False)
            ]
            inputs += [t.detach() for t in full[len(inputs) :]]
            y = f(*inputs)
            assert y.requires_grad == any(pattern)
            if not any(pattern):
                continue
            y.backward(case.grad)
            for t, wanted, e in zip(inputs, pattern, expected, strict=False):
                assert (t.grad is not None) == wanted
                if wanted:
                    assert torch.equal(t.grad, e)


@pytest.mark.parametrize(
    ("name", "kept"), [("ppcr", "x"), ("ppcr_gate", "x"), ("ppcr_add_relu", "xy")]
)
def test_nothing_but_x_is_kept(name, kept):
    case = make_case(name, (2, 8, 6, 6), (1, 2, 4), torch.float32)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = run(
            name, *(t.requires_grad_() for t in (case.x, case.residual, case.weight, case.bias))
        )
    allowed = {case.x.data_ptr(), case.weight.data_ptr(), case.bias.data_ptr()} | (
        {y.data_ptr()} if "y" in kept else set()
    )
    assert {t.data_ptr() for t in packed} == allowed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(8, 64, 28, 28), (3, 19, 37, 41), (4, 2048, 7, 7), (50, 64), (1, 16, 224, 224)],
    ids=str,
)
def test_bit_identical_for_any_number_of_threads(shape, dtype, layout):
    for name in OPERATORS:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(make_case(name, shape, (1, 2, 4), dtype, layout).run("native"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_expanded_and_differently_laid_out_gradients():
    """dx takes x's layout whatever the gradient's; y.sum().backward() hands in a gradient of stride 0."""
    case = make_case("ppcr_add_relu", (2, 8, 5, 3), (1, 2, 4), torch.float64, "channels_last")
    reference_case = make_case(
        "ppcr_add_relu", (2, 8, 5, 3), (1, 2, 4), torch.float64, "channels_last"
    )
    for grad_ in (
        torch.ones(()).double().expand(2, 8, 5, 3),
        to_layout(case.grad, "contiguous"),
    ):
        case.grad = reference_case.grad = grad_
        for a, b in zip(case.run("native"), reference_case.run("reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        assert case.run("native")[1].stride() == case.x.stride()


@pytest.mark.parametrize("name", OPERATORS)
def test_the_node_is_named_after_the_operator(name):
    """In messages of anomaly detection and in profiles."""
    case = make_case(name, (2, 8, 3), (1, 2, 4), torch.float32)
    y = run(name, case.x.requires_grad_(), case.residual, case.weight, case.bias)
    assert y.grad_fn.name() == f"{name}Backward"
    with torch.profiler.profile() as profile:
        y.sum().backward()
    events = {event.key for event in profile.key_averages()}
    assert f"autograd::engine::evaluate_function: {name}Backward" in events


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", [list, UserList])
def test_levels_are_copied(name, kind):
    """A caller's list that changes between forward and backward changes no gradient."""
    case = make_case(name, (2, 8, 3), (1, 2, 4), torch.float64)
    expected = case.run(None)[1:]
    levels = kind([1, 2, 4])
    y = run(name, case.x, case.residual, case.weight, case.bias, levels=levels)
    levels[:] = [4, 2, 1]
    got = torch.autograd.grad(y, case.inputs, case.grad)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    layer = ppcr_ext.PPCR(8, levels := [1, 2, 4])
    levels.append(8)
    assert layer.levels == (1, 2, 4)
