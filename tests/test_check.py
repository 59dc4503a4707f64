"""``python -m ppcr_ext --check``: every usable backend against float64, and what it sees."""

import dataclasses
import json

import pytest
import torch

import ppcr_ext
from ppcr_ext import _autograd, testing
from ppcr_ext.__main__ import main


def test_every_usable_backend_is_within_the_tolerances(capsys):
    assert main(["--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2:]]
    found = {(backend, operator) for backend, device, operator, *_ in rows if device == "cpu"}
    backends = [name for name in ppcr_ext.available_backends() if name != "triton"]
    assert found >= {(backend, name) for backend in backends for name in testing.OPERATORS}
    shares = [float(cell) for row in rows for cell in row[3:]]
    assert len(shares) == 4 * len(rows)
    assert all(0 < share <= 1 for share in shares)


def broken_forward(operation, *arguments):
    return operation.forward(*arguments) * 1.01


def broken_backward(operation, *arguments):
    dx, *rest = operation.backward(*arguments)
    return dx * float("nan"), *rest


def failing(operation, *arguments):
    raise RuntimeError("no kernel")


@pytest.mark.parametrize(
    ("part", "fault", "words"),
    [
        ("forward", broken_forward, "times the tolerance"),
        ("backward", broken_backward, "nan times the tolerance"),
        ("backward", failing, "RuntimeError: no kernel"),
    ],
)
def test_exit_status_1_where_a_backend_is_off(monkeypatch, capsys, part, fault, words):
    sound = _autograd.GATE["native"]
    wrong = {part: lambda *arguments: fault(sound, *arguments)}
    monkeypatch.setitem(_autograd.GATE, "native", dataclasses.replace(sound, **wrong))
    assert main(["--check"]) == 1
    off = [line for line in capsys.readouterr().out.splitlines() if line.startswith("OFF")]
    assert len(off) == len(testing.DTYPES)
    assert all(line.startswith("OFF  native on cpu: ppcr_gate, ") for line in off)
    assert all(words in line for line in off)


def test_report_as_json(capsys):
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ppcr_ext"] == ppcr_ext.__version__
    assert found["backends"] == ppcr_ext.backends()
    assert torch.__version__ in found["PyTorch"]
    with pytest.raises(SystemExit):
        main(["--json", "--check"])
