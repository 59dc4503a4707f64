"""The package on every PyTorch that it promises: ``python tools/test_versions.py --cells oldest``.

Each cell is a Python and a PyTorch in a virtual environment of their own, set up with the two
lines under Install in README.md. There the package is built from source and runs the core tests,
then the one wheel in dist/ (``make package``) those of its binary interface. Prints a table of the
counts, which also goes to build/versions/table.md; exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "versions"
SOURCES = ("csrc", "ppcr_ext", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BINARY_INTERFACE = ("test_definition.py", "test_pytorch.py", "test_edges.py")


@dataclasses.dataclass(frozen=True)
class Cell:
    name: str
    python: str
    torch: str  # "" for the newest
    cuda: bool = False  # builds the CUDA library too, for one architecture


CELLS = (
    Cell("oldest", "3.10", "2.10.0"),
    Cell("middle", "3.12", "2.11.0", cuda=True),
    Cell("newest", "3.13", ""),
)
CORE = "not full and not gpu and not slow"
TEST_TOOLS = ("numpy", "hypothesis", "pytest", "pytest-xdist")
PROCESSES = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")


class Failed(Exception):
    """A step of a cell failed; the message says which and how."""


def call(what: str, *command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What a command printed. Versions are named here: the machine's constraints do not hold."""
    settings = os.environ | {"PIP_CONSTRAINT": os.devnull, "PYTHONPATH": ""} | environment
    words = list(map(str, command))
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=cwd, env=settings, **both)
    if done.returncode != 0:
        raise Failed(f"{what}: {' '.join(words)}\n{done.stdout[-6000:]}")
    return done.stdout


def find_python(version: str) -> str:
    """An interpreter of a version such as 3.10, on PATH or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python")))
    for candidate in filter(None, found):
        # pyenv's names on PATH may stand for nothing
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return str(candidate)
    raise Failed(f"there is no python{version} on PATH; `pyenv install {version}` would do, too")


def readme_lines() -> tuple[str, str]:
    """The commands under Install: what to install first, and the package itself."""
    section = (ROOT / "README.md").read_text().partition("\n## Install\n")[2]
    first, second = re.findall(r"^pip (install .+)$", section, re.M)[:2]
    return first, second


def set_up(cell: Cell, folder: Path) -> Path:
    """A virtual environment with what README.md names, with the cell's PyTorch; its Python."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        call("virtual environment", find_python(cell.python), "-m", "venv", folder / "venv")
        wanted = [word.strip("'\"") for word in readme_lines()[0].split()]
        if cell.torch:
            wanted[wanted.index("torch")] = f"torch=={cell.torch}"
        call("PyTorch", python, "-m", "pip", *wanted)
        call("test tools", python, "-m", "pip", "install", *TEST_TOOLS)
    return python


def build(cell: Cell, folder: Path, python: Path) -> None:
    """The package from source, in a copy: two versions of PyTorch never share a build folder."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=built)
        else:
            shutil.copy(ROOT / name, source / name)
    cuda = {"PPCR_BUILD_CUDA": "1" if cell.cuda else "0", "TORCH_CUDA_ARCH_LIST": "9.0"}
    install = [*readme_lines()[1].split(), "--no-deps", "--force-reinstall"]
    call("build", python, "-m", "pip", *install, cwd=source, **cuda)
    said = call("report", python, "-m", "ppcr_ext", cwd=folder)
    if cell.cuda and not re.search(r"^CUDA archs +sm_90$", said, re.M):
        raise Failed(f"the CUDA library was not loaded:\n{said}")
    if not re.search(rf"^CPU library +{re.escape(str(folder))}.*_cpu\.abi3\.so$", said, re.M):
        raise Failed(f"the CPU library was not loaded from {folder}:\n{said}")


def tests(python: Path, report: Path, *selection: str, **environment: str) -> str:
    """Runs tests where the source tree cannot be imported by accident; their counts."""
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-m", CORE]
    options += [*PROCESSES, f"--junitxml={report}"]
    command = [python, "-m", "pytest", *options, *selection]
    try:
        said = call("tests", *command, cwd=ROOT / "tests", **environment)
    except Failed as error:
        print(error, flush=True)
        said = ""
    if not report.exists():
        return "did not run"
    suite = ElementTree.parse(report).getroot()[0]
    names = ("tests", "failures", "errors", "skipped")
    count, failures, errors, skipped = (int(suite.get(name, 0)) for name in names)
    failed = failures + errors
    if not said and not failed:
        return "did not end"
    return f"{count - failed - skipped} passed, {failed} failed, {skipped} skipped"


def try_wheel(folder: Path, python: Path) -> str:
    """The published binary beside this PyTorch."""
    found, site = sorted((ROOT / "dist").glob("*.whl"), key=os.path.getmtime), folder / "wheel"
    if not found:
        raise Failed("dist/ holds no wheel: make package")
    wheel = found[-1]
    shutil.rmtree(site, ignore_errors=True)
    install = ["install", "--no-deps", "--no-index", "--target", site, wheel]
    call("wheel", python, "-m", "pip", *install)
    ask = "import ppcr_ext; print(ppcr_ext._native.library())"
    where = call("wheel", python, "-c", ask, cwd=folder, PYTHONPATH=str(site))
    if not where.startswith(str(site)):
        raise Failed(f"the library of {wheel.name} was not loaded: {where}")
    return tests(python, folder / "wheel.xml", *BINARY_INTERFACE, PYTHONPATH=str(site))


def run(cell: Cell, build_only: bool, keep: bool) -> list[str]:
    """A row of the table."""
    began, folder = time.monotonic(), WORK / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    version, libraries, source, wheel = cell.torch or "newest", "none", "", ""
    try:
        python = set_up(cell, folder)
        version = call("version", python, "-c", "import torch; print(torch.__version__)").strip()
        build(cell, folder, python)
        libraries = "CPU, CUDA sm_90" if cell.cuda else "CPU"
        source = "not asked for" if build_only else tests(python, folder / "source.xml")
        wheel = "not asked for" if build_only else try_wheel(folder, python)
    except Failed as error:
        print(f"{cell.name}: {error}", flush=True)
        source = source or "failed"
        wheel = wheel or "failed"
    finally:
        if not keep:  # five gigabytes
            shutil.rmtree(folder, ignore_errors=True)
    seconds = f"{time.monotonic() - began:.0f}"
    return [cell.name, cell.python, version, libraries, source, wheel, seconds]


def render(rows: list[list[str]]) -> str:
    tests = ["core tests, from source", "the one wheel"]
    header = ["cell", "Python", "PyTorch", "libraries built", *tests, "seconds"]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def passed(counts: str) -> bool:
    pattern = r"not asked for|[1-9]\d* passed, 0 failed, \d+ skipped"
    return re.fullmatch(pattern, counts) is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ",".join(cell.name for cell in CELLS)
    parser.add_argument("--cells", default=names, help="default: %(default)s")
    parser.add_argument("--build-only", default="", help="cells whose tests are left out")
    parser.add_argument("--keep", action="store_true", help="keep the environments, 5 GB each")
    options = parser.parse_args()
    wanted = options.cells.split(",")
    build_only = [name for name in options.build_only.split(",") if name]
    for name in (*wanted, *build_only):
        if name not in names.split(","):
            parser.exit(2, f"{parser.prog}: error: there is no cell {name!r}; there are {names}\n")
    rows = []
    for cell in (cell for cell in CELLS if cell.name in wanted):
        which = f"Python {cell.python}, PyTorch {cell.torch or 'newest'}"
        print(f"== {cell.name}: {which}", flush=True)
        rows.append(run(cell, cell.name in build_only, options.keep))
        print(render(rows[-1:]), flush=True)
    table = render(rows)
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "table.md").write_text(table)
    print(table)
    return 0 if all(passed(row[4]) and passed(row[5]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
