"""Runs a suite: progress, files after every case, interruption, resumption, and comparison."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import layers, pictures, report, timing
from .cases import Case
from .layers import Key, Prepared
from .results import SAME, Record, Row, compare, environment, read, rounded

INTERRUPTED = 130  # exit status, as a shell has it
ROUNDS_PER_NETWORK = 5  # see batches()
# Seconds, about, that only the progress bar asks for: of the two programs of one compiled
# implementation, and of inputs, float64 and memory.
COMPILING, CHECKING = 9.0, 1.5


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the bounds of its 95 % confidence interval: order statistics.

    The ranks come from the binomial distribution, exact for any distribution of the values. With
    fewer than six values the bounds are the whole range, whose confidence is smaller.
    """
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < n // 2:
        below += math.comb(n, rank) / 2**n
        if below > 0.025:
            break
        rank += 1
    rank = max(rank, 1)
    return statistics.median(ordered), ordered[rank - 1], ordered[n - rank]


def batches(case: Case, rounds: int) -> list[int]:
    """The rounds of each set of calls.

    Where its memory happens to be makes a network some percent faster or slower than its twin, for
    as long as it lives; so networks are made anew every few rounds, unless that would compile them
    again. The inputs of a layer rotate instead.
    """
    anew = bool(case.variants) and not case.modes
    count = math.ceil(rounds / ROUNDS_PER_NETWORK) if anew else 1
    return [(rounds + i) // count for i in range(count)]


def prepare(
    case: Case, backends: Sequence[str], device: torch.device, first: bool, shuffle: random.Random
) -> Prepared:
    if not case.variants:
        return layers.prepare(case, backends, device)
    from . import networks  # torchvision and timm, which layers do not need

    order = shuffle.sample(case.variants, len(case.variants))
    return networks.prepare(case, device, first, order)


def measure(
    case: Case,
    backends: Sequence[str],
    device: torch.device,
    rounds: int,
    limit: float = math.inf,
    tick: Callable[[], object] = lambda: None,
    preparing: Callable[..., Prepared] = prepare,
) -> tuple[list[Row], list[dict[str, str]]]:
    """The rows of one case, and what could not take part.

    No timing lasts longer than ``limit`` seconds once timing.FEWEST rounds are done.
    """
    samples: dict[Key, list[timing.Sample]] = {}
    about: dict[Key, dict[str, Any]] = {}
    loads, skipped, base, shuffle = [], [], "", random.Random(0)
    for count in batches(case, rounds):
        made = preparing(case, backends, device, not samples, shuffle)
        found, load = timing.interleave(made.calls, count, by=made.by, tick=tick, limit=limit)
        made.finish()
        for key, values in found.items():
            samples.setdefault(key, []).extend(values)
            about.setdefault(key, made.about[key])
        loads += [] if load is None else [load]
        base, skipped = made.base, made.skipped
        del made, found
        gc.collect()
    share = statistics.fmean(loads) if loads else None
    rows = [_row(case, key, samples, about[key], base, share) for key in samples]
    copies = [row.gb_per_s for row in rows if row.kind == "copy"]
    for row in rows:
        if copies and copies[0] and row.gb_per_s is not None:
            row.copy_fraction = row.gb_per_s / copies[0]
    return rows, skipped


def _row(
    case: Case,
    key: Key,
    samples: dict[Key, list[timing.Sample]],
    about: dict[str, Any],
    base: str,
    load: float | None,
) -> Row:
    what, direction = key
    times = [sample.seconds * 1e6 for sample in samples[key]]
    host = [sample.host * 1e6 for sample in samples[key] if sample.host is not None]
    few = [times[0]] * 9
    low, median, high = (
        statistics.quantiles(times, n=4, method="inclusive") if times[1:] else few[:3]
    )
    tenths = statistics.quantiles(times, n=10, method="inclusive") if times[1:] else few
    row = Row(
        case.suite, case.operator, case.case, list(case.shape), case.layout, case.dtype,
        case.threads, list(case.levels), direction, what, median_us=median, low_us=low,
        high_us=high, lowest_us=tenths[0], highest_us=tenths[-1], rounds=len(times),
        host_us=statistics.median(host) if host else None, other_load=load, **about,
    )  # fmt: skip
    if what != "copy" and (base, direction) in samples:
        pairs = zip(samples[key], samples[base, direction], strict=True)
        ratios = [one.seconds / bound.seconds for one, bound in pairs]
        row.ratio, row.ratio_low, row.ratio_high = median_interval(ratios)
    if row.necessary_bytes is not None:
        row.gb_per_s = row.necessary_bytes / row.median_us / 1e3
    return row


def resume(record: Record, path: Path) -> str:
    """Takes over the rows of an earlier run where they may stand beside new ones; says so."""
    if not path.is_file():
        return f"nothing to resume: no {path}"
    old, commit = read(path), record.environment["commit"]
    differing = [name for name in SAME if old.environment.get(name) != record.environment[name]]
    if commit == "unknown" or commit.endswith("+"):
        return (
            "not resumed: the working tree differs from its commit, so that nobody knows what the "
            "old rows measured"
        )
    if differing or old.settings != rounded(record.settings):
        return f"not resumed: other {', '.join(differing) or 'settings'} than those of {path}"
    record.rows, record.skipped = old.rows, old.skipped
    return f"resumed {len(old.rows)} rows of {path}"


def seconds_of(case: Case, limit: float) -> float:
    """About what a case takes, for the progress bar."""
    programs = max(1, len(case.variants) // 2) * len(case.modes) * len(case.compiled)
    return min(limit, 60.0) * 1.5 + CHECKING + COMPILING * programs


def run(
    suite: str,
    cases: Sequence[Case],
    device: torch.device,
    out: Path,
    *,
    rounds: int,
    limit: float = math.inf,
    settings: dict[str, Any] | None = None,
    resuming: bool = False,
    against: Path | None = None,
    measuring: Callable[..., tuple[list[Row], list[dict[str, str]]]] = measure,
) -> int:
    """Measures all cases into ``out``/``suite``.*.

    Returns 0, 1 (an error too large, or slower than ``against``) or 130 (interrupted).
    """
    begin, where = time.perf_counter(), out / suite
    older = read(against) if against is not None else None  # before anything is overwritten
    timing.keep_memory()
    backends, reasons = layers.usable_backends(device)
    about = {"rounds": rounds, "seconds_per_case": limit if math.isfinite(limit) else None}
    record = Record(suite, environment(device), about | (settings or {}))
    env = record.environment
    print(f"{env['device']}, {env['cpu']} ({env['capability']}), torch {env['torch']}")
    print(f"backends: {', '.join(backends)}")
    for name, reason in reasons.items():
        print(f"  {name}: {reason}")
    if resuming:
        print(resume(record, where.with_suffix(".json")))
    done = {row.place for row in record.rows}
    left = [case for case in cases if case.place not in done]
    total = math.ceil(sum(seconds_of(case, limit) for case in left))
    try:
        form = "{l_bar}{bar}| {elapsed}, {remaining} left{postfix}"
        with tqdm(total=total, bar_format=form, smoothing=0, file=sys.stderr) as bar:
            for case in left:
                bar.set_description(str(case))
                rounds_done = iter(range(1, rounds + 1))

                def tick(bar: Any = bar, rounds_done: Any = rounds_done) -> None:
                    bar.set_postfix_str(f"round {next(rounds_done)} of {rounds}")

                rows, skipped = measuring(case, backends, device, rounds, limit, tick)
                record.rows += rows
                record.skipped += skipped
                bar.update(seconds_of(case, limit))
                record.write(where)
        record.complete = True
    except KeyboardInterrupt:
        pass
    written = record.write(where)
    if record.rows:
        written += pictures.draw(record, out)
        print(report.console(record))
    seconds, state = time.perf_counter() - begin, "" if record.complete else "INTERRUPTED: "
    print(f"{state}wrote {', '.join(map(str, written))} in {seconds:.0f} s")
    return _judge(record, older) or (0 if record.complete else INTERRUPTED)


def _judge(record: Record, older: Record | None) -> int:
    """Prints what was skipped, what is wrong and what got slower."""
    for one in {(s["what"], s["reason"]): s for s in record.skipped}.values():
        print(f"skipped {one['what']} ({one['case']} and the like): {one['reason']}")
    disturbed = [row for row in record.rows if (row.other_load or 0) > timing.DISTURBED]
    for place in {row.place: row for row in disturbed}.values():
        where = f"{place.operator} {place.case}, {place.layout}, {place.dtype}"
        print(f"WARNING: others took {place.other_load:.0%} of the processor during {where}")
    wrong = [row for row in record.rows if not row.within]
    for row in wrong:
        where = f"{row.what}, {row.operator} {row.direction}, {row.case}, {row.layout}, {row.dtype}"
        errors = f"y {row.error_y}, dx {row.error_dx}, dweight and dbias {row.error_parameters}"
        print(f"error above tolerance: {where}: {errors}")
    slower: list[Any] = []
    if older is not None:
        text, slower = compare(older, record)
        print(text)
    return 1 if wrong or slower else 0
