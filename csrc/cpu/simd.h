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

namespace ppcr {
namespace PPCR_CAPABILITY {

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

// ---- 16-bit types

// 16-bit lanes to 32-bit ones and back: written out, because the compiler splits and permutes in
// __builtin_convertvector. maskz: GCC's plain forms warn of an uninitialized operand of their own.
#if PPCR_SIMD_BYTES == 64
PPCR_INLINE VU widen_bits(VH h) {
  return bits_as<VU>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(h)));
}
PPCR_INLINE VH high_halves(VU u) {  // one permutation in place of a shift and a conversion
  const VU odd = {0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d};
  return bits_as<VH>(_mm512_castsi512_si256(
      _mm512_maskz_permutexvar_epi16(~0u, bits_as<__m512i>(odd), bits_as<__m512i>(u))));
}
#elif PPCR_SIMD_BYTES == 32
PPCR_INLINE VU widen_bits(VH h) { return bits_as<VU>(_mm256_cvtepu16_epi32(bits_as<__m128i>(h))); }
PPCR_INLINE VH high_halves(VU u) {
  const __m256i v = bits_as<__m256i>(u >> 16);
  return bits_as<VH>(
      _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08)));
}
#else
#if defined(__aarch64__)
PPCR_INLINE VU widen_bits(VH h) { return bits_as<VU>(vmovl_u16(bits_as<uint16x4_t>(h))); }
#else
PPCR_INLINE VU widen_bits(VH h) { return __builtin_convertvector(h, VU); }
#endif
PPCR_INLINE VH high_halves(VU u) { return __builtin_convertvector(u >> 16, VH); }
#endif

PPCR_INLINE VF widen(VH h, BFloat16) { return bits_as<VF>(widen_bits(h) << 16); }

PPCR_INLINE VH narrow(VF v, BFloat16) {  // round to nearest even; NaN stays NaN
  const VU u = bits_as<VU>(v);
  const VU rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return high_halves(v == v ? rounded : 0x7fc00000u + VU{});
}

#if PPCR_SIMD_BYTES == 64
PPCR_INLINE VF widen(VH h, Half) {
  return bits_as<VF>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(h)));
}
PPCR_INLINE VH narrow(VF v, Half) {
  return bits_as<VH>(_mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(v),
                                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif PPCR_SIMD_BYTES == 32
PPCR_INLINE VF widen(VH h, Half) { return bits_as<VF>(_mm256_cvtph_ps(bits_as<__m128i>(h))); }
PPCR_INLINE VH narrow(VF v, Half) {
  return bits_as<VH>(
      _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
PPCR_INLINE VF widen(VH h, Half) { return bits_as<VF>(vcvt_f32_f16(bits_as<float16x4_t>(h))); }
PPCR_INLINE VH narrow(VF v, Half) { return bits_as<VH>(vcvt_f16_f32(bits_as<float32x4_t>(v))); }
#else
PPCR_INLINE VF widen(VH h, Half) {
  const VU u = widen_bits(h), magnitude = u & 0x7fffu;
  const VU normal = (magnitude << 13) + (112u << 23);
  const VU special = (magnitude << 13) | (255u << 23);
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
  const VU is_nan = bits_as<VU>(magnitude > 0x7f800000u),
           is_inf = bits_as<VU>(magnitude >= 0x47800000u) & ~is_nan;
  const VU is_subnormal = bits_as<VU>(magnitude < 0x38800000u),
           is_normal = ~(is_nan | is_inf | is_subnormal);
  const VU bits =
      (0x7e00u & is_nan) | (0x7c00u & is_inf) | (subnormal & is_subnormal) | (normal & is_normal);
  return __builtin_convertvector(bits | ((u >> 16) & 0x8000u), VH);
}
#endif

// ---- loads and stores, whole vectors at any alignment

PPCR_INLINE VF load(const float* p) { return load_unaligned<VF>(p); }
PPCR_INLINE VD load(const double* p) { return load_unaligned<VD>(p); }
PPCR_INLINE VF load(const Half* p) { return widen(load_unaligned<VH>(p), Half{}); }
PPCR_INLINE VF load(const BFloat16* p) { return widen(load_unaligned<VH>(p), BFloat16{}); }
PPCR_INLINE void store(float* p, VF v) { std::memcpy(p, &v, sizeof v); }
PPCR_INLINE void store(double* p, VD v) { std::memcpy(p, &v, sizeof v); }
template <class T>
PPCR_INLINE void store(T* p, VF v) {
  const VH h = narrow(v, T{});
  std::memcpy(p, &h, sizeof h);
}

// ---- the first n lanes, 0 < n < lanes; the others load as zero

#if PPCR_SIMD_BYTES == 64
PPCR_INLINE VF load(const float* p, int n) {
  return bits_as<VF>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
}
PPCR_INLINE VD load(const double* p, int n) {
  return bits_as<VD>(_mm512_maskz_loadu_pd((1u << n) - 1, p));
}
template <class T>
PPCR_INLINE VF load(const T* p, int n) {
  return widen(bits_as<VH>(_mm256_maskz_loadu_epi16((1u << n) - 1, p)), T{});
}
PPCR_INLINE void store(float* p, VF v, int n) {
  _mm512_mask_storeu_ps(p, (1u << n) - 1, bits_as<__m512>(v));
}
PPCR_INLINE void store(double* p, VD v, int n) {
  _mm512_mask_storeu_pd(p, (1u << n) - 1, bits_as<__m512d>(v));
}
template <class T>
PPCR_INLINE void store(T* p, VF v, int n) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, bits_as<__m256i>(narrow(v, T{})));
}
#elif PPCR_SIMD_BYTES == 32
PPCR_INLINE __m256i lanes_below(int n, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PPCR_INLINE __m256i lanes_below(int n, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
PPCR_INLINE VF load(const float* p, int n) {
  return bits_as<VF>(_mm256_maskload_ps(p, lanes_below(n, 0.f)));
}
PPCR_INLINE VD load(const double* p, int n) {
  return bits_as<VD>(_mm256_maskload_pd(p, lanes_below(n, 0.)));
}
PPCR_INLINE void store(float* p, VF v, int n) {
  _mm256_maskstore_ps(p, lanes_below(n, 0.f), bits_as<__m256>(v));
}
PPCR_INLINE void store(double* p, VD v, int n) {
  _mm256_maskstore_pd(p, lanes_below(n, 0.), bits_as<__m256d>(v));
}
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
#else
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

// a * b + c, rounded once where the instruction set can. The compiler may fuse such an expression
// in one place and not in another, and then a result would depend on the alignment that decides
// which place computes it.
#if PPCR_SIMD_BYTES == 64
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) {
  return bits_as<VF>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
}
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) {
  return bits_as<VD>(
      _mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(c)));
}
#elif PPCR_SIMD_BYTES == 32
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) {
  return bits_as<VF>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
}
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) {
  return bits_as<VD>(
      _mm256_fmadd_pd(bits_as<__m256d>(a), bits_as<__m256d>(b), bits_as<__m256d>(c)));
}
#elif defined(__aarch64__)
PPCR_INLINE VF multiply_add(VF a, VF b, VF c) {
  return bits_as<VF>(
      vfmaq_f32(bits_as<float32x4_t>(c), bits_as<float32x4_t>(a), bits_as<float32x4_t>(b)));
}
PPCR_INLINE VD multiply_add(VD a, VD b, VD c) {
  return bits_as<VD>(
      vfmaq_f64(bits_as<float64x2_t>(c), bits_as<float64x2_t>(a), bits_as<float64x2_t>(b)));
}
#else
template <class V>
PPCR_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
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
PPCR_INLINE void store_folded(S* to, V a, V b, V c, V d) {
  constexpr int lanes = kLanes<S>;
  constexpr auto index = std::make_integer_sequence<int, lanes>{};
  if constexpr (lanes == 4 * kFolded<S>) {
    store(to, add_blocks<lanes / 4>(add_blocks<lanes / 2>(a, b, index),
                                    add_blocks<lanes / 2>(c, d, index), index));
  } else if constexpr (lanes == 2 * kFolded<S>) {
    store(to, add_blocks<lanes / 2>(a, b, index));
    store(to + lanes, add_blocks<lanes / 2>(c, d, index));
  } else {
    store(to, a);
    store(to + lanes, b);
    store(to + 2 * lanes, c);
    store(to + 3 * lanes, d);
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

PPCR_INLINE VF square_root(VF v) {
#if PPCR_SIMD_BYTES == 64
  return bits_as<VF>(_mm512_maskz_sqrt_ps(0xffff, bits_as<__m512>(v)));
#elif PPCR_SIMD_BYTES == 32
  return bits_as<VF>(_mm256_sqrt_ps(bits_as<__m256>(v)));
#elif defined(__aarch64__)
  return bits_as<VF>(vsqrtq_f32(bits_as<float32x4_t>(v)));
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
PPCR_INLINE VD square_root(VD v) {
#if PPCR_SIMD_BYTES == 64
  return bits_as<VD>(_mm512_maskz_sqrt_pd(0xff, bits_as<__m512d>(v)));
#elif PPCR_SIMD_BYTES == 32
  return bits_as<VD>(_mm256_sqrt_pd(bits_as<__m256d>(v)));
#elif defined(__aarch64__)
  return bits_as<VD>(vsqrtq_f64(bits_as<float64x2_t>(v)));
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// e^v without -ffast-math: v = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r, and 2^n, which may
// be infinite. Float: below -87 it stays e^-87, which makes no difference to the sigmoid. Double:
// 2^n in two factors, so that underflow passes through the subnormals to zero. NaN stays NaN: every
// comparison with it is false.
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
  const double limit = 746., shift = 0x1.8p52;
  v = v > limit ? limit + VD{} : v;
  v = v < -limit ? -limit + VD{} : v;
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
  const VD e = 1. + 2. * (p / (q - p));
  const VL whole = bits_as<VL>(shifted) - bits_as<VL>(shift + VD{});
  const VL half = whole >> 1;
  return e * bits_as<VD>((half + 1023) << 52) * bits_as<VD>((whole - half + 1023) << 52);
}

struct SimdMath {
  template <class V>
  static inline __attribute__((always_inline)) V inv_sqrt(V v) {
    return 1 / square_root(v);
  }
  template <class V>
  static inline __attribute__((always_inline)) V sigmoid(V z) {
    return 1 / (1 + exponential(-z));
  }
};

}  // namespace PPCR_CAPABILITY
}  // namespace ppcr
