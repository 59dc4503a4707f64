"""The benchmark: its peers compute the layer, its figures are right, and it fails when an error is too large."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

import ppcr_ext
from benchmarks import __main__ as command
from benchmarks import errors, files, inputs, pages, peers, picture, report, suite, timing
from ppcr_ext import reference


def example(
    shape: tuple[int, ...],
    levels: tuple[int, ...],
    layout: torch.memory_format = torch.contiguous_format,
):
    generator = torch.Generator().manual_seed(1)
    x = 1.5 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(sum(levels), generator=generator, dtype=torch.float64)
    return (
        x.contiguous(memory_format=layout),
        weight,
        torch.randn(1, generator=generator, dtype=torch.float64),
    )


def small_case(name: str = "small") -> inputs.Case:
    x, weight, bias = (t.float() for t in example((2, 8, 4, 4), inputs.LEVELS))
    return inputs.Case(name, x, torch.randn_like(x), weight, bias)


def row(
    case: str, column: str, kind: str, forward: float, step: float | None, dtype: str = "float32"
) -> suite.Row:
    ratios = (forward, forward, forward, forward / 2)
    steps = (None,) * 4 if step is None else (step, step, step, step / 4)
    return suite.Row(case, [1, 4], "contiguous", column, dtype, kind, *ratios, *steps)


@pytest.fixture
def result() -> suite.Result:
    """Two inputs with a floor of 2 ms and 4 ms."""
    rows = []
    for case, native, plain in (("a", 4.0, 8.0), ("b", 9.0, 10.0)):
        rows += [
            row(case, "floor", "floor", 2.0, 4.0),
            row(case, "native", "fused", native, 2 * native),
        ]
        rows += [
            row(case, "pooled once", "plain", plain, 16.0),
            row(case, "matmul", "plain", 2 * plain, 20.0),
        ]
        rows.append(row(case, "native float16", "fused", native / 2, None, "float16"))
    fine = errors.Errors(1e-7, 2e-7, 3e-7)
    found = [
        suite.ErrorRow(
            "a", "contiguous", "native", "float32", fine, errors.TOLERANCES[torch.float32], True
        )
    ]
    return suite.Result(rows, found)


@pytest.mark.parametrize("layout", inputs.LAYOUTS.values(), ids=inputs.LAYOUTS)
@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize(("channels", "levels"), [(8, (1, 2, 4)), (12, (4, 2)), (6, (3, 1))])
def test_a_peer_agrees_with_the_reference(peer, channels, levels, layout):
    x, weight, bias = example((2, channels, 3, 5), levels, layout)
    got = peers.PEERS[peer](x, weight, bias, levels)
    torch.testing.assert_close(
        got, reference.ppcr(x, weight, bias, levels, peers.EPS), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_is_right_in_float32_to_rounding(peer):
    case = small_case()
    exact = errors.truth(case.x, case.gy, case.weight, case.bias, inputs.LEVELS)
    got = errors.measure(suite.peer_layer(peer), case.x, case.gy, case.weight, case.bias, exact)
    assert got.within(errors.TOLERANCES[torch.float32]), got


@pytest.mark.parametrize("peer", ["level by level", "matmul"])
def test_a_peer_takes_channels_that_the_levels_do_not_divide(peer):
    x, weight, bias = example((2, 7, 3, 5), (1, 2, 4))
    got = peers.PEERS[peer](x, weight, bias, (1, 2, 4))
    torch.testing.assert_close(
        got, reference.ppcr(x, weight, bias, (1, 2, 4), peers.EPS), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(("channels", "levels"), [(7, (1, 2, 4)), (12, (3, 4))])
def test_pooled_once_says_what_it_cannot_do(channels, levels):
    x, weight, bias = example((2, channels, 3, 5), levels)
    with pytest.raises(ValueError, match=f"got levels .* and {channels} channels"):
        peers.pooled_once(x, weight, bias, levels)


@pytest.mark.parametrize("channels", [8, 7])
def test_the_gradients_that_errors_are_measured_against_are_autograds(channels):
    x, weight, bias = example((2, channels, 3, 5), (1, 2, 4))
    gy = torch.randn_like(x)
    exact = errors.truth(x, gy, weight, bias, (1, 2, 4))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = reference.ppcr(*leaves, (1, 2, 4), peers.EPS)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, gy)
    torch.testing.assert_close(exact.y, y.detach())
    torch.testing.assert_close(exact.dx, dx)
    torch.testing.assert_close(exact.parameters, torch.cat([dweight, dbias]))
    assert (exact.scale >= exact.parameters.abs()).all()


def test_nan_is_not_within_a_tolerance():
    assert not errors.Errors(math.nan, 0, 0).within(errors.TOLERANCES[torch.float16])


def test_geometric_mean():
    assert report.geometric_mean([1, 4]) == pytest.approx(2)
    assert report.geometric_mean([3]) == pytest.approx(3)


def test_the_summary_by_hand(result):
    summary = report.summarize(result)
    assert summary.forward["native"] == pytest.approx(math.sqrt(2 * 4.5))
    assert summary.step["pooled once"] == pytest.approx(4)
    # forward of b: 9 ms beside 10 ms is better than the step of b: 18 ms beside 16 ms
    worst = summary.worst["native"]
    assert (worst.ratio, worst.case, worst.mode, worst.peer) == (
        18 / 16,
        "b",
        "forward+backward",
        "pooled once",
    )
    assert summary.half == {"native float16": pytest.approx(0.5)}


def test_a_table_lines_up(result):
    lines = report.ratio_table(result, "forward").splitlines()
    assert lines[0].split() == ["input", "layout", "native", "pooled", "once", "matmul"]
    assert lines[2].split() == ["a", "contiguous", "2.00", "4.00", "8.00"]
    assert lines[4].split()[:3] == ["geometric", "mean", "3.00"]
    assert lines[2].index("4.00") + 4 == lines[4].index("4.47") + 4
    assert "NO" not in report.error_table(result)


def test_files_hold_what_was_measured(result, tmp_path):
    csv_path, json_path = files.write(
        result, tmp_path / "new" / "name", {"rounds": 3, "environment": {"cpu": "x"}}
    )
    header, first, *rest = csv_path.read_text().splitlines()
    assert header.startswith("case,shape,layout,column,dtype,kind,forward_ms")
    assert first.startswith("a,1x4,contiguous,floor,float32,floor,2.0,")
    assert len(rest) == len(result.rows) - 1
    content, again = files.read(json_path)
    assert content["rounds"] == 3
    assert again == result
    assert content["summary"]["worst"]["native"]["peer"] == "pooled once"


def test_the_environment_says_where_and_with_what():
    env = files.environment()
    assert env["torch"] == torch.__version__
    assert {"date", "commit", "cpu", "capability", "threads", "python", "ppcr_ext"} <= env.keys()
    json.dumps(env)


def test_a_picture_is_drawn(result, tmp_path):
    assert picture.draw(result, tmp_path / "picture.png", "title").stat().st_size > 10_000


def test_a_slow_call_shows_as_slow():
    calls = {"quick": timing.Call(lambda: None), "slow": timing.Call(partial(time.sleep, 0.003))}
    ticks = []
    times = timing.interleave(calls, 5, tick=lambda: ticks.append(1))
    assert times["slow"].median > 0.003
    assert times["slow"].median > 20 * times["quick"].median
    assert times["slow"].low <= times["slow"].median <= times["slow"].high
    assert calls["quick"].repeats > 100
    assert calls["slow"].repeats == 1
    assert len(ticks) == 5


def test_a_slow_backend_shows_as_slow():
    def slow(x, weight, bias):
        time.sleep(0.03)
        return reference.ppcr(x, weight, bias, inputs.LEVELS, peers.EPS)

    columns = [
        suite.Column("native", slow),
        suite.Column("pooled once", suite.peer_layer("pooled once"), backend=False),
    ]
    rows = suite.time_case(small_case(), "contiguous", columns, 3)
    worst = report.summarize(suite.Result(rows)).worst["native"]
    assert worst.ratio > 2
    assert worst.peer == "pooled once"


def test_compiling_inside_a_timed_region_is_an_error():
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    compiled(torch.zeros(2))
    with timing.quiet():
        compiled(torch.zeros(2))
        with pytest.raises(RuntimeError, match="recompile"):
            compiled(torch.zeros(2, dtype=torch.int64))


def test_a_busy_neighbour_is_noticed(result):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        others = timing.Others()
        time.sleep(0.5)
        passed, taken = others.seconds()
        neighbour.kill()
    if Path("/proc/stat").exists():
        assert taken > 0.3 * passed / os.cpu_count()
    assert report.disturbances(result) == ""
    result.rows[0].others = 0.25
    assert "a, contiguous: 25%" in report.disturbances(result)


class Scripted:
    """Others that take a given share of each round's second."""

    shares: tuple[float, ...] = ()

    def seconds(self):
        share, *Scripted.shares = Scripted.shares
        return 1.0, share


def test_disturbed_rounds_are_measured_again(monkeypatch):
    monkeypatch.setattr(timing, "Others", Scripted)
    values, ticks = iter(range(100)), []
    Scripted.shares = [0.0, 0.5, 0.04, 0.3, 0.02]
    kept, share = timing.rounds_of({"a": lambda: next(values)}, 3, tick=lambda: ticks.append(1))
    assert kept == {"a": [0, 2, 4]}
    assert share == pytest.approx(0.02)
    assert len(ticks) == 3
    Scripted.shares = [0.5] * 6  # a machine that is never quiet: it ends, and says so
    kept, share = timing.rounds_of({"a": lambda: next(values)}, 3)
    assert (kept, share) == ({"a": [8, 9, 10]}, 0.5)


def run(monkeypatch, tmp_path, *arguments: str) -> int:
    monkeypatch.setattr(inputs, "sweep_cases", lambda: [small_case("one"), small_case("two")])
    return command.main(
        ["shapes", "--rounds", "2", "--no-compile", "--out", str(tmp_path), *arguments]
    )


def test_the_command_measures_prints_and_writes(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, "--threads", "1") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"shapes.csv", "shapes.json", "shapes.png"}
    printed = capsys.readouterr().out
    assert printed.index("ratio to the floor") < printed.index("milliseconds")
    content, result = files.read(tmp_path / "shapes.json")
    assert content["environment"]["threads"] == 1
    assert {row.backend for row in result.errors} == set(suite.usable_backends()[0])
    assert {row.dtype for row in result.errors} == {"float32", "float16", "bfloat16"}


def test_exit_status_1_when_an_error_exceeds_its_tolerance(monkeypatch, tmp_path, capsys):
    right = ppcr_ext.ppcr
    monkeypatch.setattr(
        ppcr_ext, "ppcr", lambda x, *args, **kwargs: right(x, *args, **kwargs) * 1.0001
    )
    assert run(monkeypatch, tmp_path, "--dtypes", "float32") == 1
    printed = capsys.readouterr().out
    assert "error above tolerance: " in printed
    assert "NO" in printed
    assert (tmp_path / "shapes.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "whole number above 0"),
        (["--dtypes", "int8"], "unknown dtype 'int8'; known are float32"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_the_photograph_becomes_eight_views():
    batch = inputs.retina_batch(64)
    assert batch.shape == (8, 3, 64, 64)
    assert torch.isfinite(batch).all()
    torch.testing.assert_close(batch[1], batch[0].flip(1), rtol=0, atol=0.05)
    assert len({view.sum().item() for view in batch[4:]}) == 4


def test_rendering_quotes_the_files(result, monkeypatch, tmp_path):
    env = {
        "cpu": "Some CPU",
        "capability": "AVX2",
        "threads": 2,
        "torch": "2",
        "date": "2026-01-02T",
        "commit": "abc",
    }
    monkeypatch.setattr(files, "read", lambda path: ({"environment": env, "rounds": 30}, result))
    for name in ("shapes", "retina"):
        (tmp_path / f"{name}.json").touch()
    assert "| **native** | 3.00 | 3.00 |" in pages.headline(tmp_path)
    text = pages.page(tmp_path)
    assert "| **native** | 3.00 | 3.00 |" in text
    assert "1.12 times as long" in text or "1.13 times as long" in text
    assert "Some CPU (AVX2), 2 threads" in text
    assert "native, float32 | 1.0e-07 (may be 1e-05)" in text
