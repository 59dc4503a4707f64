"""Runs of the benchmark suites: files, interruption, resumption, comparison, pages, and the command."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from benchmark_rows import group, synthetic

from benchmarks import __main__ as command
from benchmarks import compare, files, operators, pages, pictures, render, scaling, session, timing
from benchmarks.measure import Group, Measured

CPU = torch.device("cpu")
COMMIT = "0123456789ab"

GROUPS = [group(operator=o, case=f"{o} {n}") for o in ("ppcr", "add_relu") for n in ("one", "two")]


def fake(calls: list[Group], native: float = 200, stop: int | None = None):
    def measured(one, backends, device, rounds, limit):
        calls.append(one)
        if stop is not None and len(calls) > stop:
            raise KeyboardInterrupt
        return Measured(synthetic(one, native))

    return measured


@pytest.fixture
def commit(monkeypatch):
    """Names the commit that the environment reports."""

    def set_to(name: str) -> None:
        monkeypatch.setattr(files, "_commit", lambda: name)

    set_to(COMMIT)
    return set_to


def run(out, calls, *, native=200, stop=None, **options) -> int:
    options = {"rounds": 9, "limit": 1.0, "draw": lambda rows, out, environment: []} | options
    return session.run(
        "operators", GROUPS, CPU, out, measuring=fake(calls, native, stop), **options
    )


# ---- files, interruption, resumption ------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_measured_and_resume_measures_the_rest(commit, tmp_path, capsys):
    calls: list[Group] = []
    assert run(tmp_path, calls, stop=2) == session.INTERRUPTED
    record = session.read(tmp_path / "operators.json")
    assert not record.complete
    assert {one.group for one in record.rows} == {one.key for one in GROUPS[:2]}
    assert "INTERRUPTED, incomplete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="incomplete: its run was interrupted"):
        render.take(tmp_path, tmp_path / "kept")

    assert run(tmp_path, calls, resuming=True) == 0
    assert calls == [*GROUPS[:3], *GROUPS[2:]]
    record = session.read(tmp_path / "operators.json")
    assert record.complete
    assert [one.group for one in record.rows if one.kind == "copy"] == [one.key for one in GROUPS]
    assert run(tmp_path, calls, resuming=True, draw=pictures.draw_operators) == 0
    assert len(calls) == 5
    assert len((tmp_path / "operators.csv").read_text().splitlines()) == 1 + len(record.rows)
    taken = render.take(tmp_path, tmp_path / "kept")
    assert {path.name for path in taken} == {
        "operators.json",
        "operators.csv",
        "operators_roofline.png",
        "operators_speedup.png",
    }
    assert {path.parent.name for path in taken} == {"cpu"}


def test_an_interruption_inside_a_measurement_leaves_the_process_as_it_was():
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), timing.quiet():
        interrupted()
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))  # compiles: the stance is back


@pytest.mark.parametrize(
    "change", ["commit", "changed files", "settings", "another program's file"]
)
def test_rows_that_may_differ_are_not_resumed(change, commit, tmp_path, capsys):
    calls: list[Group] = []
    run(tmp_path, calls)
    options = {"resuming": True}
    if change == "commit":
        commit("ba9876543210")
    elif change == "changed files":
        commit(COMMIT + "+")
    elif change == "settings":
        options["rounds"] = 10
    else:
        (tmp_path / "operators.json").write_text('{"rows": [{}]}')
        with pytest.raises(ValueError, match=r"operators\.json is not a file of"):
            run(tmp_path, calls, **options)
        return
    capsys.readouterr()
    assert run(tmp_path, calls, **options) == 0
    assert len(calls) == 2 * len(GROUPS)
    assert "not resumed" in capsys.readouterr().out


def test_measured_files_do_not_count_as_changes(monkeypatch):
    asked = []
    monkeypatch.setattr(files, "_git", lambda *args: asked.append(args) or "")
    files._commit()
    assert ":(top,exclude)benchmarks/results" in asked[0]


def test_an_error_above_its_tolerance_is_named_and_exits_1(commit, tmp_path, capsys):
    def wrong(one, *args):
        rows = synthetic(one)
        rows[1] = dataclasses.replace(rows[1], within=False, error_y=0.5)
        return Measured(rows)

    options = {"rounds": 3, "limit": 1.0, "draw": lambda *args: [], "measuring": wrong}
    assert session.run("operators", GROUPS[:1], CPU, tmp_path, **options) == 1
    assert (
        "error above tolerance: native, ppcr forward, ppcr one, contiguous, float32: y 0.5"
        in capsys.readouterr().out
    )


# ---- comparison ---------------------------------------------------------------------------------------------------------------------


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
    assert compare.slower(compare.Timed(*old), compare.Timed(*new)) == expected


def test_compare_names_what_got_slower_and_exits_1(commit, tmp_path, capsys):
    calls: list[Group] = []
    run(tmp_path / "old", calls)
    old = tmp_path / "old" / "operators.json"
    assert run(tmp_path / "same", calls, against=old) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out
    assert run(tmp_path / "new", calls, native=300, against=old) == 1
    printed = capsys.readouterr().out
    assert (
        "slower: operators, ppcr, ppcr one, 2x16x8x8, contiguous, float32, 1, 1x2x4, native, forward: 200.0 us then, 300.0 us"
        in printed
    )
    assert "12 slower, 0 faster" in printed
    assert run(tmp_path / "fast", calls, native=100, against=old) == 0
    assert "0 slower, 12 faster" in capsys.readouterr().out
    assert run(old.parent, calls, native=300, against=old) == 1  # read before it is overwritten


def test_compare_refuses_another_file_before_it_measures(commit, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    calls: list[Group] = []
    with pytest.raises(ValueError, match="cannot compare with"):
        run(tmp_path, calls, against=tmp_path / "other.json")
    assert calls == []


# ---- pages and pictures -------------------------------------------------------------------------------------------------------------


def test_pages_say_what_the_files_say(commit, tmp_path):
    results = tmp_path / "results"
    assert run(tmp_path / "measured", []) == 0
    groups = [*scaling.groups(CPU, quick=True, threads=[1, 2])]
    options = {"rounds": 9, "limit": 1.0, "draw": pictures.draw_scaling, "measuring": fake([])}
    assert session.run("scaling", groups, CPU, tmp_path / "measured", **options) == 0
    assert (tmp_path / "measured" / "scaling.png").stat().st_size > 10_000
    render.take(tmp_path / "measured", results)
    text = pages.headline(results / "cpu")
    assert (
        "| **native** | 1, at 0.50 of a copy's bandwidth | 1, at 0.25 of a copy's bandwidth |"
        in text
    )
    assert "| pooled once | 2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00) |" in text
    assert f"commit {COMMIT}" in text
    page = pages.page(results / "cpu")
    assert "| level by level | 4.00 (4.00 to 4.00) |" in page
    assert "| native, forward, 2 threads | batch | 0.00 | 1 to 64 |" in page
    assert "(benchmarks/results/cpu/README.md)" in render.section(results)


def test_every_page_in_the_repository_says_what_the_measured_files_say():
    for path, text in render.texts().items():
        assert path.read_text() == text, f"{path}: run python -m benchmarks.render"


def test_a_figure_changed_by_hand_is_noticed(commit, tmp_path, monkeypatch, capsys):
    run(tmp_path / "measured", [])
    render.take(tmp_path / "measured", tmp_path / "benchmarks" / "results")
    (tmp_path / "README.md").write_text(f"before\n{pages.START}\n{pages.END}\nafter\n")
    monkeypatch.setattr(render, "texts", lambda root=tmp_path, make=render.texts: make(root))
    assert render.main([]) == 0
    assert render.main(["--check"]) == 0
    for path in (tmp_path / "README.md", tmp_path / "benchmarks" / "results" / "cpu" / "README.md"):
        right = path.read_text()
        path.write_text(right.replace("2.00", "2.01"))
        assert render.main(["--check"]) == 1
        path.write_text(right)
    assert "differs" in capsys.readouterr().out


def test_a_first_impression_is_not_taken_for_a_result(commit, tmp_path):
    run(tmp_path, [], quick=True)
    with pytest.raises(ValueError, match="measured with --quick"):
        render.take(tmp_path, tmp_path / "kept")


def test_taking_nothing_is_an_error(tmp_path, capsys):
    assert render.main(["--take", str(tmp_path)]) == 1
    assert "run make bench" in capsys.readouterr().err


# ---- the command --------------------------------------------------------------------------------------------------------------------


def test_the_command_runs_a_suite(monkeypatch, tmp_path, capsys):
    small = [group(plain=("pooled once",), directions=("forward", "step"))]
    monkeypatch.setattr(operators, "groups", lambda device, **options: small)
    assert (
        command.main(
            [
                "operators",
                "--rounds",
                "2",
                "--threads",
                "1",
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    content = json.loads((tmp_path / "operators.json").read_text())
    assert content["complete"]
    assert {one["what"] for one in content["rows"]} >= {
        "native",
        "reference",
        "pooled once",
        "copy",
        "floor",
    }
    assert content["environment"]["device"] == "cpu"
    assert (tmp_path / "operators_speedup.png").stat().st_size > 10_000
    assert "wrote" in capsys.readouterr().out


def test_the_command_hands_over_to_the_whole_networks(monkeypatch):
    given = []
    monkeypatch.setattr(command.end_to_end, "run", lambda argv: given.append(argv) or 3)
    assert command.main(["end-to-end", "--quick"]) == 3
    assert given == [["--quick"]]
