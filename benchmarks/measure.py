"""Measures one group: every contender in every direction on one input, checked against float64 first, then timed together."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import contenders, timing
from .contenders import DIRECTIONS, FLOORS, LEVELS, OPERATORS, Contender
from .errors import TOLERANCES, Errors, Truth, relative, truth

ROTATED_BYTES_CUDA = 1 << 30  # inputs together at least this much: many times any L2
ROTATED_BYTES_MOST = (
    400 << 20
)  # on a CPU 1.5 times the last cache, but no more than this: a core never owns a larger one
COPIES_MOST = 1024

# What half types may lose in plain PyTorch, which rounds between its kernels, and what a neighbour may: other layers, other sums.
PLAIN_FACTOR = 4
NEIGHBOUR_LIMITS = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


@dataclass(frozen=True)
class Group:
    """An input and what is measured on it; everything in a group is timed in every round."""

    suite: str
    operator: str
    case: str  # what the input is, in words
    shape: tuple[int, ...]
    layout: str  # contiguous or channels_last, at any rank
    dtype: str = "float32"
    threads: int = 1
    levels: tuple[int, ...] = LEVELS
    directions: tuple[str, ...] = DIRECTIONS
    modes: tuple[str, ...] = ()  # of torch.compile
    compiled: tuple[str, ...] = ("pooled once",)  # who is measured under them
    neighbours: tuple[str, ...] = ()
    plain: tuple[str, ...] = ("pooled once", "level by level")
    backends: tuple[str, ...] | None = None  # None: all that are usable
    rotate: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            self.suite,
            self.operator,
            self.case,
            self.shape,
            self.layout,
            self.dtype,
            self.threads,
            self.levels,
        )


@dataclass
class Row:
    """One contender in one direction. Microseconds are per call; ``copy`` is a copy of x's bytes, timed in the same rounds."""

    suite: str
    operator: str
    case: str
    shape: list[int]
    layout: str
    dtype: str
    threads: int
    levels: list[int]
    direction: str
    what: str
    kind: str  # fused, reference, plain, neighbour, floor or copy
    median_us: float
    low_us: float  # quartiles
    high_us: float
    lowest_us: float  # deciles
    highest_us: float
    rounds: int
    necessary_bytes: int  # see contenders.Operator
    gb_per_s: float
    copy_fraction: float  # of the bandwidth of the copy
    peak_bytes: int | None = None  # allocated above the inputs, the results included
    error_y: float | None = None
    error_dx: float | None = None
    error_parameters: float | None = None
    within: bool = True  # the errors, their limits
    others: float | None = None  # see timing.Others

    @property
    def tensor_bytes(self) -> int:
        """The bytes of x."""
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize

    @property
    def group(self) -> tuple[Any, ...]:
        shape, levels = tuple(self.shape), tuple(self.levels)
        return (
            self.suite,
            self.operator,
            self.case,
            shape,
            self.layout,
            self.dtype,
            self.threads,
            levels,
        )


@dataclass
class Measured:
    """The rows of a group, and who could not take part: ``{"case": .., "what": .., "reason": ..}``."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def to_layout(t: Tensor, layout: str) -> Tensor:
    return (
        t.movedim(1, -1).contiguous().movedim(-1, 1)
        if layout == "channels_last"
        else t.contiguous()
    )


class Ring:
    """Copies of the inputs in such a number that a call does not find its own in a cache; the calls share them in turn.

    On a CUDA device results are kept for a turn, so that the allocator does not hand out warm memory either.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        dtype = getattr(torch, group.dtype)
        generator = torch.Generator(device).manual_seed(0)
        gy_shape = (
            (group.shape[0], 1, *group.shape[2:]) if group.operator == "gate" else group.shape
        )

        def draw(shape: Sequence[int], mean: float, deviation: float) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device) * deviation + mean
            return to_layout(drawn.to(dtype), group.layout)

        self.weight, self.bias = contenders.parameters(dtype, device, group.levels)
        self.x, self.gy = draw(group.shape, 1.5, 2), draw(gy_shape, 0, 1)
        self.residual = draw(group.shape, 0, 1) if group.operator == "add_relu" else None
        if (
            self.residual is not None
        ):  # away from the kink of the ReLU, where rounding decides on the gradient
            y = truth(self.x, self.gy, self.weight, self.bias, group.levels)
            self.residual = self.residual + 0.25 * ((y.y + self.residual.double()).abs() < 0.05).to(
                dtype
            )
        tensors = [self.x, self.gy] + ([] if self.residual is None else [self.residual])
        own = sum(t.numel() * t.itemsize for t in tensors)
        count = -(-cache_bytes(device) // own) if group.rotate else 1
        self.count = min(COPIES_MOST, max(1 if not group.rotate else 2, count))
        self.bytes = own * self.count
        self.copies = [tuple(t.clone() for t in tensors) for _ in range(self.count)]
        self.kept: list[object] = [None] * (self.count if device.type == "cuda" else 1)
        self.targets = [torch.empty_like(self.x) for _ in self.kept]
        self._turn = itertools.cycle(range(self.count))

    def next(self, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, gy and the residual (or None); with ``grad`` new leaves of x and the residual."""
        self.turn = next(self._turn)
        x, gy, *residual = self.copies[self.turn]
        if grad:
            x, residual = (
                x.detach().requires_grad_(),
                [t.detach().requires_grad_() for t in residual],
            )
        return x, gy, residual[0] if residual else None

    def keep(self, result: object) -> None:
        self.kept[self.turn % len(self.kept)] = result


def cache_bytes(device: torch.device) -> int:
    """How many bytes of inputs no cache keeps."""
    if device.type == "cuda":
        return ROTATED_BYTES_CUDA
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(
            int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        )
    return min(ROTATED_BYTES_MOST, max(sizes) * 3 // 2 or ROTATED_BYTES_MOST)


@dataclass
class Program:
    """A contender's two programs on a ring: forward without gradients, and training."""

    contender: Contender
    ring: Ring

    def __post_init__(self) -> None:
        self.infer, self.train = self.contender.program(), self.contender.program()
        self.frozen = [p.detach() for p in self.contender.parameters]
        self.leaves = [
            p if not p.is_leaf or p.requires_grad else p.clone().requires_grad_()
            for p in self.contender.parameters
        ]

    def forward(self) -> object:
        x, _, residual = self.ring.next()
        y = self.infer(x, residual, self.frozen)
        self.ring.keep(y)
        return y

    def prepare_backward(self) -> tuple[Tensor, list[Tensor], Tensor]:
        x, gy, residual = self.ring.next(grad=True)
        y = self.train(x, residual, self.leaves)
        return y, [x, *self.leaves, *([] if residual is None else [residual])], gy

    def backward(self, prepared: tuple[Tensor, list[Tensor], Tensor]) -> object:
        y, leaves, gy = prepared
        gradients = torch.autograd.grad(y, leaves, gy)
        self.ring.keep(gradients)
        return gradients

    def step(self) -> object:
        prepared = self.prepare_backward()
        result = prepared[0], self.backward(prepared)
        self.ring.keep(result)
        return result

    def call(self, direction: str) -> timing.Call:
        if direction == "forward":
            return timing.Call(self.forward)
        if direction == "step":
            return timing.Call(self.step, grad=True)
        return timing.Call(self.backward, grad=True, prepare=self.prepare_backward)


def check(program: Program, exact: Truth, dtype: torch.dtype) -> tuple[float, Errors, bool]:
    """(error of y without gradients, errors of a training step, whether both are within the limits)."""
    contender, ring = program.contender, program.ring
    with torch.no_grad():
        inferred = program.infer(ring.x, ring.residual, program.frozen)
    x, residual = (
        None if t is None else t.detach().clone().requires_grad_() for t in (ring.x, ring.residual)
    )
    y = program.train(x, residual, program.leaves)  # type: ignore[arg-type]
    leaves = [x, *program.leaves, *([] if residual is None else [residual])]
    dx, *rest = torch.autograd.grad(y, leaves, ring.gy)  # type: ignore[arg-type]
    if contender.exact is not None:
        got, limit = (
            _neighbour_errors(contender, ring, inferred, y.detach(), dx),
            NEIGHBOUR_LIMITS[dtype],
        )
        return *got, got[0] <= limit and got[1].within(Errors(limit, limit, limit))
    errors = Errors(relative(y.detach(), exact.y), relative(dx, exact.dx, exact.dx_scale), 0)
    if exact.dresidual is not None:
        errors.dx = max(errors.dx, relative(rest[-1], exact.dresidual))
    for got_one, at in zip(rest[:2], (slice(None, -1), slice(-1, None)), strict=True):
        errors.parameters = max(
            errors.parameters, relative(got_one, exact.parameters[at], exact.scale[at])
        )
    limits = TOLERANCES[dtype]
    if contender.kind == "plain" and dtype in (torch.float16, torch.bfloat16):
        limits = Errors(
            limits.y * PLAIN_FACTOR, limits.dx * PLAIN_FACTOR, limits.parameters * PLAIN_FACTOR
        )
    error = relative(inferred, exact.y)
    return error, errors, error <= limits.y and errors.within(limits)


def _neighbour_errors(
    contender: Contender, ring: Ring, inferred: Tensor, y: Tensor, dx: Tensor
) -> tuple[float, Errors]:
    assert contender.exact is not None
    wide, own = (
        ring.x.double().requires_grad_(),
        [p.detach().double() for p in contender.parameters],
    )
    with torch.no_grad():
        error = relative(inferred, contender.exact(wide, None, own))
    expected = contender.exact(wide, None, own)
    (exact_dx,) = torch.autograd.grad(expected, wide, ring.gy.double())
    return error, Errors(relative(y, expected.detach()), relative(dx, exact_dx), 0)


def peak_bytes(call: timing.Call, device: torch.device) -> int:
    """The most that one call had allocated at a time, results included: on a CPU as torch.profiler records allocations."""
    given = [call.prepare()] if call.prepare is not None else []
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
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = itertools.accumulate(
        (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), initial=0
    )
    del result
    return max(held)


def usable(
    group: Group, offered: Sequence[Contender], ring: Ring
) -> tuple[list[Contender], list[dict[str, str]]]:
    """Those that take the input, and for the others the reason that they give."""
    taken, skipped, refused = [], [], {}
    small = ring.x[:1], None if ring.residual is None else ring.residual[:1]
    for contender in offered:
        if contender.mode is None:
            try:
                with torch.no_grad():
                    contender.layer(*small, contender.parameters)
            except (ValueError, TypeError) as error:
                refused[contender.layer] = str(error)
        if contender.layer in refused:
            where = f"{group.operator}, {group.case}, {group.layout}, {group.dtype}"
            skipped.append(
                {"case": where, "what": contender.name, "reason": refused[contender.layer]}
            )
        else:
            taken.append(contender)
    return taken, skipped


def offer(group: Group, backends: Sequence[str], device: torch.device) -> list[Contender]:
    """All contenders of a group, the compiled ones last."""
    dtype = getattr(torch, group.dtype)
    drawn = contenders.parameters(dtype, device, group.levels)
    names = (
        backends
        if group.backends is None
        else [name for name in backends if name in group.backends]
    )
    made = [contenders.backend(group.operator, name, drawn, group.levels) for name in names]
    made += [contenders.plain(group.operator, name, drawn, group.levels) for name in group.plain]
    if group.neighbours == ("F.layer_norm",):
        made.append(contenders.layer_norm(group.shape, dtype, device))
    elif group.neighbours:
        made += [
            c
            for c in contenders.neighbours(group.shape[1], dtype, device)
            if c.name in group.neighbours
        ]
    return made + [
        c.compiled(mode) for mode in group.modes for c in made if c.name in group.compiled
    ]


def measure(
    group: Group,
    backends: Sequence[str],
    device: torch.device,
    rounds: int,
    limit: float,
    offered: Callable[[Group, Sequence[str], torch.device], list[Contender]] = offer,
) -> Measured:
    """The rows of one group; no timing lasts longer than ``limit`` seconds once timing.FEWEST rounds are done."""
    torch.compiler.reset()  # so that no group meets the compiled code of another
    torch.set_num_threads(group.threads)
    dtype = getattr(torch, group.dtype)
    ring = Ring(group, device)
    exact = truth(
        ring.x, ring.gy, ring.weight, ring.bias, group.levels, group.operator, ring.residual
    )
    result = Measured()
    taken, result.skipped = usable(group, offered(group, backends, device), ring)
    calls: dict[tuple[str, str], timing.Call] = {}
    known: dict[tuple[str, str], dict[str, Any]] = {}  # what a row says besides its times
    for contender in taken:
        program = Program(contender, ring)
        inferred, trained, within = check(program, exact, dtype)
        for direction in group.directions:
            key = contender.name, direction
            calls[key] = program.call(direction)
            about: dict[str, Any] = {"kind": contender.kind, "within": within}
            about["error_y"] = inferred if direction == "forward" else trained.y
            if direction != "forward":
                about |= {"error_dx": trained.dx}
                about |= {} if contender.exact else {"error_parameters": trained.parameters}
            known[key] = about
    del exact
    for direction, floor in FLOORS[group.operator].items():
        if direction in group.directions:
            calls["floor", direction] = timing.Call(partial(_floor, ring, floor))
            known["floor", direction] = {"kind": "floor", **_floor_errors(ring, floor, dtype)}
    calls["copy", "forward"] = timing.Call(partial(_copy, ring))
    known["copy", "forward"] = {"kind": "copy", "error_y": 0.0}
    for key, call in calls.items():
        with torch.set_grad_enabled(call.grad):
            known[key]["peak_bytes"] = peak_bytes(call, device)
    times = timing.interleave(calls, rounds, by=timing.clock(device), limit=limit)
    copied = 2 * ring.x.numel() * ring.x.itemsize / times["copy", "forward"].median
    if not torch.equal(ring.targets[0], ring.x):
        known["copy", "forward"]["within"] = False
    for (what, direction), took in times.items():
        counted = OPERATORS["ppcr" if what == "copy" else group.operator]
        row = _row(
            group,
            what,
            direction,
            took,
            counted.necessary_bytes(direction, group.shape, dtype),
            copied,
        )
        result.rows.append(replace(row, **known[what, direction]))
    return result


def _row(
    group: Group, what: str, direction: str, took: timing.Timing, needed: int, copied: float
) -> Row:
    speed = needed / took.median
    return Row(
        group.suite,
        group.operator,
        group.case,
        list(group.shape),
        group.layout,
        group.dtype,
        group.threads,
        list(group.levels),
        direction,
        what,
        kind="",
        median_us=took.median * 1e6,
        low_us=took.low * 1e6,
        high_us=took.high * 1e6,
        lowest_us=took.lowest * 1e6,
        highest_us=took.highest * 1e6,
        rounds=took.rounds,
        necessary_bytes=needed,
        gb_per_s=speed / 1e9,
        copy_fraction=speed / copied,
        others=took.others,
    )


def _floor(ring: Ring, floor: contenders.Floor) -> None:
    ring.keep(floor(*ring.next()))


def _copy(ring: Ring) -> None:
    x, *_ = ring.next()
    ring.targets[ring.turn % len(ring.targets)].copy_(x)


def _floor_errors(ring: Ring, floor: contenders.Floor, dtype: torch.dtype) -> dict[str, Any]:
    wide = floor(*(None if t is None else t.double() for t in (ring.x, ring.gy, ring.residual)))
    error = max(
        relative(a, b) for a, b in zip(floor(ring.x, ring.gy, ring.residual), wide, strict=True)
    )
    return {"error_y": error, "within": error <= TOLERANCES[dtype].y}
