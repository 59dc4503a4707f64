"""The Triton kernels of the levels (1, 2, 4): a tile stays in registers, so that x is read once.

Where 4 divides the channels, four equal segments carry these levels. Their sums are plain vectors
of pixels, and the gates need no exchange between threads. The formulas are those of reference.py
and csrc/ppcr_pixel.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import GATE, channel_stride, finished, incoming, offsets_of, place


@triton.jit
def _tile(
    pixels, tiles, S: tl.constexpr, SP: tl.constexpr, P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Where each of the tile's four segments begins; offsets within a segment, and which of them
    are inside; the tile's pixels among those of all images, and which of them are inside.

    S: channels of a segment, SP: the power of two above, P: pixels of a tile.
    """
    start, pixel, left = place(pixels, tiles, 4 * S, P, CHANNELS_LAST)
    c = tl.arange(0, SP)
    p = tl.arange(0, P)
    inside = (p < left)[None, :]
    if SP != S:
        inside = inside & (c < S)[:, None]
    offsets = offsets_of(c, p, pixels, 4 * S, CHANNELS_LAST, WIDE)
    segment = channel_stride(pixels, CHANNELS_LAST) * S
    starts = (start, start + segment, start + segment * 2, start + segment * 3)
    return starts, offsets, inside, pixel + p, p < left


@triton.jit
def _parameters(weight, bias, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """The seven weights and the bias."""
    w = [tl.load(weight + l).to(ACC) for l in (0, 1, 2, 3, 4, 5, 6)]
    if HAS_BIAS:
        b = tl.load(bias).to(ACC)
    else:
        b = w[0] * 0
    return w, b


@triton.jit
def _dot(a, b):
    """The sum of the products of two times seven values."""
    total = a[0] * b[0]
    for l in tl.static_range(1, 7):
        total += a[l] * b[l]
    return total


@triton.jit
def _normalized(sums, EPS: tl.constexpr, S: tl.constexpr):
    """The seven normalized contexts of every pixel, and 1 / sqrt(var + eps), from the sums of its
    four segments."""
    s0, s1, s2, s3 = sums
    # Contexts are taken relative to the first: what is normalized are differences, and small
    # differences are exact.
    pivot = (s0 + s1 + s2 + s3) * (0.25 / S)
    n1 = (s0 + s1) * (0.5 / S) - pivot
    n2 = (s2 + s3) * (0.5 / S) - pivot
    n3, n4, n5, n6 = [s * (1.0 / S) - pivot for s in sums]
    mean = (n1 + n2 + n3 + n4 + n5 + n6) * (1.0 / 7)
    n = (-mean, n1 - mean, n2 - mean, n3 - mean, n4 - mean, n5 - mean, n6 - mean)
    inv_std = tl.rsqrt(_dot(n, n) * (1.0 / 7) + EPS)
    return [v * inv_std for v in n], inv_std


@triton.jit
def ppcr_one_pass_forward(
    x, residual, weight, bias, out, pixel_units, tiles,
    EPS: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr,
    MODE: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr
):  # fmt: skip
    pixels = pixel_units * UNIT
    starts, offsets, inside, pixel, shown = _tile(pixels, tiles, S, SP, P, CHANNELS_LAST, WIDE)
    v = [tl.load(x + start + offsets, mask=inside, other=0) for start in starts]
    w, b = _parameters(weight, bias, HAS_BIAS, ACC)
    n, _ = _normalized([tl.sum(segment.to(ACC), 0) for segment in v], EPS, S)
    g = tl.sigmoid(_dot(n, w) + b)
    kind: tl.constexpr = out.dtype.element_ty
    if MODE == GATE:
        tl.store(out + pixel, g.to(kind), mask=shown)
    else:
        for k in tl.static_range(4):
            y = finished(v[k], g, residual + starts[k], offsets, inside, MODE, ACC)
            tl.store(out + starts[k] + offsets, y.to(kind), mask=inside)


@triton.jit
def ppcr_one_pass_backward(
    x, grad, y, weight, bias, dx, d_residual, partials, pixel_units, tiles,
    EPS: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr,
    MODE: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr
):  # fmt: skip
    """Keeps the incoming gradient in registers: dx = grad g + dsums needs no x after the gates.

    partials: [8, programs].
    """
    pixels = pixel_units * UNIT
    starts, offsets, inside, pixel, shown = _tile(pixels, tiles, S, SP, P, CHANNELS_LAST, WIDE)
    v = [tl.load(x + start + offsets, mask=inside, other=0).to(ACC) for start in starts]
    if MODE == GATE:
        dg = tl.load(grad + pixel, mask=shown, other=0).to(ACC)
    else:
        u = [
            incoming(grad + start, y + start, d_residual + start, offsets, inside, MODE)
            for start in starts
        ]
        products = v[0] * u[0].to(ACC)
        for k in tl.static_range(1, 4):
            products += v[k] * u[k].to(ACC)
        dg = tl.sum(products, 0)
    w, b = _parameters(weight, bias, HAS_BIAS, ACC)
    n, inv_std = _normalized([tl.sum(segment, 0) for segment in v], EPS, S)
    z = _dot(n, w)
    g = tl.sigmoid(z + b)
    dz = tl.where(shown, dg * g * (1.0 - g), 0)

    mean = (w[0] + w[1] + w[2] + w[3] + w[4] + w[5] + w[6]) * (1.0 / 7)
    z_mean = z * (1.0 / 7)
    scale = dz * inv_std
    dt = [scale * (w[l] - mean - n[l] * z_mean) for l in (0, 1, 2, 3, 4, 5, 6)]
    left_half = dt[0] * (0.25 / S) + dt[1] * (0.5 / S)
    right_half = dt[0] * (0.25 / S) + dt[2] * (0.5 / S)
    halves = (left_half, left_half, right_half, right_half)
    kind: tl.constexpr = dx.dtype.element_ty
    for k in tl.static_range(4):
        dsums = (halves[k] + dt[3 + k] * (1.0 / S))[None, :]
        if MODE == GATE:
            d = tl.zeros((SP, P), ACC) + dsums
        else:
            d = u[k].to(ACC) * g[None, :] + dsums
        tl.store(dx + starts[k] + offsets, d.to(kind), mask=inside)

    programs = tl.num_programs(0).to(tl.int64)
    partials += tl.program_id(0)
    for l in tl.static_range(7):
        tl.store(partials + programs * l, tl.sum(dz * n[l], 0))
    tl.store(partials + programs * 7, tl.sum(dz, 0))
