"""Every backend against a float64 evaluation of the same stored inputs: dtypes, layouts, ranks 2 to 5, levels, odd sizes."""

import pytest
import torch
from conftest import (
    BACKENDS,
    DEVICES,
    DTYPES,
    LAYOUTS,
    LEVELS,
    OPERATORS,
    absolute_terms,
    make_case,
    relative_error,
    tolerance,
)

import ppcr_ext

SPATIAL = [(), (13,), (7, 5), (19, 23), (3, 5, 3), (1, 1), (2, 2)]


def test_native_backend_is_here():
    """The tests below would prove little without it."""
    assert ppcr_ext.available_backends()[0] == "native", ppcr_ext.backends()


def check(case, limits, backends=("native",)):
    expected = case.in_float64().run("reference")
    for backend in backends:
        compare(case, expected, limits, backend)


def compare(case, expected, limits, backend):
    y, dx, *d_parameters = case.run(backend)
    d_weight, d_bias = d_parameters[0], d_parameters[1] if case.bias is not None else None
    dx_terms, weight_terms, bias_terms = absolute_terms(case)
    where = f"{backend} {case.name} {list(case.x.shape)} {case.x.dtype} {case.levels}"
    assert (y.dtype, dx.dtype, d_weight.dtype) == (case.x.dtype, case.x.dtype, case.weight.dtype), (
        where
    )
    errors = {
        "y": relative_error(y, expected[0]),
        # Of the gate alone x's gradient is a difference that nearly cancels, exactly so for two contexts.
        "dx": relative_error(dx, expected[1], dx_terms if case.name == "ppcr_gate" else None),
        "dweight": relative_error(d_weight, expected[2], weight_terms),
    }
    if d_bias is not None:
        errors["dbias"] = relative_error(d_bias, expected[3], bias_terms)
    if case.name == "ppcr_add_relu":
        # Where rounding decides the sign of x g + r the mask may differ: compare where it does not.
        same = (y.cpu() > 0) == (expected[0] > 0)
        assert same.double().mean() > 0.999, where
        errors["dresidual"] = relative_error(d_parameters[-1].cpu() * same, expected[-1] * same)
        errors["dx"] = relative_error(dx.cpu() * same, expected[1] * same)
    for key, error in errors.items():
        limit = limits[key if key in limits else "dx" if key == "dresidual" else "parameters"]
        assert error <= limit, f"{where}: {key} is off by {error:.1e}, allowed {limit:.0e}"


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_against_float64(device, dtype, layout, levels):
    for channels in {16: (16, 19, 40), 64: (64, 67)}[64 if levels == (64,) else 16]:
        for i, spatial in enumerate(SPATIAL):
            for name in OPERATORS:
                case = make_case(
                    name,
                    (5, channels, *spatial),
                    levels,
                    dtype,
                    layout,
                    device=device,
                    seed=i,
                    bias=i % 3 != 1,
                )
                check(case, tolerance(dtype, levels), BACKENDS)


@pytest.mark.parametrize(
    "shape",
    [(2, 64, 56, 56), (2, 2048, 7, 7), (1, 1024, 14, 14), (2, 130, 33, 31), (517, 12, 5, 7)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_network_shapes(device, dtype, layout, shape):
    torch.set_num_threads(2)
    for name in OPERATORS:
        levels = (1, 2, 4)
        # 517 images: more tiles than chunks. 130 channels: unequal segments, so the tolerance for any levels.
        limits = tolerance(dtype, levels if shape[1] % 4 == 0 else (1, 3))
        check(make_case(name, shape, levels, dtype, layout, device=device), limits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_parameters_of_the_half_type(device, dtype):
    """weight and bias in x's own 16-bit type; their gradients too, rounded once."""
    case = make_case("ppcr", (3, 12, 6, 5), (1, 2, 4), dtype, parameter_dtype=dtype, device=device)
    check(case, tolerance(dtype, case.levels), BACKENDS)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_grows_only_with_the_conditioning(backend, offset):
    """Normalization amplifies rounding by max|t| / sqrt(var + eps): a large offset may cost that much, and no more."""
    case = make_case("ppcr_gate", (4, 32, 9, 11), (1, 2, 4), torch.float32)
    case.x = (case.x + offset).detach()
    wide = case.in_float64()
    contexts = torch.cat([wide.x.unflatten(1, (k, -1)).mean(2) for k in case.levels], 1)
    factor = contexts.abs().amax(1) / (contexts.var(1, unbiased=False) + case.eps).sqrt()
    expected = wide.run("reference")[0]
    error = (case.run(backend)[0] - expected).abs()
    unit_roundoff = 2.0**-24
    slope = 0.25 * case.weight.abs().sum().item()  # of the gate over one normalized context
    assert (error[:, 0] <= 16 * unit_roundoff * (1 + slope * factor)).all()
