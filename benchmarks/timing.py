"""Times calls fairly: all of them in every round, in a new random order, with the compiler kept out."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

SHORTEST = 1e-3  # seconds that one timing lasts at the least: shorter calls are repeated inside it
FEWEST = 5  # rounds before a limit in seconds can end the timing
DISTURBED = (
    0.05  # share of the processor time, taken by others, beyond which a timing is not to be trusted
)
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds; the kernel counts processor time in these

Key = TypeVar("Key")


@dataclass
class Call:
    """Something to time; ``grad`` says whether autograd records.

    ``prepare`` runs before every repetition, outside the time, and what it returns is handed to ``run``.
    """

    run: Callable[..., object]
    grad: bool = False
    prepare: Callable[[], object] | None = None
    repeats: int = 1


@dataclass
class Timing:
    """Seconds per call over all rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    others: float | None = None  # share of the processor time that other processes took meanwhile
    lowest: float = math.nan  # first and last decile
    highest: float = math.nan
    rounds: int = 1


class HostClock:
    """Times what the host waits for: calls on the CPU."""

    shortest = SHORTEST

    def mark(self) -> Any:
        return time.perf_counter()

    def elapsed(self, marks: list[tuple[Any, Any]]) -> float:
        return sum(end - begin for begin, end in marks)


class CudaClock:
    """Times what a CUDA device does, by events in its current stream."""

    shortest = (
        5e-3  # events are coarser, and a longer queue hides the launches as a training step does
    )

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, marks: list[tuple[Any, Any]]) -> float:
        marks[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in marks) / 1e3


Clock = HostClock | CudaClock


def clock(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


def keep_memory() -> None:
    """Asks glibc not to return freed memory to the system.

    Else a call that follows one with another appetite pays for fresh pages, which costs as much as ``x * 0.5`` itself
    and hits every column at random. Does nothing where the C library has no ``mallopt``.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # the names M_* of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection, and an error instead of a compilation."""
    torch.compiler.set_stance("fail_on_recompile")
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.compiler.set_stance("default")


class Others:
    """The processor time that others took since this object was made: processes, or on a virtual machine its host.

    A single busy one makes every call wait for its time slices, floor included, and all ratios come out near 1.
    """

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds over all cores: passed, and busy with others. No time passes where there is no /proc/stat."""
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
        except (OSError, ValueError):
            return 0.0, 0.0
        busy, ours = user + nice + system + irq + softirq + steal, os.times()
        return (busy + idle + iowait) * TICK, busy * TICK - ours.user - ours.system

    def seconds(self) -> tuple[float, float]:
        """Passed over all cores, and of these taken by others; within some ticks, so that short times can come out negative."""
        passed, taken = (end - begin for begin, end in zip(self.start, self._now(), strict=True))
        return passed, taken


def _seconds(call: Call, by: Clock) -> float:
    """One timing. A first call, not counted, brings this column's own code and data back after the other columns."""
    run, prepare = call.run, call.prepare
    marks = []
    with torch.set_grad_enabled(call.grad):
        if prepare is None:
            run()
            begin = by.mark()
            for _ in range(call.repeats):
                run()
            marks.append((begin, by.mark()))
        else:
            run(prepare())
            for _ in range(call.repeats):
                given = prepare()
                begin = by.mark()
                run(given)
                marks.append((begin, by.mark()))
                del given  # or the next preparation would run beside it
        return by.elapsed(marks) / call.repeats


def rounds_of(
    calls: Mapping[Key, Callable[[], float]],
    rounds: int,
    *,
    tick: Callable[[], object] = lambda: None,
    limit: float = math.inf,
) -> tuple[dict[Key, list[float]], float | None]:
    """What every call returns, seconds, in every round, each in a new random order; and the share of the processor time that others
    took. ``tick`` is called after every round. No further round begins once ``limit`` seconds have passed, if :data:`FEWEST` are done.

    A round during which others took more than :data:`DISTURBED` is measured again, whatever it was found to be; at most ``rounds``
    are, so that on a busy machine some are kept, and the share tells.
    """
    order, shuffle, spare = list(calls), random.Random(0), rounds
    kept: dict[Key, list[float]] = {key: [] for key in calls}
    passed = taken = 0.0
    done, begin = 0, time.perf_counter()
    while done < rounds and (done < FEWEST or time.perf_counter() - begin < limit):
        others = Others()
        shuffle.shuffle(order)
        found = {key: calls[key]() for key in order}
        seconds, took = others.seconds()
        if spare and took > max(DISTURBED * seconds, 3 * TICK):
            spare -= 1
            continue
        done, passed, taken = done + 1, passed + seconds, taken + took
        for key, value in found.items():
            kept[key].append(value)
        tick()
    return kept, max(0.0, taken) / passed if passed else None


def interleave(
    calls: dict[Key, Call],
    rounds: int,
    *,
    tick: Callable[[], object] = lambda: None,
    by: Clock | None = None,
    limit: float = math.inf,
) -> dict[Key, Timing]:
    """The timings of all calls, interleaved by :func:`rounds_of`.

    Every call has run (and compiled) before the first round; :func:`quiet` makes sure of it.
    """
    by = by or HostClock()
    for call in calls.values():  # compile, warm up, and find out how often to repeat
        call.repeats = 1
        _seconds(call, by)
        once = _seconds(call, by)
        for _ in range(2):
            if once < by.shortest:
                once = min(once, _seconds(call, by))
        call.repeats = max(1, math.ceil(by.shortest / max(once, 1e-7)))
    with quiet():
        seconds, share = rounds_of(
            {key: partial(_seconds, call, by) for key, call in calls.items()},
            rounds,
            tick=tick,
            limit=limit,
        )
    return {key: _summary(values, share) for key, values in seconds.items()}


def _summary(values: list[float], others: float | None) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], others, values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(median, low, high, others, deciles[0], deciles[-1], len(values))
