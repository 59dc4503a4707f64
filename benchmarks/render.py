"""``python -m benchmarks.render``: writes the measured figures of benchmarks/results/ into README.md and a page for each device.

``--take DIR`` first copies the complete files of a folder into benchmarks/results/<device>/. With ``--check`` nothing is written:
exit status 1 if a page says something else than the files.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from . import pages, shares
from .pages import END, START

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARES = "plans.json"  # of tools/gpu_plans.py, with a page of its own


def devices(results: Path = RESULTS) -> list[Path]:
    """The folders of measured devices, GPUs first."""
    folders = results.iterdir() if results.is_dir() else []
    found = [path for path in folders if any(file.name != SHARES for file in path.glob("*.json"))]
    return sorted(found, key=lambda path: (path.name == "cpu", path.name))


def section(results: Path = RESULTS) -> str:
    """The README's results as Markdown; a sentence where nothing is measured yet."""
    folders = devices(results)
    parts = [pages.headline(folder) for folder in folders]
    links = ", ".join(
        f"[{folder.name}](benchmarks/results/{folder.name}/README.md)" for folder in folders
    )
    return "\n\n".join(
        [*parts, f"All figures, with errors and memory, and the files they come from: {links}."]
        if parts
        else ["No measured files yet."]
    )


def rendered(readme: str, results: Path = RESULTS) -> str:
    """The README's text with the section between its markers made anew."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the markers {START} and {END}")
    return f"{before}{START}\n{section(results)}\n{END}{after}"


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Every file that is made from measured ones, with what it should say."""
    results = root / "benchmarks" / "results"
    made = {folder / "README.md": pages.page(folder) for folder in devices(results)}
    for file in sorted(results.glob(f"*/{SHARES}")):
        page = file.with_name("README.md")
        made[page] = "\n".join(
            filter(None, (made.get(page), shares.page(json.loads(file.read_text()))))
        )
    readme = root / "README.md"
    return {readme: rendered(readme.read_text(), results), **made}


def take(source: Path, results: Path = RESULTS) -> list[Path]:
    """Copies every complete JSON file of a folder, and the CSV and pictures beside it, to the folder of its device."""
    taken = []
    for path in sorted(source.glob("*.json")):
        content = json.loads(path.read_text())
        if not content.get("complete", True):
            raise ValueError(
                f"{path} is incomplete: its run was interrupted (--resume finishes it)"
            )
        if content.get("settings", {}).get("quick"):
            raise ValueError(f"{path} was measured with --quick, a first impression and no result")
        device = re.sub(
            r"[^a-z0-9]+",
            "-",
            content["environment"].get("device", "cpu").lower().removeprefix("nvidia "),
        ).strip("-")
        target = results / device
        target.mkdir(parents=True, exist_ok=True)
        for one in (path, path.with_suffix(".csv"), *sorted(source.glob(f"{path.stem}*.png"))):
            if one.is_file():
                taken.append(Path(shutil.copy(one, target)))
    if not taken:
        raise ValueError(f"nothing measured in {source}: run make bench or make bench-full first")
    return taken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument(
        "--take", type=Path, metavar="DIR", help="copy what was measured from there first"
    )
    args = parser.parse_args(argv)
    if args.take is not None:
        try:
            print("\n".join(map(str, take(args.take))))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
    wrong = [
        (path, text)
        for path, text in texts().items()
        if not path.is_file() or path.read_text() != text
    ]
    for path, text in wrong:
        print(f"{path}: {'differs from the measured files' if args.check else 'written'}")
        if not args.check:
            path.write_text(text)
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
