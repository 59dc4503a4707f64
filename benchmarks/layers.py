"""Makes a layer's case ready to be timed: inputs, calls, and errors against float64."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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

Key = tuple[str, str]  # what, direction
Result = TypeVar("Result")

POOL_BYTES_CUDA = 1 << 30  # inputs together at least this much: many times any L2
# On a CPU 1.5 times the last cache, but no more than this: a core never owns a larger one.
POOL_BYTES_MOST = 400 << 20
COPIES_MOST = 1024
SMALL = 4 << 20  # bytes of x below which autograd itself is a large part of a step

# Plain PyTorch rounds half types between its kernels; another layer has other sums.
PLAIN_FACTOR = 4
OTHER_LIMITS = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass
class Prepared:
    """What :func:`benchmarks.runner.measure` times, and what a row says besides its times."""

    by: timing.Clock
    base: str  # what the ratios are to, in the same direction
    skipped: list[dict[str, str]] = field(default_factory=list)
    calls: dict[Key, timing.Call] = field(default_factory=dict)
    about: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def add(self, what: str, direction: str, call: timing.Call, about: dict[str, Any]) -> None:
        self.calls[what, direction], self.about[what, direction] = call, about


class InputPool:
    """Copies of the inputs in such a number that a call does not find its own in a cache.

    The calls share them in turn. On a CUDA device results are kept for a turn, so that the
    allocator does not hand out warm memory either.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.inputs = inputs = inputs_of(case, device)
        self.own = [inputs.x, inputs.grad, *([inputs.residual] * inputs.has_residual)]
        own = sum(t.nbytes for t in self.own)
        count = min(COPIES_MOST, max(2, -(-cache_bytes(device) // own))) if case.rotate else 1
        self.copies, self.bytes = [[t.clone() for t in self.own] for _ in range(count)], own * count
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
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    images, channels, *spatial = case.shape
    if case.given is not None:
        x, grad, weight, bias = (t.to(device) for t in case.given)
    else:
        like_y = (images, 1 if case.operator == "gate" else channels, *spatial)
        x, grad = 1.5 + 2 * draw(case.shape), draw(like_y)
        weight, bias = (draw(n).to(accumulation_dtype(dtype)) for n in (sum(case.levels), 1))
    residual = draw(case.shape) if case.operator == "add_relu" else x
    inputs = testing.Inputs("ppcr", x, residual, weight, bias, grad, case.levels)
    inputs = inputs.to(dtype, case.layout)
    if case.operator == "add_relu":
        # Where rounding decides which side of 0 a value is on, it decides on the whole gradient.
        near = (testing.truth(inputs).values["y"] + inputs.residual.double()).abs() < 0.05
        inputs.residual = inputs.residual + 0.25 * near.to(dtype)
    inputs.operator = OPERATORS[case.operator].function
    return inputs


def cache_bytes(device: torch.device) -> int:
    """How many bytes of inputs no cache keeps."""
    if device.type == "cuda":
        return POOL_BYTES_CUDA
    units, sizes = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}, [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1:], 1))
    return min(POOL_BYTES_MOST, max(sizes) * 3 // 2 or POOL_BYTES_MOST)


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
        with torch.no_grad():
            inferred = self.forward()
        y, dx, *others = self.step()
        results, expected = {"y": y.detach(), "dx": dx}, exact.values["y"]
        if one.exact is None:
            limits = testing.tolerance(inputs.x.dtype, inputs.levels)
            names = (*["dresidual"] * inputs.has_residual, "dweight", "dbias")
            results |= zip(names, others, strict=True)
            if one.kind == "plain" and dtype in ("float16", "bfloat16"):
                limits = Errors(*[PLAIN_FACTOR * limits.y] * 3)  # all three are alike
        else:
            limits, wide = Errors(*[OTHER_LIMITS[dtype]] * 3), inputs.x.double().requires_grad_()
            own = [p.detach().double() for p in one.parameters]
            with torch.no_grad():
                expected = one.exact(wide, *own)
            trained = one.exact(wide, *own)
            values = {"y": trained.detach()}
            (values["dx"],) = torch.autograd.grad(trained, wide, inputs.grad.double())
            exact = testing.Truth(values, values)
        error, errors = testing.relative(inferred, expected), exact.errors(results)
        return error, errors, error <= limits.y and errors.within(limits)


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
    usable, names = [], ppcr_ext.available_backends()
    reasons = {name: why for name, why in ppcr_ext.backends().items() if name not in names}
    small = testing.make_inputs("ppcr", (1, 4, 2, 2), device=device)
    for name in names:
        try:
            ppcr_ext.ppcr(small.x, small.weight, small.bias, backend=name)
            usable.append(name)
        except Exception as error:  # Triton asserts that it finds its driver
            reasons[name] = str(error)
    return usable, reasons


def offer(
    case: Case, backends: Sequence[str], own: list[Tensor], device: torch.device
) -> list[Implementation]:
    """All implementations of a case, the compiled ones last."""
    names = [name for name in backends if case.backends is None or name in case.backends]
    made = [baselines.backend(case.operator, name, own, case.levels) for name in names]
    made += [baselines.plain(case.operator, name, own, case.levels) for name in case.plain]
    dtype = getattr(torch, case.dtype)
    made += [baselines.other_layer(n, case.shape, dtype, device) for n in case.other_layers]
    return made + [one.compiled(m) for m in case.modes for one in made if one.name in case.compiled]


Offer = Callable[..., list[Implementation]]


def prepare(
    case: Case, backends: Sequence[str], device: torch.device, offered: Offer = offer
) -> Prepared:
    """Every implementation in every direction, compared with float64, and the lower bounds."""
    torch.compiler.reset()  # so that no case meets the compiled code of another
    torch.set_num_threads(case.threads)
    pool, dtype = InputPool(case, device), getattr(torch, case.dtype)
    made, exact = Prepared(timing.clock(device), LOWER_BOUND), testing.truth(pool.inputs)
    refused: dict[object, str] = {}
    for one in offered(case, backends, [pool.inputs.weight, pool.inputs.bias], device):
        if one.mode is None:
            x, _, *residual = (t[:1] for t in pool.own)
            try:
                with torch.no_grad():
                    one.layer(x, *residual, *one.parameters)
            except (ValueError, TypeError) as error:
                refused[one.layer] = str(error)
        if reason := refused.get(one.layer):
            made.skipped.append({"case": str(case), "what": one.name, "reason": reason})
            continue
        program = Program(one, pool)
        inferred, trained, within = program.check(exact, case.dtype)
        for direction in case.directions:
            about: dict[str, Any] = {"kind": one.kind, "within": within, "error_y": inferred}
            if direction != "forward":
                about |= {"error_y": trained.y, "error_dx": trained.dx}
                about |= {} if one.exact else {"error_parameters": trained.parameters}
            made.add(one.name, direction, program.call(direction), about)
    del exact
    _add_bounds(made, case, pool)
    copied = torch.equal(pool.copy(), pool.inputs.x)
    about = {"kind": "copy", "error_y": 0.0, "within": copied}
    made.add("copy", "forward", timing.Call(pool.copy), about)
    for (what, direction), call in made.calls.items():
        counted = OPERATORS["ppcr" if what == "copy" else case.operator]
        needed = counted.necessary_bytes(direction, case.shape, dtype)
        more = {"necessary_bytes": needed, "peak_bytes": peak_bytes(call, device)}
        made.about[what, direction] |= more
    return made


def _add_bounds(made: Prepared, case: Case, pool: InputPool) -> None:
    wide = [t.double() for t in pool.own]
    for direction in case.directions if case.operator in BOUNDS else ():
        bound = BOUNDS[case.operator][direction]
        pairs = zip(bound(*pool.own), bound(*wide), strict=True)
        error = max(testing.relative(got, expected) for got, expected in pairs)
        within = error <= testing.tolerance(pool.inputs.x.dtype).y
        runs: dict[str, Callable[..., object]] = {LOWER_BOUND: bound}
        if direction != "forward" and pool.inputs.x.nbytes <= SMALL:
            runs[WITH_AUTOGRAD] = partial(baselines.with_autograd, bound)
        for what, run in runs.items():
            call = timing.Call(lambda run=run: pool.keep(run(*pool.next())))
            about = {"kind": LOWER_BOUND, "error_y": error, "within": within}
            made.add(what, direction, call, about)
