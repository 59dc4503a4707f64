// The sigmoid of one instruction set against double precision, over float32 values in bit order.
// Built by test_sigmoid.py, and into simd.cpp.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if PPCR_SIMD_BYTES == 64
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#elif PPCR_SIMD_BYTES == 32
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#if !defined(PPCR_SIMD_BYTES)
#define PPCR_SIMD_BYTES 16
#endif
#define PPCR_CAPABILITY probe
#include "simd.h"

using namespace ppcr::probe;

// Largest error, in units of the last place of the exact value, over `count` floats whose bits are
// first, first + step, ... Where the exact value is subnormal (z < -87.3) any result below the
// smallest normal will do: e^-z overflows on the way to it.
extern "C" double worst_float(uint32_t first, uint32_t step, int64_t count) {
  double worst = 0;
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < count; i += lanes) {
    float z[lanes], g[lanes];
    for (int j = 0; j < lanes; ++j) {
      const uint32_t bits =
          first + static_cast<uint32_t>((i + j < count ? i + j : count - 1) * step);
      std::memcpy(&z[j], &bits, 4);
    }
    store(g, SimdMath::sigmoid(load(z)));
    for (int j = 0; j < lanes; ++j) {
      const double exact = 1 / (1 + std::exp(-static_cast<double>(z[j])));
      if (std::isnan(exact)) {
        if (!std::isnan(g[j])) return INFINITY;
        continue;
      }
      if (exact < 0x1p-126) {
        if (!(g[j] >= 0 && g[j] <= 0x1p-126f)) return INFINITY;
        continue;
      }
      int exponent;
      std::frexp(exact, &exponent);
      const double unit = std::ldexp(1.0, exponent - 24);
      const double error = std::fabs(g[j] - exact) / unit;
      if (!(error <= worst)) worst = error;
    }
  }
  return worst;
}

extern "C" double sigmoid_double(double z) {
  double lanes[kLanes<double>];
  for (double& v : lanes) v = z;
  store(lanes, SimdMath::sigmoid(load(lanes)));
  return lanes[0];
}
extern "C" float sigmoid_float(float z) {
  float lanes[kLanes<float>];
  for (float& v : lanes) v = z;
  store(lanes, SimdMath::sigmoid(load(lanes)));
  return lanes[0];
}
// Conversions of the 16-bit types, one value: bits to float and back.
extern "C" float widen_half(uint16_t bits) {
  Half h[kLanes<float>];
  for (Half& v : h) v.bits = bits;
  float out[kLanes<float>];
  store(out, load(h));
  return out[0];
}
extern "C" void narrow_all(const float* from, uint16_t* half, uint16_t* bfloat16, int64_t count) {
  for (int64_t i = 0; i + kLanes<float> <= count; i += kLanes<float>) {
    store(reinterpret_cast<Half*>(half + i), load(from + i));
    store(reinterpret_cast<BFloat16*>(bfloat16 + i), load(from + i));
  }
}
// Two vectors of bfloat16 at once: as bits, and these read back.
extern "C" void narrow_pairs(const float* from, uint16_t* bfloat16, float* back, int64_t count) {
#if PPCR_SIMD_BYTES > 16
  constexpr int W = kLanes<float>;
  for (int64_t i = 0; i + 2 * W <= count; i += 2 * W) {
    float even[W], odd[W];
    for (int j = 0; j < W; ++j) even[j] = from[i + 2 * j], odd[j] = from[i + 2 * j + 1];
    auto* const pairs = reinterpret_cast<BFloat16*>(bfloat16 + i);
    store(pairs, load(even), load(odd));
    store(even, load(pairs, Even{}));
    store(odd, load(pairs, Odd{}));
    for (int j = 0; j < W; ++j) back[i + 2 * j] = even[j], back[i + 2 * j + 1] = odd[j];
  }
#endif
}
