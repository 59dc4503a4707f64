"""torchvision's ResNets with PPCR after every residual block's last normalization, or without.

It is *fused* with the addition and the ReLU, *unfused*, or in *plain* PyTorch, pooled once.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from timm.layers import cbam, squeeze_excite
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop

import ppcr_ext
from ppcr_ext.testing import Inputs, relative

from . import baselines, timing
from .cases import OWN, Case
from .layers import Prepared

ATTENTION = {"SE": squeeze_excite.SEModule, "CBAM": cbam.CbamModule}
TOLERANCE = 0.02  # see check()


def insert_drawn(model: nn.Module, fuse: bool = True) -> nn.Module:
    """PPCR in every residual block, its weight drawn: with zeros every gate would be equal."""
    for name in ppcr_ext.insert_ppcr(model, fuse=fuse):
        nn.init.normal_(model.get_submodule(name).weight, std=0.5)  # type: ignore[arg-type]
    return model


class Plain(ppcr_ext.PPCR):
    """The layer in plain PyTorch, which an inserted one becomes by its class."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert self.bias is not None
        contexts = baselines.pooled_once(x, self.levels)
        return x * baselines.gate_of(x, contexts, self.weight, self.bias)


def network(name: str, variant: str) -> nn.Module:
    """A network with random weights, the same for all variants."""
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(num_classes=10)
    if name == "resnet18":  # for small pictures, as usual: no early reduction
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    if variant in OWN:
        insert_drawn(model, fuse=variant == "PPCR fused")
    for block in [block for block in model.modules() if hasattr(block, "downsample")]:
        if variant == "PPCR plain":
            block.ppcr.__class__ = Plain
        elif variant in ATTENTION:
            last = "bn3" if hasattr(block, "bn3") else "bn2"
            norm = getattr(block, last)
            setattr(block, last, nn.Sequential(norm, ATTENTION[variant](norm.num_features)))
    return model


def loss(model: nn.Module, x: Tensor, target: Tensor, amp: bool) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        return F.cross_entropy(model(x).to(x.dtype), target)


def check(models: dict[str, nn.Module], x: Tensor, target: Tensor) -> dict[str, float]:
    """Relative L2 errors, against float64, of the loss's gradient with respect to the pictures."""
    # Without autocast: of ResNet-50 in bfloat16 the gradient is off by more than its own size, with
    # the reference as well, since every layer multiplies what those before it have rounded.
    # Raises AssertionError where one is off: a wrong program is not timed. Rounding takes values
    # across zero, where a ReLU lets their gradient pass or not, whatever computes it: with few
    # pictures one of them is 1e-3 of the whole. So the limit is TOLERANCE, or three times the error
    # of the reference in float32. A wrong gate, sign or bin is off by more than a half.
    reference = copy.deepcopy(models["PPCR unfused"])
    for layer in reference.modules():
        if isinstance(layer, ppcr_ext.PPCR):
            layer.backend = "reference"

    def gradient(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(copy.deepcopy(model), x, target, amp=False), x)[0]

    expected = gradient(copy.deepcopy(reference).double(), x.double())
    checked = {"reference": reference, **{name: models[name] for name in OWN}}
    errors = {name: relative(gradient(m, x), expected) for name, m in checked.items()}
    limit = min(0.5, max(TOLERANCE, 3 * errors.pop("reference")))
    for name, off in errors.items():
        if not off <= limit:  # no assert: python -O would time it
            raise AssertionError(f"{name} is off by {off:.2e}, allowed {limit}")
    return errors


def saved_bytes(model: nn.Module, x: Tensor, target: Tensor, amp: bool) -> int:
    """Bytes that autograd keeps from forward to backward, without parameters and pictures."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # alive: a freed one's address could come back

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss(model, x, target, amp)
    return sum(storage.nbytes() for at, storage in kept.items() if at not in known)


class Program:
    """Training step (forward, loss, backward, SGD) and inference of one network."""

    def __init__(self, model: nn.Module, case: Case, x: Tensor, target: Tensor) -> None:
        self.model, self.x, self.target, self.amp = model, x, target, case.dtype != "float32"
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self.forward: Any = torch.compile(model, dynamic=False) if case.compiled else model

    def step(self) -> None:
        self.model.train()
        loss(self.forward, self.x, self.target, self.amp).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def inference(self) -> None:
        self.model.eval()
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.amp):
            self.forward(self.x)


def prepare(case: Case, device: torch.device, first: bool, order: list[str]) -> Prepared:
    """All variants of a network, made anew; checked the first time."""
    images, amp = case.shape[0], case.dtype != "float32"
    form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
    x, target = x.to(device, memory_format=form), torch.arange(images, device=device) % 10
    models = {name: network(case.operator, name).to(device) for name in order}
    for model in models.values():
        model.to(memory_format=form)
    errors: dict[str, float] = {}
    if first and set(OWN) <= set(models):
        errors = check(models, x[:16], target[:16])
    made = Prepared(case, timing.HostClock(device), "none")
    for name, model in models.items():
        program = Program(model, case, x, target)
        for direction, run in (("step", program.step), ("inference", program.inference)):
            call = timing.Call(run, grad=direction == "step", warm=False)
            made.add(name, direction, "network", call, error_dx=errors.get(name))
        if first:
            made.rows[name, "step"].saved_bytes = saved_bytes(model, x, target, amp)
    return made


def retina_batch(size: int = 224) -> Tensor:
    """``[8, 3, size, size]``: scikit-image's fundus photograph, in four flips and four crops."""
    import skimage.data

    photograph = torch.from_numpy(skimage.data.retina()).permute(2, 0, 1)
    views = [photograph.flip(dims) for dims in ((), (1,), (2,), (1, 2))]
    views += five_crop(photograph, [photograph.shape[-1] * 2 // 3])[:4]
    weights = torchvision.models.ResNet50_Weights.DEFAULT
    preprocess = weights.transforms(crop_size=size, resize_size=size)
    return torch.stack([preprocess(view) for view in views])


def retina_inputs(device: torch.device) -> dict[str, Inputs]:
    """What the last PPCR layer of each stage sees; grad has a mean square of 1."""
    torch.manual_seed(0)
    model = insert_drawn(torchvision.models.resnet50()).train()
    seen: list[tuple[Any, ...]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        y.retain_grad()  # of the layer alone: where a hook is, the block adds by itself
        seen.append((layer, inputs[0], y))

    stages = ("layer1", "layer2", "layer3", "layer4")
    for stage in stages:
        getattr(model, stage)[-1].ppcr.register_forward_hook(keep)
    loss(model, retina_batch(), torch.arange(8), False).backward()
    found = {}
    for stage, (layer, x, y) in zip(stages, seen, strict=True):
        grad = y.grad / y.grad.square().mean().sqrt()
        tensors = (t.detach().to(device) for t in (x, x, layer.weight, layer.bias, grad))
        found[stage] = Inputs("ppcr", *tensors)
    return found
