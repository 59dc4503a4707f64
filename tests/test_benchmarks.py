"""The benchmark: its baselines compute the layer, and its clocks are right."""

import itertools
import math
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from benchmarks import baselines, networks, timing
from ppcr_ext import reference, testing

CPU = torch.device("cpu")


# ---- baselines -----------------------------------------------------------------------------------


def formulation(name: str, operator: str = "ppcr", levels: tuple[int, ...] = testing.LEVELS):
    layer = baselines.plain(operator, name, [], levels).layer
    return lambda x, weight, bias, **options: layer(x, weight, bias)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("name", baselines.FORMULATIONS)
@pytest.mark.parametrize(("channels", "levels"), [(8, (1, 2, 4)), (12, (4, 2)), (6, (3, 1))])
def test_a_formulation_agrees_with_the_reference(name, channels, levels, layout):
    inputs = testing.make_inputs("ppcr", (2, channels, 3, 5), levels, torch.float64, layout)
    tensors = inputs.x, inputs.weight, inputs.bias
    for operator, expected in (("ppcr", reference.ppcr), ("gate", reference.ppcr_gate)):
        got = formulation(name, operator, levels)(*tensors)
        exact = expected(*tensors, levels, baselines.EPS)
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", baselines.FORMULATIONS)
def test_a_formulation_is_right_in_float32_to_rounding(name):
    inputs = testing.make_inputs("ppcr", (2, 8, 4, 4))
    errors = testing.truth(inputs).errors(testing.evaluate(formulation(name), inputs))
    assert errors.within(testing.tolerance(torch.float32)), errors


@pytest.mark.parametrize("name", baselines.FORMULATIONS)
@pytest.mark.parametrize(("channels", "levels"), [(7, (1, 2, 4)), (12, (3, 4))])
def test_a_formulation_takes_channels_that_the_levels_do_not_divide(name, channels, levels):
    """Pooled once is level by level there."""
    inputs = testing.make_inputs("ppcr", (2, channels, 3, 5), levels, torch.float64)
    tensors = inputs.x, inputs.weight, inputs.bias
    exact = reference.ppcr(*tensors, levels, baselines.EPS)
    got = formulation(name, levels=levels)(*tensors)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("operator", "forward", "backward", "step"),
    [("ppcr", 2, 3, 5), ("gate", 1 + 1 / 4, 2 + 1 / 4, 3 + 2 / 4), ("add_relu", 3, 5, 8)],
)
def test_the_bytes_an_operator_needs(operator, forward, backward, step):
    shape, dtype = (3, 4, 5, 7), torch.float16
    one = torch.Size(shape).numel() * 2
    x = torch.empty(shape, dtype=dtype)
    needed = [baselines.necessary_bytes(operator, d, x) for d in baselines.DIRECTIONS]
    assert needed == [forward * one, backward * one, step * one]


def test_the_lower_bound_with_autograd_runs_the_engine_and_computes_the_bound():
    x, gy = torch.randn(3), torch.randn(3)
    calls = []

    def bound(x, gy):
        calls.append((x.requires_grad, torch.is_grad_enabled()))
        return (x * 0.5, x + gy)

    with torch.no_grad():
        (half, both), (identity,) = baselines.with_autograd(bound, x, gy)
    assert calls == [(False, False)]  # autograd records the identity alone
    torch.testing.assert_close((half, both, identity), (x * 0.5, x + gy, gy))


def test_the_photograph_becomes_eight_views():
    batch = networks.retina_batch(64)
    assert batch.shape == (8, 3, 64, 64)
    assert torch.isfinite(batch).all()
    torch.testing.assert_close(batch[1], batch[0].flip(1), rtol=0, atol=0.05)
    assert len({view.sum().item() for view in batch[4:]}) == 4


# ---- clocks --------------------------------------------------------------------------------------


def median(samples: list[timing.Sample]) -> float:
    return sorted(sample.seconds for sample in samples)[len(samples) // 2]


def test_a_slow_call_shows_as_slow():
    calls = {"quick": timing.Call(lambda: None), "slow": timing.Call(partial(time.sleep, 0.003))}
    found, _ = timing.interleave(calls, 5)
    assert median(found["slow"]) > 0.003
    assert median(found["slow"]) > 20 * median(found["quick"])
    assert calls["quick"].repeats > 100
    assert calls["slow"].repeats == 1
    assert len(found["slow"]) == len(found["quick"]) == 5
    assert math.isnan(found["slow"][0].host)


def scripted(monkeypatch, shares: list[float]) -> None:
    """Others take a given share of each round's second."""
    passed, taken = itertools.count(), itertools.accumulate(shares, initial=0.0)
    # what a round begins with is what the round before ended with
    seen = (pair for pair in zip(passed, taken) for _ in range(2))  # noqa: B905
    next(seen)
    monkeypatch.setattr(timing, "other_load", lambda: next(seen))


def test_a_call_that_is_not_warmed_runs_once_a_sample(monkeypatch):
    scripted(monkeypatch, [0.0] * 4)
    ran = []
    call = timing.Call(lambda: ran.append(1) or time.sleep(0.002), warm=False)
    timing.interleave({"a": call}, 3)
    assert len(ran) == 2 + 3  # compiles, and fills caches


@pytest.mark.parametrize(("by", "before"), [(timing.HostClock(), 10), (timing.CudaClock(), 1)])
def test_a_repeated_call_runs_often_enough_to_fill_the_caches(by, before, monkeypatch):
    monkeypatch.setattr(by, "measure", lambda call, run, times: timing.Sample(times, 0), False)
    ran = []
    call = timing.Call(lambda: ran.append(1), repeats=3)
    assert timing.sample(call, by).seconds == 1
    assert len(ran) == before


def test_compiling_inside_a_timed_region_is_an_error():
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    compiled(torch.zeros(2))
    with timing.quiet():
        compiled(torch.zeros(2))
        with pytest.raises(RuntimeError, match="recompile"):
            compiled(torch.zeros(2, dtype=torch.int64))


def test_an_interruption_inside_a_measurement_leaves_the_process_as_it_was():
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), timing.quiet():
        interrupted()
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))  # compiles: the stance is back


def test_other_load_is_noticed():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        before = timing.other_load()
        time.sleep(0.5)
        passed, taken = (b - a for a, b in zip(before, timing.other_load(), strict=True))
        busy.kill()
    assert taken > 0.3 * passed / os.cpu_count()


def test_disturbed_rounds_are_measured_again(monkeypatch):
    values = itertools.count()
    monkeypatch.setattr(timing, "sample", lambda *_: timing.Sample(1.0, next(values)))
    calls = {"a": timing.Call(lambda: None)}

    def rounds(shares: list[float]) -> tuple[list[float], float]:
        scripted(monkeypatch, shares)
        found, share = timing.interleave(calls, 3)
        return [one.host for one in found["a"]], share

    kept, share = rounds([0.0, 0.5, 0.04, 0.3, 0.02, 0.0])
    assert kept == [2, 4, 6]  # after two that warm up
    assert share == pytest.approx(0.02)
    kept, share = rounds([0.5] * 7)  # a machine that is never quiet: it ends, and says so
    assert (kept, share) == ([12, 13, 14], 0.5)


def test_a_limit_ends_the_rounds_but_not_before_the_fewest():
    call = timing.Call(lambda: time.sleep(0.002))
    for rounds, expected in ((100, timing.FEWEST), (3, 3)):
        found, _ = timing.interleave({"a": call}, rounds, limit=0)
        assert len(found["a"]) == expected


class Device:
    """A stand-in for a GPU: a stream of work that a host, with a time of its own, launches."""

    def __init__(self, monkeypatch):
        self.now = self.done = 0.0  # seconds: of the host, and when the stream is empty
        self.slept = []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.done = self.at = max(device.done, device.now)

            def query(self):
                return self.at <= device.now

            def synchronize(self):
                device.now = max(device.now, self.at)

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        def sleep(cycles):
            self.slept.append(cycles / 1e9)  # at half the rate that is taken for granted
            self.run(0, cycles / 1e9)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: Event(True).record())
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def run(self, host: float, device: float) -> None:
        """The host launches work and goes on."""
        self.now += host
        self.done = max(self.done, self.now) + device


@pytest.mark.parametrize("prepared", [False, True])
def test_a_cuda_clock_times_the_device_and_the_host_apart(prepared, monkeypatch):
    gpu = Device(monkeypatch)
    clock = timing.clock(torch.device("cuda"))
    counts = {"prepared": 0, "run": 0}

    def launch(name: str, host: float, device: float) -> None:
        counts[name] += 1
        gpu.run(host, device)

    prepare = partial(launch, "prepared", 300e-6, 50e-6) if prepared else None
    # Python needs twenty times as long to launch it as the device to run it.
    call = timing.Call(lambda *given: launch("run", 200e-6, 10e-6), prepare=prepare)
    found, _ = timing.interleave({"a": call}, 3, by=clock)
    assert median(found["a"]) == pytest.approx(10e-6)
    assert found["a"][0].host == pytest.approx(200e-6)
    assert call.repeats == pytest.approx(100, abs=1)
    assert counts["prepared"] == (counts["run"] if prepared else 0)
    burst = 1 if prepared else clock.burst
    assert max(gpu.slept) >= burst * 200e-6


def test_a_call_that_waits_for_the_device_is_timed_all_the_same(monkeypatch):
    gpu = Device(monkeypatch)

    def synchronizing() -> None:
        gpu.run(1e-3, 1e-3)
        gpu.now = gpu.done

    found, _ = timing.interleave({"a": timing.Call(synchronizing)}, 3, by=timing.CudaClock())
    assert len(found["a"]) == 3
    assert median(found["a"]) < 3e-3
