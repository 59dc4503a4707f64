"""Calls of the CUDA library as it is: streams, laziness, memory, refusals, capture, compilers."""

import gc
import threading

import pytest
import torch
from cuda_host import hooks, plugin
from emulated import OPS, both_layouts, case, check, check_forward, direct, every_operator, forward

import ppcr_ext
from ppcr_ext import testing


def test_every_kernel_has_fibers():
    kernels = hooks.kernels()
    assert len(kernels) > 300
    assert [name for name, has_fibers in kernels if not has_fibers] == []


@every_operator
@both_layouts
@pytest.mark.parametrize("side", [9, 14], ids=["first_call", "second_call"])
def test_a_call_waits_for_nothing(operator, layout, side):
    """Not even the first one of a shape, which asks the device: kernels and nothing else."""
    c = case(operator, (2, 32, side, side), layout=layout)
    torch.cuda.synchronize()
    hooks.forget()
    if side == 14:
        direct(c)
        torch.cuda.synchronize()
        hooks.forget()
    before = hooks.waits()
    results = direct(c)
    assert hooks.waits() == before
    assert plugin.calls == {}
    assert len(hooks.launches()) == hooks.pending() == 3
    assert {launch.device for launch in hooks.launches()} == {0}
    del results


@every_operator
def test_sync_debug_mode(operator):
    c = case(operator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        direct(c)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_operator
@both_layouts
def test_side_stream(operator, layout):
    """Also the backward pass: autograd runs it on the stream of the forward pass."""
    c = case(operator, layout=layout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check(c)
    assert {launch.stream for launch in hooks.launches()} == {stream.cuda_stream}
    assert stream.cuda_stream != 0
    torch.cuda.current_stream().wait_stream(stream)


def test_two_streams_of_one_thread():
    """A result that another stream reads after wait_stream, and only then."""
    c = case()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        y = forward(c)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        z = forward(c, y)
    assert hooks.pending() == 3  # two kernels and the wait
    second.synchronize()
    check_forward(y, c)
    c.x = y
    check_forward(z, c)


def test_threads():
    """Plans are kept per thread."""
    c, results, errors = case(), [], []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                results.append(forward(c))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not errors
    assert len({launch.stream for launch in hooks.launches()}) == 6
    for y in results:
        check_forward(y, c)


# ---- memory


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated()


def rounded(*tensors: torch.Tensor) -> int:
    """As PyTorch's allocator counts."""
    return sum(-(-t.numel() * t.element_size() // 512) * 512 for t in tensors)


@every_operator
@both_layouts
def test_peak_memory(operator, layout):
    """The results, the shares of the parameter gradients, and nothing else; only x is kept."""
    c = case(operator, (8, 64, 28, 28), layout=layout)
    direct(c)
    torch.cuda.synchronize()
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    y, gradients = direct(c)
    assert allocated() - before == rounded(y, *gradients)
    shares = torch.cuda.max_memory_allocated() - allocated()
    partials = max(launch.blocks for launch in hooks.launches()) * 8 * 4
    assert 0 < shares <= rounded(torch.empty(partials, device="meta", dtype=torch.uint8))


def test_strided_gradients_are_copied_once():
    c = case("ppcr", (8, 64, 28, 28))
    grad = c.grad[:1].expand(8, -1, -1, -1)
    direct(c, grad=grad)
    torch.cuda.synchronize()
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    _, gradients = direct(c, grad=grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < rounded(*gradients, c.x, c.x) + (64 << 10)


@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory(backward):
    """In the type that PyTorch has for it; nothing is started, and nothing is lost.

    The device has 96 MB, of which x, residual and grad take 12 each.
    """
    c = case("ppcr", (1, 64, 208, 208), device="cuda:1")
    torch.cuda.empty_cache()
    before, free = torch.cuda.memory_allocated("cuda:1"), torch.cuda.mem_get_info("cuda:1")[0]
    room = 16 << 20 if backward else 8 << 20  # for y, or not even for that
    hog = torch.empty(free - room, dtype=torch.uint8, device="cuda:1")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        c.results("native")
    assert len(hooks.launches()) == (1 if backward else 0)
    del hog
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated("cuda:1") == before
    hooks.forget()
    forward(c)
    assert len(hooks.launches()) == 1


# ---- refusals


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (hooks.INVALID_CONFIGURATION, "cudaErrorInvalidConfiguration"),
        (hooks.OUT_OF_RESOURCES, "cudaErrorLaunchOutOfResources"),
        (hooks.CLUSTER_SIZE, "cudaErrorInvalidClusterSize"),
    ],
)
def test_refused_launch(error, name, nth):
    """The first, second or third launch of a forward and a backward pass."""
    c = case()
    direct(c)
    torch.cuda.synchronize()
    before = allocated()
    hooks.plant("cudaLaunchKernelExC", error, nth)
    kernel = "finish_parameters" if nth == 3 else "contiguous"
    with pytest.raises(RuntimeError, match=f"ppcr_ext: {kernel}.* could not be launched .*{name}"):
        direct(c)
    assert plugin.runtime.cudaPeekAtLastError() == 0
    torch.cuda.synchronize()
    assert allocated() == before
    check(c)


def test_shared_memory_is_asked_for():
    """A plan that takes more than 48 KB: refused where the kernel did not ask."""
    c = case("ppcr", (1, 128, 16, 16), levels=(64,))
    direct(c)
    assert max(launch.shared for launch in hooks.launches()) > 48 << 10
    torch.cuda.synchronize()
    hooks.plant("cudaFuncSetAttribute", hooks.INVALID_VALUE)
    with pytest.raises(RuntimeError, match="could not be launched"):
        direct(c)
    assert plugin.runtime.cudaPeekAtLastError() == 0


@pytest.mark.parametrize(
    ("function", "cluster"),
    [
        ("cudaOccupancyMaxActiveClusters", 2),
        ("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", 1),
    ],
)
def test_refused_question(function, cluster, monkeypatch):
    """The first call of a shape asks how many blocks the device holds; errors are not swallowed."""
    monkeypatch.setenv("PPCR_PLAN", f"cluster={cluster}")
    c = case("ppcr", (3, 1024, 13, 13))
    hooks.plant(function, hooks.INVALID_VALUE)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        direct(c)
    assert plugin.runtime.cudaPeekAtLastError() == 0
    check(c)


def test_an_error_of_another_library():
    """What somebody else left behind is not blamed on our launch."""
    c = case()
    torch.cuda.synchronize()
    assert plugin.runtime.cudaSetDevice(99) != 0
    check_forward(forward(c), c)


def test_forced_plan(monkeypatch):
    c = case("ppcr", (2, 1024, 14, 14))
    monkeypatch.setenv("PPCR_PLAN", "nonsense")
    with pytest.raises(RuntimeError, match="PPCR_PLAN"):
        direct(c)
    for cluster in (1, 4):
        hooks.forget()
        monkeypatch.setenv("PPCR_PLAN", f"cluster={cluster}")
        y, _ = direct(c)
        assert [launch.cluster for launch in hooks.launches()] == [cluster, cluster, 1]
        check_forward(y, c)


# ---- layouts of what is not x


@every_operator
@both_layouts
def test_gradient_of_another_layout(operator, layout):
    """grad, y and the residual are brought to x's layout: the same bits as if they had it."""
    c = case(operator, layout=layout)
    y, expected = direct(c)
    strange = testing.LAYOUTS[1 - testing.LAYOUTS.index(layout)]
    grad, residual, saved = (
        testing.to_layout(t, strange) if operator != "ppcr_gate" else t.flip(0).contiguous().flip(0)
        for t in (c.grad, c.residual, y)
    )
    again, found = direct(c, grad=grad, y=saved, residual=residual)
    assert torch.equal(again.cpu(), y.cpu())
    assert again.stride() == y.stride()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())
        assert a.stride() == b.stride()


@every_operator
def test_strided_input(operator):
    c = case(operator, (2, 64, 14, 28))
    c.x, c.residual = c.x[..., ::2], c.residual[..., ::2]
    c.grad = c.grad[..., ::2]
    result = c.results("native")
    c.x = c.x.contiguous()
    assert torch.equal(result["y"].cpu(), c.results("native")["y"].cpu())


# ---- capture


@every_operator
@both_layouts
def test_capture(operator, layout):
    """Without a call before: limits, attributes and the plan are asked for while it captures."""
    c = case(operator, (3, 64, 10, 10), layout=layout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = direct(c)
    assert len(hooks.launches()) == 3
    for replay in range(2):
        c.x.copy_(torch.randn(c.x.shape) + replay)
        c.grad.copy_(torch.randn(c.grad.shape))
        graph.replay()
        expected_y, expected = direct(c)
        assert torch.equal(y.cpu(), expected_y.cpu())
        for a, b in zip(gradients, expected, strict=True):
            assert torch.equal(a.cpu(), b.cpu())


def test_refused_launch_in_a_capture():
    """The error comes out of the capture, and the next one works."""
    c = case()
    direct(c)
    torch.cuda.synchronize()
    hooks.plant("cudaLaunchKernelExC", hooks.INVALID_CONFIGURATION, 2)
    refused = pytest.raises(RuntimeError, match="cudaErrorInvalidConfiguration")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        direct(c)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = direct(c)
    graph.replay()
    check_forward(y, c)


def test_waiting_in_a_capture():
    """The runtime itself refuses it: the capture is lost, and the next one works."""
    c = case()
    for wait in (torch.cuda.synchronize, lambda: torch.cuda.current_stream().synchronize()):
        with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        forward(c)
    assert len(hooks.launches()) == 1


# ---- PyTorch around it


@both_layouts
@every_operator
def test_opcheck(operator, layout):
    c = case(operator, (2, 16, 5, 5), layout=layout)
    c.x.requires_grad_()
    maps = (c.x, c.residual) if c.has_residual else (c.x,)
    parameters = (c.weight.requires_grad_(), c.bias.requires_grad_(), [1, 2, 4], 1e-5)
    op, backward = (getattr(OPS, f"{operator}{suffix}").default for suffix in ("", "_backward"))
    torch.library.opcheck(op, (*maps, *parameters))
    y = op(*maps, *parameters).detach()
    saved = (y,) if c.has_residual else ()
    details = (t.detach() if isinstance(t, torch.Tensor) else t for t in parameters)
    torch.library.opcheck(backward, (c.grad, c.x.detach(), *saved, *details))


@pytest.mark.parametrize("dynamic", [False, True])
@every_operator
def test_compile(operator, dynamic):
    def function(*arguments, **options):
        return getattr(ppcr_ext, operator)(*arguments, **options, backend="native")

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for side in (6, 7):
        c = case(operator, (2, 16, side, side))
        expected = c.results("native")
        found = testing.evaluate(compiled, c)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name].cpu(), value.cpu()), name


def test_training_with_a_scaler():
    """float16 under autocast: the scaler skips a step that overflows, and the loss falls."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        ppcr_ext.PPCR(16, backend="native"),
        torch.nn.Conv2d(16, 4, 3),
    ).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
    x = torch.randn(4, 3, 8, 8, device="cuda")
    target = torch.nn.functional.conv2d(x.cpu(), torch.randn(4, 3, 3, 3) / 3).cuda()
    losses, skipped, before = [], 0, model[1].weight.detach().cpu().clone()
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = torch.nn.functional.mse_loss(model(x).float(), target)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        losses.append(loss.item())
    assert 1 <= skipped < 20
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(model[1].weight.detach().cpu(), before)
    assert all(p.isfinite().all() for p in model.parameters())
