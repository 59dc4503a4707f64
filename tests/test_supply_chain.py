"""What the package does not do: use the network, or unpickle what it did not write. And there is
one version everywhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ppcr_ext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(ppcr_ext.__file__).parent

OFFLINE = """
import sys
def audit(event, arguments):
    network = event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib."))
    if network and event not in ("socket.__new__", "socket.gethostname"):
        raise RuntimeError(f"the network was touched: {event} {arguments}")
sys.addaudithook(audit)
import runpy, torch, ppcr_ext
layer = ppcr_ext.PPCR(8)
x = torch.randn(2, 8, 5, 5, requires_grad=True)
layer(x).sum().backward()
layer.add_relu(x, x)
layer.gate(x)
runpy.run_module("ppcr_ext", run_name="__main__")
"""


def test_no_network_at_import_and_run_time():
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert ppcr_ext.__version__ in done.stdout
    touched = OFFLINE + "import socket; socket.create_connection(('127.0.0.1', 9), 1)\n"
    done = subprocess.run(
        [sys.executable, "-c", touched],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "the network was touched" in done.stderr


def python_files():
    folders = [PACKAGE, *(ROOT / name for name in ("benchmarks", "tools", "examples", "tests"))]
    return sorted({path for folder in folders if folder.is_dir() for path in folder.rglob("*.py")})


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout")
def test_pickles_are_loaded_with_weights_only():
    """torch.load says weights_only=True; whole pickles are only loaded by tests of pickling."""
    files = python_files()
    assert len(files) > 30
    for path in files:
        tree = ast.parse(path.read_text(), str(path))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            where = f"{path}:{node.lineno}: {name}"
            if name in ("torch.load", "load_state_dict_from_url"):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                allowed = ("True", "False") if path.parent == ROOT / "tests" else ("True",)
                assert keywords.get("weights_only") in allowed, where
            if name in ("pickle.load", "pickle.loads", "joblib.load") or name.endswith("hub.load"):
                assert path.parent == ROOT / "tests", where


LOADS = {  # what runs code that is not Python's: SECURITY.md has a line for each
    ("_native.py", "ctypes.CDLL"),
    ("_native.py", "torch.ops.load_library"),
    ("devices.py", "ctypes.CDLL"),
    ("jit.py", "cpp_extension.load"),
    ("cpu.py", "subprocess.run"),
    ("cuda.py", "subprocess.run"),
}
DANGEROUS = re.compile(
    r"(.+\.)?(eval|exec|compile|__import__|CDLL|PyDLL|LoadLibrary|load_library|load|loads|load_inline"
    r"|system|popen|Popen|run|check_output|check_call|call|spawn\w*|exec[lv]\w*)"
)
HARMLESS = {"json.loads", "re.compile", "_native.load", "_registration.load", "tl.load"}


def test_the_places_that_load_code_are_known():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if DANGEROUS.fullmatch(name) and name not in HARMLESS:
                    found.add((path.name, name))
    assert found == LOADS


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout")
def test_one_version():
    """It stands in pyproject.toml; everything else reads it there."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert ppcr_ext.__version__ == version
    assert re.search(rf"^## {re.escape(version)}", (ROOT / "CHANGELOG.md").read_text(), re.M)
    for path in [*PACKAGE.glob("*.py"), ROOT / "setup.py"]:
        assert f'"{version}"' not in path.read_text(), path


@pytest.mark.skipif(not (ROOT / "requirements").exists(), reason="needs a checkout")
def test_tools_are_pinned_with_hashes():
    """What is named is in the lists, one exact version each, and the hash of every file that may be
    downloaded is known."""
    for names, target in ((("torch", "dev"), "dev"), (("minimal",), "minimal")):
        wanted = [
            line
            for name in names
            for line in (ROOT / "requirements" / f"{name}.in").read_text().splitlines()
        ]
        text = (ROOT / "requirements" / f"{target}.txt").read_text().replace("\\\n", "")
        pinned = [line for line in text.splitlines() if not line.startswith("#")]
        for line in pinned:
            assert re.fullmatch(
                r"[a-z0-9.-]+==[\w.]+( ; [^#]*?)?(\s+--hash=sha256:[0-9a-f]{64})+", line
            ), line[:100]
        versions = {line.split()[0] for line in pinned}
        assert len(pinned) == len(versions) > 10
        for line in wanted:
            name = re.sub(r"\[.*\]", "", line.lower().replace("_", "-"))  # an extra is other lines
            assert line.startswith("#") or name in versions, f"{line}: make lock"
