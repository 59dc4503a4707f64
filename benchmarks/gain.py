"""What the README says first: what the layer costs a network, and where a baseline is faster."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

from ppcr_ext.testing import LAYOUTS

from .report import BASELINES, BEST_COMPILED, call_of, headline_dtype, records, timed
from .results import Record, Row

START, END = "<!-- gain:start -->", "<!-- gain:end -->"
NETWORK = "resnet50"
# A bar of text, since an index of packages shows no picture that has no public address.
BARS = {
    "PPCR fused": "PPCR, this package",
    "PPCR plain": "PPCR, plain PyTorch",
    "SE": "SE",
    "CBAM": "CBAM",
}
PARTS = " ▏▎▍▌▋▊▉"  # eighths of a block, which stands for two percent


def bar(percent: float) -> str:
    eighths = max(0, round(4 * percent))
    return "█" * (eighths // 8) + PARTS[eighths % 8].strip()


def chart(rows: Sequence[Row]) -> str:
    """A line for each layer: what it adds to the network without attention, in percent."""
    lines = []
    for row in sorted(rows, key=lambda row: row.ratio or 0.0):
        ratios = [r for r in (row.ratio, row.ratio_low, row.ratio_high) if r is not None]
        if row.what in BARS and len(ratios) == 3:
            percent = [100 * (ratio - 1) for ratio in ratios]
            mean, low, high = map(round, percent)
            interval = f"({low} to {high} %)"
            lines.append(f"{BARS[row.what]:<20}{mean:>3} % {interval:<15} {bar(percent[0])}")
    return "\n".join(line.rstrip() for line in lines)


def section(results: Path, folders: Sequence[Path]) -> str:
    """The gain on the first device on which whole networks were measured, and on GPUs."""
    complete = [folder for folder in folders if (folder / "end_to_end.json").is_file()]
    parts = [gain(folder) for folder in complete[:1]] + [on_gpus(results)]
    return "\n\n".join(filter(None, parts)) or "No measured files yet."


def gain(folder: Path) -> str:
    """The gain in a sentence and a picture, from what was measured on the device of a folder."""
    found, parts = records(folder), list[str]()
    if record := found.get("operators"):
        plain, compiled = (speedup(record, what) for what in ("pooled once", BEST_COMPILED))
        if plain:
            means = f"{plain[0]} times (forward) and {plain[1]} times (with backward) as fast"
            beside = ", and {0} and {1} times as fast as what `torch.compile` makes of that"
            parts.append(f"It is **{means}** as in plain PyTorch")
            parts[-1] += f"{beside.format(*compiled) if compiled else ''}."
    record = found["end_to_end"]
    rows = [
        row
        for row in record.rows
        if (row.operator, row.direction, row.layout) == (NETWORK, "step", "contiguous")
        and "compiled" not in row.case
    ]
    if not rows:
        return fill(*parts)
    where = record.environment.get("cpu", record.environment["device"])
    parts.append(
        "What attention in every block adds to the time of a training step of ResNet-50, with "
        f"95 % intervals ({rows[0].threads} threads, {where}):"
    )
    return f"{fill(*parts)}\n\n```text\n{chart(rows)}\n```"


def speedup(record: Record, what: str) -> list[str]:
    """How many times as long as ours a formulation takes, forward and with backward: means over
    all inputs. Empty where it was not timed."""
    rows = [row for row in timed(record.rows) if row.dtype == headline_dtype(record)]
    rows = [row for row in rows if (row.operator, row.what) == ("ppcr", what) and row.over_fused]
    ratios = [
        [row.over_fused or 1 for row in rows if row.direction == direction]
        for direction in ("forward", "step")
    ]
    return [f"{geometric_mean(of):.1f}" for of in ratios] if all(ratios) else []


def fill(*parts: str) -> str:
    text = " ".join(parts)
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def on_gpus(results: Path) -> str:
    """What share of a copy's bandwidth the CUDA kernels reach, where tools/gpu_plans.py timed them:
    the range over the stages of a ResNet, in half precision."""
    lines = []
    for file in sorted(results.glob("*/plans.json")):
        found = json.loads(file.read_text())
        rows = [row for row in found["runs"][-1]["rows"] if row["dtype"] == "float16"]
        shares = {
            layout: [row["share"] for row in rows if row["layout"] == layout] for layout in LAYOUTS
        }
        ranges = " and ".join(
            f"{min(of):.2f} to {max(of):.2f} ({layout})" for layout, of in shares.items() if of
        )
        page = f"benchmarks/results/{file.parent.name}/README.md"
        lines.append(
            f"On an {found['device']}, in float16, it moves its bytes at {ranges} times the "
            f"bandwidth of a copy: [every size]({page})."
        )
    return fill(*lines)


def losses(folder: Path) -> str:
    """Every kind of cell in which a baseline is faster than ours."""
    found: dict[str, dict[str, list[float]]] = {}
    for stem, record in records(folder).items():
        for row in record.rows if stem in ("operators", "end_to_end", "scaling") else ():
            if row.kind in BASELINES and row.what != "none" and row.over_fused:
                place = f"{row.operator} {row.direction}" if row.kind == "network" else call_of(row)
                place += f" by {row.case}" if stem == "scaling" else ""
                place += " of a tiny tensor" if row.case.startswith("tiny") else ""
                found.setdefault(place, {}).setdefault(row.what, []).append(row.over_fused)
    texts = []
    for place, ratios in found.items():
        faster = [
            f"{what} {min(values):.2f} ({sum(value < 1 for value in values)} of {len(values)})"
            for what, values in ratios.items()
            if min(values) < 1
        ]
        texts += [f"{place}: {', '.join(faster)}"] * bool(faster)
    if not texts:
        return "No baseline is faster anywhere."
    what = "Where a baseline is faster, its least time over ours, and on how many inputs"
    return f"{what}: {'; '.join(texts)}."
