"""Checks the package as it is published: ``python tools/check_package.py [another python ...]``.

The sdist, and from it the wheel, go to dist/. Checked are the metadata (twine), the description as
an index of packages shows it, the files in both (the sdist holds all that git tracks, byte for
byte), one version everywhere, and types for a consumer (mypy --strict). The wheel is installed and
run with this Python and with every other one named (each has a PyTorch of its own), and the sdist
is installed where no compiler exists. Exit status 1 with a sentence where something is wrong.
"""

from __future__ import annotations

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

import tomllib
from readme_renderer import markdown

ROOT = Path(__file__).resolve().parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build" / "package"

SMOKE = """
import sys, torch, ppcr_ext
wanted = sys.argv[1]
assert ppcr_ext.available_backends()[0] == wanted, ppcr_ext.backends()
layer = ppcr_ext.PPCR(8)
x = torch.randn(2, 8, 5, 7, requires_grad=True)
layer(x).sum().backward()
assert torch.allclose(layer(x), x / 2) and layer.weight.grad.shape == (7,)
where = f"with PyTorch {torch.__version__}: {ppcr_ext.__file__}"
print(f"ppcr_ext {ppcr_ext.__version__} runs its {wanted} backend {where}")
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


def run(*command: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"PPCR_BUILD_CUDA": "0"} | environment
    kept = {name: value for name, value in settings.items() if value is not None}
    return subprocess.run(list(command), cwd=WORK, env=kept, capture_output=True, text=True)


def call(*command: str, **environment: str | None) -> str:
    """What a command said. Ends the program where it failed."""
    done = run(*command, **environment)
    if done.returncode != 0:
        said = done.stdout[-6000:] + done.stderr[-6000:]
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{said}")
    return done.stdout + done.stderr


def expect(what: str, found: object, wanted: object) -> None:
    if isinstance(found, set) and isinstance(wanted, set) and found != wanted:
        lacks, besides = sorted(wanted - found), sorted(found - wanted)
        raise SystemExit(f"{what}: lacks {lacks}, holds besides {besides}")
    if found != wanted:
        raise SystemExit(f"{what}: {found!r} instead of {wanted!r}")


def tracked(*folders: str) -> set[str]:
    listing = ["ls-files", "--cached", "--others", "--exclude-standard", *folders]
    names = call("git", "-C", str(ROOT), *listing).splitlines()
    return {name for name in names if (ROOT / name).exists()}


def build() -> tuple[Path, Path]:
    shutil.rmtree(DIST, ignore_errors=True)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST), str(ROOT))
    call(sys.executable, "-m", "twine", "check", "--strict", *map(str, DIST.iterdir()))
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> Message:
    """The files of both. The metadata of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(metadata_name).decode())
    sources = {f"ppcr_ext/{name}" for name in tracked("csrc")} | tracked("ppcr_ext")
    built = {"ppcr_ext/_build.json", "ppcr_ext/_cpu.abi3.so"}
    expect("the wheel", {name for name in names if ".dist-info/" not in name}, sources | built)

    # So its tests find what they read, and are those of a clone.
    generated = re.compile(r"PKG-INFO|setup\.cfg|ppcr_ext\.egg-info/.*")
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers() if not m.isdir()}
        members = {name: m for name, m in members.items() if not generated.fullmatch(name)}
        expect("the sdist", set(members), tracked())
        for name, member in members.items():
            file, original = archive.extractfile(member), ROOT / name
            if file is None or file.read() != original.read_bytes():
                raise SystemExit(f"the sdist: {name} is not that of the checkout")
            runs = bool(original.stat().st_mode & 0o100)
            expect(f"the sdist: whether {name} is a program", bool(member.mode & 0o100), runs)
    return metadata


def check_metadata(metadata: Message, wheel: Path) -> None:
    """Fields that an index shows and filters by. setup.py's build has checked the classifiers."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    wanted = {
        "Name": "ppcr_ext",
        "Version": version,
        "License-Expression": "BSD-3-Clause",
        "License-File": "LICENSE",
        "Requires-Python": ">=3.10",
        "Description-Content-Type": "text/markdown",
    }
    expect("the metadata", {name: metadata[name] for name in wanted}, wanted)
    for name in ("Summary", "Keywords", "Author", "Classifier", "Project-URL"):
        if not metadata[name]:
            raise SystemExit(f"the metadata: {name} is missing")
    tags = ["ppcr_ext", version, "cp310", "abi3"]
    expect("name of the wheel", wheel.name.split("-")[:4], tags)
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    if version not in headings and headings[:1] != ["Unreleased"]:
        raise SystemExit(f"CHANGELOG.md has no section on {version}")


def check_description(metadata: Message) -> None:
    """An index shows the description with its tables, code and chart, and no broken address."""
    html = markdown.render(str(metadata.get_payload()))
    if html is None:
        raise SystemExit("the description: readme_renderer refuses it")
    readme = (ROOT / "README.md").read_text()
    prose = re.sub(r"^```.*?^```", "", readme, flags=re.M | re.S)
    for what, found, wanted in (
        ("tables", html.count("<table>"), len(re.findall(r"^\| ?:?-", readme, re.M))),
        ("blocks of code", html.count("<pre"), len(re.findall(r"^```\w", readme, re.M))),
        ("headings", len(re.findall("<h[12]", html)), len(re.findall("^##? ", prose, re.M))),
    ):
        expect(f"the description: {what}", found, wanted)
    chart = re.search(r"^```text\n(.*?)^```", readme, re.M | re.S)
    if chart is None or not all(line in html for line in chart[1].splitlines()):
        raise SystemExit("the description: it does not show the chart")
    addresses = re.findall(r'(?:href|src)="([^"]*)"', html)
    broken = [where for where in addresses if not where.startswith(("https://", "#"))]
    expect("the description: relative addresses", broken, [])


def check_types(site: Path) -> None:
    """As for what is installed, only the consumer's own lines are judged: hence silent."""
    options = ["--strict", "--follow-imports=silent", "--config-file=", "--cache-dir", "mypy"]
    for name, text, passes in (("right.py", CONSUMER, True), ("wrong.py", WRONG_CONSUMER, False)):
        (WORK / name).write_text(text)
        done = run(sys.executable, "-m", "mypy", *options, name, MYPYPATH=str(site))
        said = done.stdout.strip()[-500:]
        expect(f"mypy --strict of {name} ({said})", done.returncode == 0, passes)


def install(python: str, what: Path, site: Path, **environment: str | None) -> str:
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
    offline = ["--no-index", "--no-cache-dir", "--no-build-isolation"]
    return call(*pip, *offline, "--target", str(site), str(what), **environment)


def check_without_compiler(sdist: Path) -> None:
    (WORK / "bin").mkdir()
    settings = {"PATH": str(WORK / "bin"), "CXX": None, "TORCH_EXTENSIONS_DIR": str(WORK / "cache")}
    site = WORK / "pure"
    said = install(sys.executable, sdist, site, **settings)
    if "ppcr_ext: CPU kernels: not built: no C++ compiler" not in said:
        raise SystemExit(
            f"the sdist, installed without a compiler, did not say so:\n{said[-3000:]}"
        )
    said = call(sys.executable, "-c", SMOKE, "reference", PYTHONPATH=str(site), **settings)
    reason = "the extension is not built"
    if f"slow PyTorch reference for cpu tensors: {reason} (no C++ compiler" not in said:
        raise SystemExit(f"the pure-Python package did not say why it is slow:\n{said}")
    if said.count(reason) != 1:
        raise SystemExit(f"the pure-Python package says more than once why it is slow:\n{said}")
    (wheel,) = site.glob("*.dist-info/WHEEL")
    tags = re.findall("^Tag: (.+)$", wheel.read_text(), re.M)
    expect("tag of the pure wheel", tags, ["py3-none-any"])
    print(said.splitlines()[0])


def main() -> None:
    if not (ROOT / ".git").exists():
        raise SystemExit("make package compares with what git tracks: run it in a clone")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    sdist, wheel = build()
    metadata = check_contents(sdist, wheel)
    check_metadata(metadata, wheel)
    check_description(metadata)
    for i, python in enumerate([sys.executable, *(str(Path(p).absolute()) for p in sys.argv[1:])]):
        site = WORK / f"wheel{i}"
        install(python, wheel, site)
        print(call(python, "-c", SMOKE, "native", PYTHONPATH=str(site)).strip())
    check_types(WORK / "wheel0")
    check_without_compiler(sdist)
    print(f"{sdist.name}, {wheel.name}: contents, metadata, types and installations are right")


if __name__ == "__main__":
    main()
