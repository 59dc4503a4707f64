"""Runs of the benchmark: files, interruption, resumption, comparison, pages, and the command."""

import dataclasses
import itertools
import json
import math
import re
import shutil

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from benchmark_rows import COMMIT, record, row, small, synthetic

import ppcr_ext
from benchmarks import __main__ as command
from benchmarks import cases, pictures, render, report, results, runner
from benchmarks.cases import Case
from ppcr_ext import testing

CPU = torch.device("cpu")
CASES = [small(operator=o, case=f"{o} {n}") for o in ("ppcr", "add_relu") for n in ("one", "two")]
SETTINGS = {"rounds": 9, "seconds_per_case": 1.0, "quick": False}


def fake(calls: list[Case], native: float = 200, stop: int | None = None):
    def measured(one, backends, device, rounds, limit):
        calls.append(one)
        if stop is not None and len(calls) > stop:
            raise KeyboardInterrupt
        return synthetic(one, native)

    return measured


@pytest.fixture
def commit(monkeypatch):
    """Names the commit that the environment reports."""

    def set_to(name: str) -> None:
        monkeypatch.setattr(results, "_commit", lambda: name)

    set_to(COMMIT)
    return set_to


def run(out, calls, *, native=200, stop=None, settings=SETTINGS, measuring=None, **options) -> int:
    """A run without pictures, which nobody looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "measure", measuring or fake(calls, native, stop))
        patch.setattr(pictures, "draw", lambda *_: [])
        return runner.run("operators", CASES, CPU, out, settings, **options)


# ---- files, interruption, resumption -------------------------------------------------------------


def test_files_hold_what_was_measured(tmp_path):
    rows = synthetic(small(levels=(1, 2)))
    rows[1].error_dx = math.nan
    made = record(rows)
    everything, table = sorted(made.write(tmp_path / "new" / "operators"), reverse=True)
    assert (table.suffix, everything.suffix) == (".csv", ".json")
    header, first, *rest = table.read_text().splitlines()
    assert header.startswith("suite,operator,case,shape,layout,dtype,threads,levels,direction,what")
    assert first.startswith("operators,ppcr,small,2x16x8x8,contiguous,float32,1,1-2,forward,copy")
    assert len(rest) == len(rows) - 1
    again = results.read(everything)
    assert math.isnan(again.rows[1].error_dx)
    rows[1].error_dx = again.rows[1].error_dx = 0.0
    assert again == dataclasses.replace(
        made, rows=[results.Row(**results.rounded(vars(r))) for r in rows]
    )


def test_the_environment_says_where_and_with_what():
    env = results.environment(CPU)
    assert env["torch"] == torch.__version__
    assert {"date", "commit", "cpu", "capability", "threads", "python", "timm"} <= env.keys()
    json.dumps(env)


def test_ctrl_c_keeps_what_was_measured_and_resume_measures_the_rest(commit, tmp_path, capsys):
    calls: list[Case] = []
    assert run(tmp_path, calls, stop=2) == runner.INTERRUPTED
    found = results.read(tmp_path / "operators.json")
    assert not found.complete
    assert {one.place for one in found.rows} == {one.place for one in CASES[:2]}
    assert "INTERRUPTED, incomplete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="incomplete: its run was interrupted"):
        render.take(tmp_path, tmp_path / "kept")

    assert run(tmp_path, calls, resuming=True) == 0
    assert calls == [*CASES[:3], *CASES[2:]]
    found = results.read(tmp_path / "operators.json")
    assert found.complete
    assert [one.place for one in found.rows if one.kind == "copy"] == [one.place for one in CASES]
    assert run(tmp_path, calls, resuming=True) == 0
    assert len(calls) == 5
    assert len((tmp_path / "operators.csv").read_text().splitlines()) == 1 + len(found.rows)
    taken = render.take(tmp_path, tmp_path / "kept")
    ends = (".json", ".csv", "_roofline.png", "_speedup.png")
    assert [path.name for path in taken] == [f"operators{end}" for end in ends]
    assert {path.parent.name for path in taken} == {"cpu"}


@pytest.mark.parametrize("change", ["commit", "changed files", "settings", "another file"])
def test_rows_that_may_differ_are_not_resumed(change, commit, tmp_path, capsys):
    calls: list[Case] = []
    run(tmp_path, calls)
    settings = SETTINGS
    if change == "commit":
        commit("ba9876543210")
    elif change == "changed files":
        commit(COMMIT + "+")
    elif change == "settings":
        settings = SETTINGS | {"rounds": 10}
    else:
        (tmp_path / "operators.json").write_text('{"rows": [{}]}')
        with pytest.raises(ValueError, match=r"operators\.json is not a file of"):
            run(tmp_path, calls, resuming=True)
        return
    capsys.readouterr()
    assert run(tmp_path, calls, resuming=True, settings=settings) == 0
    assert len(calls) == 2 * len(CASES)
    assert "not resumed" in capsys.readouterr().out


def test_measured_files_do_not_count_as_changes(monkeypatch):
    asked = []
    monkeypatch.setattr(results, "_git", lambda *args: asked.append(args) or "")
    results._commit()
    assert ":(top,exclude)benchmarks/results" in asked[0]


def test_an_error_above_its_tolerance_is_named_and_exits_1(commit, tmp_path, capsys):
    def wrong(one, *args):
        rows = synthetic(one)
        rows[2] = dataclasses.replace(rows[2], within=False, error_y=0.5)
        return rows

    assert run(tmp_path, [], measuring=wrong) == 1
    printed = capsys.readouterr().out
    where = "native, ppcr forward, ppcr one, contiguous: y 0.5"
    assert f"error above tolerance: {where}" in printed


def test_other_load_is_named(commit, tmp_path, capsys):
    def disturbed(one, *args):
        rows = synthetic(one)
        rows[0].other_load = 0.25 if one == CASES[1] else 0.01
        return rows

    assert run(tmp_path, [], measuring=disturbed) == 0
    printed = capsys.readouterr().out
    assert "do not trust the times of: ppcr ppcr two, contiguous (25.0%).\n" in printed


# ---- comparison ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((98, 100, 102, 50), (118, 120, 122, 50), True),
        ((98, 100, 102, 50), (106, 108, 110, 50), False),  # within 10 %
        ((90, 100, 125, 50), (118, 120, 122, 50), False),  # quartiles overlap
        ((90, 100, 125, 50), (118, 120, 122, 45), False),  # in time alone
        ((98, 100, 102, 50), (118, 120, 122, 60), False),  # the copy is as much slower: the machine
        ((98, 100, 102, 50), (98, 100, 102, 40), False),  # the copy alone is faster
        ((118, 120, 122, 50), (98, 100, 102, 50), False),
    ],
)
def test_the_rule_of_noise(old, new, expected):
    def timed(low, median, high, copy):
        times = {"low_us": low, "high_us": high, "copy_fraction": copy / median}
        one = row(small(), "native", "forward", median, "fused", **times)
        (found,) = results.timings(record([one])).values()
        return found

    assert results.slower(timed(*old), timed(*new)) == expected


def test_compare_names_what_got_slower_and_exits_1(commit, tmp_path, capsys):
    calls: list[Case] = []
    run(tmp_path / "old", calls)
    old = tmp_path / "old" / "operators.json"
    assert run(tmp_path / "same", calls, against=old) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out
    assert run(tmp_path / "new", calls, native=300, against=old) == 1
    printed = capsys.readouterr().out
    where = "operators, ppcr, ppcr one, 2x16x8x8, contiguous, float32, 1, 1x2x4, native, forward"
    assert f"slower: {where}: 200.0 us then, 300.0 us" in printed
    assert "12 slower, 0 faster" in printed
    assert run(tmp_path / "fast", calls, native=100, against=old) == 0
    assert "0 slower, 12 faster" in capsys.readouterr().out
    assert run(old.parent, calls, native=300, against=old) == 1  # read before it is overwritten


def test_compare_refuses_another_file_before_it_measures(commit, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    calls: list[Case] = []
    with pytest.raises(ValueError, match=r"other\.json is not a file of"):
        run(tmp_path, calls, against=tmp_path / "other.json")
    assert calls == []


# ---- pages ---------------------------------------------------------------------------------------


def test_pages_say_what_the_files_say(commit, tmp_path, monkeypatch):
    measured, kept = tmp_path / "measured", tmp_path / "results"
    assert run(measured, []) == 0
    found = cases.scaling(CPU, quick=True, threads=[1, 2])
    monkeypatch.setattr(runner, "measure", fake([]))
    assert runner.run("scaling", found, CPU, measured, SETTINGS) == 0
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    render.take(measured, kept)
    page = report.page(kept / "cpu")
    assert "| **native**, share of a copy's bandwidth | 0.50 (0.50 to 0.50) |" in page
    assert "| level by level over native              | 4.00 (4.00 to 4.00) |" in page
    assert f"commit {COMMIT}" in page
    lines = page.partition("## Scaling")[2].splitlines()
    (header,) = (cells(line) for line in lines if "pixels" in line)
    (native,) = (cells(line) for line in lines if line.startswith("| native, 2 threads, forward "))
    assert dict(zip(header, native, strict=True)) == {
        "": "native, 2 threads, forward",
        "pixels": "0.00 (256 to 65536)",
        "channels": "0.00 (32 to 2048)",
        "levels": "0.00 (3 to 63)",
        "batch": "0.00 (1 to 64)",
    }
    assert "Faster than `native`: none." in page
    text = report.section([kept / "cpu"])
    assert "(benchmarks/results/cpu/README.md)" in text


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_page_in_the_repository_says_what_the_measured_files_say():
    for path, text in render.texts().items():
        assert path.read_text() == text, f"{path}: run python -m benchmarks.render"


def test_a_figure_changed_by_hand_is_noticed(commit, tmp_path, monkeypatch, capsys):
    run(tmp_path / "measured", [])
    render.take(tmp_path / "measured", tmp_path / "benchmarks" / "results")
    both = itertools.product(("gain", "results"), ("start", "end"))
    markers = itertools.starmap(render.MARKERS.format, both)
    (tmp_path / "README.md").write_text("\n".join(("before", *markers, "after\n")))
    monkeypatch.setattr(render, "texts", lambda root=tmp_path, make=render.texts: make(root))
    assert render.main([]) == 0
    assert "written" in capsys.readouterr().out
    for path in (tmp_path / "README.md", tmp_path / "benchmarks" / "results" / "cpu" / "README.md"):
        right = path.read_text()
        path.write_text(right.replace("2.00", "2.01"))
        assert render.main([]) == 0
        assert f"{path}: written" in capsys.readouterr().out
        assert path.read_text() == right
    assert render.main([]) == 0
    assert "written" not in capsys.readouterr().out


def test_a_first_impression_is_not_taken_for_a_result(commit, tmp_path):
    run(tmp_path, [], settings=SETTINGS | {"quick": True})
    with pytest.raises(ValueError, match="measured with --quick"):
        render.take(tmp_path, tmp_path / "kept")


def test_taking_nothing_is_an_error(tmp_path, capsys):
    assert render.main(["--take", str(tmp_path)]) == 1
    assert "run make bench" in capsys.readouterr().err


# ---- the command ---------------------------------------------------------------------------------


def bench(out, *arguments: str) -> int:
    return command.main([*arguments, "--threads", "1", "--device", "cpu", "--out", str(out)])


def test_the_command_runs_a_suite(monkeypatch, tmp_path, capsys):
    one = small(plain=("pooled once",), directions=("forward", "step"))
    monkeypatch.setitem(cases.SUITES, "operators", lambda device, **options: [one])
    assert bench(tmp_path, "operators", "--rounds", "2") == 0
    content = json.loads((tmp_path / "operators.json").read_text())
    assert content["complete"]
    names = {
        "native",
        "reference",
        "pooled once",
        "copy",
        "lower bound",
        "lower bound with autograd",
    }
    assert {one["what"] for one in content["rows"]} == names
    assert content["environment"]["device"] == "cpu"
    assert (tmp_path / "operators_speedup.png").stat().st_size > 10_000
    assert "wrote" in capsys.readouterr().out


def test_the_shapes_are_measured_in_every_dtype_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "SHAPES", ((1, 8, 5, 5),))
    assert bench(tmp_path, "shapes", "--rounds", "2", "--no-compile") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"shapes.csv", "shapes.json", "shapes.png"}
    printed = capsys.readouterr().out
    assert printed.index("over the lower bound") < printed.index("errors against float64")
    found = results.read(tmp_path / "shapes.json")
    assert found.environment["threads"] == 1
    assert {one.dtype for one in found.rows} == {"float32", "float16", "bfloat16"}
    backends = set(ppcr_ext.available_backends())
    for dtype, plain in (
        ("float16", set()),
        ("float32", {"pooled once", "level by level", "matmul"}),
    ):
        whats = {one.what for one in found.rows if one.dtype == dtype and one.kind != "lower bound"}
        assert whats == backends | plain | {"copy"}


def test_exit_status_1_when_an_error_exceeds_its_tolerance(monkeypatch, tmp_path, capsys):
    right = ppcr_ext.ppcr
    wrong = lambda x, *args, **kwargs: right(x, *args, **kwargs) * 1.0001  # noqa: E731
    monkeypatch.setattr(ppcr_ext, "ppcr", wrong)
    monkeypatch.setattr(cases, "SHAPES", ((2, 8, 4, 4),))
    monkeypatch.setattr(cases, "LAYOUTS", testing.LAYOUTS[:1])
    options = ("--rounds", "2", "--no-compile")
    assert bench(tmp_path, "shapes", *options) == 1
    printed = capsys.readouterr().out
    assert "error above tolerance: native, ppcr forward, 2x8x4x4, contiguous" in printed
    assert "**NO**" in printed
    assert (tmp_path / "shapes.json").is_file()


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--threads", "-1"]])
def test_bad_arguments_are_explained(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert "--rounds and --threads must be above 0" in capsys.readouterr().err


def test_the_command_hands_its_options_to_the_suites(monkeypatch):
    given = []
    monkeypatch.setattr(runner, "run", lambda *args, **options: given.append((args, options)) or 3)
    assert command.main(["end-to-end", "--quick", "--resume"]) == 3
    (name, found, _, _, settings), options = given[-1]
    assert (name, len(found), settings["rounds"], options["resuming"]) == ("end_to_end", 1, 7, True)
    assert command.main(["end-to-end", "--no-compile", "--device", "cpu"]) == 3
    assert [one.compiled for one in given[-1][0][1]] == [()] * 4
    assert command.main(["operators", "--no-compile", "--device", "cpu"]) == 3
    assert {one.compiled for one in given[-1][0][1]} == {()}
    assert given[-1][0][4]["seconds_per_case"] == 2.0
    assert command.main(["scaling", "--threads", "3", "--device", "cpu"]) == 3
    assert {one.threads for one in given[-1][0][1]} == {3}


def test_every_processor_has_a_line_for_each_direction(tmp_path):
    """Of the shapes, from its own file, and what is faster there."""
    for name in ("cpu", "cpu-other"):
        shutil.copytree(render.RESULTS / "cpu", tmp_path / name)
    other = tmp_path / "cpu-other" / "shapes.json"
    record = json.loads(other.read_text())
    record["environment"]["date"] = "2026-01-02T03:04:05"
    for measured in record["rows"]:
        if measured["what"] == "native":
            measured["ratio"] = 3.0
        if measured["what"] == "matmul" and measured["case"] == "32x64x8x8":
            measured["median_us"] = 1e-3
    other.write_text(json.dumps(record))
    lines = report.section(render.devices(tmp_path)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    assert cells(lines[at - 1]) == [
        "", "native / lower bound", "spread of the lower bound", "plain PyTorch / native",
        "`torch.compile` / native",
    ]  # fmt: skip
    table = {line[0]: line[1:] for line in map(cells, lines[at + 1 : at + 5])}
    forward, step, *first = sorted(table, key=lambda name: not name.startswith("cpu-other"))
    assert all(name.startswith("cpu, float32, 20") for name in first)
    assert forward == "cpu-other, float32, 2026-01-02, forward"
    assert step == "cpu-other, float32, 2026-01-02, forward+backward"
    for here, there in zip(first, (forward, step), strict=True):
        assert table[there][0] == "3.00 (3.00 to 3.00)" != table[here][0]
        assert table[there][1] == table[here][1]
        assert table[there][2].startswith("0.") != table[here][2].startswith("0.")
    here, there = sorted(line for line in lines if line.startswith("- ["))[::-1]
    assert here.startswith("- [cpu](benchmarks/results/cpu/README.md): ")
    assert "2026-01-02, commit" in there
    assert "pooled once compiled 9 of 150 (0.68)" in here
    assert "matmul" not in here
    assert re.search(r"matmul \d of \d+ \(0\.00\)", there)
