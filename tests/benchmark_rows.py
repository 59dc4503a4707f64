"""Groups and rows for the tests of the benchmark suites."""

from __future__ import annotations

from benchmarks.measure import Group, Row

SHAPE = (2, 16, 8, 8)


def group(**options: object) -> Group:
    return Group(
        **{
            "suite": "operators",
            "operator": "ppcr",
            "case": "small",
            "shape": SHAPE,
            "layout": "contiguous",
        }
        | options
    )


def row(
    one: Group,
    what: str,
    direction: str,
    microseconds: float,
    kind: str = "plain",
    spread: float = 0.02,
) -> Row:
    place = (
        one.suite,
        one.operator,
        one.case,
        list(one.shape),
        one.layout,
        one.dtype,
        one.threads,
        list(one.levels),
        direction,
        what,
    )
    low, high = microseconds * (1 - spread), microseconds * (1 + spread)
    return Row(
        *place,
        kind,
        microseconds,
        low,
        high,
        low,
        high,
        9,
        1000,
        1000 / microseconds,
        100 / microseconds,
        2000,
        0.0,
    )


def synthetic(one: Group, native: float = 200) -> list[Row]:
    """A native backend of 200 us forward and 400 us for the others, a plain one of two and four times that, a copy of 100 us."""
    rows = [row(one, "copy", "forward", 100, "copy")]
    for direction in one.directions:
        own = native * (1 if direction == "forward" else 2)
        rows.append(row(one, "native", direction, own, "fused"))
        rows.append(row(one, "pooled once", direction, 800 if direction != "forward" else 400))
        rows.append(row(one, "level by level", direction, 1600 if direction != "forward" else 800))
    return rows
