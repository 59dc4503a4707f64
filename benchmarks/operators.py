"""The operators suite: which inputs, and who is measured on them. ``--all`` is the whole product, a CPU takes a named part of it;
``--quick`` on a GPU is what ``make gpu`` runs: the stages of the ResNets at batch 256.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch

from .measure import Group

Shape = tuple[int, ...]

LAYOUTS = ("contiguous", "channels_last")
DTYPES = ("float32", "float16", "bfloat16", "float64")
NEIGHBOURS = ("SE", "ECA", "CBAM spatial gate")
MODES_CUDA = ("default", "max-autotune-no-cudagraphs")
BATCHES = (1, 8, 64, 256)
STAGES = {  # channels and side at the end of every stage, for pictures of 224x224
    "ResNet-18": ((64, 56), (128, 28), (256, 14), (512, 7)),
    "ResNet-50": ((256, 56), (512, 28), (1024, 14), (2048, 7)),
}
OTHERS: dict[Shape, str] = {
    (128, 64, 32, 32): "CIFAR",
    (128, 256, 8, 8): "CIFAR",
    (1, 64, 256, 256): "512x512 picture",
    (1, 32, 512, 512): "512x512 picture",
    (8, 32, 512, 512): "512x512 picture",
    (1, 32, 64, 64, 64): "volume",
    (5, 36, 33, 47): "odd size",
    (4, 50, 27, 27): "odd channels",
    (16, 72, 57, 57): "odd size",
}

# What a CPU measures in float32: two batches of the stages, and one of every other kind.
CPU = (
    *((8, *stage) for stage in ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))),
    (1, 256, 56),
    (64, 512, 7),
)
CPU_OTHERS = (
    (128, 64, 32, 32),
    (1, 64, 256, 256),
    (1, 32, 64, 64, 64),
    (5, 36, 33, 47),
    (4, 50, 27, 27),
)
CPU_FEW = (
    (8, 256, 56, 56),
    (8, 2048, 7, 7),
    (1, 64, 256, 256),
)  # gate and add_relu, every dtype, every backend
CPU_QUICK = ((8, 512, 28, 28), (8, 2048, 7, 7), (5, 36, 33, 47))
CUDA_QUICK = tuple(
    (256, channels, side, side) for channels, side in ((64, 56), *STAGES["ResNet-50"])
)
CUDA_QUICK_COMPILED = (CUDA_QUICK[1], CUDA_QUICK[-1])  # compiling takes most of the time
TINY = (1, 8, 2, 2)


def case_name(shape: Shape) -> str:
    """``ResNet-50 8x256x56x56`` and so on; ``tiny`` for the tensor that shows what a call costs."""
    kind = OTHERS.get(shape)
    for network, stages in STAGES.items():
        if shape[1:] in {(channels, side, side) for channels, side in stages}:
            kind = network
    if shape == TINY:
        kind = "tiny"
    return f"{kind or 'other'} {'x'.join(map(str, shape))}"


def tiny(operator: str, threads: int) -> Group:
    """Launch latency: eager calls beside ``F.layer_norm``; the data stay in the cache."""
    beside = ("F.layer_norm",) if operator == "ppcr" else ()
    return Group(
        "operators",
        operator,
        case_name(TINY),
        TINY,
        "contiguous",
        threads=threads,
        plain=("pooled once",),
        neighbours=beside,
        rotate=False,
    )


def groups(
    device: torch.device, *, everything: bool, quick: bool, compiling: bool, threads: int
) -> list[Group]:
    """What to measure, small inputs last: where time runs out, the figures that matter are there."""
    if everything:
        made = list(_everything(device, threads))
    elif quick and device.type == "cuda":
        made = list(_cuda_quick(threads))
    elif quick:
        made = list(_cpu(CPU_QUICK, (), threads))
        made = [g for g in made if g.layout == "contiguous" or g.shape == CPU_QUICK[0]]
        made = [
            replace(g, plain=("pooled once",), modes=g.modes if g.shape == CPU_QUICK[0] else ())
            for g in made
        ]
        made += [
            replace(g, operator=o, neighbours=(), modes=())
            for g in made[:1]
            for o in ("gate", "add_relu")
        ]
    else:
        stages = tuple((batch, channels, side, side) for batch, channels, side in CPU)
        made = list(_cpu((*stages, *CPU_OTHERS), CPU_FEW, threads))
    made += [tiny(operator, threads) for operator in ("ppcr", "gate", "add_relu")]
    return made if compiling else [replace(group, modes=()) for group in made]


def _cpu(shapes: Iterable[Shape], few: tuple[Shape, ...], threads: int) -> Iterable[Group]:
    for shape, layout in itertools.product(shapes, LAYOUTS):
        group = Group(
            "operators",
            "ppcr",
            case_name(shape),
            shape,
            layout,
            threads=threads,
            modes=("default",),
        )
        beside = NEIGHBOURS if len(shape) == 4 and shape in few else ()
        yield replace(
            group, neighbours=beside, backends=None if shape in few else ("native", "triton")
        )
    for shape, layout in itertools.product(few, LAYOUTS):
        group = Group("operators", "ppcr", case_name(shape), shape, layout, threads=threads)
        for operator in ("add_relu", "gate"):
            yield replace(group, operator=operator, modes=("default",))
        for dtype in DTYPES[1:]:
            yield replace(group, dtype=dtype, plain=("pooled once",))


def _cuda_quick(threads: int) -> Iterable[Group]:
    for dtype, layout, shape in itertools.product(("float16", "float32"), LAYOUTS, CUDA_QUICK):
        modes = ("default",) if dtype == "float16" and shape in CUDA_QUICK_COMPILED else ()
        beside, backends = ("pooled once",), ("native", "triton")
        yield Group(
            "operators",
            "ppcr",
            case_name(shape),
            shape,
            layout,
            dtype,
            threads,
            plain=beside,
            modes=modes,
            backends=backends,
        )


def _everything(device: torch.device, threads: int) -> Iterable[Group]:
    stages = {
        (batch, c, side, side)
        for batch in BATCHES
        for network in STAGES.values()
        for c, side in network
    }
    shapes = [*sorted(stages, key=lambda shape: -torch.Size(shape).numel()), *OTHERS]
    modes = MODES_CUDA if device.type == "cuda" else ("default",)
    product = itertools.product(
        ("ppcr", "add_relu", "gate"), ("bfloat16", "float32", "float16", "float64"), shapes, LAYOUTS
    )
    for operator, dtype, shape, layout in product:
        yield Group(
            "operators",
            operator,
            case_name(shape),
            shape,
            layout,
            dtype,
            threads,
            modes=modes if dtype != "float64" else (),
            compiled=("pooled once", "level by level"),
            neighbours=NEIGHBOURS
            if operator == "ppcr" and len(shape) == 4 and dtype != "float64"
            else (),
        )
