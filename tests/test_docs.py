"""The Python code in README.md and docs/ runs, block after block, and what it asserts holds. Links
and names of files, targets and anchors lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("timm")
ROOT = Path(__file__).parent.parent
BLOCKS = {
    "README.md": 2,
    "docs/api.md": 1,
    "docs/compilers.md": 4,
    "docs/getting_started.md": 4,
    "docs/index.md": 1,
    "docs/looking_inside.md": 3,
    "docs/networks.md": 4,
    "docs/training.md": 3,
}


def pages():
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/**/*.md")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(found)}


def blocks_of(text):
    """The code and the line of every Python block."""
    return [
        (match[1], text[: match.start()].count("\n") + 1)
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


def test_no_block_is_left_out():
    assert {page: len(found) for page, t in pages().items() if (found := blocks_of(t))} == BLOCKS


@pytest.mark.parametrize("page", BLOCKS)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    namespace = {"__name__": "__main__"}
    for code, line in blocks_of((ROOT / page).read_text()):
        # with the lines of the page, for tracebacks
        exec(compile("\n" * line + code, page, "exec"), namespace)


def test_what_is_named_exists():
    """Files and make's targets that the pages name."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for page, text in pages().items():
        for name in re.findall(
            r"`((?:examples|docs|benchmarks|csrc|tests|ppcr_ext|tools)/[\w./]+\.\w+)`", text
        ):
            assert (ROOT / name).is_file(), f"{page} names {name}"
        for name in re.findall(r"(?:^|`)make\s([a-z-]+)", text, re.M):
            assert name in targets, f"{page} names make {name}"


def anchors(text):
    """Those that Git hosts, and the built site, give to headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def broken_links(pages):
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            if "://" in target:
                continue
            path = Path(os.path.normpath(Path(page).parent / file)) if file else Path(page)
            exists = (ROOT / path).exists()
            if not exists or (anchor and anchor not in anchors(pages.get(str(path), ""))):
                yield f"{page}: {target}"


def test_links_lead_somewhere():
    assert list(broken_links(pages())) == []


def test_a_broken_link_is_seen():
    text = "# A page\n[a](README.md) [b](missing.md) [c](#a-page) [d](#b) [e](docs/api.md#none)\n"
    found = list(broken_links({"CHANGELOG.md": text, "docs/api.md": "# API"}))
    expected = ["missing.md", "#b", "docs/api.md#none"]
    assert found == [f"CHANGELOG.md: {target}" for target in expected]


def test_help_is_the_one_on_the_page():
    command = [sys.executable, "-W", "ignore", "-m", "ppcr_ext", "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"```text\n{done.stdout}```" in (ROOT / "docs" / "api.md").read_text()
