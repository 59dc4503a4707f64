"""Edges of the contract: layouts without a copy, one copy of odd strides, NaN and Inf, zero
variance, empty tensors, warnings."""

import dataclasses
import mmap
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cases import BACKENDS, make_case, run

import ppcr_ext
from ppcr_ext import functional
from ppcr_ext._build import cpu as recipe
from ppcr_ext.testing import DTYPES, LAYOUTS, OPERATORS, relative, to_layout, tolerance


def operators_called(f):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return [event.name for event in profile.events()]


@pytest.mark.parametrize(
    "shape",
    [(3, 8), (3, 8, 5), (2, 8, 5, 7), (2, 8, 3, 4, 5), (2, 8, 3, 2, 2, 3), (2, 8, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_both_layouts_without_a_copy(name, layout, shape):
    case = make_case(name, shape, (1, 2, 4), torch.float32, layout)
    results = []
    names = operators_called(lambda: results.extend(case.run("native")))
    assert not {"aten::copy_", "aten::clone"} & set(names), names
    y, dx = results[:2]
    if name != "ppcr_gate":
        assert y.stride() == case.x.stride()
    assert dx.stride() == case.x.stride()


def test_other_strides_cost_one_copy():
    x = torch.randn(2, 8, 6, 10)[..., ::2]
    w, b = torch.randn(7), torch.randn(1)
    names = operators_called(lambda: ppcr_ext.ppcr(x, w, b))
    assert names.count("aten::copy_") == 1
    y = ppcr_ext.ppcr(x, w, b)
    assert y.is_contiguous()
    assert torch.equal(y, ppcr_ext.ppcr(x.contiguous(), w, b))


@pytest.mark.parametrize("shape", [(5, 500), (5, 500, 1, 1)], ids=str)
def test_one_pixel_per_sample_is_channels_last_after_a_copy(shape):
    """The other layout reads such a tensor a channel at a time, and rounds its sums differently."""
    case = make_case("ppcr", shape, (1, 2, 4), torch.float32)
    expected = case.run("native")
    case.x = case.x.detach().repeat_interleave(2, 1)[:, ::2]
    assert not case.x.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(case.run("native"), expected, strict=True))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_named_memory_formats(memory_format):
    x = torch.randn(2, 8, 5, 7).contiguous(memory_format=memory_format)
    assert ppcr_ext.PPCR(8)(x).is_contiguous(memory_format=memory_format)
    volume = torch.randn(2, 8, 3, 5, 7).contiguous(memory_format=torch.channels_last_3d)
    assert ppcr_ext.PPCR(8)(volume).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(dtype, layout, offset):
    """Storage offsets that no vector is aligned to."""
    case = make_case("ppcr", (2, 19, 7, 9), (1, 2, 4), dtype, layout)
    expected = case.run("native")
    for field in ("x", "grad"):
        t = getattr(case, field).detach()
        dense = t.movedim(1, -1) if layout == "channels_last" else t
        moved = torch.empty(t.numel() + offset, dtype=dtype)[offset:].view(dense.shape).copy_(dense)
        setattr(case, field, moved.movedim(-1, 1) if layout == "channels_last" else moved)
    assert all(torch.equal(a, b) for a, b in zip(case.run("native"), expected, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_and_inf_reach_only_their_own_pixel(backend, dtype, layout, value):
    for name in OPERATORS:
        for levels in ((1, 2, 4), (3, 5)):
            case = make_case(name, (2, 12, 5, 9), levels, dtype, layout)
            clean = case.run(backend)
            case.x = case.x.detach().clone(memory_format=torch.preserve_format)
            case.x[1, 4, 2, 3] = value
            dirty = case.run(backend)
            elsewhere = torch.ones(2, 1, 5, 9, dtype=torch.bool)
            elsewhere[1, 0, 2, 3] = False
            for a, b in ((clean[0], dirty[0]), (clean[1], dirty[1])):
                mask = elsewhere.expand_as(a)
                assert torch.equal(a[mask], b[mask])
            own = dirty[0][1, :, 2, 3]
            assert not own.isfinite().any() if name != "ppcr_add_relu" else own.isnan().any()
            assert not dirty[2].isfinite().any()  # dweight sums over all pixels


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("levels", [(1, 2, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_weight_that_is_not_finite_shows(backend, levels, value):
    """That of the first context as well, which is zero after the normalization of (1, 2, 4)."""
    for i in range(sum(levels)):
        case = make_case("ppcr", (2, 8, 6), levels, torch.float32)
        weight = case.weight.detach().clone()
        weight[i] = value
        gate = ppcr_ext.ppcr_gate(case.x.detach(), weight, levels=levels, backend=backend)
        assert not ((gate > 0) & (gate < 1)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_zero_variance_is_finite(backend, dtype):
    """A batch norm whose weight starts at zero feeds the layer zeros."""
    for value in (0.0, 3.0):
        for name in OPERATORS:
            case = make_case(name, (2, 8, 6), (1, 2, 4), dtype)
            case.x = torch.full_like(case.x, value)
            assert all(t.isfinite().all() for t in case.run(backend))


@pytest.mark.parametrize("levels", [(1, 2), (1, 2, 4)], ids=str)
def test_equal_channels_leave_no_context(levels):
    """Contexts are compared before they are averaged: large equal ones differ by exactly zero."""
    x = torch.linspace(1e3, 1e5, 64)[:, None].expand(64, 8)
    weight = torch.linspace(-9, 99, sum(levels))
    gate = ppcr_ext.ppcr_gate(x, weight, torch.zeros(1), levels=levels, backend="native")
    assert torch.equal(gate, torch.full((64, 1), 0.5))


def test_tiny_eps_at_zero_variance():
    """An eps below the smallest normal float32 does not become a division by zero."""
    y = ppcr_ext.ppcr(torch.ones(1, 8), torch.ones(7), torch.zeros(1), eps=1e-50, backend="native")
    assert torch.equal(y, torch.full((1, 8), 0.5))


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0), (2, 8, 3, 0), (0, 8)], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_empty_tensors(name, backend, shape):
    case = make_case(name, shape, (1, 2, 4), torch.float32)
    y, dx, d_weight, d_bias, *_ = case.run(backend)
    assert y.shape == (shape if name != "ppcr_gate" else (shape[0], 1, *shape[2:]))
    assert dx.shape == shape
    assert torch.equal(d_weight, torch.zeros(7))
    assert torch.equal(d_bias, torch.zeros(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_batch_of_two_has_the_bits_of_two_batches(name, dtype, layout):
    """Planes of 9 and 35 pixels put the second sample at other alignments than the first."""
    for side in (3, 5, 7):
        case = make_case(
            name, (2, 8, side, side + 2 * (side > 3)), (1, 2, 4), dtype, layout, seed=side
        )
        whole = case.run("native")
        fields = ("x", "residual", "grad")
        for i in range(2):
            sample = {
                f: to_layout(getattr(case, f).detach()[i : i + 1].clone(), layout) for f in fields
            }
            part = dataclasses.replace(case, **sample).run("native")
            for a, b in zip(
                (whole[0], whole[1], whole[-1]), (part[0], part[1], part[-1]), strict=True
            ):
                if a.dim() == case.x.dim():
                    assert torch.equal(a[i : i + 1], b)


def test_one_channel_a_bin_and_many_channels():
    for channels, levels in (
        (2, (1, 1)),
        (1, (1, 1)),
        (64, (64,)),
        (65536, (1, 2, 4)),
        (4099, (1, 7)),
    ):
        case = make_case("ppcr", (2, channels, 3), levels, torch.float64)
        for a, b in zip(case.run("native"), case.run("reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_most_segments_that_64_contexts_can_cut():
    """Levels prime to each other and to C: overlapping bins everywhere."""
    for levels in ((31, 33), (64,), (5, 7, 11, 13, 17), (1,) * 64):
        for channels in (67, 130, 1009):
            case = make_case("ppcr", (2, channels, 5, 4), levels, torch.float64)
            for layout in LAYOUTS:
                case.x, case.grad = to_layout(case.x.detach(), layout), to_layout(case.grad, layout)
                for a, b in zip(case.run("native"), case.run("reference"), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_batch_equals_samples_one_by_one():
    for layout in LAYOUTS:
        case = make_case("ppcr", (5, 24, 9, 7), (1, 2, 4), torch.float32, layout)
        whole = run("ppcr", case.x, case.residual, case.weight, case.bias)
        parts = [
            run("ppcr", x, r, case.weight, case.bias)
            for x, r in zip(case.x.split(1), case.residual.split(1), strict=True)
        ]
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_missing_native_library_warns_once_and_names_the_remedy(tmp_path, first):
    """A copy of the package without the compiled library."""
    import shutil
    from pathlib import Path

    package = Path(ppcr_ext.__file__).parent
    shutil.copytree(
        package,
        tmp_path / "ppcr_ext",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"),
    )
    shutil.copytree(recipe.csrc(), tmp_path / "csrc", dirs_exist_ok=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "ppcr_ext"\nversion = "0"\n')
    program = (
        f"FIRST = {first!r}"
        + """
import warnings, torch, ppcr_ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    m = ppcr_ext.PPCR(8)
    if FIRST == "compiled":
        torch.compile(m, fullgraph=True, backend="eager")(torch.randn(2, 8, 3))
    m(torch.randn(2, 8, 3)).sum().backward()
    m(torch.randn(2, 8, 3))
    y = torch.compile(m, fullgraph=True, backend="eager")(torch.randn(2, 8, 3))
    assert y.shape == (2, 8, 3)
words = [str(c.message) for c in caught if "ppcr_ext" in str(c.message)]
assert len(words) == 1, words
reason = "the extension is not built"
assert f"slow PyTorch reference for cpu tensors: {reason}" in words[0], words
assert "ppcr_ext.build()" in words[0], words
assert ppcr_ext.available_backends() == ("reference",), ppcr_ext.backends()
try:
    ppcr_ext.ppcr(torch.randn(2, 8), m.weight, backend="native")
except RuntimeError as error:
    assert f"backend 'native' cannot run for cpu tensors: {reason}" in str(error), error
else:
    raise AssertionError
"""
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=300
    )


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/sys/vm/overcommit_memory").exists(), reason="Linux")
def test_out_of_memory():
    """PyTorch's own words, where it hands them over; nothing stays allocated."""
    own = torch.__version__ >= "2.13"  # a comparison of versions
    words = r"can't allocate memory: you tried to allocate \d{12,} bytes"
    if not own:
        words = "out of memory: no tensor of shape"
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this machine promises any amount of memory")
    count = 2**38  # 1 TiB of float32, none of it touched
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    reserved = mmap.mmap(-1, 4 * count, flags=flags)
    x = torch.frombuffer(reserved, dtype=torch.float32).view(1, 4, -1)
    w, b = torch.zeros(7), torch.zeros(1)
    parameters = (w, b, (1, 2, 4), 1e-5)
    ops = torch.ops.ppcr_ext
    calls = [
        lambda: ppcr_ext.ppcr(x, w, b),
        lambda: ppcr_ext.ppcr_add_relu(x, x, w, b),
        lambda: ppcr_ext.ppcr_gate(x, w, b),
        lambda: ppcr_ext.ppcr(x[..., ::2], w, b),  # the copy of odd strides
        lambda: ops.ppcr_backward(x, x, *parameters),
        lambda: ops.ppcr_add_relu_backward(x, x, x, *parameters),
    ]
    before = virtual_bytes()
    for function in calls:
        with pytest.raises(RuntimeError, match=words):
            function()
    assert virtual_bytes() - before < 2**30
    assert ppcr_ext.ppcr(torch.ones(1, 4), w, b).tolist() == [[0.5] * 4]


def test_out_of_memory_on_cuda(monkeypatch):
    """The compiled operators raise RuntimeError whatever PyTorch raised, in its words or theirs."""
    said = []

    def operator(*_):
        raise RuntimeError(said[-1])

    class OnCuda(torch.Tensor):
        is_cuda = True

    for name in ("ppcr", "ppcr_backward"):
        monkeypatch.setattr(torch.ops.ppcr_ext, name, types.SimpleNamespace(default=operator))
    x, w = torch.ones(1, 4), torch.zeros(7)
    operation = functional.OPERATIONS["ppcr"]["native"]
    on_cuda = x.as_subclass(OnCuda)
    for tensor, words, kind in (
        (on_cuda, "CUDA out of memory. Tried to allocate 20.00 GiB.", torch.OutOfMemoryError),
        (on_cuda, "ppcr_ext: out of memory: no tensor of shape [1] fits", torch.OutOfMemoryError),
        (on_cuda, "CUDA error: an illegal memory access was encountered", RuntimeError),
        (x, "ppcr_ext: out of memory: no tensor of shape [1] fits", RuntimeError),
    ):
        said.append(words)
        for call in (
            lambda t=tensor: operation.forward(t, w, None, (1, 2, 4), 1e-5),
            lambda t=tensor: operation.backward(t, t, w, None, (1, 2, 4), 1e-5),
        ):
            with pytest.raises(RuntimeError) as raised:
                call()
            assert (raised.type, str(raised.value)) == (kind, words)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_beyond_the_range_of_the_variance(name, dtype, backend):
    """The README's Limits: right up to 5e18; from 1e21 to 1e36 sigmoid(bias), finite gradients."""
    for scale in (1e15, 1e18):
        case = make_case(name, (2, 8, 3, 3), (1, 2, 4), dtype)
        case.x, case.residual = (t * scale for t in (case.x, case.residual))
        tensors = case.x, case.residual, case.weight, case.bias
        expected = run(name, *(t.double() for t in tensors))
        got = run(name, *tensors, backend=backend)
        assert relative(got, expected) < tolerance(dtype, (1, 2, 4)).y
    case = make_case("ppcr_gate", (2, 8, 3, 3), (2, 4), dtype)
    for scale in (1e21, 1e36):
        case.x = (torch.arange(8.0).reshape(1, 8, 1, 1).expand(2, 8, 3, 3) * scale).to(dtype)
        gate, *gradients = case.run(backend)
        assert torch.equal(gate, case.bias.sigmoid().to(dtype).expand_as(gate))
        assert all(g.isfinite().all() for g in gradients)
