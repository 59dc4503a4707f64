"""Checks the package as it is published: ``python tools/check_package.py [another python ...]``.

The sdist, and from it the wheel, go to dist/. Checked are the description (twine), the files in
both (the sdist holds all that git tracks, byte for byte), and types for a consumer (mypy --strict).
The wheel is installed and run with this Python and with every other one named (each has a PyTorch
of its own). Exit status 1 with a sentence where something is wrong. The metadata is a matter of
tests/test_conventions.py, an installation without a compiler one of tests/test_build.py.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build" / "package"

SMOKE = """
import torch, ppcr_ext
assert ppcr_ext.available_backends()[0] == "native", ppcr_ext.backends()
layer = ppcr_ext.PPCR(8)
x = torch.randn(2, 8, 5, 7, requires_grad=True)
layer(x).sum().backward()
assert torch.allclose(layer(x), x / 2) and layer.weight.grad.shape == (7,)
where = f"with PyTorch {torch.__version__}: {ppcr_ext.__file__}"
print(f"ppcr_ext {ppcr_ext.__version__} runs {where}")
"""

CONSUMER = """
import torch
import ppcr_ext

layer: torch.nn.Module = ppcr_ext.PPCR(8, levels=(1, 2, 4), init_gate=0.9)
x = torch.zeros(1, 8, 3, 3)
y: torch.Tensor = ppcr_ext.ppcr(x, torch.zeros(7), torch.zeros(1), backend="native")
z: torch.Tensor = ppcr_ext.ppcr_add_relu(x, x, torch.zeros(7))
g: torch.Tensor = ppcr_ext.ppcr_gate(x, torch.zeros(7), levels=[1, 2, 4], eps=1e-5)
names: tuple[str, ...] = ppcr_ext.available_backends()
reasons: dict[str, str] = ppcr_ext.backends()
version: str = ppcr_ext.__version__
"""
WRONG_CONSUMER = "import ppcr_ext\nppcr_ext.PPCR('eight')\n"


def run(*command: object, cwd: Path = WORK, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"PPCR_BUILD_CUDA": "0"} | environment
    words = list(map(str, command))
    return subprocess.run(words, cwd=cwd, env=settings, capture_output=True, text=True)


def call(*command: object, cwd: Path = WORK, **environment: str) -> str:
    """What a command said. Ends the program where it failed."""
    done = run(*command, cwd=cwd, **environment)
    if done.returncode != 0:
        said = done.stdout[-6000:] + done.stderr[-6000:]
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed:\n{said}")
    return done.stdout + done.stderr


def build() -> tuple[Path, Path]:
    shutil.rmtree(DIST, ignore_errors=True)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
    call(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*-cp310-abi3-*.whl")
    return sdist, wheel


def tracked(*folders: str) -> set[str]:
    listing = ["ls-files", "--cached", "--others", "--exclude-standard", *folders]
    names = call("git", "-C", ROOT, *listing).splitlines()
    return {name for name in names if (ROOT / name).exists()}


def expect(what: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        lacks, besides = sorted(wanted - found), sorted(found - wanted)
        raise SystemExit(f"{what}: lacks {lacks}, holds besides {besides}")


def described(name: str, mode: int, content: bytes) -> str:
    program = "program " if mode & 0o100 else ""
    return f"{program}{name} {hashlib.sha256(content).hexdigest()[:8]}"


def check_files(sdist: Path, wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {f"ppcr_ext/{name}" for name in tracked("csrc")} | tracked("ppcr_ext")
    expect("the wheel", names, sources | {"ppcr_ext/_build.json", "ppcr_ext/_cpu.abi3.so"})

    # So its tests find what they read, and are those of a clone.
    generated = re.compile(r"PKG-INFO|setup\.cfg|ppcr_ext\.egg-info/.*")
    found = set()
    with tarfile.open(sdist) as archive:
        for member in archive:
            name, file = member.name.partition("/")[2], archive.extractfile(member)
            if file is not None and not generated.fullmatch(name):
                found.add(described(name, member.mode, file.read()))
    files = ((name, ROOT / name) for name in tracked())
    wanted = {described(name, path.stat().st_mode, path.read_bytes()) for name, path in files}
    expect("the sdist", found, wanted)


def check_types(site: Path) -> None:
    """As for what is installed, only the consumer's own lines are judged: hence silent."""
    options = ["--strict", "--follow-imports=silent", "--config-file=", "--cache-dir", "mypy"]
    for name, text, passes in (("right.py", CONSUMER, True), ("wrong.py", WRONG_CONSUMER, False)):
        (WORK / name).write_text(text)
        done = run(sys.executable, "-m", "mypy", *options, name, MYPYPATH=str(site))
        if (done.returncode == 0) != passes:
            raise SystemExit(f"mypy --strict of {name}: {done.stdout.strip()[-500:]}")


def main() -> None:
    if not (ROOT / ".git").exists():
        raise SystemExit("make package compares with what git tracks: run it in a clone")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    sdist, wheel = build()
    with zipfile.ZipFile(wheel) as archive:
        check_files(sdist, archive)
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
    for i, python in enumerate([sys.executable, *(Path(p).absolute() for p in sys.argv[1:])]):
        site = WORK / f"wheel{i}"
        call(python, *pip, "--no-index", "--no-cache-dir", "--target", site, wheel)
        print(call(python, "-c", SMOKE, PYTHONPATH=str(site)).strip())
    check_types(WORK / "wheel0")
    print(f"{sdist.name}, {wheel.name}: contents, types and installations are right")


if __name__ == "__main__":
    main()
