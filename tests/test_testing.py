"""The float64 truth against autograd's derivatives of the definition, and what the errors catch."""

import math

import pytest
import torch

import ppcr_ext
from ppcr_ext import reference, testing

LEVELS = [(1, 2, 4), (2,), (3, 5), (2, 2, 9)]
SHAPES = [(3, 12), (2, 19, 7, 5), (2, 9, 2, 3, 4)]


def definition(operator):
    """The reference, called as the functions are."""
    function = getattr(reference, operator)
    return lambda *tensors, levels, eps: function(*tensors, levels, eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("operator", testing.OPERATORS)
def test_truth_is_the_definition_and_its_derivatives(operator, levels, shape, bias):
    inputs = testing.make_inputs(operator, shape, levels, torch.float64, bias=bias)
    results = testing.evaluate(definition(operator), inputs)
    exact = testing.truth(inputs)
    expected = {"y", "dx", "dweight"} | ({"dbias"} if bias else set())
    assert results.keys() == expected | ({"dresidual"} if inputs.has_residual else set())
    for name, got in results.items():
        assert got.shape == exact.values[name].shape
        assert exact.error(name, got) <= 1e-13, name


@pytest.mark.parametrize("operator", testing.OPERATORS)
def test_scales_are_the_sums_of_absolute_terms(operator):
    """Each parameter's gradient is a sum over pixels: the sum of the absolute value of every term."""
    inputs = testing.make_inputs(operator, (2, 8, 3), dtype=torch.float64)
    exact = testing.truth(inputs)
    terms = {"dweight": 0, "dbias": 0}
    for n in range(2):
        for p in range(3):
            maps = {
                key: getattr(inputs, key)[n : n + 1, :, p : p + 1]
                for key in ("x", "residual", "grad")
            }
            pixel = testing.Inputs(operator, weight=inputs.weight, bias=inputs.bias, **maps)
            one = testing.evaluate(definition(operator), pixel)
            for name in terms:
                terms[name] = terms[name] + one[name].abs()
    for name, expected in terms.items():
        torch.testing.assert_close(exact.scales[name], expected, rtol=1e-12, atol=1e-15)
    changed = {name for name in exact.values if exact.scales[name] is not exact.values[name]}
    assert changed == {"dweight", "dbias"} | ({"dx"} if operator == "ppcr_gate" else set())
    if operator == "ppcr_gate":
        assert (exact.scales["dx"] >= exact.values["dx"].abs() * (1 - 1e-12)).all()


def test_mask_of_a_given_output():
    inputs = testing.make_inputs("ppcr_add_relu", (2, 8, 3, 3))
    y = torch.zeros_like(inputs.x)
    y[0] = 1
    exact = testing.truth(inputs, y)
    assert torch.equal(exact.values["dresidual"][0], inputs.grad[0].double())
    assert not exact.values["dresidual"][1].any()
    assert not exact.values["dx"][1].any()
    assert testing.truth(inputs).values["dx"][1].any()


@pytest.mark.parametrize("name", ["y", "dx", "dweight", "dbias", "dresidual"])
def test_one_wrong_result_is_not_within_the_tolerance(name):
    inputs = testing.make_inputs("ppcr_add_relu", (4, 16, 5, 5))
    exact, limits = testing.truth(inputs), testing.tolerance(torch.float32)
    results = testing.evaluate(ppcr_ext.ppcr_add_relu, inputs, backend="reference")
    assert exact.errors(results).within(limits)
    for wrong in (results[name] * 1.001, torch.full_like(results[name], math.nan)):
        assert not exact.errors(results | {name: wrong}).within(limits)


def test_zero_is_only_zero():
    """Where the exact values vanish, nothing but zeros is right."""
    assert testing.relative(torch.zeros(3), torch.zeros(3).double()) == 0
    assert testing.relative(torch.full((3,), 1e-30), torch.zeros(3).double()) > 1


def test_tolerances_of_the_specification():
    limits = {
        torch.float64: (1e-11, 1e-11, 1e-11),
        torch.float16: (7e-4, 7e-4, 7e-4),
        torch.bfloat16: (5e-3, 5e-3, 5e-3),
        torch.float32: (1e-5, 5e-5, 1e-5),
    }
    assert set(limits) == set(testing.DTYPES)
    for dtype, expected in limits.items():
        assert testing.tolerance(dtype) == testing.Errors(*expected)
    assert testing.tolerance(torch.float32, [1, 2]) == testing.Errors(5e-5, 3e-4, 5e-5)
    assert testing.tolerance(torch.float32, [1, 2, 4]) == testing.Errors(1e-5, 5e-5, 1e-5)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3), (2, 5, 3, 4), (2, 5, 3, 4, 2)], ids=str)
def test_layouts(shape):
    t = torch.randn(shape)
    assert testing.to_layout(t.transpose(0, 1), "contiguous").is_contiguous()
    last = testing.to_layout(t, "channels_last")
    assert torch.equal(last, t)
    assert last.movedim(1, -1).is_contiguous()
    if len(shape) == 4:
        assert last.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="layout must be one of"):
        testing.to_layout(t, "channels-last")


def test_inputs_in_another_dtype_and_layout():
    inputs = testing.make_inputs("ppcr", (2, 8, 3, 3))
    moved = inputs.to(torch.float16, "channels_last")
    assert moved.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.x, inputs.x.half())
    assert (moved.grad.dtype, moved.residual.dtype) == (torch.float16, torch.float16)
    assert moved.weight.dtype == torch.float32
    drawn = testing.make_inputs("ppcr", (2, 8, 3, 3), dtype=torch.float16, layout="channels_last")
    torch.testing.assert_close(moved.x, drawn.x, rtol=1e-3, atol=1e-3)
