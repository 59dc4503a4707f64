"""The tables and pictures of the benchmarks say what was measured, and mark what is faster."""

import math

import pytest

pytestmark = pytest.mark.full
pytest.importorskip("matplotlib")

from benchmark_rows import record, row, small, synthetic

from benchmarks import pictures, report
from benchmarks.results import derived


def two_inputs() -> list:
    """Lower bounds of 2 and 4 us; of the second input's step a baseline is the faster one."""
    rows = []
    for case, native, plain in (("a", 4.0, 8.0), ("b", 9.0, 10.0)):
        one = small(suite="shapes", case=case, directions=("forward", "step"))
        half = small(suite="shapes", case=case, dtype="float16")
        rows += derived([
            row(one, "lower bound", "forward", 2.0, "lower bound"),
            row(one, "lower bound", "step", 4.0, "lower bound"),
            row(one, "lower bound with autograd", "step", 6.0, "lower bound"),
            row(one, "native", "forward", native, "fused"),
            row(one, "native", "step", 2 * native, "fused"),
            row(one, "pooled once", "forward", plain),
            row(one, "pooled once", "step", 16.0),
            row(half, "native", "forward", native / 2, "fused"),
        ])  # fmt: skip
    return rows


def cells_of(table: str) -> dict[str, list[str]]:
    """The cells of each line, by the first; all lines are equally long."""
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells if "---" not in first}


def test_the_tables_by_hand():
    rows = two_inputs()
    wide = [one for one in rows if one.dtype == "float32"]
    assert cells_of(report.ratio_table(wide, "native", {})) == {
        "": ["ppcr forward", "ppcr forward+backward"],
        "**native** over the lower bound": ["3.00 (2.00 to 4.50)"] * 2,
        "spread of the lower bound": ["4.0% (4.0% to 4.0%)"] * 2,
        "**native** over the lower bound with autograd": ["-", "2.00 (1.33 to 3.00)"],
        "**native**, share of a copy's bandwidth": [
            "16.67 (11.11 to 25.00)", "8.33 (5.56 to 12.50)"
        ],
        # 8 / 4 and 10 / 9; 16 / 8 and 16 / 18, which is named and not averaged away
        "pooled once over native": [
            "1.49 (1.11 to 2.00)", "**1.33 (0.89 to 2.00), 1 of 2 faster**"
        ],
    }  # fmt: skip
    assert report.faster(rows) == "pooled once, ppcr forward+backward, b, contiguous (0.89)"
    assert report.faster(rows[:8]) == "none"
    half, times = [one for one in rows if one.dtype == "float16"], {}
    for one in wide:
        times[one.case, one.layout, "ppcr forward"] = 4 * half[0].median_us
    found = cells_of(report.ratio_table(half, "native", times))
    assert found["**native** over its time in float32"] == ["0.38 (0.25 to 0.56)"]


def test_a_table_of_inputs_has_the_bounds_spread_and_marks_faster_baselines():
    rows = [one for one in two_inputs() if one.dtype == "float32"]
    found = cells_of(report.bound_table(rows))
    assert found[""] == [
        "spread of the lower bound", "lower bound with autograd", "native", "pooled once"
    ]  # fmt: skip
    assert found["b, contiguous"] == ["4.0% / 4.0%", "1.50", "4.50 / 4.50", "5.00 / **4.00**"]
    old = [one for one in rows if one.what != "lower bound with autograd"]
    found = cells_of(report.bound_table(old))
    assert found["b, contiguous"] == ["4.0% / 4.0%", "4.50 / 4.50", "5.00 / **4.00**"]


def test_a_lower_bound_without_spread():
    """After a single round, for example."""
    still = row(small(), "lower bound", "forward", 2.0, "lower bound")
    still.low_us = still.high_us = still.median_us
    rows = derived([still, row(small(), "native", "forward", 3.0, "fused")])
    found = cells_of(report.ratio_table(rows, "native", {}))
    assert found["spread of the lower bound"] == ["0.0% (0.0% to 0.0%)"]


def test_what_is_faster_where_one_quantity_grows_is_named():
    rows = []
    for images, plain in ((1, 5.0), (2, 20.0)):
        one = small(suite="scaling", case="batch", shape=(images, 8, 4, 4), threads=2)
        native = row(one, "native", "forward", 10.0 * images, "fused")
        rows += derived([native, row(one, "pooled once", "forward", plain)])
    text = report.console(record(rows, "scaling"))
    assert "Faster than `native`: pooled once, ppcr forward, batch 1, 2 threads (0.50)." in text
    assert cells_of(text.partition("\n\n")[2]) == {
        "": ["batch"],
        "native, 2 threads, forward": ["1.00 (1 to 2)"],
        "pooled once, 2 threads, forward": ["2.00 (1 to 2)"],
    }


def test_the_page_of_a_gpu_has_a_table_for_each_layout():
    made = []
    for layout, case, share in (("contiguous", "a", 0.5), ("channels_last", "b", 0.75)):
        one = small(suite="plans", case=case, layout=layout, dtype="float16")
        made.append(row(one, "native", "forward", 1, "fused", copy_fraction=share))
    found = record(made, "plans")
    found.environment["driver"] = "580"
    text, title, table, other, last = report.console(found).split("\n\n")
    assert "Driver 580;" in text
    assert (title, cells_of(table)) == (
        "contiguous:", {"": ["ppcr forward"], "a, float16": ["0.50"]}
    )  # fmt: skip
    assert (other, cells_of(last)["b, float16"]) == ("channels_last:", ["0.75"])


def test_disturbed_rounds_are_named_on_the_page():
    rows = synthetic(small()) + synthetic(small(case="busy"))
    for one in rows:
        one.other_load = 0.25 if one.case == "busy" else 0.01
    text = report.console(record(rows))
    assert text.endswith("do not trust the times of: ppcr busy, contiguous (25.0%).")


def test_times_are_over_those_of_the_first_fused_backend():
    whats = {"native": "fused", "triton": "fused", "native compiled": "fused", "matmul": "plain"}
    times = zip(whats.items(), (10.0, 12.0, 20.0, 15.0), strict=True)
    rows = derived([row(small(), what, "step", t, kind) for (what, kind), t in times])
    assert [one.over_fused for one in rows] == [1, 1.2, 2, 1.5]
    assert record(rows).fused == "native"
    table = report.ratio_table(rows, "native", {})
    assert cells_of(table)["native compiled over native"] == ["2.00 (2.00 to 2.00)"]


def test_an_error_that_is_nan_or_too_large_shows():
    fine = row(small(), "native", "step", 1.0, "fused")
    wrong = row(small(), "native", "step", 1.0, "fused", error_dx=math.nan, within=False)
    assert "1.0e-07 (may be 1e-05)" in report.error_table([fine])
    assert "NO" not in report.error_table([fine])
    text = report.error_table([fine, wrong, fine])
    assert "nan (may be 5e-05)" in text
    assert "**NO**" in text


def test_costs_and_memory_of_calls():
    tiny = [one for o in ("ppcr", "add_relu") for one in synthetic(small(case="tiny", operator=o))]
    text = report.console(record(synthetic(small()) + tiny))
    assert "| ppcr, native             |   200.0 |    400.0 |            400.0 |" in text
    assert f"| ppcr, native         | {' | '.join(3 * ['1.00 (1.00 to 1.00)'])} |" in text
    assert "host" not in text
    on_gpu = [
        row(small(), "native", "forward", 10.0, "fused", host_us=33.0),
        row(small(), "triton", "forward", 5.0, "fused", host_us=44.0),
    ]
    text = report.console(record(derived(on_gpu)))
    assert " 33.0 / 10.0 |" in text
    assert " **44.0 / 5.0** |" in text


@pytest.mark.parametrize("command", ["operators", "shapes", "retina"])
def test_pictures_are_drawn(command, tmp_path):
    rows = [one for case in "ab" for one in synthetic(small(suite=command, case=case))]
    drawn = pictures.draw(record(rows, command), tmp_path)
    ends = ("_roofline", "_speedup") if command == "operators" else ("",)
    assert [path.stem for path in drawn] == [command + end for end in ends]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert pictures.draw(record(synthetic(small(case="tiny"))), tmp_path) == []
