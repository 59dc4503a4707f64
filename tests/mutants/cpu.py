"""Faults of the CPU kernels."""

from . import Mutant

KERNELS, GATE, ELEMENTS = "cpu/kernels_impl.h", "cpu/gate_step.h", "cpu/elements.h"
HAAR, CONTIGUOUS, CHANNELS_LAST = "ppcr_haar.h", "cpu/contiguous.h", "cpu/channels_last.h"
SIMD, PLAN = "cpu/simd.h", "cpu/plan.cpp"

MUTANTS = (
    # vectors of pixels, and the gate step
    Mutant(
        "last vector of a run beyond its end",
        GATE,
        "count > kLanes<S> ? count - kLanes<S>",
        "count > kLanes<S> ? (vectors - 1) * kLanes<S>",
    ),
    Mutant("lanes counted twice", GATE, "dz = index < S(at - run.offset(i)) + V{} ? V{} : dz;", ""),
    Mutant(
        "only the last tile's share of dweight",
        GATE,
        "d_params[l][lane] += double(",
        "d_params[l][lane] = double(",
    ),
    Mutant("a chunk begins with the shares of the one before", GATE, "share = 0;", ";"),
    Mutant(
        "only the last lane's share of dweight", GATE, "partial[l] += share;", "partial[l] = share;"
    ),
    # the standard levels in three Haar coefficients
    Mutant("weight of a Haar coefficient", HAAR, "w[1] - w[2] + w[3]", "w[1] - w[2] - w[3]"),
    Mutant("variance without the smaller coefficients", HAAR, "(b * b + c * c)", "b * b"),
    Mutant(
        "slope of the half's other segment",
        HAAR,
        "w[1 + k / 2] + w[3 + k]",
        "w[1 + k / 2] + w[3 + (k ^ 1)]",
    ),
    Mutant("dx of the half's other segment", HAAR, "slope[2] + a - c", "slope[2] + a + c"),
    Mutant(
        "gradient of the half's other weight",
        HAAR,
        "-a, a + b, a - b, c - a",
        "-a, a - b, a + b, c - a",
    ),
    Mutant("sum instead of mean of the weights", GATE, "weight_mean /= S(bins.contexts());", ""),
    # what is read and written
    Mutant("ReLU loses a NaN", ELEMENTS, "return v <= 0 ? V{} : v;", "return v > 0 ? v : V{};"),
    Mutant(
        "mask of the ReLU lets zero pass",
        ELEMENTS,
        "<= 0 ? decltype(g){} : g;",
        "< 0 ? decltype(g){} : g;",
    ),
    # contiguous
    Mutant(
        "last channel of a segment dropped",
        CONTIGUOUS,
        "for (; c < end; ++c) add_rows<1",
        "for (; c < end - 1; ++c) add_rows<1",
        sample=True,
    ),
    Mutant(
        "first block of a row lost",
        CONTIGUOUS,
        "for (int i = 0; i < last;",
        "for (int i = last ? kLanes<S> : 0; i < last;",
    ),
    Mutant("last block of a row lost", CONTIGUOUS, "add(at + tile.run.last, last);", ""),
    Mutant(
        "last block of a row where it would not overlap",
        CONTIGUOUS,
        "add(at + tile.run.last, last",
        "add(at + last, last",
        tests="sanitize",
    ),
    Mutant(
        "stale shift: that of the segment before",
        CONTIGUOUS,
        "length, tile.gates(), tile.row(k),",
        "length, tile.gates(), tile.row(k ? k - 1 : 0),",
    ),
    Mutant(
        "stale gate: that of the first pixels",
        CONTIGUOUS,
        "apply(at + i, All{}, load(gate + pixel)",
        "apply(at + i, All{}, load(gate)",
    ),
    Mutant("sums not added up", CONTIGUOUS, "first ? v[0] : load(sum) + v[0]", "v[0]"),
    Mutant(
        "dot product begins anew with every segment",
        CONTIGUOUS,
        "c == 0 ? d[0] : load(dot) + d[0]",
        "first ? d[0] : load(dot) + d[0]",
    ),
    Mutant(
        "gates do not wrap",
        CONTIGUOUS,
        "row[run.count + i] = wrap ? row[i] : S(0)",
        "row[run.count + i] = S(0)",
    ),
    Mutant(
        "pixel index one too large",
        CONTIGUOUS,
        "if (pixel >= period) pixel -= period;",
        "if (pixel > period) pixel -= period;",
        survives="the gates wrap: behind the last stand those of the first pixels again",
    ),
    Mutant(
        "last vector of a span takes the wrong gates",
        CONTIGUOUS,
        "pixel = last % period;",
        "pixel = 0;",
    ),
    Mutant(
        "no prefetch",
        CONTIGUOUS,
        "if (prefetch) __builtin_prefetch(tile.out + from, 1);",
        ";",
        survives="a hint to the cache: the same values, later",
    ),
    Mutant(
        "plane's dot product begins anew with every segment",
        CONTIGUOUS,
        "k == 0 ? V{} : load(tile.gates()",
        "true ? V{} : load(tile.gates()",
        tests="sanitize",
    ),
    Mutant(
        "last channel of a plane's segment dropped",
        CONTIGUOUS,
        "c < p.pooling.edge[k + 1]; ++c) { PPCR_UNROLL",
        "c < p.pooling.edge[k + 1] - 1; ++c) { PPCR_UNROLL",
        tests="sanitize",
    ),
    Mutant(
        "first channel of a plane's segment dropped",
        CONTIGUOUS,
        "int64_t c = p.pooling.edge[k]; c < p.pooling.edge[k + 1]; ++c) { PPCR_UNROLL",
        "int64_t c = p.pooling.edge[k] + 1; c < p.pooling.edge[k + 1]; ++c) { PPCR_UNROLL",
        tests="sanitize",
    ),
    Mutant(
        "segments of a plane applied with one gate too few",
        CONTIGUOUS,
        "plane ? (end - begin) * p.pixels",
        "plane ? (end - begin) * p.pixels - 1",
    ),
    # channels_last
    Mutant(
        "group of pixels beyond the run",
        CHANNELS_LAST,
        "(i < tile.run.count ? i : tile.run.count - 1)",
        "i",
        tests="sanitize",
    ),
    Mutant(
        "later vectors of equal segments replace the first",
        CHANNELS_LAST,
        "First ? x : v[i] + x",
        "x",
        tests="sanitize",
    ),
    Mutant(
        "first vectors of equal segments counted twice",
        CHANNELS_LAST,
        "add_channels(tile, from, W, size,",
        "add_channels(tile, from, 0, size,",
        tests="sanitize",
    ),
    Mutant(
        "sums of lanes without a pixel not cleared",
        CHANNELS_LAST,
        "for (int i = count * F; i < stride * F; ++i)",
        "for (int i = stride * F; i < stride * F; ++i)",
    ),
    Mutant(
        "one of four vectors not summed",
        CHANNELS_LAST,
        "return (v[0] + v[1]) + (v[2] + v[3]);",
        "return (v[0] + v[1]) + v[2];",
        tests="sanitize",
    ),
    Mutant(
        "rest of a segment dropped",
        CHANNELS_LAST,
        "add_channels(tile, {0}, c, end, v, d, false);",
        ";",
        tests="sanitize",
    ),
    Mutant(
        "first block of a segment dropped",
        CHANNELS_LAST,
        "int64_t c = at + p.pooling.edge[k];",
        "int64_t c = at + p.pooling.edge[k] + 4 * W;",
        tests="sanitize",
    ),
    Mutant(
        "block taken from the segment's begin",
        CHANNELS_LAST,
        "{c, c + W, c + 2 * W, c + 3 * W}",
        "{c, c + W, c + W, c + 3 * W}",
        tests="sanitize",
    ),
    Mutant(
        "stale gate: that of the pixel before",
        CHANNELS_LAST,
        "tile.gates()[i] + V{}",
        "tile.gates()[i ? i - 1 : 0] + V{}",
    ),
    Mutant(
        "shift of the segment before",
        CHANNELS_LAST,
        "apply_run(tile, at + k * size, size, gate, tile.row(k)[i] + V{})",
        "apply_run(tile, at + k * size, size, gate, tile.row(k ? k - 1 : 0)[i] + V{})",
        tests="sanitize",
    ),
    Mutant(
        "equal segments in the wrong order",
        CHANNELS_LAST,
        "{at, at + size, at + 2 * size, at + 3 * size}",
        "{at, at + 2 * size, at + size, at + 3 * size}",
        tests="sanitize",
    ),
    # tiles
    Mutant(
        "last tile of a long chunk left out",
        KERNELS,
        "begin + per_chunk + (chunk < longer ? 1 : 0)",
        "begin + per_chunk",
    ),
    Mutant(
        "shares of chunks overlap",
        KERNELS,
        "p.partial + chunk * (p.pooling.contexts + 1)",
        "p.partial + chunk * p.pooling.contexts",
    ),
    Mutant(
        "last tile as long as the others",
        KERNELS,
        "p.tiles_per_image ? p.pixels - pixel : p.tile_pixels",
        "p.tiles_per_image ? p.tile_pixels : p.tile_pixels",
    ),
    Mutant("tile larger than the scratch", PLAN, "longest = most;", "longest = 1 << 20;"),
    Mutant(
        "tile as long as its cache",
        PLAN,
        "if (tile > longest) tile = longest;",
        "",
        tests="sanitize",
    ),
    Mutant(
        "tile rounded up beyond the scratch",
        PLAN,
        "capacity / rows - 2 * unit",
        "capacity / rows + unit",
        tests="sanitize",
    ),
    Mutant("last tile lost", PLAN, "++count;", "--count;"),
    Mutant("last tile counted twice", PLAN, "++count;", "count += 2;", tests="sanitize"),
    Mutant(
        "tiles that overlap",
        KERNELS,
        "pixel = in_image * p.tile_pixels;",
        "pixel = in_image * (p.tile_pixels - 1);",
    ),
    Mutant("tail of pixels dropped", PLAN, "|| (p.channels_last && p.pixels > count * tile)", ""),
    # SIMD
    Mutant("bfloat16 truncated", SIMD, "u + 0x7fffu + ((u >> 16) & 1u)", "u", sample=True),
    Mutant(
        "NaN of bfloat16 rounded like a number",
        SIMD,
        "high_halves(v == v ? rounded : 0x7fc00000u + VU{})",
        "high_halves(rounded)",
    ),
    Mutant("sigmoid of a very large z", SIMD, "v = v < -87.f ? -87.f + VF{} : v;", ""),
    Mutant("sigmoid of a very small z", SIMD, "v = v > 89.f ? 89.f + VF{} : v;", ""),
    Mutant(
        "four of a partial vector's elements lost",
        SIMD,
        "if (n >= 4) std::memcpy(&words[0], p, 8);",
        "if (n > 4) std::memcpy(&words[0], p, 8);",
    ),
    Mutant(
        "partial store one lane short",
        SIMD,
        "void store(float* p, VF v, int n) { _mm256_maskstore_ps(p, lanes_below(n, 0.f)",
        "void store(float* p, VF v, int n) { _mm256_maskstore_ps(p, lanes_below(n - 1, 0.f)",
    ),
)
