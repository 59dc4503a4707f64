"""The Triton kernels: the formulas of reference.py and csrc/ppcr_pixel.h, one program per tile of pixels with all their channels.

Two families. ``tile_*`` keep a tile in registers, so that x is read once: levels (1, 2, 4) over four equal segments, whose sums are
plain vectors of pixels, and whose gates need no exchange between threads. ``walk_*`` take any levels and any number of channels: they
walk over the segments in chunks of channels, once for the sums and once more for the result, where the second read finds x (in
backward the gradient) in the L2 cache. 2048 channels of 7 x 7 pixels go that way when contiguous: 16 pixels of them already fill
the registers of half a multiprocessor.

A tensor is [channels, pixels] per image (channel-major: contiguous) or [pixels, channels] of all images in one (pixel-major:
channels_last). An offset inside a tile has 32 bits unless WIDE; where a tile begins, 64. Numbers of pixels come as
``pixel_units * UNIT``, which tells the compiler how far rows are aligned. No atomics: programs write partial sums of the
parameters' gradients, which ``finish`` adds in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCALE: tl.constexpr = tl.constexpr(0)  # y = x g
ADD_RELU: tl.constexpr = tl.constexpr(1)  # y = relu(x g + residual)
GATE: tl.constexpr = tl.constexpr(2)  # g


# ---- places -------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(pixels, tiles, C: tl.constexpr, P: tl.constexpr, PIXEL_MAJOR: tl.constexpr):
    """Of this program's tile: the offset of its first element, its first pixel among those of all images, how many are left."""
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * P
    pixel = image * pixels + first
    if PIXEL_MAJOR:
        start = pixel * C
    else:
        start = image * pixels * C + first
    return start, pixel, pixels - first


@triton.jit
def _channel_stride(pixels, PIXEL_MAJOR: tl.constexpr):
    if PIXEL_MAJOR:
        stride = tl.full((), 1, tl.int64)
    else:
        stride = tl.full((), 1, tl.int64) * pixels
    return stride


@triton.jit
def _offsets(c, p, pixels, C: tl.constexpr, PIXEL_MAJOR: tl.constexpr, WIDE: tl.constexpr):
    """Of channels c and pixels p, both counted from the tile's first: [channels, pixels]."""
    if WIDE:
        c = c.to(tl.int64)
        p = p.to(tl.int64)
    if PIXEL_MAJOR:
        offsets = c[:, None] + p[None, :] * C
    else:
        offsets = c[:, None] * pixels + p[None, :]
    return offsets


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))  # exp(-z) may be inf: g is 0 then


# ---- levels (1, 2, 4), a tile in registers ------------------------------------------------------------------------------------------


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
    """The seven normalized contexts of every pixel, and 1 / sqrt(var + eps), from the sums of its four segments."""
    # Contexts are taken relative to the first: what is normalized are differences, and these are exact where small.
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
    return n0 * inv_std, n1 * inv_std, n2 * inv_std, n3 * inv_std, n4 * inv_std, n5 * inv_std, n6 * inv_std, inv_std


@triton.jit
def _finished(x, g, residual, where, inside, MODE: tl.constexpr, ACC: tl.constexpr):
    """y of one segment, from its x and the gates."""
    y = x.to(ACC) * g[None, :]
    if MODE == ADD_RELU:
        y += tl.load(residual + where, mask=inside, other=0, eviction_policy="evict_first").to(ACC)
        y = tl.where(y <= 0, 0, y)  # NaN stays
    return y


@triton.jit
def tile_forward(
    x,
    residual,
    weight,
    bias,
    out,
    pixel_units,
    tiles,
    EPS: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    PIXEL_MAJOR: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """S: channels of a segment, SP: the power of two above, P: pixels of a tile."""
    pixels = pixel_units * UNIT
    start, pixel, left = _place(pixels, tiles, 4 * S, P, PIXEL_MAJOR)
    c = tl.arange(0, SP)
    p = tl.arange(0, P)
    inside = (p < left)[None, :]
    if SP != S:
        inside = inside & (c < S)[:, None]
    offsets = _offsets(c, p, pixels, 4 * S, PIXEL_MAJOR, WIDE)
    segment = _channel_stride(pixels, PIXEL_MAJOR) * S
    o0 = start
    o1 = start + segment
    o2 = start + segment * 2
    o3 = start + segment * 3
    x0 = tl.load(x + o0 + offsets, mask=inside, other=0, eviction_policy="evict_first")
    x1 = tl.load(x + o1 + offsets, mask=inside, other=0, eviction_policy="evict_first")
    x2 = tl.load(x + o2 + offsets, mask=inside, other=0, eviction_policy="evict_first")
    x3 = tl.load(x + o3 + offsets, mask=inside, other=0, eviction_policy="evict_first")
    w0, w1, w2, w3, w4, w5, w6, b = _parameters(weight, bias, HAS_BIAS, ACC)
    n0, n1, n2, n3, n4, n5, n6, inv_std = _normalized(
        tl.sum(x0.to(ACC), 0), tl.sum(x1.to(ACC), 0), tl.sum(x2.to(ACC), 0), tl.sum(x3.to(ACC), 0), EPS, S
    )
    g = _sigmoid(n0 * w0 + n1 * w1 + n2 * w2 + n3 * w3 + n4 * w4 + n5 * w5 + n6 * w6 + b)
    kind: tl.constexpr = out.dtype.element_ty
    if MODE == GATE:
        tl.store(out + pixel + p, g.to(kind), mask=p < left)
    else:
        tl.store(out + o0 + offsets, _finished(x0, g, residual + o0, offsets, inside, MODE, ACC).to(kind), mask=inside)
        tl.store(out + o1 + offsets, _finished(x1, g, residual + o1, offsets, inside, MODE, ACC).to(kind), mask=inside)
        tl.store(out + o2 + offsets, _finished(x2, g, residual + o2, offsets, inside, MODE, ACC).to(kind), mask=inside)
        tl.store(out + o3 + offsets, _finished(x3, g, residual + o3, offsets, inside, MODE, ACC).to(kind), mask=inside)


@triton.jit
def _incoming(grad, y, d_residual, where, inside, MODE: tl.constexpr):
    """The gradient that reaches x * g; for ADD_RELU masked where y is 0, and that is the residual's."""
    u = tl.load(grad + where, mask=inside, other=0, eviction_policy="evict_first")
    if MODE == ADD_RELU:
        u = tl.where(tl.load(y + where, mask=inside, other=0, eviction_policy="evict_first") <= 0, 0, u)
        tl.store(d_residual + where, u, mask=inside)
    return u


@triton.jit
def tile_backward(
    x,
    grad,
    y,
    weight,
    bias,
    dx,
    d_residual,
    partials,
    pixel_units,
    tiles,
    EPS: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    MODE: tl.constexpr,
    PIXEL_MAJOR: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Holds the incoming gradient: what comes after the gates, dx = grad g + dsums, needs no x. partials: [8, programs]."""
    pixels = pixel_units * UNIT
    start, pixel, left = _place(pixels, tiles, 4 * S, P, PIXEL_MAJOR)
    c = tl.arange(0, SP)
    p = tl.arange(0, P)
    inside = (p < left)[None, :]
    if SP != S:
        inside = inside & (c < S)[:, None]
    offsets = _offsets(c, p, pixels, 4 * S, PIXEL_MAJOR, WIDE)
    segment = _channel_stride(pixels, PIXEL_MAJOR) * S
    o0 = start
    o1 = start + segment
    o2 = start + segment * 2
    o3 = start + segment * 3
    x0 = tl.load(x + o0 + offsets, mask=inside, other=0, eviction_policy="evict_first").to(ACC)
    x1 = tl.load(x + o1 + offsets, mask=inside, other=0, eviction_policy="evict_first").to(ACC)
    x2 = tl.load(x + o2 + offsets, mask=inside, other=0, eviction_policy="evict_first").to(ACC)
    x3 = tl.load(x + o3 + offsets, mask=inside, other=0, eviction_policy="evict_first").to(ACC)
    if MODE == GATE:
        dg = tl.load(grad + pixel + p, mask=p < left, other=0).to(ACC)
    else:
        u0 = _incoming(grad + o0, y + o0, d_residual + o0, offsets, inside, MODE)
        u1 = _incoming(grad + o1, y + o1, d_residual + o1, offsets, inside, MODE)
        u2 = _incoming(grad + o2, y + o2, d_residual + o2, offsets, inside, MODE)
        u3 = _incoming(grad + o3, y + o3, d_residual + o3, offsets, inside, MODE)
        dg = tl.sum(x0 * u0.to(ACC) + x1 * u1.to(ACC) + x2 * u2.to(ACC) + x3 * u3.to(ACC), 0)
    w0, w1, w2, w3, w4, w5, w6, b = _parameters(weight, bias, HAS_BIAS, ACC)
    n0, n1, n2, n3, n4, n5, n6, inv_std = _normalized(tl.sum(x0, 0), tl.sum(x1, 0), tl.sum(x2, 0), tl.sum(x3, 0), EPS, S)
    z = n0 * w0 + n1 * w1 + n2 * w2 + n3 * w3 + n4 * w4 + n5 * w5 + n6 * w6
    g = _sigmoid(z + b)
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


# ---- any levels, two passes over the channels ---------------------------------------------------------------------------------------


@triton.jit
def _bins(LEVELS: tl.constexpr, C: tl.constexpr, LP: tl.constexpr):
    """First channel of every context's bin, and one past the last; both 0 for padding. Computed here, so that no table has to
    be copied to the device, which a CUDA graph could not capture."""
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
            mine, (i + 1) * (C // LEVELS[j]) + ((i + 1) * (C % LEVELS[j]) + LEVELS[j] - 1) // LEVELS[j], end
        )
        first += LEVELS[j]
    return begin, end


@triton.jit
def _next_edge(begin, end, c, C: tl.constexpr, ALIGN: tl.constexpr):
    """Where the segment that begins at channel c ends. All edges are multiples of ALIGN, which the division tells the compiler."""
    edge = tl.minimum(tl.min(tl.where(begin > c, begin, C), 0), tl.min(tl.where(end > c, end, C), 0))
    return edge // ALIGN * ALIGN


@triton.jit
def _contexts(t, begin, end, L: tl.constexpr, EPS: tl.constexpr, LP: tl.constexpr, ACC: tl.constexpr):
    """Normalized contexts [LP, P] (0 for padding), 1 / sqrt(var + eps) and 1 / |bin|, from the sums t over the bins."""
    l = tl.arange(0, LP)
    real = (l < L)[:, None]
    inverse = 1.0 / tl.maximum(end - begin, 1).to(ACC)
    t = t * inverse[:, None]
    pivot = tl.sum(tl.where((l == 0)[:, None], t, 0), 0)  # as in _normalized
    n = tl.where(real, t - pivot[None, :], 0)
    mean = tl.sum(n, 0) * (1.0 / L)
    n = tl.where(real, n - mean[None, :], 0)
    inv_std = tl.rsqrt(tl.sum(n * n, 0) * (1.0 / L) + EPS)
    return n * inv_std[None, :], inv_std, inverse


@triton.jit
def walk_forward(
    x,
    residual,
    weight,
    bias,
    out,
    pixel_units,
    tiles,
    EPS: tl.constexpr,
    LEVELS: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    MODE: tl.constexpr,
    PIXEL_MAJOR: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """L, LP: contexts, and the power of two above. CHUNK: channels at a time. ALIGN: divides every edge of a bin."""
    pixels = pixel_units * UNIT
    start, pixel, left = _place(pixels, tiles, C, P, PIXEL_MAJOR)
    stride = _channel_stride(pixels, PIXEL_MAJOR)
    c = tl.arange(0, CHUNK)
    p = tl.arange(0, P)
    shown = (p < left)[None, :]
    offsets = _offsets(c, p, pixels, C, PIXEL_MAJOR, WIDE)
    begin, end = _bins(LEVELS, C, LP)
    t = tl.zeros((LP, P), ACC)
    first = tl.full((), 0, tl.int32)
    while first < C:
        edge = _next_edge(begin, end, first, C, ALIGN)
        sums = tl.zeros((CHUNK, P), ACC)
        for at in range(first // ALIGN * ALIGN, edge, CHUNK):
            inside = (c < edge - at)[:, None] & shown
            sums += tl.load(x + start + at * stride + offsets, mask=inside, other=0, eviction_policy="evict_last").to(ACC)
        holds = (begin <= first) & (first < end)
        t += tl.where(holds[:, None], tl.sum(sums, 0)[None, :], 0)
        first = edge
    n, inv_std, inverse = _contexts(t, begin, end, L, EPS, LP, ACC)
    l = tl.arange(0, LP)
    w = tl.load(weight + l, mask=l < L, other=0).to(ACC)
    z = tl.sum(n * w[:, None], 0)
    if HAS_BIAS:
        z += tl.load(bias).to(ACC)
    g = _sigmoid(z)
    kind: tl.constexpr = out.dtype.element_ty
    if MODE == GATE:
        tl.store(out + pixel + p, g.to(kind), mask=p < left)
    else:
        for at in range(0, C, CHUNK):
            inside = (c < C - at)[:, None] & shown
            here = start + at * stride
            v = tl.load(x + here + offsets, mask=inside, other=0, eviction_policy="evict_first")
            tl.store(out + here + offsets, _finished(v, g, residual + here, offsets, inside, MODE, ACC).to(kind), mask=inside)


@triton.jit
def walk_backward(
    x,
    grad,
    y,
    weight,
    bias,
    dx,
    d_residual,
    partials,
    pixel_units,
    tiles,
    EPS: tl.constexpr,
    LEVELS: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    MODE: tl.constexpr,
    PIXEL_MAJOR: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    """partials: [L + 1, programs]."""
    pixels = pixel_units * UNIT
    start, pixel, left = _place(pixels, tiles, C, P, PIXEL_MAJOR)
    stride = _channel_stride(pixels, PIXEL_MAJOR)
    c = tl.arange(0, CHUNK)
    p = tl.arange(0, P)
    shown = (p < left)[None, :]
    offsets = _offsets(c, p, pixels, C, PIXEL_MAJOR, WIDE)
    begin, end = _bins(LEVELS, C, LP)
    t = tl.zeros((LP, P), ACC)
    dg = tl.zeros((P,), ACC)
    first = tl.full((), 0, tl.int32)
    while first < C:
        edge = _next_edge(begin, end, first, C, ALIGN)
        sums = tl.zeros((CHUNK, P), ACC)
        products = tl.zeros((CHUNK, P), ACC)
        for at in range(first // ALIGN * ALIGN, edge, CHUNK):
            inside = (c < edge - at)[:, None] & shown
            here = start + at * stride
            v = tl.load(x + here + offsets, mask=inside, other=0, eviction_policy="evict_first").to(ACC)
            sums += v
            if MODE != GATE:
                u = tl.load(grad + here + offsets, mask=inside, other=0, eviction_policy="evict_last")
                if MODE == ADD_RELU:
                    u = tl.where(tl.load(y + here + offsets, mask=inside, other=0, eviction_policy="evict_last") <= 0, 0, u)
                products += v * u.to(ACC)
        holds = (begin <= first) & (first < end)
        t += tl.where(holds[:, None], tl.sum(sums, 0)[None, :], 0)
        if MODE != GATE:
            dg += tl.sum(products, 0)
        first = edge
    n, inv_std, inverse = _contexts(t, begin, end, L, EPS, LP, ACC)
    l = tl.arange(0, LP)
    w = tl.load(weight + l, mask=l < L, other=0).to(ACC)
    z = tl.sum(n * w[:, None], 0)
    if HAS_BIAS:
        g = _sigmoid(z + tl.load(bias).to(ACC))
    else:
        g = _sigmoid(z)
    if MODE == GATE:
        dg = tl.load(grad + pixel + p, mask=p < left, other=0).to(ACC)
    dz = tl.where(p < left, dg * g * (1.0 - g), 0)
    w_mean = tl.sum(w, 0) * (1.0 / L)
    dt = (dz * inv_std)[None, :] * ((w - w_mean)[:, None] - n * (z * (1.0 / L))[None, :]) * inverse[:, None]

    kind: tl.constexpr = dx.dtype.element_ty
    first = tl.full((), 0, tl.int32)
    while first < C:
        edge = _next_edge(begin, end, first, C, ALIGN)
        holds = (begin <= first) & (first < end)
        dsums = tl.sum(tl.where(holds[:, None], dt, 0), 0)
        for at in range(first // ALIGN * ALIGN, edge, CHUNK):
            inside = (c < edge - at)[:, None] & shown
            here = start + at * stride
            d = tl.zeros((CHUNK, P), ACC) + dsums[None, :]
            if MODE != GATE:
                u = _incoming(grad + here, y + here, d_residual + here, offsets, inside, MODE)
                d += u.to(ACC) * g[None, :]
            tl.store(dx + here + offsets, d.to(kind), mask=inside)
        first = edge

    programs = tl.num_programs(0).to(tl.int64)
    partials += tl.program_id(0)
    tl.store(partials + l * programs, tl.sum(dz[None, :] * n, 1), mask=l < L)
    tl.store(partials + L * programs, tl.sum(dz, 0))


# ---- gradients of the parameters ----------------------------------------------------------------------------------------------------


@triton.jit
def finish(partials, d_weight, d_bias, count, L: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
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
