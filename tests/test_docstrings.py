"""Every public name has a docstring with all sections that apply, and its examples run."""

import builtins
import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import ppcr_ext
from ppcr_ext import networks, testing

pytestmark = pytest.mark.full
torchvision = pytest.importorskip("torchvision")

ROOT = Path(__file__).parent.parent
MODULES = {ppcr_ext: ppcr_ext.__all__, networks: networks.__all__, testing: testing.__all__}
# These have no errors of their own to document.
NEVER_RAISE = {
    "PPCR.extra_repr",
    "PPCR.reset_parameters",
    "Errors",
    "Errors.share_of",
    "Errors.within",
    "Inserted",
    "PPCRBasicBlock",
    "PPCRBottleneck",
    "Inputs",
    "Inputs.has_residual",
    "Truth",
    "Truth.error",
    "Truth.errors",
    "available_backends",
    "backends",
    "evaluate",
    "relative",
    "truth",
}
TITLES = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")


def public():
    """(name, object) of every public function and class, and of the methods that they define."""
    found = {}
    for module, names in MODULES.items():
        for name in names:
            value = getattr(module, name)
            if not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            found[name] = value
            for attribute, method in vars(value).items() if inspect.isclass(value) else ():
                if attribute.startswith("_"):
                    continue
                if isinstance(method, property) or inspect.isfunction(method):
                    found[f"{name}.{attribute}"] = method
    return found


PUBLIC = public()


def sections(doc):
    """The text of each section; "" has the summary."""
    found, title = {"": []}, ""
    for line in inspect.cleandoc(doc).splitlines():
        if line.removesuffix(":") in TITLES and line.endswith(":"):
            title = line[:-1]
            assert title not in found, f"{title} stands twice"
            found[title] = []
        else:
            found[title].append(line)
    return {title: "\n".join(lines).strip("\n") for title, lines in found.items()}


def entries(section):
    """The names before the colons of a section: ``a, b: text``."""
    names = re.findall(r"^    (\w[\w, ]*): \S", section, re.M)
    return [name.strip() for entry in names for name in entry.split(",")]


def wrong_in(name, value, doc):
    """What a docstring lacks, or has too much."""
    found = sections(doc or "")
    if not found[""]:
        return ["no summary"]
    wrong = []
    is_property = isinstance(value, property)
    signature = inspect.signature(value.fget if is_property else value)
    arguments = [argument for argument in signature.parameters if argument != "self"]
    if entries(found.get("Args", "")) != arguments:
        wrong.append(f"Args has {entries(found.get('Args', ''))}, the signature {arguments}")
    is_method, is_class = "." in name, inspect.isclass(value)
    gives = not is_class and not is_property and signature.return_annotation not in (None, "None")
    of_result = "Yields" if inspect.isgeneratorfunction(inspect.unwrap(value)) else "Returns"
    if gives != bool(found.get(of_result)):
        wrong.append(f"{of_result} does not go with {signature.return_annotation}")
    if re.search(r":\s", found.get(of_result, "")):
        wrong.append(f"{of_result} has a colon, before which a type is expected")
    if bool(found.get("Raises")) == (name in NEVER_RAISE):
        wrong.append("Raises is missing, or NEVER_RAISE names it")
    for error in entries(found.get("Raises", "")):
        if not issubclass(getattr(builtins, error, int), Exception):
            wrong.append(f"{error} is no exception")
    example = found.get("Example", "")
    if is_method and not example:  # then that of the class shows it
        owner, _, method = name.partition(".")
        example = sections(PUBLIC[owner].__doc__).get("Example", "")
        if f".{method}" not in example:
            wrong.append("no Example, and none in that of its class")
    elif not re.search(r"^    >>> ", example, re.M):
        wrong.append("no Example")
    return wrong


@pytest.mark.parametrize("name", PUBLIC)
def test_all_sections_are_there(name):
    assert wrong_in(name, PUBLIC[name], PUBLIC[name].__doc__) == []


@pytest.mark.parametrize("name", PUBLIC)
def test_a_section_that_is_taken_away_is_missed(name):
    """So is an argument, one that does not exist, and the docstring itself."""
    value, doc = PUBLIC[name], inspect.cleandoc(PUBLIC[name].__doc__)
    assert wrong_in(name, value, None)
    for title in set(sections(doc)) & set(TITLES) - {"Attributes"}:
        without = re.sub(rf"^{title}:\n(?:    .*\n?|\n(?=    ))*", "", doc, flags=re.M)
        assert without != doc
        assert wrong_in(name, value, without), title
    for entry in re.findall(r"^    \w[\w, ]*: .*$", sections(doc).get("Args", ""), re.M):
        assert wrong_in(name, value, doc.replace(f"{entry}\n", "")), entry
        assert wrong_in(name, value, doc.replace(entry, f"    none: such\n{entry}")), entry


@pytest.mark.parametrize("name", [*PUBLIC, "testing"])
def test_examples_run(name):
    names = {"torch": torch, "ppcr_ext": ppcr_ext, "testing": testing, "torchvision": torchvision}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    (example,) = finder.find(PUBLIC.get(name, testing), name, globs=names)
    said = []
    runner.run(example, out=said.append)
    assert not said, "".join(said)


def test_the_reference_has_every_name():
    """autodoc writes what the page names."""
    page = (ROOT / "docs" / "api.md").read_text()
    assert "\n.. automodule:: ppcr_ext.testing\n   :members:\n" in page
    for name in testing.__all__:
        assert not name.isupper() or f"\n.. py:data:: {name}\n" in page, name
    for module, names in MODULES.items():
        for name in names if module is not testing else ():
            value = getattr(module, name)
            kind = "class" if inspect.isclass(value) else "function"
            at = "ppcr_ext" if name in ppcr_ext.__all__ else module.__name__
            if not inspect.ismodule(value):
                assert f"\n.. auto{kind}:: {at}.{name}\n" in page, name
