"""What PyTorch and the tools around it hang onto a call of the layer runs in fused residual blocks
as in unfused ones."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from ppcr_ext import PPCR, insert_ppcr

pytestmark = pytest.mark.full
timm = pytest.importorskip("timm")
monai = pytest.importorskip("monai.networks.nets")
from torchvision.models import resnet

NETWORKS = {
    "torchvision": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
    "timm": lambda: timm.create_model(
        "resnet18",
        layers=[1, 1, 1, 1],
        zero_init_last=False,
        num_classes=5,
    ),
    "monai": lambda: monai.ResNet(
        "basic",
        [1, 1, 1, 1],
        [8, 16, 24, 32],
        spatial_dims=2,
        num_classes=5,
    ),
}
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture(params=NETWORKS)
def networks(request):
    """The same network fused and unfused, in float64 and evaluation mode, with drawn weights."""
    torch.manual_seed(0)
    plain = NETWORKS[request.param]().double().eval()
    found = []
    for fuse in (True, False):
        model = copy.deepcopy(plain)
        insert_ppcr(model, fuse=fuse)
        torch.manual_seed(1)
        for layer in layers(model):
            nn.init.normal_(layer.weight)
        found.append(model)
    return found


def layers(model):
    return [module for module in model.modules() if isinstance(module, PPCR)]


def step(model):
    """Output, and the gradient of every parameter."""
    model.zero_grad()
    y = model(X)
    y.square().sum().backward()
    return y, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-10)
    assert got[1].keys() == expected[1].keys()
    # weight_norm of a vector leaves only signs to weight_v, whose gradient is nothing but rounding
    rounding = 1e-14 * max((float(value.abs().max()) for value in expected[1].values()), default=0)
    for name, value in expected[1].items():
        allowed = 1e-8 * float(value.abs().max()) + rounding
        torch.testing.assert_close(got[1][name], value, rtol=1e-7, atol=allowed)


def node_names(y):
    """The names of all autograd nodes behind a tensor."""
    found, waiting = {}, [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            waiting += [after for after, _ in node.next_functions]
    return sorted(found.values())


def test_fused_is_fused(networks):
    fused, unfused = networks
    assert node_names(fused(X)).count("ppcr_add_reluBackward") == 4
    assert node_names(unfused(X)).count("ppcrBackward") == 4
    assert_same_step(step(fused), step(unfused))


def register_hook(kind, layer, said):
    """Registers a hook that says how many arguments and gradients it was given."""
    if kind == "forward_pre":
        layer.register_forward_pre_hook(lambda m, a: said(len(a)))
    elif kind == "forward_pre with kwargs":
        layer.register_forward_pre_hook(lambda m, a, k: said(len(a)), with_kwargs=True)
    elif kind == "forward":
        layer.register_forward_hook(lambda m, a, y: said(len(a)))
    elif kind == "forward with kwargs":
        layer.register_forward_hook(lambda m, a, k, y: said(len(a)), with_kwargs=True)
    elif kind == "forward, always":
        layer.register_forward_hook(lambda m, a, y: said(len(a)), always_call=True)
    elif kind == "full_backward_pre":
        layer.register_full_backward_pre_hook(lambda m, gy: said(len(gy)))
    elif kind == "full_backward":
        layer.register_full_backward_hook(lambda m, gx, gy: said(len(gx), len(gy)))
    elif kind == "backward":
        layer.register_backward_hook(lambda m, gx, gy: said(len(gy)))


HOOKS = [
    "forward_pre",
    "forward_pre with kwargs",
    "forward",
    "forward with kwargs",
    "forward, always",
    "full_backward_pre",
    "full_backward",
    "backward",
]


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run(networks, kind):
    """Each hook of each layer once a step, with the same arguments, fused or not; results stay."""
    expected = step(networks[1])
    everything = []
    for model in networks:
        heard = []
        for index, layer in enumerate(layers(model)):

            def said(*what, index=index, heard=heard):
                heard.append((index, *what))

            register_hook(kind, layer, said)
        assert_same_step(step(model), expected)
        assert sorted(index for index, *_ in heard) == [0, 1, 2, 3]
        everything.append(heard)
    assert everything[0] == everything[1]


def test_hooks_of_all_modules_run(networks):
    everything = []
    for model in networks:
        heard = []

        def hear(module, *what, heard=heard):
            if isinstance(module, PPCR):
                heard.append([t.sum().item() for t in what])

        handles = [
            nn.modules.module.register_module_forward_pre_hook(lambda m, x: hear(m, *x)),
            nn.modules.module.register_module_forward_hook(lambda m, x, y: hear(m, *x, y)),
        ]
        try:
            model(X)
        finally:
            for handle in handles:
                handle.remove()
        everything.append(heard)
    assert len(everything[0]) == 8
    assert everything[0] == everything[1]  # the layer's own output, fused or not


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_blocks_compile_as_one_graph_with_hooks_of_all_modules(networks):
    torch.compiler.reset()
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: None)
    try:
        compiled = torch.compile(networks[0], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), networks[1](X))
    finally:
        handle.remove()


def test_hooks_that_change_what_they_see(networks):
    """What a hook returns takes the place of the layer's own input or output in the block."""
    for register in (
        lambda layer: layer.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
        lambda layer: layer.register_forward_hook(lambda m, a, y: 0 * y),
        lambda layer: layer.register_full_backward_hook(lambda m, gx, gy: (3 * gx[0],)),
    ):
        before = step(networks[1])
        handles = [register(layer) for model in networks for layer in layers(model)]
        changed = step(networks[1])
        assert any(not torch.equal(changed[1][name], g) for name, g in before[1].items())
        assert_same_step(step(networks[0]), changed)
        for handle in handles:
            handle.remove()


def weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    ("reparametrize", "stored"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 3), "weight_orig"),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.3), "weight_orig"),
        (weight_norm, "weight_v"),
        (parametrizations.weight_norm, "parametrizations.weight.original1"),
    ],
    ids=["pruned", "pruned at random", "old weight_norm", "weight_norm"],
)
def test_reparametrized_weights(networks, reparametrize, stored):
    """Two steps in a row, and in evaluation the weight stored last, not that of a call before."""
    results = []
    for model in networks:
        torch.manual_seed(2)
        for layer in layers(model):
            reparametrize(layer)
        results.append([step(model), step(model)])
        with torch.no_grad():
            before = model(X)
            for layer in layers(model):
                layer.get_parameter(stored).mul_(torch.linspace(-1.1, 2, 7))
            results[-1].append((model(X), {}))
            assert (results[-1][-1][0] - before).abs().max() > 1e-6
    assert all(f".{stored}" in str(list(found[0][1])) for found in results)
    for fused, unfused in zip(*results, strict=True):
        assert_same_step(fused, unfused)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_by_accelerate(networks, offload, tmp_path):
    """Parameters that are on the meta device between calls come for each call of a layer."""
    accelerate = pytest.importorskip("accelerate")
    with torch.no_grad():
        expected = networks[1](X)
        for index, model in enumerate(networks):
            if offload == "cpu":
                accelerate.cpu_offload(model, torch.device("cpu"))
            else:
                accelerate.disk_offload(model, tmp_path / str(index), torch.device("cpu"))
            assert all(p.is_meta for layer in layers(model) for p in layer.parameters())
            torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)


def test_per_sample_gradients_by_hooks(networks):
    """From the input that a forward hook keeps and a backward hook's gradient, as Opacus does."""
    fused, unfused = networks
    names = [name for name, layer in fused.named_modules() if isinstance(layer, PPCR)]
    expected = {f"{name}.{p}": [] for name in names for p in ("weight", "bias")}
    for sample in X:
        unfused.zero_grad()
        unfused(sample[None]).square().sum().backward()
        for name, found in expected.items():
            found.append(unfused.get_parameter(name).grad.clone())
    for model in networks:
        named = {name: layer for name, layer in model.named_modules() if isinstance(layer, PPCR)}
        inputs, gradients = {}, {}
        for layer in named.values():

            def keep_input(module, arguments, y, inputs=inputs):
                inputs[module] = arguments[0].detach()

            def keep_gradient(module, gx, gy, gradients=gradients):
                gradients[module] = gy[0]

            layer.register_forward_hook(keep_input)
            layer.register_full_backward_hook(keep_gradient)
        model(X).square().sum().backward()
        for name, hooked in named.items():
            layer = copy.deepcopy(hooked)
            layer._forward_hooks.clear()
            layer._backward_hooks.clear()
            parameters = {key: p.detach() for key, p in layer.named_parameters()}

            def loss(parameters, x, gy, layer=layer):
                return (functional_call(layer, parameters, (x[None],)) * gy[None]).sum()

            per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
            found = per_sample(parameters, inputs[hooked], gradients[hooked])
            for key, got in found.items():
                wanted = torch.stack(expected[f"{name}.{key}"])
                allowed = 1e-9 * float(wanted.abs().max())
                torch.testing.assert_close(got, wanted, rtol=1e-8, atol=allowed)


def test_any_other_module_in_the_place_of_the_layer(networks):
    """Blocks go on unfused: with nothing, with an activation, with what wraps the layer."""

    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    expected = step(networks[1])
    for replace in (
        lambda layer: nn.Identity(),
        lambda layer: nn.Tanh(),
        lambda layer: torch.compile(layer, backend="eager"),
        Wrapped,
    ):
        results = []
        for original in networks:
            model = copy.deepcopy(original)
            for name, layer in list(model.named_modules()):
                if isinstance(layer, PPCR):
                    model.set_submodule(name, replace(layer))
            y, gradients = step(model)
            wrappers = re.compile(r"_orig_mod\.|(?<=\.)layer\.")
            results.append((y, {wrappers.sub("", name): g for name, g in gradients.items()}))
        assert_same_step(*results)
        if len(results[0][1]) == len(expected[1]):
            assert_same_step(results[0], expected)


def test_add_relu_is_a_call():
    layer, x, calls = PPCR(8), torch.randn(2, 8, 3), []
    layer.register_forward_hook(lambda m, a, y: calls.append(len(a)))
    assert torch.equal(layer.add_relu(x, x), layer(x, residual=x))
    assert torch.equal(layer(x, x), layer(x, None).add(x).relu())
    assert calls == [2, 1, 2, 2]


def test_in_place_blocks_of_timm_with_backward_hooks():
    """timm adds in place, which autograd forbids behind a backward hook; our block does not."""
    options = {"layers": [1, 1, 1, 1], "act_layer": nn.SiLU, "drop_path_rate": 0.1}
    model = timm.create_model("resnet18", **options)
    insert_ppcr(model, fuse=False)
    heard = []
    for layer in layers(model):
        layer.register_full_backward_hook(lambda m, gx, gy: heard.append(m))
    model.eval()(X.float()).sum().backward()
    assert len(heard) == 4
