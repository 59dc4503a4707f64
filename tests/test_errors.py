"""Bad input: the error's type and its words, from the Python functions and from direct calls of the operators."""

import math

import numpy as np
import pytest
import torch

import ppcr_ext
from ppcr_ext import PPCR, ppcr, ppcr_add_relu, ppcr_gate

X = torch.randn(2, 8, 3)
W = torch.randn(7)
B = torch.randn(1)
NESTED = torch.nested.nested_tensor([torch.randn(8, 3), torch.randn(8, 5)])
JAGGED = torch.nested.nested_tensor([torch.randn(8, 3), torch.randn(5, 3)], layout=torch.jagged)
NUMPY = [np.int8, np.int64, np.uint8, np.float16, np.float32, np.float64]
META = torch.empty(7, device="meta")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("x", W, B), {}, TypeError, r"x must be a Tensor, got str"),
        (
            (X.int(), W, B),
            {},
            TypeError,
            r"x must be float32, float16, bfloat16 or float64, got torch.int32",
        ),
        ((X.to(torch.complex64), W, B), {}, TypeError, r"x must be float32.*got torch.complex64"),
        ((X[0, 0], W, B), {}, ValueError, r"x must have shape \[N, C, \*spatial\], got \[3\]"),
        ((X, [1.0] * 7, B), {}, TypeError, r"weight must be a Tensor, got list"),
        (
            (X, W[:6], B),
            {},
            ValueError,
            r"weight must have shape \[7\] \(one per context: the sum of levels\), got \[6\]",
        ),
        ((X, W[None], B), {}, ValueError, r"weight must have shape \[7\].*got \[1, 7\]"),
        ((X, W.double(), B), {}, TypeError, r"weight must be torch.float32 .*got torch.float64"),
        ((X.double(), W, B.double()), {}, TypeError, r"must be torch.float64 .*got torch.float32"),
        (
            (X.half(), W.bfloat16(), B),
            {},
            TypeError,
            r"weight must be torch.float32 or torch.float16 where x is .*got torch.bfloat16",
        ),
        ((X, W.bfloat16(), B), {}, TypeError, r"x.to\(torch.bfloat16\), or weight .*float32\)"),
        ((X, W, B.int()), {}, TypeError, r"convert bias \(.*\) with .to\(torch.float32\)"),
        ((NESTED, W, B), {}, TypeError, r"x must not be a nested tensor: pass its parts"),
        ((JAGGED, W, B), {}, TypeError, r"x must not be a nested tensor"),
        ((X.to_sparse(), W, B), {}, TypeError, r"x must be dense, got .* x.to_dense\(\)"),
        ((X, W.to_sparse(), B), {}, TypeError, r"weight must be dense, got the layout"),
        ((X, NESTED, B), {}, TypeError, r"weight must not be a nested tensor"),
        ((X, W, NESTED), {}, TypeError, r"bias must not be a nested tensor"),
        ((X, META, B), {}, ValueError, r"weight must be on x's device cpu, got meta"),
        ((X, W, 0.5), {}, TypeError, r"bias must be a Tensor or None, got float"),
        ((X, W, torch.ones(2)), {}, ValueError, r"bias must have shape \[1\], got \[2\]"),
        ((X, W, torch.tensor(0.5)), {}, ValueError, r"bias must have shape \[1\], got \[\]"),
        ((X, W, B.int()), {}, TypeError, r"bias must be torch.float32 .*got torch.int32"),
        (
            (X, W, torch.ones(1, device="meta")),
            {},
            ValueError,
            r"bias must be on x's device cpu, got meta",
        ),
        ((X, W, B), {"levels": ()}, ValueError, r"levels must not be empty"),
        ((X, W, B), {"levels": (1, 2.0, 4)}, TypeError, r"levels must be ints, got \(1, 2.0, 4\)"),
        ((X, W, B), {"levels": (True, 2, 4)}, TypeError, r"levels must be ints"),
        (
            (X, W, B),
            {"levels": 7},
            TypeError,
            r"levels must be a sequence of ints such as \(1, 2, 4\), got 7",
        ),
        ((X, W, B), {"levels": "124"}, TypeError, r"levels must be a sequence of ints"),
        (
            (X, W, B),
            {"levels": (0, 2, 5)},
            ValueError,
            r"levels must lie between 1 and the 8 channels of x, got \(0, 2, 5\)",
        ),
        (
            (X, W, B),
            {"levels": (-1, 8)},
            ValueError,
            r"levels must lie between 1 and the 8 channels",
        ),
        (
            (X, W, B),
            {"levels": (1, 9)},
            ValueError,
            r"levels must lie between 1 and the 8 channels of x, got \(1, 9\)",
        ),
        ((X[:, :0], W, B), {}, ValueError, r"levels must lie between 1 and the 0 channels of x"),
        ((X, W[:1], B), {"levels": (1,)}, ValueError, r"levels need at least 2 contexts"),
        ((X, W, B), {"eps": 0.0}, ValueError, r"eps must be positive and finite, got 0.0"),
        ((X, W, B), {"eps": -1e-5}, ValueError, r"eps must be positive and finite"),
        ((X, W, B), {"eps": math.nan}, ValueError, r"eps must be positive and finite, got nan"),
        ((X, W, B), {"eps": math.inf}, ValueError, r"eps must be positive and finite, got inf"),
        ((X, W, B), {"eps": "small"}, TypeError, r"eps must be a float, got 'small'"),
        (
            (X, W, B),
            {"backend": "fast"},
            ValueError,
            r"backend must be one of .*native.*or None, got 'fast'",
        ),
    ],
)
@pytest.mark.parametrize("name", ["ppcr", "ppcr_gate", "ppcr_add_relu"])
def test_functions(name, arguments, options, error, words):
    if name == "ppcr_add_relu":
        arguments = (arguments[0], arguments[0], *arguments[1:])
    with pytest.raises(error, match=words):
        getattr(ppcr_ext, name)(*arguments, **options)


@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (None, TypeError, r"residual must be a Tensor, got NoneType"),
        (X[:1], ValueError, r"residual must have x's shape \[2, 8, 3\], got \[1, 8, 3\]"),
        (NESTED, TypeError, r"residual must not be a nested tensor"),
        (X.to_sparse(), TypeError, r"residual must be dense"),
        (X.half(), TypeError, r"residual must have x's dtype torch.float32, got torch.float16"),
        (X.to("meta"), ValueError, r"residual must be on x's device cpu, got meta"),
    ],
)
def test_residual(residual, error, words):
    with pytest.raises(error, match=words):
        ppcr_add_relu(X, residual, W, B)
    with pytest.raises(error, match=words):
        PPCR(8).add_relu(X, residual)


def test_autocast_casts_the_residual():
    with torch.autocast("cpu", torch.bfloat16):
        y = ppcr_add_relu(X.bfloat16(), X, W, B)
    assert torch.equal(y, ppcr_add_relu(X.bfloat16(), X.bfloat16(), W, B))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((8.0,), {}, TypeError, r"channels must be an int, got 8.0"),
        ((0,), {}, ValueError, r"channels must be at least 1, got 0"),
        ((3,), {}, ValueError, r"levels must lie between 1 and the 3 channels"),
        ((8, (1,)), {}, ValueError, r"levels need at least 2 contexts"),
        ((8,), {"eps": 0}, ValueError, r"eps must be positive"),
        ((8,), {"init_gate": 1.0}, ValueError, r"init_gate must lie between 0 and 1, got 1.0"),
        ((8,), {"init_gate": math.nan}, ValueError, r"init_gate must lie between 0 and 1"),
        ((8,), {"init_gate": 0.9, "bias": False}, ValueError, r"init_gate=0.9 needs bias=True"),
        ((8,), {"backend": "cuda"}, ValueError, r"backend must be one of"),
    ],
)
def test_module(arguments, options, error, words):
    with pytest.raises(error, match=words):
        PPCR(*arguments, **options)


def test_module_with_other_channels():
    with pytest.raises(ValueError, match=r"x must have 8 channels, got \[2, 16, 3\]"):
        PPCR(8)(torch.randn(2, 16, 3))


def test_a_layer_of_another_dtype_says_what_to_do():
    with pytest.raises(TypeError, match=r"weight must be .*bfloat16; convert x with x.to"):
        PPCR(8).bfloat16()(X)


@pytest.mark.parametrize("call", [PPCR(8), PPCR(8).gate, lambda x: PPCR(8)(x, x)])
@pytest.mark.parametrize("x", [NESTED, JAGGED], ids=["strided", "jagged"])
def test_nested_tensors_are_refused_in_words(call, x):
    with pytest.raises(TypeError, match="x must not be a nested tensor"):
        call(x)


class TestNamedBackends:
    def test_a_backend_that_cannot_run_says_why(self):
        with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run for cpu tensors: "):
            ppcr(X, W, B, backend="triton")

    def test_more_contexts_than_the_kernels_take(self):
        x, w = torch.randn(2, 70, 3), torch.randn(65)
        with pytest.raises(
            RuntimeError,
            match=r"'native' cannot run .* takes at most 64 contexts, the levels have 65",
        ):
            ppcr(x, w, levels=(1, 64), backend="native")
        torch.testing.assert_close(
            ppcr(x, w, levels=(1, 64)),
            ppcr(x, w, levels=(1, 64), backend="reference"),
            rtol=0,
            atol=0,
        )

    def test_every_backend_states_its_reason(self):
        assert list(ppcr_ext.backends()) == ["native", "triton", "reference"]
        assert all(ppcr_ext.backends().values())


OPERATORS = torch.ops.ppcr_ext
L = [1, 2, 4]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: OPERATORS.ppcr(X.int(), W, B, L, 1e-5),
            "x must be float32, float64, float16 or bfloat16, got Int",
        ),
        (
            lambda: OPERATORS.ppcr(X[0, 0], W, B, L, 1e-5),
            r"x must have shape \[N, C, \*spatial\], got \[3\]",
        ),
        (lambda: OPERATORS.ppcr(torch.randn(()), W, B, L, 1e-5), "x must have shape"),
        (lambda: OPERATORS.ppcr(X[:, :0], W, B, L, 1e-5), "x must have at least 1 channel"),
        (lambda: OPERATORS.ppcr(X, W[:3], B, L, 1e-5), r"weight must have shape \[7\], got \[3\]"),
        (
            lambda: OPERATORS.ppcr(X, W[None], B, L, 1e-5),
            r"weight must have shape \[7\], got \[1, 7\]",
        ),
        (
            lambda: OPERATORS.ppcr(X, W.int(), B, L, 1e-5),
            "weight must be float32 or x's dtype .*got Int",
        ),
        (
            lambda: OPERATORS.ppcr(X, W.double(), B, L, 1e-5),
            "weight must be float32 or x's dtype .*got Double",
        ),
        (
            lambda: OPERATORS.ppcr(X.double(), W, None, L, 1e-5),
            "weight must be float32 or x's dtype .*got Float",
        ),
        (
            lambda: OPERATORS.ppcr(X.half(), W.bfloat16(), B, L, 1e-5),
            "weight must be float32 or x's dtype .*got BFloat16",
        ),
        (
            lambda: OPERATORS.ppcr(X, W, torch.ones(2), L, 1e-5),
            r"bias must have shape \[1\], got \[2\]",
        ),
        (lambda: OPERATORS.ppcr(X, W, B.long(), L, 1e-5), "bias must be float32"),
        (lambda: OPERATORS.ppcr(X, W, B, [], 1e-5), "levels must not be empty"),
        (lambda: OPERATORS.ppcr(X, W, B, [1, 2, -4], 1e-5), "levels must be at least 1"),
        (
            lambda: OPERATORS.ppcr(X, W, B, [1, 9], 1e-5),
            "levels must not exceed the number of channels",
        ),
        (lambda: OPERATORS.ppcr(X, W, B, [1], 1e-5), "levels need at least 2 contexts"),
        (lambda: OPERATORS.ppcr(torch.randn(1, 99), W, B, [65], 1e-5), "more than 64 contexts"),
        (lambda: OPERATORS.ppcr(torch.randn(1, 99), W, B, [60, 60], 1e-5), "more than 64 contexts"),
        (lambda: OPERATORS.ppcr(X, W, B, L, 0.0), "eps must be positive and finite"),
        (lambda: OPERATORS.ppcr(X, W, B, L, math.nan), "eps must be positive and finite"),
        (lambda: OPERATORS.ppcr_gate(X, W[:3], B, L, 1e-5), "weight must have shape"),
        (
            lambda: OPERATORS.ppcr_backward(X[:1], X, W, B, L, 1e-5),
            r"grad must have x's shape \[2, 8, 3\], got \[1, 8, 3\]",
        ),
        (
            lambda: OPERATORS.ppcr_backward(X[..., None], X, W, B, L, 1e-5),
            "grad must have x's shape",
        ),
        (
            lambda: OPERATORS.ppcr_backward(X.half(), X, W, B, L, 1e-5),
            "grad must have x's dtype Float, got Half",
        ),
        (
            lambda: OPERATORS.ppcr_gate_backward(X, X, W, B, L, 1e-5),
            r"grad must have the gate's shape \[N, 1, \*spatial\]",
        ),
        (
            lambda: OPERATORS.ppcr_gate_backward(X[:, :1].double(), X, W, B, L, 1e-5),
            "grad must have x's dtype",
        ),
        (lambda: OPERATORS.ppcr_add_relu(X, X[:1], W, B, L, 1e-5), "residual must have x's shape"),
        (
            lambda: OPERATORS.ppcr_add_relu(X, X.half(), W, B, L, 1e-5),
            "residual must have x's dtype",
        ),
        (
            lambda: OPERATORS.ppcr_add_relu_backward(X, X, X[:1], W, B, L, 1e-5),
            "y must have x's shape",
        ),
        (
            lambda: OPERATORS.ppcr_add_relu_backward(X[:, :4], X, X, W, B, L, 1e-5),
            "grad must have x's shape",
        ),
        (
            lambda: OPERATORS.ppcr_add_relu_backward(X, X, X.double(), W, B, L, 1e-5),
            "y must have x's dtype",
        ),
    ],
)
def test_operators_called_directly(call, words):
    with pytest.raises(RuntimeError, match=words):
        call()


def test_operators_take_any_stride():
    """Strides that no kernel reads are copied, those of every argument."""
    x = torch.randn(2, 6, 8, 5).transpose(1, 2)  # [2, 8, 6, 5]
    expanded = torch.randn(1, 1, 6, 1).expand(2, 8, 6, 5)
    weight = torch.randn(14)[::2]
    for a in (x, expanded, x[::2].expand(2, -1, -1, -1), x.flip(2)):
        expected = OPERATORS.ppcr_backward(
            expanded.contiguous(), a.contiguous(), weight.contiguous(), B, L, 1e-5
        )
        got = OPERATORS.ppcr_backward(expanded, a, weight, B, L, 1e-5)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
        y = OPERATORS.ppcr_add_relu(a, expanded, weight, B, L, 1e-5)
        assert torch.equal(
            y, OPERATORS.ppcr_add_relu(a.contiguous(), expanded.contiguous(), weight, B, L, 1e-5)
        )


def test_nothing_is_lost_after_an_error():
    module = PPCR(8)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match="channels"):
        module(torch.randn(2, 4, 3))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module(X).shape == X.shape
    assert ppcr_gate(X, W, B).shape == (2, 1, 3)


@pytest.mark.parametrize("number", NUMPY)
def test_numpy_numbers_are_numbers(number):
    """They come out as Python's own: pickles and graphs hold nothing of NumPy."""
    if issubclass(number, np.integer):
        layer = PPCR(number(8), [number(1), 2, number(4)], eps=number(1))
        assert repr(layer.levels) == "(1, 2, 4)"
        assert (type(layer.channels), type(layer.eps)) == (int, float)
        for name in ("ppcr", "ppcr_gate"):
            function = getattr(ppcr_ext, name)
            levels = [number(1), number(2), number(4)]
            assert torch.equal(function(X, W, B, levels=levels), function(X, W, B))
        with pytest.raises(ValueError, match="levels must lie between 1 and the 8 channels"):
            ppcr(X, W, B, levels=(number(9), 1))
        assert PPCR(300, [number(100)] * 3).weight.shape == (300,)  # no overflow of small types
    else:
        layer = PPCR(8, eps=number(0.25), init_gate=number(0.75))
        assert repr((layer.eps, layer.init_gate)) == "(0.25, 0.75)"
        assert torch.equal(ppcr(X, W, B, eps=number(0.25)), ppcr(X, W, B, eps=0.25))
        with pytest.raises(ValueError, match="eps must be positive and finite"):
            ppcr(X, W, B, eps=number("nan"))
        with pytest.raises(TypeError, match="channels must be an int"):
            PPCR(number(8))
        with pytest.raises(TypeError, match="levels must be ints"):
            ppcr(X, W, B, levels=(number(1), 2, 4))


@pytest.mark.parametrize("number", [np.bool_(True), True, torch.tensor(1), "1", None, 1j])
def test_what_is_no_number(number):
    with pytest.raises(TypeError, match="channels must be an int"):
        PPCR(number)
    with pytest.raises(TypeError, match="levels must be ints"):
        ppcr(X, W, B, levels=(number, 2, 4))
    with pytest.raises(TypeError, match="eps must be a float"):
        ppcr(X, W, B, eps=number)
    with pytest.raises(ValueError, match="init_gate must lie between 0 and 1"):
        PPCR(8, init_gate=number)
