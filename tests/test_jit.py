"""The JIT build's cache, with stand-ins for nvcc and the devices."""

import errno
import fcntl
import os
import shutil
import types
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ppcr_ext import _native
from ppcr_ext._build import cpu, cuda, devices, jit

pytestmark = pytest.mark.full
AMPERE, HOPPER, TURING = (8, 0), (9, 0), (7, 5)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The visible devices, what was compiled, and files that do not load. The CPU library stands
    in the cache already."""
    found = types.SimpleNamespace(capabilities=[AMPERE], compiled=[], damaged=set())

    def build(output, *_, **__):
        found.compiled.append(cuda.architectures(Path("nvcc")))
        output.write_text(found.compiled[-1])

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PPCR_BUILD_CUDA", "1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(devices, "count", lambda: len(found.capabilities))
    monkeypatch.setattr(devices, "capability", lambda index: found.capabilities[index])
    monkeypatch.setattr(cuda, "why_not", lambda version: None)
    monkeypatch.setattr(cuda, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(cuda, "_call", lambda command: "compute_75 compute_80 compute_90")
    monkeypatch.setattr(cuda, "build", build)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found.library = jit._folder(jit._name()) / f"{jit._name()}.so"
    found.library.parent.mkdir(parents=True)
    found.library.touch()
    return found


def build(machine):
    """The CUDA library that is taken, and what was compiled for it."""
    machine.compiled.clear()
    taken = jit.build(lambda path: "damaged" if path in machine.damaged else None, verbose=False)
    (library,) = taken[1]
    return library, machine.compiled


def test_the_cuda_library_is_compiled_once_for_what_is_wanted(machine, monkeypatch):
    """By one machine after the other, which share the cache."""
    ampere, compiled = build(machine)
    assert (ampere.read_text(), compiled) == ("sm_80", ["sm_80"])
    assert build(machine) == (ampere, [])
    machine.capabilities = [HOPPER]
    hopper, compiled = build(machine)
    assert (hopper.read_text(), compiled) == ("sm_90", ["sm_90"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    both, compiled = build(machine)
    assert (both.read_text(), compiled) == ("sm_80 sm_90", ["sm_80 sm_90"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build(machine) == (ampere, [])


def test_a_damaged_cuda_library_is_compiled_again(machine):
    path, _ = build(machine)
    machine.damaged.add(path)
    path.write_text("")
    assert build(machine) == (path, ["sm_80"])
    assert path.read_text() == "sm_80"


@pytest.fixture
def imported(machine, tmp_path, monkeypatch):
    """Imports the package, which finds nothing compiled beside itself, and says which CUDA library
    it takes."""

    def load():
        monkeypatch.setattr(_native, "library", None)
        monkeypatch.setattr(_native, "cuda_library", None)
        _native.load()
        assert _native.library == machine.library
        return _native.cuda_library and _native.cuda_library.read_text()

    monkeypatch.setattr(_native, "__file__", str(tmp_path / "empty" / "_native.py"))
    monkeypatch.setattr(
        _native, "_why_not_loaded", lambda path: "damaged" if path in machine.damaged else None
    )
    monkeypatch.setattr(_native, "_reason", None)
    monkeypatch.setattr(_native, "_cuda_reason", None)
    monkeypatch.delenv("PPCR_JIT", raising=False)
    return load


def test_an_import_takes_the_cuda_library_of_most_devices(machine, imported, monkeypatch):
    assert imported() is None
    assert "not built" in _native._cuda_reason
    newest = None
    for listed in ("8.0", "9.0", "8.0;9.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        before, (newest, _) = newest, build(machine)
        if before:
            os.utime(newest, ns=(0, before.stat().st_mtime_ns + 1))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert imported() == "sm_80 sm_90"
    shutil.rmtree(newest.parent)
    assert imported() == "sm_80"
    machine.capabilities = [HOPPER, HOPPER, AMPERE]
    assert imported() == "sm_90"
    machine.capabilities = [None]  # only starting CUDA would tell
    assert imported() == "sm_90"
    machine.capabilities = []
    (machine.library.parent / "work" / cuda.LIBRARY).write_text("of a build that was killed")
    assert imported() == "sm_90"


def test_a_damaged_cuda_library_does_not_hide_another(machine, imported, monkeypatch):
    good, _ = build(machine)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    newer, _ = build(machine)
    os.utime(newer, ns=(0, good.stat().st_mtime_ns + 1))
    assert imported() == "sm_80 sm_90"
    machine.damaged.add(newer)
    assert imported() == "sm_80"
    machine.damaged.add(good)
    assert imported() is None
    assert _native._cuda_reason.startswith("damaged; ")


def test_a_cuda_library_for_other_devices_is_not_loaded(machine, imported):
    """So that one for these can still be built and loaded in the same process."""
    build(machine)
    machine.capabilities = [TURING]
    assert imported() is None
    said = "the CUDA library is not built (none beside the CPU library"
    assert _native._cuda_reason.startswith(said)
    assert _native.build(verbose=False) == machine.library
    assert _native.cuda_library.read_text() == "sm_75"


def test_a_program_that_is_missing_is_not_a_cache_that_cannot_be_written(machine, monkeypatch):
    """As where nvcc or the host compiler goes away in the middle of a build."""

    missing = [f"{machine.library}-missing", "-c"]
    monkeypatch.setattr(cuda, "build", lambda *_, **__: cuda._run(missing))
    with pytest.raises(RuntimeError, match=r"-missing cannot be run \(.*No such file") as raised:
        build(machine)
    assert "cannot be written" not in str(raised.value)


def test_a_system_without_locks_is_a_cache_that_cannot_be_written(machine, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RuntimeError, match=r"cannot be written \(.*locks.*TORCH_EXTENSIONS_DIR"):
        build(machine)


def test_a_failed_build_can_be_repeated_in_the_process(machine, monkeypatch):
    """Also in another cache, as the message of one that cannot be written advises."""
    monkeypatch.setenv("PPCR_BUILD_CUDA", "0")
    attempts = []

    def compile(name, build_directory, **_):
        attempts.append(build_directory)
        if len(attempts) % 2:
            raise RuntimeError("the disk is full")
        Path(build_directory, f"{name}.so").write_text("compiled")

    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", compile)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: Path(path).read_text())
    for folder in ("one", "other"):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(machine.library.parent / folder))
        with pytest.raises(RuntimeError, match="the disk is full"):
            jit.build(lambda path: None, verbose=False)
        assert jit.build(lambda path: None, verbose=False)[0].read_text() == "compiled"
    assert len(attempts) == 4


def test_machines_of_two_kinds_may_share_a_cache(monkeypatch):
    names = set()
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        names.add(jit._name())
    assert len(names) == 2


@pytest.mark.parametrize(
    ("command", "host"),
    [
        ("", []),
        ("g++-12", ["-ccbin", "g++-12"]),
        ("ccache g++", ["-ccbin", "g++"]),
        (
            "ccache g++ -m64 -B /x",
            ["-ccbin", "g++", "-Xcompiler=-m64", "-Xcompiler=-B", "-Xcompiler=/x"],
        ),
    ],
)
def test_the_host_compiler_of_nvcc(command, host, monkeypatch):
    """nvcc takes the path of a compiler, and neither a launcher before it nor options after it."""
    monkeypatch.setenv("CXX", command)
    monkeypatch.setattr(cuda, "nvcc_version", lambda nvcc: "13.0")
    words = cuda._kernel_command(Path("nvcc"), "sm_90")
    begin = words.index("-O3") + 1
    assert words[begin : begin + len(host) + 1] == [*host, "--compress-mode=size"]
    assert cpu.host_compiler() == (command.split() or ["c++"])
