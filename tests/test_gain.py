"""What the README says first comes from the measured files."""

import json

import pytest

pytestmark = pytest.mark.full
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from benchmark_rows import record, row, small, synthetic

from benchmarks import render, report
from benchmarks.cases import Case
from benchmarks.results import derived


def network(ratios, direction="step", layout="contiguous", operator="resnet50"):
    """Rows of a network without attention and with some, as multiples of the time without."""
    one = Case("end_to_end", operator, f"{operator} 4x3x224x224", (4, 3, 8, 8), layout)
    kept = {"rounds": 9}
    none = row(one, "none", direction, 100, "network", ratio=1, ratio_low=1, ratio_high=1)
    found = [none]
    for what, ratio in ratios.items():
        low, high = ratio - 0.04, ratio + 0.05
        interval = {"ratio": ratio, "ratio_low": low, "ratio_high": high} | kept
        found.append(row(one, what, direction, 100 * ratio, "network", **interval))
    return derived(found)


RATIOS = {"PPCR fused": 1.021, "PPCR unfused": 1.5, "PPCR plain": 1.125, "SE": 0.99, "CBAM": 1.436}


@pytest.fixture
def folder(tmp_path):
    """A folder of results of a CPU: layers, and whole networks of two kinds."""
    rows = [r for n in (200, 100) for r in synthetic(small(case=f"case {n}"), native=n)]
    record(rows).write(tmp_path / "cpu" / "operators")
    networks = network(RATIOS) + network({"PPCR fused": 3.0, "SE": 2.0}, layout="channels_last")
    record(networks, "end_to_end").write(tmp_path / "cpu" / "end_to_end")
    return tmp_path / "cpu"


def test_the_sentence_and_the_chart(folder):
    head, lines, title, chart = render.gain([folder]).split("\n\n")
    assert "; with backward in parentheses:" in head
    # 400 us over 200 and over 100; nothing was compiled
    assert lines == "- **Some CPU, 2 threads, float32:** 2.8 (2.8) times as fast"
    assert "(2 threads, Some CPU; SE" in " ".join(title.split())
    assert max(map(len, f"{head}\n{title}".splitlines())) <= 100
    assert chart.splitlines()[1:-1] == [
        "SE                   -1 % (-5 to 4 %)",
        "PPCR, this package    2 % (-2 to 7 %)     █",
        "PPCR, plain PyTorch  12 % (8 to 18 %)     ██████",
        "CBAM                 44 % (40 to 49 %)    " + "█" * 22,
    ]


def test_what_a_faster_baseline_is_called(folder):
    faster = "faster than `PPCR fused`: "
    assert f"{faster}SE 2 of 2 (0.67)." in report.section([folder])
    record(network({"PPCR fused": 1.0, "SE": 2.0}), "end_to_end").write(folder / "end_to_end")
    assert f"{faster}none." in report.section([folder])
    tiny = synthetic(small(case="tiny 1x8x2x2"), native=500)
    record(synthetic(small(case="other")) + tiny).write(folder / "operators")
    assert "Faster than `native`: pooled once 3 of 6 (0.80)." in report.section([folder])


def shares(*found, operator="ppcr"):
    """What tools/gpu_plans.py writes: in float16, and lower in float32."""
    return [
        row(
            small(suite="plans", operator=operator, case=str(share), dtype=dtype),
            "native", "forward", 1, "fused", copy_fraction=share / (1 if dtype == "float16" else 9),
        )
        for share in found
        for dtype in ("float16", "float32")
    ]  # fmt: skip


def of(device, rows, command, folder):
    made = record(rows, command)
    made.environment["device"] = device
    made.write(folder / command)


def test_what_gpus_reach(folder):
    gpu = folder.parent / "h1"
    of("H1", shares(0.71, 1.014) + shares(0.1, 2, operator="add_relu"), "plans", gpu)
    assert render.gain([folder, gpu]) == render.gain([folder])  # no times yet
    of("H1", synthetic(small()), "operators", gpu)
    first, second = render.gain(render.devices(folder.parent)).split("\n\n")[1].splitlines()
    words = "2.0 (2.0) times as fast, 0.71 to 1.01 of a copy's speed"
    assert first == f"- **H1, float32:** {words}"
    assert second.startswith("- **Some CPU")


def test_each_input_counts_its_fastest_plain_formulation(folder):
    rows = [r for n in "ab" for r in synthetic(small(case=n))]
    for one in rows:
        if (one.what, one.case) == ("level by level", "b"):
            one.median_us = 200
    record(derived(rows)).write(folder / "operators")
    line = render.gain([folder]).split("\n\n")[1]
    assert line.endswith("1.4 (1.0) times as fast")  # 2 and 1; 2 and 0.5


def test_what_was_measured_last_comes_first(folder):
    newer = folder.parent / "cpu-newer"
    newer.mkdir()
    found = json.loads((folder / "end_to_end.json").read_text())
    found["environment"] |= {"date": "2999-01-01T00:00:00", "cpu": "Another"}
    (newer / "end_to_end.json").write_text(json.dumps(found))
    assert render.devices(folder.parent) == [newer, folder]
    assert "Another" in render.gain([newer, folder])


def test_shares_of_a_copy_are_taken_to_their_device(tmp_path):
    of("NVIDIA Some-GPU 80", shares(0.5), "plans", tmp_path)
    taken = render.take(tmp_path, tmp_path / "kept")
    assert taken == [tmp_path / "kept" / "some-gpu-80" / f"plans.{end}" for end in ("json", "csv")]
    assert taken[0].read_text() == (tmp_path / "plans.json").read_text()


def test_what_torch_compile_makes_of_it(folder):
    rows = synthetic(small())
    one = small()
    for direction, time in (("forward", 300), ("step", 500)):
        rows.append(row(one, "pooled once compiled", direction, time))
    record(derived(rows)).write(folder / "operators")
    assert "float32:** 2.0 (2.0) and 1.5 (1.2) times as fast" in render.gain([folder])


def test_nothing_is_measured(tmp_path):
    assert render.gain([]) == "No measured files yet."


def test_the_readme_gets_both_parts(folder, tmp_path):
    results = tmp_path / "repository" / "benchmarks" / "results"
    results.parent.mkdir(parents=True)
    folder.parent.joinpath("cpu").rename(tmp_path / "cpu_kept")
    results.mkdir()
    (tmp_path / "cpu_kept").rename(results / "cpu")
    readme = tmp_path / "repository" / "README.md"
    of_gain, of_results = (
        [render.MARKERS.format(name, end) for end in ("start", "end")]
        for name in ("gain", "results")
    )
    old = "\nPREVIOUS\n"
    parts = (old.join(of_gain), "between", old.join(of_results), "after\n")
    readme.write_text("\n".join(parts))
    text = render.texts(tmp_path / "repository")[readme]
    assert "PREVIOUS" not in text
    assert text.index("CBAM") < text.index("between") < text.index("2 of 2 (0.67)")
    readme.write_text("\n".join(parts).replace(of_gain[1], ""))
    with pytest.raises(ValueError, match=r"must hold the markers <!-- gain:start -->"):
        render.texts(tmp_path / "repository")
