"""Faults of the pixel mathematics, which all devices share, and of the CPU library."""

from . import Mutant

PIXEL, TYPES, CHECKS = "ppcr_pixel.h", "ppcr_types.h", "checks.h"
KERNELS, SIMD, PLAN, ENTRY = "cpu/kernels_impl.h", "cpu/simd.h", "cpu/plan.cpp", "cpu/ppcr_cpu.cpp"

MUTANTS = (
    # the pixel mathematics
    Mutant("wrong sign in the contexts' gradient", PIXEL, "weight_mean) - pixel.n[l] * z_mean", "weight_mean) + pixel.n[l] * z_mean", sample=True),
    Mutant("missing eps", PIXEL, "variance * inverse_contexts + eps", "variance * inverse_contexts", sample=True),
    Mutant("unbiased variance", PIXEL, "variance * inverse_contexts +", "variance / S(contexts - 1) +"),
    Mutant("contexts not taken relative to the first", PIXEL, "if (l == 0) pivot = t;", ""),
    Mutant("bias left out of the gate", PIXEL, "Math::sigmoid(pixel.z + bias)", "Math::sigmoid(pixel.z)"),
    Mutant("derivative of the sigmoid cut short", PIXEL, "dg * pixel.g * (S(1) - pixel.g)", "dg * pixel.g"),
    Mutant("sum instead of mean of dn n", PIXEL, "pixel.z * (S(1) / S(contexts))", "pixel.z"),
    Mutant("last segment of a bin gets no gradient", PIXEL, "for (int k = first; k < last; ++k) dsums", "for (int k = first; k + 1 < last; ++k) dsums"),
    Mutant("last segment left out of its bin", PIXEL, "for (int k = first + 1; k < last; ++k) t", "for (int k = first + 1; k < last - 1; ++k) t"),
    Mutant("wrong bin edge, standard levels", PIXEL, "l < 3 ? 2 * (l - 1) : l - 3", "l < 3 ? l - 1 : l - 3"),
    Mutant("wrong bin size, standard levels", PIXEL, "inverse[l == 0 ? 0 : l < 3 ? 1 : 2]", "inverse[l == 0 ? 0 : 1]"),
    Mutant("inverse standard deviation squared", PIXEL, "const V scale = dz * pixel.inv_std;", "const V scale = dz * pixel.inv_std * pixel.inv_std;"),
    # pooling bins
    Mutant("bins that never overlap", TYPES, "(i * (channels % k) + k - 1) / k", "(i * (channels % k)) / k", sample=True),
    Mutant("remainder of the channels left out of an edge", TYPES, "i * (channels / k) + i * (channels % k) / k;", "i * (channels / k);"),
    Mutant("bin size one too large", TYPES, "pooling.size[l] = end - begin;", "pooling.size[l] = end - begin + 1;"),
    Mutant("four equal segments where 4 does not divide C", TYPES, " && channels % 4 == 0;", ";"),
    Mutant("more contexts than the arrays hold", TYPES, "levels[i] > kMaxContexts - contexts", "levels[i] > kMaxContexts"),
    Mutant("one context alone", TYPES, "if (contexts < 2)", "if (contexts < 1)"),
    Mutant("product before quotient", TYPES, "return i * (channels / k) + i * (channels % k) / k;", "return i * channels / k;",
           survives="differs where 64 C leaves 64 bits, and no tensor has 2^57 channels"),
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
    # the operators
    Mutant("stride of weight ignored", ENTRY, "p[i * t.stride(0)]", "p[i]"),
    Mutant("shape of the gradient unchecked", ENTRY, '  check_like_x("grad", grad, x);\n', "", after="> backward(const Tensor& grad"),
    Mutant("dbias takes dweight's value", ENTRY, "write(d, d_params_ + problem.pooling.contexts);", "write(d, d_params_);"),
    Mutant("eps too small for the type", ENTRY, "problem.eps = std::max<double>(\n        eps, x", "problem.eps = std::max<double>(\n        0, eps); (void)(x"),
    Mutant("any stride of the channels taken for channels_last", CHECKS, "if (!dense(1)) return false;", "dense(1);"),
    Mutant("gradient of another layout taken as it is", CHECKS, "if (same) return t;", "return t;"),
)  # fmt: skip
