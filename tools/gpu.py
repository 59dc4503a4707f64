"""Everything that needs a GPU, in one go: ``python3 tools/gpu.py --out results/gpu`` (``make gpu``); under 8 minutes on one device.

Builds the package in place for the device that is there, runs ``pytest -m gpu``, memcheck and racecheck of compute-sanitizer on a small
run of every kernel family, and the benchmark. A step that fails does not keep the later ones from running; the exit status says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOUND = 9  # exit status of compute-sanitizer where it found something


def small_run() -> None:
    """Every operator, dtype and layout once, at sizes with tails; for compute-sanitizer, which slows kernels down a hundredfold."""
    import torch

    torch.zeros(1, device="cuda").item()
    print("small run started", flush=True)
    sys.path.insert(0, str(ROOT))
    import ppcr_ext

    def run_all(backend: str, dtype: torch.dtype, levels: tuple[int, ...], channels: int, side: int) -> None:
        for form in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, channels, side, side, device="cuda", dtype=dtype).to(memory_format=form).requires_grad_()
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            weight = torch.randn(sum(levels), device="cuda", dtype=wide, requires_grad=True)
            bias = torch.randn(1, device="cuda", dtype=wide, requires_grad=True)
            options = {"levels": levels, "backend": backend}
            for y in (
                ppcr_ext.ppcr(x, weight, bias, **options),
                ppcr_ext.ppcr_gate(x, weight, bias, **options),
                ppcr_ext.ppcr_add_relu(x, torch.randn_like(x), weight, bias, **options),
            ):
                y.sum().backward()

    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for levels, channels in (((1, 2, 4), 64), ((1, 2, 4), 512), ((1, 3, 5), 40)):
            for side in (7, 6, 5):
                run_all("native", dtype, levels, channels, side)
    for levels, channels in (((1, 2, 4), 64), ((1, 3, 5), 40)):  # each of these takes Triton seconds to compile
        run_all("triton", torch.float16, levels, channels, 7)
    torch.cuda.synchronize()
    print("small run done")


def step(results: dict[str, dict[str, object]], out: Path, name: str, command: list[str], timeout: int, **environment: str) -> bool:
    """Runs one command, with its output in a file of its own as well; records how it ended."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
            file.write(f"\nstopped after {timeout} s\n")
    print("\n".join(log.read_text().splitlines()[-15:]), flush=True)
    results[name] = {"command": " ".join(command), "status": status, "seconds": round(time.monotonic() - began, 1)}
    return status == 0


def sanitize(results: dict[str, dict[str, object]], out: Path, tool: str) -> None:
    """One tool of compute-sanitizer over the small run. What it finds is a failure; that it does not start, on machines that do not
    let it, is only recorded."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        results[tool] = {"status": None, "skipped": "compute-sanitizer was not found"}
        return
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", "kernel_substring=ppcr"]
    # Without torch's caching every tensor is an allocation of its own, so that an overrun of one is seen.
    step(results, out, tool, [*command, sys.executable, __file__, "--small-run"], 150, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    status = results[tool]["status"]
    if status not in (0, FOUND) and "small run started" not in (out / f"{tool}.log").read_text():
        results[tool] |= {"status": None, "skipped": f"it could not start (status {status}): see {tool}.log"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="folder for logs, CSV, JSON and pictures")
    parser.add_argument("--skip", default="", help="steps to leave out, such as memcheck,racecheck,benchmark")
    parser.add_argument("--small-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small_run:
        small_run()
        return 0

    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device; PyTorch sees none", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    skipped = set(options.skip.split(","))
    results: dict[str, dict[str, object]] = {}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if step(results, out, "build", build, 400, PPCR_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST=capability):
        tests = ["-q", "-m", "gpu", "tests/test_gpu.py", "tests/test_gpu_triton.py", f"--junitxml={out / 'tests.xml'}"]
        step(results, out, "tests", [sys.executable, "-m", "pytest", *tests], 320)
        for tool in ("memcheck", "racecheck"):
            if tool not in skipped:
                sanitize(results, out, tool)
        if "benchmark" not in skipped:
            command = [sys.executable, "-m", "benchmarks", "operators", "--quick", "--out", str(out)]
            step(results, out, "benchmark", command, 400)  # writes after every input, so that what it had when stopped is there
    (out / "steps.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0 if all(result["status"] in (0, None) for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
