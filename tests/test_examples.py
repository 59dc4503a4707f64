"""The examples as their users run them, and bad input that is refused in one line."""

import os
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
from example_programs import ROOT, STARTED, TORCHRUN, caller, medmnist, png, run, table

pytestmark = pytest.mark.full
TINY = ["--batch", "10", "--epochs", "2"]


@pytest.fixture
def call(monkeypatch, capsys):
    return caller(monkeypatch, capsys)


def without_seconds(path):
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in table(path)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The default run."""
    out = tmp_path_factory.mktemp("digits")
    result = run("train.py", "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def test_digits_reach_95_percent(trained):
    (test,) = table(trained / "test.csv")
    assert float(test["accuracy"]) >= 0.95
    assert 0.9 < float(test["kappa"]) < float(test["auc"]) <= 1
    assert [int(row["epoch"]) for row in table(trained / "metrics.csv")] == list(range(1, 9))
    assert png(trained / "curves.png")
    assert sorted(p.name for p in trained.iterdir()) == [
        "checkpoint.pt",
        "curves.png",
        "metrics.csv",
        "test.csv",
    ]


@pytest.mark.parametrize(
    ("level", "program", "options", "tables"),
    [
        ("-OO", "train.py", [*TINY, "--data", "tiny.npz"], 2),
        ("-O", "gate_maps.py", ["--steps", 2, "--side", 32], 1),  # scikit-image needs docstrings
    ],
)
def test_without_assertions_and_docstrings(level, program, options, tables, tmp_path):
    """In any folder: the set-up has installed the package in place."""
    medmnist(tmp_path / "tiny.npz", 40)
    result = run(program, "--out", "out", *options, start=[*STARTED, level], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("*.csv"))) == tables


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, call):
    """The same metrics, and the same bits in weights and optimizer, with augmentation."""
    medmnist(tmp_path / "tiny.npz", 40)
    options = [*TINY, "--data", tmp_path / "tiny.npz", "--augment", "--amp", "bfloat16"]
    assert call("train.py", "--out", tmp_path / "whole", *options) == (0, "")
    assert call("train.py", "--out", tmp_path / "parts", *options, "--stop-after", 1) == (0, "")
    assert not (tmp_path / "parts" / "test.csv").exists()
    assert call("train.py", "--out", tmp_path / "parts", *options, "--resume") == (0, "")
    for name in ("metrics.csv", "test.csv"):
        assert without_seconds(tmp_path / "whole" / name) == without_seconds(
            tmp_path / "parts" / name
        )
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])
    states = [
        torch.utils._pytree.tree_leaves(state["optimizer"]["state"]) for state in (whole, parts)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_two_processes_write_one_run(tmp_path, call):
    """FSDP2 under torchrun; one process goes on from its checkpoint."""
    medmnist(tmp_path / "tiny.npz", 40)
    options = [*TINY, "--data", tmp_path / "tiny.npz", "--out", tmp_path, "--parallel", "fsdp"]
    result = run("train.py", *options, "--stop-after", 1, start=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1:") == 1
    assert call("train.py", *options, "--resume") == (0, "")
    assert len(table(tmp_path / "metrics.csv")) == 2


class Code:
    def __reduce__(self):
        return os.mkdir, ("/tmp/ppcr_ext_code_was_run",)


def cifar(folder, data=None, count=20):
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = np.random.default_rng(0).integers(0, 256, (count, 3072), np.uint8)
        labels = [i % 10 for i in range(count)]
        batch = {"data": images if data is None else data, "labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch))


class TestData:
    """The readers, called directly: each format's images, labels and sizes."""

    @pytest.fixture(autouse=True)
    def _path(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "examples"))

    @staticmethod
    def load(source, **options):
        import data

        return data.load(str(source), options.get("augment", False), options.get("size", 16))

    @staticmethod
    def sizes(data):
        parts = (data.train, data.validation, data.test)
        return data.channels, data.classes, *map(len, parts)

    def test_medmnist(self, tmp_path):
        medmnist(tmp_path / "a.npz")
        data = self.load(tmp_path / "a.npz", augment=True)
        assert self.sizes(data) == (3, 3, 20, 20, 20)
        image, label = data.train[4]
        assert (image.shape, image.dtype, int(label)) == ((3, 28, 28), torch.float32, 1)
        medmnist(
            tmp_path / "grey.npz",
            **{f"{s}_images": np.zeros((20, 28, 28), np.uint8) for s in ("train", "val", "test")},
        )
        assert self.load(tmp_path / "grey.npz").channels == 1

    def test_cifar10(self, tmp_path):
        cifar(tmp_path / "c")
        data = self.load(tmp_path / "c")
        assert self.sizes(data) == (3, 10, 90, 10, 20)
        raw = pickle.loads((tmp_path / "c" / "test_batch").read_bytes())["data"][0].reshape(
            3, 32, 32
        )
        image = data.test[0][0].numpy()
        for channel in range(3):  # normalized: the same up to scale and shift
            assert np.corrcoef(image[channel].ravel(), raw[channel].ravel())[0, 1] > 0.99999

    def test_cifar100(self, tmp_path):
        """Of its two kinds of labels the fine ones."""
        for name in ("train", "test"):
            images = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
            labels = {"fine_labels": [5 * i for i in range(20)], "coarse_labels": list(range(20))}
            (tmp_path / name).write_bytes(pickle.dumps({"data": images} | labels))
        data = self.load(tmp_path)
        assert (data.classes, len(data.train), len(data.validation)) == (96, 18, 2)
        assert [int(label) for _, label in data.validation] == [90, 95]

    def test_few_images_of_cifar10(self, tmp_path):
        """One of them validates, where a tenth would be none."""
        cifar(tmp_path / "c", count=1)
        data = self.load(tmp_path / "c")
        assert (len(data.train), len(data.validation), len(data.test)) == (4, 1, 1)

    def test_pickles_that_run_code_are_refused(self, tmp_path):
        from files import BadInput

        cifar(tmp_path / "c", Code())
        with pytest.raises(BadInput, match=r"no batch of CIFAR: it asks for posix.mkdir"):
            self.load(tmp_path / "c")
        assert not os.path.exists("/tmp/ppcr_ext_code_was_run")

    def test_image_folder(self, tmp_path):
        from PIL import Image

        for split in ("train", "val"):
            for label in ("cat", "dog"):
                (tmp_path / split / label).mkdir(parents=True)
                Image.new("RGB", (20, 30), (255, 0, 0)).save(tmp_path / split / label / "1.png")
        data = self.load(tmp_path, augment=True)
        assert (data.classes, len(data.train), data.train[1][1], data.test is data.validation) == (
            2,
            2,
            1,
            True,
        )
        assert data.train[0][0].shape == (3, 16, 16)

    LAYERS: ClassVar = {"ppcr": "PPCR", "se": "SEModule", "eca": "EcaModule", "cbam": "CbamModule"}

    @pytest.mark.parametrize("attention", [*LAYERS, "none"])
    @pytest.mark.parametrize(
        "name", ["small", "small-resnet18/8", "torchvision/resnet18", "timm/resnet18"]
    )
    def test_models(self, name, attention):
        """One layer a block, and all weights outside the layers those of the plain network."""
        from models import build

        torch.manual_seed(0)
        plain = build(name, "none", channels=1, classes=4)
        torch.manual_seed(0)
        model = build(name, attention, channels=1, classes=4)
        layers = [n for n, m in model.named_modules() if type(m).__name__ in self.LAYERS.values()]
        kinds = {type(model.get_submodule(layer)).__name__ for layer in layers}
        assert kinds == {self.LAYERS.get(attention)} - {None}
        assert len(layers) == (attention != "none") * (4 if name == "small" else 8)
        outside = [
            value
            for key, value in model.state_dict().items()
            if not key.startswith(tuple(f"{layer}." for layer in layers))
        ]
        for ours, theirs in zip(outside, plain.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
        y = model(torch.randn(2, 1, 32, 32))
        assert y.shape == (2, 4)
        y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention", "psychic"], "argument --attention: invalid choice: 'psychic'"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--lr", "nan"], "--lr must be positive and finite, got nan"),
        (["--lr", "inf"], "--lr must be positive and finite, got inf"),
        (["--lr", "-0.1"], "--lr must be positive and finite, got -0.1"),
        (["--stop-after", "0"], "--stop-after must be positive and finite, got 0"),
        (["--stop-after", "-1"], "--stop-after must be positive and finite, got -1"),
        (["--workers", "-1"], "--workers must be 0 or more and finite, got -1"),
        (["--weight-decay", "-1"], "--weight-decay must be 0 or more and finite, got -1.0"),
        (["--weight-decay", "nan"], "--weight-decay must be 0 or more and finite, got nan"),
        (["--seed", "-1"], "--seed must be 0 or more and finite, got -1"),
        (["--seed", str(2**64)], f"--seed must be below 2^32, got {2**64}"),
        (["--batch", "1001"], "--batch 1001 is more than the 1000 training images"),
        (["--data", "{tmp}/negative.npz"], "validation labels must be whole numbers from 0 on"),
        (["--data", "{tmp}/real.npz"], "must be whole numbers from 0 on, got float64 from 0.5 on"),
        (["--data", "{tmp}/fewer.npz"], "there are 20 test images and 10 labels"),
        (["--resume", "--out", "{tmp}/good", "--epochs", "8", "--stop-after", "3"], "has 8 epochs"),
        (["--data", "{tmp}/missing.npz"], "neither digits nor an existing file"),
        (["--data", "{tmp}/corrupt.npz"], "is no whole .npz file"),
        (["--data", "{tmp}/other.npz"], "has no array 'val_images"),
        (["--data", "{tmp}/multi.npz"], "has 14 labels an image"),
        (["--data", "{tmp}"], "holds neither"),
        (["--out", "{tmp}/corrupt.npz/out"], "cannot write into"),
        (["--resume"], "there is no checkpoint"),
        (["--resume", "--out", "{tmp}/truncated"], "is no whole checkpoint"),
        (["--resume", "--out", "{tmp}/good"], "was made with --epochs 8"),
        (["--out", "{tmp}/good", "--epochs", "8"], "pass --resume to go on"),
        (["--model", "timm/nothing"], "--model: timm/nothing cannot be built"),
        (["--model", "resnet18"], "--model: 'resnet18' is none of small, small-resnet18,"),
        (["--model", "small/2"], "its width must be at least 4, got 2"),
        (["--model", "small/wide"], "--model: small/wide cannot be built"),
        (
            ["--model", "torchvision/densenet121"],
            "--model: torchvision/densenet121 cannot be built",
        ),
    ],
)
def test_bad_input(arguments, words, tmp_path, trained, call):
    """One line on stderr, exit status 2, nothing written."""
    medmnist(tmp_path / "corrupt.npz")
    truncated(tmp_path / "corrupt.npz")
    medmnist(tmp_path / "other.npz", val_images=None)
    medmnist(tmp_path / "multi.npz", train_labels=np.zeros((20, 14), np.uint8))
    medmnist(tmp_path / "negative.npz", val_labels=np.arange(20).reshape(-1, 1) - 1)
    medmnist(tmp_path / "real.npz", train_labels=np.full((20, 1), 0.5))
    medmnist(tmp_path / "fewer.npz", test_labels=np.zeros((10, 1), np.uint8))
    for name in ("truncated", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes())
    truncated(tmp_path / "truncated" / "checkpoint.pt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "new")]
    if "--epochs" not in filled:
        filled += ["--epochs", "1"]
    status, said = call("train.py", *filled)
    assert status == 2
    assert words in said
    assert said.startswith("train.py: error: ")
    assert said.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_too_few_images_for_the_network(tmp_path, call):
    """Found by the network itself: its deepest stage sees one pixel of each of these digits."""
    network = ["--batch", 1, "--model", "torchvision/resnet18"]
    status, said = call("train.py", *network, "--out", tmp_path, "--epochs", 1)
    assert (status, said.count("\n")) == (2, 1)
    assert "--batch: 1 images a process are too few for --model torchvision/resnet18" in said


def test_bad_input_as_the_shell_sees_it(tmp_path):
    result = run("train.py", "--data", tmp_path / "missing", "--out", tmp_path / "new")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "new").exists()


def test_gate_maps(tmp_path, call):
    assert call("gate_maps.py", "--out", tmp_path, "--steps", 3, "--side", 64) == (0, "")
    rows = table(tmp_path / "gates.csv")
    assert [(row["picture"], row["layer"]) for row in rows] == [
        (picture, f"blocks.{i}.ppcr")
        for picture in ("retina", "immunohistochemistry")
        for i in range(4)
    ]
    for row in rows:
        values = [
            float(row[c])
            for c in ("minimum", "quantile_0.05", "quantile_0.5", "quantile_0.95", "maximum")
        ]
        assert values == sorted(values)
        assert 0 < values[0] < values[-1] < 1
    assert all(png(tmp_path / f"{name}.png") for name in ("retina", "immunohistochemistry"))
    status, said = call("gate_maps.py", "--out", tmp_path / "gates.csv" / "x")
    assert (status, said.count("\n")) == (2, 1)
