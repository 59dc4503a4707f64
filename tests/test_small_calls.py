"""Calls whose arguments only the compiled operators check: the same results, and the same errors
as the checks in Python raise."""

import pytest
import torch

import ppcr_ext
from ppcr_ext import _dispatch, _native, functional

pytestmark = pytest.mark.skipif(_native.library is None, reason="needs the compiled kernels")
LEVELS = (1, 2, 4)
X, W, B = torch.randn(2, 8, 3, 3), torch.linspace(-1, 1, 7), torch.zeros(1)


@pytest.fixture(autouse=True)
def _forget():
    functional._checked.clear()


def raised(function, *arguments, **options):
    with pytest.raises((TypeError, ValueError)) as found:
        function(*arguments, **options)
    error = found.value
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    return type(error), str(error)


WRONG = {
    "no tensor": ([1.0], W, B),
    "integers": (X.long(), W, B),
    "one dimension": (X[0, 0, 0], W, B),
    "fewer channels than bins": (X[:, :3], W, B),
    "sparse": (X.to_sparse(), W, B),
    "nested": (torch.nested.nested_tensor([X[0], X[1]], layout=torch.strided), W, B),
    "no weight": (X, None, B),
    "weight is a list": (X, W.tolist(), B),
    "weight of double": (X, W.double(), B),
    "weight too short": (X, W[:6], B),
    "weight of two dimensions": (X, W[None], B),
    "weight without memory": (X, W.to("meta"), B),
    "sparse weight": (X, W.to_sparse(), B),
    "bias of integers": (X, W, B.long()),
    "bias without memory": (X, W, B.to("meta")),
    "two biases": (X, W, W[:2]),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("grad", [False, True])
def test_errors_are_the_same(wrong, grad):
    x, weight, bias = WRONG[wrong]
    if grad and isinstance(weight, torch.Tensor):
        weight = weight.clone().requires_grad_()
    unknown = raised(ppcr_ext.ppcr, x, weight, bias, levels=LEVELS)
    ppcr_ext.ppcr(X, W, B, levels=LEVELS)
    assert id(LEVELS) in functional._checked
    assert raised(ppcr_ext.ppcr, x, weight, bias, levels=LEVELS) == unknown


@pytest.mark.parametrize(
    "residual",
    [None, X.double(), X[:1], X.to("meta"), X.to_sparse(), X.tolist()],
    ids=lambda r: type(r).__name__,
)
def test_errors_of_a_residual_are_the_same(residual):
    unknown = raised(ppcr_ext.ppcr_add_relu, X, residual, W, B, levels=LEVELS)
    ppcr_ext.ppcr(X, W, B, levels=LEVELS)
    assert raised(ppcr_ext.ppcr_add_relu, X, residual, W, B, levels=LEVELS) == unknown


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf"), True, "small"])
def test_errors_of_eps_are_the_same(eps):
    unknown = raised(ppcr_ext.ppcr, X, W, B, levels=LEVELS, eps=eps)
    ppcr_ext.ppcr(X, W, B, levels=LEVELS)
    assert raised(ppcr_ext.ppcr, X, W, B, levels=LEVELS, eps=eps) == unknown


def test_levels_that_equal_known_ones():
    """True is 1 and 1.0 is 1, but not as a level."""
    ppcr_ext.ppcr(X, W, B, levels=LEVELS)
    for levels in ((True, 2, 4), (1.0, 2, 4)):
        assert raised(ppcr_ext.ppcr, X, W, B, levels=levels)[0] is TypeError


def test_known_arguments_are_not_checked_again(monkeypatch):
    layer = ppcr_ext.PPCR(8)
    expected = layer(X), layer(X, X), layer.gate(X)

    def never(*arguments):
        raise AssertionError("checked again")

    monkeypatch.setattr(functional, "check_arguments", never)
    assert torch.equal(ppcr_ext.ppcr(X, layer.weight, backend="native", levels=layer.levels), X / 2)
    for got, first in zip((layer(X), layer(X, X), layer.gate(X)), expected, strict=True):
        assert torch.equal(got, first)
    with pytest.raises(AssertionError, match="checked again"):
        ppcr_ext.ppcr(X, W, B, levels=[1, 2, 4])


def test_autocast_converts_a_residual():
    x = X.bfloat16()
    ppcr_ext.ppcr(x, W, B, levels=LEVELS)
    with torch.autocast("cpu", torch.bfloat16):
        y = ppcr_ext.ppcr_add_relu(x, X, W, B, levels=LEVELS)
    assert torch.equal(y, ppcr_ext.ppcr_add_relu(x, X.bfloat16(), W, B, levels=LEVELS))


def test_what_is_known_is_bounded():
    for i in range(200):
        ppcr_ext.ppcr(X, W, B, levels=tuple([1, 2, 4] if i else LEVELS))
    assert 0 < len(functional._checked) <= 64


def test_a_warning_names_the_line_of_the_caller(monkeypatch):
    monkeypatch.setattr(_native, "library", None)
    monkeypatch.setattr(_native, "_reason", "a test")
    monkeypatch.setattr(_dispatch, "_warned", set())
    with pytest.warns(RuntimeWarning, match="slow PyTorch reference") as found:
        ppcr_ext.ppcr(X, W, B)
    assert found[0].filename == __file__
