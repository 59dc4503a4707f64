"""``python -m ppcr_ext --check``: every usable backend against float64, and what it sees."""

import dataclasses
import json

import pytest
import torch

import ppcr_ext
from ppcr_ext import _autograd, testing
from ppcr_ext.__main__ import main, report
from ppcr_ext._build import devices


def test_every_usable_backend_is_within_the_tolerances(capsys):
    assert main(["--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all results are within their tolerances"
    rows = [line.split() for line in lines[2:-1]]
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
    operations = _autograd.OPERATIONS["ppcr_gate"]
    sound = operations["native"]
    wrong = {part: lambda *arguments: fault(sound, *arguments)}
    monkeypatch.setitem(operations, "native", dataclasses.replace(sound, **wrong))
    assert main(["--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "all results are within their tolerances" not in lines
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == len(testing.DTYPES)
    assert all(line.startswith("FAILED  native on cpu: ppcr_gate, ") for line in failed)
    assert all(words in line for line in failed)


def test_report_as_json(capsys):
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ppcr_ext"] == ppcr_ext.__version__
    assert found["backends"] == ppcr_ext.backends()
    assert torch.__version__ in found["PyTorch"]
    with pytest.raises(SystemExit):
        main(["--json", "--check"])


def test_the_report_holds_what_a_question_back_would_ask(monkeypatch, capsys):
    monkeypatch.setenv("PPCR_CPU_METHD", "grouped")  # misspelt settings show as well
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.delenv("CXX", raising=False)
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {"ppcr_ext", "PyTorch", "Triton", "Python", "package", "backends", "available"}
    names |= {"CPU", "CPU library", "CPU capability", "environment"}
    names |= {f"CUDA {part}" for part in ("library", "archs", "devices", "driver")}
    assert set(found) == names
    assert all(found.values())
    settings = found["environment"]
    assert (settings["PPCR_CPU_METHD"], settings["MAX_JOBS"]) == ("grouped", "3")
    assert "CXX" not in settings
    assert str(torch.get_num_threads()) in found["CPU"]
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, value in found.items():
        (at,) = (index for index, line in enumerate(lines) if line.split("  ")[0] == name)
        if isinstance(value, dict):
            width = max(14, *map(len, value))
            expected = [f"  {name:<{width}} {state}" for name, state in value.items()]
            assert lines[at + 1 : at + 1 + len(value)] == expected
        else:
            assert lines[at] == f"{name:<16} {value}"


class Driver:
    """NVIDIA's management library, as far as the report asks it."""

    def __init__(self, starts=0, answers=0):
        self.starts, self.answers = starts, answers

    def nvmlInit_v2(self):
        return self.starts

    def nvmlShutdown(self):
        return 0

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"580.159.04"
        assert length >= 80
        return self.answers


def missing():
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


@pytest.mark.parametrize(
    ("library", "version"),
    [
        (Driver, "580.159.04"),
        (lambda: Driver(starts=9), None),
        (lambda: Driver(answers=3), None),
        (missing, None),
    ],
)
def test_the_driver_is_named_without_starting_cuda(monkeypatch, library, version):
    monkeypatch.setattr(devices, "_nvml", library)
    assert devices.driver() == version
    assert report()["CUDA driver"] == (version or "none")
    assert not torch.cuda.is_initialized()
