"""Do the tests see faults in the Triton kernels? Plants one after another into a copy, and runs the tests there until one fails.

``python tests/plant_triton_faults.py [number ...]``: up to a minute each. Exit status 1 where a fault passes unseen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON, TILE, WALK, OPS = (
    "_triton/common.py",
    "_triton/one_pass.py",
    "_triton/two_passes.py",
    "_triton/operators.py",
)

# The tests that are there to see a fault in a file: quicker than all of them.
TESTS = {
    COMMON: "2_to_the_31 or (sizes and float32)",
    TILE: "sizes and float32 or zero_variance",
    WALK: "(levels and float32) or zero_variance",
    OPS: "layouts or (sizes and float32)",
}

# what, file, text, replacement (of its first occurrence)
FAULTS = (
    ("tile, gate: a weight forgotten", TILE, " + n6 * w6 + b", " + b"),
    ("tile, forward: y of a wrong segment", TILE, "finished(x2, g,", "finished(x1, g,"),
    ("tile, backward: gradient of one context left out", TILE, "left_half + scale * (w4", "left_half + 0 * scale * (w4"),
    ("tile, gate, backward: gradient read beyond the last pixel", TILE, "dg = tl.load(grad + pixel + p, mask=p < left, other=0)", "dg = tl.load(grad + pixel + p)"),
    ("tile: channels beyond the segment", TILE, "    if SP != S:\n", "    if SP < 0:\n"),
    ("tile: pixels beyond the image", TILE, "inside = (p < left)[None, :]", "inside = (p < P)[None, :]"),
    ("tile: second power of the deviation", TILE, "tl.rsqrt(variance + EPS)", "1.0 / (variance + EPS)"),
    ("tile, gate: written beyond the last pixel", TILE, "g.to(kind), mask=p < left)", "g.to(kind))"),
    ("add_relu: the residual forgotten", COMMON, "    if MODE == ADD_RELU:\n        y +=", "    if MODE == ADD_RELU:\n        y += 0 *"),
    ("add_relu: no relu", COMMON, "y = tl.where(y <= 0, 0, y)", "y = tl.where(y <= 0, y, y)"),
    ("add_relu, backward: no mask", COMMON, "<= 0, 0, u)", "<= 0, u, u)"),
    ("offset of an image in pixels", COMMON, "start = image * pixels * C + first", "start = image * pixels + first"),
    ("offset of an image in 32 bits", COMMON, "(program // tiles).to(tl.int64)", "(program // tiles)"),
    ("offset of a pixel in 32 bits", COMMON, "(program % tiles).to(tl.int64) * P", "(program % tiles) * P"),
    ("offsets in a tile in 32 bits", COMMON, "        c = c.to(tl.int64)\n", "        c = c.to(tl.int32)\n"),
    ("sigmoid of the other sign", COMMON, "tl.exp(-z)", "tl.exp(z)"),
    ("finishing sums one row short", COMMON, "i < count - at", "i < count - at - 1"),
    ("finishing sums read beyond", COMMON, "mask=i < count - at, other=0", "mask=i < BLOCK, other=0"),
    ("walk: bins without overlap", WALK, "+ LEVELS[j] - 1) // LEVELS[j]", ") // LEVELS[j]"),
    ("walk: chunks beyond the segment", WALK, "inside = (c < edge - at)[:, None] & shown", "inside = (c < C - at)[:, None] & shown"),
    ("walk, gate: mean over padding", WALK, "mean = tl.sum(n, 0) * (1.0 / L)", "mean = tl.sum(n, 0) * (1.0 / LP)"),
    ("walk, forward: channels beyond the last", WALK, "inside = (c < C - at)[:, None] & shown", "inside = shown & (c >= 0)[:, None]"),
    ("walk, backward: gradient of the contexts of the wrong sign", WALK, "d = tl.zeros((CHUNK, P), ACC) + dsums", "d = tl.zeros((CHUNK, P), ACC) - dsums"),
    ("walk, backward: the mask of relu ignored in the gate's gradient", WALK, "<= 0, 0, u)", "<= 0, u, u)"),
    ("walk: bias left out of the gate", WALK, "        z += tl.load(bias).to(ACC)", "        z += 0"),
    ("gradient not brought to x's layout", OPS, "_in_layout_of(grad, x)", "grad"),
    ("no copy of strides that no kernel reads", OPS, "x if x.is_contiguous() or is_channels_last(x) else x.contiguous()", "x"),
    ("misjudged layout", OPS, "channels_last = pixels == 1 or not x.is_contiguous()", "channels_last = pixels == 1"),
)  # fmt: skip


def caught_by(fault: tuple[str, str, str, str]) -> str | None:
    """The first failing test and what it said, or None where all pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("tests", "ppcr_ext"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        _, file, text, replacement = fault
        path = folder / "ppcr_ext" / file
        source = path.read_text()
        if text not in source:
            raise SystemExit(f"{file} no longer holds {text!r}: bring this list up to date")
        path.write_text(source.replace(text, replacement, 1))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=line",
            "-p",
            "no:cacheprovider",
            "--show-capture=no",
        ]
        command += [
            "-o",
            "addopts=",
            "triton_interpreted.py",
            "-k",
            TESTS[fault[1]],
        ]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder)}
        result = subprocess.run(
            command, cwd=folder / "tests", env=environment, capture_output=True, text=True
        )
    if result.returncode == 0:
        return None
    if (
        result.returncode > 1
    ):  # 1: a test failed; below 0: killed by a signal, as by a segmentation fault
        raise SystemExit(f"the tests did not run: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    if result.returncode < 0:
        return f"signal {-result.returncode}"
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    return " | ".join(failed)[:200]


def main() -> None:
    wanted = [int(argument) for argument in sys.argv[1:]] or range(len(FAULTS))
    unseen = 0
    for i in wanted:
        said = caught_by(FAULTS[i])
        unseen += said is None
        print(f"{i:2} {FAULTS[i][0]}: {said or 'UNSEEN'}", flush=True)
    print(f"{len(wanted) - unseen} of {len(wanted)} faults seen")
    sys.exit(unseen > 0)


if __name__ == "__main__":
    main()
