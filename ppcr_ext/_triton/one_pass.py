"""The Triton kernels of the levels (1, 2, 4): a tile stays in registers, so that x is read once.

Where 4 divides the channels, four equal segments carry these levels. Their sums are plain vectors
of pixels, and the gates need no exchange between threads. The formulas are those of reference.py
and csrc/ppcr_pixel.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import GATE, channel_stride, finished, incoming, offsets_of, place, sigmoid


@triton.jit
def _parameters(weight, bias, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """The seven weights and the bias."""
    w0 = tl.load(weight).to(ACC)
    w1 = tl.load(weight + 1).to(ACC)
    w2 = tl.load(weight + 2).to(ACC)
    w3 = tl.load(weight + 3).to(ACC)
    w4 = tl.load(weight + 4).to(ACC)
    w5 = tl.load(weight + 5).to(ACC)
    w6 = tl.load(weight + 6).to(ACC)
    if HAS_BIAS:
        b = tl.load(bias).to(ACC)
    else:
        b = w0 * 0
    return w0, w1, w2, w3, w4, w5, w6, b


@triton.jit
def _normalized(s0, s1, s2, s3, EPS: tl.constexpr, S: tl.constexpr):
    """The seven normalized contexts of every pixel, and 1 / sqrt(var + eps), from the sums of its
    four segments."""
    # Contexts are taken relative to the first: what is normalized are differences, and small
    # differences are exact.
    pivot = (s0 + s1 + s2 + s3) * (0.25 / S)
    n1 = (s0 + s1) * (0.5 / S) - pivot
    n2 = (s2 + s3) * (0.5 / S) - pivot
    n3 = s0 * (1.0 / S) - pivot
    n4 = s1 * (1.0 / S) - pivot
    n5 = s2 * (1.0 / S) - pivot
    n6 = s3 * (1.0 / S) - pivot
    mean = (n1 + n2 + n3 + n4 + n5 + n6) * (1.0 / 7)
    n0 = -mean
    n1 -= mean
    n2 -= mean
    n3 -= mean
    n4 -= mean
    n5 -= mean
    n6 -= mean
    variance = (n0 * n0 + n1 * n1 + n2 * n2 + n3 * n3 + n4 * n4 + n5 * n5 + n6 * n6) * (1.0 / 7)
    inv_std = tl.rsqrt(variance + EPS)
    return (
        n0 * inv_std,
        n1 * inv_std,
        n2 * inv_std,
        n3 * inv_std,
        n4 * inv_std,
        n5 * inv_std,
        n6 * inv_std,
        inv_std,
    )


@triton.jit
def ppcr_one_pass_forward(
    x, residual, weight, bias, out, pixel_units, tiles,
    EPS: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr,
    MODE: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr
):  # fmt: skip
    """S: channels of a segment, SP: the power of two above, P: pixels of a tile."""
    pixels = pixel_units * UNIT
    start, pixel, left = place(pixels, tiles, 4 * S, P, CHANNELS_LAST)
    c = tl.arange(0, SP)
    p = tl.arange(0, P)
    inside = (p < left)[None, :]
    if SP != S:
        inside = inside & (c < S)[:, None]
    offsets = offsets_of(c, p, pixels, 4 * S, CHANNELS_LAST, WIDE)
    segment = channel_stride(pixels, CHANNELS_LAST) * S
    o0 = start
    o1 = start + segment
    o2 = start + segment * 2
    o3 = start + segment * 3
    x0 = tl.load(x + o0 + offsets, mask=inside, other=0)
    x1 = tl.load(x + o1 + offsets, mask=inside, other=0)
    x2 = tl.load(x + o2 + offsets, mask=inside, other=0)
    x3 = tl.load(x + o3 + offsets, mask=inside, other=0)
    w0, w1, w2, w3, w4, w5, w6, b = _parameters(weight, bias, HAS_BIAS, ACC)
    n0, n1, n2, n3, n4, n5, n6, _ = _normalized(
        tl.sum(x0.to(ACC), 0),
        tl.sum(x1.to(ACC), 0),
        tl.sum(x2.to(ACC), 0),
        tl.sum(x3.to(ACC), 0),
        EPS,
        S,
    )
    g = sigmoid(n0 * w0 + n1 * w1 + n2 * w2 + n3 * w3 + n4 * w4 + n5 * w5 + n6 * w6 + b)
    kind: tl.constexpr = out.dtype.element_ty
    if MODE == GATE:
        tl.store(out + pixel + p, g.to(kind), mask=p < left)
    else:
        tl.store(
            out + o0 + offsets,
            finished(x0, g, residual + o0, offsets, inside, MODE, ACC).to(kind),
            mask=inside,
        )
        tl.store(
            out + o1 + offsets,
            finished(x1, g, residual + o1, offsets, inside, MODE, ACC).to(kind),
            mask=inside,
        )
        tl.store(
            out + o2 + offsets,
            finished(x2, g, residual + o2, offsets, inside, MODE, ACC).to(kind),
            mask=inside,
        )
        tl.store(
            out + o3 + offsets,
            finished(x3, g, residual + o3, offsets, inside, MODE, ACC).to(kind),
            mask=inside,
        )


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
    start, pixel, left = place(pixels, tiles, 4 * S, P, CHANNELS_LAST)
    c = tl.arange(0, SP)
    p = tl.arange(0, P)
    inside = (p < left)[None, :]
    if SP != S:
        inside = inside & (c < S)[:, None]
    offsets = offsets_of(c, p, pixels, 4 * S, CHANNELS_LAST, WIDE)
    segment = channel_stride(pixels, CHANNELS_LAST) * S
    o0 = start
    o1 = start + segment
    o2 = start + segment * 2
    o3 = start + segment * 3
    x0 = tl.load(x + o0 + offsets, mask=inside, other=0).to(ACC)
    x1 = tl.load(x + o1 + offsets, mask=inside, other=0).to(ACC)
    x2 = tl.load(x + o2 + offsets, mask=inside, other=0).to(ACC)
    x3 = tl.load(x + o3 + offsets, mask=inside, other=0).to(ACC)
    if MODE == GATE:
        dg = tl.load(grad + pixel + p, mask=p < left, other=0).to(ACC)
    else:
        u0 = incoming(grad + o0, y + o0, d_residual + o0, offsets, inside, MODE)
        u1 = incoming(grad + o1, y + o1, d_residual + o1, offsets, inside, MODE)
        u2 = incoming(grad + o2, y + o2, d_residual + o2, offsets, inside, MODE)
        u3 = incoming(grad + o3, y + o3, d_residual + o3, offsets, inside, MODE)
        dg = tl.sum(x0 * u0.to(ACC) + x1 * u1.to(ACC) + x2 * u2.to(ACC) + x3 * u3.to(ACC), 0)
    w0, w1, w2, w3, w4, w5, w6, b = _parameters(weight, bias, HAS_BIAS, ACC)
    n0, n1, n2, n3, n4, n5, n6, inv_std = _normalized(
        tl.sum(x0, 0), tl.sum(x1, 0), tl.sum(x2, 0), tl.sum(x3, 0), EPS, S
    )
    z = n0 * w0 + n1 * w1 + n2 * w2 + n3 * w3 + n4 * w4 + n5 * w5 + n6 * w6
    g = sigmoid(z + b)
    dz = tl.where(p < left, dg * g * (1.0 - g), 0)

    mean = (w0 + w1 + w2 + w3 + w4 + w5 + w6) * (1.0 / 7)
    z_mean = z * (1.0 / 7)
    scale = dz * inv_std
    all_of = scale * (w0 - mean - n0 * z_mean) * (0.25 / S)
    left_half = all_of + scale * (w1 - mean - n1 * z_mean) * (0.5 / S)
    right_half = all_of + scale * (w2 - mean - n2 * z_mean) * (0.5 / S)
    d0 = left_half + scale * (w3 - mean - n3 * z_mean) * (1.0 / S)
    d1 = left_half + scale * (w4 - mean - n4 * z_mean) * (1.0 / S)
    d2 = right_half + scale * (w5 - mean - n5 * z_mean) * (1.0 / S)
    d3 = right_half + scale * (w6 - mean - n6 * z_mean) * (1.0 / S)
    kind: tl.constexpr = dx.dtype.element_ty
    if MODE == GATE:
        like = tl.zeros((SP, P), ACC)
        tl.store(dx + o0 + offsets, (like + d0[None, :]).to(kind), mask=inside)
        tl.store(dx + o1 + offsets, (like + d1[None, :]).to(kind), mask=inside)
        tl.store(dx + o2 + offsets, (like + d2[None, :]).to(kind), mask=inside)
        tl.store(dx + o3 + offsets, (like + d3[None, :]).to(kind), mask=inside)
    else:
        tl.store(dx + o0 + offsets, (u0.to(ACC) * g[None, :] + d0[None, :]).to(kind), mask=inside)
        tl.store(dx + o1 + offsets, (u1.to(ACC) * g[None, :] + d1[None, :]).to(kind), mask=inside)
        tl.store(dx + o2 + offsets, (u2.to(ACC) * g[None, :] + d2[None, :]).to(kind), mask=inside)
        tl.store(dx + o3 + offsets, (u3.to(ACC) * g[None, :] + d3[None, :]).to(kind), mask=inside)

    programs = tl.num_programs(0).to(tl.int64)
    partials += tl.program_id(0)
    tl.store(partials, tl.sum(dz * n0, 0))
    tl.store(partials + programs, tl.sum(dz * n1, 0))
    tl.store(partials + programs * 2, tl.sum(dz * n2, 0))
    tl.store(partials + programs * 3, tl.sum(dz * n3, 0))
    tl.store(partials + programs * 4, tl.sum(dz * n4, 0))
    tl.store(partials + programs * 5, tl.sum(dz * n5, 0))
    tl.store(partials + programs * 6, tl.sum(dz * n6, 0))
    tl.store(partials + programs * 7, tl.sum(dz, 0))
