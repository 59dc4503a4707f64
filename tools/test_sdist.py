"""Runs ``make test`` in the unpacked sdist: ``python tools/test_sdist.py [arguments of pytest]``.

The sdist of dist/ goes to build/sdist, and gets a virtual environment that has the packages of this
one, but for ppcr_ext: ``make`` builds the sdist's own. Needs ``make package``, which has compared
the sdist's files with the checkout's, so that these are the checkout's tests.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sdist"


def unpack() -> Path:
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    shutil.rmtree(FOLDER, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(FOLDER, filter="data")
    (root,) = FOLDER.iterdir()
    return root


def make_environment(folder: Path) -> Path:
    """Its Python. The .pth files of this environment, such as ppcr_ext's, have no effect in it."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    (folder / ".installed-pinned").touch()  # for make: nothing is left to install
    return python


def main(arguments: list[str]) -> int:
    root = unpack()
    python = make_environment(root / ".venv")
    subprocess.run(["make", "setup"], cwd=root, check=True)
    ask = [str(python), "-c", "import ppcr_ext; print(ppcr_ext.__file__)"]
    said = subprocess.run(ask, cwd=root / "tests", stdout=subprocess.PIPE, text=True, check=True)
    if not said.stdout.startswith(f"{root}/"):
        raise SystemExit(f"the sdist's own package must be imported, not {said.stdout}")
    return subprocess.run(
        ["make", "test", f"PYTEST_ARGS={shlex.join(arguments)}"], cwd=root
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
