"""``python -m benchmarks.render``: writes measured figures into README.md and a page per device.

They come from benchmarks/results/. ``--take DIR`` first copies the complete files of a folder to
benchmarks/results/<device>/, or to the folder there that ``--name`` says, and draws them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from . import gain, pictures, shares
from .report import END, SECTIONS, START, headline, page, processors
from .results import read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def measured(folder: Path) -> list[Path]:
    """The measured files of a folder, or of a pattern of folders."""
    return sorted(p for stem in SECTIONS for p in folder.parent.glob(f"{folder.name}/{stem}.json"))


def devices(results: Path = RESULTS) -> list[Path]:
    """The folders of measured devices, GPUs first."""
    folders = {path.parent for path in measured(results / "*")}
    return sorted(folders, key=lambda path: (path.name.startswith("cpu"), path.name))


def section(results: Path = RESULTS) -> str:
    """The README's results as Markdown; a sentence where nothing is measured yet."""
    folders = devices(results)
    if not folders:
        return "No measured files yet."
    links = ", ".join(f"[{f.name}](benchmarks/results/{f.name}/README.md)" for f in folders)
    # Of further processors a line each.
    first = [folder for folder in folders if not folder.name.startswith("cpu-")]
    parts = [headline(folder) for folder in first]
    if len(folders) > len(parts):
        parts.append(f"Eight shapes on every processor:\n\n{processors(folders)}")
    faster = " ".join(filter(None, map(gain.losses, first)))
    parts.append(f"{faster} All figures, with errors and memory, and their files: {links}.")
    return "\n\n".join(parts)


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Every file that is made from measured ones, with what it should say."""
    results, readme = root / "benchmarks" / "results", root / "README.md"
    made = {folder / "README.md": page(folder) for folder in devices(results)}
    for file in sorted(results.glob("*/plans.json")):  # of tools/gpu_plans.py
        own = file.with_name("README.md")
        parts = (made.get(own), shares.page(json.loads(file.read_text())))
        made[own] = "\n".join(part for part in parts if part)
    text = between(readme.read_text(), START, END, section(results))
    if gain.START in text:
        text = between(text, gain.START, gain.END, gain.section(results, devices(results)))
    return {readme: text, **made}


def between(text: str, start: str, end: str, new: str) -> str:
    """The README with other lines between two markers."""
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"README.md must hold the markers {start} and {end}")
    return f"{before}{start}\n{new}\n{end}{after}"


def take(source: Path, results: Path = RESULTS, name: str = "") -> list[Path]:
    """Copies every complete JSON file, with its CSV, to its device's folder, and draws it there.

    ``name`` is that folder's where the device's own will not do, such as ``cpu-zen4``.
    """
    taken: list[Path] = []
    for path in measured(source):
        record = read(path)
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
