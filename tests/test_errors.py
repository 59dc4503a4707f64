"""Bad input: the error's type and its words, from the Python functions and from the operators."""

import math

import numpy as np
import pytest
import torch

import ppcr_ext
from ppcr_ext import PPCR, ppcr, ppcr_add_relu, ppcr_gate
from ppcr_ext._operators import OPERATORS

X = torch.randn(2, 8, 3)
W = torch.randn(7)
B = torch.randn(1)
WIDE = torch.randn(1, 99)  # of many channels
NESTED = torch.nested.nested_tensor([torch.randn(8, 3), torch.randn(8, 5)])
JAGGED = torch.nested.nested_tensor([torch.randn(8, 3), torch.randn(5, 3)], layout=torch.jagged)
NUMPY = [np.int8, np.int64, np.uint8, np.float16, np.float32, np.float64]
META = torch.empty(7, device="meta")

FUNCTIONS = {
    "ppcr": ("x", "weight", "bias"),
    "ppcr_gate": ("x", "weight", "bias"),
    "ppcr_add_relu": ("x", "residual", "weight", "bias"),
}
BACKWARD = {
    "ppcr_backward": ("grad", "x", "weight", "bias"),
    "ppcr_gate_backward": ("gate_grad", "x", "weight", "bias"),
    "ppcr_add_relu_backward": ("grad", "x", "y", "weight", "bias"),
}


def call(function, names, changed, in_order):
    """Calls with good arguments, but for those that are changed; like x are those of its shape."""
    x = changed.get("x", X)
    good = {"x": x, "weight": W, "bias": B, "residual": x, "grad": x, "y": x}
    good["gate_grad"] = x[:, :1] if in_order and x.dim() > 1 else None
    rest = {"levels": (1, 2, 4), "eps": 1e-5, **changed}
    tensors = [changed.get(name, good[name]) for name in names]
    if in_order:
        return function(*tensors, list(rest["levels"]), rest["eps"])
    return function(*tensors, **{key: rest[key] for key in rest if key not in (*names, *good)})


# What is changed; type and words of the error of the functions, and of Triton's operators, which
# check the same way (None: they take it); the words of the compiled operators, whose errors are all
# RuntimeError (None: such a value cannot be handed to an operator).
FLOATS = "x must be float32, float16, bfloat16 or float64"
LIST = "levels must be a sequence of ints"
BETWEEN = r"levels must lie between 1 and the 8 channels of x, got "
WRONG = [
    ({"x": "x"}, TypeError, "x must be a Tensor, got str", None),
    (
        {"x": X.int()},
        TypeError,
        f"{FLOATS}, got torch.int32",
        "x must be float32, float64, float16 or bfloat16, got Int",
    ),
    ({"x": X.cfloat()}, TypeError, f"{FLOATS}, got torch.complex64", "x must be float32.* got Com"),
    ({"x": X[0, 0]}, ValueError, *[r"x must have shape \[N, C, \*spatial\], got \[3\]"] * 2),
    ({"x": torch.randn(())}, ValueError, *[r"x must have shape .* got \[\]"] * 2),
    ({"x": X[:, :0]}, ValueError, "between 1 and the 0 channels", "x must have at least 1 channel"),
    ({"x": NESTED}, TypeError, "x must not be a nested tensor: pass its parts", None),
    ({"x": JAGGED}, TypeError, "x must not be a nested tensor", None),
    ({"x": X.to_sparse()}, TypeError, r"x must be dense, got .* x.to_dense\(\)", None),
    ({"weight": [1.0] * 7}, TypeError, "weight must be a Tensor, got list", None),
    (
        {"weight": W[:6]},
        ValueError,
        r"weight must have shape \[7\] \(one per context: the sum of levels\), got \[6\]",
        r"weight must have shape \[7\], got \[6\]",
    ),
    ({"weight": W[None]}, ValueError, *[r"weight must have shape \[7\].*, got \[1, 7\]"] * 2),
    (
        {"weight": W.double()},
        TypeError,
        "weight must be torch.float32 .*got torch.float64",
        r"weight must be float32 or x's dtype \(float64 for a float64 x\), got Double",
    ),
    ({"weight": W.int()}, TypeError, "weight must be .*got torch.int32", "weight must.* got Int"),
    (
        {"x": X.double(), "bias": None},
        TypeError,
        "weight must be torch.float64 .*got torch.float32",
        "weight must be float32 or x's dtype .* got Float",
    ),
    (
        {"x": X.half(), "weight": W.bfloat16()},
        TypeError,
        "weight must be torch.float32 or torch.float16 where x is .*got torch.bfloat16",
        "weight must be float32 or x's dtype .*got BFloat16",
    ),
    (
        {"weight": W.bfloat16()},
        TypeError,
        r"x.to\(torch.bfloat16\), or weight .*float32\)",
        "weight must be float32 or x's dtype",
    ),
    ({"weight": W.to_sparse()}, TypeError, "weight must be dense, got the layout", None),
    ({"weight": NESTED}, TypeError, "weight must not be a nested tensor", None),
    ({"weight": META}, ValueError, "weight must be on x's device cpu, got meta", None),
    ({"bias": NESTED}, TypeError, "bias must not be a nested tensor", None),
    ({"bias": 0.5}, TypeError, "bias must be a Tensor or None, got float", None),
    ({"bias": torch.ones(2)}, ValueError, *[r"bias must have shape \[1\], got \[2\]"] * 2),
    ({"bias": torch.tensor(0.5)}, ValueError, *[r"bias must have shape \[1\], got \[\]"] * 2),
    (
        {"bias": B.int()},
        TypeError,
        r"bias must be torch.float32 .*got torch.int32; convert bias .* with .to\(torch.float32\)",
        "bias must be float32 .* got Int",
    ),
    ({"bias": META[:1]}, ValueError, "bias must be on x's device cpu, got meta", None),
    ({"levels": ()}, ValueError, *["levels must not be empty"] * 2),
    ({"levels": b"\1\2"}, TypeError, LIST, None),
    ({"levels": (1, 2.0, 4)}, TypeError, r"levels must be ints, got \(1, 2.0, 4\)", None),
    ({"levels": (True, 2, 4)}, TypeError, "levels must be ints", None),
    ({"levels": 7}, TypeError, rf"{LIST} such as \(1, 2, 4\), got 7", None),
    ({"levels": "124"}, TypeError, LIST, None),
    ({"levels": (0, 2, 5)}, ValueError, rf"{BETWEEN}\(0, 2, 5\)", "levels must be at least 1"),
    ({"levels": (-1, 8)}, ValueError, BETWEEN, "levels must be at least 1"),
    (
        {"levels": (1, 9)},
        ValueError,
        rf"{BETWEEN}\(1, 9\)",
        "levels must not exceed the number of channels",
    ),
    ({"levels": (1,), "weight": W[:1]}, ValueError, *["levels need at least 2 contexts"] * 2),
    ({"x": WIDE, "levels": (65,), "weight": WIDE[0, :65]}, None, None, "more than 64 contexts"),
    (
        {"x": WIDE, "levels": (60, 60), "weight": torch.randn(120)},
        None,
        None,
        "more than 64 contexts",
    ),
    ({"eps": 0.0}, ValueError, *["eps must be positive and finite, got 0"] * 2),
    ({"eps": -1e-5}, ValueError, *["eps must be positive and finite, got -1e-05"] * 2),
    ({"eps": math.nan}, ValueError, *["eps must be positive and finite, got nan"] * 2),
    ({"eps": math.inf}, ValueError, *["eps must be positive and finite, got inf"] * 2),
    ({"eps": "small"}, TypeError, "eps must be a float, got 'small'", None),
    ({"backend": "fast"}, ValueError, "backend must be one of .*native.*or None, got 'fast'", None),
]
# Arguments in x's shape. The words of Triton's operators, then those of the compiled ones.
SHAPE = r"\[2, 8, 3\], got \[1, 8, 3\]"
WRONG_MAPS = [
    *(
        row
        for name in ("residual", "grad", "y")
        for row in (
            ({name: X[:1]}, ValueError, f"{name} must have .*{SHAPE}", f"{name} must .*{SHAPE}"),
            ({name: X[:, :4]}, ValueError, f"{name} must have", f"{name} must have x's shape"),
            ({name: X[..., None]}, ValueError, f"{name} must have", f"{name} must have x's shape"),
            (
                {name: X.half()},
                TypeError,
                f"{name} must have x's dtype torch.float32, got torch.float16",
                f"{name} must have x's dtype Float, got Half",
            ),
            ({name: META.expand(2, 8, 7)[..., :3]}, ValueError, f"{name} must be on x's de", None),
        )
    ),
    (
        {"gate_grad": X},
        ValueError,
        r"grad must have shape \[2, 1, 3\], got \[2, 8, 3\]",
        r"grad must have the gate's shape \[N, 1, \*spatial\] of x \[2, 8, 3\], got \[2, 8, 3\]",
    ),
    ({"gate_grad": X[:, :1].double()}, TypeError, *["grad must have x's dtype"] * 2),
]


def rows(signatures):
    """Every row with every function that has the arguments that are changed."""
    for name, names in signatures.items():
        for number, (changed, error, words, own) in enumerate([*WRONG, *WRONG_MAPS]):
            if changed.keys() <= {*names, "levels", "eps", "backend"}:
                what = " ".join(changed)
                yield pytest.param(name, changed, error, words, own, id=f"{name}-{number} {what}")


@pytest.mark.parametrize(("name", "changed", "error", "words", "own"), rows(FUNCTIONS))
def test_functions(name, changed, error, words, own):
    if error is None:  # the reference takes it
        call(getattr(ppcr_ext, name), FUNCTIONS[name], changed, in_order=False)
        return
    with pytest.raises(error, match=words):
        call(getattr(ppcr_ext, name), FUNCTIONS[name], changed, in_order=False)


IN_ORDER = [row for row in rows(FUNCTIONS | BACKWARD) if row.values[-1] is not None]


@pytest.mark.parametrize(("name", "changed", "error", "words", "own"), IN_ORDER)
def test_operators_called_directly(name, changed, error, words, own):
    """No kernel reads what does not fit. Triton's operators say so even where Triton is missing."""
    names = (FUNCTIONS | BACKWARD)[name]
    with pytest.raises(RuntimeError, match=own):
        call(OPERATORS[name].native(), names, changed, in_order=True)
    if error is None:
        error, words = RuntimeError, "at most 64 contexts"
    with pytest.raises(error, match=words):
        call(OPERATORS[name].triton(), names, changed, in_order=True)


@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (None, TypeError, "residual must be a Tensor, got NoneType"),
        (NESTED, TypeError, "residual must not be a nested tensor"),
        (X.to_sparse(), TypeError, "residual must be dense"),
        (X[:1], ValueError, r"residual must have x's shape \[2, 8, 3\], got \[1, 8, 3\]"),
    ],
)
def test_residual(residual, error, words):
    with pytest.raises(error, match=words):
        ppcr_add_relu(X, residual, W, B)
    with pytest.raises(error, match=words):
        PPCR(8).add_relu(X, residual)


def test_a_residual_of_another_dtype_on_a_device_without_autocast():
    x, w = X.to("meta"), W.to("meta")
    with pytest.raises(TypeError, match=r"residual must have x's dtype torch.float32, got"):
        ppcr_add_relu(x, x.half(), w)


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


def test_operators_take_any_stride():
    """Strides that no kernel reads are copied, those of every argument."""
    x = torch.randn(2, 6, 8, 5).transpose(1, 2)  # [2, 8, 6, 5]
    expanded = torch.randn(1, 1, 6, 1).expand(2, 8, 6, 5)
    weight = torch.randn(14)[::2]
    for a in (x, expanded, x[::2].expand(2, -1, -1, -1), x.flip(2)):
        expected = torch.ops.ppcr_ext.ppcr_backward(
            expanded.contiguous(), a.contiguous(), weight.contiguous(), B, [1, 2, 4], 1e-5
        )
        got = torch.ops.ppcr_ext.ppcr_backward(expanded, a, weight, B, [1, 2, 4], 1e-5)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
        y = torch.ops.ppcr_ext.ppcr_add_relu(a, expanded, weight, B, [1, 2, 4], 1e-5)
        assert torch.equal(
            y,
            torch.ops.ppcr_ext.ppcr_add_relu(
                a.contiguous(), expanded.contiguous(), weight, B, [1, 2, 4], 1e-5
            ),
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
    with pytest.raises(TypeError, match="init_gate must be a float"):
        PPCR(8, init_gate=number)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_what_is_no_bool(value):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1))
    with pytest.raises(TypeError, match=f"bias must be a bool, got {value!r}"):
        PPCR(8, bias=value)
    with pytest.raises(TypeError, match=f"^fuse must be a bool, got {value!r}"):
        ppcr_ext.insert_ppcr(network, modules=["0"], fuse=value)
    with pytest.raises(TypeError, match=f"^verbose must be a bool, got {value!r}"):
        ppcr_ext.build(verbose=value)
