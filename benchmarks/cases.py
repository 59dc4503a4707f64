"""What is measured on what: the cases of every suite. A whole network is a case, too."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

import torch

from ppcr_ext.testing import LAYOUTS, LEVELS, SHAPES, STAGES, Inputs

from .baselines import DIRECTIONS, FORMULATIONS

Shape = tuple[int, ...]
Key = tuple[Any, ...]

OTHER_LAYERS = ("SE", "ECA", "CBAM spatial gate")
FUSED = ("native", "triton")
PLAIN = ("pooled once", "level by level")
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass
class Place:
    """What tells one case from another, in the plan and in the files."""

    suite: str
    operator: str  # or the name of a network
    case: str  # what the input is, in words
    shape: Shape
    layout: str
    dtype: str = "float32"
    threads: int = 1
    levels: tuple[int, ...] = LEVELS

    @property
    def place(self) -> Key:
        return tuple(getattr(self, one.name) for one in fields(Place))

    @property
    def on_threads(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def size(self) -> int:
        """Where it is on the axis that is the name of a case of scaling."""
        of = {"pixels": torch.Size(self.shape[2:]).numel(), "channels": self.shape[1]}
        return (of | {"batch": self.shape[0], "levels": sum(self.levels)})[self.case]

    @property
    def label(self) -> str:
        if self.suite == "scaling":
            return f"{self.case} {self.size}, {self.on_threads}"
        return ", ".join([self.case, self.layout, *([self.dtype] * (self.dtype != "float32"))])


@dataclass
class Case(Place):
    """An input and what is measured on it; everything in a case is timed in every round."""

    directions: tuple[str, ...] = DIRECTIONS
    backends: tuple[str, ...] | None = None  # None: all that are usable
    plain: tuple[str, ...] = PLAIN
    other_layers: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()  # what is measured under torch.compile, too
    rotate: bool = True  # through more memory than a cache holds
    variants: tuple[str, ...] = ()  # of a whole network
    given: Inputs | None = field(default=None, compare=False, repr=False)  # None: random ones


def name_of(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


TINY = (1, 8, 2, 2)  # shows what a call costs; the data stay in the cache
PICTURES = ((64, 56), *STAGES["ResNet-50"])  # channels and side

# A CPU measures gate and add_relu, every dtype and every backend on the few, and ppcr in float32 on
# the others.
CPU_FEW = ((8, 256, 56, 56), (8, 2048, 7, 7), (1, 64, 256, 256))
CPU = (
    *((8, 64, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (1, 256, 56, 56), (64, 512, 7, 7)),
    *((128, 64, 32, 32), (1, 32, 64, 64, 64), (5, 36, 33, 47), (4, 50, 27, 27)),
)
CPU_QUICK = ((8, 512, 28, 28), (8, 2048, 7, 7), (5, 36, 33, 47))
CUDA_SHAPES = tuple((256, c, side, side) for c, side in PICTURES)
# Of the tools for GPUs: channels, side and images.
GPU_STAGES = ((64, 112, 128), *((channels, side, 256) for channels, side in PICTURES))


def grid(
    operators: Iterable[str],
    shapes: Iterable[Shape],
    dtypes: Iterable[str] = DTYPES[:1],
    layouts: Iterable[str] = LAYOUTS,
    **options: Any,
) -> list[Case]:
    """The product of operators, shapes, dtypes and layouts."""
    made = []
    for operator, dtype, shape, layout in product(operators, dtypes, shapes, layouts):
        name = "tiny " * (shape == TINY) + name_of(shape)
        made.append(Case("operators", operator, name, shape, layout, dtype, **options))
    return made


def operators(device: torch.device, *, quick: bool = False, threads: int = 1) -> list[Case]:
    """Small inputs last: where time runs out, the figures that matter are there."""
    ppcr, others, cuda, once = ("ppcr",), ("add_relu", "gate"), device.type == "cuda", PLAIN[:1]
    flat: dict[str, Any] = {"layouts": LAYOUTS[:1], "plain": once}
    few: dict[str, Any] = {"plain": once, "backends": FUSED}
    if cuda:
        made = grid(ppcr, CUDA_SHAPES, ("float16",), compiled=once, **few)
        made += grid(ppcr, CUDA_SHAPES, **few)
        made += [] if quick else grid(others, CUDA_SHAPES, ("float16",), **few)
    elif quick:
        made = grid(ppcr, CPU_QUICK[:1], compiled=once, **few)
        made += grid(ppcr, CPU_QUICK[1:], backends=FUSED, **flat)
        made += grid(others, CPU_QUICK[:1], backends=FUSED, **flat)
    else:
        made = grid(ppcr, CPU_FEW, other_layers=OTHER_LAYERS, compiled=once)
        made += grid(ppcr, CPU, backends=FUSED, compiled=once)
        made += grid(others, CPU_FEW, compiled=once)
        made += grid(ppcr, CPU_FEW, DTYPES[1:], plain=once)
    made += grid(ppcr, [TINY], other_layers=("F.layer_norm",), **flat)
    made += grid(others, [TINY], **flat)
    return [replace(case, threads=threads, rotate=case.shape != TINY) for case in made]


def scaling(device: torch.device, *, quick: bool, threads: Sequence[int]) -> list[Case]:
    """One axis grows while the rest stays, by doublings; in ``quick`` by every second one."""
    base = 8 if device.type == "cuda" else 1  # a GPU needs more to fill it
    series: dict[str, list[tuple[Shape, tuple[int, ...]]]] = {
        "pixels": [((base, 64, 8 << i, 8 << i), LEVELS) for i in range(6)],
        "channels": [((base, 32 << i, 28, 28), LEVELS) for i in range(7)],
        "levels": [((2 * base, 256, 28, 28), tuple(2**i for i in range(n))) for n in range(2, 7)],
        "batch": [((base << i, 256, 14, 14), LEVELS) for i in range(7)],
    }
    options: dict[str, Any] = {"directions": ("forward", "step")}
    options |= {"layout": LAYOUTS[0], "plain": ("pooled once",), "backends": FUSED}
    return [
        Case("scaling", "ppcr", axis, shape, threads=n, levels=levels, **options)
        for n, (axis, points) in product(threads, series.items())
        for shape, levels in (points[::-2] if quick else points)
    ]


def feature_maps(
    device: torch.device, *, quick: bool, threads: int, stages: Mapping[str, Inputs] | None = None
) -> list[Case]:
    """The eight shapes, or what ``stages`` of a network see; beside plain PyTorch in float32."""
    compiled = ("native", "triton", "pooled once", "level by level")[: 4 if stages is None else 3]
    inputs: list[tuple[str, Shape, Inputs | None]] = [("", shape, None) for shape in SHAPES]
    if stages is not None:
        inputs = [(f"{name} ", tuple(given.x.shape), given) for name, given in stages.items()]
    options: dict[str, Any] = {"directions": ("forward", "step"), "rotate": False}
    options |= {"suite": "shapes" if stages is None else "retina", "threads": threads}
    made, few = [], inputs[: 2 if quick else None]
    for (stage, shape, given), layout, dtype in product(few, LAYOUTS, DTYPES[:3]):
        options |= {"case": stage + name_of(shape), "shape": shape, "given": given}
        wide = dtype == "float32"
        options |= {"plain": tuple(FORMULATIONS) * wide, "compiled": compiled * wide}
        made.append(Case(operator="ppcr", layout=layout, dtype=dtype, **options))
    return made


VARIANTS = ("none", "PPCR fused", "PPCR unfused", "PPCR plain", "SE", "CBAM")
OWN = VARIANTS[1:4]  # the same network three times over
# Pictures on a CPU and on CUDA, and their side.
NETWORKS = {"resnet18": (16, 1024, 32), "resnet50": (4, 256, 224)}


def end_to_end(device: torch.device, *, quick: bool, threads: int) -> list[Case]:
    """Both networks eagerly, and compiled: on a CPU ResNet-18 alone, and in float32."""
    made, cuda = [], device.type == "cuda"
    dtype = "bfloat16 autocast" if cuda else "float32"
    for name, layout, compiled in product(NETWORKS, LAYOUTS, (False, True)):
        if cuda or not compiled or (name, layout) == ("resnet18", "channels_last"):
            few, many, side = NETWORKS[name]
            shape = (many if cuda else few, 3, side, side)
            label = f"{name} {name_of(shape)}" + ", compiled" * compiled
            options: dict[str, Any] = {"compiled": (name,) * compiled}
            options["variants"] = VARIANTS if cuda or not compiled else VARIANTS[:4]
            options["directions"] = ("step", "inference")
            made.append(Case("end_to_end", name, label, shape, layout, dtype, threads, **options))
    return made[:1] if quick else made


SUITES: dict[str, Callable[..., list[Case]]]
SUITES = {"retina": feature_maps, "shapes": feature_maps, "operators": operators}
SUITES |= {"scaling": scaling, "end-to-end": end_to_end}
