"""Builds the CUDA library into the package, in a checkout; an installation does it in setup.py.

``python tools/cuda_build.py [--arch 9.0]``
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# for _build without the package, which would load the library to be replaced
sys.path.insert(0, str(ROOT / "ppcr_ext"))
from _build import cuda as recipe

LIBRARY = ROOT / "ppcr_ext" / recipe.LIBRARY
WORK = ROOT / "build" / "cuda"


def build(output: Path = LIBRARY, arch: str | None = None, work: Path = WORK) -> str:
    """The architectures that were compiled for, as text; raises CannotBuild with the reason."""
    import torch

    headers = Path(torch.__file__).parent
    return str(recipe.build(output, ROOT / "csrc", work, headers, torch.version.cuda, arch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--arch", help="such as 9.0 or '8.0;9.0+PTX'; default: TORCH_CUDA_ARCH_LIST, else all"
    )
    arch, started = parser.parse_args().arch, time.monotonic()
    try:
        compiled_for = build(arch=arch)
    except RuntimeError as error:
        sys.exit(f"ppcr_ext: CUDA kernels: not built: {error}")
    size = LIBRARY.stat().st_size / 2**20
    print(f"{LIBRARY}: {compiled_for}, {size:.1f} MB, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
