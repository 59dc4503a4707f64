"""Imports go one way. ``make lint`` checks the packages with import-linter; here are the scripts,
which are no package."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imported(path):
    """The names of the modules that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names)


def check_order(folder):
    names = {
        ".".join(path.relative_to(folder).with_suffix("").parts): path
        for path in folder.rglob("*.py")
    }
    graph = {
        name: {other for other in imported(path) if other in names and other != name}
        for name, path in names.items()
    }
    return list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.skipif(not (ROOT / "tools").exists(), reason="needs a checkout")
@pytest.mark.parametrize("folder", ["tools", "tests", "examples"])
def test_no_two_scripts_import_each_other(folder):
    assert check_order(ROOT / folder)


def test_a_late_import_is_seen(tmp_path):
    (tmp_path / "one.py").write_text("import two\n")
    (tmp_path / "two.py").write_text("def f():\n    from one import g\n    return g\n")
    with pytest.raises(graphlib.CycleError):
        check_order(tmp_path)
