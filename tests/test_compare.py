"""The comparison of attention layers: tables, equal conditions, resuming, and clear lines."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
stats = pytest.importorskip("scipy.stats")
from example_programs import ENVIRONMENT, TORCHRUN, bars, caller, command, medmnist, png, run, table

pytestmark = pytest.mark.full
TINY = ["--model", "small/4", "--batch", "20", "--epochs", "2", "--threads", "1"]
PAIR = ["--attention", "none,ppcr", "--seeds", "2", "--rounds", "0"]
TABLES = ("runs.csv", "summary.csv", "differences.csv", "comparison.md")


@pytest.fixture
def call(monkeypatch, capsys):
    threads = torch.get_num_threads()
    yield caller(monkeypatch, capsys)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "bars.npz"
    bars(path)
    return path


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The pair of methods, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    result = run("compare.py", "--data", images, *TINY, *PAIR, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "Test accuracy over 2 seeds: " in result.stdout
    return out


def same_tables(one, two):
    for name in TABLES:
        assert (one / name).read_text() == (two / name).read_text(), name
    for path in two.glob("runs/*/*/metrics.csv"):
        rows = [table(path), table(one / path.relative_to(two))]
        for row in (*rows[0], *rows[1]):
            row.pop("seconds")
        assert rows[0] == rows[1], path


def test_tables_and_pictures(images, tmp_path, call):
    """Recomputed from what the trainer wrote for each run."""
    methods = ("none", "se", "eca", "cbam", "ppcr")
    options = ["--data", images, *TINY, "--epochs", 1, "--seeds", 2, "--rounds", 6]
    assert call("compare.py", *options, "--out", tmp_path)[0] == 0
    tests = {
        (seed, method): table(tmp_path / "runs" / f"seed{seed}" / method / "test.csv")[0]
        for seed in range(2)
        for method in methods
    }
    runs = table(tmp_path / "runs.csv")
    assert [(int(row["seed"]), row["attention"]) for row in runs] == list(tests)
    for row in table(tmp_path / "summary.csv"):
        values = [float(tests[seed, row["attention"]][row["metric"]]) for seed in range(2)]
        assert float(row["mean"]) == pytest.approx(np.mean(values), abs=1e-6)
        assert float(row["std"]) == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    pairs = [(method, "none") for method in methods[1:]]
    pairs += [("ppcr", method) for method in methods[1:-1]]
    differences = table(tmp_path / "differences.csv")
    assert [(r["attention"], r["minus"]) for r in differences] == [p for p in pairs for _ in "1234"]
    for row in differences:
        ours, theirs = (
            np.array([float(tests[seed, row[name]][row["metric"]]) for seed in range(2)])
            for name in ("attention", "minus")
        )
        values = ours - theirs
        assert float(row["difference"]) == pytest.approx(values.mean(), abs=1e-6)
        assert float(row["bootstrap_low"]) == pytest.approx(values.min(), abs=1e-6)
        assert float(row["bootstrap_high"]) == pytest.approx(values.max(), abs=1e-6)
        assert int(row["won"]) == (values > 0).sum()
        assert int(row["lost"]) == (values < 0).sum()
    costs = {row["attention"]: row for row in table(tmp_path / "cost.csv")}
    assert tuple(costs) == methods
    assert costs["ppcr"]["parameters_added"] == str(4 * 8)  # four layers of 7 weights and a bias
    assert (costs["none"]["step_ratio"], costs["none"]["parameters_added"]) == ("1.0", "0")
    for method in methods[1:]:
        row = costs[method]
        assert float(row["peak_ratio"]) > 1  # it keeps something for backward
        low, ratio, high = (float(row[f"step_ratio{end}"]) for end in ("_low", "", "_high"))
        assert low <= ratio <= high
        assert high > 0
    assert all(png(tmp_path / f"{name}.png") for name in ("differences", "learning_curves"))
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert len(content["differences"]) == len(differences)
    assert content["verdict"] in (tmp_path / "comparison.md").read_text()


def test_equal_batches_in_turn(images, tmp_path, call, monkeypatch):
    """Every method of a seed sees the same augmented images, and no seed begins early."""
    import train

    seen, step = {}, train.Trainer.step

    def recording(self, x, labels):
        key = (self.options.seed, self.options.attention)
        seen.setdefault(key, []).append((x.clone(), labels.clone()))
        return step(self, x, labels)

    monkeypatch.setattr(train.Trainer, "step", recording)
    options = ["--data", images, *TINY, *PAIR, "--attention", "none,cbam,ppcr", "--augment"]
    assert call("compare.py", *options, "--out", tmp_path)[0] == 0
    methods = ("none", "cbam", "ppcr")
    assert list(seen) == [(seed, method) for seed in range(2) for method in methods]
    for seed in range(2):
        for method in methods[1:]:
            for ours, theirs in zip(seen[seed, method], seen[seed, "none"], strict=True):
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(seen[0, "none"][0][0], seen[1, "none"][0][0])


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_stopped_at_any_write_and_resumed(before, images, whole, tmp_path, call, monkeypatch):
    """Right before or right after a file is in its place, again and again."""
    import files

    write, calls = files.write_atomically, []

    def failing(path, content):
        calls.append(path)
        stop = len(calls) == at
        if not (stop and before):
            write(path, content)
        if stop:
            raise Stopped

    options = ["--data", images, *TINY, *PAIR, "--out", tmp_path / "parts"]
    for module in ("train", "report"):  # nobody looks at these pictures
        imported = __import__(module)
        for name in ("draw", "draw_differences", "draw_learning_curves"):
            if hasattr(imported, name):
                monkeypatch.setattr(imported, name, lambda *arguments: None)
    monkeypatch.setattr(files, "write_atomically", failing)
    for at in (2, 3, 4, 5) * 3:  # noqa: B007 (failing reads it)
        calls.clear()
        with pytest.raises(Stopped):
            call("compare.py", *options)
    at = None
    assert call("compare.py", *options)[0] == 0
    same_tables(tmp_path / "parts", whole)


def test_killed_at_a_random_moment_and_resumed(images, whole, tmp_path, call):
    """Two runs at a time, killed while one of them is under way; they end with their parent."""
    options = ["--data", images, *TINY, *PAIR, "--out", tmp_path]
    started = subprocess.Popen(
        command("compare.py", *options, "--jobs", 2),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    limit = time.monotonic() + 200
    while not any(tmp_path.glob("runs/*/*/checkpoint.pt")):
        assert started.poll() is None, started.stdout.read()
        assert time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(float(np.random.default_rng().uniform(0, 0.5)))
    started.send_signal(signal.SIGKILL)
    started.communicate(timeout=60)  # until the last process that could write there has ended
    assert not (tmp_path / "comparison.json").exists() or len(table(tmp_path / "runs.csv")) < 4
    assert call("compare.py", *options)[0] == 0
    same_tables(tmp_path, whole)


def test_two_processes_on_each_run(images, tmp_path):
    options = ["--data", images, *TINY, *PAIR, "--epochs", 1, "--rounds", 6, "--out", tmp_path]
    result = run("compare.py", *options, start=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Test accuracy over 2 seeds: ") == 1
    assert len(table(tmp_path / "runs.csv")) == 4
    assert json.loads((tmp_path / "settings.json").read_text())["processes"] == 2


def test_divergence_one_seed_and_a_missing_class(tmp_path, call, capsys):
    """Each of the three in a line of its own, and the tables leave what they cannot say empty."""
    labels = np.arange(60).reshape(-1, 1) % 2
    bars(tmp_path / "bars.npz", test_labels=labels)
    options = ["--data", tmp_path / "bars.npz", *TINY, *PAIR, "--seeds", 1, "--lr", 1e25]
    assert call("compare.py", *options, "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert "The test images hold none of class 2: there is no AUC" in text
    for method in ("none", "ppcr"):
        line = f"{method} trained to NaN or infinity with seed 0: it has no mean and no difference"
        assert line in text
    assert "One seed: no standard deviation and no interval." in text
    assert text[-1].startswith("One seed says nothing about others")
    assert all(row["mean"] == "" for row in table(tmp_path / "out" / "summary.csv"))
    assert all(row["difference"] == "" for row in table(tmp_path / "out" / "differences.csv"))
    json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention", "none,ppcr,ppcr"], "--attention: 'ppcr' is there twice"),
        (["--attention", "none,psychic"], "--attention: 'psychic' is none of ppcr, se,"),
        (["--attention", "ppcr,se"], "--attention needs none, the baseline"),
        (["--attention", "none"], "--attention needs none, the baseline of all differences, and"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--rounds", "5"], "--rounds must be 0 or at least 6, got 5"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--data", "missing.npz"], "neither digits nor an existing file"),
        (["--model", "timm/nothing"], "--model: timm/nothing cannot be built"),
        (["--batch", "61"], "--batch 61 is more than the 60 training images"),
    ],
)
def test_bad_input(arguments, words, images, tmp_path, call):
    """One line, exit status 2, nothing written."""
    options = ["--data", images, *TINY, *PAIR, "--out", tmp_path / "out"]
    status, said = call("compare.py", *options, *arguments)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("compare.py: error: ")
    assert words in said
    assert not (tmp_path / "out").exists()


def test_what_is_under_way_keeps_its_settings(images, whole, tmp_path, call, monkeypatch):
    options = ["--data", images, *TINY, *PAIR, "--out", whole]
    before = {path: path.read_bytes() for path in whole.glob("*.csv")}
    status, said = call("compare.py", *options, "--epochs", 3)
    assert (status, said) == (2, f"compare.py: error: {whole} was made with --epochs 2\n")
    status, said = call("compare.py", *options, "--threads", 2)
    assert (status, said) == (2, f"compare.py: error: {whole} was made with --threads 1\n")
    assert {path: path.read_bytes() for path in whole.glob("*.csv")} == before
    # A folder where no run has begun binds nobody: the first command may have been a mistake.
    (tmp_path / "settings.json").write_text((whole / "settings.json").read_text())
    options = ["--data", images, *TINY, *PAIR, "--epochs", 1, "--seeds", 1, "--out", tmp_path]
    assert call("compare.py", *options)[0] == 0
    import fcntl

    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, said = call("compare.py", *options)
    assert (status, said.count("another comparison is at work in")) == (2, 1)
    (tmp_path / "settings.json").write_text("{")
    status, said = call("compare.py", *options)
    assert (status, said.count("settings.json is not what this program wrote")) == (2, 1)
    monkeypatch.setenv("RANK", "0")
    status, said = call("compare.py", *options, "--jobs", 2)
    assert (status, said.count("--jobs: under torchrun")) == (2, 1)


class TestStatistics:
    """Tables of runs whose results are given."""

    @pytest.fixture(autouse=True)
    def _path(self, call):
        """Lets the modules of examples/ be imported."""

    @staticmethod
    def compared(accuracies, loss=0.1):
        from comparison import METRICS, Comparison, Run

        runs = [
            Run(
                seed,
                method,
                dict.fromkeys(METRICS, value) | {"loss": loss if value >= 0 else float("nan")},
                [{"train_loss": 1.0, "accuracy": value}] * 2,
            )
            for method, values in accuracies.items()
            for seed, value in enumerate(values)
        ]
        return Comparison(runs, list(accuracies))

    def test_intervals(self):
        values = np.array([0.01, 0.03, -0.01, 0.02, 0.04])
        found = self.compared({"none": [0.5] * 5, "se": list(0.5 + values)})
        row = found.differences()[0]
        interval = stats.ttest_1samp(values, 0).confidence_interval()
        assert row["student_low"] == pytest.approx(interval.low, abs=2e-6)
        assert row["student_high"] == pytest.approx(interval.high, abs=2e-6)
        means = np.random.default_rng(5).choice(values, (200_000, 5)).mean(1)
        assert row["bootstrap_low"] == pytest.approx(np.quantile(means, 0.025), abs=2e-3)
        assert row["bootstrap_high"] == pytest.approx(np.quantile(means, 0.975), abs=2e-3)
        assert (row["won"], row["lost"]) == (4, 1)

    def test_verdict(self):
        """Both intervals have to exclude zero."""
        up = [0.02, 0.03, 0.02, 0.03, 0.02]
        found = self.compared(
            {
                "none": [0.5] * 5,
                "se": [0.5 + v for v in up],
                "eca": [0.5 - v for v in up],
                "cbam": [0.5, 0.51, 0.49, 0.5, 0.51],
                "ppcr": [0.5 + v for v in (0.001, 0.05, 0.001, 0.002, 0.001)],
            }
        )
        rows = {r["attention"]: r for r in found.differences() if r["minus"] == "none"}
        assert rows["ppcr"]["bootstrap_low"] > 0 > rows["ppcr"]["student_low"]
        text = found.verdict()
        assert "se (+2.40 points, bootstrap interval +2.00 to +2.80, 5 of 5 seeds won) is" in text
        assert "is above none. " in text
        assert "0 of 5 seeds won) is below none. " in text
        undecided = text.split("is below none. ")[1].split(" cannot be told apart from none.")[0]
        assert undecided.startswith("cbam (")
        assert " and ppcr (" in undecided
        assert "wins all 5 seeds in 6.2% of all comparisons" in text

    def test_three_seeds_alone_prove_little(self):
        """The bootstrap of three positive differences excludes zero, as one pair in four does."""
        found = self.compared({"none": [0.5] * 3, "ppcr": [0.501, 0.53, 0.502]})
        assert found.differences()[0]["bootstrap_low"] > 0
        assert "ppcr (+1.10 points" in found.verdict()
        assert "cannot be told apart from none" in found.verdict()
        assert "wins all 3 seeds in 25.0% of all comparisons" in found.verdict()

    def test_one_method_that_diverged(self, tmp_path):
        """It alone has no numbers, and pictures are drawn without it."""
        import report

        found = self.compared({"none": [0.5, 0.6], "se": [0.6, 0.7], "ppcr": [0.6, -1]})
        (note,) = found.notes()
        assert note.startswith("ppcr trained to NaN or infinity with seed 1:")
        rows = {(r["attention"], r["minus"]): r for r in found.differences()}
        assert rows["se", "none"]["difference"] == pytest.approx(0.1)
        assert rows["ppcr", "none"]["difference"] is None
        assert rows["ppcr", "se"]["difference"] is None
        assert "ppcr" not in found.verdict()
        assert "| ppcr |  |  |  |  |  |  |" in report.table(found, [])
        report.draw_differences(tmp_path / "a.png", found, "title")
        report.draw_learning_curves(tmp_path / "b.png", found, "title")
        assert png(tmp_path / "a.png")
        assert png(tmp_path / "b.png")


def test_missing_classes(tmp_path, call):
    import data

    labels = np.array([0, 1] * 10).reshape(-1, 1)
    medmnist(tmp_path / "a.npz", val_labels=labels, train_labels=labels)
    for augment in (False, True):
        found = data.load(str(tmp_path / "a.npz"), augment, 16)
        assert found.missing_classes() == {"training": [2], "validation": [2]}
    medmnist(tmp_path / "b.npz")
    assert data.load(str(tmp_path / "b.npz"), False, 16).missing_classes() == {}
