"""What the tests of emulated_*.py share. tests/test_cuda_host.py runs them, on emulated devices."""

from __future__ import annotations

import pytest
import torch
from cases import Case, check_results, make_case
from cuda_host import hooks

import ppcr_ext
from ppcr_ext import testing

OPS = torch.ops.ppcr_ext
LEVELS_EPS = ([1, 2, 4], 1e-5)
every_operator = pytest.mark.parametrize("operator", testing.OPERATORS)
both_layouts = pytest.mark.parametrize("layout", testing.LAYOUTS)


@pytest.fixture(autouse=True)
def _fresh():
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    hooks.forget()
    yield
    torch.cuda.synchronize()


def case(operator="ppcr", shape=(2, 64, 14, 14), device="cuda:0", **options) -> Case:
    return make_case(operator, shape, device=device, **options)


def direct(case: Case, grad=None, y=None, residual=None):
    """The compiled operators without autograd: y, and the gradients in their order."""
    maps = (case.residual if residual is None else residual,) if case.has_residual else ()
    parameters = (case.weight, case.bias, list(case.levels), case.eps)
    forward, backward = {
        "ppcr": (OPS.ppcr, OPS.ppcr_backward),
        "ppcr_gate": (OPS.ppcr_gate, OPS.ppcr_gate_backward),
        "ppcr_add_relu": (OPS.ppcr_add_relu, OPS.ppcr_add_relu_backward),
    }[case.operator]
    result = forward(case.x, *maps, *parameters)
    saved = (result if y is None else y,) if case.has_residual else ()
    grad = case.grad if grad is None else grad
    return result, backward(grad, case.x, *saved, *parameters)


def check(case: Case) -> None:
    """Numbers of the native backend, with autograd."""
    check_results(case, case.results("native"))


def check_forward(y: torch.Tensor, case: Case) -> None:
    expected = ppcr_ext.ppcr(
        case.x.cpu().double(), case.weight.cpu().double(), case.bias.cpu().double()
    )
    assert y.device == case.x.device
    assert (y.cpu().double() - expected).norm() <= 1e-5 * expected.norm()
