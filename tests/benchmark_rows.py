"""Cases and rows for the tests of the benchmarks."""

from typing import Any

from benchmarks.cases import Case
from benchmarks.results import Record, Row, derived

SHAPE = (2, 16, 8, 8)
COMMIT = "0123456789ab"
ENVIRONMENT = {
    "device": "cpu",
    "cpu": "Some CPU",
    "capability": "AVX2",
    "threads": 2,
    "torch": "2",
    "date": "2026-01-02T03:04:05",
    "commit": COMMIT,
}


def small(**options: Any) -> Case:
    named = {"suite": "operators", "operator": "ppcr", "case": "small", "shape": SHAPE}
    return Case(**(named | {"layout": "contiguous"} | options))


def row(
    one: Case, what: str, direction: str, microseconds: float, kind: str = "plain", **more: Any
) -> Row:
    shape, levels = list(one.shape), list(one.levels)
    place = (one.suite, one.operator, one.case, shape, one.layout, one.dtype, one.threads, levels)
    named = {"direction": direction, "what": what, "kind": kind, "rounds": 9}
    times = {"low_us": microseconds * 0.98, "high_us": microseconds * 1.02}
    figures = {"necessary_bytes": 1000, "copy_fraction": 100 / microseconds, "peak_bytes": 8192}
    errors = {"error_y": 1e-7, "error_dx": 2e-7, "error_parameters": 3e-7}
    return Row(*place, median_us=microseconds, **named | times | figures | errors | more)


def synthetic(one: Case, native: float = 200) -> list[Row]:
    """Of 100 us a copy and the lower bound, of 200 forward and 400 otherwise a native backend.

    Plain formulations take 400 and 800 us forward, and twice that otherwise.
    """
    rows = [row(one, "copy", "forward", 100, "copy")]
    for direction in one.directions:
        factor = 1 if direction == "forward" else 2
        rows.append(row(one, "lower bound", direction, 100 * factor, "lower bound"))
        rows.append(row(one, "native", direction, native * factor, "fused"))
        rows.append(row(one, "pooled once", direction, 400 * factor))
        rows.append(row(one, "level by level", direction, 800 * factor))
    return derived(rows)


def record(rows: list[Row], command: str = "operators", **settings: Any) -> Record:
    return Record(command, dict(ENVIRONMENT), {"rounds": 9} | settings, True, rows)
