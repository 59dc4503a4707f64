"""The faults that ``make mutate`` plants still have their place in the sources."""

import importlib
from pathlib import Path

import pytest
from mutants import Mutant

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests" / "mutants").glob("[a-z]*.py"))
MUTANTS = [
    mutant for path in FILES for mutant in importlib.import_module(f"mutants.{path.stem}").MUTANTS
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.name}")
def test_planted(mutant):
    """Its texts are found, and it changes the source."""
    path = ROOT / ("ppcr_ext" if mutant.file.endswith(".py") else "csrc") / mutant.file
    if not path.parent.is_dir():
        pytest.skip("the sources are part of a checkout")
    source = path.read_text()
    assert mutant.planted(source) != source


def test_names_are_unique():
    names = [(mutant.file, mutant.name) for mutant in MUTANTS]
    assert len(names) == len(set(names))


def test_texts_match_whatever_their_spaces():
    source = "int one(int a) {\n  return a +\n         1;\n}\nint two(int a) { return a + 1; }\n"
    mutant = Mutant("", "", "return a + 1;", "return a;", after="int two(")
    assert mutant.planted(source).endswith("{ return a; }\n")
    mutant = Mutant("", "", "int one(int a) { return a + 1;", "x")
    assert mutant.planted(source).startswith("x\n}")
    with pytest.raises(ValueError, match="holds 2 times"):
        Mutant("", "", "return a + 1;", "").planted(source)
    with pytest.raises(ValueError, match="holds 0 times"):
        Mutant(
            "", "", "return a + 1;", "", after="return a + 1; } int two(int a) { return a + 1;"
        ).planted(source)
