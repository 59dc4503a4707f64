"""The Triton backend: its kernels in Triton's interpreter, what the compiler makes of them, and
when they are chosen."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from cases import LEVELS
from torch._subclasses.fake_tensor import FakeTensorMode

import ppcr_ext
from ppcr_ext import _dispatch, _native, reference
from ppcr_ext._dispatch import choose
from ppcr_ext._triton import launch_rule, operators
from ppcr_ext._triton.launch_rule import Problem
from ppcr_ext.testing import LAYOUTS

TESTS = Path(__file__).parent
PACKAGE = Path(ppcr_ext.__file__).parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
counts: dict[str, int] = {}  # what conftest.py prints


@needs_triton
def test_in_the_interpreter(tmp_path):
    """Two processes, one for each layout; a segmentation fault is an access outside a buffer."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(PACKAGE)}
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
    ]
    command += [
        "-W",
        "ignore::RuntimeWarning",
        "-o",
        "addopts=",
        "triton_interpreted.py",
        "triton_interpreted_pytorch.py",
        "-k",
    ]
    processes = []
    for i, chosen in enumerate(("contiguous or every_kernel", "not contiguous or every_kernel")):
        processes.append(
            subprocess.Popen(
                [*command, chosen],
                cwd=TESTS,
                env=environment | {"PPCR_TRITON_COUNTS": str(tmp_path / f"{i}.json")},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        for process in processes:
            output = process.communicate(timeout=1200)[0]
            assert process.returncode == 0, f"exit status {process.returncode}\n{output[-6000:]}"
    finally:
        for process in processes:
            process.kill()
    executed, programs = set(), 0
    for path in tmp_path.glob("*.json"):
        found = json.loads(path.read_text())
        executed |= {tuple(entry) for entry in found["executed"]}
        programs += found["programs"]
    for i, what in enumerate(("kernels", "dtypes", "layouts", "sizes", "levels")):
        counts[what] = len({entry[i] for entry in executed})
    counts["combinations"], counts["programs"] = len(executed), programs
    assert (counts["kernels"], counts["dtypes"], counts["layouts"]) == (12, 4, 2)
    assert counts["levels"] >= len(LEVELS)


# ---- choice -----------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_the_kernels():
    """They import Triton, which may be missing. (PyTorch itself looks for it when an operator is
    registered.)"""
    kernels = ("ppcr_ext._triton.common", "ppcr_ext._triton.one_pass")
    program = f"import sys, ppcr_ext; print([m for m in sys.modules if m in {kernels}])"
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


@pytest.fixture
def without_caches():
    def clear():
        for function in (
            operators._why_no_triton,
            operators._why_not_on,
            operators._interpreted,
        ):
            function.cache_clear()

    clear()
    yield
    clear()


def test_without_triton(monkeypatch, without_caches):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'triton>=3.6'" in operators.why_not(torch.device("cuda"))
    x, w = torch.randn(2, 8, 3), torch.randn(7)
    with pytest.raises(
        RuntimeError,
        match=r"'triton' cannot run for cpu tensors: Triton cannot be imported .*pip install",
    ):
        ppcr_ext.ppcr(x, w, backend="triton")
    assert ppcr_ext.ppcr(x, w).shape == x.shape
    assert "pip install" in ppcr_ext.backends()["triton"]


def test_with_an_old_triton(monkeypatch, without_caches):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.1"))
    assert "needs Triton 3.6 or newer, this is 3.5.1" in operators.why_not(torch.device("cuda"))


@needs_triton
def test_a_cpu_tensor_needs_the_interpreter():
    with pytest.raises(
        RuntimeError,
        match="'triton' cannot run for cpu tensors: Triton kernels run only on CUDA tensors",
    ):
        ppcr_ext.ppcr(torch.randn(2, 8, 3), torch.randn(7), backend="triton")
    assert operators.why_not(torch.device("meta")) == "there are no Triton kernels for meta tensors"


@pytest.fixture
def a_device_without_native_kernels(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(operators, "_why_not_on", lambda index: None)
    monkeypatch.setattr(
        _native, "_cuda_reason", "the CUDA library is not built; build it with PPCR_BUILD_CUDA=1"
    )
    monkeypatch.setattr(_dispatch, "_warned", set())


@needs_triton
def test_chosen_with_one_warning_where_the_native_library_is_missing(
    a_device_without_native_kernels,
):
    with FakeTensorMode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        x, w = torch.empty(2, 8, 3, device="cuda"), torch.empty(7, device="cuda")
        for _ in range(2):
            assert ppcr_ext.ppcr(x, w).shape == x.shape
    ours = [str(w.message) for w in said if "ppcr_ext" in str(w.message)]
    assert len(ours) == 1
    assert (
        "runs its Triton kernels instead of the compiled ones for cuda tensors: "
        "the CUDA library is not built" in ours[0]
    )
    assert "build it with PPCR_BUILD_CUDA=1" in ours[0]


def test_the_warning_of_the_reference_gives_both_reasons(
    a_device_without_native_kernels, monkeypatch
):
    monkeypatch.setattr(
        operators,
        "_why_no_triton",
        lambda: "Triton cannot be imported; pip install 'triton>=3.6'",
    )
    with pytest.warns(
        RuntimeWarning,
        match=r"slow PyTorch reference for cuda tensors: .*PPCR_BUILD_CUDA=1; "
        r"nor Triton's: .*pip install",
    ):
        assert choose(None, types.SimpleNamespace(device=torch.device("cuda")), 7) == "reference"


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", operators.MODES)
def test_traced_for_a_cuda_device(name, layout, a_device_without_native_kernels):
    """Forward and backward are one operator each, without a GPU and without a graph break."""
    from torch.fx.experimental.proxy_tensor import make_fx

    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    with FakeTensorMode():
        x = torch.empty(2, 8, 3, 5, device="cuda", dtype=torch.float16).to(memory_format=form)
        w, grad = (
            torch.empty(7, device="cuda"),
            torch.empty(2, 1 if name == "ppcr_gate" else 8, 3, 5, device="cuda", dtype=x.dtype),
        )

        def step(x, w, grad):  # the autograd engine itself needs the device
            inputs = (x, x) if name == "ppcr_add_relu" else (x,)
            y = getattr(ppcr_ext, name)(*inputs, w, backend="triton")
            return y, *getattr(torch.ops.ppcr_ext, f"triton_{name}_backward")(
                grad, *inputs, w, None, [1, 2, 4], 1e-5
            )

        graph = make_fx(step)(x, w, grad)
        y, dx, *_, d_weight, d_bias = step(x, w, grad)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets[:2] == [
        f"ppcr_ext.triton_{name}.default",
        f"ppcr_ext.triton_{name}_backward.default",
    ]
    assert not any("aten" in target for target in targets)
    assert dx.stride() == x.stride()
    assert (y.device.type, d_weight.dtype, d_bias.shape) == ("cuda", torch.float32, (0,))


# ---- launches ---------------------------------------------------------------------------------


def every_problem():
    shapes = [
        (64, 3136),
        (256, 3136),
        (512, 784),
        (1024, 196),
        (2048, 49),
        (16, 64),
        (20, 25),
        (4, 1),
        (4096, 9),
        (65536, 4),
        (7, 30),
    ]
    for channels, pixels in shapes:
        for channels_last in (False, True):
            for size in (2, 4, 8):
                for backward in (False, True):
                    for levels in ((1, 2, 4), (1, 3), (2, 2)):
                        images = 1 if channels_last else 128
                        yield Problem(
                            images,
                            channels,
                            pixels * (8 if channels_last else 1),
                            channels_last,
                            size,
                            levels,
                            0,
                            backward,
                        )


def test_launches_fit():
    families, flat = set(), set()
    for p in every_problem():
        launch = launch_rule.launch_for(p)
        channels = launch.chunk or p.padded_channels
        assert launch.pixels & (launch.pixels - 1) == 0
        assert launch.pixels < 2 * p.pixels
        assert launch.warps in (1, 2, 4, 8, 16, 32)
        assert (
            launch.pixels * channels * p.element_size <= 128 * 32 * launch.warps
        )  # 128 bytes per thread
        assert p.standard or launch.chunk
        # Several channels side by side are whole vectors, and a tile is an image.
        assert launch.flat == 1 or launch.flat * p.pixels * p.element_size % 16 == 0
        assert launch.flat == 1 or (launch.pixels >= p.pixels and not p.channels_last)
        families.add((p.levels, p.channels_last, launch.chunk is None))
        flat.add(launch.flat)
    assert {
        ((1, 2, 4), False, True),
        ((1, 2, 4), False, False),
        ((1, 2, 4), True, True),
        ((1, 3), True, False),
    } <= families
    assert flat == {1, 2, 4, 8}


@pytest.mark.parametrize("levels", [*LEVELS, (1, 1), (31, 33), (5, 7, 11)], ids=str)
def test_segments_of_the_levels(levels):
    for channels in (max(levels), max(levels) + 3, 4 * max(levels), 4099):
        edges = sorted(
            {edge for level in levels for pair in reference.bins(channels, level) for edge in pair}
        )
        assert launch_rule.longest_segment(levels, channels) == max(
            b - a for a, b in itertools.pairwise(edges)
        )
        factor = launch_rule.common_edge_factor(levels, channels)
        assert factor in (1, 2, 4, 8, 16)
        assert all(edge % factor == 0 for edge in edges)
        assert factor == 16 or any(edge % (2 * factor) for edge in edges)


# ---- what the compiler makes of them ----------------------------------------------------------

COMPILED = """
import sys; sys.path.insert(0, "tools")
import triton_report as report
seen = list(report.variants())
chosen = [
    v
    for i, v in enumerate(seen)
    if v.levels == (1, 2, 4) and v.dtype is not report.torch.float64
    and (i % STEP == 0 or (v.backward, v.side, v.layout) == (True, 7, "contiguous"))
]
for v in chosen:
    c = report.compile_variant(v)
    assert c.spills == 0 and c.stack == 0, c
    if v.aligned or c.flat:
        assert c.loads[16] > 0, c
        # other than 16 bytes wide: parameters, partial sums and gates
        narrow = sum(v.levels) + 1 + c.pixels * (v.mode == report.launch_rule.GATE)
        assert all(n.total() - n[16] <= narrow for n in (c.loads, c.stores)), c
    flat = v.backward and (v.channels, v.layout, v.dtype.itemsize) == (2048, "contiguous", 2)
    assert c.flat == flat, c
print(len(chosen), "compiled")
"""


def compiled(step: int) -> int:
    run = subprocess.run(
        [sys.executable, "-c", COMPILED.replace("STEP", str(step))],
        cwd=PACKAGE,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    return int(run.stdout.split()[0])


@needs_triton
@pytest.mark.full
def test_kernels_compile_without_spills_and_with_wide_accesses():
    """A sample of what make cuda-report lists of every kernel."""
    assert compiled(19) >= 8


@needs_triton
@pytest.mark.full
@pytest.mark.slow
def test_all_kernels_compile_without_spills_and_with_wide_accesses():
    assert compiled(1) == 180
