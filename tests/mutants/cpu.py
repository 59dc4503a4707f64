"""Faults of the CPU kernels."""

from . import Mutant

KERNELS, SIMD, PLAN = "cpu/kernels_impl.h", "cpu/simd.h", "cpu/plan.cpp"

MUTANTS = (
    # tiles on the CPU
    Mutant("last vector of a run beyond its end", KERNELS, "count > kLanes<S> ? count - kLanes<S>", "count > kLanes<S> ? (vectors - 1) * kLanes<S>"),
    Mutant("last channel of a segment dropped", KERNELS, "for (; c < end; ++c) add_rows<1", "for (; c < end - 1; ++c) add_rows<1", sample=True),
    Mutant("ReLU loses a NaN", KERNELS, "return v <= 0 ? V{} : v;", "return v > 0 ? v : V{};"),
    Mutant("mask of the ReLU lets zero pass", KERNELS, "g = y <= 0 ? decltype(g){} : g;", "g = y < 0 ? decltype(g){} : g;"),
    Mutant("lanes counted twice", KERNELS, "dz[lane] = 0;", ";"),
    Mutant("sums not added up", KERNELS, "fresh ? v[0] : load(sum) + v[0]", "v[0]"),
    Mutant("dot product begins anew with every segment", KERNELS, "last_row, c == begin, c == 0, run);\n    for", "last_row, c == begin, c == begin, run);\n    for"),
    Mutant("only the last tile's share of dweight", KERNELS, "partial[l] += sum;", "partial[l] = sum;"),
    Mutant("gates do not go round", KERNELS, "row[run.count + i] = go_round ? row[i] : S(0)", "row[run.count + i] = S(0)"),
    Mutant("pixel index one too large", KERNELS, "if (pixel >= period) pixel -= period;", "if (pixel > period) pixel -= period;",
           survives="the gates go round: behind the last stand those of the first pixels again"),
    Mutant("last vector of a span takes the wrong gates", KERNELS, "pixel = static_cast<int>((length - W) % period);", "pixel = 0;"),
    Mutant("group of pixels beyond the run", KERNELS, "(i + j < run.count ? i + j : run.count - 1)", "(i + j)", tests="sanitize"),
    Mutant("sums of lanes without a pixel not cleared", KERNELS, "for (int i = run.count * F; i < stride * F; ++i)", "for (int i = stride * F; i < stride * F; ++i)"),
    Mutant("last tile of a long chunk left out", KERNELS, "begin + per_chunk + (chunk < longer ? 1 : 0)", "begin + per_chunk"),
    Mutant("shares of chunks overlap", KERNELS, "p.partial + chunk * (p.pooling.contexts + 1)", "p.partial + chunk * p.pooling.contexts"),
    Mutant("sum instead of mean of the weights", KERNELS, "weight_mean /= S(bins.contexts());", ""),
    Mutant("last tile as long as the others", KERNELS, "p.tiles_per_image ? p.pixels - pixel : p.tile_pixels", "p.tiles_per_image ? p.tile_pixels : p.tile_pixels"),
    Mutant("no prefetch", KERNELS, "__builtin_prefetch(s.out + from, 1);", ";", survives="a hint to the cache: the same values, later"),
    Mutant("tile larger than the scratch", PLAN, "if (tile > most) tile = most;", ""),
    Mutant("tail of pixels dropped", PLAN, " || (p.pixel_major && p.pixels > count * tile)", ""),
    # SIMD
    Mutant("bfloat16 truncated", SIMD, "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16", sample=True),
    Mutant("NaN of bfloat16 rounded like a number", SIMD, "narrow_bits(v == v ? rounded : 0x7fc0u + VU{})", "narrow_bits(rounded)"),
    Mutant("sigmoid of a very large z", SIMD, "v = v < -limit ? -limit + VF{} : v;", ""),
    Mutant("four of a partial vector's elements lost", SIMD, "if (n >= 4) std::memcpy(&words[0], p, 8);", "if (n > 4) std::memcpy(&words[0], p, 8);"),
    Mutant("partial store one lane short", SIMD, "void store(float* p, VF v, int n) { _mm256_maskstore_ps(p, lanes_below(n, 0.f)",
           "void store(float* p, VF v, int n) { _mm256_maskstore_ps(p, lanes_below(n - 1, 0.f)"),
)  # fmt: skip
