"""Measures cases: builds the columns, checks their errors, times them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ppcr_ext

from . import peers, timing
from .errors import TOLERANCES, Errors, Layer, measure, truth
from .inputs import LAYOUTS, LEVELS, Case

FLOOR = "floor"
REFERENCE = "reference"


@dataclass
class Column:
    """One way to compute the layer: a backend of ppcr_ext (fused, or its reference) or a plain formulation."""

    name: str
    layer: Layer
    dtype: torch.dtype = torch.float32
    backend: bool = True
    compiled: bool = False

    @property
    def fused(self) -> bool:
        return self.backend and not self.name.startswith(REFERENCE)


@dataclass
class Row:
    """One column on one input. Ratios are to the floor of the same input in float32; half types have no step."""

    case: str
    shape: list[int]
    layout: str
    column: str
    dtype: str
    kind: str  # floor, fused or plain
    forward_ms: float
    forward_low_ms: float
    forward_high_ms: float
    forward_ratio: float
    step_ms: float | None = None
    step_low_ms: float | None = None
    step_high_ms: float | None = None
    step_ratio: float | None = None
    error_y: float | None = None
    error_dx: float | None = None
    error_parameters: float | None = None
    others: float | None = None  # see timing.Others


@dataclass
class ErrorRow:
    """The errors of one backend on one input, beside what they may be."""

    case: str
    layout: str
    backend: str
    dtype: str
    errors: Errors
    limits: Errors
    ok: bool


@dataclass
class Result:
    """Everything a run measured."""

    rows: list[Row] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "errors": [asdict(row) for row in self.errors],
        }


def usable_backends(device: str | torch.device = "cpu") -> tuple[list[str], dict[str, str]]:
    """The backends that take a tensor of the device, best first, and why the others do not."""
    usable, reasons = [], {}
    names = ppcr_ext.available_backends()
    for name, reason in ppcr_ext.backends().items():
        if name not in names:
            reasons[name] = reason
    for name in names:
        try:
            backend_layer(name)(
                *(
                    torch.zeros(shape, device=device)
                    for shape in ((1, 4, 2, 2), (sum(LEVELS),), (1,))
                )
            )
        except (ValueError, TypeError, RuntimeError) as error:
            reasons[name] = str(error)
        else:
            usable.append(name)
    return usable, reasons


def backend_layer(name: str) -> Layer:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ppcr_ext.ppcr(x, weight, bias, levels=LEVELS, eps=peers.EPS, backend=name)

    return layer


def peer_layer(name: str) -> Layer:
    peer = peers.PEERS[name]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return peer(x, weight, bias, LEVELS)

    return layer


def columns(
    backends: Sequence[str], *, compiled: Sequence[str], dtypes: Sequence[torch.dtype]
) -> list[Column]:
    """What to time, in the order of the tables: also under torch.compile those that ``compiled`` names, in half types
    the fused backends alone."""
    made = [Column(name, backend_layer(name)) for name in backends]
    made += [Column(name, peer_layer(name), backend=False) for name in peers.PEERS]
    for column in [column for column in made if column.name in compiled]:
        made.append(
            Column(f"{column.name} compiled", column.layer, backend=column.backend, compiled=True)
        )
    for dtype in dtypes:
        if dtype != torch.float32:
            made += [
                Column(name, backend_layer(name), dtype) for name in backends if name != REFERENCE
            ]
    return made


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_case(
    case: Case, backends: Sequence[str], dtypes: Sequence[torch.dtype]
) -> list[ErrorRow]:
    """Errors of every backend on one case, in every layout and dtype."""
    made = []
    for dtype in dtypes:
        exact = truth(*case.tensors("contiguous", dtype), case.weight, case.bias, LEVELS)
        for layout in LAYOUTS:
            x, gy = case.tensors(layout, dtype)
            for name in backends:
                got = measure(backend_layer(name), x, gy, case.weight, case.bias, exact)
                limits = TOLERANCES[dtype]
                made.append(
                    ErrorRow(
                        case.name, layout, name, dtype_name(dtype), got, limits, got.within(limits)
                    )
                )
    return made


def time_case(
    case: Case,
    layout: str,
    made: Sequence[Column],
    rounds: int,
    tick: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Forward and forward+backward of every column on one input, all interleaved."""
    torch.compiler.reset()  # so that no case meets the compiled code of another
    exact = truth(*case.tensors("contiguous", torch.float32), case.weight, case.bias, LEVELS)
    x, gy = case.tensors(layout, torch.float32)
    calls = {
        f"{FLOOR} forward": timing.Call(partial(peers.floor_forward, x)),
        f"{FLOOR} step": timing.Call(partial(peers.floor_step, x, gy)),
    }
    measured: dict[str, Errors] = {}
    for column in made:
        key = column_key(column)
        # A forward without gradients and a training step are two programs: compiled apart, neither evicts the other.
        forward, step = column.layer, column.layer
        if column.compiled:
            forward = torch.compile(column.layer, dynamic=False, fullgraph=True)
            step = torch.compile(column.layer, dynamic=False, fullgraph=True)
        inputs = [t.detach().clone() for t in (x.to(column.dtype), case.weight, case.bias)]
        calls[f"{key} forward"] = timing.Call(partial(forward, *inputs))
        if column.dtype == torch.float32:
            leaves = [t.clone().requires_grad_() for t in inputs]
            calls[f"{key} step"] = timing.Call(partial(_train, step, leaves, gy), grad=True)
            measured[key] = measure(step, x, gy, case.weight, case.bias, exact)
    times = timing.interleave(calls, rounds, tick=tick)
    kinds = {column_key(column): "fused" if column.fused else "plain" for column in made} | {
        FLOOR: FLOOR
    }
    dtypes = {column_key(column): dtype_name(column.dtype) for column in made}
    rows = []
    for key, kind in kinds.items():
        row = Row(
            case.name, list(x.shape), layout, key, dtypes.get(key, "float32"), kind, 0, 0, 0, 0
        )
        for mode in ("forward", "step"):
            if f"{key} {mode}" in times:
                _fill(row, mode, times[f"{key} {mode}"], times[f"{FLOOR} {mode}"])
        if key in measured:
            got = measured[key]
            row.error_y, row.error_dx, row.error_parameters = got.y, got.dx, got.parameters
        rows.append(row)
    return rows


def _train(layer: Layer, leaves: list[Tensor], gy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(*leaves), leaves, gy)


def column_key(column: Column) -> str:
    return (
        column.name
        if column.dtype == torch.float32
        else f"{column.name} {dtype_name(column.dtype)}"
    )


def _fill(row: Row, mode: str, took: timing.Timing, floor: timing.Timing) -> None:
    setattr(row, f"{mode}_ms", took.median * 1e3)
    setattr(row, f"{mode}_low_ms", took.low * 1e3)
    setattr(row, f"{mode}_high_ms", took.high * 1e3)
    row.others = took.others
    setattr(row, f"{mode}_ratio", took.median / floor.median)
