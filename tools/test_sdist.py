"""Tests the sdist of dist/ by itself: ``python tools/test_sdist.py [arguments of pytest]``.

It is unpacked into build/sdist, and gets the library of the wheel, which was built from it. Every
test file must be collected there with the same tests as here, and those that read files of the
repository run there, or what the arguments name. tools/check_package.py has compared its files with
the checkout's, so that the other tests would say what they say here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sdist"
# What reads the pages, the metadata and the measured files, and takes no minutes.
READERS = (
    "tests/test_baseline_traffic.py",
    "tests/test_benchmarks.py",
    "tests/test_check.py",
    "tests/test_conventions.py",
    "tests/test_docs.py",
    "tests/test_supply_chain.py",
)
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")


def unpack() -> Path:
    (sdist,), (wheel,) = (sorted((ROOT / "dist").glob(end)) for end in ("*.tar.gz", "*.whl"))
    shutil.rmtree(FOLDER, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(FOLDER, filter="data")
    (root,) = FOLDER.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in ("ppcr_ext/_build.json", "ppcr_ext/_cpu.abi3.so"):
            archive.extract(name, root)
    return root


def collected(root: Path) -> set[str]:
    done = subprocess.run(
        [*PYTEST, "--collect-only", "-q"], cwd=root, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"pytest --collect-only in {root} failed:\n{done.stdout[-5000:]}")
    return {line for line in done.stdout.splitlines() if "::" in line}


def main(arguments: list[str]) -> int:
    root = unpack()
    here, there = collected(ROOT), collected(root)
    if here != there:
        raise SystemExit(
            f"the sdist lacks the tests {sorted(here - there)[:9]}, and has besides "
            f"{sorted(there - here)[:9]}"
        )
    ask = "import ppcr_ext; print(ppcr_ext.__file__, *ppcr_ext.available_backends())"
    said = subprocess.run(
        [sys.executable, "-c", ask], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    if not said.startswith(str(root)) or "native" not in said:
        raise SystemExit(f"the sdist's own package, with its library, must be imported, not {said}")
    print(f"{len(there)} tests are collected from the sdist, as from the checkout", flush=True)
    return subprocess.run([*PYTEST, *(arguments or READERS)], cwd=root).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
