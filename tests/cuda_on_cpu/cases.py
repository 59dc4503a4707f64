"""Runs the CUDA kernels on the CPU for one case and compares them with ppcr_ext.testing."""

import dataclasses
import functools
from types import ModuleType

import numpy as np
import torch
from guard_pages import guarded
from torch import Tensor

from ppcr_ext import testing

from . import build

OPERATORS = testing.OPERATORS
PPCR, GATE, ADD_RELU = OPERATORS
SOURCES = {"float32": "float", "float16": "half", "bfloat16": "bfloat16", "float64": "double"}
DTYPES = {
    name: getattr(torch, name) for name, source in SOURCES.items() if source not in build.LEFT_OUT
}
# NVIDIA's data sheets and the CUDA programming guide, table of compute capabilities.
HOPPER = {"multiprocessors": 132, "max_cluster": 8, "shared_bytes": 227 << 10}
AMPERE = {"multiprocessors": 108, "max_cluster": 1, "shared_bytes": 163 << 10}
SMALL = {"multiprocessors": 84, "max_cluster": 1, "shared_bytes": 99 << 10}  # sm_86, sm_89
STANDARD = testing.LEVELS
KERNEL_COUNT = 340  # template instantiations of all kernels


@functools.cache
def kernels() -> ModuleType:
    return build.load()


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: str
    images: int
    channels: int
    pixels: int
    channels_last: bool = False
    operator: str = PPCR
    levels: tuple[int, ...] = STANDARD
    forced: str = ""
    forced_forward: str | None = None  # None: as forced
    device: tuple[tuple[str, int], ...] = tuple(HOPPER.items())
    offset: int = 0  # elements: a tensor that starts at an odd address
    own_parameters: bool = False  # weight and bias of x's type instead of the accumulation type
    bias: bool = True
    only_blocks: int = 0

    def fields(self, backward: bool) -> dict:
        return {
            "images": self.images,
            "channels": self.channels,
            "image_pixels": self.pixels,
            "channels_last": self.channels_last,
            "element_size": DTYPES[self.dtype].itemsize,
            "operator": self.operator,
            "backward": backward,
            "levels": list(self.levels),
            "own_parameters": self.own_parameters,
            **dict(self.device),
        }


def forced_plan(fields: dict) -> str:
    """PPCR_PLAN text of the plan that these sizes get."""
    plan = kernels().plan(fields)
    if plan["method"] != "contiguous_pipelined":
        return ""
    return ",".join(
        f"{name}={plan[name]}" for name in ("q", "groups", "cluster", "vector", "steps")
    )


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


class Tensors:
    """Inputs of a case in its layout, at guard pages, and NaN-filled outputs of the same kind."""

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        shape, dtype = (case.images, case.channels, case.pixels), DTYPES[case.dtype]
        own = dtype if case.own_parameters else None
        drawn = testing.make_inputs(
            case.operator, shape, case.levels, dtype, parameter_dtype=own, bias=case.bias, seed=seed
        )
        maps = {name: self.laid_out(getattr(drawn, name)) for name in ("x", "residual", "grad")}
        self.inputs = dataclasses.replace(drawn, **maps)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """``tensor [N, C, P]`` in the layout of the case, ``offset`` elements into its storage."""
        ordered = tensor.transpose(1, 2) if self.case.channels_last else tensor
        storage = guarded(tensor.numel() + self.case.offset, tensor.dtype)
        values = storage[self.case.offset :].view(ordered.shape)
        values.copy_(ordered)
        return values.transpose(1, 2) if self.case.channels_last else values

    def empty(self, like: Tensor) -> Tensor:
        return self.laid_out(torch.full_like(like, float("nan")))

    def flat(self, tensor: Tensor) -> np.ndarray:
        return as_numpy(tensor.transpose(1, 2) if self.case.channels_last else tensor)

    def run(
        self, backward: bool, y: Tensor | None = None, seed: int = 0
    ) -> tuple[dict[str, Tensor], dict]:
        """The outputs of one pass, and its plan; ``y`` is what add_relu's backward pass reads."""
        case, inputs = self.case, self.inputs
        parameters = {"weight": inputs.weight}
        if inputs.bias is not None:
            parameters["bias"] = inputs.bias
        if backward:
            maps = {"x": inputs.x, "grad": inputs.grad}
            if y is not None and case.operator == ADD_RELU:
                maps["y"] = y
            outputs = {"dx": self.empty(inputs.x)}
            if case.operator == ADD_RELU:
                outputs["dresidual"] = self.empty(inputs.x)
        else:
            maps = {"x": inputs.x}
            if case.operator == ADD_RELU:
                maps["residual"] = inputs.residual
            outputs = {"y": self.empty(inputs.grad)}
        arrays = {name: self.flat(tensor) for name, tensor in (maps | outputs).items()}
        if backward:
            gradients = {
                f"d{name}": torch.full_like(t, float("nan")) for name, t in parameters.items()
            }
            outputs |= gradients
            parameters |= gradients
        arrays |= {name: as_numpy(tensor) for name, tensor in parameters.items()}
        forced = case.forced if backward or case.forced_forward is None else case.forced_forward
        plan = kernels().run(
            case.fields(backward),
            case.dtype,
            arrays,
            forced=forced,
            seed=seed,
            only_blocks=case.only_blocks,
        )
        return outputs, plan

    def run_both(self, seed: int = 0) -> tuple[dict[str, Tensor], dict]:
        """The outputs of both passes, and the plan of the backward pass."""
        outputs, _ = self.run(backward=False, seed=seed)
        gradients, plan = self.run(backward=True, y=outputs["y"], seed=seed)
        return outputs | gradients, plan


def check(case: Case, seeds: tuple[int, ...] = (0, 7)) -> dict:
    """Both passes of a case: right numbers, and equal bits under every schedule.

    Returns the plan of the backward pass.
    """
    tensors = Tensors(case)
    outputs, plan = tensors.run_both()
    for seed in seeds[1:]:
        again, _ = tensors.run_both(seed)
        for name, output in outputs.items():
            same = same_bits(output, again[name])
            assert same, f"{case}: {name} depends on the order of threads or blocks"
    dtype = DTYPES[case.dtype]
    limits = testing.tolerance(dtype, case.levels)
    rounded = case.own_parameters and case.dtype != "float64"
    parameters = limits.parameters + (torch.finfo(dtype).eps if rounded else 0)
    allowed = {"y": limits.y, "dx": limits.dx, "dresidual": 0.0}
    truth = testing.truth(tensors.inputs, y=outputs["y"])
    for name, output in outputs.items():
        error, most = truth.error(name, output), allowed.get(name, parameters)
        assert error <= most, f"{case}: {name} is off by {error:.2e}, not {most:.0e}; plan {plan}"
    return plan


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
