// SIMD vectors of float or double on the compiler's vector extension, for one instruction set per
// translation unit: PPCR_SIMD_BYTES and the target that kernels_impl.h sets. All is inlined, so
// that the linker cannot pick a symbol for a wide instruction set where a narrow one is needed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../ppcr_types.h"

#define PPCR_INLINE static inline __attribute__((always_inline))

namespace ppcr::PPCR_CAPABILITY {

// Storage of the 16-bit types; arithmetic happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class S, int bytes = PPCR_SIMD_BYTES>
struct VectorOf {
  typedef S type __attribute__((vector_size(bytes)));
};
using VF = VectorOf<float>::type;
using VD = VectorOf<double>::type;
typedef uint32_t VU __attribute__((vector_size(PPCR_SIMD_BYTES)));
typedef uint16_t VH __attribute__((vector_size(PPCR_SIMD_BYTES / 2)));

template <class S>
constexpr int kLanes = PPCR_SIMD_BYTES / static_cast<int>(sizeof(S));

template <class V, class P>
PPCR_INLINE V load_unaligned(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class W>
PPCR_INLINE V bits_as(const W& w) {
  static_assert(sizeof(V) == sizeof(W), "same bits");
  return load_unaligned<V>(&w);
}

// ---- what the instruction sets have, each in its own words
//
// widen: 16-bit elements to floats; high_halves: the upper halves of 32-bit lanes. Written out,
//   because the compiler splits and permutes in __builtin_convertvector.
// any_nan: not zero where a lane of a or b is NaN.
// load, store with a count: the first n lanes, 0 < n < lanes; the others load as zero.
// permute: each lane takes one of four values, by its number.
// multiply_add: a * b + c, rounded once where the instruction set can. The compiler may fuse such
//   an expression in one place and not in another, and then a result would depend on the alignment
//   that decides which place computes it.
// maskz: GCC's plain forms warn of an uninitialized operand of their own.
#if PPCR_SIMD_BYTES == 64
PPCR_INLINE VF widen(VH h, BFloat16) {  // one permutation in place of a conversion and a shift
  const VU lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return bits_as<VF>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, bits_as<__m512i>(lane << 16),
                                                    _mm512_castsi256_si512(bits_as<__m256i>(h))));
}
PPCR_INLINE VH high_halves(VU u) {  // one permutation in place of a shift and a conversion
  const VU odd = {0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d};
  return bits_as<VH>(_mm512_castsi512_si256(
      _mm512_maskz_permutexvar_epi16(~0u, bits_as<__m512i>(odd), bits_as<__m512i>(u))));
}
PPCR_INLINE VF widen(VH h, Half) { return _mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(h)); }
PPCR_INLINE VH narrow(VF v, Half) {
  return bits_as<VH>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
}
PPCR_INLINE VF load(const float* p, int n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
PPCR_INLINE VD load(const double* p, int n) { return _mm512_maskz_loadu_pd((1u << n) - 1, p); }
template <class T>
PPCR_INLINE VF load(const T* p, int n) {
  return widen(bits_as<VH>(_mm256_maskz_loadu_epi16((1u << n) - 1, p)), T{});
}
PPCR_INLINE void store(float* p, VF v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
PPCR_INLINE void store(double* p, VD v, int n) { _mm512_mask_storeu_pd(p, (1u << n) - 1, v); }
template <class T>
PPCR_INLINE void store(T* p, VF v, int n) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, bits_as<__m256i>(narrow(v, T{})));
}
PPCR_INLINE VF permute(__m128 v, VU from) {
  return _mm512_maskz_permutevar_ps(0xffff, _mm512_broadcast_f32x4(v), bits_as<__m512i>(from));
}
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) { return _mm512_fmadd_pd(a, b, c); }
PPCR_INLINE int any_nan(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
#elif PPCR_SIMD_BYTES == 32
PPCR_INLINE VF widen(VH h, BFloat16) {
  return bits_as<VF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits_as<__m128i>(h)), 16));
}
PPCR_INLINE VH high_halves(VU u) {
  const __m256i v = bits_as<__m256i>(u >> 16);
  return bits_as<VH>(
      _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08)));
}
PPCR_INLINE VF widen(VH h, Half) { return _mm256_cvtph_ps(bits_as<__m128i>(h)); }
PPCR_INLINE VH narrow(VF v, Half) {
  return bits_as<VH>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
PPCR_INLINE __m256i words_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PPCR_INLINE VF load(const float* p, int n) { return _mm256_maskload_ps(p, words_below(n)); }
PPCR_INLINE VD load(const double* p, int n) { return _mm256_maskload_pd(p, words_below(2 * n)); }
PPCR_INLINE VF permute(__m128 v, VU from) {
  return _mm256_permutevar_ps(_mm256_set_m128(v, v), bits_as<__m256i>(from));
}
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) { return _mm256_fmadd_pd(a, b, c); }
PPCR_INLINE int any_nan(VF a, VF b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q));
}
#elif defined(__aarch64__)
PPCR_INLINE VF widen(VH h, BFloat16) { return bits_as<VF>(vmovl_u16(h) << 16); }
PPCR_INLINE VH high_halves(VU u) { return __builtin_convertvector(u >> 16, VH); }
PPCR_INLINE VF widen(VH h, Half) { return vcvt_f32_f16(bits_as<float16x4_t>(h)); }
PPCR_INLINE VH narrow(VF v, Half) { return bits_as<VH>(vcvt_f16_f32(v)); }
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) { return vfmaq_f64(c, a, b); }
#else
PPCR_INLINE VF widen(VH h, BFloat16) { return bits_as<VF>(__builtin_convertvector(h, VU) << 16); }
PPCR_INLINE VH high_halves(VU u) { return __builtin_convertvector(u >> 16, VH); }
PPCR_INLINE VF widen(VH h, Half) {
  const VU u = __builtin_convertvector(h, VU), magnitude = u & 0x7fffu;
  const VU up = magnitude < 0x7c00u ? (112u << 23) + VU{} : (224u << 23) + VU{};
  // Not a product of subnormal floats, which some programs have flushed to zero.
  const VU subnormal = bits_as<VU>(__builtin_convertvector(magnitude, VF) * 0x1p-24f);
  const VU bits = magnitude < 0x400u ? subnormal : (magnitude << 13) + up;
  return bits_as<VF>(bits | (u & 0x8000u) << 16);
}
PPCR_INLINE VH narrow(VF v, Half) {  // round to nearest even, subnormals and overflow included
  const VU u = bits_as<VU>(v), magnitude = u & 0x7fffffffu;
  const VU normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const VU subnormal = bits_as<VU>(bits_as<VF>(magnitude) + 0.5f) -
                       0x3f000000u;  // adding 0.5 rounds at the subnormals' unit
  const VU finite = magnitude < 0x38800000u ? subnormal : normal;
  const VU special = magnitude > 0x7f800000u ? 0x7e00u + VU{} : 0x7c00u + VU{};
  const VU bits = magnitude >= 0x47800000u ? special : finite;
  return __builtin_convertvector(bits | ((u >> 16) & 0x8000u), VH);
}
template <class V>
PPCR_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

// ---- loads and stores at any alignment

PPCR_INLINE VH narrow(VF v, BFloat16) {  // round to nearest even; NaN stays NaN
  const VU u = bits_as<VU>(v);
  const VU rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return high_halves(v == v ? rounded : 0x7fc00000u + VU{});
}

struct All {};  // in place of a count: all lanes
PPCR_INLINE VF load(const float* p, All = {}) { return load_unaligned<VF>(p); }
PPCR_INLINE VD load(const double* p, All = {}) { return load_unaligned<VD>(p); }
template <class T>
PPCR_INLINE VF load(const T* p, All = {}) {
  return widen(load_unaligned<VH>(p), T{});
}
PPCR_INLINE void store(float* p, VF v, All = {}) { std::memcpy(p, &v, sizeof v); }
PPCR_INLINE void store(double* p, VD v, All = {}) { std::memcpy(p, &v, sizeof v); }
template <class T>
PPCR_INLINE void store(T* p, VF v, All = {}) {
  const VH h = narrow(v, T{});
  std::memcpy(p, &h, sizeof h);
}

// Two vectors of bfloat16 at once: as 32-bit lanes, memory holds the elements of even index in
// their lower halves and those of odd index in the upper ones. Takes half the instructions.
struct Even {};  // in place of a count: every other element, of twice as many
struct Odd {};
PPCR_INLINE VF load(const BFloat16* p, Even) { return bits_as<VF>(load_unaligned<VU>(p) << 16); }
PPCR_INLINE VF load(const BFloat16* p, Odd) {
  return bits_as<VF>(load_unaligned<VU>(p) & ~0xffffu);
}
#if PPCR_SIMD_BYTES > 16
typedef uint16_t VW __attribute__((vector_size(PPCR_SIMD_BYTES)));
PPCR_INLINE VW low_halves(VU even, VU odd) { return bits_as<VW>((even & 0xffffu) | (odd << 16)); }
PPCR_INLINE void store(BFloat16* p, VF even, VF odd) {
  const VU e = bits_as<VU>(even), o = bits_as<VU>(odd);
  const VW low = low_halves(e, o), high = bits_as<VW>((e >> 16) | (o & 0xffff0000u));
  VW rounded = (low | (high & 1)) > 0x8000 ? high + 1 : high;  // to nearest even
  if (__builtin_expect(any_nan(even, odd), 0)) {
    const VW nan = low_halves(bits_as<VU>(even != even), bits_as<VU>(odd != odd));
    rounded = nan != 0 ? 0x7fc0 + VW{} : rounded;
  }
  std::memcpy(p, &rounded, sizeof rounded);
}
#endif

#if PPCR_SIMD_BYTES < 64
// The first n lanes, fewer than 16 bytes. They are put together in registers, because a vector read
// from memory that was written in pieces waits for all of these.
template <class T>
PPCR_INLINE auto load(const T* p, int n) {
  typedef uint64_t Words __attribute__((vector_size(16)));
  const int bytes = n * static_cast<int>(sizeof(T)), eight = bytes & 8, four = bytes & 4;
  const auto* const q = reinterpret_cast<const char*>(p) + eight;
  uint64_t first = 0;
  uint32_t low = 0;
  uint16_t high = 0;
  if (eight) std::memcpy(&first, p, 8);
  if (four) std::memcpy(&low, q, 4);
  if (bytes & 2) std::memcpy(&high, q + four, 2);
  const uint64_t last = low | uint64_t{high} << four * 8;
  const Words words = {eight ? first : last, eight ? last : 0};
  if constexpr (sizeof(T) == 2)
    return widen(load_unaligned<VH>(&words), T{});
  else
    return load_unaligned<typename VectorOf<T>::type>(&words);
}
// Also for AVX2, whose masked stores take twice as long as this on Zen 4.
template <class T, class V>
PPCR_INLINE void store(T* p, V v, int n) {
  constexpr int W = kLanes<Acc<T>>;
  T lanes[W];
  store(lanes, v);
  for (int part = W / 2, i = 0; part; i += n & part, part /= 2)
    if (n & part) std::memcpy(p + i, lanes + i, part * sizeof(T));
}
#endif

// ---- sums across lanes

#ifdef __clang__
#define PPCR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // which GCC has from version 12 on
#define PPCR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif
// Within blocks of four lanes: the sums of neighbours, those of a and then those of b.
template <class V, int... I>
PPCR_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  return PPCR_SHUFFLE(a, b, (I / 4 * 4 + I % 2 * 2 + I % 4 / 2 * lanes)...) +
         PPCR_SHUFFLE(a, b, (I / 4 * 4 + I % 2 * 2 + I % 4 / 2 * lanes + 1)...);
}
template <class S>
using Four = typename VectorOf<S, 4 * sizeof(S)>::type;
// The sums of the blocks of four lanes of four vectors: block by block one of each vector.
template <class S, class V>
PPCR_INLINE void sum_blocks(const V (&v)[4], Four<S>* sums) {
  constexpr auto index = std::make_integer_sequence<int, kLanes<S>>{};
  const V pairs[2] = {add_neighbours(v[0], v[1], index), add_neighbours(v[2], v[3], index)};
  const V all = add_neighbours(pairs[0], pairs[1], index);
  kLanes<S> == 2 ? std::memcpy(sums, pairs, sizeof pairs) : std::memcpy(sums, &all, sizeof all);
}
// Stores the sums of four vectors.
template <class S, class V>
PPCR_INLINE void store_sums(S* to, const V (&v)[4]) {
  Four<S> sums[(kLanes<S> + 2) / 4];
  sum_blocks<S>(v, sums);
  PPCR_UNROLL
  for (int i = 1; i < kLanes<S> / 4; ++i) sums[0] = sums[0] + sums[i];
  std::memcpy(to, sums, sizeof sums[0]);
}

// ---- the functions that the pixel mathematics needs

// e^v without -ffast-math: v = n ln 2 + r, |r| <= ln 2 / 2, the power series of e^r up to what a
// rounding hides, and 2^n, which may be infinite. Below -87 (double: -708) it stays what it is
// there, which makes no difference to the sigmoid. NaN stays NaN: comparisons with it are false.
template <class V>
PPCR_INLINE V exponential(V v) {
  using S = std::remove_reference_t<decltype(v[0])>;
  constexpr bool single = sizeof(S) == 4;
  constexpr S most = single ? 89 : 710, least = single ? -87 : -708;
  constexpr S shift = single ? 0x1.8p23 : 0x1.8p52;  // adding it rounds to an integer
  v = v > most ? most + V{} : v;
  v = v < least ? least + V{} : v;
  const V shifted = v * S(1.44269504088896341) + shift, n = shifted - shift;
  const V r = (v - n * S(0.693359375)) + n * S(2.12194440054690583e-4);
  const V rr = r * r;
  V even = {}, odd = {};
  double c = single ? 1. / 5040 : 1. / 6227020800;  // 1 / 7!, 1 / 13!
  PPCR_UNROLL
  for (int k = single ? 7 : 13; k > 1; c *= k * (k - 1), k -= 2) {
    odd = odd * rr + S(c);
    even = even * rr + S(c * k);
  }
  const V e = ((odd * r + even) * rr + r) + 1;
  const auto power = (bits_as<decltype(v < v)>(shifted) + (single ? 127 : 1023))
                     << (single ? 23 : 52);
  return e * bits_as<V>(power);
}

struct SimdMath {
  template <class V>
  PPCR_INLINE V inv_sqrt(V v) {
    for (int i = 0; i < static_cast<int>(sizeof v / sizeof v[0]); ++i) v[i] = std::sqrt(v[i]);
    return 1 / v;
  }
  template <class V>
  PPCR_INLINE V sigmoid(V z) {
    return 1 / (1 + exponential(-z));
  }
};

}  // namespace ppcr::PPCR_CAPABILITY
