"""The package on every PyTorch that it promises: ``python tools/test_versions.py --cells oldest``.

Each cell is a Python and a PyTorch in a virtual environment of their own, set up with the two
lines under Install in README.md. There the sdist in dist/ (``make package``) is built and runs the
core tests, then the one wheel in dist/ those of its binary interface. The first step that fails
ends its cell; exit status 1 where one did.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import check_package

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "versions"


class Cell(NamedTuple):
    python: str
    torch: str  # "" for the newest
    cuda: bool = False  # builds the CUDA library too, for one architecture


CELLS = {
    "oldest": Cell("3.10", "2.10.0"),
    "middle": Cell("3.12", "2.11.0", cuda=True),
    "newest": Cell("3.13", ""),
}
TEST_TOOLS = ("numpy", "hypothesis", "pytest", "pytest-xdist")
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
PYTEST += ["-m", "not full and not gpu and not slow"]
PYTEST += ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
BINARY_INTERFACE = ("test_definition.py", "test_pytorch.py", "test_edges.py")
# Versions are named here: the machine's constraints do not hold.
call = functools.partial(check_package.call, cwd=ROOT, PIP_CONSTRAINT=os.devnull, PYTHONPATH="")


def find_python(version: str) -> str:
    """An interpreter of a version such as 3.10, on PATH or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python")))
    for candidate in filter(None, found):
        # pyenv's names on PATH may stand for nothing
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return str(candidate)
    raise SystemExit(f"there is no python{version} on PATH: `pyenv install {version}` has one")


def set_up(cell: Cell, folder: Path) -> Path:
    """A virtual environment with the package, built from source as README.md says; its Python."""
    section = (ROOT / "README.md").read_text().partition("\n## Install\n")[2]
    first, second = re.findall(r"^pip (install .+)$", section, re.M)[:2]
    python, source = folder / "venv" / "bin" / "python", folder / "source"
    if not python.exists():
        call(find_python(cell.python), "-m", "venv", folder / "venv")
        wanted = [word.strip("'\"") for word in first.split()]
        wanted[wanted.index("torch")] += f"=={cell.torch}" if cell.torch else ""
        call(python, "-m", "pip", *wanted)
        call(python, "-m", "pip", "install", *TEST_TOOLS)
    shutil.rmtree(source, ignore_errors=True)  # two versions of PyTorch never share a build folder
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    shutil.unpack_archive(sdist, source, filter="data")
    cuda = {"PPCR_BUILD_CUDA": "1" if cell.cuda else "0", "TORCH_CUDA_ARCH_LIST": "9.0"}
    install = [*second.split(), "--no-deps", "--force-reinstall"]
    call(python, "-m", "pip", *install, cwd=next(source.iterdir()), **cuda)
    return python


def check_library(python: Path, folder: Path, *lines: str, **environment: str) -> None:
    """The CPU library of this folder is the one that is loaded, and the report has these lines."""
    said = call(python, "-m", "ppcr_ext", cwd=folder, **environment)
    print(said, flush=True)
    for line in (rf"CPU library +{re.escape(str(folder))}/.*_cpu\.abi3\.so", *lines):
        if not re.search(f"^{line}$", said, re.M):
            raise SystemExit(f"python -m ppcr_ext does not say {line!r}")


def test(python: Path, *files: str, **environment: str) -> None:
    """Runs tests where the source tree cannot be imported by accident."""
    said = call(python, *PYTEST, *files, cwd=ROOT / "tests", **environment)
    passed = re.search(r"^\d+ passed.*$", said, re.M)
    if passed is None:  # pytest itself is content where every test is skipped
        raise SystemExit(f"no test passed\n{said[-2000:]}")
    print(passed[0], flush=True)


def run(cell: Cell, folder: Path, build_only: bool) -> None:
    python, site = set_up(cell, folder), folder / "wheel"
    check_library(python, folder / "venv", *(["CUDA archs +sm_90"] if cell.cuda else []))
    if build_only:
        return
    test(python)
    shutil.rmtree(site, ignore_errors=True)
    (wheel,) = (ROOT / "dist").glob("*.whl")
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    check_library(python, site, PYTHONPATH=str(site))
    test(python, *BINARY_INTERFACE, PYTHONPATH=str(site))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ",".join(CELLS)
    parser.add_argument("--cells", default=names, help="default: %(default)s")
    parser.add_argument("--build-only", default="", help="cells whose tests are left out")
    parser.add_argument("--keep", action="store_true", help="keep the environments, 5 GB each")
    options = parser.parse_args()
    wanted, build_only = options.cells.split(","), options.build_only.split(",")
    if unknown := {*wanted, *filter(None, build_only)} - set(CELLS):
        parser.error(f"there is no cell {', '.join(map(repr, unknown))}; there are {names}")
    failed = []
    for name in wanted:
        cell = CELLS[name]
        print(f"== {name}: Python {cell.python}, PyTorch {cell.torch or 'newest'}", flush=True)
        (WORK / name).mkdir(parents=True, exist_ok=True)
        try:
            run(cell, WORK / name, name in build_only)
        except SystemExit as error:
            print(f"{name}: {error}", flush=True)
            failed.append(name)
        finally:
            if not options.keep:
                shutil.rmtree(WORK / name, ignore_errors=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
