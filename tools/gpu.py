"""Everything that needs a GPU, in one go: ``python3 tools/gpu.py --out results/gpu`` (``make gpu``).

Builds the package in place for the device that is there, runs ``pytest -m gpu``, times every kernel as share of a copy, runs memcheck
and racecheck of compute-sanitizer on a small run of every kernel family, and the benchmark. A step that fails does not keep the later
ones from running; the exit status says so. What is known after every step is in steps.json. ``--only`` names steps: on an H200 with
16 cores tests took 26 s, plans 20 s.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOUND = 9  # exit status of compute-sanitizer where it found something
STEPS = {
    "build": 400,
    "tests": 320,
    "plans": 120,
    "memcheck": 500,
    "racecheck": 500,
    "benchmark": 400,
}  # seconds, at most
TESTS = ("tests/test_gpu.py", "tests/test_gpu_triton.py")


def parallel() -> list[str]:
    """The expectations are computed in float64 on the CPU: shared among processes, where pytest-xdist is there."""
    return ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []


def small_run() -> None:
    """Every operator, dtype and layout once, at sizes with tails; for compute-sanitizer, which slows kernels down a hundredfold."""
    import torch

    torch.zeros(1, device="cuda").item()
    print("small run started", flush=True)
    sys.path.insert(0, str(ROOT))
    import ppcr_ext

    def run_all(
        backend: str, dtype: torch.dtype, levels: tuple[int, ...], channels: int, side: int
    ) -> None:
        for form in (torch.contiguous_format, torch.channels_last):
            x = (
                torch.randn(2, channels, side, side, device="cuda", dtype=dtype)
                .to(memory_format=form)
                .requires_grad_()
            )
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
    for levels, channels in (
        ((1, 2, 4), 64),
        ((1, 3, 5), 40),
    ):  # each of these takes Triton seconds to compile
        run_all("triton", torch.float16, levels, channels, 7)
    torch.cuda.synchronize()
    print("small run done")


def step(
    results: dict[str, dict[str, object]],
    out: Path,
    name: str,
    command: list[str],
    timeout: int,
    **environment: str,
) -> bool:
    """Runs one command, with its output in a file of its own as well; records how it ended."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
            file.write(f"\nstopped after {timeout} s\n")
    print("\n".join(log.read_text().splitlines()[-15:]), flush=True)
    results[name] = {
        "command": " ".join(command),
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
    }
    (out / "steps.json").write_text(json.dumps(results, indent=1) + "\n")
    return status == 0


def sanitize(results: dict[str, dict[str, object]], out: Path, tool: str) -> None:
    """One tool of compute-sanitizer over the small run. What it finds is a failure; that it does not start, on machines that do not
    let it, is only recorded."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        results[tool] = {"status": None, "skipped": "compute-sanitizer was not found"}
        return
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        "--kernel-name",
        "kernel_substring=ppcr",
    ]
    # Without torch's caching every tensor is an allocation of its own, so that an overrun of one is seen.
    step(
        results,
        out,
        tool,
        [*command, sys.executable, __file__, "--small-run"],
        STEPS[tool],
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    status = results[tool]["status"]
    if status == 124:
        results[tool] |= {"status": None, "skipped": "it did not end in time"}
    elif status not in (0, FOUND) and "small run started" not in (out / f"{tool}.log").read_text():
        results[tool] |= {
            "status": None,
            "skipped": f"it could not start (status {status}): see {tool}.log",
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results" / "gpu",
        help="folder for logs, CSV, JSON and pictures",
    )
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, of {','.join(STEPS)}")
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
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(STEPS):
        parser.error(f"--only: no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    results: dict[str, dict[str, object]] = {}
    commands = {
        "build": ["setup.py", "build_ext", "--inplace"],
        "tests": [
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            *TESTS,
            f"--junitxml={out / 'tests.xml'}",
            *parallel(),
        ],
        "plans": ["tools/gpu_plans.py", "--out", str(out)],
        # It writes after every input, so that what it had when stopped is there.
        "benchmark": ["-m", "benchmarks", "operators", "--quick", "--out", str(out)],
    }
    for name in wanted:
        if name in commands:
            settings = (
                {"PPCR_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
                if name == "build"
                else {}
            )
            if (
                not step(
                    results, out, name, [sys.executable, *commands[name]], STEPS[name], **settings
                )
                and name == "build"
            ):
                break
        else:
            sanitize(results, out, name)
    (out / "steps.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0 if all(result["status"] in (0, None) for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
