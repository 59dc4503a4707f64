"""Does the test-suite see faults? Plants one after another into a copy of the kernels and runs the tests there, until one fails.

``python tests/cuda_on_cpu/plant_faults.py [number ...]``: about a minute each on two cores. Exit status 1 where a fault passes unseen.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAJOR, PIXEL, SHARED = "channel_major_kernels.cuh", "pixel_major_kernels.cuh", "pixel_tile_kernels.cuh"
TILE, FINISH, PLAN = "channel_major_tile.cuh", "finish_kernels.cuh", "plan.h"

# what, file, text, replacement, which occurrence of the text
FAULTS = (
    ("missing __syncthreads before the row sums, forward", MAJOR, "  __syncthreads();\n  sum_rows", "  sum_rows", 0),
    ("missing __syncthreads before the row sums, backward", MAJOR, "  __syncthreads();\n  sum_rows", "  sum_rows", 1),
    ("missing barrier behind the row sums, forward", MAJOR, "sums, parts);\n  block_or_cluster_sync(tile);", "sums, parts);", 0),
    ("missing barrier behind the gates, backward", MAJOR, "  block_or_cluster_sync(tile);  // also", "  // also", 1),
    ("blocks of a cluster leave early", MAJOR, "  block_or_cluster_sync(tile);  // also", "  __syncthreads();  // also", 0),
    ("barrier in divergent code", MAJOR, "  __syncthreads();\n  sum_rows", "  if (threadIdx.x < 64) __syncthreads();\n  sum_rows", 0),
    ("missing __syncthreads, pixel-major forward", PIXEL, "  __syncthreads();  // the sums", "  // the sums", 0),
    ("missing __syncwarp, pixel-major forward", PIXEL, "  __syncwarp();\n", "", 0),
    ("missing __syncthreads, pixel-major backward", PIXEL, "  __syncthreads();\n  if (int(threadIdx.x) <= kContexts)",
     "  if (int(threadIdx.x) <= kContexts)", 0),
    ("missing __syncthreads behind the copy, pixel tile", SHARED, "edges[k] = tile.edge[k];\n  __syncthreads();", "edges[k] = tile.edge[k];", 0),
    ("missing __syncthreads behind the sums, pixel tile", SHARED, "  });\n  __syncthreads();\n\n  const int own", "  });\n  const int own", 0),
    ("missing __syncthreads before the copy back, pixel tile", SHARED, "    __syncthreads();\n    const int done", "    const int done", 0),
    ("missing __syncthreads, finishing sums", FINISH, "  __syncthreads();\n", "", 0),
    ("one step too many", TILE, "(left + stride - 1) / stride", "(left + stride) / stride", 0),
    ("pixels beyond the image", TILE, "thread.active && thread.first + thread.column < tile.image_pixels", "thread.active", 0),
    ("pixels beyond the tensor, pixel tile", SHARED, "tile.pixels - first < tile.q ? int(tile.pixels - first) : tile.q", "tile.q", 0),
    ("half vectors forgotten, pixel tile", SHARED, "    write_back<T, 1>(x, tensors.out + base, done, count);\n", "", 0),
    ("offset of a pixel in 32 bits, pixel tile", SHARED, "base = first * tile.channels", "base = int(first) * tile.channels", 0),
    ("vectors beyond the segment", PIXEL, "inside && place.channel + r * G::kHop < lanes.segment", "inside", 0),
    ("offset of an image in 32 bits", TILE, "int64_t(image) * tile.image_elements", "int(image) * int(tile.image_elements)", 0),
    ("offset of a pixel in 32 bits", PIXEL, "place.offset = (place.first + place.group) * lanes.channels",
     "place.offset = int(place.first + place.group) * int(lanes.channels)", 0),
    ("misaligned vectors", PLAN, "if (vector * problem.element_size > problem.alignment ||", "if (", 0),
    ("straddling vectors without whole rows", PLAN, "rows -= rows % whole_vectors;", "", 0),
    ("one lane short in a shuffle", "device_common.cuh", "offset < lanes; offset <<= 1", "offset < lanes / 2; offset <<= 1", 0),
)  # fmt: skip


def plant(folder: Path, fault: tuple[str, str, str, str, int]) -> None:
    _, name, text, replacement, occurrence = fault
    path = folder / "csrc" / "cuda" / name
    parts = path.read_text().split(text)
    if len(parts) < occurrence + 2:
        raise SystemExit(f"{name} no longer holds {text!r}: bring this list up to date")
    path.write_text(text.join(parts[: occurrence + 1]) + replacement + text.join(parts[occurrence + 1 :]))


def caught_by(fault: tuple[str, str, str, str, int] | None) -> str | None:
    """The first failing test and what it said, or None where all pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("csrc", "tests", "ppcr_ext"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if fault is not None:
            plant(folder, fault)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "tests/test_cuda_on_cpu.py"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    if result.returncode > 1:  # 1: a test failed; below 0: killed by a signal, as by a segmentation fault
        raise SystemExit(f"the tests did not run: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    lines = [
        line
        for line in (result.stdout + result.stderr).splitlines()
        if "Error" in line or ": assert " in line or line.startswith("Fatal")
    ]
    return " | ".join(lines[:1])[:400] or f"exit status {result.returncode}"


def main() -> None:
    wanted = [int(argument) for argument in sys.argv[1:]] or range(len(FAULTS))
    if len(wanted) > 1 and (said := caught_by(None)) is not None:
        raise SystemExit(f"without any fault the tests fail: {said}")
    unseen = 0
    for number in wanted:
        said = caught_by(FAULTS[number])
        unseen += said is None
        print(f"{number:2} {FAULTS[number][0]}: {'NOT CAUGHT' if said is None else 'caught: ' + said}", flush=True)
    print(f"{len(wanted) - unseen} of {len(wanted)} planted faults caught")
    sys.exit(unseen > 0)


if __name__ == "__main__":
    main()
