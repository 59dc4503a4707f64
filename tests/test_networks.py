"""insert_ppcr into the networks of torchvision, timm, MONAI and segmentation_models_pytorch."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ppcr_ext import PPCR, insert_ppcr

pytestmark = pytest.mark.full
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
pytest.importorskip("monai")
pytest.importorskip("segmentation_models_pytorch")
from hosts import HOSTS, batch, draw_weights, hooked, last_norms, step
from torchvision.models import convnext, resnet

from ppcr_ext.networks import PPCRBasicBlock, PPCRBottleneck


def test_a_block_by_itself_is_named_model():
    with pytest.raises(ValueError, match=r"^model: levels must lie between 1 and the 8 channels"):
        insert_ppcr(resnet.BasicBlock(8, 8), levels=(1, 100))


def test_layers_take_only_dtypes_that_they_can_have():
    block = resnet.BasicBlock(8, 8).bfloat16()
    block.conv1.weight = nn.Parameter(block.conv1.weight.to(torch.float8_e4m3fn), False)
    insert_ppcr(block)
    assert block.ppcr.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("network", HOSTS)
def test_residual_networks(network):
    """Outputs, gradients and running statistics are those of PPCR behind the last norm of every
    block, and checkpoint keys stay."""
    torch.manual_seed(0)
    host = HOSTS[network]
    plain = host.build().double()
    x = batch(host.shape)
    models = {fuse: copy.deepcopy(plain) for fuse in (True, False)}
    for fuse, model in models.items():
        names = insert_ppcr(model, fuse=fuse)
        assert names == [f"{name.rpartition('.')[0]}.{host.slot}" for name in last_norms(plain)]
        assert names.renamed_keys == {}
        draw_weights(model)
    # a pretrained checkpoint loads as it does without the layers, which keep what they have
    torch.manual_seed(1)
    plain = host.build().double()
    for model in models.values():
        weights = [model.get_submodule(name).weight.clone() for name in names]
        kept = set(model.state_dict()) - set(plain.state_dict())
        assert kept == {f"{name}.{p}" for name in names for p in ("weight", "bias")}
        model.load_state_dict(copy.deepcopy(plain.state_dict()), strict=False)
        loaded = model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in plain.state_dict().items())
        for name, weight in zip(names, weights, strict=True):
            assert torch.equal(model.get_submodule(name).weight, weight)

    host, layers = hooked(plain, last_norms(plain), models[True], names)
    expected = step(host, x)
    # A convolution's bias before a batch norm has no influence: its gradient is only rounding.
    gradients = [p.grad for p in host.parameters() if p.grad is not None]
    rounding = 1e-14 * max(float(g.abs().max()) for g in gradients)
    for model in models.values():
        torch.testing.assert_close(step(model, x), expected, rtol=1e-9, atol=1e-9)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for name, parameter in host.named_parameters():
            if parameter.grad is None:  # what the network builds but does not use
                assert gradients[name] is None
                continue
            allowed = 1e-7 * float(parameter.grad.abs().max()) + rounding
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=allowed)
        for name, layer in zip(names, layers, strict=True):
            assert layer.weight.grad.abs().max() > 0
            for attribute in ("weight", "bias"):
                torch.testing.assert_close(
                    gradients[f"{name}.{attribute}"],
                    getattr(layer, attribute).grad,
                    rtol=1e-7,
                    atol=1e-9,
                )
        buffers = dict(model.named_buffers())
        assert all(
            torch.allclose(buffers[name].double(), value.double())
            for name, value in host.named_buffers()
        )


def small_resnet(**options):
    return resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], **options)


class TestLife:
    @pytest.fixture(params=["torchvision", "timm", "unfused"])
    def model(self, request):
        torch.manual_seed(0)
        model = (
            timm.create_model("resnet18", layers=[1, 2, 1, 1], zero_init_last=False)
            if request.param == "timm"
            else small_resnet()
        )
        insert_ppcr(model, fuse=request.param != "unfused")
        draw_weights(model)
        return model.eval()

    @staticmethod
    def save_and_load(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    @pytest.mark.parametrize(
        "through",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load,
         nn.SyncBatchNorm.convert_sync_batchnorm,
         torch.fx.symbolic_trace, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")],
        ids=["deepcopy", "pickle", "torch.save", "SyncBatchNorm", "fx", "compile"],
    )  # fmt: skip
    def test_same_results_after(self, through, model):
        x = batch((4, 3, 32, 32)).float()
        expected, keys = step(model, x), set(model.state_dict())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        other = through(model)
        assert torch.equal(step(other, x), expected)
        assert {k.removeprefix("_orig_mod.") for k in other.state_dict()} - keys == set()
        found = {name.removeprefix("_orig_mod."): p.grad for name, p in other.named_parameters()}
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in gradients)

    def test_sync_batch_norm_keeps_the_layers(self, model):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert sum(isinstance(m, PPCR) for m in converted.modules()) == 5
        assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == 14

    def test_channels_last(self, model):
        x = batch().float()
        expected = model(x)
        torch.testing.assert_close(
            model.to(memory_format=torch.channels_last)(x), expected, rtol=1e-3, atol=1e-4
        )


def test_stages():
    model = torchvision.models.resnet18()
    assert insert_ppcr(model, stages=(2, 4)) == [
        "layer2.0.ppcr",
        "layer2.1.ppcr",
        "layer4.0.ppcr",
        "layer4.1.ppcr",
    ]
    assert type(model.layer1[0]) is resnet.BasicBlock
    assert insert_ppcr(model, stages=[1]) == ["layer1.0.ppcr", "layer1.1.ppcr"]
    nested = nn.Sequential(timm.create_model("resnet18"), nn.Softmax(1))
    assert insert_ppcr(nested, stages=(3,)) == ["0.layer3.0.se", "0.layer3.1.se"]


def test_block_classes_build_networks():
    torch.manual_seed(0)
    built = resnet.ResNet(PPCRBottleneck, [1, 1, 1, 1])
    torch.manual_seed(0)
    swapped = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])
    insert_ppcr(swapped)
    x = batch().float()
    assert torch.equal(built(x), swapped(x))
    assert isinstance(resnet.ResNet(PPCRBasicBlock, [1, 1, 1, 1]).layer1[0].ppcr, PPCR)


def test_timm_builds_with_it():
    model = timm.create_model("resnet18", block_args={"attn_layer": PPCR})
    assert sum(isinstance(m, PPCR) for m in model.modules()) == 8
    step(model, batch((4, 3, 32, 32)).float())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_all_zero_pixels_of_a_zeroed_last_norm(dtype):
    """timm starts the last norm of a block at zero: the variance is 0 everywhere, and outputs and
    gradients are finite."""
    model = timm.create_model("resnet18", zero_init_last=True)
    insert_ppcr(model)
    draw_weights(model)
    model = model.to(dtype)
    assert not model.layer1[0].bn2.weight.any()
    y = model(batch((4, 3, 32, 32)).to(dtype))
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("build", "arguments", "words"),
    [
        (lambda: timm.create_model("resnet18", act_layer=nn.SiLU), {},
         "layer1.0 cannot be fused: its activation is SiLU, not ReLU"),
        (lambda: timm.create_model("resnet18", drop_path_rate=0.1), {},
         "layer1.1 cannot be fused: stochastic depth"),
        (lambda: timm.create_model("res2net50_26w_4s"), {},
         "layer1.0 cannot be fused: there is no fused Bottle2neck"),
        (lambda: timm.create_model("seresnet50", layers=[1, 1, 1, 1]), {},
         "layer1.0 has an attention layer already .SEModule."),
        (torchvision.models.resnet18, {"stages": (4, 5)},
         r"stages has \[5\], but the residual stages of the model are \[1, 2, 3, 4\]"),
        (torchvision.models.resnet18, {"levels": (1, 65)},
         "layer1.0: levels must lie between 1 and the 64 channels"),
        (lambda: torchvision.models.densenet121(), {}, "DenseNet has no residual block"),
    ],
)  # fmt: skip
def test_refusals_leave_the_network_as_it_was(build, arguments, words):
    model = build()
    before = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words):
        insert_ppcr(model, **arguments)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == before


@pytest.mark.parametrize(
    "build", [torchvision.models.resnet18, lambda: timm.create_model("resnet18")]
)
def test_not_twice(build):
    model = build()
    insert_ppcr(model)
    with pytest.raises(ValueError, match=r"layer1.0 has an attention layer already \(PPCR\)"):
        insert_ppcr(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"act_layer": nn.SiLU}),
        ("resnet18", {"drop_path_rate": 0.1}),
        ("res2net50_26w_4s", {}),
    ],
)
def test_unfused_in_timm_blocks_that_cannot_be_fused(name, options):
    torch.manual_seed(0)
    host = timm.create_model(name, zero_init_last=False, **options).double().eval()
    model = copy.deepcopy(host)
    names = insert_ppcr(model, fuse=False)
    assert not any(module.training for module in model.modules())
    draw_weights(model)
    host, _ = hooked(host, last_norms(host), model, names)
    torch.testing.assert_close(model(batch()), host(batch()), rtol=1e-10, atol=1e-10)


def named(model, kind, attribute=""):
    return [f"{name}{attribute}" for name, m in model.named_modules() if type(m).__name__ == kind]


def convnext_channels(model, kind, attribute):
    scale = "gamma" if kind == "ConvNeXtBlock" else "layer_scale"
    blocks = {
        n: model.get_submodule(n.removesuffix(attribute)) for n in named(model, kind, attribute)
    }
    return {name: block.get_parameter(scale).shape[0] for name, block in blocks.items()}


OTHERS = {
    # after every dense block: what the transition sees
    "torchvision densenet121": (
        torchvision.models.densenet121,
        lambda m: {f"features.denseblock{i}": c for i, c in enumerate((256, 512, 1024, 1024), 1)},
    ),
    # after the projection, before the addition
    "torchvision efficientnet_b0": (
        torchvision.models.efficientnet_b0,
        lambda m: [
            f"{name}.block.{len(m.get_submodule(name).block) - 1}" for name in named(m, "MBConv")
        ],
    ),
    "timm efficientnet_b0": (
        lambda: timm.create_model("efficientnet_b0"),
        lambda m: named(m, "InvertedResidual", ".bn3"),
    ),
    # after the perceptron, before the scale (torchvision) or after it (timm)
    "torchvision convnext": (
        lambda: convnext.ConvNeXt(
            [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 2)]
        ),
        lambda m: convnext_channels(m, "CNBlock", ".block"),
    ),
    "timm convnext_atto": (
        lambda: timm.create_model("convnext_atto"),
        lambda m: convnext_channels(m, "ConvNeXtBlock", ".drop_path"),
    ),
}


@pytest.mark.parametrize("network", OTHERS)
def test_other_networks_by_module_names(network):
    torch.manual_seed(0)
    build, places = OTHERS[network]
    host = build().double().eval()  # no stochastic depth
    model = copy.deepcopy(host)
    modules = places(model)
    names = insert_ppcr(model, modules=modules)
    assert len(names) == len(modules) >= 4
    draw_weights(model)
    checkpoint = {
        names.renamed_keys.get(key, key): value for key, value in host.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert unexpected == []
    assert set(missing) == {f"{name}.{p}" for name in names for p in ("weight", "bias")}
    host, layers = hooked(host, list(modules), model, modules_of(names, modules))
    x = batch((4, 3, 32, 32))
    torch.testing.assert_close(step(model, x), step(host, x), rtol=1e-9, atol=1e-9)
    for name, layer in zip(modules_of(names, modules), layers, strict=True):
        torch.testing.assert_close(
            model.get_submodule(name).weight.grad, layer.weight.grad, rtol=1e-7, atol=1e-9
        )
        assert layer.weight.grad.abs().max() > 0


def modules_of(names, modules):
    """The inserted layers in the order of the named modules."""
    found = {name.removesuffix(".1"): name for name in names}
    return [found[module] for module in modules]
