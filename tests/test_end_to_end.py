"""The benchmark of whole networks: its variants are the networks they say, wrong ones are not timed, and its figures are right."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("matplotlib")

import ppcr_ext
from benchmarks import end_to_end, network
from ppcr_ext import functional

TINY = end_to_end.Setting("resnet18", 2, 32, "contiguous", False, False)


def row(
    variant: str, mode: str, ratio: float, setting: end_to_end.Setting = TINY
) -> end_to_end.Row:
    measured = (
        10 * ratio,
        9 * ratio,
        11 * ratio,
        ratio,
        ratio - 0.01,
        ratio + 0.01,
        100,
        None,
        1e-6,
        0.0,
    )
    return end_to_end.Row(
        **vars(setting), variant=variant, mode=mode, **dict(zip(ROW_FIGURES, measured, strict=True))
    )


ROW_FIGURES = (
    "ms",
    "ms_low",
    "ms_high",
    "ratio",
    "ratio_low",
    "ratio_high",
    "saved_bytes",
    "peak_bytes",
    "error",
    "others",
)
ROWS = [
    row(variant, mode, 1 + 0.1 * i)
    for i, variant in enumerate(network.VARIANTS)
    for mode in ("step", "inference")
]


@pytest.mark.parametrize(("count", "rank"), [(3, 1), (6, 1), (9, 2), (11, 2), (15, 4), (30, 10)])
def test_the_interval_of_a_median(count, rank):
    """Ranks as tables of the sign test list them."""
    values = list(range(1, count + 1))
    assert end_to_end.median_interval(values[::-1]) == (
        statistics.median(values),
        rank,
        count + 1 - rank,
    )


@pytest.mark.parametrize("name", end_to_end.NETWORKS)
def test_variants_have_a_layer_in_every_block(name):
    blocks = {"resnet18": 8, "resnet50": 16}[name]
    names = {}
    for variant in network.VARIANTS:
        modules = [type(module).__name__ for module in network.network(name, variant).modules()]
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
        network.network("resnet18", variant)(x)
        assert set(called) == expected


def test_a_wrong_network_is_not_timed(monkeypatch):
    models = {name: network.network("resnet18", name) for name in network.OWN}
    x, target = torch.randn(2, 3, 32, 32), torch.arange(2)
    network.check(models, x, target, False)
    right = functional.ppcr_add_relu
    monkeypatch.setattr(
        functional,
        "ppcr_add_relu",
        lambda x, residual, weight, bias, backend=None, **options: right(
            x, residual, -weight if backend is None else weight, bias, backend=backend, **options
        ),
    )
    with pytest.raises(AssertionError, match=r"PPCR fused is off by"):
        network.check(models, x, target, False)


def test_what_autograd_keeps_is_counted():
    """Of a linear layer its input; of a ReLU its output; parameters and pictures are not counted."""
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 10)
    )
    x, target = torch.randn(2, 3, 2, 2), torch.arange(2)
    logits = 2 * 10 * 4 + 4  # log-softmax, and the number of samples
    assert (
        network.saved_bytes(model, x, target, False)
        == 2 * 5 * 4 + logits + target.untyped_storage().nbytes()
    )


def test_a_slow_network_shows_as_slow(monkeypatch):
    right = ppcr_ext.PPCR.forward

    def slow(self, x, residual=None):
        time.sleep(0.02)
        return right(self, x, residual)

    monkeypatch.setattr(ppcr_ext.PPCR, "forward", slow)
    monkeypatch.setattr(end_to_end, "SITTING", 2)
    assert end_to_end.sittings(TINY, 3) == [1, 2]
    ticks = []
    rows = end_to_end.measure(TINY, ("none", "PPCR fused"), 3, "cpu", ticks.append)
    assert sum(ticks) == 2 * 2 * (2 + 3)
    found = {(r.variant, r.mode): r for r in rows}
    for mode in ("step", "inference"):
        slow_row, fast_row = found["PPCR fused", mode], found["none", mode]
        assert slow_row.ms > 8 * 20
        assert (fast_row.ratio, fast_row.ratio_low, fast_row.ratio_high) == (1, 1, 1)
        assert slow_row.ratio_low > 1.1
    assert found["PPCR fused", "step"].saved_bytes > found["none", "step"].saved_bytes > 0


def test_table_picture_and_files(tmp_path):
    lines = end_to_end.table(ROWS).splitlines()
    assert lines[0] == "| | PPCR fused | PPCR unfused | PPCR plain | SE | CBAM |"
    assert lines[2].startswith(
        "| resnet18 2x3x32x32, contiguous, step | 1.100 (1.090 to 1.110) | 1.200 ("
    )
    about = {
        "rounds": 3,
        "complete": True,
        "environment": {"cpu": "Some CPU", "device": "cpu", "torch": "2"},
    }
    written = end_to_end.write(ROWS, tmp_path / "new" / "end_to_end", about)
    assert [path.suffix for path in written] == [".csv", ".json", ".png"]
    assert written[2].stat().st_size > 10_000
    content, again = end_to_end.read(written[1])
    assert again == ROWS
    assert content["complete"]
    assert len(written[0].read_text().splitlines()) == len(ROWS) + 1


def test_settings():
    chosen = end_to_end.settings("cpu", False)
    assert [str(setting) for setting, _ in chosen] == [
        "resnet18 16x3x32x32, contiguous",
        "resnet18 16x3x32x32, channels_last",
        "resnet18 16x3x32x32, channels_last, compiled",
        "resnet50 4x3x224x224, contiguous",
        "resnet50 4x3x224x224, channels_last",
    ]
    assert len(end_to_end.settings("cuda", True)) == 16


def test_interrupting_keeps_what_was_measured_and_resuming_goes_on(monkeypatch, tmp_path, capsys):
    calls = []
    environment = end_to_end.files.environment() | {"commit": "abc"}
    monkeypatch.setattr(end_to_end.files, "environment", lambda device: dict(environment))

    def measure(setting, variants, rounds, device, tick):
        calls.append(str(setting))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [
            row(variant, mode, 1, setting) for variant in variants for mode in ("step", "inference")
        ]

    monkeypatch.setattr(end_to_end, "measure", measure)
    arguments = ["--rounds", "2", "--out", str(tmp_path)]
    assert end_to_end.run(arguments) == 130
    content, rows = end_to_end.read(tmp_path / "end_to_end.json")
    assert not content["complete"]
    assert len(rows) == 2 * len(network.VARIANTS)
    assert end_to_end.run([*arguments, "--resume"]) == 0
    content, rows = end_to_end.read(tmp_path / "end_to_end.json")
    assert content["complete"]
    everything = [str(setting) for setting, _ in end_to_end.settings("cpu", False)]
    assert calls == [everything[0], everything[1], *everything[1:]]  # the first one once
    assert {str(end_to_end.Setting.of(row)) for row in rows} == set(everything)
    environment["commit"] = "abc+"
    assert end_to_end.run([*arguments, "--resume"]) == 0
    assert "not resumed" in capsys.readouterr().out
    assert calls[-len(everything) :] == everything
