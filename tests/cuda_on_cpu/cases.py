"""Runs the CUDA kernels on the CPU for one case and compares them with a float64 evaluation of the same stored inputs."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import numpy as np
import torch
from guard_pages import guarded
from torch import Tensor

from ppcr_ext import reference

from . import build

SCALE, ADD_RELU, GATE = 0, 1, 2
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
for _name, _source in {
    "float32": "float",
    "float16": "half",
    "bfloat16": "bfloat16",
    "float64": "double",
}.items():
    if _source in build.LEFT_OUT:
        del DTYPES[_name]
HOPPER = {"multiprocessors": 132, "max_cluster": 8, "shared_bytes": 227 << 10}
AMPERE = {"multiprocessors": 108, "max_cluster": 1, "shared_bytes": 163 << 10}
SMALL = {"multiprocessors": 84, "max_cluster": 1, "shared_bytes": 99 << 10}  # sm_86, sm_89
STANDARD = (1, 2, 4)
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
    pixel_major: bool = False
    mode: int = SCALE
    levels: tuple[int, ...] = STANDARD
    forced: str = ""
    device: tuple[tuple[str, int], ...] = tuple(HOPPER.items())
    offset: int = 0  # elements: a tensor that starts at an odd address
    own_parameters: bool = False  # weight and bias of x's type instead of the accumulation type
    bias: bool = True
    only_blocks: int = 0

    def fields(self, backward: bool) -> dict:
        itemsize = DTYPES[self.dtype].itemsize
        return {
            "images": self.images,
            "channels": self.channels,
            "image_pixels": self.pixels,
            "pixel_major": self.pixel_major,
            "element_size": itemsize,
            "mode": self.mode,
            "backward": backward,
            "levels": list(self.levels),
            "weight_wide": not self.own_parameters,
            "bias_wide": not self.own_parameters,
            **dict(self.device),
        }


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def tolerances(case: Case) -> tuple[float, float, float]:
    """Relative errors allowed in outputs, dx and the parameters' gradients."""
    standard = case.levels == STANDARD
    return {
        "float64": (1e-11, 1e-11, 1e-11),
        "float32": (1e-5, 5e-5, 1e-5) if standard else (5e-5, 3e-4, 5e-5),
        "float16": (7e-4, 7e-4, 7e-4),
        "bfloat16": (5e-3, 5e-3, 5e-3),
    }[case.dtype]


class Tensors:
    """Inputs of a case, in the case's layout, and NaN-filled outputs of the same kind."""

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[case.dtype]
        parameter_dtype = dtype if case.own_parameters else reference.accumulation_dtype(dtype)
        contexts = sum(case.levels)

        def drawn(shape: tuple[int, ...], mean: float, spread: float, of: torch.dtype) -> Tensor:
            return (
                torch.randn(shape, generator=generator, dtype=torch.float64) * spread + mean
            ).to(of)

        shape = (case.images, case.channels, case.pixels)
        self.x = self.laid_out(drawn(shape, 1.5, 2.0, dtype))
        self.grad = self.laid_out(
            drawn((case.images, 1, case.pixels) if case.mode == GATE else shape, 0.0, 1.0, dtype)
        )
        self.residual = (
            self.laid_out(drawn(shape, -1.0, 3.0, dtype)) if case.mode == ADD_RELU else None
        )
        self.weight = drawn((contexts,), 0.0, 0.5, parameter_dtype)
        self.bias = drawn((1,), 0.3, 0.5, parameter_dtype) if case.bias else None

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The values of ``tensor [N, C, P]`` in the memory order of the case, ``offset`` elements into their storage."""
        ordered = tensor.transpose(1, 2) if self.case.pixel_major else tensor
        storage = guarded(tensor.numel() + self.case.offset, tensor.dtype)
        values = storage[self.case.offset :].view(ordered.shape)
        values.copy_(ordered)
        return values.transpose(1, 2) if self.case.pixel_major else values

    def empty(self, like: Tensor) -> Tensor:
        return self.laid_out(torch.full(like.shape, float("nan"), dtype=like.dtype))

    def flat(self, tensor: Tensor | None) -> np.ndarray | None:
        if tensor is None:
            return None
        return as_numpy(tensor.transpose(1, 2) if self.case.pixel_major else tensor)

    def run(
        self, backward: bool, y: Tensor | None = None, seed: int = 0
    ) -> tuple[dict[str, Tensor], dict]:
        case = self.case
        if backward:
            outputs = {"dx": self.empty(self.x)}
            outputs["dweight"] = torch.full_like(self.weight, float("nan"))
            if self.bias is not None:
                outputs["dbias"] = torch.full_like(self.bias, float("nan"))
            if case.mode == ADD_RELU:
                outputs["dresidual"] = self.empty(self.x)
        else:
            outputs = {"y": self.empty(self.grad if case.mode == GATE else self.x)}
        arrays = {
            "x": self.flat(self.x),
            "weight": as_numpy(self.weight),
            "bias": None if self.bias is None else as_numpy(self.bias),
            "out": self.flat(outputs["dx" if backward else "y"]),
        }
        if backward:
            arrays["grad"] = self.flat(self.grad)
            arrays["extra_in"] = self.flat(y) if case.mode == ADD_RELU else None
            arrays["extra_out"] = self.flat(outputs.get("dresidual"))
            arrays["dweight"] = as_numpy(outputs["dweight"])
            arrays["dbias"] = as_numpy(outputs["dbias"]) if "dbias" in outputs else None
        else:
            arrays["extra_in"] = self.flat(self.residual)
        plan = kernels().run(
            case.fields(backward),
            case.dtype,
            arrays,
            forced=case.forced,
            seed=seed,
            only_blocks=case.only_blocks,
        )
        return outputs, plan

    def expected(self, y: Tensor | None) -> dict[str, tuple[Tensor, float]]:
        """Each output in float64, and what its error is relative to."""
        case = self.case
        x = self.x.double().detach().requires_grad_()
        weight = self.weight.double().detach().requires_grad_()
        bias = torch.zeros(1, dtype=torch.float64) if self.bias is None else self.bias.double()
        biases = (
            bias.expand(case.images, 1, case.pixels).clone().requires_grad_()
        )  # per pixel: its gradient is dz
        gradient = self.grad.double()
        results: dict[str, Tensor] = {}
        if case.mode == ADD_RELU:
            assert self.residual is not None
            assert y is not None
            results["y"] = reference.ppcr_add_relu(
                x, self.residual.double(), weight, biases, case.levels, 1e-5
            )
            gradient = torch.where(
                y <= 0, 0, gradient
            )  # of the stored y, as the operator defines it
            results["dresidual"] = gradient
            differentiated = reference.ppcr(x, weight, biases, case.levels, 1e-5)
        else:
            operator = reference.ppcr_gate if case.mode == GATE else reference.ppcr
            differentiated = results["y"] = operator(x, weight, biases, case.levels, 1e-5)
        results["dx"], results["dweight"], dz = torch.autograd.grad(
            differentiated, (x, weight, biases), gradient
        )
        results["dbias"] = dz.sum().reshape(1)
        normalized = self.normalized_contexts()
        scales = {name: float(result.detach().norm()) for name, result in results.items()}
        scales["dweight"] = float((dz * normalized).abs().sum((0, 2)).norm())
        scales["dbias"] = float(dz.abs().sum())
        return {name: (result.detach(), scales[name]) for name, result in results.items()}

    def contexts(self) -> Tensor:
        spans = [
            span for level in self.case.levels for span in reference.bins(self.case.channels, level)
        ]
        return torch.stack([self.x.double()[:, begin:end].mean(1) for begin, end in spans], dim=1)

    def normalized_contexts(self) -> Tensor:
        contexts = self.contexts()
        return (contexts - contexts.mean(1, keepdim=True)) / (
            contexts.var(1, correction=0, keepdim=True) + 1e-5
        ).sqrt()


def check(case: Case, seeds: tuple[int, ...] = (0, 7)) -> dict:
    """Forward and backward of one case under every schedule seed: right numbers, equal bits. Returns the plan of the backward."""
    tensors = Tensors(case)
    outputs, plan = tensors.run(backward=False)
    gradients, plan = tensors.run(backward=True, y=outputs["y"])
    outputs.update(gradients)
    for seed in seeds[1:]:
        again, _ = tensors.run(backward=False, seed=seed)
        again.update(tensors.run(backward=True, y=again["y"], seed=seed)[0])
        for name, output in outputs.items():
            assert same_bits(output, again[name]), (
                f"{case}: {name} depends on the order of threads or blocks"
            )
    allowed_y, allowed_dx, allowed_parameters = tolerances(case)
    if case.mode == GATE and case.levels == (1, 2) and case.dtype == "float32":
        # The middle context is the mean of the others, so the normalized contexts are nearly signs and the gate's own gradient nearly
        # cancels: to about eps / var of its terms. (Of x * g it is a small addend.)
        allowed_dx = 1e-2
    allowed = {
        "y": allowed_y,
        "dx": allowed_dx,
        "dresidual": 0.0,
        "dweight": allowed_parameters,
        "dbias": allowed_parameters,
    }
    if case.own_parameters and case.dtype != "float64":
        rounding = torch.finfo(DTYPES[case.dtype]).eps
        allowed["dweight"] = allowed["dbias"] = allowed_parameters + rounding
    for name, (expected, scale) in tensors.expected(outputs["y"]).items():
        if name not in outputs:
            continue
        error = float((outputs[name].double() - expected).norm()) / max(scale, 1e-300)
        assert error <= allowed[name], (
            f"{case}: {name} is off by {error:.2e}, allowed {allowed[name]:.0e}; plan {plan}"
        )
    return plan


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
