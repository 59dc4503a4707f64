"""Every backend against a float64 evaluation of the same stored inputs: dtypes, layouts, ranks 2 to
5, levels, odd sizes."""

import pytest
import torch
from cases import BACKENDS, DEVICES, LEVELS, check_numbers, make_case

import ppcr_ext
from ppcr_ext import testing
from ppcr_ext.testing import DTYPES, LAYOUTS, OPERATORS

SPATIAL = [(), (13,), (7, 5), (19, 23), (3, 5, 3), (1, 1), (2, 2)]


def test_native_backend_is_here():
    """The tests below would prove little without it."""
    assert ppcr_ext.available_backends()[0] == "native", ppcr_ext.backends()


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_against_float64(device, dtype, layout, levels):
    options = {"device": device}
    for channels in {16: (16, 19, 40), 64: (64, 67)}[64 if levels == (64,) else 16]:
        for i, spatial in enumerate(SPATIAL):
            options |= {"seed": i, "bias": i % 3 != 1}
            for name in OPERATORS:
                case = make_case(name, (5, channels, *spatial), levels, dtype, layout, **options)
                for backend in BACKENDS:
                    check_numbers(case, backend)


@pytest.mark.parametrize(
    "shape",
    [(2, 64, 56, 56), (2, 2048, 7, 7), (1, 1024, 14, 14), (2, 130, 33, 31), (517, 12, 5, 7)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_network_shapes(device, dtype, layout, shape):
    """517 images are more tiles than chunks. 130 channels make unequal segments, for which the
    tolerance of any levels holds."""
    torch.set_num_threads(2)
    limits = testing.tolerance(dtype, (1, 2, 4) if shape[1] % 4 == 0 else (1, 3))
    for name in OPERATORS:
        case = make_case(name, shape, (1, 2, 4), dtype, layout, device=device)
        check_numbers(case, "native", limits)


@pytest.mark.parametrize("name", OPERATORS)
def test_parts_of_small_planes(name):
    """So many channels that the sequential method cuts a plane of 49 pixels into tiles."""
    check_numbers(make_case(name, (1, 10704, 7, 7), (1, 2, 4), torch.float64), "native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_parameters_of_the_half_type(device, backend, dtype):
    """weight and bias in x's own 16-bit type; their gradients too, rounded once."""
    case = make_case("ppcr", (3, 12, 6, 5), (1, 2, 4), dtype, parameter_dtype=dtype, device=device)
    check_numbers(case, backend)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_grows_only_with_the_conditioning(backend, offset):
    """Normalization amplifies rounding by max|t| / sqrt(var + eps): a large offset may cost that
    much, and no more."""
    case = make_case("ppcr_gate", (4, 32, 9, 11), (1, 2, 4), torch.float32)
    case.x = case.x + offset
    contexts = torch.cat([case.x.double().unflatten(1, (k, -1)).mean(2) for k in case.levels], 1)
    factor = contexts.abs().amax(1) / (contexts.var(1, unbiased=False) + case.eps).sqrt()
    error = (case.run(backend)[0] - testing.truth(case).values["y"]).abs()
    unit_roundoff = 2.0**-24
    slope = 0.25 * case.weight.abs().sum().item()  # of the gate over one normalized context
    assert (error[:, 0] <= 16 * unit_roundoff * (1 + slope * factor)).all()
