"""The Triton kernels in Triton's interpreter.

test_triton.py runs this file with TRITON_INTERPRET=1, in processes of its own.

The interpreter computes a program with NumPy and reads and writes real memory, so that every buffer
lies between guard pages. It truncates to bfloat16 instead of rounding, so that such results are
compared with truncated ones. It cannot show races, nor what the compiler makes of the kernels
(test_triton.py looks at that without running it).
"""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from cases import LEVELS, check_results, make_case
from guard_pages import guarded, sparse
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppcr_ext import testing
from ppcr_ext._triton import launch_rule, operators
from ppcr_ext.testing import DTYPES, LAYOUTS, OPERATORS, relative, tolerance

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_triton.py runs this"
)

SIZES = [
    (2, 8, 3, 5),
    (1, 20, 7, 7),
    (2, 64, 5),
    (5, 64),
    (2, 12, 3, 1, 3),
    (3, 10, 1, 1),
    (1, 260, 33),
]
executed: set[tuple] = set()
programs = 0


@pytest.fixture(scope="session", autouse=True)
def _counts():
    yield
    path = os.environ.get("PPCR_TRITON_COUNTS")
    if path:
        Path(path).write_text(json.dumps({"executed": sorted(executed), "programs": programs}))


@pytest.fixture(scope="session", autouse=True)
def _patch_once():
    """The interpreter patches the language at every call of a device function, which takes most of
    its time."""
    import triton.language as tl
    from triton.language import core
    from triton.runtime import interpreter

    original = interpreter._patch_lang

    def patch(fn):
        if core.is_builtin(tl.load) or core.is_builtin(core.load):
            return original(fn)
        return interpreter._LangPatchScope()

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch

    # Triton 3.6 makes an int of an array of one element, as NumPy 2.4 no longer does.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index


# ---- buffers ----------------------------------------------------------------------------------


def fenced(t: Tensor, at_end: bool) -> Tensor:
    """A copy between guard pages, with the strides of a dense t."""
    storage = guarded(t.numel(), t.dtype, at_end)
    return torch.as_strided(storage, t.shape, t.stride()).copy_(t)


class Fences(TorchDispatchMode):
    """What is allocated lies between guard pages, and holds NaN until it is written."""

    ALLOCATORS = (
        "aten::empty.memory_format",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
    )

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name() in self.ALLOCATORS and result.numel() and result.is_floating_point():
            self.count += 1
            return fenced(torch.full_like(result, float("nan")), self.at_end)
        return result


def calls(case, at_end=True):
    """Output and gradients, as Case.run returns them, from the launchers themselves."""
    return tuple(results_of(case, at_end).values())


def results_of(case, at_end):
    global programs
    mode = operators.MODES[case.operator]
    x, weight, grad = (fenced(t.detach(), at_end) for t in (case.x, case.weight, case.grad))
    bias = None if case.bias is None else fenced(case.bias.detach(), at_end)
    residual = [fenced(case.residual, at_end)] if case.has_residual else []
    with torch.no_grad(), Fences(at_end) as fences:
        rest = (weight, bias, case.levels, case.eps)
        y = operators.forward(mode, x, *residual, *rest)
        saved = [y] if case.has_residual else []
        dx, *d_residual, d_weight, d_bias = operators.backward(mode, grad, x, *saved, *rest)
    assert fences.count >= 4 + (
        bias is not None
    )  # y, dx, partial sums, dweight: the mode sees what the launchers allocate
    layout = "contiguous" if x.is_contiguous() else "channels_last"
    for backward in (False, True):
        problem = operators.problem_of(mode, backward, x, case.levels)
        kernel, grid, _, _ = operators.plan(problem, bias is not None, case.eps)
        programs += grid[0]
        name = (
            kernel.__name__
            + {"ppcr": "", "ppcr_add_relu": " add_relu", "ppcr_gate": " gate"}[case.operator]
        )
        executed.add(
            (
                name,
                str(x.dtype).removeprefix("torch."),
                layout,
                str(tuple(x.shape)),
                str(case.levels),
            )
        )
    found = {"y": y, "dx": dx, "dweight": d_weight, "dbias": None if bias is None else d_bias}
    found["dresidual"] = d_residual[0] if d_residual else None
    return {name: t for name, t in found.items() if t is not None}


# ---- numbers ----------------------------------------------------------------------------------


def as_stored(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In float64, the value that the interpreter stores for t in a bfloat16 tensor. For the other
    types that is t itself."""
    if dtype != torch.bfloat16:
        return t
    return (t.float().view(torch.int32) & -65536).view(torch.float32).double()


def check_numbers(case, at_end=True):
    results = results_of(case, at_end)
    assert not any(t.isnan().any() for t in results.values())
    assert results["y"].stride() == (case.grad if case.operator == "ppcr_gate" else case.x).stride()
    assert results["dx"].stride() == case.x.stride()
    check_results(case, results, stored=as_stored)
    return tuple(results.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_levels(levels, name, dtype, layout):
    channels = max(13, max(levels) + 3)
    check_numbers(
        make_case(name, (2, channels, 5), levels, dtype, layout), at_end=dtype != torch.float16
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes(shape, name, dtype, layout):
    """The default levels at odd sizes of every rank, also without a bias and with parameters of x's
    dtype."""
    odd = sum(shape) % 2 == 1
    case = make_case(
        name, shape, (1, 2, 4), dtype, layout, bias=not odd, parameter_dtype=dtype if odd else None
    )
    check_numbers(case, at_end=len(shape) % 2 == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_2048_channels_of_7_by_7(name, dtype, layout):
    check_numbers(make_case(name, (1, 2048, 7, 7), (1, 2, 4), dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("shape", "levels"),
    [((2, 96, 7, 7), (1, 2, 4)), ((2, 48, 3), (1, 3)), ((1, 272, 5, 1), (1, 1))],
)
def test_small_images_flat(shape, levels, name, dtype, monkeypatch):
    """Rows of several channels with all their pixels; the last chunk of a segment is not full."""
    monkeypatch.setattr(launch_rule, "one_pass_rule", lambda problem: None)
    monkeypatch.setattr(launch_rule, "_FLAT_IMAGES", 1)
    clear_plans()
    case = make_case(name, shape, levels, dtype)
    problem = operators.problem_of(operators.MODES[name], True, case.x, levels)
    options = operators.plan(problem, True, case.eps)[3]
    assert options["FLAT"] == 16 // dtype.itemsize
    check_numbers(case)
    clear_plans()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_equal_segments_both_ways(name, layout, monkeypatch):
    """The levels (1, 2, 4) through the kernels for any levels, in chunks that do not divide the
    segments."""
    case = make_case(name, (2, 56, 9), (1, 2, 4), torch.float32, layout)
    one = check_numbers(case)
    monkeypatch.setattr(launch_rule, "one_pass_rule", lambda problem: None)
    monkeypatch.setattr(launch_rule, "_TWO_PASSES_CHUNK", 4)
    clear_plans()
    two = check_numbers(case)
    clear_plans()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def clear_plans():
    launch_rule.launch_for.cache_clear()
    operators.plan.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("levels", [(1, 2, 4), (1, 3)], ids=str)
def test_offsets_of_64_bits_inside_a_tile(levels, layout, monkeypatch):
    """The kernels for images of over 2^31 elements give the same bits."""
    case = make_case("ppcr_add_relu", (2, 16, 9), levels, torch.float32, layout)
    expected = calls(case)
    monkeypatch.setattr(operators, "_NARROW_OFFSETS", 1)
    clear_plans()
    assert operators.plan(operators.problem_of(0, False, case.x, levels), True, 1e-5)[3]["WIDE"]
    assert all(torch.equal(a, b) for a, b in zip(calls(case), expected, strict=True))
    clear_plans()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("levels", [(1, 2, 4), (1, 3)], ids=str)
def test_more_than_2_to_the_31_elements(levels, layout, monkeypatch):
    """The last program of two images, where offsets of images, of pixels and inside a tile need
    more than 32 bits."""
    from triton.runtime import interpreter

    shape = images, channels, pixels = 2, 16, 1_100_000_003
    count, shown = images * channels * pixels, 3
    case = make_case("ppcr", (1, channels, shown), levels, torch.float16)
    weight, bias = case.weight, case.bias

    def huge():
        flat = sparse(count, torch.float16)
        return (
            flat.view(images, pixels, channels).transpose(1, 2)
            if layout == "channels_last"
            else flat.view(shape)
        )

    x, grad, out = huge(), huge(), huge()
    x[-1:, :, -shown:] = case.x
    grad[-1:, :, -shown:] = case.grad
    builder = interpreter.interpreter_builder
    set_index, set_size = builder.set_grid_idx, builder.set_grid_dim
    exact = testing.truth(case).values
    for backward in (False, True):
        problem = operators.problem_of(0, backward, x, levels)
        kernel, (programs,), arguments, options = operators.plan(problem, True, 1e-5)
        assert options["WIDE"] == (layout == "contiguous")
        monkeypatch.setattr(builder, "set_grid_dim", lambda i, j, k, n=programs: set_size(n, j, k))
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda i, j, k, n=programs: set_index(n - 1, j, k)
        )
        if backward:
            partials = sparse((sum(levels) + 1) * programs, torch.float32).view(-1, programs)
            kernel[(1,)](x, grad, x, weight, bias, out, out, partials, *arguments, **options)
            parameters = torch.cat((exact["dweight"], exact["dbias"]))
            assert relative(partials[:, -1], parameters) <= 1e-4
        else:
            kernel[(1,)](x, x, weight, bias, out, *arguments, **options)
        assert (
            relative(out[-1:, :, -shown:], exact["dx" if backward else "y"])
            <= tolerance(torch.float16, levels).y
        )


# ---- edges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("levels", [(1, 2, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_only_their_own_pixel(value, name, levels, layout):
    case = make_case(name, (2, 12, 7), levels, torch.float32, layout)
    clean = calls(case)
    case.x[1, 4, 2] = value
    dirty = calls(case)
    elsewhere = torch.ones(2, 1, 7, dtype=torch.bool)
    elsewhere[1, 0, 2] = False
    for a, b in zip(clean[:2], dirty[:2], strict=True):
        mask = elsewhere.expand_as(a)
        assert torch.equal(a[mask], b[mask])
    assert not dirty[0][1, :, 2].isfinite().all()
    assert not dirty[2].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("levels", [(1, 2, 4), (1, 3)], ids=str)
def test_zero_variance_tiny_eps_and_large_z(levels, layout):
    for value in (0.0, 3.0):
        for dtype in (torch.float32, torch.float16):
            case = make_case("ppcr", (1, 8, 3), levels, dtype, layout)
            case.x = torch.full_like(case.x, value)
            assert all(t.isfinite().all() for t in calls(case))
            case.eps = 1e-50  # below the smallest normal number
            assert calls(case)[0].isfinite().all()
    case = make_case("ppcr_gate", (1, 8, 3), levels, torch.float32, layout)
    for bias, gate in ((200.0, 1.0), (-200.0, 0.0)):
        case.weight, case.bias = torch.zeros(sum(levels)), torch.tensor([bias])
        results = calls(case)
        assert torch.equal(results[0], torch.full((1, 1, 3), gate))
        assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0), (0, 8)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_empty_tensors(name, shape):
    case = make_case(name, shape, (1, 2, 4), torch.float32)
    y, dx, d_weight, d_bias, *_ = case.run("triton")
    assert y.shape == (shape if name != "ppcr_gate" else (shape[0], 1, *shape[2:]))
    assert dx.shape == shape
    assert torch.equal(d_weight, torch.zeros(7))
    assert torch.equal(d_bias, torch.zeros(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_most_segments_and_many_levels(layout):
    for channels, levels in ((67, (31, 33)), (130, (5, 7, 11)), (3, (1,) * 20), (1, (1, 1))):
        check_numbers(make_case("ppcr", (1, channels, 3), levels, torch.float64, layout))


@pytest.mark.parametrize("name", OPERATORS)
def test_layouts_are_brought_to_that_of_x(name):
    """Other strides of x cost a copy, those of the gradient and the residual too. The results have
    x's own layout."""
    case = make_case(name, (2, 8, 3, 5), (1, 2, 4), torch.float64)
    expected = case.run("triton")
    x, residual, grad = (t.detach() for t in (case.x, case.residual, case.grad))
    case.x = torch.empty(2, 8, 3, 10, dtype=x.dtype)[..., ::2].copy_(x)
    case.residual = residual.contiguous(memory_format=torch.channels_last)
    case.grad = grad.transpose(2, 3).contiguous().transpose(2, 3)
    got = case.run("triton")
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_twice(name):
    case = make_case(name, (3, 16, 11), (1, 2, 4), torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(case.run("triton"), case.run("triton"), strict=True)
    )


def test_every_kernel_was_executed():
    """Last: the tests above have run every kernel on every dtype and layout."""
    got = {entry[:3] for entry in executed}
    names = [
        f"ppcr_{family}_{way}{mode}"
        for family in ("one_pass", "two_passes")
        for way in ("forward", "backward")
        for mode in ("", " add_relu", " gate")
    ]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    layouts = sorted({entry[2] for entry in executed})
    assert got >= set(itertools.product(names, dtypes, layouts))
