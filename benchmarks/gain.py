"""What the README says first: what the layer gains a call, and what it costs a network."""

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean

from ppcr_ext.testing import LAYOUTS

from .report import PLAIN, records
from .results import Record, Row

START, END = "<!-- gain:start -->", "<!-- gain:end -->"
# Bars of text, since an index of packages shows no picture that has no public address.
BARS = {
    "PPCR fused": "PPCR, this package",
    "PPCR plain": "PPCR, plain PyTorch",
    "SE": "SE",
    "CBAM": "CBAM",
}
INTRODUCTION = (
    "What attention in every block adds to the time of a training step of ResNet-50, with 95 % "
    "intervals ({threads} threads, {cpu}):"
)
COMPILED = "what `torch.compile` makes of that"
NETWORK = "resnet50 4x3x224x224"
PARTS = " ▏▎▍▌▋▊▉"  # eighths of a block, which stands for two percent


def fill(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def chart(rows: Iterable[Row]) -> str:
    """A line for each layer: what it adds to the network without attention, in percent."""
    lines = []
    shown = [row for row in rows if row.what in BARS and row.case == NETWORK]
    for row in sorted(shown, key=lambda row: row.ratio or 0.0):
        if (row.direction, row.layout) == ("step", "contiguous"):
            ratios = (row.ratio, row.ratio_low, row.ratio_high)
            added, low, high = (round(100 * (ratio or math.nan) - 100) for ratio in ratios)
            eighths = max(0, 4 * added)
            bar = "█" * (eighths // 8) + PARTS[eighths % 8].strip()
            lines.append(f"{BARS[row.what]:<20}{added:>3} % {f'({low} to {high} %)':<15} {bar}")
    return "\n".join(line.rstrip() for line in lines)


def speedup(record: Record, what: str) -> str:
    """How many times as long as ours a formulation takes; empty where it was not timed."""
    ratios = [
        [row.over_fused or 1 for row in record.headline if (row.what, row.direction) == (what, d)]
        for d in ("forward", "step")
    ]
    if not all(ratios):
        return ""
    return "**{:.1f} times (forward) and {:.1f} times (with backward)**".format(
        *map(geometric_mean, ratios)
    )


def of_gpu(file: Path) -> str:
    """The range over the stages of a ResNet of what tools/gpu_plans.py timed in half precision."""
    found = json.loads(file.read_text())
    rows = [row for row in found["runs"][-1]["rows"] if row["dtype"] == "float16"]
    ranges = []
    for layout in LAYOUTS:
        shares = [row["share"] for row in rows if row["layout"] == layout]
        ranges.append(f"{min(shares):.2f} to {max(shares):.2f} ({layout})")
    return (
        f"On an {found['device']}, in float16, it moves its bytes at {' and '.join(ranges)} times "
        f"the bandwidth of a copy: [every size](benchmarks/results/{file.parent.name}/README.md)."
    )


def section(folders: Sequence[Path]) -> str:
    """The gain on the first device on which whole networks were measured, and on GPUs."""
    parts = []
    measured = (found for found in map(records, folders) if "end_to_end" in found)
    for found in list(measured)[:1]:
        gains = (
            [speedup(found["operators"], what) for what in PLAIN] if "operators" in found else []
        )
        sentences = [
            f"A call is {gain} as fast as {than}."
            for gain, than in zip(reversed(gains), ("in plain PyTorch", COMPILED), strict=False)
            if gain
        ]
        sentences.append(INTRODUCTION.format(**found["end_to_end"].environment))
        parts = [fill(" ".join(sentences)), f"```text\n{chart(found['end_to_end'].rows)}\n```"]
    files = [folder / "plans.json" for folder in folders]
    parts += [fill(of_gpu(file)) for file in files if file.is_file()]
    return "\n\n".join(parts) or "No measured files yet."
