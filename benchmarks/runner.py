"""Runs a suite: progress, files after every case, interruption, resumption, and comparison."""

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom  # type: ignore[import-untyped]
from tqdm import tqdm

from . import layers, pictures, report, timing
from .cases import Case
from .layers import Key
from .results import SAME, Record, Row, compare, derived, environment, read, rounded

INTERRUPTED = 130  # exit status, as a shell has it
ROUNDS_PER_NETWORK = 5  # see batches()


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the bounds of its 95 % confidence interval, whatever the distribution is."""
    # With fewer than six values the bounds are the whole range, whose confidence is smaller.
    ordered, n = sorted(values), len(values)
    rank = max(1, int(binom.ppf(0.025, n, 0.5)))
    return statistics.median(ordered), ordered[rank - 1], ordered[n - rank]


def batches(case: Case, rounds: int) -> list[int]:
    """The rounds of each set of calls."""
    # Where its memory happens to be makes a network faster or slower than its twin while it lives:
    # it is made anew, unless that would compile it again. A layer's inputs rotate instead.
    anew = case.variants and not case.compiled
    count = math.ceil(rounds / ROUNDS_PER_NETWORK) if anew else 1
    return [(rounds + i) // count for i in range(count)]


def measure(
    case: Case, backends: Sequence[str], device: torch.device, rounds: int, limit: float | None
) -> list[Row]:
    """No timing lasts longer than ``limit`` seconds once timing.FEWEST rounds are done."""
    samples: dict[Key, list[timing.Sample]] = {}
    first, loads, shuffle = None, list[float](), random.Random(0)
    torch.set_num_threads(case.threads)
    for count in batches(case, rounds):
        torch.compiler.reset()  # so that no case meets the compiled code of another
        if case.variants:
            from . import networks  # with torchvision and timm, which layers do not need

            order = shuffle.sample(case.variants, len(case.variants))
            made = networks.prepare(case, device, first is None, order)
        else:
            made = layers.prepare(case, backends, device)
        timed, load = timing.interleave(made.calls, count, made.by, limit or math.inf)
        for key, values in timed.items():
            samples.setdefault(key, []).extend(values)
        loads.append(load)
        made.calls.clear()
        first = first or made
        gc.collect()
    assert first is not None
    for (what, direction), found in samples.items():
        row, base = first.rows[what, direction], samples.get((first.base, direction))
        row.rounds, row.other_load = len(found), statistics.fmean(loads)
        times = [one.seconds * 1e6 for one in found]
        row.low_us, row.median_us, row.high_us = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
        host = statistics.median(one.host * 1e6 for one in found)
        row.host_us = None if math.isnan(host) else host
        if base is not None and what != "copy":
            ratios = [a.seconds / b.seconds for a, b in zip(found, base, strict=True)]
            row.ratio, row.ratio_low, row.ratio_high = median_interval(ratios)
    copied = first.rows.get(("copy", "forward"))
    for row in first.rows.values():
        if copied is not None and row.necessary_bytes and copied.necessary_bytes:
            share = row.necessary_bytes / copied.necessary_bytes
            row.copy_fraction = share * copied.median_us / row.median_us
    return derived(list(first.rows.values()))


def resume(record: Record, path: Path) -> str:
    """Takes over the rows of an earlier run where they may stand beside new ones; says so."""
    if not path.is_file():
        return f"nothing to resume: no {path}"
    old, commit = read(path), record.environment["commit"]
    if commit == "unknown" or commit.endswith("+"):
        return "not resumed: the working tree differs from its commit, so that rows may differ"
    differing = [name for name in SAME if old.environment.get(name) != record.environment.get(name)]
    if differing or old.settings != rounded(record.settings):
        return f"not resumed: other {', '.join(differing) or 'settings'} than those of {path}"
    record.rows = old.rows
    return f"resumed {len(old.rows)} rows of {path}"


def run(
    suite: str,
    cases: Sequence[Case],
    device: torch.device,
    out: Path,
    settings: dict[str, Any],
    *,
    resuming: bool = False,
    against: Path | None = None,
) -> int:
    """Measures all cases into ``out``/``suite``.*; returns the exit status of the command."""
    begin, where = time.perf_counter(), out / suite
    older = read(against) if against is not None else None  # before anything is overwritten
    rounds, limit = settings["rounds"], settings.get("seconds_per_case")
    timing.keep_memory()
    backends, reasons = layers.usable_backends(device)
    record = Record(suite, environment(device), settings)
    env = record.environment
    print(f"{env['device']}, {env['cpu']} ({env['capability']}), torch {env['torch']}")
    print("\n  ".join([f"backends: {', '.join(backends)}", *map(": ".join, reasons.items())]))
    if resuming:
        print(resume(record, where.with_suffix(".json")))
    done = {row.place for row in record.rows}
    left = [case for case in cases if case.place not in done]
    try:
        with tqdm(left, file=sys.stderr, unit="input") as bar:
            for case in bar:
                bar.set_description(f"{case.operator}, {case.label}")
                record.rows += measure(case, backends, device, rounds, limit)
                record.write(where)
        record.complete = True
    except KeyboardInterrupt:
        print("INTERRUPTED, incomplete: what was measured is kept")
    written = record.write(where)
    if record.rows:
        written += pictures.draw(record, out)
        print(report.console(record))
    print(f"wrote {', '.join(map(str, written))} in {time.perf_counter() - begin:.0f} s")
    return _judge(record, older) or (0 if record.complete else INTERRUPTED)


def _judge(record: Record, older: Record | None) -> int:
    wrong = [row for row in record.rows if not row.within]
    for row in wrong:
        where = f"{row.what}, {row.operator} {row.direction}, {row.label}"
        errors = f"y {row.error_y}, dx {row.error_dx}, dweight and dbias {row.error_parameters}"
        print(f"error above tolerance: {where}: {errors}")
    text, slower = compare(older, record) if older is not None else ("", [])
    print(text, end="\n" * bool(text))
    return 1 if wrong or slower else 0
