"""``python -m benchmarks.render``: writes measured figures into README.md and a page per device.

They come from benchmarks/results/. ``--take DIR`` first copies the complete files of a folder to
benchmarks/results/<device>/, or to the folder there that ``--name`` says, and draws them.
"""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean

from . import pictures
from .report import BEST_PLAIN, best_plain, headline, page, records, section
from .results import Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = "<!-- {}:{} -->"  # between two of them stands what is written into the README

# Bars of text, since an index of packages shows no picture that has no public address.
BARS = {"PPCR fused": "PPCR, this package", "PPCR plain": "PPCR, plain PyTorch"}
BARS |= {"SE": "SE", "CBAM": "CBAM"}
BESIDE = (
    "A call beside the fastest formulation in plain PyTorch, and beside what `torch.compile` makes "
    "of that; with backward in parentheses:"
)
CHART = (
    "What attention in every block adds to the time of a training step of ResNet-50, with 95 % "
    "intervals ({threads} threads, {cpu}; SE and CBAM are timm's):"
)
PARTS = " ▏▎▍▌▋▊▉"  # eighths of a block, which stands for two percent


fill = partial(textwrap.fill, width=100, break_long_words=False, break_on_hyphens=False)


def chart(rows: Iterable[Row]) -> str:
    """A line for each layer: what it adds to the network without attention, in percent."""
    lines = []
    wanted = ("resnet50", "step", "contiguous")
    shown = [row for row in rows if (row.operator, row.direction, row.layout) == wanted]
    for row in sorted(shown, key=lambda row: row.ratio or 0):
        if row.what in BARS and "compiled" not in row.case:
            ratios = (row.ratio, row.ratio_low, row.ratio_high)
            added, low, high = (round(100 * (ratio or 0) - 100) for ratio in ratios)
            eighths = max(0, 4 * added)
            bar = "█" * (eighths // 8) + PARTS[eighths % 8].strip()
            lines.append(f"{BARS[row.what]:<20}{added:>3} % {f'({low} to {high} %)':<15} {bar}")
    return "\n".join(line.rstrip() for line in lines)


def speedups(folder: Path) -> str:
    """A line about the formulations that were timed beside ours on a device, or nothing."""
    found = records(folder)
    if (record := headline(found)) is None:
        return ""
    ratios = best_plain(record)
    times = [[ratios.get((column, d)) for d in ("forward", "step")] for column in BEST_PLAIN]
    texts = [f"{geometric_mean(a):.1f} ({geometric_mean(b):.1f})" for a, b in times if a and b]
    if not texts:
        return ""
    env = record.environment
    where = f"{env['cpu']}, {env['threads']} threads" if env["device"] == "cpu" else env["device"]
    text = f"- **{where}, {record.rows[0].dtype}:** {' and '.join(texts)} times as fast"
    if "plans" in found:
        rows = [r for r in found["plans"].rows if (r.operator, r.dtype) == ("ppcr", "float16")]
        shares = [row.copy_fraction or 0 for row in rows]
        text += f", {min(shares):.2f} to {max(shares):.2f} of a copy's speed"
    return text


def gain(folders: Sequence[Path]) -> str:
    """The gain on every device, and a chart of the first on which whole networks were measured."""
    lines = [line for line in map(speedups, folders) if line]
    parts = [fill(BESIDE), "\n".join(lines)] if lines else []
    for found in [found for found in map(records, folders) if "end_to_end" in found][:1]:
        networks = found["end_to_end"]
        title = fill(CHART.format(**networks.environment))
        parts += [title, f"```text\n{chart(networks.rows)}\n```"]
    return "\n\n".join(parts) or "No measured files yet."


def devices(results: Path = RESULTS) -> list[Path]:
    """The folders of measured devices: GPUs first, then what was measured last."""

    def order(folder: Path) -> tuple[bool, str]:
        dates = [record.environment["date"] for record in records(folder).values()]
        return not folder.name.startswith("cpu"), max(dates, default="")

    return sorted({path.parent for path in results.glob("*/*.json")}, key=order, reverse=True)


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Every file that is made from measured ones, with what it should say."""
    results, readme = root / "benchmarks" / "results", root / "README.md"
    made = {folder / "README.md": page(folder) for folder in devices(results)}
    text = readme.read_text()
    for name, written in (("results", section), ("gain", gain)):
        start, end = MARKERS.format(name, "start"), MARKERS.format(name, "end")
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md must hold the markers {start} and {end}")
        text = f"{before}{start}\n{written(devices(results))}\n{end}{after}"
    return {readme: text, **made}


def take(source: Path, results: Path = RESULTS, name: str = "") -> list[Path]:
    """Copies every complete JSON file, with its CSV, to its device's folder, and draws it there."""
    # ``name`` is the folder's where the device's own will not do: ``cpu-zen4``.
    taken: list[Path] = []
    for stem, record in records(source).items():
        path = source / f"{stem}.json"
        if not record.complete:
            raise ValueError(f"{path} is incomplete: its run was interrupted (--resume goes on)")
        if record.settings.get("quick"):
            raise ValueError(f"{path} was measured with --quick, a first impression and no result")
        device = record.environment["device"].lower().removeprefix("nvidia ")
        target = results / (name or re.sub(r"[^a-z0-9]+", "-", device).strip("-"))
        target.mkdir(parents=True, exist_ok=True)
        taken += [Path(shutil.copy(path.with_suffix(end), target)) for end in (".json", ".csv")]
        taken += pictures.draw(record, target)
    if not taken:
        raise ValueError(f"nothing measured in {source}: run make bench or make bench-full first")
    return taken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.render", description=__doc__)
    parser.add_argument("--take", type=Path, metavar="DIR", help="copy what was measured there")
    parser.add_argument("--name", default="", help="folder for them, such as cpu-zen4")
    args = parser.parse_args(argv)
    try:
        if args.take is not None:
            print(*take(args.take, name=args.name), sep="\n")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in texts().items():
        if not path.is_file() or path.read_text() != text:
            print(f"{path}: written")
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
