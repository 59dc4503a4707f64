"""Measuring a layer: what is timed is right, and slow things show as slow."""

import contextlib
import dataclasses
import itertools
import statistics
import time
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from benchmark_rows import SHAPE, record, row, small

import ppcr_ext
from benchmarks import baselines, cases, layers, report, results, runner, timing
from benchmarks.baselines import Implementation
from benchmarks.cases import Case
from benchmarks.results import Row
from ppcr_ext import testing

CPU = torch.device("cpu")


def measure(
    one: Case, *, slow: float = 0, rounds: int = 3, **replaced: Implementation
) -> dict[tuple[str, str], Row]:
    """The rows of a case by (what, direction); ``slow`` seconds more for every native call."""

    offer = layers.offer

    def offered(*args: Any) -> list[Implementation]:
        made = offer(*args)
        for implementation in made:
            if implementation.name == "native" and slow:
                implementation.layer = slowed(implementation.layer, slow)
        return [replaced.get(implementation.name, implementation) for implementation in made]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "offer", offered)
        rows = runner.measure(one, ["native", "reference"], CPU, rounds, 1.0)
    return {(row.what, row.direction): row for row in rows}


def slowed(layer: baselines.Layer, seconds: float) -> baselines.Layer:
    def later(*args):
        time.sleep(seconds)
        return layer(*args)

    return later


# ---- what is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "layout", "dtype", "shape"),
    [
        ("ppcr", "channels_last", "float32", SHAPE),
        ("gate", "contiguous", "bfloat16", SHAPE),
        ("add_relu", "channels_last", "float16", (2, 16, 4, 4, 4)),
        ("add_relu", "contiguous", "float64", SHAPE),
    ],
)
def test_every_timing_was_compared_with_float64(operator, layout, dtype, shape):
    rows = measure(small(operator=operator, layout=layout, dtype=dtype, shape=shape))
    names = {"native", "reference", "pooled once", "level by level"}
    bounds = {"lower bound", "lower bound with autograd"} if operator != "gate" else set()
    assert {what for what, _ in rows} == {*names, *bounds, "copy"}
    for (what, direction), found in rows.items():
        assert found.within, found
        assert (found.error_y is not None) == (what not in bounds)
        assert (found.error_parameters is not None) == (what in names and direction != "forward")
        copied = rows["copy", "forward"]
        speeds = [one.necessary_bytes / one.median_us for one in (found, copied)]
        assert found.copy_fraction == pytest.approx(speeds[0] / speeds[1])
        ours = rows["native", direction].median_us
        expected = None if what == "copy" else pytest.approx(found.median_us / ours)
        assert found.over_fused == expected
        if bounds and what != "copy":
            assert found.ratio_low <= found.ratio <= found.ratio_high
    needed = {d: rows["native", d].necessary_bytes for d in baselines.DIRECTIONS}
    assert needed["step"] == needed["forward"] + needed["backward"]


def test_a_lower_bound_with_autograd_stands_beside_small_inputs_only(monkeypatch):
    found = measure(small())
    assert found["lower bound with autograd", "step"].kind == "lower bound"
    assert ("lower bound with autograd", "backward") in found
    assert ("lower bound with autograd", "forward") not in found
    monkeypatch.setattr(layers, "SMALL", 1000)
    assert not any("autograd" in what for what, _ in measure(small()))


def test_peak_memory_by_hand():
    x = torch.zeros(1000)

    def run() -> torch.Tensor:
        for _ in range(3):
            torch.cat([x, x, x, x])  # freed at once, one after the other
        return x + 1

    assert layers.peak_bytes(timing.Call(run), CPU) == 16_000


def test_peak_memory_of_the_operators():
    rows = measure(small(shape=(2, 16, 64, 64)))
    one = 2 * 16 * 64 * 64 * 4
    assert one <= rows["native", "forward"].peak_bytes < 1.1 * one
    assert 2 * one <= rows["native", "step"].peak_bytes < 2.1 * one
    assert rows["pooled once", "step"].peak_bytes > 2.2 * one


def test_other_layers_compute_something_else():
    rows = measure(small(other_layers=(*cases.OTHER_LAYERS, "F.layer_norm"), plain=()))
    for name in (*cases.OTHER_LAYERS, "F.layer_norm"):
        assert rows[name, "step"].kind == "other layer"
        assert rows[name, "step"].median_us > 0
        assert rows[name, "step"].error_y is None


def test_odd_channels_are_measured_in_plain_pytorch_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda layer, **options: layer)
    rows = measure(small(shape=(2, 18, 5, 5), compiled=("pooled once",)))
    for what in ("pooled once", "pooled once compiled"):
        assert rows[what, "step"].within
        assert rows[what, "step"].error_dx is not None


@pytest.mark.parametrize("where", ["y", "y without gradients", "gradient"])
def test_a_wrong_result_is_marked(where, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, gy):
            return gy * 1.001

    right = ppcr_ext.ppcr

    def ppcr(*args, **kwargs):
        y = right(*args, **kwargs)
        if where == "gradient":
            return Wrong.apply(y)
        return y if where == "y without gradients" and torch.is_grad_enabled() else y * 1.001

    monkeypatch.setattr(ppcr_ext, "ppcr", ppcr)
    rows = measure(small())
    assert not rows["native", "forward"].within
    assert rows["pooled once", "forward"].within


def test_a_wrong_copy_is_marked(monkeypatch):
    monkeypatch.setattr(layers.InputPool, "copy", lambda pool: pool.next()[1])
    rows = measure(small())
    assert not rows["copy", "forward"].within
    assert rows["native", "forward"].within


# ---- how it is timed -----------------------------------------------------------------------------


def test_a_slow_backend_shows_as_slow_and_its_backward_alone_does_not():
    slow = measure(small(), slow=0.02)
    assert slow["native", "forward"].median_us > 20_000
    assert slow["native", "step"].median_us > 20_000
    assert slow["native", "backward"].median_us < 20_000  # the forward is prepared outside the time
    plain = slow["pooled once", "forward"]
    assert slow["native", "forward"].copy_fraction < plain.copy_fraction / 5
    assert plain.median_us < 20_000
    assert plain.over_fused < 1
    assert "pooled once, ppcr forward, small, contiguous (0." in report.faster(slow.values())


def test_nothing_is_compiled_inside_a_timed_region(monkeypatch):
    state = {"factor": 1.0}
    plain = torch.compile(lambda x, *own: x * state["factor"], backend="eager", fullgraph=True)
    one = {"pooled once": Implementation("pooled once", "other layer", plain)}
    assert ("pooled once", "forward") in measure(small(directions=("forward",)), **one)
    quiet = timing.quiet

    @contextlib.contextmanager
    def changing():
        with quiet():
            state["factor"] = 2.0  # what was compiled no longer fits
            yield

    state["factor"] = 1.0
    monkeypatch.setattr(timing, "quiet", changing)
    with pytest.raises(RuntimeError, match="recompile"):
        measure(small(directions=("forward",)), **one)


def test_what_is_compiled_is_right_and_a_program_for_each_direction(monkeypatch):
    made, compile_ = [], torch.compile

    def compiled(layer, **options):
        made.append((options["mode"], options["dynamic"], options["fullgraph"]))
        return compile_(layer, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compiled)
    rows = measure(small(compiled=("pooled once",)))
    assert rows["pooled once compiled", "step"].within
    assert made == 2 * [("default", False, True)]


def test_inputs_rotate_past_the_cache(monkeypatch):
    monkeypatch.setattr(layers, "POOL_BYTES", {"cpu": 1 << 20})
    pool = layers.InputPool(small(operator="add_relu"), CPU)
    assert sum(t.nbytes for copies in pool.copies for t in copies) >= 1 << 20
    count = len(pool.copies)
    seen = [pool.next() for _ in range(count + 1)]
    assert len({x.data_ptr() for x, *_ in seen}) == count
    assert seen[0][0].data_ptr() == seen[-1][0].data_ptr()
    assert len(pool.own) == 3
    for copies in seen:
        assert all(torch.equal(a, b) for a, b in zip(copies, pool.own, strict=True))
    assert len(layers.InputPool(small(rotate=False), CPU).copies) == 1


def test_given_tensors_are_measured_in_the_layout_and_dtype_of_the_case():
    given = testing.make_inputs("ppcr", SHAPE)
    pool = layers.InputPool(small(given=given, dtype="float16", layout="channels_last"), CPU)
    for got, expected in zip(pool.own, (given.x, given.grad), strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected.half())
    assert pool.inputs.weight is given.weight


@pytest.mark.parametrize(("count", "rank"), [(3, 1), (6, 1), (9, 2), (11, 2), (15, 4), (30, 10)])
def test_the_interval_of_a_median(count, rank):
    """Ranks as tables of the sign test list them."""
    values = list(range(1, count + 1))
    expected = statistics.median(values), rank, count + 1 - rank
    assert runner.median_interval(values[::-1]) == expected


def test_a_ratio_is_taken_within_each_round(monkeypatch):
    """The machine is ten times as slow in two of three rounds: medians of times would say 3."""
    took = {"native": [1.0, 30.0, 30.0], "lower bound": [1.0, 10.0, 15.0]}
    samples = {(what, "forward"): [timing.Sample(t) for t in ts] for what, ts in took.items()}
    monkeypatch.setattr(timing, "interleave", lambda *args, **options: (samples, 0.0))
    made = layers.Prepared(small(), timing.HostClock(), "lower bound")
    for what, direction in samples:
        made.add(what, direction, "fused", timing.Call(lambda: None))
    monkeypatch.setattr(layers, "prepare", lambda *args: made)
    rows = runner.measure(small(), [], CPU, 3, None)
    assert (rows[0].ratio, rows[0].ratio_low, rows[0].ratio_high) == (2, 1, 3)
    assert (rows[0].median_us, rows[0].rounds, rows[0].host_us) == (pytest.approx(30e6), 3, None)


# ---- plans ---------------------------------------------------------------------------------------


def test_what_a_cpu_and_a_gpu_measure():
    gpu = torch.device("cuda")
    part = cases.operators(CPU, threads=2)
    quick = cases.operators(CPU, quick=True, threads=2)
    on_cuda, quick_on_cuda = (cases.operators(gpu, quick=q, threads=2) for q in (False, True))
    for made in (part, quick, on_cuda, quick_on_cuda):
        assert len({one.place for one in made}) == len(made)
        assert {one.operator for one in made} == {"ppcr", "gate", "add_relu"}
        assert {one.layout for one in made} == {"contiguous", "channels_last"}
        assert {one.threads for one in made} == {2}
        tiny = [one for one in made if one.case.startswith("tiny")]
        assert [one.other_layers for one in tiny] == [("F.layer_norm",), (), ()]
        assert not any(one.rotate for one in tiny)
    wide = [one for one in part if one.dtype == "float32" and one.operator == "ppcr"]
    assert len({one.shape for one in wide if one.rotate}) == 12
    assert {one.shape for one in part if one.dtype != "float32"} == set(cases.CPU_FEW)
    assert {one.compiled for one in part} == {(), ("pooled once",)}
    assert len(quick) < len(part) / 4
    stages = {(256, c, s, s) for c, s in ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))}
    layouts, both = ("contiguous", "channels_last"), ("float16", "float32")
    for made, operators in ((on_cuda, ("add_relu", "gate")), (quick_on_cuda, ())):
        found = {(c.operator, c.dtype, c.shape, c.layout) for c in made if c.rotate}
        expected = set(itertools.product(("ppcr",), both, stages, layouts))
        assert found == expected | set(itertools.product(operators, both[:1], stages, layouts))
        compiled = {(one.operator, one.dtype) for one in made if one.compiled}
        assert compiled == {("ppcr", "float16")}


def test_retina_and_shapes_are_measured_in_every_layout_and_dtype():
    given = testing.make_inputs("ppcr", (2, 8, 4, 4))
    (*_, last) = made = cases.SUITES["retina"](
        CPU, quick=False, threads=3, stages={"layer1": given}
    )
    assert [one.plain for one in made] == 2 * [tuple(baselines.FORMULATIONS), (), ()]
    assert (last.case, last.shape, last.dtype) == ("layer1 2x8x4x4", (2, 8, 4, 4), "bfloat16")
    assert all(one.given is given and one.threads == 3 and not one.rotate for one in made)
    assert {one.suite for one in made} == {"retina"}
    made = cases.SUITES["shapes"](CPU, quick=False, threads=2)
    assert len(made) == 16 * 3
    assert {(one.suite, one.given) for one in made} == {("shapes", None)}


def test_scaling_grows_one_axis_at_a_time():
    made = cases.scaling(CPU, quick=False, threads=[1, 2])
    axes = ("pixels", "channels", "levels", "batch")
    assert {(one.case, one.threads) for one in made} == set(itertools.product(axes, (1, 2)))
    for axis in axes:
        found = [one for one in made if (one.case, one.threads) == (axis, 1)]
        sizes = [row(one, "native", "step", 1.0).size for one in found]
        assert sizes == sorted(set(sizes))
        assert len(sizes) >= 5
    assert len(cases.scaling(CPU, quick=True, threads=[1])) < len(made) / 3


def test_a_power_law_is_fitted_to_the_largest_sizes():
    made = [c for c in cases.scaling(CPU, quick=False, threads=[2]) if c.case == "batch"]
    times = [50.0, 50.0, 50.0, *(3 * one.shape[0] ** 1.5 for one in made[3:])]
    rows = [row(one, "native", "forward", took) for one, took in zip(made, times, strict=True)]
    table = report.console(record(rows, "scaling")).rpartition("\n\n")[2]
    assert "| native, 2 threads, forward | 1.50 (8 to 64) |" in table
    assert report.exponent([(1, 50.0)]) == "nan (a single size)"


def test_two_runs_of_the_same_build_agree_and_a_slower_one_does_not():
    """Noise of a busy machine comes and goes, so that one of three pairs has to agree; what is
    really slower shows in each."""

    def timed(slow: float = 0) -> results.Record:
        one = small(directions=("forward",), shape=(4, 32, 32, 32))
        rows = measure(one, slow=slow, rounds=15).values()
        return record([dataclasses.replace(found) for found in rows])

    first, found = timed(), []
    for _ in range(3):
        second = timed()
        found.append(results.compare(first, second)[1])
        if not found[-1]:
            break
        first = second
    assert [] in found, found
    text, slower = results.compare(first, timed(slow=0.005))
    assert "native" in {key[-2] for key in slower}, text
