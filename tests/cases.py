"""Cases of the operators: inputs of ppcr_ext.testing that run and are checked on a backend."""

import dataclasses
import os

import torch
from torch import Tensor

import ppcr_ext
from ppcr_ext import testing

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
# With another capability of the CPU kernels the reference is what it was.
BACKENDS = ["native"] if "PPCR_EXPECTED_CAPABILITY" in os.environ else ["native", "reference"]
# Where float64 is evaluated: a GPU is quicker than the CPU beside it.
TRUTH_DEVICE = os.environ.get("PPCR_TRUTH_DEVICE", "cpu")
LEVELS = [(1, 2, 4), (1, 2), (2,), (3, 5), (1, 2, 4, 8), (1, 3, 7), (2, 2, 9), (64,)]


class Case(testing.Inputs):
    @property
    def inputs(self) -> list[Tensor]:
        """What gradients are taken of, in their order."""
        tensors = [self.x, self.weight, *([] if self.bias is None else [self.bias])]
        return [*tensors, self.residual] if self.has_residual else tensors

    def run(self, backend: str | None) -> tuple[Tensor, ...]:
        """Output and gradients of (x, weight[, bias][, residual]), which require gradients then."""
        for t in self.inputs:
            t.requires_grad_()
        return tuple(self.results(backend).values())

    def results(self, backend: str | None) -> dict[str, Tensor]:
        return testing.evaluate(getattr(ppcr_ext, self.operator), self, backend=backend)


def make_case(*arguments: object, **options: object) -> Case:
    """As testing.make_inputs."""
    inputs = testing.make_inputs(*arguments, **options)
    return Case(**{f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)})


def run(
    operator: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, **options
) -> Tensor:
    """Calls one of the three functions, with the residual where it takes one."""
    maps = (x, residual) if operator == "ppcr_add_relu" else (x,)
    return getattr(ppcr_ext, operator)(*maps, weight, bias, **options)


def check_numbers(
    case: Case, backend: str, limits: testing.Errors | None = None
) -> tuple[Tensor, ...]:
    """Output and gradients of a backend, checked as by check_results."""
    results = case.results(backend)
    check_results(case, results, limits=limits, what=backend)
    return tuple(results.values())


def check_results(
    case: Case,
    results: dict[str, Tensor],
    *,
    limits: testing.Errors | None = None,
    stored=lambda exact, dtype: exact,
    what: str = "",
) -> None:
    """Results against float64, within the tolerances; dtypes, and x's strides.

    ``stored`` is what the exact values become in a dtype, for an interpreter that truncates them.
    The gradients of add_relu are masked by the stored y, and that of the residual is exact.
    """
    exact = testing.truth(case, results["y"], device=TRUTH_DEVICE)
    values = {name: stored(exact.values[name], got.dtype) for name, got in results.items()}
    errors = testing.Truth(values, exact.scales).errors(results)
    limits = limits or testing.tolerance(case.x.dtype, case.levels)
    where = f"{what} {case.operator} {list(case.x.shape)} {case.x.dtype} {case.levels}"
    assert errors.within(limits), f"{where}: off by {errors}, allowed {limits}"
    if case.has_residual:
        shown = results["y"] > 0
        expected = exact.values["y"] > 0
        assert (expected == shown.to(expected.device)).double().mean() > 0.999, where
        assert torch.equal(results["dresidual"], torch.where(shown, case.grad, 0))
        assert results["y"].min() >= 0
    for name, got in results.items():
        like = case.x if name == "y" else getattr(case, name[1:])
        assert got.dtype == like.dtype, f"{where}: {name}"
        kernels = what != "reference"  # autograd alone decides its layout of dx
        if name in ("y", "dx") and kernels and got.shape == case.x.shape:
            assert strides(got) == strides(case.x), f"{where}: {name}"


def strides(t: Tensor) -> list[int]:
    """Those of the dimensions that have more than one element."""
    return [s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1]
