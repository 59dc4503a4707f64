"""Makes a layer's case ready to be timed: inputs, calls, and errors against float64."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import ppcr_ext
from ppcr_ext import testing

from . import baselines, timing
from .baselines import BOUNDS, LOWER_BOUND, OPERATORS, WITH_AUTOGRAD, Implementation
from .cases import Case
from .results import Row

Key = tuple[str, str]  # what, direction
Result = TypeVar("Result")

# Inputs together take at least this much. A core owns no larger cache, nor a GPU a fourth of it.
POOL_BYTES = {"cpu": 400 << 20, "cuda": 1 << 30}
SMALL = 4 << 20  # bytes of x below which autograd itself is a large part of a step

PLAIN_FACTOR = 4  # plain PyTorch rounds half types between its kernels


@dataclass
class Prepared:
    """What a case times, and for every call the row that lacks only the times."""

    case: Case
    by: timing.Clock
    base: str  # what the ratios are to, in the same direction
    calls: dict[Key, timing.Call] = field(default_factory=dict)
    rows: dict[Key, Row] = field(default_factory=dict)

    def add(self, what: str, direction: str, kind: str, call: timing.Call, **about: Any) -> None:
        row = Row(*self.case.place, direction=direction, what=what, kind=kind, **about)
        self.calls[what, direction], self.rows[what, direction] = call, row


class InputPool:
    """Copies of the inputs in such a number that a call does not find its own in a cache."""

    # The calls share them in turn. On a CUDA device results are kept for a turn, so that the
    # allocator does not hand out warm memory either.

    def __init__(self, case: Case, device: torch.device) -> None:
        self.inputs = inputs = inputs_of(case, device)
        self.own = [inputs.x, inputs.grad, *([inputs.residual] * inputs.has_residual)]
        turns = math.ceil(POOL_BYTES[device.type] / sum(t.nbytes for t in self.own))
        count = turns if case.rotate else 1
        self.copies = [[t.clone() for t in self.own] for _ in range(count)]
        self.kept: list[object] = [None] * (count if device.type == "cuda" else 1)
        self.targets = [torch.zeros_like(inputs.x) for _ in self.kept]
        self._turn = itertools.cycle(range(count))

    def next(self) -> list[Tensor]:
        """The next x, grad and, of add_relu, residual."""
        self.turn = next(self._turn)
        return self.copies[self.turn]

    def keep(self, result: Result) -> Result:
        self.kept[self.turn % len(self.kept)] = result
        return result

    def copy(self) -> Tensor:
        x, *_ = self.next()
        return self.targets[self.turn % len(self.kept)].copy_(x)


def inputs_of(case: Case, device: torch.device) -> testing.Inputs:
    """The case's own tensors, or random ones drawn on the device."""
    dtype, gate = getattr(torch, case.dtype), case.operator == "gate"
    if case.given is not None:
        return case.given.to(dtype, case.layout)
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    images, channels, *spatial = case.shape
    x, grad = 1.5 + 2 * draw(case.shape), draw((images, 1 if gate else channels, *spatial))
    residual = draw(case.shape) if case.operator == "add_relu" else x
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (draw(n).to(wide) for n in (sum(case.levels), 1))
    tensors = x, residual, weight, bias, grad
    return testing.Inputs(OPERATORS[case.operator], *tensors, case.levels).to(dtype, case.layout)


class Program:
    """Two programs of an implementation: forward without gradients, and training."""

    def __init__(self, implementation: Implementation, pool: InputPool) -> None:
        self.implementation, self.pool = implementation, pool
        self.infer = self.train = implementation.layer
        if implementation.is_compiled:  # two, so that none evicts the other
            mode = "max-autotune-no-cudagraphs" if pool.inputs.x.is_cuda else "default"
            options: dict[str, Any] = {"mode": mode, "dynamic": False, "fullgraph": True}
            self.infer, self.train = (torch.compile(self.infer, **options) for _ in range(2))
        own = implementation.parameters
        self.frozen = [p.detach() for p in own]
        self.leaves = [p if p.requires_grad else p.clone().requires_grad_() for p in own]

    def forward(self) -> Tensor:
        x, _, *residual = self.pool.next()
        return self.pool.keep(self.infer(x, *residual, *self.frozen))

    def prepare_backward(self) -> tuple[Tensor, list[Tensor], Tensor]:
        x, gy, *residual = self.pool.next()
        leaves = [*(t.detach().requires_grad_() for t in (x, *residual)), *self.leaves]
        return self.train(*leaves), leaves, gy

    def backward(self, prepared: tuple[Tensor, list[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return self.pool.keep(torch.autograd.grad(*prepared))

    def step(self) -> tuple[Tensor, ...]:
        prepared = self.prepare_backward()
        return self.pool.keep((prepared[0], *self.backward(prepared)))

    def call(self, direction: str) -> timing.Call:
        prepare = self.prepare_backward if direction == "backward" else None
        return timing.Call(getattr(self, direction), direction != "forward", prepare)

    def check(self, exact: testing.Truth) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the rows of forward and of the other directions say about errors."""
        inputs = self.pool.inputs
        limits = testing.tolerance(inputs.x.dtype, inputs.levels)
        if self.implementation.kind == "plain" and inputs.x.itemsize == 2:
            limits = testing.Errors(*[PLAIN_FACTOR * limits.y] * 3)  # all three are alike
        with torch.no_grad():
            error = exact.error("y", self.forward())
        y, *gradients = self.step()
        if inputs.has_residual:  # rounding may decide which side of 0 a value is on
            exact = testing.truth(inputs, y)
        names = ("dx", *["dresidual"] * inputs.has_residual, "dweight", "dbias")
        errors = exact.errors({"y": y.detach(), **dict(zip(names, gradients, strict=True))})
        within = error <= limits.y and errors.within(limits)
        step = {"error_y": errors.y, "error_dx": errors.dx, "error_parameters": errors.parameters}
        return {"error_y": error, "within": within}, step | {"within": within}


def peak_bytes(call: timing.Call, device: torch.device) -> int:
    """The most that one call had allocated at a time, results included."""
    with torch.set_grad_enabled(call.grad):
        given = call.given()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call.run(*given)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of a missing GPU
        options: dict[str, Any] = {"profile_memory": True, "acc_events": True}
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], **options) as profile:
            result = call.run(*given)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    del result
    return max(itertools.accumulate(changes, initial=0))


def usable_backends(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends that take a tensor of the device, best first, and why the others do not."""
    usable, reasons = list[str](), dict[str, str]()
    small = testing.make_inputs("ppcr", (1, 4, 2, 2), device=device)
    for name in ppcr_ext.backends():
        try:
            ppcr_ext.ppcr(small.x, small.weight, small.bias, backend=name)
            usable.append(name)
        except Exception as error:  # Triton asserts that it finds its driver
            reasons[name] = str(error)
    return usable, reasons


def offer(case: Case, backends: Sequence[str], pool: InputPool) -> list[Implementation]:
    """All implementations of a case, the compiled ones last."""
    own = [t for t in (pool.inputs.weight, pool.inputs.bias) if t is not None]
    names = [name for name in backends if case.backends is None or name in case.backends]
    made = [baselines.backend(case.operator, name, own, case.levels) for name in names]
    made += [baselines.plain(case.operator, name, own, case.levels) for name in case.plain]
    if case.operator == "ppcr" and len(case.shape) == 4:  # what the other layers take
        made += [baselines.other_layer(name, pool.inputs.x) for name in case.other_layers]
    some = [one for one in made if one.name in case.compiled]
    return made + [replace(one, name=f"{one.name} compiled", is_compiled=True) for one in some]


def prepare(case: Case, backends: Sequence[str], device: torch.device) -> Prepared:
    """Every implementation in every direction, compared with float64, and the lower bounds."""
    pool, made = InputPool(case, device), Prepared(case, timing.clock(device), LOWER_BOUND)
    exact = testing.truth(pool.inputs)
    for one in offer(case, backends, pool):
        program = Program(one, pool)  # another layer computes something else
        forward, step = program.check(exact) if one.kind != "other layer" else ({}, {})
        for direction in case.directions:
            figures = forward if direction == "forward" else step
            made.add(one.name, direction, one.kind, program.call(direction), **figures)
    for direction in case.directions if case.operator != "gate" else ():
        bound = BOUNDS[case.operator, direction]
        runs: dict[str, Callable[..., object]] = {LOWER_BOUND: bound}
        if direction != "forward" and pool.inputs.x.nbytes <= SMALL:
            runs[WITH_AUTOGRAD] = partial(baselines.with_autograd, bound)
        for what, run in runs.items():
            call = timing.Call(lambda run=run: pool.keep(run(*pool.next())))
            made.add(what, direction, LOWER_BOUND, call)
    copied = torch.equal(pool.copy(), pool.inputs.x)
    made.add("copy", "forward", "copy", timing.Call(pool.copy), error_y=0.0, within=copied)
    for (what, direction), row in made.rows.items():
        counted = "ppcr" if what == "copy" else case.operator
        row.necessary_bytes = baselines.necessary_bytes(counted, direction, pool.inputs.x)
        row.peak_bytes = peak_bytes(made.calls[what, direction], device)
    return made
