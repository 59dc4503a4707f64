"""The files beside the code that people and tools expect say the same as the code."""

import ast
import importlib.util
import re
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest
import torch

import ppcr_ext
from ppcr_ext.__main__ import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(ppcr_ext.__file__).parent
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout"),
]
VERSION = ppcr_ext.__version__


def text(name):
    return (ROOT / name).read_text()


def yaml(name):
    from yaml import safe_load

    return safe_load(text(name))


# ---- the README, and what becomes of it in the metadata --------------------------------------


def description(*arguments):
    """As setup.py has it: without the package."""
    path = PACKAGE / "_build" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.description(*arguments)


def html(markdown_text):
    from readme_renderer import markdown

    return markdown.render(markdown_text)


def addresses(page):
    return re.findall(r'(?:href|src)="([^"]*)"', page)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = text("README.md")
    assert len(readme.splitlines()) <= 130
    relative = [where for where in addresses(html(readme)) if not re.match("https:|#", where)]
    assert len(relative) > 8
    for where in relative:
        assert (ROOT / where.partition("#")[0]).exists(), where
    for markers in ("gain", "results"):
        assert re.search(rf"<!-- {markers}:start -->\n.+\n<!-- {markers}:end -->", readme, re.S)


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (3, 8), (2, 8, 4, 3, 2)])
def test_the_readme_is_equivalent_to_the_layer(shape):
    *_, code = re.findall(r"^```python\n(.*?)^```$", text("README.md"), re.M | re.S)
    namespace = {"torch": torch}
    exec(code, namespace)
    x, weight, bias = torch.randn(shape), torch.randn(7), torch.randn(1)
    expected = namespace["ppcr"](x, weight, bias)
    torch.testing.assert_close(ppcr_ext.ppcr(x, weight, bias), expected, rtol=1e-4, atol=1e-5)
    layer = ppcr_ext.PPCR(shape[1])
    torch.nn.init.normal_(layer.weight)
    expected = namespace["ppcr"](x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x, x), (expected + x).relu(), rtol=1e-4, atol=1e-5)


def test_the_description_has_no_address_that_an_index_cannot_follow():
    page = html(description(text("README.md"), None, VERSION))
    assert page.count("<table>") == 3
    assert "█" in page
    assert all(re.match("https:|#", where) for where in addresses(page)), addresses(page)
    assert "installing (docs/installation.md)" in page


SAMPLE = """
![A picture](docs/a.png)

[A
page](docs/a.md), [there](https://example.org/a.md), [here](#a), [same.md](same.md), `[a](b)`.

```
[code](code)
```
"""


def test_links_and_pictures_of_the_description():
    without = description(SAMPLE, None, "1.2")
    assert "A picture" not in without
    same = "[there](https://example.org/a.md), [here](#a)"
    assert f"\nA\npage (docs/a.md), {same}, same.md, `[a](b)`.\n" in without
    assert "```\n[code](code)\n```" in without
    assert without.endswith("are in the source distribution.\n")
    public = description(SAMPLE, "https://example.org/us/it", "1.2")
    assert "![A picture](https://example.org/us/it/raw/v1.2/docs/a.png)" in public
    assert f"[A\npage](https://example.org/us/it/blob/v1.2/docs/a.md), {same}" in public
    assert "source distribution" not in public
    assert '<img src="https://example.org/us/it/raw/v1.2/docs/a.png"' in html(public)


def test_the_metadata_holds_the_description(tmp_path):
    """What setup.py hands to setuptools, with every field that an index shows or filters by."""
    program = (
        "import sys, setuptools.build_meta as backend;"
        "print(backend.prepare_metadata_for_build_wheel(sys.argv[1]))"
    )
    ask = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.dist-info/METADATA")
    metadata = message_from_string(file.read_text())
    assert metadata.get_payload().strip() == description(text("README.md"), None, VERSION).strip()
    page, prose = html(metadata.get_payload()), re.sub(r"(?ms)^```.*?^```", "", text("README.md"))
    assert page.count("<pre") == len(re.findall(r"^```\w", text("README.md"), re.M))
    assert len(re.findall("<h[12]", page)) == len(re.findall("^##? ", prose, re.M))
    assert metadata["Name"] == "ppcr_ext"
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Summary"]
    assert metadata["Keywords"]
    assert metadata["Author"]
    classifiers = metadata.get_all("Classifier")
    pythons = {c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)}
    assert pythons == {"3.10", "3.11", "3.12", "3.13"}
    assert "Typing :: Typed" in classifiers
    assert not any("License" in c for c in classifiers)  # PEP 639: the expression says it
    from trove_classifiers import classifiers as known

    assert set(classifiers) <= known
    urls = dict(value.split(", ") for value in metadata.get_all("Project-URL"))
    assert urls == {"Paper": "https://arxiv.org/abs/2303.01917v1"}


# ---- citation, version -------------------------------------------------------------------------


def check_schema(kind, *names):
    """By the schemas that check-jsonschema holds, without the network."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{kind}"]
    done = subprocess.run([*command, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_citation():
    check_schema("citation-file-format", "CITATION.cff")
    citation = yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == VERSION
    assert citation["license"] in text("pyproject.toml")
    (paper,) = citation["references"]
    assert (
        paper["title"].split() == re.search(r"\*(PPCR: .+?)\*", text("README.md"), re.S)[1].split()
    )
    assert paper["url"] == "https://arxiv.org/abs/2303.01917v1"


def test_a_release_has_one_date():
    """An unreleased version has none."""
    said = re.search(rf"^## {re.escape(VERSION)} \((.+)\)$", text("CHANGELOG.md"), re.M)[1]
    released = yaml("CITATION.cff").get("date-released")
    assert said == (str(released) if released else "unreleased")


# ---- continuous integration, templates, hooks --------------------------------------------------


def test_workflow_and_templates():
    check_schema("github-workflows", ".github/workflows/ci.yml")
    forms = [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("fault", "wish")]
    check_schema("github-issue-forms", *forms)
    check_schema("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml")
    (job,) = yaml(".github/workflows/ci.yml")["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"]
    for form in forms:
        asked = [part["attributes"]["label"] for part in yaml(form)["body"]]
        assert "Output of `python -m ppcr_ext --json`" in asked
    assert "python -m ppcr_ext" in text(".github/pull_request_template.md")


def test_the_workflow_has_every_python_that_is_promised():
    (job,) = yaml(".github/workflows/ci.yml")["jobs"].values()
    (setup,) = (s for s in job["steps"] if s.get("uses", "").startswith("actions/setup-python"))
    versions = setup["with"]["python-version"].split()
    named = re.findall(r"Python :: (3\.\d+)", text("pyproject.toml"))
    assert sorted(versions) == sorted(named)


def test_hooks_run_what_make_lint_runs():
    """With the tools of .venv, whose versions requirements/dev.txt pins."""
    config = yaml(".pre-commit-config.yaml")
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in hooks]
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", text("Makefile"), re.M)[1]
    commands = recipe.replace("$(BIN)/", ".venv/bin/").replace("$(CXX_FILES)", "")
    lines = [line.strip().removesuffix(" .").strip() for line in commands.splitlines()]
    assert entries == lines
    pinned = text("requirements/dev.txt")
    packages = {"lint-imports": "import-linter"}
    for entry in entries:
        tool = entry.split()[0].removeprefix(".venv/bin/")
        assert re.search(rf"^{packages.get(tool, tool)}==\d", pinned, re.M), tool
    (pattern,) = (hook["files"] for hook in hooks if hook["id"] == "clang-format")
    listed = subprocess.run(
        ["make", "--no-print-directory", "--eval", "list: ; @echo $(CXX_FILES)", "list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert len(listed) > 30
    assert all(re.search(pattern, name) for name in listed)


def test_no_file_of_code_is_long():
    kinds = {".py", ".h", ".cpp", ".cu", ".cuh"}
    folders = ("csrc", "ppcr_ext", "benchmarks", "tools", "tests", "examples")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in kinds]
    assert len(files) > 150
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}


# ---- what the reports and SECURITY.md say of the environment -----------------------------------


def variables_read():
    """Every variable of the environment that the sources of the package and setup.py read."""
    found = set()
    for path in [*PACKAGE.rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                parts = (node.value, node.slice)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                kind = node.func.attr
                parts = (node.func.value, node.args[0]) if kind in ("get", "setdefault") else None
            else:
                parts = None
            if parts and ast.unparse(parts[0]) == "os.environ" and path.name != "__main__.py":
                found.add(ast.literal_eval(parts[1]))
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]:
        found |= set(re.findall(r'(?:getenv|read)\("([A-Z_]+)"', path.read_text()))
    return found


def test_the_report_names_every_variable_that_is_read():
    read = variables_read()
    assert {"PPCR_PLAN", "PPCR_CPU_METHOD", "PPCR_JIT", "CXX"} <= read
    assert set(SETTINGS) == read


def test_security_names_every_variable_that_is_read():
    page = text("SECURITY.md")
    missing = [name for name in SETTINGS if not re.search(rf"`{name}\b", page)]
    assert not missing
