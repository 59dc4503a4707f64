"""``python -m benchmarks.render``: writes measured figures into README.md and a page per device.

They come from benchmarks/results/. ``--take DIR`` first copies the complete files of a folder to
benchmarks/results/<device>/, or to the folder there that ``--name`` says, and draws them.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from . import pictures
from .report import END, START, page, records, section

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def devices(results: Path = RESULTS) -> list[Path]:
    """The folders of measured devices, GPUs first."""
    folders = {path.parent for path in results.glob("*/*.json")}
    return sorted(folders, key=lambda path: (path.name.startswith("cpu"), path.name))


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Every file that is made from measured ones, with what it should say."""
    results, readme = root / "benchmarks" / "results", root / "README.md"
    made = {folder / "README.md": page(folder) for folder in devices(results)}
    before, _, rest = readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the markers {START} and {END}")
    return {readme: f"{before}{START}\n{section(devices(results))}\n{END}{after}", **made}


def take(source: Path, results: Path = RESULTS, name: str = "") -> list[Path]:
    """Copies every complete JSON file, with its CSV, to its device's folder, and draws it there."""
    # ``name`` is that folder's where the device's own will not do, such as ``cpu-zen4``.
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
