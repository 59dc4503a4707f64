"""What the tests of emulated_*.py share. tests/test_cuda_host.py runs them, on emulated devices."""

import pytest
import torch
from cases import Case, check_results, make_case

import ppcr_ext
from ppcr_ext import testing

OPS = torch.ops.ppcr_ext
LEVELS_EPS = ([1, 2, 4], 1e-5)
every_operator = pytest.mark.parametrize("operator", testing.OPERATORS)
both_layouts = pytest.mark.parametrize("layout", testing.LAYOUTS)


def forward(case: Case, x: torch.Tensor | None = None) -> torch.Tensor:
    """The forward pass of the compiled ppcr."""
    return OPS.ppcr(case.x if x is None else x, case.weight, case.bias, *LEVELS_EPS)


def case(operator="ppcr", shape=(2, 64, 14, 14), device="cuda:0", **options) -> Case:
    return make_case(operator, shape, device=device, **options)


def direct(case: Case, grad=None, y=None, residual=None):
    """The compiled operators without autograd: y, and the gradients in their order."""
    maps = (case.residual if residual is None else residual,) if case.has_residual else ()
    parameters = (case.weight, case.bias, list(case.levels), case.eps)
    result = getattr(OPS, case.operator)(case.x, *maps, *parameters)
    saved = (result if y is None else y,) if case.has_residual else ()
    backward = getattr(OPS, f"{case.operator}_backward")
    return result, backward(case.grad if grad is None else grad, case.x, *saved, *parameters)


def check(case: Case) -> None:
    """Numbers of the native backend, with autograd."""
    check_results(case, case.results("native"))


def check_forward(y: torch.Tensor, case: Case) -> None:
    expected = ppcr_ext.ppcr(
        case.x.cpu().double(), case.weight.cpu().double(), case.bias.cpu().double()
    )
    assert y.device == case.x.device
    assert (y.cpu().double() - expected).norm() <= 1e-5 * expected.norm()
