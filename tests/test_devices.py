"""What can run on which CUDA device, with stand-ins for the devices and NVIDIA's library."""

import types

import pytest
import torch

import ppcr_ext
from ppcr_ext import _dispatch, _native
from ppcr_ext._build import cuda, devices
from ppcr_ext._triton import operators

HOPPER, VOLTA = (9, 0), (7, 0)
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def machine(monkeypatch):
    """A CUDA library for two devices, one of which it does not fit. CUDA has not started."""
    found = types.SimpleNamespace(capabilities=[HOPPER, VOLTA], started=False, asked=[])

    def capability(index):
        assert found.started, "this would start CUDA"
        found.asked.append(index)
        return found.capabilities[index]

    def start(*_):
        raise AssertionError("this would start CUDA")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found.capabilities))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: found.started)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    for name in ("is_available", "_lazy_init", "current_device", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, start)
    monkeypatch.setattr(_native, "_cuda_reason", None)
    monkeypatch.setattr(_native, "cuda_architectures", lambda: "sm_80 sm_90 compute_90")
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(operators, "_why_no_triton", lambda: None)
    monkeypatch.setattr(operators, "_interpreted", lambda: False)
    questions = (_native._why_not_on, operators._why_not_on)
    for question in questions:
        question.cache_clear()
    yield found
    for question in questions:
        question.cache_clear()


class Nvml:
    """NVIDIA's management library of a machine: its functions, which write through pointers."""

    def __init__(self, capabilities, fails=None):
        self.capabilities, self.fails = capabilities, fails

    def nvmlInit_v2(self):
        return int(self.fails == "init")

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index + 1
        return int(self.fails == "handle")

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
        major._obj.value, minor._obj.value = self.capabilities[handle.value - 1]
        return int(self.fails == "capability")


@pytest.fixture
def nvml(machine, monkeypatch):
    def install(library):
        monkeypatch.setattr(devices, "_nvml", lambda: library)
        return library

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install(Nvml([HOPPER, VOLTA]))
    return install


def choose(device, name=None):
    return _dispatch.choose(name, types.SimpleNamespace(device=device), 7)


def test_a_device_that_cannot_run_leaves_the_other_alone(machine):
    machine.started = True
    assert choose(FIRST) == "native"
    with pytest.warns(RuntimeWarning, match=r"slow PyTorch reference .*compute capability 7\.0"):
        assert choose(SECOND) == "reference"
    assert choose(FIRST, "triton") == "triton"
    with pytest.raises(RuntimeError, match=r"device 1 has compute capability 7\.0, Triton needs"):
        choose(SECOND, "triton")
    with pytest.raises(RuntimeError, match=r"TORCH_CUDA_ARCH_LIST=7\.0"):
        choose(SECOND, "native")


def test_a_device_is_asked_once(machine):
    machine.started = True
    for _ in range(5):
        assert choose(FIRST) == "native"
        assert choose(FIRST, "triton") == "triton"
    assert machine.asked == [0, 0]  # once for each backend


def test_the_backends_are_named_without_starting_cuda(machine, nvml):
    """A process that has started CUDA cannot fork into others that use it."""
    found = ppcr_ext.backends()
    assert "cuda:0: usable; cuda:1: the CUDA library was compiled for" in found["native"]
    wanted = "cuda:0: usable; cuda:1: device 1 has compute capability 7.0, Triton needs 8.0"
    assert found["triton"] == wanted
    assert ppcr_ext.available_backends() == ("native", "triton", "reference")
    assert cuda.visible_architectures() == "7.0;9.0"  # an import with PPCR_JIT=1 asks for these


def test_alike_devices_are_one_line(machine, nvml):
    machine.capabilities = [HOPPER, HOPPER]
    nvml(Nvml([HOPPER, HOPPER]))
    assert ppcr_ext.backends()["native"].endswith("; cuda: usable")


def test_no_device(machine):
    machine.capabilities = []
    assert ppcr_ext.backends()["native"].endswith("; cuda: PyTorch sees no CUDA device")
    assert "triton" not in ppcr_ext.available_backends()


def test_the_interpreter_brings_no_device(machine, monkeypatch):
    monkeypatch.setattr(operators, "_interpreted", lambda: True)
    assert operators.why_not(torch.device("cpu")) is operators.why_not(FIRST) is None
    machine.capabilities = []
    assert operators.why_not(torch.device("cpu")) is None
    assert ppcr_ext.backends()["triton"] == "cuda: PyTorch sees no CUDA device"


@pytest.mark.parametrize("fails", ["init", "handle", "capability", "library", "torch"])
def test_what_only_starting_cuda_would_tell(machine, nvml, monkeypatch, fails):
    if fails == "library":
        monkeypatch.setattr(devices, "_nvml", missing_library)
    if fails == "torch":  # the private function that follows CUDA_VISIBLE_DEVICES
        monkeypatch.delattr(torch.cuda, "_get_nvml_device_index")
    nvml_library = Nvml([HOPPER, VOLTA], fails)
    if fails not in ("library", "torch"):
        nvml(nvml_library)
    assert "after torch.cuda.init() it is known" in ppcr_ext.backends()["triton"]
    assert "triton" not in ppcr_ext.available_backends()
    assert cuda.visible_architectures() is None
    machine.started = True  # then it is asked again
    assert "cuda:0: usable" in ppcr_ext.backends()["triton"]


def missing_library():
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


def test_the_devices_are_those_that_pytorch_sees(machine, nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine.capabilities = [VOLTA]
    assert devices.capability(0) == VOLTA
    assert "7.0" in ppcr_ext.backends()["triton"]


def test_what_was_said_before_cuda_started_is_not_kept(machine, nvml):
    """The management library may count the devices in another order."""
    nvml(Nvml([VOLTA, HOPPER]))
    assert "cuda:1: usable" in ppcr_ext.backends()["native"]
    machine.started = True
    assert choose(FIRST) == "native"
    assert "cuda:0: usable" in ppcr_ext.backends()["native"]
