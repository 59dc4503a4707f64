"""``python -m benchmarks.render``: writes the measured figures of benchmarks/results/ into README.md.

With ``--check`` nothing is written: exit status 1 if the README says something else than the files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import files, report
from .suite import Result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
START, END = "<!-- results:start -->", "<!-- results:end -->"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(content: dict[str, Any]) -> str:
    env = content["environment"]
    return (
        f"{env['cpu']} ({env['capability']}), {env['threads']} threads, PyTorch {env['torch']}, "
        f"{content['rounds']} rounds, {env['date'][:10]}, commit {env['commit']}"
    )


def section(results: Path = RESULTS) -> str:
    """The README's results as Markdown; a sentence where nothing is measured yet."""
    shapes, retina = results / "shapes.json", results / "retina.json"
    if not shapes.is_file() or not retina.is_file():
        return "No measured files yet."
    content, sweep = files.read(shapes)
    summary = report.summarize(sweep)
    count = len({row.case for row in sweep.rows})
    parts = [
        f"Time over the floor (`x * 0.5`; for forward+backward `x * 0.5` plus `x + gy`), float32, geometric means over "
        f"{count} shapes in both layouts. Smaller is better, 1 is the least that any such layer can take. "
        f"{machine(content)}.",
        markdown_table(
            ["", "forward", "forward+backward"],
            [
                [f"**{name}**" if name in summary.worst else name, f"{summary.forward[name]:.2f}", f"{step:.2f}"]
                for name, step in summary.step.items()
            ],
        ),
    ]
    for name, worst in summary.worst.items():
        if not name.endswith(" compiled"):
            parts.append(
                f"On the shape where `{name}` does worst it takes {worst.ratio:.2f} times as long as the fastest plain "
                f"formulation ({worst.peer}; {worst.case}, {worst.layout}, {worst.mode})."
            )
    if summary.half:
        half = ", ".join(f"{name} {mean:.2f}" for name, mean in summary.half.items())
        parts.append(f"Half types, forward time over float32's: {half}.")
    content, real = files.read(retina)
    parts += [
        f"On the real feature maps of `make bench` ({machine(content)}), time over the floor:",
        real_table(real),
        "Largest relative errors against float64 there:",
        error_table(real),
        f"![Time over the floor, input by input]({(results / 'shapes.png').relative_to(ROOT).as_posix()})",
    ]
    return "\n\n".join(parts)


def real_table(result: Result) -> str:
    names = report.column_names(result)
    rows = []
    for (case, layout), columns in report.inputs(result).items():
        cells = [f"{columns[name].forward_ratio:.2f} / {columns[name].step_ratio:.2f}" for name in names]
        rows.append([f"{case}, {layout}", *cells])
    return markdown_table(["forward / forward+backward", *names], rows)


def error_table(result: Result) -> str:
    rows = []
    for backend, dtype in dict.fromkeys((row.backend, row.dtype) for row in result.errors):
        same = [row for row in result.errors if (row.backend, row.dtype) == (backend, dtype)]
        cells = []
        for quantity in ("y", "dx", "parameters"):
            largest = max(getattr(row.errors, quantity) for row in same)
            cells.append(f"{largest:.1e} (may be {getattr(same[0].limits, quantity):.0e})")
        rows.append([f"{backend}, {dtype}", *cells])
    return markdown_table(["", "y", "dx", "dweight, dbias"], rows)


def rendered(readme: str, results: Path = RESULTS) -> str:
    """The README's text with the section between its markers made anew."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the markers {START} and {END}")
    return f"{before}{START}\n{section(results)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = rendered(text)
    if args.check:
        return int(made != text)
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
