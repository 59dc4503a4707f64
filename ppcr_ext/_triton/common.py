"""What all Triton kernels share: where a tile lies, the gate, and the sums of partial gradients.

A contiguous tensor is [channels, pixels] for every image, a channels_last one [pixels, channels]
for all images in one. A program computes a tile of pixels with all their channels. An offset inside
a tile has 32 bits unless WIDE; the offset of a tile has 64. Numbers of pixels come as
``pixel_units * UNIT``, which tells the compiler how far rows are aligned. There are no atomics:
programs write partial sums of the parameters' gradients, and ``ppcr_finish`` adds them in a fixed
order.
"""

from __future__ import annotations

import triton
import triton.language as tl

ADD_RELU: tl.constexpr = tl.constexpr(1)  # as in launch_rule.py
GATE: tl.constexpr = tl.constexpr(2)


@triton.jit
def place(pixels, tiles, C: tl.constexpr, P: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The offset of this program's tile, its first pixel among those of all images, and how many
    pixels the image has from there on."""
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * P
    pixel = image * pixels + first
    if CHANNELS_LAST:
        start = pixel * C
    else:
        start = image * pixels * C + first
    return start, pixel, pixels - first


@triton.jit
def channel_stride(pixels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        stride = tl.full((), 1, tl.int64)
    else:
        stride = tl.full((), 1, tl.int64) * pixels
    return stride


@triton.jit
def offsets_of(c, p, pixels, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of channels c and pixels p, counted from the tile's first: [channels, pixels]."""
    if WIDE:
        c = c.to(tl.int64)
        p = p.to(tl.int64)
    if CHANNELS_LAST:
        offsets = c[:, None] + p[None, :] * C
    else:
        offsets = c[:, None] * pixels + p[None, :]
    return offsets


@triton.jit
def finished(x, g, residual, where, inside, MODE: tl.constexpr, ACC: tl.constexpr):
    """y of one segment, from its x and the gates."""
    y = x.to(ACC) * g[None, :]
    if MODE == ADD_RELU:
        y += tl.load(residual + where, mask=inside, other=0).to(ACC)
        y = tl.where(y <= 0, 0, y)  # NaN stays
    return y


@triton.jit
def incoming(grad, y, d_residual, where, inside, MODE: tl.constexpr):
    """The gradient that reaches x * g. For ADD_RELU it is masked where y is 0, and it is the
    gradient of the residual, too."""
    u = tl.load(grad + where, mask=inside, other=0)
    if MODE == ADD_RELU:
        u = tl.where(tl.load(y + where, mask=inside, other=0) <= 0, 0, u)
        tl.store(d_residual + where, u, mask=inside)
    return u


@triton.jit
def ppcr_finish(
    partials,
    d_weight,
    d_bias,
    count,
    L: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program l adds row l of partials ([L + 1, count]) into d_weight[l], program L into d_bias."""
    l = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), ACC)
    partials += l.to(tl.int64) * count
    for at in range(0, count, BLOCK):
        sums += tl.load(partials + at + i, mask=i < count - at, other=0)
    total = tl.sum(sums, 0)
    if l < L:
        tl.store(d_weight + l, total.to(d_weight.dtype.element_ty))
    elif HAS_BIAS:
        tl.store(d_bias, total.to(d_bias.dtype.element_ty))
