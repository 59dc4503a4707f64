"""What is measured on what: the cases of every suite.

A whole network is a case whose calls are its training step and its inference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ppcr_ext.testing import LAYOUTS, LEVELS, SHAPES, STAGES

from .baselines import DIRECTIONS, GATES

Shape = tuple[int, ...]
Place = tuple[object, ...]

SUITES = ("retina", "shapes", "operators", "scaling", "end-to-end")
OTHER_LAYERS = ("SE", "ECA", "CBAM spatial gate")
FUSED = ("native", "triton")
DTYPES = ("float32", "float16", "bfloat16", "float64")
PLACE = ("suite", "operator", "case", "shape", "layout", "dtype", "threads", "levels")


@dataclass(frozen=True)
class Case:
    """An input and what is measured on it; everything in a case is timed in every round."""

    suite: str
    operator: str  # or the name of a network
    case: str  # what the input is, in words
    shape: Shape
    layout: str
    dtype: str = "float32"
    threads: int = 1
    levels: tuple[int, ...] = LEVELS
    directions: tuple[str, ...] = DIRECTIONS
    backends: tuple[str, ...] | None = None  # None: all that are usable
    plain: tuple[str, ...] = ("pooled once", "level by level")
    other_layers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()  # of torch.compile
    compiled: tuple[str, ...] = ("pooled once",)  # what is measured under them
    rotate: bool = True  # through more memory than a cache holds
    variants: tuple[str, ...] = ()  # of a whole network
    # x, grad, weight and bias, float32; None: random ones
    given: Callable[[], Sequence[Tensor]] | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> Place:
        return tuple(getattr(self, name) for name in PLACE)

    def __str__(self) -> str:
        layer = self.suite != "end_to_end"
        return ", ".join([f"{self.operator} {self.case}" if layer else self.case, *self._rest()])

    def _rest(self) -> Iterable[str]:
        yield self.layout
        if self.dtype != "float32":
            yield self.dtype
        yield f"{self.threads} thread{'s' * (self.threads > 1)}"


def name_of(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# ---- operators -----------------------------------------------------------------------------------

MODES_CUDA = ("default", "max-autotune-no-cudagraphs")
BATCHES = (1, 8, 64, 256)
FURTHER: dict[Shape, str] = {
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
CPU: tuple[Shape, ...] = (
    *((8, c, side, side) for c, side in ((64, 56), *STAGES["ResNet-50"])),
    (1, 256, 56, 56),
    (64, 512, 7, 7),
    (128, 64, 32, 32),
    (1, 64, 256, 256),
    (1, 32, 64, 64, 64),
    (5, 36, 33, 47),
    (4, 50, 27, 27),
)
# Here also gate and add_relu, every dtype, every backend.
CPU_FEW = ((8, 256, 56, 56), (8, 2048, 7, 7), (1, 64, 256, 256))
CPU_QUICK = ((8, 512, 28, 28), (8, 2048, 7, 7), (5, 36, 33, 47))
CUDA_QUICK = tuple((256, c, side, side) for c, side in ((64, 56), *STAGES["ResNet-50"]))
CUDA_QUICK_COMPILED = (CUDA_QUICK[1], CUDA_QUICK[-1])  # compiling takes most of the time
TINY = (1, 8, 2, 2)  # shows what a call costs


def kind_of(shape: Shape) -> str:
    """``ResNet-50`` and so on; ``tiny`` for :data:`TINY`."""
    kind = "tiny" if shape == TINY else FURTHER.get(shape, "other")
    for network, stages in STAGES.items():
        if shape[1:] in {(channels, side, side) for channels, side in stages}:
            kind = network
    return kind


def operator_case(operator: str, shape: Shape, layout: str, **options: object) -> Case:
    name = f"{kind_of(shape)} {name_of(shape)}"
    return Case("operators", operator, name, shape, layout, **options)  # type: ignore[arg-type]


def tiny(operator: str, threads: int) -> Case:
    """Eager calls on data that stay in the cache."""
    layers = ("F.layer_norm",) if operator == "ppcr" else ()
    case = operator_case(operator, TINY, "contiguous", threads=threads, rotate=False)
    return replace(case, plain=("pooled once",), other_layers=layers)


def operators(
    device: torch.device, *, everything: bool = False, quick: bool = False, threads: int = 1
) -> list[Case]:
    """Small inputs last: where time runs out, the figures that matter are there."""
    if everything:
        made = list(_everything(device))
    elif quick and device.type == "cuda":
        made = list(_cuda_quick())
    elif quick:
        made = [c for c in _cpu(CPU_QUICK, ()) if "contiguous" in c.layout or c.modes]
        made = [c for c in made if c.layout == "contiguous" or c.shape == CPU_QUICK[0]]
        made = [
            replace(c, plain=("pooled once",), modes=c.modes if c.shape == CPU_QUICK[0] else ())
            for c in made
        ]
        made += [replace(made[0], operator=o, modes=()) for o in ("gate", "add_relu")]
    else:
        made = list(_cpu(CPU, CPU_FEW))
    made = [replace(case, threads=threads) for case in made]
    return made + [tiny(operator, threads) for operator in ("ppcr", "gate", "add_relu")]


def _cpu(shapes: Iterable[Shape], few: tuple[Shape, ...]) -> Iterable[Case]:
    for shape, layout in itertools.product(shapes, LAYOUTS):
        layers = OTHER_LAYERS if len(shape) == 4 and shape in few else ()
        backends = None if shape in few else FUSED
        yield operator_case(
            "ppcr", shape, layout, modes=("default",), other_layers=layers, backends=backends
        )
    for shape, layout in itertools.product(few, LAYOUTS):
        for operator in ("add_relu", "gate"):
            yield operator_case(operator, shape, layout, modes=("default",))
        for dtype in DTYPES[1:]:
            yield operator_case("ppcr", shape, layout, dtype=dtype, plain=("pooled once",))


def _cuda_quick() -> Iterable[Case]:
    for dtype, layout, shape in itertools.product(("float16", "float32"), LAYOUTS, CUDA_QUICK):
        modes = ("default",) if dtype == "float16" and shape in CUDA_QUICK_COMPILED else ()
        made = operator_case("ppcr", shape, layout, dtype=dtype, modes=modes, backends=FUSED)
        yield replace(made, plain=("pooled once",))


def _everything(device: torch.device) -> Iterable[Case]:
    stages = {
        (batch, channels, side, side)
        for batch in BATCHES
        for network in STAGES.values()
        for channels, side in network
    }
    shapes = [*sorted(stages, key=lambda shape: -torch.Size(shape).numel()), *FURTHER]
    modes = MODES_CUDA if device.type == "cuda" else ("default",)
    dtypes = ("bfloat16", "float32", "float16", "float64")
    product = itertools.product(("ppcr", "add_relu", "gate"), dtypes, shapes, LAYOUTS)
    for operator, dtype, shape, layout in product:
        narrow = dtype != "float64"
        layers = OTHER_LAYERS if operator == "ppcr" and len(shape) == 4 and narrow else ()
        case = operator_case(operator, shape, layout, dtype=dtype, other_layers=layers)
        yield replace(
            case, modes=modes if narrow else (), compiled=("pooled once", "level by level")
        )


# ---- scaling -------------------------------------------------------------------------------------

AXES = {
    "pixels": "pixels per image",
    "channels": "channels",
    "levels": "contexts (sum of the levels)",
    "batch": "images",
}


def scaling(device: torch.device, *, quick: bool, threads: Sequence[int]) -> list[Case]:
    """One axis grows while the rest stays, by doublings; in ``quick`` by every second one."""
    base = 8 if device.type == "cuda" else 1  # a GPU needs more to fill it
    series: dict[str, list[tuple[Shape, tuple[int, ...]]]] = {
        "pixels": [((base, 64, side, side), LEVELS) for side in (8, 16, 32, 64, 128, 256)],
        "channels": [((base, 32 << i, 28, 28), LEVELS) for i in range(7)],
        "levels": [((2 * base, 256, 28, 28), tuple(2**i for i in range(n))) for n in range(2, 7)],
        "batch": [((base << i, 256, 14, 14), LEVELS) for i in range(7)],
    }
    made = []
    for number, (axis, points) in itertools.product(threads, series.items()):
        few = points[:: -2 if axis != "levels" else -1][::-1] if quick else points
        made += [
            Case(
                "scaling",
                "ppcr",
                axis,
                shape,
                "contiguous",
                threads=number,
                levels=levels,
                directions=("forward", "step"),
                plain=("pooled once",),
                backends=FUSED,
            )
            for shape, levels in few
        ]
    return made


def size_of(case: str, shape: Sequence[int], levels: Sequence[int]) -> int:
    """Where a shape and levels are on the axis that a case names."""
    return {
        "pixels": torch.Size(shape[2:]).numel(),
        "channels": shape[1],
        "levels": sum(levels),
        "batch": shape[0],
    }[case]


# ---- retina and shapes ---------------------------------------------------------------------------


def retina(dtypes: Sequence[str], *, quick: bool, threads: int) -> list[Case]:
    """What the last PPCR layer of each stage sees on a photograph."""
    from .networks import retina_inputs

    found = dict(list(retina_inputs().items())[: 1 if quick else None])
    cases = [
        Case("retina", "ppcr", f"{stage} {name_of(tensors[0].shape)}", tuple(tensors[0].shape),
             "contiguous", given=lambda tensors=tensors: tensors)
        for stage, tensors in found.items()
    ]  # fmt: skip
    return _in_dtypes(cases, dtypes, threads, ("native", "triton", "pooled once"))


def shapes(dtypes: Sequence[str], *, quick: bool, threads: int) -> list[Case]:
    """Random inputs of the eight shapes."""
    cases = [
        Case("shapes", "ppcr", name_of(shape), shape, "contiguous")
        for shape in SHAPES[: 2 if quick else None]
    ]
    return _in_dtypes(cases, dtypes, threads, ("native", "triton", "pooled once", "level by level"))


def _in_dtypes(
    cases: list[Case], dtypes: Sequence[str], threads: int, compiled: tuple[str, ...]
) -> list[Case]:
    """Every case in both layouts; in float32 beside plain PyTorch, else the backends alone."""
    made = []
    for case, layout, dtype in itertools.product(cases, LAYOUTS, dtypes):
        wide = dtype == "float32"
        made.append(
            replace(
                case,
                layout=layout,
                dtype=dtype,
                threads=threads,
                directions=("forward", "step"),
                plain=tuple(GATES) if wide else (),
                modes=("default",) if wide else (),
                compiled=compiled,
                rotate=False,
            )
        )
    return made


# ---- whole networks ------------------------------------------------------------------------------

VARIANTS = ("none", "PPCR fused", "PPCR unfused", "PPCR plain", "SE", "CBAM")
OWN = VARIANTS[1:4]  # the same network three times over
NETWORKS = {"resnet18": (16, 32), "resnet50": (4, 224)}  # images and their side, on a CPU
CUDA_IMAGES = {"resnet18": 1024, "resnet50": 256}


def end_to_end(
    device: torch.device, *, everything: bool, network: str | None, quick: bool, threads: int
) -> list[Case]:
    """On a CPU both networks eagerly in both layouts, and ResNet-18 compiled.

    On a GPU, or with ``everything``, the product of networks, layouts, precisions and compilation.
    """
    made = []
    precisions = ("float32", "bfloat16 autocast")
    product = itertools.product(NETWORKS, LAYOUTS, precisions, (False, True))
    for name, layout, dtype, compiled in product:
        variants = VARIANTS
        if not everything:
            if dtype != "float32" or (compiled and (name, layout) != ("resnet18", "channels_last")):
                continue
            variants = VARIANTS[:4] if compiled else VARIANTS
        images, side = NETWORKS[name]
        shape = (CUDA_IMAGES[name] if device.type == "cuda" else images, 3, side, side)
        label = f"{name} {name_of(shape)}" + (", compiled" if compiled else "")
        case = Case("end_to_end", name, label, shape, layout, dtype, threads, variants=variants)
        made.append(
            replace(case, directions=("step", "inference"), modes=("default",) if compiled else ())
        )
    if network:
        made = [case for case in made if case.operator == network and not case.modes]
    return made[:1] if quick else made
