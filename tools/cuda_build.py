"""Builds the CUDA library into the package: ``python tools/cuda_build.py [--arch 9.0] [--output PATH]``.

For use in a checkout and in CI; an installation builds it through setup.py.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "ppcr_ext" / "_cuda.abi3.so"
WORK = ROOT / "build" / "cuda"


def recipe() -> ModuleType:
    """ppcr_ext/_build/cuda.py without the package around it, which would load a library that is about to be replaced."""
    package = ModuleType("ppcr_ext_recipes")
    package.__path__ = [str(ROOT / "ppcr_ext" / "_build")]
    sys.modules[package.__name__] = package
    return importlib.import_module("ppcr_ext_recipes.cuda")


def build(output: Path = LIBRARY, arch: str | None = None, work: Path = WORK) -> str:
    """The architectures that were compiled for, as text; raises CannotBuild with the reason."""
    import torch

    compiled_for = recipe().build(
        output, ROOT / "csrc", work, Path(torch.__file__).parent, torch.version.cuda, arch
    )
    return str(compiled_for)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--arch", help="such as 9.0 or '8.0;9.0+PTX'; default: TORCH_CUDA_ARCH_LIST, else all"
    )
    parser.add_argument("--output", type=Path, default=LIBRARY)
    options = parser.parse_args()
    started = time.monotonic()
    try:
        compiled_for = build(options.output, options.arch)
    except RuntimeError as error:
        sys.exit(f"ppcr_ext: CUDA kernels: not built: {error}")
    size = options.output.stat().st_size / 2**20
    print(f"{options.output}: {compiled_for}, {size:.1f} MB, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
