"""Four devices: one as a data centre has it, one of the same architecture with less shared memory,
fewer multiprocessors and no clusters, one that the library holds no code for, and one with a single
multiprocessor."""

import pytest
import torch
from cuda_host import hooks
from emulated import LEVELS_EPS, OPS, case, check, check_forward, direct, every_operator, forward

import ppcr_ext
from ppcr_ext import _dispatch, _native

LARGE, SMALL, UNKNOWN, SINGLE = (torch.device("cuda", index) for index in range(4))


def test_every_device_gets_its_own_plan():
    """The same shape on both, in turn: clusters here, none and less shared memory there."""
    seen = {LARGE: set(), SMALL: set()}
    for device in (LARGE, SMALL, LARGE):
        hooks.forget()
        check(case(shape=(2, 1024, 14, 14), device=device))
        check(case(shape=(1, 128, 16, 16), levels=(64,), device=device))
        found = hooks.launches()
        assert {launch.device for launch in found} == {device.index}
        seen[device] |= {(launch.cluster, launch.shared, launch.early) for launch in found}
    assert max(cluster for cluster, _, _ in seen[LARGE]) > 1
    assert all(early for _, _, early in seen[LARGE])
    assert {(cluster, early) for cluster, _, early in seen[SMALL]} == {(1, False)}
    assert max(shared for _, shared, _ in seen[SMALL]) <= 99 << 10


def test_every_plan_asks_for_the_same_shared_memory():
    """The limit belongs to a kernel on its device: what another thread launches must not change it.

    Two shapes whose plans take different amounts of it, in the forward and the backward pass.
    """
    for side in (16, 20):
        direct(case(shape=(1, 128, side, side), levels=(64,), device=LARGE))
    taken, limits = {}, {}
    for launch in hooks.launches():
        if launch.shared > 48 << 10:
            taken.setdefault(launch.kernel, set()).add(launch.shared)
    for device, limit, kernel in hooks.allowances():
        limits.setdefault(kernel, set()).add((device, limit))
    assert [len(shared) for shared in taken.values()] == [2, 2]
    assert limits == {kernel: {(LARGE.index, 227 << 10)} for kernel in taken}


@pytest.mark.parametrize("cluster", [1, 2])
def test_every_dtype_asks_what_the_device_holds(cluster, monkeypatch):
    """float16 and bfloat16 have one size but kernels of their own, so that no order decides."""
    monkeypatch.setenv("PPCR_PLAN", f"cluster={cluster}")
    asked = []
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        direct(case(shape=(3, 1024, 11, 11), device=LARGE, dtype=dtype))
        asked.append(hooks.questions())
    assert asked == [asked[0], asked[0] + 2, asked[0] + 2]


def test_a_device_that_holds_no_cluster(monkeypatch):
    """Of 8 blocks, where the only multiprocessor holds 4. The grid is then one cluster, and not as
    many as the device holds of the finishing kernel."""
    monkeypatch.setenv("PPCR_PLAN", "q=49,cluster=8")
    direct(case(shape=(6, 1024, 7, 7), device=SINGLE))
    (backward,) = (launch for launch in hooks.launches() if "backward" in launch.kernel)
    assert backward.blocks == backward.cluster == 8


@every_operator
def test_device_that_is_not_the_current_one(operator):
    """It stays what it was, and all results are on x's device."""
    c = case(operator, device=SMALL)
    y, gradients = direct(c)
    assert torch.cuda.current_device() == 0
    assert {t.device for t in (y, *gradients)} == {SMALL}
    assert {(launch.device, launch.stream) for launch in hooks.launches()} == {(1, 0)}
    check(c)
    assert torch.cuda.current_device() == 0


def test_current_stream_of_another_device():
    """With a stream of one device current, a tensor of another one runs on that one's own."""
    c = case(device=LARGE)
    with torch.cuda.stream(torch.cuda.Stream(device=SMALL)):
        assert torch.cuda.current_device() == 1
        y = forward(c)
        assert torch.cuda.current_device() == 1
    assert [(launch.device, launch.stream) for launch in hooks.launches()] == [(0, 0)]
    check_forward(y, c)


def test_side_stream_of_another_device():
    c = case(device=SMALL)
    stream = torch.cuda.Stream(device=SMALL)
    stream.wait_stream(torch.cuda.current_stream(SMALL))
    with torch.cuda.stream(stream), torch.cuda.device(LARGE):
        y = forward(c)
    (launch,) = hooks.launches()
    assert (launch.device, launch.stream) == (1, stream.cuda_stream)
    assert launch.stream != 0
    stream.synchronize()
    check_forward(y, c)


def test_autograd_threads_of_two_devices():
    """One graph over both: every device's backward pass runs on its own thread and device."""
    first, second = case(device=LARGE), case(device=SMALL, seed=1)
    leaves = [t.requires_grad_() for c in (first, second) for t in (c.x, c.weight, c.bias)]
    y = ppcr_ext.ppcr(first.x, first.weight, first.bias, backend="native")
    z = ppcr_ext.ppcr(second.x + y.to(SMALL), second.weight, second.bias, backend="native")
    found = torch.autograd.grad(z, leaves, second.grad)
    assert [g.device for g in found] == [t.device for t in leaves]
    assert [launch.device for launch in hooks.launches()] == [0, 1, 1, 1, 0, 0]
    wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
    y = ppcr_ext.ppcr(*wide[:3], backend="reference")
    z = ppcr_ext.ppcr(wide[3] + y, *wide[4:], backend="reference")
    expected = torch.autograd.grad(z, wide, second.grad.cpu().double())
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu() - b).norm() <= 5e-5 * b.norm()
    assert torch.cuda.current_device() == 0


def test_devices_must_agree():
    c, elsewhere = case("ppcr_add_relu", device=LARGE), case("ppcr_add_relu", device=SMALL)
    rest, strange = (c.weight, c.bias, *LEVELS_EPS), elsewhere
    calls = {
        "weight": lambda: OPS.ppcr(c.x, strange.weight, c.bias, *LEVELS_EPS),
        "bias": lambda: OPS.ppcr(c.x, c.weight, strange.bias, *LEVELS_EPS),
        "residual": lambda: OPS.ppcr_add_relu(c.x, strange.residual, *rest),
        "grad": lambda: OPS.ppcr_backward(strange.grad, c.x, *rest),
        "y": lambda: OPS.ppcr_add_relu_backward(c.grad, c.x, strange.x, *rest),
        "x": lambda: OPS.ppcr(c.x.cpu(), *rest),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name} must be on"):
            call()
    assert hooks.launches() == []
    assert torch.cuda.current_device() == 0


def test_one_device_without_code():
    """It takes nothing from the others; the reason is told, and the remedy."""
    states = [_native.why_not(device) for device in (LARGE, SMALL, UNKNOWN)]
    assert states[:2] == [None, None]
    assert "compute capability 8.0" in states[2]
    assert "TORCH_CUDA_ARCH_LIST=8.0" in states[2]
    assert "native" in ppcr_ext.available_backends()
    c = case(device=UNKNOWN)
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0"):
        ppcr_ext.ppcr(c.x, c.weight, c.bias, backend="native")
    with pytest.raises(RuntimeError, match="holds no kernels for this device"):
        forward(c)
    assert hooks.launches() == []
    check(case(device=LARGE))


def test_automatic_choice_per_device(monkeypatch):
    """A warning for the device that cannot, none for the one that can."""
    monkeypatch.setitem(_dispatch._WHY_NOT, "triton", lambda device: "no driver for Triton")
    good, bad = case(device=SMALL), case(device=UNKNOWN)
    check_forward(ppcr_ext.ppcr(good.x, good.weight, good.bias), good)
    assert len(hooks.launches()) == 1
    with pytest.warns(RuntimeWarning, match=r"compute capability 8\.0"):
        y = ppcr_ext.ppcr(bad.x, bad.weight, bad.bias)
    check_forward(y, bad)
    assert len(hooks.launches()) == 1
