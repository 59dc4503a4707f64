"""Prints the versions, the backends with reasons, and the compiled CUDA architectures.

With --check it runs every usable backend against float64; the exit status is 1 where one is off.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ppcr_ext

from . import _dispatch, _native, testing
from ._build import devices
from ._checks import BACKENDS

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "ppcr": ppcr_ext.ppcr,
    "ppcr_gate": ppcr_ext.ppcr_gate,
    "ppcr_add_relu": ppcr_ext.ppcr_add_relu,
}
# Shapes and levels of --check: equal bins, and bins that overlap. Triton compiles for each.
CASES = (((4, 64, 14, 14), (1, 2, 4)), ((3, 20, 7, 5), (1, 3, 7)))


def report() -> dict[str, object]:
    capability = torch.backends.cpu.get_cpu_capability()
    count = devices.count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    return {
        "ppcr_ext": ppcr_ext.__version__,
        "PyTorch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "CPU library": str(_native.library() or "none"),
        "CPU capability": f"{_native.cpu_capability() or 'none'} (PyTorch's: {capability})",
        "CUDA archs": _native.cuda_architectures() or "none compiled",
        "CUDA devices": ", ".join(names) or "none",
        "backends": ppcr_ext.backends(),
        "available": ", ".join(ppcr_ext.available_backends()),
    }


def print_report() -> None:
    for what, found in report().items():
        if isinstance(found, dict):
            print(f"{what}, best first")
            for name, state in found.items():
                print(f"  {name:<14} {state}")
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
            results = testing.evaluate(FUNCTIONS[operator], inputs, backend=backend)
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
    off = []
    for backend, device in usable():
        for operator in FUNCTIONS:
            cells = []
            for dtype, kind in zip(testing.DTYPES, kinds, strict=True):
                where = f"{backend} on {device}: {operator}, {kind}"
                try:
                    share = check(backend, device, operator, dtype)
                    cells.append(f"{share:.2g}")
                    if not share <= 1:
                        off.append(f"{where}: {share:.3g} times the tolerance")
                except Exception as error:  # whatever it is, the other backends are checked too
                    cells.append("failed")
                    off.append(f"{where}: {type(error).__name__}: {error}")
            print(f"{backend:<11}{device!s:<9}{operator:<15}" + "".join(f"{c:>10}" for c in cells))
    for line in off:
        print(f"OFF  {line}")
    return int(bool(off))


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
