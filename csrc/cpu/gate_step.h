// The gates of a tile, a SIMD vector of pixels at a time: the mathematics of ppcr_haar.h for the
// standard levels over equal segments, that of ppcr_pixel.h for others.
#pragma once
#include "../ppcr_haar.h"
#include "kernels.h"
#include "simd.h"

namespace ppcr::PPCR_CAPABILITY {

// A run of `count` pixels as vectors. In contiguous memory the last vector overlaps the one before
// it rather than leave a tail, and only a run shorter than one vector is partial; where pixels are
// summed one by one (`dense`) the last vector is.
template <class S>
struct Run {
  int count, vectors, last;
  PPCR_HD explicit Run(int64_t pixels, bool dense)
      : count(static_cast<int>(pixels)),
        vectors((count + kLanes<S> - 1) / kLanes<S>),
        last(dense               ? (vectors - 1) * kLanes<S>
             : count > kLanes<S> ? count - kLanes<S>
                                 : 0) {}
  PPCR_HD int offset(int i) const { return i * kLanes<S> < last ? i * kLanes<S> : last; }
  PPCR_HD int lanes(int i) const {
    return count - offset(i) < kLanes<S> ? count - offset(i) : kLanes<S>;
  }
  PPCR_HD bool partial() const { return count < kLanes<S>; }
};

template <class S>
struct GateStep {
  using V = typename VectorOf<S>::type;
  AnyBins<S> bins;
  HaarBins<S> haar_bins;
  bool standard;
  S weight[kMaxContexts], bias, eps, weight_mean = 0;
  // Backward: this chunk's share of the gradients of weight and bias, by lane.
  double d_params[kMaxContexts + 1][kLanes<S>];

  PPCR_HD explicit GateStep(const Problem& p)
      : bins(p.pooling),
        haar_bins(p.pooling, p.weight),
        standard(p.pooling.standard),
        bias(S(p.bias)),
        eps(S(p.eps)) {
    for (int l = 0; l < bins.contexts(); ++l) {
      weight[l] = S(p.weight[l]);
      weight_mean += weight[l];
    }
    weight_mean /= S(bins.contexts());
    for (int l = 0; l < terms(); ++l)
      for (double& share : d_params[l]) share = 0;
  }
  // rows: the scratch of the tile, `stride` values a row.
  template <bool Backward>
  PPCR_HD void run(S* rows, int stride, const Run<S>& run) {
    standard ? run_with<Backward>(haar_bins, *this, rows, stride, run)
             : run_with<Backward>(bins, *this, rows, stride, run);
  }

  // A call a tile is cheap, and keeps this code out of every combination of operator and dtype.
  template <bool Backward, class Bins>
  static __attribute__((noinline)) void run_with(const Bins& bins, GateStep& self, S* rows,
                                                 int stride, const Run<S>& run) {
    const int contexts = bins.contexts(), segments = bins.segments();
    S* gate = rows + segments * stride;
    V sums_w[Backward ? Bins::kContexts + 1 : 1] = {}, index;
    for (int lane = 0; lane < kLanes<S>; ++lane) index[lane] = S(lane);
    for (int i = 0; i < run.vectors; ++i) {
      const int at = i * kLanes<S>;
      V sums[Bins::kSegments];
      PPCR_UNROLL
      for (int k = 0; k < segments; ++k) sums[k] = load(rows + k * stride + at);
      Pixel<V, Bins> pixel;
      pixel_forward<SimdMath>(bins, sums, self.weight, self.bias, self.eps, pixel);
      if constexpr (Backward) {
        V dz = pixel_backward(bins, pixel, load(gate + at), self.weight, self.weight_mean, sums);
        PPCR_UNROLL
        for (int k = 0; k < segments; ++k) store(rows + k * stride + at, sums[k]);
        // Lanes that the neighbouring vector has counted already; where their n is no finite
        // number, it was NaN there as well.
        dz = index < S(at - run.offset(i)) + V{} ? V{} : dz;
        PPCR_UNROLL
        for (int l = 0; l < contexts; ++l) sums_w[l] = sums_w[l] + dz * pixel.n[l];
        sums_w[contexts] = sums_w[contexts] + dz;
      }
      store(gate + at, pixel.g);
    }
    if constexpr (Backward) {
      PPCR_UNROLL
      for (int l = 0; l <= contexts; ++l)
        for (int lane = 0; lane < kLanes<S>; ++lane)
          self.d_params[l][lane] += double(sums_w[l][lane]);
    }
  }
  PPCR_HD int terms() const { return (standard ? haar_bins.contexts() : bins.contexts()) + 1; }
  // Moves the chunk's share to `partial`.
  PPCR_HD void end_chunk(double* partial) {
    for (int l = 0; l < terms(); ++l) {
      partial[l] = 0;
      for (double& share : d_params[l]) partial[l] += std::exchange(share, 0);
    }
    if (standard) haar_bins.expand(partial);
  }
};

}  // namespace ppcr::PPCR_CAPABILITY
