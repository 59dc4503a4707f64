"""What examples/explain.py says of gates; its deletion test can tell sense from noise."""

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("captum")
from example_programs import bars, caller, png, table

import ppcr_ext

pytestmark = pytest.mark.full


@pytest.fixture
def call(monkeypatch, capsys):
    return caller(monkeypatch, capsys)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are too small for more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images with a bar somewhere, and where the bars of its test images are."""
    folder = tmp_path_factory.mktemp("trained")
    labels = np.arange(240) % 3
    labels[::10] = (labels[::10] + 1) % 3  # the network is wrong about these
    where = bars(folder / "bars.npz", n=240, test_labels=labels.reshape(-1, 1))
    with pytest.MonkeyPatch.context() as patch:
        program = caller(patch, _NoCapture)
        options = ["--data", folder / "bars.npz", "--model", "small/8", "--epochs", 6]
        options += ["--batch", 20, "--out", folder / "run"]
        assert program("train.py", *options)[0] == 0
    return folder / "run", torch.from_numpy(where)


class _NoCapture:
    """In place of capsys, which lives no longer than a test."""

    err = ""

    @classmethod
    def readouterr(cls):
        return cls


@pytest.fixture
def seen(trained, call):
    """The network, and what explain.look finds."""
    import explain

    model, source, _ = explain.trained(trained[0], torch.device("cpu"))
    return model, explain.look(model, source.test, 240, 3, 50, torch.device("cpu"))


def test_files(trained, tmp_path, call):
    import explain

    run, _ = trained
    assert call("explain.py", "--run", run, "--out", tmp_path, "--draws", 2)[0] == 0
    assert all(png(tmp_path / f"{name}.png") for name in ("histograms", "maps", "deletion"))
    model, source, _ = explain.trained(run, torch.device("cpu"))
    images, labels = source.test.tensors
    with torch.no_grad(), ppcr_ext.record_gates(model) as recorded:
        predicted = model(images).argmax(1)
    rows = {(r["layer"], r["class"], r["predictions"]): r for r in table(tmp_path / "gates.csv")}
    assert len(rows) == 4 * 3 * 3
    for (layer, label, kind), row in rows.items():
        chosen = labels == int(label)
        chosen &= {"all": True, "correct": predicted == labels, "wrong": predicted != labels}[kind]
        assert int(row["images"]) == int(chosen.sum())
        if chosen.any():
            gates = recorded[layer][0][chosen]
            assert float(row["mean"]) == pytest.approx(float(gates.mean()), abs=2e-6)
            assert float(row["q0.05"]) <= float(row["q0.5"]) <= float(row["q0.95"])
        else:
            assert row["mean"] == ""
    maps = table(tmp_path / "maps.csv")
    correct = recorded["3.attention"][0][predicted == labels].mean((0, 1))
    cells = [r for r in maps if (r["layer"], r["predictions"]) == ("3.attention", "correct")]
    assert len(cells) == correct.numel() == 12 * 12
    for cell in cells:
        expected = float(correct[int(cell["row"]), int(cell["column"])])
        assert float(cell["mean"]) == pytest.approx(expected, abs=2e-6)
    whole = [r for r in table(tmp_path / "deletion.csv") if float(r["fraction"]) == 0]
    accuracy = float(table(run / "test.csv")[0]["accuracy"])
    assert 0.8 < accuracy < 0.95
    assert [float(r["accuracy"]) for r in whole] == [pytest.approx(accuracy, abs=1e-6)] * 5


def areas_of(model, seen, gates, draws=3):
    """The rows that compare the pixels with the highest gates to others."""
    import deletion

    scores = {deletion.GATES: [deletion.gate_scores(gates, seen.images.shape[2:])]}
    found = deletion.run(model, seen.images, seen.labels, scores, draws, 60)
    rows = deletion.areas(found)
    return {row["than"]: row for row in rows if row["removed_first"] == deletion.GATES}


def test_random_gates_are_as_good_as_random_pixels(seen):
    """Neither the pixels of random gates nor those of equal gates cost more or less, whereas the
    same test on the same network notices where the bars are, and that it matters whose bars."""
    model, found = seen
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.rand(g.shape, generator=generator) for name, g in found.gates.items()}
    equal = {name: torch.full_like(gate, 0.5) for name, gate in found.gates.items()}
    assert (found.predicted == found.labels).float().mean() > 0.8
    for gates in (noise, equal):
        for row in areas_of(model, found, gates).values():
            assert row["bootstrap_low"] <= 0 <= row["bootstrap_high"]
            assert abs(row["difference"]) < 0.03


def test_the_deletion_test_finds_the_object(seen, trained):
    model, found = seen
    for row in areas_of(model, found, {"bars": trained[1][:, None]}).values():
        assert row["bootstrap_high"] < -0.1


def test_a_network_whose_layers_weigh_nothing(seen, call):
    """All its gates of a layer are equal: no pixel goes first."""
    import deletion
    import explain

    model, found = seen
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, ppcr_ext.PPCR):
                layer.weight.zero_()
    dataset = torch.utils.data.TensorDataset(found.images, found.labels)
    again = explain.look(model, dataset, 240, 1, 50, torch.device("cpu"))
    assert (again.predicted == again.labels).float().mean() > 0.5
    assert (deletion.gate_scores(again.gates, (12, 12)) == 0).all()
    for row in areas_of(model, again, again.gates).values():
        assert row["bootstrap_low"] <= 0 <= row["bootstrap_high"]


def test_gates_with_random_weights(seen):
    """The network keeps its own gates; the weights drawn are as large as the learned ones."""
    import explain

    model, found = seen
    inputs = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ppcr_ext.PPCR)}
    with explain.Untrained(model, 2) as untrained, torch.no_grad():
        hooks = [
            layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
            for name, layer in layers.items()
        ]
        predicted = model(found.images).argmax(1)
    for hook in hooks:
        hook.remove()
    assert torch.equal(predicted, found.predicted)
    for name, layer in layers.items():
        first, second = untrained.weights[name]
        assert not torch.equal(first, second)
        torch.testing.assert_close(first.norm(), layer.weight.norm())
        with torch.no_grad():
            gate = ppcr_ext.ppcr_gate(inputs[name], second, layer.bias)
        torch.testing.assert_close(untrained.maps[1][name][0], gate)
    before = len(untrained.maps[0][name])
    model(found.images[:2])
    assert len(untrained.maps[0][name]) == before  # no hook is left


def test_ranks(call):
    """The highest score goes first, and equal ones in any order, another for each image."""
    import deletion

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, 5, generator=generator)
    found = deletion.ranks(scores, generator).flatten(1)
    expected = scores.flatten(1).argsort(1, descending=True).argsort(1)
    assert torch.equal(found, expected)
    found = deletion.ranks(torch.zeros(200, 4, 5), generator).flatten(1)
    assert torch.equal(found.sort(1).values, torch.arange(20).expand(200, 20))
    assert abs(found.float().mean(0) - 9.5).max() < 2  # five standard errors


def test_every_layer_counts_the_same(call):
    import deletion

    gates = {"a": torch.rand(2, 1, 6, 6), "b": torch.rand(2, 1, 6, 6)}
    scaled = {"a": gates["a"] * 1e-2 + 0.3, "b": gates["b"]}
    torch.testing.assert_close(
        deletion.gate_scores(scaled, (6, 6)), deletion.gate_scores(gates, (6, 6)), rtol=0, atol=1e-3
    )


def test_grad_cam_is_that_of_the_predicted_class(seen):
    """Against its definition: the block's channels, weighted by their mean gradients."""
    import deletion
    import explain

    model, found = seen
    block = explain.last_block(model)
    assert block is model[6]
    kept = []
    hook = block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    images = found.images[:8]
    best = model(images).max(1).values.sum()
    hook.remove()
    (grad,) = torch.autograd.grad(best, kept[0])
    cam = (grad.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu()
    expected = torch.nn.functional.interpolate(cam, (12, 12), mode="bilinear")[:, 0]
    scores = deletion.grad_cam_scores(model, block, images, 3)
    torch.testing.assert_close(scores, expected.detach())
    assert scores.max() > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "{tmp}/none"], "--run: there is no checkpoint"),
        (["--run", "{tmp}/se"], "se was trained with --attention se, not ppcr"),
        (["--layers", "3.attention,layer4"], "--layers: 'layer4' is none of 3.attention,"),
        (["--images", "1"], "--images must be at least 2, got 1"),
        (["--draws", "0"], "--draws must be at least 1, got 0"),
    ],
)
def test_bad_input(arguments, words, trained, tmp_path, call):
    state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    state["identity"]["attention"] = "se"
    (tmp_path / "se").mkdir()
    torch.save(state, tmp_path / "se" / "checkpoint.pt")
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--run" not in filled:
        filled += ["--run", trained[0]]
    status, said = call("explain.py", *filled, "--out", tmp_path / "out")
    assert (status, said.count("\n")) == (2, 1)
    assert words in said
    assert not (tmp_path / "out").exists()


def test_all_predictions_right(tmp_path, call):
    """Nothing to draw for the wrong ones, and that is said."""
    import explain

    images, labels = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])
    gates = {"layer": torch.rand(4, 1, 3, 3)}
    seen = explain.Seen(images, labels, labels, gates, [])
    maps = explain.mean_maps(seen)
    assert maps["layer"]["wrong"] is None
    assert {row["predictions"] for row in explain.map_rows(maps)} == {"correct"}
    explain.draw_maps(tmp_path / "maps.png", maps, seen, "title")
    assert png(tmp_path / "maps.png")
    rows = explain.gate_rows(seen, 2)
    assert [row["images"] for row in rows if row["predictions"] == "wrong"] == [0, 0]
    np.testing.assert_allclose(rows[0]["mean"], float(gates["layer"][[0, 2]].mean()), atol=1e-6)
