"""insert_ppcr into networks of the user's own, by module names; what it refuses."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import ppcr_ext
from ppcr_ext import PPCR, insert_ppcr


class Network(nn.Module):
    """A convolution, a body of a batch norm and a transposed convolution, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)), nn.ConvTranspose2d(12, 16, 2)
        )
        self.groups = nn.GroupNorm(4, 16)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

    def forward(self, x):
        return self.head(self.groups(self.body(self.stem(x))))


NAMES = ["stem", "body.0.1", "body.1", "groups"]


def test_named_modules():
    """Each layer sees what the named module put out, and the rest sees what the layer puts out."""
    torch.manual_seed(0)
    model, x = Network().double(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    checkpoint = {key: value.clone() for key, value in model.state_dict().items()}
    names = insert_ppcr(model, modules=NAMES, levels=(1, 4), init_gate=0.8)
    assert names == ["stem.1", "body.0.1.1", "body.1.1", "groups.1"]
    layers = [model.get_submodule(name) for name in names]
    assert [(type(layer), layer.channels, layer.levels) for layer in layers] == [
        (PPCR, c, (1, 4)) for c in (8, 12, 16, 16)
    ]
    assert all(layer.weight.dtype == torch.float64 for layer in layers)
    for layer in layers:
        nn.init.normal_(layer.weight)

    host = Network().double()
    host.load_state_dict(checkpoint)
    for name, layer in zip(NAMES, layers, strict=True):
        host.get_submodule(name).register_forward_hook(
            lambda module, inputs, y, layer=layer: layer(y)
        )
    assert torch.equal(model(x), host(x))

    # the checkpoint of the host, under its new keys
    assert {key for key in checkpoint if key.startswith(tuple(f"{n}." for n in NAMES))} == set(
        names.renamed_keys
    )
    assert names.renamed_keys["body.0.1.running_mean"] == "body.0.1.0.running_mean"
    renamed = {names.renamed_keys.get(key, key): value for key, value in checkpoint.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert unexpected == []
    assert set(missing) == {f"{name}.{p}" for name in names for p in ("weight", "bias")}


def test_a_module_within_a_named_module():
    model = Network()
    before = list(model.state_dict())
    names = insert_ppcr(model, modules={"body": 16, "body.0.1": 12, "body.0": 12})
    assert names == ["body.0.0.0.1.1", "body.0.0.1", "body.1"]
    assert names.renamed_keys["body.1.weight"] == "body.0.1.weight"
    assert names.renamed_keys["body.0.1.weight"] == "body.0.0.0.1.0.weight"
    assert [names.renamed_keys.get(key, key) for key in before] == [
        k for k in model.state_dict() if not k.startswith(tuple(names))
    ]
    model(torch.randn(2, 3, 9, 9))


def test_new_parameters_go_where_the_host_is():
    model = Network().to("meta", torch.bfloat16).eval()
    for name in insert_ppcr(model, modules=NAMES):
        layer = model.get_submodule(name)
        assert (layer.weight.device.type, layer.weight.dtype, layer.training) == (
            "meta",
            torch.bfloat16,
            False,
        )


def test_options_reach_the_layer():
    model = Network()
    (name,) = insert_ppcr(
        model, modules=["stem"], levels=[2, 3], eps=1e-3, init_gate=0.9, backend="reference"
    )
    layer = model.get_submodule(name)
    assert (layer.levels, layer.eps, layer.init_gate, layer.backend) == (
        (2, 3),
        1e-3,
        0.9,
        "reference",
    )
    (name,) = insert_ppcr(Network(), modules=["stem"], bias=False)
    assert name == "stem.1"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "no residual block"),
        ({"modules": ["stem", "nothing"]}, ValueError, "'nothing', which Network does not have"),
        ({"modules": [""]}, ValueError, "''"),
        ({"modules": []}, ValueError, "modules must not be empty"),
        ({"modules": "stem"}, TypeError, "modules must be a sequence"),
        ({"modules": [1]}, TypeError, "modules must be a sequence"),
        ({"modules": ["stem", "stem"]}, ValueError, "names a module twice"),
        (
            {"modules": ["stem", "body"]},
            ValueError,
            "body .Sequential. does not say how many channels",
        ),
        ({"modules": {"stem": "8"}}, TypeError, "stem: channels must be an int"),
        (
            {"modules": ["stem", "groups"], "levels": (1, 9)},
            ValueError,
            "stem: levels must lie between 1 and the 8 channels",
        ),
        ({"modules": ["stem"], "init_gate": 2}, ValueError, "stem: init_gate"),
        ({"modules": ["stem"], "stages": (1,)}, ValueError, "stages chooses among residual blocks"),
        ({"fuse": "yes"}, TypeError, "fuse must be a bool"),
        ({"stages": ()}, ValueError, "stages must not be empty"),
        ({"stages": 3}, TypeError, "stages must be a sequence"),
        ({"stages": ["layer1"]}, TypeError, "stages must be a sequence"),
    ],
)
def test_bad_arguments_leave_the_network_as_it_was(arguments, error, words):
    model = Network()
    before = list(model.state_dict())
    with pytest.raises(error, match=words):
        insert_ppcr(model, **arguments)
    assert list(model.state_dict()) == before


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        insert_ppcr([nn.Conv2d(3, 8, 3)])


def test_torchvision_and_timm_are_not_imported():
    code = "import sys, ppcr_ext, ppcr_ext.networks; "
    code += "assert not {'torchvision', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'PPCRBlock'"):
        _ = ppcr_ext.networks.PPCRBlock
