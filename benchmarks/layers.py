"""Makes a layer's case ready to be timed: inputs, calls, and errors against float64."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcr_ext import testing
from ppcr_ext.testing import Errors, relative

from . import baselines, timing
from .baselines import BOUNDS, LOWER_BOUND, OPERATORS, WITH_AUTOGRAD, Implementation
from .cases import Case

Key = tuple[str, str]  # what, direction

POOL_BYTES_CUDA = 1 << 30  # inputs together at least this much: many times any L2
# On a CPU 1.5 times the last cache, but no more than this: a core never owns a larger one.
POOL_BYTES_MOST = 400 << 20
COPIES_MOST = 1024
SMALL = 4 << 20  # bytes of x below which autograd itself is a large part of a step

# What half types may lose in plain PyTorch, which rounds between its kernels, and what another
# layer may lose: it has other sums.
PLAIN_FACTOR = 4
OTHER_LAYER_LIMITS = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


@dataclass
class Prepared:
    """What :func:`benchmarks.runner.measure` times, and what a row says besides its times."""

    calls: dict[Key, timing.Call]
    about: dict[Key, dict[str, Any]]
    by: timing.Clock
    base: str  # what the ratios are to, in the same direction
    skipped: list[dict[str, str]] = field(default_factory=list)
    finish: Callable[[], object] = lambda: None


class InputPool:
    """Copies of the inputs in such a number that a call does not find its own in a cache.

    The calls share them in turn. On a CUDA device results are kept for a turn, so that the
    allocator does not hand out warm memory either.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        dtype = getattr(torch, case.dtype)
        self.inputs = drawn(case, device) if case.given is None else taken(case, device)
        tensors = [self.inputs.x, self.inputs.grad]
        tensors += [self.inputs.residual] if self.inputs.has_residual else []
        self.parameters = [self.inputs.weight, self.inputs.bias]
        own = sum(t.numel() * dtype.itemsize for t in tensors)
        count = -(-cache_bytes(device) // own) if case.rotate else 1
        self.count = min(COPIES_MOST, max(2, count)) if case.rotate else 1
        self.bytes = own * self.count
        self.copies = [tuple(t.clone() for t in tensors) for _ in range(self.count)]
        self.kept: list[object] = [None] * (self.count if device.type == "cuda" else 1)
        self.targets = [torch.empty_like(self.inputs.x) for _ in self.kept]
        self._turn = itertools.cycle(range(self.count))

    @property
    def own(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, grad and the residual (or None), outside the turns."""
        residual = self.inputs.residual if self.inputs.has_residual else None
        return self.inputs.x, self.inputs.grad, residual

    def next(self, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, grad and the residual (or None); with ``grad`` new leaves of x and the residual."""
        self.turn = next(self._turn)
        x, gy, *residual = self.copies[self.turn]
        if grad:
            x, *residual = (t.detach().requires_grad_() for t in (x, *residual))
        return x, gy, residual[0] if residual else None

    def keep(self, result: object) -> None:
        self.kept[self.turn % len(self.kept)] = result


def drawn(case: Case, device: torch.device) -> testing.Inputs:
    """Random inputs, drawn on the device; a residual keeps away from the kink of the ReLU."""
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: Sequence[int], mean: float = 0, deviation: float = 1) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * deviation + mean
        return testing.to_layout(values.to(dtype), case.layout)

    x, like_gate = draw(case.shape, 1.5, 2), (case.shape[0], 1, *case.shape[2:])
    grad = draw(like_gate if case.operator == "gate" else case.shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (
        torch.randn(n, generator=generator, device=device).to(wide) for n in (sum(case.levels), 1)
    )
    inputs = testing.Inputs("ppcr", x, x, weight, bias, grad, case.levels)
    if case.operator == "add_relu":
        residual = draw(case.shape)
        # Where rounding decides which side of 0 a value is on, it decides on the whole gradient.
        near = (testing.truth(inputs).values["y"] + residual.double()).abs() < 0.05
        inputs.residual = residual + 0.25 * near.to(dtype)
    inputs.operator = OPERATORS[case.operator].function
    return inputs


def taken(case: Case, device: torch.device) -> testing.Inputs:
    """The tensors that the case gives."""
    assert case.given is not None
    x, grad, weight, bias = (t.to(device) for t in case.given())
    inputs = testing.Inputs("ppcr", x, x, weight, bias, grad, case.levels)
    return inputs.to(getattr(torch, case.dtype), case.layout)


def cache_bytes(device: torch.device) -> int:
    """How many bytes of inputs no cache keeps."""
    if device.type == "cuda":
        return POOL_BYTES_CUDA
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return min(POOL_BYTES_MOST, max(sizes) * 3 // 2 or POOL_BYTES_MOST)


@dataclass
class Program:
    """Two programs of an implementation: forward without gradients, and training."""

    implementation: Implementation
    pool: InputPool

    def __post_init__(self) -> None:
        parameters = self.implementation.parameters
        self.infer, self.train = (self.implementation.program() for _ in range(2))
        self.frozen = [p.detach() for p in parameters]
        self.leaves = [p if p.requires_grad else p.clone().requires_grad_() for p in parameters]

    def forward(self) -> object:
        x, _, residual = self.pool.next()
        y = self.infer(x, residual, self.frozen)
        self.pool.keep(y)
        return y

    def prepare_backward(self) -> tuple[Tensor, list[Tensor], Tensor]:
        x, gy, residual = self.pool.next(grad=True)
        y = self.train(x, residual, self.leaves)
        return y, [x, *self.leaves, *([] if residual is None else [residual])], gy

    def backward(self, prepared: tuple[Tensor, list[Tensor], Tensor]) -> object:
        gradients = torch.autograd.grad(*prepared)
        self.pool.keep(gradients)
        return gradients

    def step(self) -> object:
        prepared = self.prepare_backward()
        result = prepared[0], self.backward(prepared)
        self.pool.keep(result)
        return result

    def call(self, direction: str) -> timing.Call:
        if direction == "forward":
            return timing.Call(self.forward)
        if direction == "step":
            return timing.Call(self.step, grad=True)
        return timing.Call(self.backward, grad=True, prepare=self.prepare_backward)


def check(program: Program, exact: testing.Truth) -> tuple[float, Errors, bool]:
    """Error of y without gradients, errors of a training step, whether both are within limits."""
    implementation, inputs = program.implementation, program.pool.inputs
    x, gy, residual = program.pool.own
    with torch.no_grad():
        inferred = program.infer(x, residual, program.frozen)
    x, residual = (None if t is None else t.detach().requires_grad_() for t in (x, residual))
    y = program.train(x, residual, program.leaves)  # type: ignore[arg-type]
    leaves = [x, *program.leaves, *([] if residual is None else [residual])]
    dx, *rest = torch.autograd.grad(y, leaves, gy)  # type: ignore[arg-type]
    dtype = inputs.x.dtype
    if implementation.exact is not None:
        error, errors = _errors_of_other(implementation, inputs.x, gy, inferred, y.detach(), dx)
        limit = OTHER_LAYER_LIMITS[dtype]
        return error, errors, error <= limit and errors.within(Errors(limit, limit, limit))
    results = dict(zip(("dweight", "dbias", "dresidual"), rest, strict=False))
    errors = exact.errors({"y": y.detach(), "dx": dx, **results})
    limits = testing.tolerance(dtype, inputs.levels)
    if implementation.kind == "plain" and dtype in (torch.float16, torch.bfloat16):
        limits = Errors(*(PLAIN_FACTOR * e for e in (limits.y, limits.dx, limits.parameters)))
    error = relative(inferred, exact.values["y"])
    return error, errors, error <= limits.y and errors.within(limits)


def _errors_of_other(
    implementation: Implementation, x: Tensor, gy: Tensor, inferred: Tensor, y: Tensor, dx: Tensor
) -> tuple[float, Errors]:
    exact = implementation.exact
    assert exact is not None
    wide = x.double().requires_grad_()
    own = [p.detach().double() for p in implementation.parameters]
    with torch.no_grad():
        error = relative(inferred, exact(wide, None, own))
    expected = exact(wide, None, own)
    (exact_dx,) = torch.autograd.grad(expected, wide, gy.double())
    return error, Errors(relative(y, expected.detach()), relative(dx, exact_dx), 0)


def peak_bytes(call: timing.Call, device: torch.device) -> int:
    """The most that one call had allocated at a time, results included.

    On a CPU as torch.profiler records allocations.
    """
    with torch.set_grad_enabled(call.grad):
        given = call.given()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call.run(*given)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            del result
            return peak
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of a missing GPU
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            result = call.run(*given)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    del result
    return max(itertools.accumulate(changes, initial=0))


def usable_backends(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends that take a tensor of the device, best first, and why the others do not."""
    import ppcr_ext

    usable, names = [], ppcr_ext.available_backends()
    reasons = {name: why for name, why in ppcr_ext.backends().items() if name not in names}
    small = testing.make_inputs("ppcr", (1, 4, 2, 2), device=device)
    for name in names:
        layer = baselines.backend("ppcr", name, [], testing.LEVELS).layer
        try:
            layer(small.x, None, (small.weight, small.bias))  # type: ignore[arg-type]
        except (ValueError, TypeError, RuntimeError) as error:
            reasons[name] = str(error)
        else:
            usable.append(name)
    return usable, reasons


def offer(
    case: Case, backends: Sequence[str], pool: InputPool, device: torch.device
) -> list[Implementation]:
    """All implementations of a case, the compiled ones last."""
    names = [name for name in backends if case.backends is None or name in case.backends]
    own, dtype = pool.parameters, getattr(torch, case.dtype)
    made = [baselines.backend(case.operator, name, own, case.levels) for name in names]
    made += [baselines.plain(case.operator, name, own, case.levels) for name in case.plain]
    made += [baselines.other_layer(n, case.shape, dtype, device) for n in case.other_layers]
    return made + [one.compiled(m) for m in case.modes for one in made if one.name in case.compiled]


def usable(
    case: Case, offered: Sequence[Implementation], pool: InputPool
) -> tuple[list[Implementation], list[dict[str, str]]]:
    """Those that take the input, and for the others the reason that they give."""
    accepted, skipped, refused = [], [], {}
    x, _, residual = pool.own
    small = x[:1], None if residual is None else residual[:1]
    for one in offered:
        if one.mode is None:
            try:
                with torch.no_grad():
                    one.layer(*small, one.parameters)
            except (ValueError, TypeError) as error:
                refused[one.layer] = str(error)
        if one.layer in refused:
            skipped.append({"case": str(case), "what": one.name, "reason": refused[one.layer]})
        else:
            accepted.append(one)
    return accepted, skipped


def prepare(
    case: Case,
    backends: Sequence[str],
    device: torch.device,
    offered: Callable[..., list[Implementation]] = offer,
) -> Prepared:
    """Every implementation in every direction, compared with float64, and the lower bounds."""
    torch.compiler.reset()  # so that no case meets the compiled code of another
    torch.set_num_threads(case.threads)
    pool, dtype = InputPool(case, device), getattr(torch, case.dtype)
    exact = testing.truth(pool.inputs)
    accepted, skipped = usable(case, offered(case, backends, pool, device), pool)
    made = Prepared({}, {}, timing.clock(device), LOWER_BOUND, skipped)
    for one in accepted:
        program = Program(one, pool)
        inferred, trained, within = check(program, exact)
        for direction in case.directions:
            about: dict[str, Any] = {"kind": one.kind, "within": within, "error_y": inferred}
            if direction != "forward":
                about |= {"error_y": trained.y, "error_dx": trained.dx}
                about |= {} if one.exact else {"error_parameters": trained.parameters}
            made.calls[one.name, direction] = program.call(direction)
            made.about[one.name, direction] = about
    del exact
    _add_bounds(made, case, pool, dtype)
    made.calls["copy", "forward"] = timing.Call(partial(_copy, pool))
    made.about["copy", "forward"] = {"kind": "copy", "error_y": 0.0}
    for (what, direction), call in made.calls.items():
        counted = OPERATORS["ppcr" if what == "copy" else case.operator]
        made.about[what, direction] |= {
            "necessary_bytes": counted.necessary_bytes(direction, case.shape, dtype),
            "peak_bytes": peak_bytes(call, device),
        }

    def finish() -> None:
        if not torch.equal(pool.targets[0], pool.inputs.x):
            made.about["copy", "forward"]["within"] = False

    made.finish = finish
    return made


def _add_bounds(made: Prepared, case: Case, pool: InputPool, dtype: torch.dtype) -> None:
    x, gy, residual = pool.own
    wide = [None if t is None else t.double() for t in (x, gy, residual)]
    for direction, bound in BOUNDS[case.operator].items():
        if direction not in case.directions:
            continue
        pairs = zip(bound(x, gy, residual), bound(*wide), strict=True)
        error = max(relative(got, expected) for got, expected in pairs)
        about = {"kind": LOWER_BOUND, "error_y": error}
        about["within"] = error <= testing.tolerance(dtype).y
        calls = {LOWER_BOUND: bound}
        if direction != "forward" and x.numel() * x.itemsize <= SMALL:
            calls[WITH_AUTOGRAD] = partial(baselines.with_autograd, bound)
        for what, run in calls.items():
            made.calls[what, direction] = timing.Call(partial(_bound, pool, run))
            made.about[what, direction] = dict(about)


def _bound(pool: InputPool, bound: Callable[..., object]) -> None:
    pool.keep(bound(*pool.next()))


def _copy(pool: InputPool) -> None:
    x, *_ = pool.next()
    pool.targets[pool.turn % len(pool.targets)].copy_(x)
