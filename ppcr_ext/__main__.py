"""Prints the versions, the backends with reasons, and the compiled CUDA architectures.

With --check it runs every usable backend against float64. Exits with 1 if a result exceeds its
tolerance.
"""

import argparse
import json
import math
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import ppcr_ext

from . import _dispatch, _native, testing
from ._build import devices
from ._checks import BACKENDS

# Shapes and levels of --check: equal bins, and bins that overlap. Triton compiles for each.
CASES = (((4, 64, 14, 14), (1, 2, 4)), ((3, 20, 7, 5), (1, 3, 7)))


# Every variable of the environment that the package reads when it is built, loaded or run.
SETTINGS = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "DEBUG",
    "MAX_JOBS",
    "PPCR_BUILD_CUDA",
    "PPCR_CPU_CAPABILITY",
    "PPCR_CPU_METHOD",
    "PPCR_JIT",
    "PPCR_PLAN",
    "TORCH_CUDA_ARCH_LIST",
    "TORCH_EXTENSIONS_DIR",
    "XDG_CACHE_HOME",
)
# And what decides which devices and threads PyTorch sees.
OF_OTHERS = ("CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def cpu() -> str:
    """The processor's name, which Python does not know on Linux, and the numbers of threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} threads, of which PyTorch takes {torch.get_num_threads()}"


def cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(devices.count())]
    return [f"{device.name} ({device.major}.{device.minor})" for device in found]


def settings() -> dict[str, str]:
    """Those that are set, and all others of ours, which may be misspelt."""
    names = {name for name in os.environ if name.startswith("PPCR_")} | {*SETTINGS, *OF_OTHERS}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def report() -> dict[str, object]:
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "ppcr_ext": ppcr_ext.__version__,
        "PyTorch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "Triton": next((d.version for d in metadata.distributions(name="triton")), "none"),
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "package": str(Path(ppcr_ext.__file__).parent),
        "CPU": cpu(),
        "CPU library": str(_native.library or "none"),
        "CPU capability": f"{_native.cpu_capability() or 'none'} (PyTorch's: {capability})",
        "CUDA library": str(_native.cuda_library or "none"),
        "CUDA archs": _native.cuda_architectures() or "none compiled",
        "CUDA devices": ", ".join(cuda_devices()) or "none",
        "CUDA driver": devices.driver() or "none",
        "backends": ppcr_ext.backends(),
        "available": ", ".join(ppcr_ext.available_backends()),
        "environment": settings(),
    }


def print_report() -> None:
    for what, found in report().items():
        if isinstance(found, dict):
            print(f"{what:<16} {'' if found else 'no setting of the package'}".rstrip())
            for name, state in found.items():
                print(f"  {name:<{max(14, *map(len, found))}} {state}")
        else:
            print(f"{what:<16} {found}")


def usable() -> Iterator[tuple[str, torch.device]]:
    """Yields every backend with every device of this machine that it runs on."""
    found = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(devices.count()))]
    for backend in BACKENDS:
        for device in found:
            if _dispatch.why_not(backend, device, 2) is None:
                yield backend, device


def check(backend: str, device: torch.device, operator: str, dtype: torch.dtype) -> float:
    """Returns the largest error of a backend over shapes and layouts, as a share of its limit."""
    shares = []
    for shape, levels in CASES:
        limits = testing.tolerance(dtype, levels)
        for layout in testing.LAYOUTS:
            inputs = testing.make_inputs(operator, shape, levels, dtype, layout, device=device)
            results = testing.evaluate(getattr(ppcr_ext, operator), inputs, backend=backend)
            errors = testing.truth(inputs, results["y"]).errors(results)
            shares.append(errors.share_of(limits))
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def print_checks() -> int:
    """Prints a table of all errors as shares of the tolerances. Returns 1 if one exceeds it, else
    0.
    """
    kinds = [str(dtype).removeprefix("torch.") for dtype in testing.DTYPES]
    print("largest error against float64, as a share of the tolerance")
    print(f"{'backend':<11}{'device':<9}{'operator':<15}" + "".join(f"{k:>10}" for k in kinds))
    failed = []
    for backend, device in usable():
        for operator in testing.OPERATORS:
            cells = []
            for dtype, kind in zip(testing.DTYPES, kinds, strict=True):
                where = f"{backend} on {device}: {operator}, {kind}"
                try:
                    share = check(backend, device, operator, dtype)
                    cells.append(f"{share:.2g}")
                    if not share <= 1:
                        failed.append(f"{where}: {share:.3g} times the tolerance")
                except Exception as error:  # whatever it is, the other backends are checked too
                    cells.append("failed")
                    failed.append(f"{where}: {type(error).__name__}: {error}")
            print(f"{backend:<11}{device!s:<9}{operator:<15}" + "".join(f"{c:>10}" for c in cells))
    for line in failed:
        print(f"FAILED  {line}")
    if not failed:
        print("all results are within their tolerances")
    return int(bool(failed))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m ppcr_ext", description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--check", action="store_true", help="compare all usable backends with float64"
    )
    choice.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    if options.check:
        return print_checks()
    if options.json:
        print(json.dumps(report(), indent=1))
    else:
        print_report()
    return 0


if __name__ == "__main__" and main() != 0:
    raise SystemExit(1)
