"""The Python code in README.md and docs/ runs, block after block, and what it asserts holds."""

import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.full
pytest.importorskip("timm")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("page", "count"), [("README.md", 2), ("docs/usage.md", 7), ("docs/networks.md", 4)]
)
def test_code_runs(page, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    text = (ROOT / page).read_text()
    blocks = [
        (match[1], text[: match.start()].count("\n") + 1)
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]
    assert len(blocks) == count
    namespace = {"__name__": "__main__"}
    for code, line in blocks:
        exec(
            compile("\n" * line + code, page, "exec"), namespace
        )  # the lines of the page, for tracebacks


def test_what_is_named_exists():
    """Files that the pages name are in the repository."""
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for name in re.findall(
            r"`((?:examples|docs|benchmarks|csrc|tests|ppcr_ext|tools)/[\w./]+\.\w+)`",
            page.read_text(),
        ):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"
