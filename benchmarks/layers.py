"""Makes a layer's case ready to be timed: inputs, calls, and errors against float64."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

import ppcr_ext
from ppcr_ext import testing
from ppcr_ext.reference import accumulation_dtype
from ppcr_ext.testing import Errors

from . import baselines, timing
from .baselines import BOUNDS, LOWER_BOUND, OPERATORS, WITH_AUTOGRAD, Implementation
from .cases import Case
from .results import Row

Key = tuple[str, str]  # what, direction
Result = TypeVar("Result")

# Inputs together take at least this much. No core of a CPU owns a larger cache, and no GPU a tenth.
POOL_BYTES = {"cpu": 400 << 20, "cuda": 1 << 30}
COPIES_MOST = 1024
SMALL = 4 << 20  # bytes of x below which autograd itself is a large part of a step

# Plain PyTorch rounds half types between its kernels; another layer has other sums.
PLAIN_FACTOR = 4
OTHER_LIMITS = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass
class Prepared:
    """What a case times, and for every call the row that lacks only the times."""

    case: Case
    by: timing.Clock
    base: str  # what the ratios are to, in the same direction
    calls: dict[Key, timing.Call] = field(default_factory=dict)
    rows: dict[Key, Row] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(self, what: str, direction: str, kind: str, call: timing.Call, **figures: Any) -> None:
        self.calls[what, direction] = call
        place: list[Any] = [*self.case.place, direction, what, kind]
        self.rows[what, direction] = replace(Row(*place), **figures)


class InputPool:
    """Copies of the inputs in such a number that a call does not find its own in a cache.

    The calls share them in turn. On a CUDA device results are kept for a turn, so that the
    allocator does not hand out warm memory either.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.inputs = inputs = inputs_of(case, device)
        self.own = [inputs.x, inputs.grad, *([inputs.residual] * inputs.has_residual)]
        turns = math.ceil(POOL_BYTES[device.type] / sum(t.nbytes for t in self.own))
        count = min(COPIES_MOST, max(2, turns)) if case.rotate else 1
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
    dtype = getattr(torch, case.dtype)
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    if case.given is not None:
        x, grad, weight, bias = (t.to(device) for t in case.given)
    else:
        images, channels, *spatial = case.shape
        x = 1.5 + 2 * draw(case.shape)
        grad = draw((images, 1 if case.operator == "gate" else channels, *spatial))
        weight, bias = (draw(n).to(accumulation_dtype(dtype)) for n in (sum(case.levels), 1))
    residual = draw(case.shape) if case.operator == "add_relu" else x
    inputs = testing.Inputs("ppcr", x, residual, weight, bias, grad, case.levels)
    inputs = inputs.to(dtype, case.layout)
    if case.operator == "add_relu":
        # Where rounding decides which side of 0 a value is on, it decides on the whole gradient.
        near = (testing.truth(inputs).values["y"] + inputs.residual.double()).abs() < 0.05
        inputs.residual = inputs.residual + 0.25 * near.to(dtype)
    inputs.operator = OPERATORS[case.operator]
    return inputs


class Program:
    """Two programs of an implementation: forward without gradients, and training."""

    def __init__(self, implementation: Implementation, pool: InputPool) -> None:
        self.implementation, self.pool = implementation, pool
        self.infer, self.train = implementation.program(), implementation.program()
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

    def check(self, exact: testing.Truth, dtype: str) -> tuple[float, Errors, bool]:
        """Error of y without gradients, those of a step, and whether both are within limits."""
        one, inputs = self.implementation, self.pool.inputs
        inferred, limits = exact.values["y"], testing.tolerance(inputs.x.dtype, inputs.levels)
        if one.exact is not None:
            (inferred, exact), limits = in_float64(one, inputs), Errors(*[OTHER_LIMITS[dtype]] * 3)
        elif one.kind == "plain" and dtype in ("float16", "bfloat16"):
            limits = Errors(*[PLAIN_FACTOR * limits.y] * 3)  # all three are alike
        with torch.no_grad():
            error = testing.relative(self.forward(), inferred)
        y, *gradients = self.step()
        names = ("dx", *["dresidual"] * inputs.has_residual, "dweight", "dbias")
        named = zip(names, gradients, strict=one.exact is None)
        found = {name: gradient for name, gradient in named if name in exact.values}
        errors = exact.errors({"y": y.detach(), **found})
        return error, errors, error <= limits.y and errors.within(limits)


def in_float64(one: Implementation, inputs: testing.Inputs) -> tuple[Tensor, testing.Truth]:
    """What another layer computes without gradients, and the y and dx of a step."""
    assert one.exact is not None
    x, own = inputs.x.double().requires_grad_(), [p.detach().double() for p in one.parameters]
    with torch.no_grad():
        inferred = one.exact(x, *own)
    y = one.exact(x, *own)
    values = {"y": y.detach(), "dx": torch.autograd.grad(y, x, inputs.grad.double())[0]}
    return inferred, testing.Truth(values, values)


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
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, **options) as profile:
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
    return made + [one.compiled(m) for m in case.modes for one in made if one.name in case.compiled]


def refusal(one: Implementation, pool: InputPool) -> str | None:
    """Why an implementation does not take the inputs: it is tried on an image, not compiled."""
    x, _, *residual = (t[:1] for t in pool.own)
    try:
        with torch.no_grad():
            one.layer(x, *residual, *one.parameters)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def prepare(case: Case, backends: Sequence[str], device: torch.device) -> Prepared:
    """Every implementation in every direction, compared with float64, and the lower bounds."""
    torch.compiler.reset()  # so that no case meets the compiled code of another
    torch.set_num_threads(case.threads)
    pool, made = InputPool(case, device), Prepared(case, timing.clock(device), LOWER_BOUND)
    exact = testing.truth(pool.inputs)
    for one in offer(case, backends, pool):
        if reason := refusal(one, pool):
            made.skipped.append({"case": case.label, "what": one.name, "reason": reason})
            continue
        program = Program(one, pool)
        inferred, trained, within = program.check(exact, case.dtype)
        step = {"error_y": trained.y, "error_dx": trained.dx, "within": within}
        step |= {} if one.exact else {"error_parameters": trained.parameters}
        for direction in case.directions:
            errors = {"error_y": inferred, "within": within} if direction == "forward" else step
            made.add(one.name, direction, one.kind, program.call(direction), **errors)
    for direction in case.directions if case.operator != "gate" else ():
        runs: dict[str, Callable[..., object]] = {LOWER_BOUND: BOUNDS[case.operator, direction]}
        if direction != "forward" and pool.inputs.x.nbytes <= SMALL:
            runs[WITH_AUTOGRAD] = partial(baselines.with_autograd, BOUNDS[case.operator, direction])
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
