"""Puts PPCR into networks that exist: the ResNets of torchvision and timm by themselves, any other network by module names.

torchvision and timm are optional: their blocks are looked for only where the program has imported them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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
    """The names of the inserted layers, in the order of ``model.named_modules()``.

    Attributes:
        renamed_keys: state-dict keys of the host network that changed, old to new. Empty for residual networks; where it is
            not, ``{renamed_keys.get(k, k): v for k, v in checkpoint.items()}`` is a checkpoint of the host for the new network.
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
    """Inserts PPCR layers into a network, in place. Where it raises, the network is as it was.

    Without ``modules``, into the residual blocks of the ResNets (ResNeXt and Wide ResNet too) of torchvision and timm, wherever in
    ``model`` they are: after the block's last normalization, before the addition. The keys of the state dict stay, so that
    checkpoints of the host still load (with ``strict=False``: the new parameters are not in them).

    Args:
        model: the network. New parameters take the device and dtype of those of the block or module that they join (where it has
            none, of its parent's, then of the model's).
        levels, eps, bias, init_gate, backend: of every layer, as for :class:`ppcr_ext.PPCR`. Pass an ``init_gate`` near 1 for a
            pretrained network.
        stages: which residual stages get it, 4 for ``layer4``; None for all.
        fuse: recalibration, addition and ReLU of a residual block in one pass. The block no longer calls its last activation,
            so hooks on it do not run. ``False`` computes the same in three steps; timm's blocks whose activation is not ReLU
            or that use stochastic depth allow no other.
        modules: the names (as in ``model.named_modules()``) of modules after whose output ``[N, C, *spatial]`` a layer is put, for any
            other network. C is the module's ``num_features``, ``num_channels`` or ``out_channels``; for a module with none of these
            give a mapping of names to C. Each such module is wrapped into an ``nn.Sequential``, which changes its state-dict keys.

    Returns:
        The names of the inserted layers; its ``renamed_keys`` says which keys of the host's state dict changed.

    Raises:
        TypeError, ValueError: nothing matched, a name or stage does not exist, a block has an attention layer already or cannot be
            fused, or an argument is not as above.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if modules is not None and stages is not None:
        raise ValueError("stages chooses among residual blocks; with modules, name those that are wanted")
    places = _residual_places(model, stages, fuse) if modules is None else _named_places(model, modules)
    layers = []
    for place in places:
        parameter = next((p for m in (place.host, place.parent, model) for p in m.parameters() if p.is_floating_point()), None)
        try:
            layer = PPCR(
                place.channels,
                levels,
                eps=eps,
                bias=bias,
                init_gate=init_gate,
                backend=backend,
                device=None if parameter is None else parameter.device,
                dtype=None if parameter is None else parameter.dtype,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place.name}: {error}") from None
        layers.append(layer.train(place.host.training))

    before = list(model.state_dict(keep_vars=True))
    for place, layer in zip(places, layers, strict=True):
        place.insert(layer)
    inserted = set(layers)
    names = [name for name, module in model.named_modules() if module in inserted]
    of_ours = tuple(f"{name}." for name in names)
    after = [key for key in model.state_dict(keep_vars=True) if not key.startswith(of_ours)]  # in the order of before
    return Inserted(names, {old: new for old, new in zip(before, after, strict=True) if old != new})


@dataclass
class _Place:
    """Where a layer goes: behind ``host`` (in it, for a residual block); ``insert`` puts it there."""

    name: str
    host: nn.Module
    parent: nn.Module
    channels: int
    insert: Callable[[PPCR], None]


# ---- residual blocks ----------------------------------------------------------------------------------------------------------------


def _residual_places(model: nn.Module, stages: Sequence[int] | None, fuse: bool) -> list[_Place]:
    if not isinstance(fuse, bool):
        raise TypeError(f"fuse must be a bool, got {fuse!r}")
    wanted = None if stages is None else _check_stages(stages)
    places, seen = [], set()
    for name, block in model.named_modules():
        place = _torchvision_place(name, block, fuse) or _timm_place(name, block)
        if place is None:
            continue
        found = re.search(r"(?:^|\.)layer(\d+)(?:\.|$)", name)
        stage = int(found[1]) if found else None
        seen.add(stage)
        if wanted is not None and stage not in wanted:
            continue
        _check_free(name, block)
        if fuse and _from_timm(block):
            _check_fusible(name, block)
            place.insert = _filling(block, _timm_fused(block))
        places.append(place)
    if not seen:
        raise ValueError(
            f"{type(model).__name__} has no residual block of torchvision's or timm's ResNets; say with modules=[...] after which of "
            "its modules PPCR stands"
        )
    missing = sorted((wanted or set()) - seen)
    if missing:
        raise ValueError(
            f"stages has {missing}, but the residual stages of the model are {sorted(s for s in seen if s is not None)}"
        )
    return places


def _check_stages(stages: Sequence[int]) -> set[int]:
    if not isinstance(stages, Sequence) or isinstance(stages, str) or any(type(stage) is not int for stage in stages):
        raise TypeError(f"stages must be a sequence of ints such as (3, 4), got {stages!r}")
    if not stages:
        raise ValueError("stages must not be empty")
    return set(stages)


def _check_free(name: str, block: nn.Module) -> None:
    occupant = getattr(block, "se", None) or getattr(block, "ppcr", None)
    if occupant is not None:
        raise ValueError(f"{name} has an attention layer already ({type(occupant).__name__})")


def _loaded(module: str, *names: str) -> tuple[Any, ...]:
    """Classes of a module where the program has imported it: a model cannot hold blocks of any other."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names) if found else ()


def _torchvision_place(name: str, block: nn.Module, fuse: bool) -> _Place | None:
    # A subclass has a forward of its own: only the classes themselves can be exchanged.
    if type(block) not in _loaded("torchvision.models.resnet", "BasicBlock", "Bottleneck") + _loaded(
        "ppcr_ext._torchvision_blocks", "PPCRBasicBlock", "PPCRBottleneck"
    ):
        return None
    from ._torchvision_blocks import PPCRBasicBlock, PPCRBottleneck

    block_class, last = (PPCRBottleneck, "conv3") if hasattr(block, "conv3") else (PPCRBasicBlock, "conv2")

    def insert(layer: PPCR) -> None:
        block.__class__ = block_class
        block.ppcr = layer
        block.fuse = fuse  # type: ignore[assignment]

    return _Place(name, block, block, getattr(block, last).out_channels, insert)


def _timm_place(name: str, block: nn.Module) -> _Place | None:
    if not _from_timm(block):
        return None
    last = "conv3" if hasattr(block, "conv3") else "conv2"
    return _Place(name, block, block, getattr(block, last).out_channels, _filling(block, type(block)))


def _from_timm(block: nn.Module) -> bool:
    return type(block) in (
        *_loaded("timm.models.resnet", "BasicBlock", "Bottleneck"),
        *_loaded("timm.models.res2net", "Bottle2neck"),
        *_loaded("ppcr_ext._timm_blocks", "PPCRBasicBlock", "PPCRBottleneck"),
    )


def _filling(block: nn.Module, block_class: type[nn.Module]) -> Callable[[PPCR], None]:
    def insert(layer: PPCR) -> None:
        block.__class__ = block_class
        block.se = layer

    return insert


def _timm_fused(block: nn.Module) -> type[nn.Module]:
    from . import _timm_blocks

    return _timm_blocks.PPCRBottleneck if hasattr(block, "conv3") else _timm_blocks.PPCRBasicBlock


def _check_fusible(name: str, block: nn.Module) -> None:
    reason = None
    if type(block) not in _loaded("timm.models.resnet", "BasicBlock", "Bottleneck"):
        reason = f"there is no fused {type(block).__name__}"
    elif block.drop_path is not None:
        reason = "stochastic depth stands between the recalibration and the addition"
    else:
        activation = block.act3 if hasattr(block, "act3") else block.act2
        if type(activation) is not nn.ReLU:
            reason = f"its activation is {type(activation).__name__}, not ReLU"
    if reason:
        raise ValueError(f"{name} cannot be fused: {reason}; pass fuse=False")


# ---- named modules ------------------------------------------------------------------------------------------------------------------


def _named_places(model: nn.Module, modules: Sequence[str] | Mapping[str, int]) -> list[_Place]:
    if isinstance(modules, str) or not isinstance(modules, (Sequence, Mapping)) or any(not isinstance(n, str) for n in modules):
        raise TypeError(f"modules must be a sequence of module names, or a mapping of names to channels, got {modules!r}")
    if not modules:
        raise ValueError("modules must not be empty")
    if len(set(modules)) != len(modules):
        raise ValueError("modules names a module twice")
    known = dict(model.named_modules(remove_duplicate=False))
    places = []
    for name in modules:
        if name == "" or name not in known:
            raise ValueError(f"modules names {name!r}, which {type(model).__name__} does not have")
        host = known[name]
        channels = modules[name] if isinstance(modules, Mapping) else _channels(name, host)
        parent_name, _, attribute = name.rpartition(".")
        parent = known[parent_name]
        places.append(_Place(name, host, parent, channels, _wrapping(parent, attribute, host)))
    return places


def _wrapping(parent: nn.Module, attribute: str, host: nn.Module) -> Callable[[PPCR], None]:
    def insert(layer: PPCR) -> None:
        setattr(parent, attribute, nn.Sequential(host, layer).train(host.training))

    return insert


def _channels(name: str, module: nn.Module) -> int:
    for attribute in ("num_features", "num_channels", "out_channels"):
        found = getattr(module, attribute, None)
        if isinstance(found, int) and not isinstance(found, torch.Tensor):
            return found
    raise ValueError(f"{name} ({type(module).__name__}) does not say how many channels it has; pass modules={{{name!r}: channels}}")
