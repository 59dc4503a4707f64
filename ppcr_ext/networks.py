"""Puts PPCR into existing networks: into the ResNets of torchvision, timm and MONAI without further
advice, and into any other network by the names of modules.

The libraries are optional. Their blocks are recognized by name, and the blocks of this package that
take their place are imported when they are needed.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._checks import DTYPES, check_bool, is_integer
from .module import PPCR

if TYPE_CHECKING:
    from ._torchvision_blocks import PPCRBasicBlock, PPCRBottleneck

__all__ = ["Inserted", "PPCRBasicBlock", "PPCRBottleneck", "insert_ppcr"]


def __getattr__(name: str) -> Any:
    if name in ("PPCRBasicBlock", "PPCRBottleneck"):
        from . import _torchvision_blocks

        return getattr(_torchvision_blocks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Inserted(list[str]):
    """The list of the names of the inserted layers, in the order of ``model.named_modules()``.

    Args:
        names: the names.
        renamed_keys: the value of the attribute.

    Attributes:
        renamed_keys: the keys of the host's state dict that changed, old to new. It is empty for
            residual networks. Where it is not, ``{renamed_keys.get(k, k): v for k, v in
            checkpoint.items()}`` turns a checkpoint of the host into one for the new network.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1))
        >>> ppcr_ext.insert_ppcr(model, modules=["0"]).renamed_keys
        {'0.weight': '0.0.weight', '0.bias': '0.0.bias'}
    """

    def __init__(self, names: Sequence[str], renamed_keys: dict[str, str]) -> None:
        super().__init__(names)
        self.renamed_keys = renamed_keys


def insert_ppcr(
    model: nn.Module,
    *,
    levels: Sequence[int] = (1, 2, 4),
    stages: Sequence[int] | None = None,
    fuse: bool = True,
    modules: Sequence[str] | Mapping[str, int] | None = None,
    eps: float = 1e-5,
    bias: bool = True,
    init_gate: float = 0.5,
    backend: str | None = None,
) -> Inserted:
    """Inserts PPCR layers into a network, in place. If it raises, the network is as it was.

    Without ``modules`` the layers go into the residual blocks of the ResNets (also ResNeXt and Wide
    ResNet) of torchvision, timm and MONAI, wherever in ``model`` these are, as in the encoders of
    segmentation_models_pytorch. A layer stands after the block's last normalization and before the
    addition. The keys of the state dict stay, so that checkpoints of the host still load (with
    ``strict=False``, since the new parameters are not in them). A block or module that several
    names reach gets one layer, which all of them see.

    Insert before you make the optimizer, and before you wrap the network (DistributedDataParallel,
    FSDP, DataParallel) or compile it: these would not know of the new parameters. The network
    inside such a wrapper cannot always be told from a plain one.

    Args:
        model: the network. New parameters take the device and dtype of those of the block or module
            that they join (where it has none of a dtype that layers take, of its parent's, then of
            the model's).
        levels: of every layer, as for :class:`ppcr_ext.PPCR`.
        stages: which residual stages get layers, 4 for ``layer4``; None for all.
        fuse: whether recalibration, addition and ReLU of a residual block run in one pass. The
            block then no longer calls its last activation, so hooks on that do not run. ``False``
            computes the same in three steps. Blocks whose activation is not ReLU, timm's blocks
            with stochastic depth, and Res2Net's need ``False``.
        modules: the names (as in ``model.named_modules()``) of modules after whose output ``[N, C,
            *spatial]`` a layer is put, for any other network. C is the module's ``num_features``,
            ``num_channels`` or ``out_channels``; for a module with none of these give a mapping of
            names to C. Each such module is wrapped into an ``nn.Sequential``, which changes its
            keys in the state dict.
        eps, bias, init_gate, backend: of every layer, as for :class:`ppcr_ext.PPCR`. Pass an
            init_gate near 1 for a pretrained network.

    Returns:
        The names of the inserted layers. The list also has ``renamed_keys``, the keys of the host's
        state dict that changed.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing matched, a name or stage does not exist, a block has an attention layer
            already or cannot be fused, the network is wrapped or compiled already, or an argument
            has a value that is not as above.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> ppcr_ext.insert_ppcr(model, modules=["0"], init_gate=0.9)
        ['0.1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_bool("fuse", fuse)
    if modules is not None and stages is not None:
        remedy = "with modules, name those that are wanted"
        raise ValueError(f"stages chooses among residual blocks; {remedy}")
    _check_bare(model)
    places = (
        _residual_places(model, stages, fuse) if modules is None else _named_places(model, modules)
    )
    options: dict[str, Any] = {"eps": eps, "bias": bias, "init_gate": init_gate}
    options["backend"] = backend
    layers = []
    for place in places:
        near = (p for m in (place.host, *place.changed, model) for p in m.parameters())
        like = next((p for p in near if p.dtype in DTYPES), None)
        where: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        try:
            layer = PPCR(place.channels, levels, **options, **where)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place.name}: {error}") from None
        layers.append(layer.train(place.host.training))

    renamed = {} if modules is None else _renamed_keys(model, {place.host for place in places})
    changed = [module for place in places for module in place.changed]
    before = [(m, type(m), dict(vars(m)), dict(m._modules)) for m in changed]
    try:
        for place, layer in zip(places, layers, strict=True):
            place.insert(layer)
        inserted = set(layers)
        names = [name for name, module in model.named_modules() if module in inserted]
        return Inserted(names, renamed)
    except BaseException:
        for module, kind, attributes, children in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
        raise


@dataclass
class _Place:
    """Where a layer goes: after ``host``, or into it if it is a residual block.

    ``insert`` puts it there. ``changed`` are the modules whose class or children this changes.
    """

    name: str
    host: nn.Module
    changed: list[nn.Module]
    channels: int
    insert: Callable[[PPCR], None]


def _check_bare(model: nn.Module) -> None:
    """Raises ValueError if something holds the network's parameters, or its code, already."""
    for name, module in model.named_modules():
        holder = _holder(module)
        if holder:
            why = f"is held by {holder} already, which would not know of the new parameters"
            remedy = "call insert_ppcr on the plain network, and wrap, shard or compile it"
            raise ValueError(f"{name or 'model'} {why}: {remedy} afterwards")


def _holder(module: nn.Module) -> str | None:
    for wrapper in (
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        torch.jit.ScriptModule,
        *_loaded("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule"),
    ):
        if isinstance(module, wrapper):
            return "fully_shard" if wrapper.__name__ == "FSDPModule" else wrapper.__name__
    if isinstance(module, _loaded("torch._dynamo", "OptimizedModule")):
        return "torch.compile"
    if module._compiled_call_impl is not None:  # module.compile()
        return "torch.compile"
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, _loaded("torch.distributed.tensor", "DTensor")):
            return "DTensor"
        if getattr(parameter, "_fsdp_flattened", False):
            return "FullyShardedDataParallel"
        if parameter.is_meta and hasattr(module, "_hf_hook"):
            return "accelerate's offloading"
    return None


def _loaded(module: str, *names: str) -> tuple[Any, ...]:
    """Classes of a module that the program has imported. If it has not, no instance can be met."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))


def _shown(name: str) -> str:
    """A module's name in messages: the network itself has none."""
    return name or "model"


def _all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all names by which it is reached."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


# ---- residual blocks --------------------------------------------------------------------------


# The block of ours that takes a block's place, by module and name: a subclass has a forward of its
# own, so that only these classes themselves can be exchanged. Res2Net's keep theirs.
_OURS: dict[tuple[str, str], tuple[str, str] | None] = {
    ("torchvision.models.resnet", "BasicBlock"): ("_torchvision_blocks", "PPCRBasicBlock"),
    ("torchvision.models.resnet", "Bottleneck"): ("_torchvision_blocks", "PPCRBottleneck"),
    ("timm.models.resnet", "BasicBlock"): ("_timm_blocks", "PPCRBasicBlock"),
    ("timm.models.resnet", "Bottleneck"): ("_timm_blocks", "PPCRBottleneck"),
    ("timm.models.res2net", "Bottle2neck"): None,
    ("monai.networks.nets.resnet", "ResNetBlock"): ("_monai_blocks", "PPCRResNetBlock"),
    ("monai.networks.nets.resnet", "ResNetBottleneck"): ("_monai_blocks", "PPCRResNetBottleneck"),
}
_OURS |= {(f"{__package__}.{ours[0]}", ours[1]): ours for ours in _OURS.values() if ours}


def _residual_places(model: nn.Module, stages: Sequence[int] | None, fuse: bool) -> list[_Place]:
    wanted = None if stages is None else _check_stages(stages)
    places, seen = [], set()
    for block, names in _all_names(model).items():
        key = type(block).__module__, type(block).__name__
        if key not in _OURS:
            continue
        found = re.search(r"(?:^|[.\n])layer(\d+)(?:[.\n]|$)", "\n".join(names))
        stage = int(found[1]) if found else None
        seen.add(stage)
        if wanted is not None and stage not in wanted:
            continue
        name = _shown(names[0])
        for occupant in (getattr(block, "se", None), getattr(block, "ppcr", None)):
            if occupant is not None:
                kind = type(occupant).__name__
                raise ValueError(f"{name} has an attention layer already ({kind})")
        where = _OURS[key]
        ours = where and getattr(import_module(f".{where[0]}", __package__), where[1])
        reason = _why_not_fused(block, ours) if fuse else None
        if reason:
            raise ValueError(f"{name} cannot be fused: {reason}; pass fuse=False")
        last = "conv3" if hasattr(block, "conv3") else "conv2"
        channels = _channels(f"{name}.{last}", getattr(block, last))
        places.append(_Place(name, block, [block], channels, partial(_exchange, block, ours, fuse)))
    if not seen:
        remedy = "say with modules=[...] after which of its modules PPCR stands"
        libraries = "of the ResNets of torchvision, timm or MONAI"
        raise ValueError(f"{type(model).__name__} has no residual block {libraries}; {remedy}")
    missing = sorted((wanted or set()) - seen)
    if missing:
        found_stages = sorted(stage for stage in seen if stage is not None)
        there_are = f"the residual stages of the model are {found_stages}"
        raise ValueError(f"stages has {missing}, but {there_are}")
    return places


def _check_stages(stages: Sequence[int]) -> set[int]:
    listed = isinstance(stages, Sequence) and not isinstance(stages, str)
    if not listed or not all(map(is_integer, stages)):
        raise TypeError(f"stages must be a sequence of ints such as (3, 4), got {stages!r}")
    if not stages:
        raise ValueError("stages must not be empty")
    return set(stages)


def _why_not_fused(block: nn.Module, ours: Any) -> str | None:
    if ours is None:
        return f"there is no fused {type(block).__name__}"
    if getattr(block, "drop_path", None) is not None:
        return "stochastic depth stands between the recalibration and the addition"
    activation = type(getattr(block, ours._activation))
    return None if activation is nn.ReLU else f"its activation is {activation.__name__}, not ReLU"


def _exchange(block: nn.Module, ours: Any, fuse: bool, layer: PPCR) -> None:
    if ours is not None:
        block.__class__ = ours
        block.fuse = fuse  # type: ignore[assignment]
    setattr(block, "se" if ours is None else ours._layer, layer)


# ---- named modules ----------------------------------------------------------------------------


def _named_places(model: nn.Module, modules: Sequence[str] | Mapping[str, int]) -> list[_Place]:
    listed = isinstance(modules, (Sequence, Mapping)) and not isinstance(modules, str)
    if not listed or not all(isinstance(name, str) for name in modules):
        wanted = "a sequence of module names, or a mapping of names to channels"
        raise TypeError(f"modules must be {wanted}, got {modules!r}")
    if not modules:
        raise ValueError("modules must not be empty")
    if len(set(modules)) != len(modules):
        raise ValueError("modules names a module twice")
    names = _all_names(model)
    known = {name: module for module, all_names in names.items() for name in all_names}
    places: dict[nn.Module, _Place] = {}
    for name in modules:
        if name == "" or name not in known:
            raise ValueError(f"modules names {name!r}, which {type(model).__name__} does not have")
        host = known[name]
        channels = modules[name] if isinstance(modules, Mapping) else _channels(name, host)
        if host in places and places[host].channels != channels:
            both = f"{places[host].name} and {name}"
            raise ValueError(f"modules gives {both}, which are one module, different channels")
        split = [name.rpartition(".") for name in names[host]]
        parents = [(known[parent], attribute) for parent, _, attribute in split]
        changed = [parent for parent, _ in parents]
        insert = partial(_wrap, host, parents)
        places.setdefault(host, _Place(name, host, changed, channels, insert))
    return list(places.values())


def _wrap(host: nn.Module, parents: list[tuple[nn.Module, str]], layer: PPCR) -> None:
    both = nn.Sequential(host, layer)
    both.training = host.training  # train() would also set what is frozen within the host
    for parent, attribute in parents:
        setattr(parent, attribute, both)


def _renamed_keys(model: nn.Module, hosts: set[nn.Module]) -> dict[str, str]:
    """State-dict keys that change, old to new: each host becomes the first in a Sequential."""
    renamed = {}
    for key in model.state_dict(keep_vars=True):
        parts: list[str] = []
        module: nn.Module | None = model
        for part in key.split("."):
            parts.append(part)
            module = None if module is None else module._modules.get(part)
            if module in hosts:
                parts.append("0")
        new = ".".join(parts)
        if new != key:
            renamed[key] = new
    return renamed


def _channels(name: str, module: nn.Module) -> int:
    for attribute in ("num_features", "num_channels", "out_channels"):
        found: Any = getattr(module, attribute, None)
        if is_integer(found):
            return int(found)
    unknown = f"{name} ({type(module).__name__}) does not say how many channels it has"
    raise ValueError(f"{unknown}; pass modules={{{name!r}: channels}}")
