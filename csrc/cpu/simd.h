// SIMD vectors of float or double on the compiler's vector extension, for one instruction set per
// translation unit. The including file sets PPCR_SIMD_BYTES and the target (see kernels_avx2.cpp);
// everything here is inlined, so that no symbol compiled for a wider instruction set can be picked
// by the linker for a narrower one.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
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

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(PPCR_SIMD_BYTES)));
};
using VF = VectorOf<float>::type;
using VD = VectorOf<double>::type;
typedef uint32_t VU __attribute__((vector_size(PPCR_SIMD_BYTES)));
typedef int64_t VL __attribute__((vector_size(PPCR_SIMD_BYTES)));
typedef uint16_t VH __attribute__((vector_size(PPCR_SIMD_BYTES / 2)));

template <class S>
constexpr int kLanes = PPCR_SIMD_BYTES / static_cast<int>(sizeof(S));
constexpr bool kMaskedStores = PPCR_SIMD_BYTES == 64;  // of the first n lanes, one instruction
template <class T>
constexpr int kWidth = kLanes<Acc<T>>;  // elements of T for a vector of accumulators

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
// widen_bits, high_halves: 16-bit lanes to 32-bit ones, and the upper halves of those back. Written
//   out, because the compiler splits and permutes in __builtin_convertvector.
// load, store with a count: the first n lanes, 0 < n < lanes; the others load as zero.
// multiply_add: a * b + c, rounded once where the instruction set can. The compiler may fuse such
//   an expression in one place and not in another, and then a result would depend on the alignment
//   that decides which place computes it.
// maskz: GCC's plain forms warn of an uninitialized operand of their own.
#if PPCR_SIMD_BYTES == 64
PPCR_INLINE VU widen_bits(VH h) {
  return bits_as<VU>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(h)));
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
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) { return _mm512_fmadd_pd(a, b, c); }
PPCR_INLINE VF square_root(VF v) { return _mm512_maskz_sqrt_ps(0xffff, v); }
PPCR_INLINE VD square_root(VD v) { return _mm512_maskz_sqrt_pd(0xff, v); }
#elif PPCR_SIMD_BYTES == 32
PPCR_INLINE VU widen_bits(VH h) { return bits_as<VU>(_mm256_cvtepu16_epi32(bits_as<__m128i>(h))); }
PPCR_INLINE VH high_halves(VU u) {
  const __m256i v = bits_as<__m256i>(u >> 16);
  return bits_as<VH>(
      _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08)));
}
PPCR_INLINE VF widen(VH h, Half) { return _mm256_cvtph_ps(bits_as<__m128i>(h)); }
PPCR_INLINE VH narrow(VF v, Half) {
  return bits_as<VH>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
PPCR_INLINE __m256i lanes_below(int n, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PPCR_INLINE __m256i lanes_below(int n, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
PPCR_INLINE VF load(const float* p, int n) { return _mm256_maskload_ps(p, lanes_below(n, 0.f)); }
PPCR_INLINE VD load(const double* p, int n) { return _mm256_maskload_pd(p, lanes_below(n, 0.)); }
PPCR_INLINE void store(float* p, VF v, int n) { _mm256_maskstore_ps(p, lanes_below(n, 0.f), v); }
PPCR_INLINE void store(double* p, VD v, int n) { _mm256_maskstore_pd(p, lanes_below(n, 0.), v); }
// 16-bit lanes have no masks here: four at a time, then one by one, put together in general
// registers.
template <class T>
PPCR_INLINE VF load(const T* p, int n) {
  uint64_t words[2] = {0, 0};
  if (n >= 4) std::memcpy(&words[0], p, 8);
  uint64_t rest = 0;
  for (int i = n & ~3; i < n; ++i) rest |= uint64_t(p[i].bits) << (i % 4 * 16);
  words[n >= 4] = n % 4 ? rest : words[n >= 4];
  return widen(bits_as<VH>(words), T{});
}
template <class T>
PPCR_INLINE void store(T* p, VF v, int n) {
  uint64_t words[2];
  const VH h = narrow(v, T{});
  std::memcpy(words, &h, sizeof h);
  if (n >= 4) std::memcpy(p, &words[0], 8);
  for (int i = n & ~3; i < n; ++i) p[i].bits = static_cast<uint16_t>(words[n >= 4] >> (i % 4 * 16));
}
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) { return _mm256_fmadd_pd(a, b, c); }
PPCR_INLINE VF square_root(VF v) { return _mm256_sqrt_ps(v); }
PPCR_INLINE VD square_root(VD v) { return _mm256_sqrt_pd(v); }
#elif defined(__aarch64__)
PPCR_INLINE VU widen_bits(VH h) { return vmovl_u16(h); }
PPCR_INLINE VH high_halves(VU u) { return __builtin_convertvector(u >> 16, VH); }
PPCR_INLINE VF widen(VH h, Half) { return vcvt_f32_f16(bits_as<float16x4_t>(h)); }
PPCR_INLINE VH narrow(VF v, Half) { return bits_as<VH>(vcvt_f16_f32(v)); }
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) { return vfmaq_f64(c, a, b); }
PPCR_INLINE VF square_root(VF v) { return vsqrtq_f32(v); }
PPCR_INLINE VD square_root(VD v) { return vsqrtq_f64(v); }
#else
PPCR_INLINE VU widen_bits(VH h) { return __builtin_convertvector(h, VU); }
PPCR_INLINE VH high_halves(VU u) { return __builtin_convertvector(u >> 16, VH); }
PPCR_INLINE VF widen(VH h, Half) {
  const VU u = widen_bits(h), magnitude = u & 0x7fffu;
  const VU normal = (magnitude << 13) + (112u << 23);
  const VU special = (magnitude << 13) | (255u << 23);
  // Not a product of subnormal floats, which some programs have flushed to zero.
  const VF subnormal = __builtin_convertvector(magnitude, VF) * 0x1p-24f;
  const VU is_special = bits_as<VU>(magnitude >= 0x7c00u),
           is_subnormal = bits_as<VU>(magnitude < 0x400u);
  const VU bits = (special & is_special) | (bits_as<VU>(subnormal) & is_subnormal) |
                  (normal & ~is_special & ~is_subnormal);
  return bits_as<VF>(bits | ((u & 0x8000u) << 16));
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
PPCR_INLINE VF square_root(VF v) {
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
PPCR_INLINE VD square_root(VD v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
#endif

// ---- loads and stores at any alignment

PPCR_INLINE VF widen(VH h, BFloat16) { return bits_as<VF>(widen_bits(h) << 16); }
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

#if PPCR_SIMD_BYTES == 16
// At most three lanes: a pair and one more. The compiler would call memcpy for a loop over them.
template <class T>
PPCR_INLINE void copy_lanes(T* to, const T* from, int n) {
  if (n & 2) std::memcpy(to, from, 2 * sizeof(T));
  if (n & 1) to[n & 2] = from[n & 2];
}
template <class T>
PPCR_INLINE auto load(const T* p, int n) {
  T lanes[kWidth<T>] = {};
  copy_lanes(lanes, p, n);
  return load(lanes);
}
template <class T, class V>
PPCR_INLINE void store(T* p, V v, int n) {
  T lanes[kWidth<T>];
  store(lanes, v);
  copy_lanes(p, lanes, n);
}
#endif

// ---- sums across lanes

template <class S>
constexpr int kFolded = kLanes<S> < 4 ? kLanes<S> : 4;  // partial sums left of a vector
#ifdef __clang__
#define PPCR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // which GCC has from version 12 on
#define PPCR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif
// Low halves of a and b plus their high halves, in blocks of `block` lanes: the first step of
// folding both at once.
template <int block, class V, int... I>
PPCR_INLINE V add_blocks(V a, V b, std::integer_sequence<int, I...>) {
  return PPCR_SHUFFLE(a, b, (I / block * 2 * block + I % block)...) +
         PPCR_SHUFFLE(a, b, (I / block * 2 * block + I % block + block)...);
}
// Folds four vectors to kFolded partial sums each and stores them side by side.
template <class S, class V>
PPCR_INLINE void store_folded(S* to, const V (&v)[4]) {
  constexpr int lanes = kLanes<S>;
  constexpr auto index = std::make_integer_sequence<int, lanes>{};
  if constexpr (lanes == 4 * kFolded<S>) {
    store(to, add_blocks<lanes / 4>(add_blocks<lanes / 2>(v[0], v[1], index),
                                    add_blocks<lanes / 2>(v[2], v[3], index), index));
  } else if constexpr (lanes == 2 * kFolded<S>) {
    store(to, add_blocks<lanes / 2>(v[0], v[1], index));
    store(to + lanes, add_blocks<lanes / 2>(v[2], v[3], index));
  } else {
    store(to, v[0]);
    store(to + lanes, v[1]);
    store(to + 2 * lanes, v[2]);
    store(to + 3 * lanes, v[3]);
  }
}
template <class V, int... I>
PPCR_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, I...>) {
  return PPCR_SHUFFLE(a, b, (2 * I)...) + PPCR_SHUFFLE(a, b, (2 * I + 1)...);
}
// The sums of kLanes consecutive groups of kFolded values at p, one group a lane.
template <class S>
PPCR_INLINE auto sum_groups(const S* p) {
  constexpr int lanes = kLanes<S>;
  constexpr auto index = std::make_integer_sequence<int, lanes>{};
  const auto a = add_neighbours(load(p), load(p + lanes), index);
  if constexpr (kFolded<S> == 2)
    return a;
  else
    return add_neighbours(a, add_neighbours(load(p + 2 * lanes), load(p + 3 * lanes), index),
                          index);
}

// ---- the functions that the pixel mathematics needs

// e^v without -ffast-math: v = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r, and 2^n, which may
// be infinite. Below -87 (double: -708) it stays what it is there, which makes no difference to the
// sigmoid. NaN stays NaN: every comparison with it is false.
PPCR_INLINE VF exponential(VF v) {
  v = v > 89.f ? 89.f + VF{} : v;
  v = v < -87.f ? -87.f + VF{} : v;
  const float shift = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  const VF shifted = v * 1.44269504088896341f + shift;
  const VF n = shifted - shift;
  const VF r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  const VF rr = r * r;
  const VF p =
      (r * 1.9875691500e-4f + 1.3981999507e-3f) * rr + (r * 8.3334519073e-3f + 4.1665795894e-2f);
  const VF e = (p * rr + (r * 1.6666665459e-1f + 5.0000001201e-1f)) * rr + r + 1.f;
  const VU power = (bits_as<VU>(shifted) + 127u) << 23;
  return e * bits_as<VF>(power);
}
PPCR_INLINE VD exponential(VD v) {
  v = v > 710. ? 710. + VD{} : v;
  v = v < -708. ? -708. + VD{} : v;
  const double shift = 0x1.8p52;
  const VD shifted = v * 1.4426950408889634074 + shift;
  const VD n = shifted - shift;
  const VD r = (v - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const VD rr = r * r;
  const VD p = r * ((rr * 1.26177193074810590878e-4 + 3.02994407707441961300e-2) * rr +
                    9.99999999999999999910e-1);
  const VD q = ((rr * 3.00198505138664455042e-6 + 2.52448340349684104192e-3) * rr +
                2.27265548208155028766e-1) *
                   rr +
               2.;
  const VL power = (bits_as<VL>(shifted) + 1023) << 52;
  return (1. + 2. * (p / (q - p))) * bits_as<VD>(power);
}

struct SimdMath {
  template <class V>
  PPCR_INLINE V inv_sqrt(V v) {
    return 1 / square_root(v);
  }
  template <class V>
  PPCR_INLINE V sigmoid(V z) {
    return 1 / (1 + exponential(-z));
  }
};

}  // namespace ppcr::PPCR_CAPABILITY
