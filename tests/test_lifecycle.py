"""Threads, forks, the interpreter's end, leaks and memory: the library in a program that runs
long."""

import gc
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch

import ppcr_ext
from ppcr_ext._operators import constant_while_tracing
from ppcr_ext.testing import to_layout

ROOT = Path(ppcr_ext.__file__).parents[1]
# Bytes beside outputs: shares of dweight and dbias for every chunk (at most 256 of 65 doubles), and
# what the allocator needs.
OVERHEAD = 256 << 10


def step(x, w, b, grad):
    y = ppcr_ext.ppcr(x, w, b, backend="native")
    return y.detach(), *torch.autograd.grad(y, (x, w, b), grad)


def inputs(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, b, grad = (torch.randn(size, generator=g) for size in (shape, (7,), (1,), shape))
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), grad


def call(program, **options):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_many_threads_at_once():
    """Sixteen Python threads, each on inputs of its own, get the bits of one."""
    problems = [inputs(3, 24, 17, 5, seed=i) for i in range(16)]
    expected = [step(*p) for p in problems]
    wrong, barrier = [], threading.Barrier(len(problems))

    def work(i):
        barrier.wait()
        for _ in range(20):
            if not all(
                torch.equal(a, b) for a, b in zip(step(*problems[i]), expected[i], strict=True)
            ):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FIRST_CALLS = """
import threading, torch, ppcr_ext
barrier, results = threading.Barrier(8), []
def work():
    barrier.wait()
    results.append(ppcr_ext.ppcr(torch.ones(2, 4, 3), torch.zeros(7), backend="native"))
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
assert len(results) == 8 and all(torch.equal(r, torch.full((2, 4, 3), 0.5)) for r in results)
"""


def test_first_calls_at_once():
    """Whatever is set up by the first call is set up once."""
    call(FIRST_CALLS)


FORK = """
import torch, ppcr_ext
from torch.utils.data import DataLoader, Dataset

class Pixels(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        return ppcr_ext.ppcr(torch.full((1, 8, 4, 4), float(i)), torch.zeros(7), backend="native")

if __name__ == "__main__":
    layer = ppcr_ext.PPCR(8)
    layer(torch.randn(64, 8, 64, 64)).sum().backward()  # threads run before the fork
    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    loader = DataLoader(Pixels(), batch_size=2, **options)
    means = sorted(float(batch.mean()) for batch in loader)
    assert means == [0.25, 1.25, 2.25, 3.25], means
    layer(torch.randn(64, 8, 64, 64)).sum().backward()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_data_loader_workers():
    """Forked after use, on several threads: workers run on one thread, as torch sets them up."""
    call(FORK)


def test_interpreter_ends_with_live_graphs():
    """Except for daemon threads: one that is inside an operator then aborts the process under
    torch's own operators, too."""
    program = """
import torch, ppcr_ext
x = torch.randn(2, 8, 9, requires_grad=True)
layer = ppcr_ext.PPCR(8)
kept = [layer(x).sum() for _ in range(100)]
cycle = []
cycle.append((cycle, layer(x)))
print("end")
"""
    assert call(program) == "end"


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux")
def test_no_leak_in_10000_calls():
    problem = inputs(2, 8, 6, 5)

    def calls(count):
        for _ in range(count):
            step(*problem)
            ppcr_ext.ppcr_gate(problem[0], problem[1])
            with pytest.raises(ValueError, match="levels"):
                ppcr_ext.ppcr(problem[0], problem[1], levels=(9,))

    calls(1000)
    gc.collect()
    tracemalloc.start()
    calls(100)
    before, resident = tracemalloc.get_traced_memory()[0], resident_bytes()
    calls(9900)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 64 << 10
    assert resident_bytes() - resident < 8 << 20  # a leak of x's 1,920 bytes a call would be 19 MB


PEAK = """
import ctypes, torch, ppcr_ext
torch.set_num_threads(2)

def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def measure(name, tensors):
    function = getattr(torch.ops.ppcr_ext, name)
    call = lambda tensors: function(*tensors, w, b, (1, 2, 4), 1e-5)
    # The pages of its code: images large enough for the same kernel. What they took is given back.
    call([t[:2, :, :32, :33].clone() for t in tensors])
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = peak()
    result = call(tensors)
    results = result if isinstance(result, tuple) else (result,)
    outputs = sum(t.numel() * t.element_size() for t in results)
    print(name, peak() - before - outputs, outputs)

w, b = torch.randn(7), torch.randn(1)
gate_grad = torch.ones(8, 1, 128, 128)
for memory_format in (torch.contiguous_format, torch.channels_last):
    shape = (8, 64, 128, 128)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    ones = torch.ones(shape).contiguous(memory_format=memory_format)
    for name, tensors in {
        "ppcr": [x], "ppcr_gate": [x], "ppcr_add_relu": [x, ones],
        "ppcr_backward": [ones, x], "ppcr_gate_backward": [gate_grad, x],
        "ppcr_add_relu_backward": [ones, x, ones],
    }.items():
        measure(name, tensors)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_peak_memory_is_the_outputs():
    """The resident high-water mark of a call is its outputs (33.5 MB, the gate 0.5 MB, backward of
    add_relu 67 MB), and next to nothing beside them."""
    lines = [line.split() for line in call(PEAK).splitlines()]
    print(*lines, sep="\n")
    assert len(lines) == 12
    for name, extra, outputs in lines:
        assert int(extra) < OVERHEAD, (
            name,
            extra,
            outputs,
        )  # below 0: memory that was freed before and is used again


def test_one_pixel_one_channel_a_bin_and_many_channels():
    for channels in (4, 65536):
        case = inputs(2, channels, 1, 1)
        y, dx, _, _ = step(*case)
        expected = ppcr_ext.ppcr(
            case[0].double(), case[1].double(), case[2].double(), backend="reference"
        )
        assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-5)
        assert dx.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout):
    """float16, forward and backward, 4.3 GB each for x and the output: the last pixels are right,
    where 32-bit offsets would wrap."""
    samples, channels, side = 2, 64, 4100
    count = samples * channels * side * side
    assert count > 2**31
    torch.set_num_threads(2)
    shape = (
        (samples, side, side, channels)
        if layout == "channels_last"
        else (samples, channels, side, side)
    )
    x = torch.zeros(shape, dtype=torch.float16)
    x = x.permute(0, 3, 1, 2) if layout == "channels_last" else x
    tail = to_layout(torch.randn(1, channels, 3, 50).half() + 1.5, layout)
    x[-1:, :, -3:, -50:] = tail
    w, b = torch.randn(7), torch.randn(1)
    y = torch.ops.ppcr_ext.ppcr(x, w, b, (1, 2, 4), 1e-5)
    expected = ppcr_ext.ppcr(tail, w, b, backend="native")
    assert torch.equal(y[-1:, :, -3:, -50:], expected)
    assert not y[0, :, :3].any()
    del y
    dx, dw, db = torch.ops.ppcr_ext.ppcr_backward(x, x, w, b, (1, 2, 4), 1e-5)
    expected_dx, expected_dw, expected_db = torch.ops.ppcr_ext.ppcr_backward(
        tail, tail, w, b, (1, 2, 4), 1e-5
    )
    assert torch.equal(dx[-1:, :, -3:, -50:], expected_dx)
    assert torch.allclose(dw, expected_dw, rtol=1e-4)
    assert torch.allclose(db, expected_db, rtol=1e-4)


RELOAD = """
import gc, importlib, sys, torch, ppcr_ext

def use():
    torch.compiler.reset()
    layer = ppcr_ext.PPCR(8)
    torch.nn.init.ones_(layer.weight)
    x = torch.linspace(-1, 1, 48).reshape(2, 8, 3).requires_grad_()
    y = layer(x, x)
    y.sum().backward()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, x)
    options = [1, 2, 4], 1e-5
    torch.library.opcheck(torch.ops.ppcr_ext.ppcr.default, (x, layer.weight, layer.bias, *options))
    fake = torch.ops.ppcr_ext.triton_ppcr(x.to("meta"), layer.weight.to("meta"), None, *options)
    assert torch.equal(y, compiled) and fake.shape == x.shape
    return y.detach(), x.grad, ppcr_ext.available_backends(), ppcr_ext.backends()

def same(got):
    assert torch.equal(got[0], first[0]) and torch.equal(got[1], first[1]) and got[2:] == first[2:]

first, old = use(), ppcr_ext.PPCR(8)
importlib.reload(ppcr_ext)
same(use())
for name in [name for name in sys.modules if name.startswith("ppcr_ext.")]:
    importlib.reload(sys.modules[name])
importlib.reload(ppcr_ext)
same(use())
for _ in range(2):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ppcr_ext"]:
        del sys.modules[name]
    del ppcr_ext
    gc.collect()
    import ppcr_ext
    same(use())
assert old(torch.ones(1, 8)).tolist() == [[0.5] * 8]  # a layer of before goes on
"""


def test_reloaded_and_purged():
    """As notebooks do: importlib.reload of the package and its modules, and a fresh import."""
    call(RELOAD)


EAGER = """
import sys, torch, ppcr_ext
layer, x = ppcr_ext.PPCR(8), torch.ones(1, 8, 2)
ppcr_ext.insert_ppcr(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1)), modules=["0"])
(layer(x, x) + layer.gate(x)).sum().backward()
print([name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules])
"""


@pytest.mark.full  # other versions of PyTorch may import it themselves
def test_eager_programs_do_not_import_the_compiler():
    """Which would take more than a second."""
    assert call(EAGER) == "[]"


def test_the_mark_of_a_constant_is_that_of_pytorch():
    ours, theirs = (lambda: None), (lambda: None)
    assert vars(constant_while_tracing(ours)) == vars(torch.compiler.assume_constant_result(theirs))
