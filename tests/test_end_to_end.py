"""Whole networks: the variants are what they say, wrong ones are not timed, figures are right."""

import dataclasses
import itertools
import time
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("matplotlib")

from benchmark_rows import COMMIT, record, row

import ppcr_ext
from benchmarks import __main__ as command
from benchmarks import cases, networks, pictures, report, results, runner, timing
from benchmarks.cases import OWN, VARIANTS, Case
from benchmarks.results import Row, derived
from ppcr_ext import functional

CPU = torch.device("cpu")
TINY = Case(
    "end_to_end",
    "resnet18",
    "resnet18 2x3x32x32",
    (2, 3, 32, 32),
    "contiguous",
    directions=("step", "inference"),
    variants=VARIANTS,
)


def figures(variant: str, mode: str, ratio: float, case: Case = TINY) -> Row:
    interval: dict[str, Any] = {"ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01}
    return row(case, variant, mode, 10 * ratio, "network", ratio=ratio, saved_bytes=100, **interval)


ROWS = derived([
    figures(variant, mode, ratio)
    for variant, ratio in zip(VARIANTS, (1.0, 1.1, 1.2, 1.3, 1.05, 1.5), strict=True)
    for mode in TINY.directions
])  # fmt: skip


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_variants_have_a_layer_in_every_block(name):
    blocks = {"resnet18": 8, "resnet50": 16}[name]
    names = {}
    for variant in VARIANTS:
        modules = [type(module).__name__ for module in networks.network(name, variant).modules()]
        names[variant] = {
            kind: modules.count(kind) for kind in ("PPCR", "Plain", "SEModule", "CbamModule")
        }
    assert names == {
        "none": {"PPCR": 0, "Plain": 0, "SEModule": 0, "CbamModule": 0},
        "PPCR fused": {"PPCR": blocks, "Plain": 0, "SEModule": 0, "CbamModule": 0},
        "PPCR unfused": {"PPCR": blocks, "Plain": 0, "SEModule": 0, "CbamModule": 0},
        "PPCR plain": {"PPCR": 0, "Plain": blocks, "SEModule": 0, "CbamModule": 0},
        "SE": {"PPCR": 0, "Plain": 0, "SEModule": blocks, "CbamModule": 0},
        "CBAM": {"PPCR": 0, "Plain": 0, "SEModule": 0, "CbamModule": blocks},
    }


def test_only_the_fused_network_adds_in_the_layer(monkeypatch):
    called = []
    for name in ("ppcr", "ppcr_add_relu"):
        original = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, n=name, f=original, **k: called.append(n) or f(*a, **k)
        )
    x = torch.randn(2, 3, 32, 32)
    for variant, expected in (
        ("PPCR fused", {"ppcr_add_relu"}),
        ("PPCR unfused", {"ppcr"}),
        ("PPCR plain", set()),
    ):
        called.clear()
        networks.network("resnet18", variant)(x)
        assert set(called) == expected


def test_a_wrong_network_is_not_timed(monkeypatch):
    models = {name: networks.network("resnet18", name) for name in OWN}
    x, target = torch.randn(2, 3, 32, 32), torch.arange(2)
    networks.check(models, x, target)
    right = functional.ppcr_add_relu
    monkeypatch.setattr(
        functional,
        "ppcr_add_relu",
        lambda x, residual, weight, bias, backend=None, **options: right(
            x, residual, -weight if backend is None else weight, bias, backend=backend, **options
        ),
    )
    with pytest.raises(AssertionError, match=r"PPCR fused is off by"):
        networks.check(models, x, target)


def test_what_autograd_keeps_is_counted():
    """Of a linear layer its input, of a ReLU its output; no parameters and no pictures."""
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 10)
    )
    x, target = torch.randn(2, 3, 2, 2), torch.arange(2)
    logits = 2 * 10 * 4 + 4  # log-softmax, and the number of samples
    assert (
        networks.saved_bytes(model, x, target, False)
        == 2 * 5 * 4 + logits + target.untyped_storage().nbytes()
    )


def test_a_slow_network_shows_as_slow(monkeypatch):
    right = ppcr_ext.PPCR.forward

    def slow(self, x, residual=None):
        time.sleep(0.02)
        return right(self, x, residual)

    monkeypatch.setattr(ppcr_ext.PPCR, "forward", slow)
    monkeypatch.setattr(runner, "ROUNDS_PER_NETWORK", 2)
    made, prepare = [], networks.prepare
    monkeypatch.setattr(networks, "prepare", lambda *args: made.append(args[2:]) or prepare(*args))
    case = dataclasses.replace(TINY, variants=("none", "PPCR fused"))
    rows = runner.measure(case, [], CPU, 3, None)
    assert [first for first, _ in made] == [True, False]  # the networks are made anew
    found = {(r.what, r.direction): r for r in rows}
    for mode in TINY.directions:
        slow_row, fast_row = found["PPCR fused", mode], found["none", mode]
        assert slow_row.median_us > 8 * 20_000
        assert (fast_row.ratio, fast_row.ratio_low, fast_row.ratio_high) == (1, 1, 1)
        assert slow_row.ratio_low > 1.1
        assert (slow_row.rounds, slow_row.over_fused) == (3, 1)
    assert found["PPCR fused", "step"].saved_bytes > found["none", "step"].saved_bytes > 0
    assert found["none", "inference"].saved_bytes is None


def test_networks_are_made_anew_unless_they_are_compiled():
    assert runner.batches(TINY, 13) == [4, 4, 5]
    assert runner.batches(dataclasses.replace(TINY, compiled=("resnet18",)), 13) == [13]
    assert runner.batches(dataclasses.replace(TINY, variants=()), 13) == [13]


def test_checked_networks_report_their_errors():
    made = networks.prepare(dataclasses.replace(TINY, dtype="bfloat16 autocast"), CPU, True, [*OWN])
    errors = {name: made.rows[name, "inference"].error_dx for name in OWN}
    assert all(0 < error <= 0.5 for error in errors.values())
    assert isinstance(made.by, timing.HostClock)
    assert not any(call.warm for call in made.calls.values())
    again = networks.prepare(TINY, CPU, False, [*OWN])
    assert again.rows["PPCR fused", "step"].error_dx is None


def test_the_table_marks_what_is_faster_than_the_fused_network(tmp_path):
    lines = report.network_table(ROWS).splitlines()
    names = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert names == ["", "PPCR fused", "PPCR unfused", "PPCR plain", "SE", "CBAM"]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:3] == [
        "resnet18 2x3x32x32, contiguous, step", "1.100 (1.090 to 1.110)", "1.200 (1.190 to 1.210)"
    ]  # fmt: skip
    assert cells[4] == "**1.050 (1.040 to 1.060)**"
    (drawn,) = pictures.draw(record(ROWS, "end_to_end"), tmp_path)
    assert (drawn.name, drawn.stat().st_size > 10_000) == ("end_to_end.png", True)


def test_cases():
    chosen = cases.end_to_end(CPU, quick=False, threads=2)
    assert [(one.case, one.layout, len(one.variants)) for one in chosen] == [
        ("resnet18 16x3x32x32", "contiguous", 6),
        ("resnet18 16x3x32x32", "channels_last", 6),
        ("resnet18 16x3x32x32, compiled", "channels_last", 4),
        ("resnet50 4x3x224x224", "contiguous", 6),
        ("resnet50 4x3x224x224", "channels_last", 6),
    ]
    on_cuda = cases.end_to_end(torch.device("cuda"), quick=False, threads=2)
    assert len({one.place for one in on_cuda}) == 8
    assert {one.shape[0] for one in on_cuda} == {1024, 256}
    assert {one.dtype for one in on_cuda} == {"bfloat16 autocast"}
    assert cases.end_to_end(CPU, quick=True, threads=2) == chosen[:1]


def test_interrupting_keeps_what_was_measured_and_resuming_goes_on(monkeypatch, tmp_path, capsys):
    calls: list[str] = []
    commit = {"name": COMMIT}
    monkeypatch.setattr(results, "_commit", lambda: commit["name"])

    def measure(case, *_):
        calls.append(case.label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        pairs = itertools.product(case.variants, case.directions)
        return [figures(variant, mode, 1.0, case) for variant, mode in pairs]

    monkeypatch.setattr(runner, "measure", measure)
    arguments = [
        "end-to-end",
        "--rounds",
        "2",
        "--threads",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert command.main(arguments) == runner.INTERRUPTED
    found = results.read(tmp_path / "end_to_end.json")
    assert (found.complete, len(found.rows)) == (False, 2 * len(VARIANTS))
    assert command.main([*arguments, "--resume"]) == 0
    found = results.read(tmp_path / "end_to_end.json")
    planned = cases.end_to_end(CPU, quick=False, threads=2)
    everything = [one.label for one in planned]
    assert calls == [everything[0], everything[1], *everything[1:]]  # the first one once
    assert found.complete
    assert {one.place for one in found.rows} == {one.place for one in planned}
    commit["name"] += "+"
    assert command.main([*arguments, "--resume"]) == 0
    assert "not resumed" in capsys.readouterr().out
    assert calls[-len(everything) :] == everything
