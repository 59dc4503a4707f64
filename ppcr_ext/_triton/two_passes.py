"""The Triton kernels of any levels and any number of channels: two passes over a tile's channels.

The edges of all bins cut the channels into segments. The first pass sums these, a chunk of channels
at a time; the second multiplies, and finds x (in backward the gradient) in the L2 cache. Contiguous
half-precision tensors of 2048 channels and 7 x 7 pixels go this way in backward, too: in registers
a tile could have only 8 pixels, whose runs of 16 bytes waste half of every sector.

A row of 49 pixels has 98 bytes, so that no two rows are aligned alike, and an access can have 2
bytes. But 8 channels are 784 bytes, whole vectors of 16 bytes. The backward kernel reads such a
group as one flat row, sums rows element by element, and adds up and spreads the values of a pixel
by tl.gather, once for each segment. All its accesses to x and the gradients have 16 bytes.

The forward kernel of such images has accesses of 2 bytes, in one pass. Flat rows would need all
pixels of an image at once, 200,704 bytes. A block's dimensions are powers of two, which makes
262,144 bytes of it, all registers of a multiprocessor. So it would read x twice, where it now reads
it once; nobody has measured which is faster. (14 x 14 pixels have rows of 392 bytes and take
accesses of 8 bytes, in one pass.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    ADD_RELU,
    GATE,
    channel_stride,
    finished,
    incoming,
    offsets_of,
    place,
)


@triton.jit
def _bins(LEVELS: tl.constexpr, C: tl.constexpr, LP: tl.constexpr):
    """First channel of every context's bin, and one past the last; both are 0 for padding.

    They are computed here because a CUDA graph could not capture the copy of a table.
    """
    l = tl.arange(0, LP)
    begin = tl.zeros((LP,), tl.int32)
    end = tl.zeros((LP,), tl.int32)
    first: tl.constexpr = 0
    for j in tl.static_range(len(LEVELS)):
        i = l - first
        mine = (i >= 0) & (i < LEVELS[j])
        # Quotient first: i C may leave 32 bits, i (C / k) never does.
        begin = tl.where(mine, i * (C // LEVELS[j]) + i * (C % LEVELS[j]) // LEVELS[j], begin)
        end = tl.where(
            mine,
            (i + 1) * (C // LEVELS[j]) + ((i + 1) * (C % LEVELS[j]) + LEVELS[j] - 1) // LEVELS[j],
            end,
        )
        first += LEVELS[j]
    return begin, end


@triton.jit
def _next_edge(begin, end, c, C: tl.constexpr, ALIGN: tl.constexpr):
    """Where the segment that begins at channel c ends.

    All edges are multiples of ALIGN, which the division tells the compiler.
    """
    edge = tl.minimum(
        tl.min(tl.where(begin > c, begin, C), 0), tl.min(tl.where(end > c, end, C), 0)
    )
    return edge // ALIGN * ALIGN


@triton.jit
def _gate(
    t, begin, end, weight, bias,
    EPS: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The gate g of every pixel and its z without the bias; and what the gradients use: the
    normalized contexts [LP, P] (0 for padding), 1 / sqrt(var + eps), 1 / |bin| and the weights.

    t: the sums over the bins.
    """
    l = tl.arange(0, LP)
    real = (l < L)[:, None]
    inverse = 1.0 / tl.maximum(end - begin, 1).to(ACC)
    t = t * inverse[:, None]
    pivot = tl.sum(tl.where((l == 0)[:, None], t, 0), 0)  # as in _normalized
    n = tl.where(real, t - pivot[None, :], 0)
    mean = tl.sum(n, 0) * (1.0 / L)
    n = tl.where(real, n - mean[None, :], 0)
    inv_std = tl.rsqrt(tl.sum(n * n, 0) * (1.0 / L) + EPS)
    n = n * inv_std[None, :]
    w = tl.load(weight + l, mask=l < L, other=0).to(ACC)
    z = tl.sum(n * w[:, None], 0)
    if HAS_BIAS:
        g = tl.sigmoid(z + tl.load(bias).to(ACC))
    else:
        g = tl.sigmoid(z)
    return g, z, n, inv_std, inverse, w


@triton.jit
def ppcr_two_passes_forward(
    x, residual, weight, bias, out, pixel_units, tiles,
    EPS: tl.constexpr, LEVELS: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr,
    MODE: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr
):  # fmt: skip
    """L, LP: contexts, and the power of two above. CHUNK: channels at a time. ALIGN divides every
    edge of a bin."""
    pixels = pixel_units * UNIT
    start, pixel, left = place(pixels, tiles, C, P, CHANNELS_LAST)
    stride = channel_stride(pixels, CHANNELS_LAST)
    c = tl.arange(0, CHUNK)
    p = tl.arange(0, P)
    shown = (p < left)[None, :]
    offsets = offsets_of(c, p, pixels, C, CHANNELS_LAST, WIDE)
    begin, end = _bins(LEVELS, C, LP)
    t = tl.zeros((LP, P), ACC)
    first = tl.full((), 0, tl.int32)
    while first < C:
        edge = _next_edge(begin, end, first, C, ALIGN)
        sums = tl.zeros((CHUNK, P), ACC)
        for at in range(first // ALIGN * ALIGN, edge, CHUNK):
            inside = (c < edge - at)[:, None] & shown
            sums += tl.load(
                x + start + at * stride + offsets,
                mask=inside,
                other=0,
                eviction_policy="evict_last",
            ).to(ACC)
        holds = (begin <= first) & (first < end)
        t += tl.where(holds[:, None], tl.sum(sums, 0)[None, :], 0)
        first = edge
    g, _, _, _, _, _ = _gate(t, begin, end, weight, bias, EPS, L, LP, HAS_BIAS, ACC)
    kind: tl.constexpr = out.dtype.element_ty
    if MODE == GATE:
        tl.store(out + pixel + p, g.to(kind), mask=p < left)
    else:
        for at in range(0, C, CHUNK):
            inside = (c < C - at)[:, None] & shown
            here = start + at * stride
            v = tl.load(x + here + offsets, mask=inside, other=0, eviction_policy="evict_first")
            tl.store(
                out + here + offsets,
                finished(v, g, residual + here, offsets, inside, MODE, ACC).to(kind),
                mask=inside,
            )


@triton.jit
def _of_pixels(row, pixels, FLAT: tl.constexpr, P: tl.constexpr):
    """Sums of the channels of a row [FLAT * P], which lie side by side, for every pixel [P]."""
    if FLAT > 1:
        i = tl.arange(0, FLAT * P)
        row = tl.gather(row, i // P * pixels + tl.minimum(i % P, pixels - 1), 0)
        row = tl.sum(tl.reshape(row, (FLAT, P)), 0)
    return row


@triton.jit
def _of_rows(values, pixels, FLAT: tl.constexpr, P: tl.constexpr):
    """The pixels' values [P] for every channel of a row [FLAT * P]."""
    if FLAT > 1:
        values = tl.gather(values, tl.arange(0, FLAT * P) % pixels, 0)
    return values


@triton.jit
def ppcr_two_passes_backward(
    x, grad, y, weight, bias, dx, d_residual, partials, pixel_units, tiles,
    EPS: tl.constexpr, LEVELS: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, MODE: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """partials: [L + 1, programs]. A row of a tile is FLAT channels with all their pixels."""
    pixels = pixel_units * UNIT
    start, pixel, left = place(pixels, tiles, C, P, CHANNELS_LAST)
    stride = channel_stride(pixels, CHANNELS_LAST)
    ROW: tl.constexpr = FLAT * P
    c = tl.arange(0, CHUNK)
    p = tl.arange(0, P)
    f = tl.arange(0, ROW)
    shown = (f < left * FLAT)[None, :]
    offsets = offsets_of(c, f, pixels * FLAT, C, CHANNELS_LAST, WIDE)
    begin, end = _bins(LEVELS, C, LP)
    t = tl.zeros((LP, P), ACC)
    dg = tl.zeros((P,), ACC)
    first = tl.full((), 0, tl.int32)
    while first < C:
        edge = _next_edge(begin, end, first, C, ALIGN)
        sums = tl.zeros((CHUNK, ROW), ACC)
        products = tl.zeros((CHUNK, ROW), ACC)
        for at in range(first // ALIGN * ALIGN, edge, CHUNK * FLAT):
            inside = (c * FLAT < edge - at)[:, None] & shown
            here = start + at * stride
            v = tl.load(x + here + offsets, mask=inside, other=0, eviction_policy="evict_first").to(
                ACC
            )
            sums += v
            if MODE != GATE:
                u = tl.load(
                    grad + here + offsets, mask=inside, other=0, eviction_policy="evict_last"
                )
                if MODE == ADD_RELU:
                    where = y + here + offsets
                    shown_y = tl.load(where, mask=inside, other=0, eviction_policy="evict_last")
                    u = tl.where(shown_y <= 0, 0, u)
                products += v * u.to(ACC)
        holds = (begin <= first) & (first < end)
        t += tl.where(holds[:, None], _of_pixels(tl.sum(sums, 0), pixels, FLAT, P)[None, :], 0)
        if MODE != GATE:
            dg += _of_pixels(tl.sum(products, 0), pixels, FLAT, P)
        first = edge
    g, z, n, inv_std, inverse, w = _gate(t, begin, end, weight, bias, EPS, L, LP, HAS_BIAS, ACC)
    if MODE == GATE:
        dg = tl.load(grad + pixel + p, mask=p < left, other=0).to(ACC)
    dz = tl.where(p < left, dg * g * (1.0 - g), 0)
    w_mean = tl.sum(w, 0) * (1.0 / L)
    dt = (
        (dz * inv_std)[None, :]
        * ((w - w_mean)[:, None] - n * (z * (1.0 / L))[None, :])
        * inverse[:, None]
    )

    g = _of_rows(g, pixels, FLAT, P)
    kind: tl.constexpr = dx.dtype.element_ty
    first = tl.full((), 0, tl.int32)
    while first < C:
        edge = _next_edge(begin, end, first, C, ALIGN)
        holds = (begin <= first) & (first < end)
        dsums = _of_rows(tl.sum(tl.where(holds[:, None], dt, 0), 0), pixels, FLAT, P)
        for at in range(first // ALIGN * ALIGN, edge, CHUNK * FLAT):
            inside = (c * FLAT < edge - at)[:, None] & shown
            here = start + at * stride
            d = tl.zeros((CHUNK, ROW), ACC) + dsums[None, :]
            if MODE != GATE:
                u = incoming(grad + here, y + here, d_residual + here, offsets, inside, MODE)
                d += u.to(ACC) * g[None, :]
            tl.store(dx + here + offsets, d.to(kind), mask=inside)
        first = edge

    l = tl.arange(0, LP)
    programs = tl.num_programs(0).to(tl.int64)
    partials += tl.program_id(0)
    tl.store(partials + l * programs, tl.sum(dz[None, :] * n, 1), mask=l < L)
    tl.store(partials + L * programs, tl.sum(dz, 0))
