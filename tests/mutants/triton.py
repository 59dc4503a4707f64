"""Faults of the Triton kernels and their launches, seen by the tests in Triton's interpreter."""

from . import Mutant

COMMON, OPERATORS = "_triton/common.py", "_triton/operators.py"
ONE_PASS, TWO_PASSES = "_triton/one_pass.py", "_triton/two_passes.py"

# pytest's -k of the tests that are there to see a fault in a file: quicker than all of them.
TESTS = {
    COMMON: "2_to_the_31 or (sizes and float32)",
    ONE_PASS: "sizes and float32 or zero_variance",
    TWO_PASSES: "(levels and float32) or zero_variance or (flat and float32)",
    OPERATORS: "layouts or (sizes and float32)",
}
FORWARD, BACKWARD = "def ppcr_two_passes_forward(", "def ppcr_two_passes_backward("

MUTANTS = (
    Mutant("gate: a context forgotten", ONE_PASS, "tl.static_range(1, 7)", "tl.static_range(1, 6)"),
    Mutant("forward: y of a wrong segment", ONE_PASS, "finished(v[k], g,", "finished(v[1], g,"),
    Mutant(
        "backward: gradient of one context left out",
        ONE_PASS,
        "right_half = dt[0] * (0.25 / S) + dt[2] * (0.5 / S)",
        "right_half = dt[0] * (0.25 / S)",
    ),
    Mutant(
        "gate, backward: gradient read beyond the last pixel",
        ONE_PASS,
        "dg = tl.load(grad + pixel, mask=shown, other=0)",
        "dg = tl.load(grad + pixel)",
    ),
    Mutant("channels beyond the segment", ONE_PASS, "if SP != S:", "if SP < 0:"),
    Mutant(
        "pixels beyond the image",
        ONE_PASS,
        "inside = (p < left)[None, :]",
        "inside = (p < P)[None, :]",
    ),
    Mutant(
        "second power of the deviation",
        ONE_PASS,
        "tl.rsqrt(_dot(n, n) * (1.0 / 7) + EPS)",
        "1.0 / (_dot(n, n) * (1.0 / 7) + EPS)",
    ),
    Mutant(
        "gate: written beyond the last pixel", ONE_PASS, "g.to(kind), mask=shown)", "g.to(kind))"
    ),
    Mutant(
        "add_relu: the residual forgotten",
        COMMON,
        "y += tl.load(residual",
        "y += 0 * tl.load(residual",
    ),
    Mutant("add_relu: no relu", COMMON, "y = tl.where(y <= 0, 0, y)", "y = tl.where(y <= 0, y, y)"),
    Mutant("add_relu, backward: no mask", COMMON, "<= 0, 0, u)", "<= 0, u, u)"),
    Mutant(
        "offset of an image in pixels",
        COMMON,
        "start = image * pixels * C + first",
        "start = image * pixels + first",
    ),
    Mutant(
        "offset of an image in 32 bits",
        COMMON,
        "(program // tiles).to(tl.int64)",
        "(program // tiles)",
    ),
    Mutant(
        "offset of a pixel in 32 bits",
        COMMON,
        "(program % tiles).to(tl.int64) * P",
        "(program % tiles) * P",
    ),
    Mutant("offsets in a tile in 32 bits", COMMON, "c = c.to(tl.int64)", "c = c.to(tl.int32)"),
    Mutant("finishing sums one row short", COMMON, "i < count - at", "i < count - at - 1"),
    Mutant(
        "finishing sums read beyond",
        COMMON,
        "mask=i < count - at, other=0",
        "mask=i < BLOCK, other=0",
    ),
    Mutant("bins without overlap", TWO_PASSES, "+ LEVELS[j] - 1) // LEVELS[j]", ") // LEVELS[j]"),
    Mutant(
        "chunks beyond the segment",
        TWO_PASSES,
        "inside = (c < edge - at)[:, None] & shown",
        "inside = (c < C - at)[:, None] & shown",
        after=FORWARD,
    ),
    Mutant(
        "gate: mean over padding",
        TWO_PASSES,
        "mean = tl.sum(n, 0) * (1.0 / L)",
        "mean = tl.sum(n, 0) * (1.0 / LP)",
    ),
    Mutant(
        "forward: channels beyond the last",
        TWO_PASSES,
        "inside = (c < C - at)[:, None] & shown",
        "inside = shown & (c >= 0)[:, None]",
    ),
    Mutant(
        "backward: gradient of the contexts of the wrong sign",
        TWO_PASSES,
        "d = tl.zeros((CHUNK, ROW), ACC) + dsums",
        "d = tl.zeros((CHUNK, ROW), ACC) - dsums",
    ),
    Mutant(
        "backward: the mask of relu ignored in the gate's gradient",
        TWO_PASSES,
        "<= 0, 0, u",
        "<= 0, u, u",
        after=BACKWARD,
    ),
    Mutant(
        "flat rows: channels begin at powers of two",
        TWO_PASSES,
        "i // P * pixels + tl.minimum",
        "i // P * P + tl.minimum",
    ),
    Mutant(
        "flat rows: gates repeat at powers of two",
        TWO_PASSES,
        "tl.arange(0, FLAT * P) % pixels",
        "tl.arange(0, FLAT * P) % P",
    ),
    Mutant(
        "flat rows: channels of the next segment",
        TWO_PASSES,
        "inside = (c * FLAT < edge - at)[:, None] & shown",
        "inside = (c < edge - at)[:, None] & shown",
        after=BACKWARD,
    ),
    Mutant("bias left out of the gate", TWO_PASSES, "z + tl.load(bias).to(ACC)", "z"),
    Mutant("gradient not brought to x's layout", OPERATORS, "_in_layout_of(grad, x)", "grad"),
    Mutant(
        "no copy of strides that no kernel reads",
        OPERATORS,
        "x if x.is_contiguous() or is_channels_last(x) else x.contiguous()",
        "x",
    ),
    Mutant(
        "misjudged layout",
        OPERATORS,
        "channels_last = pixels == 1 or not x.is_contiguous()",
        "channels_last = pixels == 1",
    ),
)
