"""Everything that needs a GPU, a part at a time: ``python3 tools/gpu.py --out results/gpu``.

    build      the package in place, for the device that is there
    tests      the native kernels: numbers (float64 on the GPU), streams, graphs, devices
    triton     the Triton kernels, in several processes
    plans      every kernel as share of a copy
    sweep      the plans that PPCR_PLAN can ask for instead
    benchmark  every operator beside plain PyTorch, and ppcr beside what torch.compile makes of it
    networks   steps and inference of ResNet-50 with attention layers and without
    memcheck   compute-sanitizer over a small run; what does not end in time is a note, no failure
    racecheck  the same

A part is stopped after 480 seconds, a sanitizer after 500, and keeps what it had. plans, sweep,
benchmark and networks go on where they were, so that this is no failure of theirs. --only names
parts. steps.json says after every step what ended how; a failure keeps no later part from running,
and the exit status tells. Then ``python -m benchmarks.render --take results/gpu`` makes a results
page of plans, benchmark and networks.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LIMIT, SANITIZER_LIMIT = 480, 500  # seconds
FOUND = 9  # exit status of compute-sanitizer where it found something
MEASURED = ("benchmark", "networks")  # by the command of the benchmarks
PARTS = ("build", "tests", "triton", "plans", "sweep", *MEASURED, "memcheck", "racecheck")
# What a rehearsal on the emulated runtime cannot run; tests/cuda_host/README.md says what that is.
ONLY_ON_A_GPU = ("build", "triton", "networks", "memcheck", "racecheck")


def small_run() -> None:
    """Every operator, dtype and layout once, at sizes with tails, for compute-sanitizer."""
    import torch

    torch.zeros(1, device="cuda").item()
    print("small run started", flush=True)
    import ppcr_ext
    from ppcr_ext import testing

    native = itertools.product(("native",), testing.DTYPES, (64, 512, 40), (7, 6, 5))
    triton = itertools.product(("triton",), (torch.float16,), (64, 40), (7,))  # seconds to compile
    for backend, dtype, channels, side in (*native, *triton):
        shape, levels = (2, channels, side, side), (1, 3, 5) if channels == 40 else (1, 2, 4)
        for operator, layout in itertools.product(testing.OPERATORS, testing.LAYOUTS):
            case = testing.make_inputs(operator, shape, levels, dtype, layout, device="cuda")
            testing.evaluate(getattr(ppcr_ext, operator), case, backend=backend)
    torch.cuda.synchronize()
    print("small run done")


def measure(part: str, out: Path, small: bool) -> int:
    """The command of the benchmarks: of networks ResNet-50 alone, in a rehearsal a tiny input."""
    from benchmarks import __main__ as command
    from benchmarks import cases

    del cases.NETWORKS["resnet18"]
    if small:
        cases.CUDA_SHAPES = ()
    suite = ["operators", "--rounds", "5"]
    if part == "networks":
        suite = ["end-to-end", "--rounds", "6", "--no-compile"]
    common = ["--device", "cuda", "--resume", "--out", str(out), *["--quick"] * small]
    return command.main([*suite, *common])


class Record:
    """steps.json: the steps of this run and, of parts that it leaves out, of earlier ones."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / "steps.json"
        self.steps = json.loads(self.file.read_text()) if self.file.exists() else {}

    def keep(self, name: str, **about: object) -> None:
        self.steps[name] = about
        self.file.write_text(json.dumps(self.steps, indent=1) + "\n")
        print(f"== {name}: {about}", flush=True)

    def run(self, commands: dict[str, list[str]], limit: float, **settings: str) -> dict[str, int]:
        """Runs commands side by side, the output of each in a file; how each of them ended."""
        began, running, ended = time.monotonic(), {}, {}
        for index, (name, command) in enumerate(commands.items()):
            print(f"== {name}: {' '.join(command)}", flush=True)
            env = os.environ | settings | {"PPCR_SHARD": f"{index}/{len(commands)}"}
            with (self.out / f"{name}.log").open("w") as log:
                both = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
                running[name] = subprocess.Popen(command, cwd=ROOT, env=env, **both)
        for name, process in running.items():
            try:
                ended[name] = process.wait(max(1, began + limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
                ended[name] = 124
            print("\n".join((self.out / f"{name}.log").read_text().splitlines()[-12:]))
            seconds = round(time.monotonic() - began, 1)
            self.keep(name, status=ended[name], seconds=seconds, command=" ".join(commands[name]))
        return ended


def sanitize(record: Record, tool: str, python: list[str]) -> bool:
    """What it finds is a failure; that it does not start or end here is a note."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name"]
    command += ["kernel_substring=ppcr", *python, __file__, "--small-run"]
    note = "compute-sanitizer was not found"
    if Path(sanitizer).exists():
        # Without torch's caching every tensor is an allocation of its own: an overrun is seen.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status = record.run({tool: command}, SANITIZER_LIMIT, **alone)[tool]
        started = "small run started" in (record.out / f"{tool}.log").read_text()
        if status in (0, FOUND) or (started and status != 124):
            return status == 0
        note = f"it did not {'end in time' if status == 124 else 'start'}: see {tool}.log"
    record.keep(tool, status=None, note=note)
    return True


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "results" / "gpu")
    add("--only", default=",".join(PARTS), help="parts, with commas")
    add("--rehearsal", action="store_true", help="small, on emulated devices")
    add("--small-run", action="store_true", help=argparse.SUPPRESS)
    add("--measure", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if options.small_run:
        return small_run() or 0
    if options.measure:
        return measure(options.measure, out, options.rehearsal)
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        parser.error("make gpu needs a CUDA device; PyTorch sees none")
    out.mkdir(parents=True, exist_ok=True)
    emulated, small = (["-m", "cuda_host"], ["--rehearsal"]) if options.rehearsal else ([], [])
    python, to = [sys.executable, *emulated], ["--out", str(out), *small]
    plans = [*python, "tools/gpu_plans.py", *to]
    pytest = [*python, "-m", "pytest", "-q", "-p", "shard", "-m", "gpu"]
    commands = {
        "build": [sys.executable, "setup.py", "build_ext", "--inplace"],
        "tests": [*pytest, "tests/test_gpu.py", "-k", "not triton"],
        "triton": [*pytest, "tests/test_gpu_triton.py", "tests/test_gpu.py", "-k", "triton"],
        "plans": plans,
        "sweep": [*plans, "--sweep"],
    }
    commands |= {part: [*python, __file__, "--measure", part, *to] for part in MEASURED}
    settings = {"PPCR_BUILD_CUDA": "1", "PPCR_TRUTH_DEVICE": "cuda"}
    settings["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    settings["PYTHONPATH"] = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    record, failed = Record(out), []
    for part in wanted:
        if options.rehearsal and part in ONLY_ON_A_GPU:
            record.keep(part, status=None, note="not in a rehearsal")
        elif part in ("memcheck", "racecheck"):
            failed += [] if sanitize(record, part, python) else [part]
        else:
            count = min(12, os.cpu_count() or 1) if part in ("tests", "triton") else 1
            names = [f"{part}.{i}" for i in range(count)] if count > 1 else [part]
            ended = record.run(dict.fromkeys(names, commands[part]), LIMIT, **settings)
            late = part in ("plans", "sweep", *MEASURED)  # they go on with the next call
            failed += [name for name, status in ended.items() if status not in (0, 124 * late)]
            if part == "build" and failed:
                break
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
