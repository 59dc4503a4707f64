"""The operators and the scaling suite: what they time is right, slow things show as slow, and files survive interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

import ppcr_ext
from benchmarks import __main__ as command
from benchmarks import compare, contenders, errors, files, operators, pages, pictures, render, scaling, session, timing
from benchmarks import measure as measuring
from benchmarks.measure import Group, Measured, Row
from ppcr_ext import reference

CPU = torch.device("cpu")
SHAPE = (2, 16, 8, 8)
COMMIT = "0123456789ab"


def group(**options: object) -> Group:
    return Group(**{"suite": "operators", "operator": "ppcr", "case": "small", "shape": SHAPE, "layout": "contiguous"} | options)


def measure(one: Group, *, slow: float = 0, rounds: int = 3, **replaced: contenders.Contender) -> dict[tuple[str, str], Row]:
    """The rows of a group by (what, direction); ``slow`` seconds more for every call of the native backend."""

    def offer(one, backends, device):
        made = measuring.offer(one, backends, device)
        for contender in made:
            if contender.name == "native" and slow:
                contender.layer = slowed(contender.layer, slow)
        return [replaced.get(c.name, c) for c in made]

    got = measuring.measure(one, ["native", "reference"], CPU, rounds, 1.0, offer)
    return {(row.what, row.direction): row for row in got.rows}


def slowed(layer: contenders.Layer, seconds: float) -> contenders.Layer:
    def later(*args):
        time.sleep(seconds)
        return layer(*args)

    return later


# ---- what is measured ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "forward", "backward", "step"),
    [("ppcr", 2, 3, 5), ("gate", 1 + 1 / 4, 2 + 1 / 4, 3 + 2 / 4), ("add_relu", 3, 5, 8)],
)
def test_the_bytes_an_operator_needs(operator, forward, backward, step):
    shape, dtype = (3, 4, 5, 7), torch.float16
    one = torch.Size(shape).numel() * 2
    counted = contenders.OPERATORS[operator]
    assert [counted.necessary_bytes(d, shape, dtype) for d in contenders.DIRECTIONS] == [forward * one, backward * one, step * one]


@pytest.mark.parametrize("operator", contenders.OPERATORS)
def test_the_truth_of_every_operator_is_autograds(operator):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    weight, bias = torch.randn(7, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    function = getattr(reference, contenders.OPERATORS[operator].function)
    tensors = [x, residual] if operator == "add_relu" else [x]
    leaves = [t.clone().requires_grad_() for t in (*tensors, weight, bias)]
    y = function(*leaves, (1, 2, 4), 1e-5)
    gy = torch.randn_like(y)
    dx, *rest = torch.autograd.grad(y, leaves, gy)
    exact = errors.truth(x, gy, weight, bias, (1, 2, 4), operator, residual if operator == "add_relu" else None)
    torch.testing.assert_close(exact.y, y.detach())
    torch.testing.assert_close(exact.dx, dx)
    torch.testing.assert_close(exact.parameters, torch.cat(rest[-2:]))
    if operator == "add_relu":
        torch.testing.assert_close(exact.dresidual, rest[0])
    if operator == "gate":
        assert (exact.dx_scale >= exact.dx.abs() * (1 - 1e-12)).all()


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
    rows = measure(group(operator=operator, layout=layout, dtype=dtype, shape=shape))
    names = {"native", "reference", "pooled once", "level by level"}
    assert {what for what, _ in rows} == {*names, "copy"} | ({"floor"} if operator != "gate" else set())
    for (what, direction), row in rows.items():
        assert row.within, row
        assert row.error_y is not None
        assert (row.error_parameters is not None) == (what in names and direction != "forward")
        assert row.copy_fraction == pytest.approx(row.gb_per_s / rows["copy", "forward"].gb_per_s)
        assert row.gb_per_s == pytest.approx(row.necessary_bytes / row.median_us / 1e3)
    assert (
        rows["native", "step"].necessary_bytes
        == rows["native", "forward"].necessary_bytes + rows["native", "backward"].necessary_bytes
    )


def test_peak_memory_by_hand():
    x = torch.zeros(1000)

    def run() -> torch.Tensor:
        for _ in range(3):
            torch.cat([x, x, x, x])  # freed at once, one after the other
        return x + 1

    assert measuring.peak_bytes(timing.Call(run), CPU) == 16_000


def test_peak_memory_of_the_operators():
    rows = measure(group(shape=(2, 16, 64, 64)))
    one = rows["native", "forward"].tensor_bytes
    assert one == 2 * 16 * 64 * 64 * 4
    assert one <= rows["native", "forward"].peak_bytes < 1.1 * one
    assert 2 * one <= rows["native", "step"].peak_bytes < 2.1 * one
    assert rows["pooled once", "step"].peak_bytes > 2.2 * one


def test_neighbours_are_compared_with_themselves_in_float64():
    rows = measure(group(neighbours=operators.NEIGHBOURS, plain=()))
    for name in operators.NEIGHBOURS:
        assert rows[name, "step"].kind == "neighbour"
        assert rows[name, "step"].within
        assert rows[name, "step"].error_dx > 0


def test_what_cannot_take_an_input_is_skipped_with_its_reason():
    got = measuring.measure(group(shape=(2, 18, 5, 5), modes=("default",)), ["native"], CPU, 1, 1.0)
    assert {(one["what"], one["reason"].split(":")[0].split(" needs")[0]) for one in got.skipped} == {
        ("pooled once", "pooled_once"),
        ("pooled once compiled", "pooled_once"),
    }


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
    rows = measure(group())
    assert not rows["native", "forward"].within
    assert rows["pooled once", "forward"].within


# ---- how it is timed ----------------------------------------------------------------------------------------------------------------


def test_a_slow_backend_shows_as_slow_and_its_backward_alone_does_not():
    quick, slow = measure(group()), measure(group(), slow=0.02)
    assert slow["native", "forward"].median_us > 20_000
    assert slow["native", "step"].median_us > 20_000
    assert slow["native", "backward"].median_us < 20_000  # the forward is prepared outside the time
    assert slow["native", "forward"].copy_fraction < quick["native", "forward"].copy_fraction / 5
    assert slow["pooled once", "forward"].median_us < 20_000


def test_nothing_is_compiled_inside_a_timed_region(monkeypatch):
    state = {"factor": 1.0}
    plain = torch.compile(lambda x, residual, own: x * state["factor"], backend="eager", fullgraph=True)
    peer = contenders.Contender("pooled once", "neighbour", plain, [torch.zeros(1)], exact=lambda x, residual, own: x * 1.0)
    peer = dataclasses.replace(peer, parameters=[])
    assert ("pooled once", "forward") in measure(group(directions=("forward",)), **{"pooled once": peer})
    quiet = timing.quiet

    @contextlib.contextmanager
    def changing():
        with quiet():
            state["factor"] = 2.0  # what was compiled no longer fits
            yield

    state["factor"] = 1.0
    monkeypatch.setattr(timing, "quiet", changing)
    with pytest.raises(RuntimeError, match="recompile"):
        measure(group(directions=("forward",)), **{"pooled once": peer})


def test_the_compiled_peer_is_right_and_a_program_for_each_direction(monkeypatch):
    made, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda layer, **options: made.append(options) or compile_(layer, backend="aot_eager"))
    rows = measure(group(modes=("default",)))
    assert rows["pooled once compiled", "step"].within
    assert [(options["mode"], options["dynamic"], options["fullgraph"]) for options in made] == 2 * [("default", False, True)]


def test_inputs_rotate_past_the_cache(monkeypatch):
    monkeypatch.setattr(measuring, "cache_bytes", lambda device: 1 << 20)
    ring = measuring.Ring(group(operator="add_relu"), CPU)
    assert ring.bytes >= 1 << 20
    seen = [ring.next() for _ in range(ring.count + 1)]
    assert len({x.data_ptr() for x, _, _ in seen}) == ring.count
    assert seen[0][0].data_ptr() == seen[-1][0].data_ptr()
    assert all(torch.equal(x, ring.x) and torch.equal(residual, ring.residual) for x, _, residual in seen)
    assert measuring.Ring(group(rotate=False), CPU).count == 1


def test_a_limit_ends_the_rounds_but_not_before_the_fewest():
    call = timing.Call(lambda: time.sleep(0.002))
    assert timing.interleave({"a": call}, 100, limit=0)["a"].rounds == timing.FEWEST
    assert timing.interleave({"a": call}, 3, limit=0)["a"].rounds == 3


def test_a_cuda_clock_adds_up_events(monkeypatch):
    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def synchronize(self):
            Event.waited = True

        def elapsed_time(self, other):
            return other.at - self.at  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = timing.clock(torch.device("cuda"))

    def run(*given: object) -> None:
        Event.now += 8.0

    def prepare() -> object:
        Event.now += 100.0
        return None

    assert timing.interleave({"a": timing.Call(run)}, 2, by=clock)["a"].median == pytest.approx(8e-3)
    assert timing.interleave({"a": timing.Call(run, prepare=prepare)}, 2, by=clock)["a"].median == pytest.approx(8e-3)
    assert Event.waited


# ---- plans --------------------------------------------------------------------------------------------------------------------------


def test_a_cpu_measures_a_named_part_and_all_is_everything():
    options = {"compiling": True, "threads": 2}
    part = operators.groups(CPU, everything=False, quick=False, **options)
    product = operators.groups(torch.device("cuda"), everything=True, quick=False, **options)
    quick = operators.groups(CPU, everything=False, quick=True, **options)
    for groups in (part, product, quick):
        assert len({one.key for one in groups}) == len(groups)
        assert {one.operator for one in groups} == {"ppcr", "gate", "add_relu"}
        assert {one.layout for one in groups} == {"contiguous", "channels_last"}
        assert any(one.case.startswith("tiny") and one.neighbours == ("F.layer_norm",) for one in groups)
        assert not any(one.case.startswith("other") for one in groups)
    large = {one.shape for one in part if one.dtype == "float32" and one.operator == "ppcr" and one.rotate}
    assert len(large) == 12
    assert {one.shape for one in part if one.dtype != "float32"} == set(operators.CPU_FEW)
    assert {one.modes for one in part} == {(), ("default",)}
    assert {one.shape for one in part if one.rotate} <= {one.shape for one in product} | set(operators.OTHERS)
    assert {one.dtype for one in product} == set(operators.DTYPES)
    assert {batch for batch, *stage in (one.shape for one in product) if stage == [2048, 7, 7]} == {1, 8, 64, 256}
    assert len(quick) < len(part) / 4
    assert not any(one.modes for one in operators.groups(CPU, everything=False, quick=False, compiling=False, threads=1))


def test_scaling_grows_one_axis_at_a_time():
    groups = scaling.groups(CPU, quick=False, threads=[1, 2])
    assert {(one.case, one.threads) for one in groups} == {(axis, threads) for axis in scaling.AXES for threads in (1, 2)}
    for axis in scaling.AXES:
        series = [row(one, "native", "forward", 1) for one in groups if (one.case, one.threads) == (axis, 1)]
        sizes = [scaling.size(point) for point in series]
        assert sizes == sorted(set(sizes))
        assert len(sizes) >= 5
    assert len(scaling.groups(CPU, quick=True, threads=[1])) < len(groups) / 3


# ---- synthetic rows -----------------------------------------------------------------------------------------------------------------


def row(one: Group, what: str, direction: str, microseconds: float, kind: str = "plain", spread: float = 0.02) -> Row:
    place = (
        one.suite,
        one.operator,
        one.case,
        list(one.shape),
        one.layout,
        one.dtype,
        one.threads,
        list(one.levels),
        direction,
        what,
    )
    low, high = microseconds * (1 - spread), microseconds * (1 + spread)
    return Row(*place, kind, microseconds, low, high, low, high, 9, 1000, 1000 / microseconds, 100 / microseconds, 2000, 0.0)


def synthetic(one: Group, native: float = 200) -> list[Row]:
    """A native backend of 200 us forward and 400 us for the others, a plain one of two and four times that, a copy of 100 us."""
    rows = [row(one, "copy", "forward", 100, "copy")]
    for direction in one.directions:
        own = native * (1 if direction == "forward" else 2)
        rows.append(row(one, "native", direction, own, "fused"))
        rows.append(row(one, "pooled once", direction, 800 if direction != "forward" else 400))
        rows.append(row(one, "level by level", direction, 1600 if direction != "forward" else 800))
    return rows


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
    return session.run("operators", GROUPS, CPU, out, measuring=fake(calls, native, stop), **options)


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
    assert {path.name for path in taken} == {"operators.json", "operators.csv", "operators_roofline.png", "operators_speedup.png"}
    assert {path.parent.name for path in taken} == {"cpu"}


def test_an_interruption_inside_a_measurement_leaves_the_process_as_it_was():
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), timing.quiet():
        interrupted()
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))  # compiles: the stance is back


@pytest.mark.parametrize("change", ["commit", "changed files", "settings", "another program's file"])
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
    assert "error above tolerance: native, ppcr forward, ppcr one, contiguous, float32: y 0.5" in capsys.readouterr().out


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


def test_two_runs_of_the_same_build_agree_and_a_slower_one_does_not():
    """Noise of a busy machine comes and goes, so that one of three pairs has to agree; what is really slower shows in each."""

    def timed(slow: float = 0) -> compare.Old:
        rows = measure(group(directions=("forward",), shape=(4, 32, 32, 32)), slow=slow, rounds=15)
        return compare.Old({}, compare.timings([dataclasses.asdict(one) for one in rows.values()]))

    first = timed()
    found = []
    for _ in range(3):
        second = timed()
        found.append(compare.against(first, second)[1])
        if not found[-1]:
            break
        first = second
    assert [] in found, found
    report, slower = compare.against(first, timed(slow=0.005))
    assert "native" in {key[-2] for key in slower}, report


# ---- pages and pictures -------------------------------------------------------------------------------------------------------------


def test_a_power_law_is_fitted_to_the_largest_sizes():
    groups = [one for one in scaling.groups(CPU, quick=False, threads=[2]) if one.case == "batch"]
    times = [50.0, 50.0, 50.0, *(3 * one.shape[0] ** 1.5 for one in groups[3:])]
    rows = [row(one, "native", "forward", took) for one, took in zip(groups, times, strict=True)]
    (fit,) = scaling.fits(rows)
    assert (fit.axis, fit.threads, fit.first, fit.last) == ("batch", 2, 8, 64)
    assert fit.exponent == pytest.approx(1.5)
    assert fit.factor == pytest.approx(3)


def test_pages_say_what_the_files_say(commit, tmp_path):
    results = tmp_path / "results"
    assert run(tmp_path / "measured", []) == 0
    groups = [*scaling.groups(CPU, quick=True, threads=[1, 2])]
    options = {"rounds": 9, "limit": 1.0, "draw": pictures.draw_scaling, "measuring": fake([])}
    assert session.run("scaling", groups, CPU, tmp_path / "measured", **options) == 0
    assert (tmp_path / "measured" / "scaling.png").stat().st_size > 10_000
    render.take(tmp_path / "measured", results)
    text = pages.headline(results / "cpu")
    assert "| **native** | 1, at 0.50 of a copy's bandwidth | 1, at 0.25 of a copy's bandwidth |" in text
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
    assert command.main(["operators", "--rounds", "2", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "operators.json").read_text())
    assert content["complete"]
    assert {one["what"] for one in content["rows"]} >= {"native", "reference", "pooled once", "copy", "floor"}
    assert content["environment"]["device"] == "cpu"
    assert (tmp_path / "operators_speedup.png").stat().st_size > 10_000
    assert "wrote" in capsys.readouterr().out


def test_the_command_hands_over_to_the_whole_networks(monkeypatch, capsys):
    import sys
    import types

    given = []
    module = types.ModuleType("benchmarks.end_to_end")
    module.__spec__ = types.SimpleNamespace(name="benchmarks.end_to_end")
    module.run = lambda argv: given.append(argv) or 3
    monkeypatch.setitem(sys.modules, "benchmarks.end_to_end", module)
    assert command.main(["end-to-end", "--quick"]) == 3
    assert given == [["--quick"]]
