"""What all tests share: devices, dtypes, layouts, inputs, and the float64 evaluation that results are compared with."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ppcr_ext
from ppcr_ext import _build, reference

ROOT = Path(__file__).resolve().parent.parent
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BACKENDS = ["native", "reference"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = ["channel-major", "pixel-major"]
OPERATORS = ["ppcr", "ppcr_gate", "ppcr_add_relu"]
LEVELS = [(1, 2, 4), (1, 2), (2,), (3, 5), (1, 2, 4, 8), (1, 3, 7), (2, 2, 9), (64,)]

# Relative L2 error against float64, from the arithmetic: one rounding of the output for the 16-bit types; for float32 what
# normalization amplifies at channels drawn from 1.5 + 2 N(0, 1).
TOLERANCE = {
    torch.float64: {"y": 1e-11, "dx": 1e-11, "parameters": 1e-11},
    torch.float16: {"y": 7e-4, "dx": 7e-4, "parameters": 7e-4},
    torch.bfloat16: {"y": 5e-3, "dx": 5e-3, "parameters": 5e-3},
}
TOLERANCE_FLOAT32_DEFAULT_LEVELS = {"y": 1e-5, "dx": 5e-5, "parameters": 1e-5}
TOLERANCE_FLOAT32_ANY_LEVELS = {"y": 5e-5, "dx": 3e-4, "parameters": 5e-5}


def tolerance(dtype: torch.dtype, levels: Sequence[int]) -> dict[str, float]:
    if dtype == torch.float32:
        return (
            TOLERANCE_FLOAT32_DEFAULT_LEVELS
            if tuple(levels) == (1, 2, 4)
            else TOLERANCE_FLOAT32_ANY_LEVELS
        )
    return TOLERANCE[dtype]


def to_layout(t: Tensor, layout: str) -> Tensor:
    """channel-major: torch's contiguous; pixel-major: channels_last at any rank."""
    return (
        t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "pixel-major" else t.contiguous()
    )


def run(
    name: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, **options: object
) -> Tensor:
    function = getattr(ppcr_ext, name)
    return function(*((x, residual) if name == "ppcr_add_relu" else (x,)), weight, bias, **options)


@dataclasses.dataclass
class Case:
    """Inputs of one operator, and after `expect` its results in float64 from the same stored values."""

    name: str
    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor
    levels: tuple[int, ...]
    eps: float = 1e-5

    @property
    def inputs(self) -> list[Tensor]:
        tensors = [self.x, self.weight]
        if self.bias is not None:
            tensors.append(self.bias)
        return [*tensors, self.residual] if self.name == "ppcr_add_relu" else tensors

    def run(self, backend: str | None) -> tuple[Tensor, ...]:
        """Output and gradients of (x, weight[, bias][, residual])."""
        for t in self.inputs:
            t.requires_grad_()
        y = run(
            self.name,
            self.x,
            self.residual,
            self.weight,
            self.bias,
            levels=self.levels,
            eps=self.eps,
            backend=backend,
        )
        return y.detach(), *torch.autograd.grad(y, self.inputs, self.grad)

    def in_float64(self) -> Case:
        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to("cpu", torch.float64)

        return dataclasses.replace(
            self,
            **{f: wide(getattr(self, f)) for f in ("x", "residual", "weight", "bias", "grad")},  # type: ignore[arg-type]
        )


def make_case(
    name: str,
    shape: Sequence[int],
    levels: Sequence[int],
    dtype: torch.dtype,
    layout: str = "channel-major",
    *,
    parameter_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if parameter_dtype is None:
        parameter_dtype = reference.accumulation_dtype(dtype)
    gate_shape = (shape[0], 1, *shape[2:])
    return Case(
        name,
        x=to_layout((1.5 + 2 * draw(*shape)).to(device, dtype), layout),
        residual=to_layout(draw(*shape).to(device, dtype), layout),
        weight=draw(sum(levels)).to(device, parameter_dtype),
        bias=draw(1).to(device, parameter_dtype) if bias else None,
        grad=to_layout(
            draw(*(gate_shape if name == "ppcr_gate" else shape)).to(device, dtype), layout
        ),
        levels=tuple(levels),
    )


def relative_error(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """L2 norm of the difference over that of `scale` (the expected values where none is given)."""
    difference = (got.detach().cpu().double() - expected).norm()
    norm = (expected if scale is None else scale).norm()
    return float(difference / norm) if norm else float(difference)


def absolute_terms(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, the sums of absolute terms that dx (of the gate), dweight and dbias are made of."""
    wide = case.in_float64()
    x, levels = wide.x, case.levels
    contexts = torch.stack(
        [x[:, b:e].mean(1) for k in levels for b, e in reference.bins(x.shape[1], k)], 1
    )
    centred = contexts - contexts.mean(1, keepdim=True)
    inv_std = (centred.square().mean(1, keepdim=True) + case.eps).rsqrt()
    n = centred * inv_std
    w = wide.weight.reshape(-1, *[1] * (x.dim() - 2))
    gate = ((n * w).sum(1, keepdim=True) + (0 if wide.bias is None else wide.bias)).sigmoid()
    grad = wide.grad
    if case.name == "ppcr_add_relu":
        grad = torch.where(x * gate + wide.residual <= 0, 0, grad)
    dg = grad if case.name == "ppcr_gate" else (grad * x).abs().sum(1, keepdim=True)
    dz = (dg * gate * (1 - gate)).abs()
    dt = dz * inv_std * (w.abs() + w.abs().mean() + n.abs() * (w * n).abs().mean(1, keepdim=True))
    dx = torch.zeros_like(x)
    for i, (b, e) in enumerate((b, e) for k in levels for b, e in reference.bins(x.shape[1], k)):
        dx[:, b:e] += dt[:, i : i + 1] / (e - b)
    return dx, (dz * n.abs()).transpose(0, 1).flatten(1).sum(1), dz.sum().reshape(1)


def check_numbers(case: Case, backend: str) -> tuple[Tensor, ...]:
    """Output and gradients of a backend against float64, within the tolerances; x's strides. Returns them."""
    results = case.run(backend)
    wide = case.in_float64()
    expected_y = wide.run("reference")[0]
    if case.name == "ppcr_add_relu":
        # The gradients' mask follows the stored y. Where rounding took it to 0, their expectation has to stand on the same side.
        shown = results[0].cpu() > 0
        wide.residual = torch.where(shown, wide.residual.detach(), wide.residual.detach() - 1e3)
        assert torch.equal(results[4].cpu(), torch.where(shown, case.grad.cpu(), 0))
        assert results[0].min() >= 0
    expected = wide.run("reference")
    allowed = tolerance(case.x.dtype, case.levels)
    scales = absolute_terms(case)
    assert relative_error(results[0], expected_y) <= allowed["y"]
    assert (
        relative_error(results[1], expected[1], scales[0] if case.name == "ppcr_gate" else None)
        <= allowed["dx"]
    )
    assert relative_error(results[2], expected[2], scales[1]) <= allowed["parameters"]
    assert relative_error(results[3], expected[3], scales[2]) <= allowed["parameters"]
    for like_x in results[1:2] if case.name == "ppcr_gate" else results[:2]:
        assert [s for s, size in zip(like_x.stride(), like_x.shape, strict=True) if size > 1] == [
            s for s, size in zip(case.x.stride(), case.x.shape, strict=True) if size > 1
        ]
    return results


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources with nothing built."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "ppcr_ext", folder / "ppcr_ext", ignore=ignored)
    shutil.copytree(_build.csrc(), folder / "csrc")
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    """Most inputs are tiny; what depends on threads sets their number itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    """Says what the random inputs came to, and what the runs of the Triton and CUDA kernels on the CPU executed."""
    properties = sys.modules.get("test_properties")
    if properties is not None and properties.statistics["examples"]:
        s = properties.statistics
        terminalreporter.write_line(
            f"properties: {s['examples']} examples, {s['comparisons']} comparisons; worst error {s['worst']:.2f} of {properties.CONSTANT} "
            f"allowed times the amplified unit roundoff ({s['of']})"
        )
    triton = sys.modules.get("test_triton")
    if triton is not None and triton.counts:
        terminalreporter.write_line(
            "Triton interpreted: "
            + ", ".join(f"{count} {what}" for what, count in triton.counts.items())
        )
    cases = sys.modules.get("cuda_on_cpu.cases")
    if cases is None or not cases.kernels.cache_info().currsize:
        return
    statistics = cases.kernels().statistics()
    launches = statistics["launches"]
    terminalreporter.write_line(
        f"CUDA on CPU: {sum(launches.values())} launches of {len(launches)} kernel variants, "
        f"{statistics['threads'] / 1e6:.1f} M CUDA threads, {statistics['switches'] / 1e6:.0f} M switches"
    )
