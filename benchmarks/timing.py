"""Times calls fairly: all of them in every round, in a new random order, with the compiler kept out."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SHORTEST = 1e-3  # seconds that one timing lasts at the least: shorter calls are repeated inside it


@dataclass
class Call:
    """Something to time; ``grad`` says whether autograd records."""

    run: Callable[[], object]
    grad: bool = False
    repeats: int = 1


@dataclass
class Timing:
    """Seconds per call over all rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    others: float | None = None  # share of the processor time that other processes took meanwhile


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
    """The share of the machine's processor time that other processes took since this object was made.

    A single busy one makes every call wait for its time slices, floor included, and all ratios come out near 1.
    """

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds over all cores: passed, busy, ours. None where there is no /proc/stat."""
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
        except (OSError, ValueError):
            return None
        tick = os.sysconf("SC_CLK_TCK")
        busy = user + nice + system + irq + softirq + steal
        ours = os.times()
        return (busy + idle + iowait) / tick, busy / tick, ours.user + ours.system

    def share(self) -> float | None:
        now = self._now()
        if now is None or self.start is None:
            return None
        passed, busy, ours = (end - begin for begin, end in zip(self.start, now, strict=True))
        return max(0.0, (busy - ours) / passed) if passed > 0 else 0.0


def _seconds(call: Call) -> float:
    """One timing. A first call, not counted, brings this column's own code and data back after the other columns."""
    run = call.run
    with torch.set_grad_enabled(call.grad):
        run()
        start = time.perf_counter()
        for _ in range(call.repeats):
            run()
        return (time.perf_counter() - start) / call.repeats


def interleave(calls: dict[str, Call], rounds: int, *, tick: Callable[[], object] = lambda: None) -> dict[str, Timing]:
    """The timings of all calls, interleaved; ``tick`` is called after every round.

    Every call has run (and compiled) before the first round; :func:`quiet` makes sure of it.
    """
    order, shuffle = list(calls), random.Random(0)
    for call in calls.values():  # compile, warm up, and find out how often to repeat
        call.repeats = 1
        _seconds(call)
        once = min(_seconds(call) for _ in range(3))
        call.repeats = max(1, math.ceil(SHORTEST / max(once, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with quiet():
        others = Others()
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                seconds[name].append(_seconds(calls[name]))
            tick()
        share = others.share()
    return {name: _summary(values, share) for name, values in seconds.items()}


def _summary(values: list[float], others: float | None) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], others)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, others)
