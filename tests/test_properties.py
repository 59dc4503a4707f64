"""Random inputs of every kind against the float64 definition, and metamorphic tests, which need no
definition.

A fixed selection runs with the tests; ``make test-property`` (PPCR_HYPOTHESIS=nightly) draws
thousands anew.
"""

import math
import os

import pytest
import torch
from cases import run

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import ppcr_ext
from ppcr_ext import reference
from ppcr_ext.testing import DTYPES, OPERATORS, to_layout

pytestmark = pytest.mark.full

NIGHTLY = os.environ.get("PPCR_HYPOTHESIS") == "nightly"
settings.register_profile("fixed", max_examples=500, derandomize=True, deadline=None, database=None)
settings.register_profile("nightly", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile("nightly" if NIGHTLY else "fixed")
METAMORPHIC = settings(max_examples=500 if NIGHTLY else 50)

# Errors are allowed this many times u (1 + A) (1 + sum |weight|) of the terms that a result is made
# of, with u the unit roundoff of the accumulation type. A = max_l mean |x over bin l| / sqrt(var +
# eps) is by how much normalization amplifies the rounding of the contexts: the spacing of what is
# summed, over the spread that divides it. The output is rounded once more.
CONSTANT = 4
torch.set_printoptions(threshold=10)  # for the failing example
statistics = {"examples": 0, "comparisons": 0, "worst": 0.0, "of": ""}


def rounded_like(t, dtype):
    """Half a unit in the last place of ``dtype``, which storing a value may change; of subnormals,
    too."""
    info = torch.finfo(dtype)
    return t.abs() * (info.eps / 2) + info.smallest_normal * info.eps


LAYOUTS = [
    "contiguous",
    "channels_last",
    "transposed",
    "sliced",
    "expanded",
    "flipped",
    "offset",
    "shuffled",
]


def laid_out(t, layout, draw):
    """``t``'s values in memory of another kind (expanded: of the first sample alone)."""
    if layout == "channels_last":
        return to_layout(t, "channels_last")
    if layout == "transposed" and t.dim() > 3:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "expanded":
        return t[:1].expand_as(t)
    if layout == "flipped":
        return t.flip(0, -1).flip(0, -1)
    if layout == "offset":
        offset = draw(st.integers(1, 7))
        storage = torch.full((offset + t.numel(),), math.nan, dtype=t.dtype)
        view = storage[offset:].view(t.shape)
        return view.copy_(t)
    if layout == "shuffled":
        order = draw(st.permutations(range(t.dim())))
        return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])
    return t.contiguous()


@st.composite
def problems(draw, dtypes=tuple(DTYPES), layouts=tuple(LAYOUTS)):
    """An operator with its inputs, and which of them want gradients."""
    name = draw(st.sampled_from(OPERATORS))
    dtype = draw(st.sampled_from(dtypes))
    channels = draw(st.one_of(st.integers(2, 20), st.integers(2, 160)))
    spatial = draw(
        st.lists(st.integers(1, 9), max_size=4).filter(
            lambda sizes: math.prod(sizes) * channels <= 6000
        )
    )
    shape = (draw(st.integers(1, 4)), channels, *spatial)
    anything = st.lists(st.integers(1, min(channels, 30)), min_size=1, max_size=4).filter(
        lambda levels: 2 <= sum(levels) <= 64
    )
    levels = draw(
        st.one_of(st.just((1, 2, 4)), anything.map(tuple)) if channels >= 4 else anything.map(tuple)
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(*size, mean=0.0, spread=1.0):
        return torch.randn(size, generator=generator, dtype=torch.float64) * spread + mean

    mean, spread = draw(
        st.sampled_from([(1.5, 2.0), (0.0, 1.0), (0.0, 0.01), (100.0, 1.0), (-3.0, 20.0)])
    )
    wide_parameters = draw(st.booleans())
    parameter_dtype = torch.promote_types(dtype, torch.float32) if wide_parameters else dtype
    x = laid_out(
        random(*shape, mean=mean, spread=spread).to(dtype), draw(st.sampled_from(layouts)), draw
    )
    residual = laid_out(
        random(*shape, spread=spread).to(dtype), draw(st.sampled_from(layouts)), draw
    )
    y_shape = (shape[0], 1, *spatial) if name == "ppcr_gate" else shape
    grad = laid_out(random(*y_shape).to(dtype), draw(st.sampled_from(layouts)), draw)
    weight = random(sum(levels), spread=draw(st.sampled_from([0.0, 0.3, 2.0]))).to(parameter_dtype)
    if draw(st.booleans()):
        weight = laid_out(weight.view(1, -1), "sliced", draw)[0]
    bias = random(1).to(parameter_dtype) if draw(st.booleans()) else None
    eps = draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    wanted = draw(st.sets(st.sampled_from(["x", "residual", "weight", "bias"])))
    return name, x, residual, weight, bias, grad, levels, eps, wanted


def evaluate(name, x, residual, weight, bias, grad, levels, eps, wanted):
    """Output and the wanted gradients of the native backend, by name."""
    inputs = {"x": x, "weight": weight} | ({"bias": bias} if bias is not None else {})
    inputs |= {"residual": residual} if name == "ppcr_add_relu" else {}
    leaves = {key: t.detach() for key, t in inputs.items()}
    for key in wanted & leaves.keys():
        leaves[key].requires_grad_()
    options = {"levels": levels, "eps": eps, "backend": "native"}
    y = run(
        name, leaves["x"], leaves.get("residual"), leaves["weight"], leaves.get("bias"), **options
    )
    chosen = sorted(wanted & leaves.keys())
    assert y.requires_grad == bool(chosen)
    gradients = torch.autograd.grad(y, [leaves[key] for key in chosen], grad) if chosen else ()
    return y.detach(), dict(zip(chosen, gradients, strict=True))


@given(problems())
def test_against_float64(problem):
    name, x, residual, weight, bias, grad, levels, eps, _ = problem
    y, gradients = evaluate(*problem)
    assert y.dtype == x.dtype
    for key, gradient in gradients.items():
        like = {"x": x, "residual": residual, "weight": weight, "bias": bias}[key]
        assert (gradient.dtype, gradient.shape) == (like.dtype, like.shape)

    # In float64, with the bias spread out so that its gradient is dz of every pixel.
    wide = x.double().detach().requires_grad_()
    w = weight.double().detach().requires_grad_()
    b = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
    pixels = (x.shape[0], 1, *x.shape[2:])
    b = b.view(1, 1, *[1] * (x.dim() - 2)).expand(pixels).clone().requires_grad_()
    gate = reference.ppcr_gate(wide, w, b, levels, eps)
    gy = grad.double()
    if name == "ppcr_gate":
        expected_y, differentiated = gate, gate
    else:
        differentiated = expected_y = wide * gate
    if name == "ppcr_add_relu":
        expected_y = (expected_y + residual.double()).relu()
        gy = torch.where(y <= 0, 0, gy)  # the operator's own mask, whatever rounding made of y
    dx, dw, dz = torch.autograd.grad(differentiated, (wide, w, b), gy)

    with torch.no_grad():
        spans = [span for level in levels for span in reference.bins(x.shape[1], level)]
        contexts = torch.stack([wide[:, begin:end].mean(1) for begin, end in spans], 1)
        magnitudes = torch.stack([wide[:, begin:end].abs().mean(1) for begin, end in spans], 1)
        centred = contexts - contexts.mean(1, keepdim=True)
        deviation = (centred.square().mean(1, keepdim=True) + eps).sqrt()
        n, per_context = (centred / deviation).abs(), (-1, *[1] * (x.dim() - 2))
        amplified = 1 + magnitudes.amax(1, keepdim=True) / deviation
        size = w.abs().view(per_context)
        unit = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps / 2
        factor = unit * amplified * (1 + size.sum())
        # What the results are sums of, per pixel, each with its own factor. 1 - g is formed from g,
        # as in torch, and so is no better than one unit of g.
        dg = gy.abs() if name == "ppcr_gate" else (gy * wide).abs().sum(1, keepdim=True)
        dz_errors = dg * gate * (factor * (1 - gate) + unit)
        dt_errors = (
            dz_errors
            / deviation
            * (size + size.mean() + (1 + n) * (size * n).mean(1, keepdim=True))
        )
        dx_errors = torch.zeros_like(wide) if name == "ppcr_gate" else factor * gy.abs() * gate
        for l, (begin, end) in enumerate(spans):
            dx_errors[:, begin:end] += dt_errors[:, l : l + 1] / (end - begin)
        y_terms = (
            gate
            if name == "ppcr_gate"
            else wide.abs() * gate + (residual.double().abs() if name == "ppcr_add_relu" else 0)
        )
        over_pixels = [d for d in range(x.dim()) if d != 1]
        units = {
            "y": (y, expected_y, factor * y_terms),
            "x": (gradients.get("x"), dx, dx_errors),
            "weight": (gradients.get("weight"), dw, (dz_errors * (1 + n)).sum(over_pixels)),
            "bias": (gradients.get("bias"), dz.sum().view(1), dz_errors.sum().view(1)),
            "residual": (gradients.get("residual"), gy, torch.zeros_like(gy)),
        }
        for key, (found, expected, allowed) in units.items():
            if found is None:
                continue
            assert found.isfinite().all(), (key, problem)
            beyond_rounding = (found.double() - expected).abs() - 1.01 * rounded_like(
                expected, found.dtype
            )
            ratio = (
                float((beyond_rounding / allowed.clamp(min=1e-300)).nan_to_num(nan=0.0).max())
                if found.numel()
                else 0.0
            )
            statistics["comparisons"] += 1
            if ratio > statistics["worst"]:
                statistics["worst"], statistics["of"] = (
                    ratio,
                    f"{key} of {name}, {x.dtype}, {tuple(x.shape)}, levels {levels}, eps {eps}",
                )
            assert ratio <= CONSTANT, (
                f"{key} is off by {ratio:.2f} times the amplified unit roundoff of its terms"
            )
    statistics["examples"] += 1


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def same(a, b):
    return torch.equal(bits(a), bits(b))


ALL = {"x", "residual", "weight", "bias"}


@METAMORPHIC
@given(problems(layouts=("contiguous", "channels_last")))
def test_batch_of_n_is_n_batches_of_one(problem):
    """Bit for bit: outputs and the gradients of x and the residual."""
    name, x, residual, weight, bias, grad, levels, eps, _ = problem
    y, gradients = evaluate(*problem[:-1], ALL)
    parts = [
        evaluate(
            name, x[i : i + 1], residual[i : i + 1], weight, bias, grad[i : i + 1], levels, eps, ALL
        )
        for i in range(x.shape[0])
    ]
    assert same(y, torch.cat([part[0] for part in parts]))
    for key in gradients.keys() & {"x", "residual"}:
        assert same(gradients[key], torch.cat([part[1][key] for part in parts]))


def close(a, b):
    """Equal but for rounding, which another place in a vector changes. The tensors are float64, so
    that nothing else is that small."""
    return float((a - b).abs().max()) <= 1e-7 * (1 + float(b.abs().max()))


@METAMORPHIC
@given(problems(dtypes=(torch.float64,)), st.randoms(use_true_random=False))
def test_permuted_samples_and_pixels(problem, random):
    """Permuting samples or pixels permutes outputs and gradients of x. The gradients of the
    parameters are the same sums."""
    name, x, residual, weight, bias, grad, levels, eps, _ = problem
    y, gradients = evaluate(*problem[:-1], ALL)
    for dim in (0, *range(2, x.dim())):
        order = list(range(x.shape[dim]))
        random.shuffle(order)
        index = torch.tensor(order)
        moved = [t.index_select(dim, index) for t in (x, residual, grad)]
        other, others = evaluate(name, moved[0], moved[1], weight, bias, moved[2], levels, eps, ALL)
        assert close(other, y.index_select(dim, index))
        assert close(others["x"], gradients["x"].index_select(dim, index))
        assert close(others["weight"], gradients["weight"])


@METAMORPHIC
@given(problems(dtypes=(torch.float64,)), st.floats(-50, 50))
def test_constant_added_to_a_pixel(problem, constant):
    """It leaves the gate: every context moves by it."""
    _, x, _, weight, bias, _, levels, eps, _ = problem
    options = {"levels": levels, "eps": eps, "backend": "native"}
    gate = ppcr_ext.ppcr_gate(x, weight, bias, **options)
    moved = ppcr_ext.ppcr_gate(x + constant, weight, bias, **options)
    assert torch.allclose(moved, gate, rtol=0, atol=1e-9 * (1 + float(weight.abs().sum())))


@METAMORPHIC
@given(problems(dtypes=(torch.float64,)))
def test_layouts_agree(problem):
    name, x, residual, weight, bias, grad, levels, eps, _ = problem
    y, gradients = evaluate(*problem[:-1], ALL)
    for layout in ("contiguous", "channels_last"):
        moved = [laid_out(t, layout, None) for t in (x, residual, grad)]
        other, others = evaluate(name, moved[0], moved[1], weight, bias, moved[2], levels, eps, ALL)
        assert close(other, y)
        assert close(others["x"], gradients["x"])
