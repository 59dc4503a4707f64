// The mathematics of one pixel, written once for every device: from the sums of its channel
// segments to the gate, and back.
//
//   cross-channel pyramid pooling   t_l = sum of the segments of bin l / |bin l|
//   pixel normalization             n_l = (t_l - mean t) / sqrt(var t + eps), biased, two-pass
//   pixel context integration       z   = sum_l weight_l n_l + bias
//   gate, recalibration             g   = sigmoid(z), y_c = x_c g
//
// V is the type that holds one value per pixel: a float or double on a GPU, a SIMD vector of pixels
// on a CPU. S is its scalar. Math supplies inv_sqrt(V) and sigmoid(V).
#pragma once
#include "ppcr_types.h"

namespace ppcr {

// Levels (1, 2, 4) over four equal segments: every bound is known at compile time.
template <class S>
struct StandardBins {
  static constexpr bool kStandard = true;
  static constexpr int kContexts = 7, kSegments = 4;
  S inverse[3];  // 1 / |bin| of each level
  PPCR_HD explicit StandardBins(const Pooling& pooling)
      : inverse{S(1) / S(pooling.size[0]), S(1) / S(pooling.size[1]), S(1) / S(pooling.size[3])} {}
  static constexpr PPCR_HD int contexts() { return kContexts; }
  static constexpr PPCR_HD int segments() { return kSegments; }
  static constexpr PPCR_HD int first(int l) { return l == 0 ? 0 : l < 3 ? 2 * (l - 1) : l - 3; }
  static constexpr PPCR_HD int last(int l) { return l == 0 ? 4 : l < 3 ? 2 * l : l - 2; }
  PPCR_HD S inverse_size(int l) const { return inverse[l == 0 ? 0 : l < 3 ? 1 : 2]; }
};

// Any other levels, equal or overlapping bins.
template <class S>
struct AnyBins {
  static constexpr bool kStandard = false;
  static constexpr int kContexts = kMaxContexts, kSegments = kMaxSegments;
  int l_count, k_count;
  uint8_t begin[kMaxContexts], end[kMaxContexts];
  S inverse[kMaxContexts];
  PPCR_HD explicit AnyBins(const Pooling& pooling)
      : l_count(pooling.contexts), k_count(pooling.segments) {
    for (int l = 0; l < l_count; ++l) {
      begin[l] = pooling.first[l];
      end[l] = pooling.last[l];
      inverse[l] = S(1) / S(pooling.size[l]);
    }
  }
  PPCR_HD int contexts() const { return l_count; }
  PPCR_HD int segments() const { return k_count; }
  PPCR_HD int first(int l) const { return begin[l]; }
  PPCR_HD int last(int l) const { return end[l]; }
  PPCR_HD S inverse_size(int l) const { return inverse[l]; }
};

template <class V, class Bins>
struct Pixel {
  V n[Bins::kContexts];  // normalized contexts
  V inv_std;             // 1 / sqrt(var + eps)
  V z;                   // integrated context, without the bias
  V g;                   // gate
};

// sums: one per segment. weight: one per context.
template <class Math, class V, class S, class Bins>
PPCR_HD void pixel_forward(const Bins& bins, const V* sums, const S* weight, S bias, S eps,
                           Pixel<V, Bins>& pixel) {
  const int contexts = bins.contexts();
  const S inverse_contexts = S(1) / S(contexts);
  // Contexts relative to the first: differences are normalized, and small ones are exact.
  V pivot{}, mean{};
  PPCR_UNROLL
  for (int l = 0; l < contexts; ++l) {
    const int first = bins.first(l), last = bins.last(l);
    V t = sums[first];
    PPCR_UNROLL
    for (int k = first + 1; k < last; ++k) t = t + sums[k];
    t = t * bins.inverse_size(l);
    if (l == 0) pivot = t;
    pixel.n[l] = t - pivot;
    mean = mean + pixel.n[l];
  }
  mean = mean * inverse_contexts;
  V variance{};
  PPCR_UNROLL
  for (int l = 0; l < contexts; ++l) {
    pixel.n[l] = pixel.n[l] - mean;
    variance = variance + pixel.n[l] * pixel.n[l];
  }
  pixel.inv_std = Math::inv_sqrt(variance * inverse_contexts + eps);
  pixel.z = V{};
  PPCR_UNROLL
  for (int l = 0; l < contexts; ++l) {
    pixel.n[l] = pixel.n[l] * pixel.inv_std;
    pixel.z = pixel.z + pixel.n[l] * weight[l];
  }
  pixel.g = Math::sigmoid(pixel.z + bias);
}

// dg: gradient of the gate, sum_c gy_c x_c. Writes dsums, what every channel of a segment adds to
// its dx, and returns dz, the gradient of the bias; that of weight_l is dz n_l. weight_mean: mean
// of the weights.
template <class V, class S, class Bins>
PPCR_HD V pixel_backward(const Bins& bins, const Pixel<V, Bins>& pixel, V dg, const S* weight,
                         S weight_mean, V* dsums) {
  const int contexts = bins.contexts(), segments = bins.segments();
  const V dz = dg * pixel.g * (S(1) - pixel.g);
  const V scale = dz * pixel.inv_std;
  const V z_mean = pixel.z * (S(1) / S(contexts));
  PPCR_UNROLL
  for (int k = 0; k < segments; ++k) dsums[k] = V{};
  PPCR_UNROLL
  for (int l = 0; l < contexts; ++l) {
    const V dt = scale * ((weight[l] - weight_mean) - pixel.n[l] * z_mean) * bins.inverse_size(l);
    const int first = bins.first(l), last = bins.last(l);
    PPCR_UNROLL
    for (int k = first; k < last; ++k) dsums[k] = dsums[k] + dt;
  }
  return dz;
}

}  // namespace ppcr
