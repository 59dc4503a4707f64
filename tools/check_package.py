"""Checks the package as it is published: ``python tools/check_package.py [another python ...]``.

The sdist, and from it the wheel, go to dist/. Checked are the description (twine), the metadata as
far as no test reads it, the files in both (the sdist holds all that git tracks, byte for byte), and
types for a consumer (mypy --strict). The wheel is installed and run with this Python and with every
other one named (each has a PyTorch of its own). Exit status 1 with a sentence where something is
wrong. An installation without a compiler is a matter of tests/test_build.py.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

from readme_renderer import markdown

ROOT = Path(__file__).resolve().parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build" / "package"

# tests/test_conventions.py has the version, the classifiers and the addresses.
METADATA = {
    "Name": "ppcr_ext",
    "License-File": "LICENSE",
    "Requires-Python": ">=3.10",
    "Description-Content-Type": "text/markdown",
    "Summary": ".+",
    "Keywords": ".+",
    "Author": ".+",
}

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


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"PPCR_BUILD_CUDA": "0"} | environment
    words = list(map(str, command))
    return subprocess.run(words, cwd=WORK, env=settings, capture_output=True, text=True)


def call(*command: object, **environment: str) -> str:
    """What a command said. Ends the program where it failed."""
    done = run(*command, **environment)
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


def check_metadata(metadata: Message) -> None:
    for name, wanted in METADATA.items():
        if not re.fullmatch(wanted, metadata[name] or ""):
            raise SystemExit(f"the metadata: {name} is {metadata[name]!r}")
    html, readme = markdown.render(str(metadata.get_payload())), (ROOT / "README.md").read_text()
    prose = re.sub(r"^```.*?^```", "", readme, flags=re.M | re.S)
    shown = [len(re.findall(tag, html or "")) for tag in ("<pre", "<h[12]")]
    wanted_there = [len(re.findall(r"^```\w", readme, re.M)), len(re.findall("^##? ", prose, re.M))]
    if shown != wanted_there:
        what = "blocks of code and headings"
        raise SystemExit(f"the description shows {shown} {what}, README.md has {wanted_there}")


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
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        check_metadata(message_from_string(archive.read(name).decode()))
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
    for i, python in enumerate([sys.executable, *(Path(p).absolute() for p in sys.argv[1:])]):
        site = WORK / f"wheel{i}"
        call(python, *pip, "--no-index", "--no-cache-dir", "--target", site, wheel)
        print(call(python, "-c", SMOKE, PYTHONPATH=str(site)).strip())
    check_types(WORK / "wheel0")
    print(f"{sdist.name}, {wheel.name}: contents, metadata, types and installations are right")


if __name__ == "__main__":
    main()
