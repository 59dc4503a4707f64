"""tools/gpu.py: evidence after every step, parts that end in time, notes and failures."""

import importlib.util
import json
import stat
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "tools" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu_tool", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def steps(out: Path) -> dict[str, dict]:
    return json.loads((out / "steps.json").read_text())


def test_commands_side_by_side(gpu, tmp_path):
    """How each ended, its output in a file of its own, and its share of the tests."""
    show = python("import os; print(os.environ['PPCR_SHARD']); raise SystemExit(3)")
    ended = gpu.Record(tmp_path).run({"a.0": show, "a.1": show}, 30)
    assert ended == {"a.0": 3, "a.1": 3}
    assert [(tmp_path / f"a.{i}.log").read_text() for i in (0, 1)] == ["0/2\n", "1/2\n"]
    assert steps(tmp_path)["a.1"]["status"] == 3


def test_a_part_that_does_not_end(gpu, tmp_path):
    """It is stopped, and what it has written is there."""
    hang = python("print('half', flush=True); import time; time.sleep(60)")
    assert gpu.Record(tmp_path).run({"slow": hang}, 3) == {"slow": 124}
    assert (tmp_path / "slow.log").read_text() == "half\n"
    assert steps(tmp_path)["slow"]["seconds"] < 30


def test_earlier_parts_stay(gpu, tmp_path):
    gpu.Record(tmp_path).run({"one": python("")}, 30)
    gpu.Record(tmp_path).keep("two", status=None, note="why")
    assert steps(tmp_path)["one"]["status"] == 0
    assert steps(tmp_path)["two"] == {"status": None, "note": "why"}


@pytest.mark.parametrize(
    ("script", "passes", "status", "note"),
    [
        ("echo small run started; exit 0", True, 0, None),
        ("echo small run started; exit 9", False, 9, None),  # it found something
        ("echo small run started; exit 1", False, 1, None),
        ("exit 1", True, None, "it did not start: see memcheck.log"),
        ("echo small run started; exec sleep 60", True, None, "it did not end in time"),
    ],
)
def test_sanitizer(gpu, tmp_path, monkeypatch, script, passes, status, note):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu, "SANITIZER_LIMIT", 2)
    assert gpu.sanitize(gpu.Record(tmp_path), "memcheck", [sys.executable]) is passes
    step = steps(tmp_path)["memcheck"]
    assert step["status"] == status
    assert (note or "") in step.get("note", "")


def test_unknown_part(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "tests,nonsense"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no part nonsense" in capsys.readouterr().err
