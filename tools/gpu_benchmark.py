"""Speed on a CUDA device, as a fraction of the device's own copy bandwidth, and beside torch.compile: CSV rows and JSON.

Bytes are counted as the operators need them: forward 2 passes over the tensor (read x, write y), a step 5 (and read x, read gy, write
dx), the same for every peer. Buffers rotate, so that nothing is found in the L2 that a training step would not find there.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppcr_ext
from benchmarks import peers
from ppcr_ext import triton_ops

SHAPES = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
DTYPES = (torch.float16, torch.float32)
LAYOUTS = ("channel-major", "pixel-major")
ROTATED_BYTES = 1 << 30  # together at least this much: many times any L2
ROUNDS = 15
SECONDS_PER_ROUND = 0.01

# Fractions of copy bandwidth that arithmetic predicts for forward and step: sector and cluster overheads, latency between blocks.
WANTED = {
    ("pixel-major", 64): (0.88, 0.86),
    ("pixel-major", None): (0.92, 0.90),
    ("channel-major", 64): (0.90, 0.88),
    ("channel-major", 256): (0.90, 0.88),
    ("channel-major", 512): (0.86, 0.84),
    ("channel-major", 1024): (0.86, 0.84),
    ("channel-major", 2048): (0.80, 0.78),
}


def seconds(run: Callable[[int], object]) -> tuple[float, float, float]:
    """Median and quartiles of the seconds of one call; ``run(i)`` takes the number of the call, for rotation."""
    for i in range(3):
        run(i)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(5):
        run(i)
    torch.cuda.synchronize()
    calls = max(5, int(SECONDS_PER_ROUND / max(1e-6, (time.perf_counter() - begin) / 5)))
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(calls):
            run(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    low, median, high = statistics.quantiles(times, n=4)
    return median, low, high


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").zero_()
    targets = [torch.empty_like(source) for _ in range(2)]
    return 2 * source.numel() / seconds(lambda i: targets[i % 2].copy_(source))[0]


class Buffers:
    """As many x, gy and outputs as rotation asks for."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str):
        one = torch.Size(shape).numel() * dtype.itemsize
        self.tensor_bytes = one
        self.count = max(2, -(-ROTATED_BYTES // (3 * one)))
        form = torch.channels_last if layout == "pixel-major" else torch.contiguous_format

        def make() -> Tensor:
            return torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=form)

        self.x = [make() for _ in range(self.count)]
        self.grad = [make() for _ in range(self.count)]
        self.kept: list[Any] = [None] * self.count  # outputs live for a whole rotation, so that the allocator does not repeat one


def forward_and_step(
    buffers: Buffers, forward: Callable[[Tensor], Tensor], step: Callable[[Tensor, Tensor], object]
) -> tuple[Callable[[int], object], Callable[[int], object]]:
    def run_forward(i: int) -> None:
        k = i % buffers.count
        buffers.kept[k] = forward(buffers.x[k])

    def run_step(i: int) -> None:
        k = i % buffers.count
        buffers.kept[k] = step(buffers.x[k], buffers.grad[k])

    return run_forward, run_step


def native_calls(weight: Tensor, bias: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], object]]:
    arguments = (weight, bias, [1, 2, 4], 1e-5)
    operators = torch.ops.ppcr_ext

    def step(x: Tensor, grad: Tensor) -> object:
        return operators.ppcr(x, *arguments), operators.ppcr_backward(grad, x, *arguments)

    return lambda x: operators.ppcr(x, *arguments), step


def triton_calls(weight: Tensor, bias: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], object]]:
    arguments = (weight, bias, (1, 2, 4), 1e-5)

    def step(x: Tensor, grad: Tensor) -> object:
        y = triton_ops.forward(triton_ops.SCALE, x, None, *arguments)
        return y, triton_ops.backward(triton_ops.SCALE, grad, x, None, *arguments)

    return lambda x: triton_ops.forward(triton_ops.SCALE, x, None, *arguments), step


def compare(rows: list[dict[str, Any]], what: str, other: str) -> list[str]:
    """Lines with the time of one column over that of another, case by case."""
    times = {tuple(row.get(k) for k in ("what", "layout", "channels", "side", "dtype", "mode")): row.get("us") for row in rows}
    return [
        f"{what} over {other}: {times[key] / times[(other, *key[1:])]:.2f}  {' '.join(map(str, key[1:]))}"
        for key in times
        if key[0] == what and times.get((other, *key[1:]))
    ]


def compiled_calls(
    peer: peers.Peer, weight: Tensor, bias: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], object]]:
    compiled = torch.compile(lambda x, w, b: peer(x, w, b, (1, 2, 4)), fullgraph=True, dynamic=False)
    tracked = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(x, weight, bias)

    def step(x: Tensor, grad: Tensor) -> object:
        leaf = x.detach().requires_grad_()
        y = compiled(leaf, *tracked)
        return y, torch.autograd.grad(y, [leaf, *tracked], grad)

    return forward, step


def run(out: Path, images: int, budget: float) -> None:
    """Writes ``gpu.csv`` and ``gpu.json`` into ``out``. Peers are left out once ``budget`` seconds have passed, and said to be."""
    began = time.monotonic()
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}: copy {bandwidth / 1e12:.3f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []

    def record(what: str, layout: str, channels: int, side: int, dtype: torch.dtype, buffers: Buffers, calls: Any) -> None:
        for mode, call, units in zip(("forward", "step"), forward_and_step(buffers, *calls), (2, 5), strict=True):
            median, low, high = seconds(call)
            wanted = WANTED.get((layout, channels), WANTED.get((layout, None), (None, None)))[mode == "step"]
            fraction = units * buffers.tensor_bytes / median / bandwidth
            rows.append(
                {
                    "what": what, "layout": layout, "channels": channels, "side": side, "images": images,
                    "dtype": str(dtype).removeprefix("torch."), "mode": mode, "us": median * 1e6, "us_low": low * 1e6,
                    "us_high": high * 1e6, "units": units, "tensor_bytes": buffers.tensor_bytes, "copy_fraction": fraction,
                    "wanted": wanted if what == "ppcr" else None,
                }
            )  # fmt: skip
            print(
                f"{what:16} {layout:13} {channels:4}x{side:<2} {rows[-1]['dtype']:8} {mode:7} {median * 1e6:9.1f} us  "
                f"{fraction:.3f} of copy" + (f"  (wanted {wanted})" if what == "ppcr" else ""),
                flush=True,
            )

    for with_peers in (False, True):  # the numbers that matter first
        for layout in LAYOUTS:
            for channels, side in SHAPES:
                for dtype in DTYPES:
                    names = ("pooled once", "level by level") if with_peers else ()
                    if with_peers and time.monotonic() - began > budget:
                        rows.append({"what": "skipped: out of time", "layout": layout, "channels": channels, "side": side})
                        continue
                    buffers = Buffers((images, channels, side, side), dtype, layout)
                    weight, bias = torch.randn(7, device="cuda"), torch.zeros(1, device="cuda")
                    if not with_peers:
                        record("ppcr", layout, channels, side, dtype, buffers, native_calls(weight, bias))
                        if triton_ops.why_not("cuda") is None:
                            record("triton", layout, channels, side, dtype, buffers, triton_calls(weight, bias))
                    for name in names:
                        # Peers compute in x's dtype, as PyTorch does for such a formulation.
                        calls = compiled_calls(peers.PEERS[name], weight.to(dtype), bias.to(dtype))
                        record(name, layout, channels, side, dtype, buffers, calls)
                    del buffers
                    torch.cuda.empty_cache()
    for other in ("ppcr", "pooled once"):
        print("\n".join(compare(rows, "triton", other)), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    with (out / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    about = {
        "device": device.name, "multiprocessors": device.multi_processor_count, "capability": f"{device.major}.{device.minor}",
        "torch": torch.__version__, "cuda": torch.version.cuda, "ppcr_ext": ppcr_ext.__version__, "copy_bytes_per_second": bandwidth,
        "rounds": ROUNDS, "plan": os.environ.get("PPCR_PLAN"), "rows": rows,
    }  # fmt: skip
    (out / "gpu.json").write_text(json.dumps(about, indent=1) + "\n")
