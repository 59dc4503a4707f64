"""docs/troubleshooting*.md: every message of the package stands there, with its remedy."""

import ast
import re
from pathlib import Path

import messages
import pytest

pytestmark = pytest.mark.full
ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```text\n(.*?)^```\n", re.M | re.S)


def sources():
    return [*sorted((ROOT / "ppcr_ext").rglob("*.py")), ROOT / "setup.py"]


def cpp_sources():
    return [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]


def entries(page):
    """One in a line of a block; an indented line goes on with the one before."""
    lines = "".join(FENCE.findall(page)).replace("\n  ", " ").splitlines()
    return list(messages.tidy(lines))


def missing(groups, listed):
    """Texts with a part that no entry of their message has."""
    for group in groups:
        found = " ".join(group.intersection(listed))
        for text in sorted(group):
            if not all(part in found for part in text.split(messages.VARIES)):
                yield text


@pytest.fixture(scope="module")
def groups():
    return [*messages.of_python(sources()), *messages.of_cpp(cpp_sources())]


@pytest.fixture(scope="module")
def page():
    return "".join(path.read_text() for path in (ROOT / "docs").glob("troubleshooting*.md"))


def test_every_message_is_on_the_page(groups, page):
    assert list(missing(groups, entries(page))) == []


def test_every_entry_is_a_message(groups, page):
    listed = entries(page)
    assert sorted(set(listed) - set().union(*groups)) == []
    assert sorted(text for text in set(listed) if listed.count(text) > 1) == []


def test_every_entry_has_a_remedy(page):
    """A paragraph follows every block: at least a sentence on the cause and one on the remedy."""
    for block in FENCE.finditer(page):
        paragraph = page[block.end() :].lstrip("\n").split("\n\n")[0]
        sentences = re.findall(r"[.:](?=\s|$)", paragraph)
        assert not paragraph.startswith(("```", "#", "|")), block[1]
        assert len(sentences) >= 2, f"{block[1]}{paragraph}"


def test_a_message_without_its_entry_is_missed(groups, page):
    listed = set(entries(page))
    said = [group for group in groups if group]
    assert len(said) > 100
    for group in said:
        assert set(missing([group], listed - group)) == group


PYTHON = """
NO_GPU = "no gpu"
def check(x):
    why = "since it is odd"
    if x == 1:
        raise ValueError(f"one: {x!r} is bad, {why}")
    if x == 2:
        warnings.warn("two " + why, RuntimeWarning)
    if x == 3:
        why = "for good"
        sys.exit(f"three {why}")
    raise type(error)(f"four {'more' if x else 'less'}")
def helper(x):
    return TypeError(f"five {x}")
def _why_not(x):
    reason = "six" if x else None
    return reason or other(x)
"""
CPP = r"""
PPCR_CHECK(f(x, "a"), name, " must be ", g(1, 2), " or \"b\"");
throw std::runtime_error("ppcr_ext: seven" + std::to_string(a) + " or "
                         "eight");
const char* f() { return "nine ten"; }
error = "eleven: " + item;
check_cuda(call(a, b), bad ? "twelve" : "thirteen it is");  // "no message"
"""


def test_every_kind_of_message_is_found(tmp_path):
    (tmp_path / "a.py").write_text(PYTHON)
    found = set().union(*messages.of_python([tmp_path / "a.py"]))
    assert found == {
        "no gpu",
        "one: … is bad, since it is odd",
        "two since it is odd",
        "three for good",
        "four more",
        "four less",
        "five …",
        "six",
    }
    (tmp_path / "a.h").write_text(CPP)
    found = set().union(*messages.of_cpp([tmp_path / "a.h"]))
    assert found == {
        '… must be … or "b"',
        "seven… or eight",
        "nine ten",
        "eleven: …",
        "twelve",
        "thirteen it is",
    }


def test_there_is_no_other_kind_of_message():
    """All that is raised is an exception with a text, or made by a function that returns one."""
    for path in sources():
        tree = ast.parse(path.read_text())
        makers = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                known = messages.RAISED.fullmatch(name) or name in makers
                assert known or name in ("type(error)", "SystemExit"), f"{path}: {name}"
    for path in cpp_sources():
        code = path.read_text()
        assert not re.search(r"throw (?!std::runtime_error\()|(?<!STD_)TORCH_CHECK\(", code), path
        assert path.name == "checks.h" or "STD_TORCH_CHECK(" not in code, path
