// The mathematics of ppcr_pixel.h for levels (1, 2, 4) over four equal segments, in half the
// instructions. The first context is the mean of all, and the others differ from it by a, -a,
// a + b, a - b, c - a and -c - a, where a, b and c are the Haar coefficients of the segments' sums:
// these three stand for the seven contexts.
#pragma once
#include "ppcr_pixel.h"

namespace ppcr {

template <class S>
struct HaarBins {
  static constexpr int kContexts = 3, kSegments = 4;
  S inverse[3];  // 1 / channels, 2 / channels, and that / 7
  S weight[3];   // of a, b and c in the integrated context
  S slope[4];    // what a segment's channels add to dx where a, b and c are zero, over dz * inv_std
  PPCR_HD HaarBins(const Pooling& pooling, const double* w)
      : inverse{S(1) / S(pooling.size[0]), S(2) / S(pooling.size[0]),
                S(2. / 7) / S(pooling.size[0])},
        // The first context is zero after normalization: its weight counts where it is not finite.
        weight{S(w[1] - w[2] + w[3] + w[4] - w[5] - w[6] + (w[0] - w[0])), S(w[3] - w[4]),
               S(w[5] - w[6])} {
    const double sum = w[0] + w[1] + w[2] + w[3] + w[4] + w[5] + w[6];
    for (int k = 0; k < 4; ++k) {
      const double half = w[1 + k / 2] + w[3 + k];
      slope[k] = S((w[0] + half + half + w[3 + k] + w[3 + k] - sum) / double(pooling.size[0]));
    }
  }
  static constexpr PPCR_HD int contexts() { return kContexts; }
  static constexpr PPCR_HD int segments() { return kSegments; }
  // From the sums of dz a, dz b, dz c and dz over all pixels to the gradients of the seven weights
  // and of the bias, in the same place.
  static PPCR_HD void expand(double* d) {
    const double a = d[0], b = d[1], c = d[2];
    const double all[8] = {a - a, a, -a, a + b, a - b, c - a, -c - a, d[3]};
    for (int l = 0; l < 8; ++l) d[l] = all[l];
  }
};

template <class Math, class V, class S>
PPCR_HD void pixel_forward(const HaarBins<S>& bins, const V* sums, const S*, S bias, S eps,
                           Pixel<V, HaarBins<S>>& pixel) {
  const V a = ((sums[0] + sums[1]) - (sums[2] + sums[3])) * bins.inverse[0];
  const V b = (sums[0] - sums[1]) * bins.inverse[1];
  const V c = (sums[2] - sums[3]) * bins.inverse[1];
  pixel.inv_std = Math::inv_sqrt(a * a * S(6. / 7) + (b * b + c * c) * S(2. / 7) + eps);
  pixel.n[0] = a * pixel.inv_std;
  pixel.n[1] = b * pixel.inv_std;
  pixel.n[2] = c * pixel.inv_std;
  pixel.z = pixel.n[0] * bins.weight[0] + pixel.n[1] * bins.weight[1] + pixel.n[2] * bins.weight[2];
  pixel.g = Math::sigmoid(pixel.z + bias);
}

template <class V, class S>
PPCR_HD V pixel_backward(const HaarBins<S>& bins, const Pixel<V, HaarBins<S>>& pixel, V dg,
                         const S*, S, V* dsums) {
  const V dz = dg * pixel.g * (S(1) - pixel.g);
  const V scale = dz * pixel.inv_std;
  const V z_mean = pixel.z * bins.inverse[2];
  const V a = z_mean * pixel.n[0] * S(3), b = z_mean * pixel.n[1] * S(2),
          c = z_mean * pixel.n[2] * S(2);
  dsums[0] = scale * (bins.slope[0] - a - b);
  dsums[1] = scale * (bins.slope[1] - a + b);
  dsums[2] = scale * (bins.slope[2] + a - c);
  dsums[3] = scale * (bins.slope[3] + a + c);
  return dz;
}

}  // namespace ppcr
