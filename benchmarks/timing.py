"""Times calls fairly: all of them in every round, in a new random order, without the compiler."""

import ctypes
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

FEWEST = 5  # rounds before a limit in seconds can end the timing
DISTURBED = 0.05  # share of the processor time, taken by others, that spoils a round
SHORTEST = 1e-3  # seconds that a timing lasts at least: shorter calls are repeated in it
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds; the kernel counts processor time in these

Key = TypeVar("Key")


@dataclass
class Call:
    run: Callable[..., object]
    grad: bool = False  # whether autograd records
    # runs before every repetition, outside the time; run() is given what it returns
    prepare: Callable[[], object] | None = None
    # whether run() first runs outside the time, to bring its code and data back into the caches;
    # what is repeated runs more often, see HostClock
    warm: bool = True
    repeats: int = 1
    fill: float = 1e-4  # see CudaClock

    def given(self) -> tuple[object, ...]:
        return () if self.prepare is None else (self.prepare(),)


class Sample(NamedTuple):
    """Seconds per call, and those in which the host launched it where a clock tells them apart."""

    seconds: float
    host: float = math.nan


class HostClock:
    """Times what the host waits for; on a CUDA device until the device has finished, too."""

    burst = 1 << 30  # calls between two marks
    # Runs before a call that is repeated. A cache that cores share keeps only what was read several
    # times: after a single run the fastest call, repeated most, would also be the warmest.
    warm_up = 10

    def __init__(self, device: torch.device | None = None) -> None:
        cuda = device is not None and device.type == "cuda"
        self.wait: Callable[[], object] = torch.cuda.synchronize if cuda else lambda: None

    def measure(self, call: Call, run: Callable[[], object], times: int) -> Sample | None:
        self.wait()
        begin = time.perf_counter()
        for _ in range(times):
            run()
        self.wait()
        return Sample(time.perf_counter() - begin)


class CudaClock:
    """Times what a CUDA device does, by events in its stream, and the host apart from it."""

    # An event that meets an idle device fires at once, and the time would be that of the host. So
    # the device first sleeps, ``fill`` seconds, until the host has launched everything. Where it
    # woke up before that, nothing is returned and the next sleep is longer.
    burst = 8  # so that what is launched during a sleep fits into the driver's queue
    warm_up = 1  # inputs take turns and are never in a cache
    longest_fill = 0.02  # a call that itself waits for the device is never launched in time
    cycles_per_second = 2e9  # about

    def measure(self, call: Call, run: Callable[[], object], times: int) -> Sample | None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(call.fill * self.cycles_per_second))
        begin.record()
        start = time.perf_counter()
        for _ in range(times):
            run()
        host = time.perf_counter() - start
        early = begin.query()
        end.record()
        end.synchronize()
        if early and call.fill < self.longest_fill:
            call.fill *= 2
            return None
        return Sample(begin.elapsed_time(end) / 1e3, host)


Clock = HostClock | CudaClock


def clock(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


def keep_memory() -> None:
    """Asks glibc not to return freed memory to the system; does nothing without ``mallopt``."""
    # Otherwise a call after one of other sizes pays for fresh pages, as much as ``x * 0.5`` takes.
    trim_threshold, mmap_threshold = -1, -3  # the names M_* of malloc.h
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection, and an error instead of a compilation."""
    gc.collect()
    gc.disable()
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    finally:
        gc.enable()


def other_load() -> tuple[float, float]:
    """Seconds over all cores, within some ticks: passed, and taken by others."""
    # A single busy process, or the host of a virtual machine, makes every call wait for its time
    # slices, the lower bound included, and all ratios come out near 1.
    line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
    busy, ours = user + nice + system + irq + softirq + steal, os.times()
    return (busy + idle + iowait) * TICK, busy * TICK - ours.user - ours.system


def sample(call: Call, by: Clock) -> Sample:
    seconds = host = 0.0
    left = call.repeats
    with torch.set_grad_enabled(call.grad):
        for _ in range(call.warm * (by.warm_up if call.repeats > 1 else 1)):
            call.run(*call.given())
        while left:
            times = 1 if call.prepare is not None else min(left, by.burst)
            # What is given must not outlive its run, or the next preparation would run beside it.
            if found := by.measure(call, partial(call.run, *call.given()), times):
                seconds, host, left = seconds + found.seconds, host + found.host, left - times
    return Sample(seconds / call.repeats, host / call.repeats)


def interleave(
    calls: Mapping[Key, Call], rounds: int, by: Clock | None = None, limit: float = math.inf
) -> tuple[dict[Key, list[Sample]], float]:
    """A sample of every call in every round, and the share of the processor that others took."""
    # No further round begins after ``limit`` seconds, if :data:`FEWEST` are done. A round during
    # which others took more than :data:`DISTURBED` is measured again, whatever it found; at most
    # ``rounds`` are, so that on a busy machine some are kept, and the share tells.
    by = by or HostClock()
    for call in calls.values():  # compile, warm up, and find out how often to repeat
        call.repeats = 1
        sample(call, by)
        once = sample(call, by).seconds
        if once < SHORTEST:
            once = min(once, *(sample(call, by).seconds for _ in range(2)))
        call.repeats = max(1, math.ceil(SHORTEST / max(once, 1e-7)))
    kept: dict[Key, list[Sample]] = {key: [] for key in calls}
    order, shuffle, spare, done = list(calls), random.Random(0), rounds, 0
    passed = taken = 0.0
    begin = time.perf_counter()
    with quiet():
        while done < rounds and (done < FEWEST or time.perf_counter() - begin < limit):
            before = other_load()
            shuffle.shuffle(order)
            found = {key: sample(calls[key], by) for key in order}
            seconds, took = (b - a for a, b in zip(before, other_load(), strict=True))
            if spare and took > max(DISTURBED * seconds, 3 * TICK):
                spare -= 1
                continue
            done, passed, taken = done + 1, passed + seconds, taken + took
            for key, one in found.items():
                kept[key].append(one)
    return kept, max(0.0, taken) / max(passed, TICK)
