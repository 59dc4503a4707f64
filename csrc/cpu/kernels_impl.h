// The CPU kernels, compiled once per instruction set. One tile of pixels is handled in three steps:
//   1. sums: x is read once; each channel segment is summed per pixel (backward: also the dot
//   product of x and the gradient);
//   2. gate: the mathematics of ppcr_pixel.h, a SIMD vector of pixels at a time;
//   3. apply: the output is written; what it reads again (x, or in backward the gradient) is still
//   in cache.
// Between the steps a tile keeps rows of one value per pixel: row k < segments the sum of segment k
// (after the gate step of a backward kernel: what its channels add to dx), the row after them the
// dot product or gate gradient (after the gate step: the gate).
#pragma once
#include "../ppcr_pixel.h"
#include "kernels.h"
#include "simd.h"

namespace ppcr {
namespace PPCR_CAPABILITY {

// A run of `count` pixels as vectors. In channel-major memory the last vector overlaps its
// neighbour rather than leave a tail, and only a run shorter than one vector is partial; where
// pixels are gathered one by one (`dense`) the last vector is.
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

template <bool Partial, class T>
PPCR_INLINE auto load_run(const T* p, int count) {
  if constexpr (Partial)
    return load(p, count);
  else
    return load(p);
}
template <bool Partial, class T, class V>
PPCR_INLINE void store_run(T* p, V v, int count) {
  if constexpr (Partial)
    store(p, v, count);
  else
    store(p, v);
}

template <class V>
PPCR_INLINE V relu(V v) {
  return v <= 0 ? V{} : v;  // NaN passes, as in torch
}

// ---- step 2

template <class S>
struct GateStep {
  using V = typename VectorOf<S>::type;
  AnyBins<S> bins;
  StandardBins<S> standard_bins;
  S weight[kMaxContexts], bias, eps, weight_mean = 0;
  V d_params[kMaxContexts +
             1];  // backward: this tile's share of the gradients of weight and bias, by lane
  void (*step)(GateStep&, S*, int, const Run<S>&);

  PPCR_HD GateStep(const Problem& p, bool backward)
      : bins(p.pooling), standard_bins(p.pooling), bias(S(p.bias)), eps(S(p.eps)) {
    for (int l = 0; l < bins.contexts(); ++l) {
      weight[l] = S(p.weight[l]);
      weight_mean += weight[l];
    }
    weight_mean /= S(bins.contexts());
    if (p.pooling.standard)
      step = backward ? run_standard<true> : run_standard<false>;
    else
      step = backward ? run_any<true> : run_any<false>;
  }
  // rows: the scratch of the tile, `stride` values a row.
  PPCR_HD void run(S* rows, int stride, const Run<S>& run) { step(*this, rows, stride, run); }

  // Two calls a tile are cheap, and keep this code out of every combination of operator and dtype.
  template <bool Backward>
  static __attribute__((noinline)) void run_standard(GateStep& self, S* rows, int stride,
                                                     const Run<S>& run) {
    self.template run_with<Backward>(self.standard_bins, rows, stride, run);
  }
  template <bool Backward>
  static __attribute__((noinline)) void run_any(GateStep& self, S* rows, int stride,
                                                const Run<S>& run) {
    self.template run_with<Backward>(self.bins, rows, stride, run);
  }
  template <bool Backward, class Bins>
  PPCR_HD void run_with(const Bins& bins, S* rows, int stride, const Run<S>& run) {
    const int contexts = bins.contexts(), segments = bins.segments();
    S* gate = rows + segments * stride;
    V sums_w[Bins::kContexts + 1];
    if constexpr (Backward) {
      PPCR_UNROLL
      for (int l = 0; l <= contexts; ++l) sums_w[l] = V{};
    }
    for (int i = 0; i < run.vectors; ++i) {
      const int at = i * kLanes<S>;
      V sums[Bins::kSegments];
      PPCR_UNROLL
      for (int k = 0; k < segments; ++k) sums[k] = load(rows + k * stride + at);
      Pixel<V, Bins> pixel;
      pixel_forward<SimdMath>(bins, sums, weight, bias, eps, pixel);
      if constexpr (Backward) {
        V dz = pixel_backward(bins, pixel, load(gate + at), weight, weight_mean, sums);
        PPCR_UNROLL
        for (int k = 0; k < segments; ++k) store(rows + k * stride + at, sums[k]);
        // Lanes that the neighbouring vector has counted already; where their n is no finite
        // number, it was NaN there as well.
        for (int lane = 0; lane < at - run.offset(i); ++lane) dz[lane] = 0;
        PPCR_UNROLL
        for (int l = 0; l < contexts; ++l) sums_w[l] = sums_w[l] + dz * pixel.n[l];
        sums_w[contexts] = sums_w[contexts] + dz;
      }
      store(gate + at, pixel.g);
    }
    if constexpr (Backward) {
      PPCR_UNROLL
      for (int l = 0; l <= contexts; ++l) d_params[l] = sums_w[l];
    }
  }
  PPCR_HD void add_to(double* partial) const {
    for (int l = 0; l <= bins.contexts(); ++l) {
      double sum = 0;
      for (int lane = 0; lane < kLanes<S>; ++lane) sum += double(d_params[l][lane]);
      partial[l] += sum;
    }
  }
};

// ---- steps 1 and 3 over memory: what is read and written where

template <Op op, class T>
struct Streams {
  const T* x;
  const T* grad;
  const T* other;
  T* out;
  T* grad_residual;
  static constexpr bool kDot = op == Op::kBackward || op == Op::kAddReluBackward;
  static constexpr bool kApply = op != Op::kGate;

  PPCR_HD Streams(const Problem& p, int64_t offset) {
    const bool per_pixel_grad = op == Op::kGateBackward;
    x = static_cast<const T*>(p.x) + offset;
    grad = per_pixel_grad || !p.grad ? nullptr : static_cast<const T*>(p.grad) + offset;
    other = p.other ? static_cast<const T*>(p.other) + offset : nullptr;
    out = op == Op::kGate ? nullptr : static_cast<T*>(p.out) + offset;
    grad_residual = p.grad_residual ? static_cast<T*>(p.grad_residual) + offset : nullptr;
  }
  // The gradient that reaches x * g: add_relu's passes the mask of the relu and is stored as the
  // residual's.
  template <bool Partial>
  PPCR_HD auto gradient(int64_t at, int count) const {
    auto g = load_run<Partial>(grad + at, count);
    if constexpr (op == Op::kAddReluBackward) {
      const auto y = load_run<Partial>(other + at, count);
      g = y <= 0 ? decltype(g){} : g;
      store_run<Partial>(grad_residual + at, g, count);
    }
    return g;
  }
  template <bool Partial, class V>
  PPCR_HD void apply(int64_t at, int count, V gate, V shift) const {
    V v;
    if constexpr (op == Op::kForward)
      v = load_run<Partial>(x + at, count) * gate;
    else if constexpr (op == Op::kAddRelu)
      v = relu(multiply_add(load_run<Partial>(x + at, count), gate,
                            load_run<Partial>(other + at, count)));
    else if constexpr (op == Op::kBackward)
      v = multiply_add(load_run<Partial>(grad + at, count), gate, shift);
    else if constexpr (op == Op::kAddReluBackward)
      v = multiply_add(load_run<Partial>(grad_residual + at, count), gate, shift);
    else
      v = shift;
    store_run<Partial>(out + at, v, count);
  }
};

// The gate, or its gradient, between memory and a row of scratch.
template <Op op, class T, class S>
PPCR_INLINE void load_gate_gradient(const Problem& p, int64_t pixel, S* row, const Run<S>& run) {
  if constexpr (op == Op::kGateBackward) {
    const T* grad = static_cast<const T*>(p.grad) + pixel;
    for (int i = 0; i < run.vectors; ++i) {
      const int n = run.lanes(i);
      store(row + i * kLanes<S>,
            n < kLanes<S> ? load(grad + run.offset(i), n) : load(grad + run.offset(i)));
    }
  }
}
template <Op op, class T, class S>
PPCR_INLINE void store_gate(const Problem& p, int64_t pixel, const S* row, const Run<S>& run) {
  if constexpr (op == Op::kGate) {
    T* out = static_cast<T*>(p.out) + pixel;
    for (int i = 0; i < run.vectors; ++i) {
      const int n = run.lanes(i);
      if (n < kLanes<S>)
        store(out + run.offset(i), load(row + i * kLanes<S>), n);
      else
        store(out + run.offset(i), load(row + i * kLanes<S>));
    }
  }
}

// ---- channel-major: a tile is a run of pixels, a row of it one channel

// Adds ROWS channels to the sums: several at once, because that shortens the chain of additions
// (and its rounding) and the traffic to the accumulators.
template <int ROWS, bool Partial, Op op, class T, class S>
PPCR_INLINE void add_rows(const Streams<op, T>& s, int64_t at, int64_t row_stride, S* sums, S* dots,
                          bool fresh, bool fresh_dots, const Run<S>& run) {
  using V = typename VectorOf<S>::type;
  for (int i = 0; i < run.vectors; ++i) {
    V v[ROWS], d[ROWS];
    PPCR_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const int64_t from = at + r * row_stride + run.offset(i);
      v[r] = load_run<Partial>(s.x + from, run.count);
      if constexpr (Streams<op, T>::kApply)
        __builtin_prefetch(s.out + from, 1);  // to be written soon: fetched beside the reads
      if constexpr (Streams<op, T>::kDot)
        d[r] = v[r] * s.template gradient<Partial>(from, run.count);
    }
    PPCR_UNROLL
    for (int half = ROWS / 2; half; half /= 2) {
      PPCR_UNROLL
      for (int r = 0; r < half; ++r) {
        v[r] = v[r] + v[r + half];
        if constexpr (Streams<op, T>::kDot) d[r] = d[r] + d[r + half];
      }
    }
    S* sum = sums + i * kLanes<S>;
    store(sum, fresh ? v[0] : load(sum) + v[0]);
    if constexpr (Streams<op, T>::kDot) {
      S* dot = dots + i * kLanes<S>;
      store(dot, fresh_dots ? d[0] : load(dot) + d[0]);
    }
  }
}

// From one value per vector slot to one per pixel, followed by one vector more: the first pixels
// again, for spans that go round.
template <class S>
PPCR_INLINE void lay_out(S* row, const Run<S>& run, bool go_round) {
  constexpr int W = kLanes<S>;
  if (run.vectors > 1) store(row + run.last, load(row + (run.vectors - 1) * W));
  if (run.partial() || !go_round)
    for (int i = 0; i < W; ++i) row[run.count + i] = go_round ? row[i] : S(0);
  else
    store(row + run.count, load(row));
}

// Applies gate and shift to `length` consecutive elements from `at` on; element i belongs to pixel
// i % period. Where a partial store costs nothing the stores are aligned: one that straddles two
// cache lines takes as long as two.
template <Op op, class T, class S>
PPCR_INLINE void apply_span(const Streams<op, T>& s, int64_t at, int64_t length, const S* gate,
                            const S* shift, int period) {
  constexpr int W = kLanes<S>;
  const int step = W % period;
  int64_t i = 0;
  int pixel = 0;
  if constexpr (kMaskedStores) {
    const int over =
        static_cast<int>(reinterpret_cast<uintptr_t>(s.out + at) % (W * sizeof(T)) / sizeof(T));
    if (over) {
      i = W - over < length ? W - over : length;
      s.template apply<true>(at, static_cast<int>(i), load(gate), load(shift));
      pixel = static_cast<int>(i) % period;
    }
  }
  for (; i + W <= length; i += W) {
    s.template apply<false>(at + i, W, load(gate + pixel), load(shift + pixel));
    pixel += step;
    if (pixel >= period) pixel -= period;
  }
  if (i == length) return;
  if (kMaskedStores || length < W) {
    s.template apply<true>(at + i, static_cast<int>(length - i), load(gate + pixel),
                           load(shift + pixel));
  } else {  // the last vector overlaps the one before it
    pixel = static_cast<int>((length - W) % period);
    s.template apply<false>(at + length - W, W, load(gate + pixel), load(shift + pixel));
  }
}

template <bool Partial, Op op, class T, class S>
PPCR_INLINE void channel_major_tile(const Problem& p, int64_t image, int64_t pixel,
                                    GateStep<S>& gate_step, S* rows, const Run<S>& run) {
  constexpr int kRows = Streams<op, T>::kDot ? 4 : 8;
  const int64_t row_stride = p.pixels;
  const Streams<op, T> s(p, image * p.channels * p.pixels + pixel);
  const int stride = (run.vectors + 1) * kLanes<S>, segments = gate_step.bins.segments();
  S* last_row = rows + segments * stride;

  load_gate_gradient<op, T>(p, image * p.pixels + pixel, last_row, run);
  for (int k = 0; k < segments; ++k) {
    int64_t c = p.pooling.edge[k];
    const int64_t begin = c, end = p.pooling.edge[k + 1];
    S* sums = rows + k * stride;
    for (; c + kRows <= end; c += kRows)
      add_rows<kRows, Partial>(s, c * row_stride, row_stride, sums, last_row, c == begin, c == 0,
                               run);
    for (; c < end; ++c)
      add_rows<1, Partial>(s, c * row_stride, row_stride, sums, last_row, c == begin, c == 0, run);
  }

  gate_step.run(rows, stride, run);
  store_gate<op, T>(p, image * p.pixels + pixel, last_row, run);
  if constexpr (!Streams<op, T>::kApply) return;

  const bool plane = run.count == p.pixels;  // then the rows of a segment are one span
  lay_out(last_row, run, plane);
  for (int k = 0; k < segments; ++k) {
    const int64_t begin = p.pooling.edge[k], end = p.pooling.edge[k + 1];
    S* shift = rows + k * stride;
    if constexpr (is_backward(op)) lay_out(shift, run, plane);
    if (plane)
      apply_span(s, begin * row_stride, (end - begin) * row_stride, last_row, shift, run.count);
    else
      for (int64_t c = begin; c < end; ++c)
        apply_span(s, c * row_stride, run.count, last_row, shift, run.count);
  }
}

// ---- pixel-major: a tile is a run of pixels, a row of it all channels of one pixel

constexpr int kGroup = 4;  // pixels summed together: that many independent chains of additions, and
                           // one folding for all

// Adds `count` channels of each pixel of a group, from at[i] on, to v[i], and their products with
// the gradient to d[i].
template <bool Partial, Op op, class T, class V>
PPCR_INLINE void add_channels(const Streams<op, T>& s, const int64_t* at, int64_t offset, int count,
                              V* v, V* d) {
  PPCR_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const V x = load_run<Partial>(s.x + at[i] + offset, count);
    if constexpr (Streams<op, T>::kApply) __builtin_prefetch(s.out + at[i] + offset, 1);
    v[i] = v[i] + x;
    if constexpr (Streams<op, T>::kDot)
      d[i] = d[i] + x * s.template gradient<Partial>(at[i] + offset, count);
  }
}

template <Op op, class T, class S>
PPCR_INLINE void apply_channels(const Streams<op, T>& s, int64_t at, int64_t count, S gate,
                                S shift) {
  using V = typename VectorOf<S>::type;
  constexpr int W = kLanes<S>;
  const V g = gate + V{}, d = shift + V{};
  for (; count >= W; at += W, count -= W) s.template apply<false>(at, W, g, d);
  if (count > 0) s.template apply<true>(at, static_cast<int>(count), g, d);
}

template <Op op, class T, class S>
PPCR_INLINE void pixel_major_tile(const Problem& p, int64_t image, int64_t pixel,
                                  GateStep<S>& gate_step, S* rows, const Run<S>& run) {
  using V = typename VectorOf<S>::type;
  constexpr int F = kFolded<S>, W = kLanes<S>;
  constexpr bool kDot = Streams<op, T>::kDot;
  const Streams<op, T> s(p, (image * p.pixels + pixel) * p.channels);
  const int groups = (run.count + kGroup - 1) / kGroup, padded = run.vectors * W;
  const int stride = groups * kGroup > padded ? groups * kGroup : padded;
  const int segments = gate_step.bins.segments(), kept = segments + (kDot ? 1 : 0);
  S* last_row = rows + segments * stride;
  S* folded = rows + (segments + 1) * stride;  // [kept][stride][F]

  load_gate_gradient<op, T>(p, image * p.pixels + pixel, last_row, run);
  for (int i = 0; i < run.count; i += kGroup) {
    int64_t at[kGroup];  // the last group repeats the last pixel
    for (int j = 0; j < kGroup; ++j)
      at[j] = (i + j < run.count ? i + j : run.count - 1) * p.channels;
    V d[kGroup] = {};
    for (int k = 0; k < segments; ++k) {
      int64_t c = p.pooling.edge[k];
      const int64_t end = p.pooling.edge[k + 1];
      V v[kGroup] = {};
      for (; c + W <= end; c += W) add_channels<false>(s, at, c, W, v, d);
      if (c < end) add_channels<true>(s, at, c, static_cast<int>(end - c), v, d);
      store_folded(folded + (k * stride + i) * F, v[0], v[1], v[2], v[3]);
    }
    if constexpr (kDot) store_folded(folded + (segments * stride + i) * F, d[0], d[1], d[2], d[3]);
  }
  for (int k = 0; k < kept; ++k) {
    for (int i = run.count * F; i < stride * F; ++i) folded[k * stride * F + i] = 0;
    for (int i = 0; i < stride; i += kLanes<S>)
      store(rows + k * stride + i, sum_groups(folded + (k * stride + i) * F));
  }

  gate_step.run(rows, stride, run);
  store_gate<op, T>(p, image * p.pixels + pixel, last_row, run);
  if constexpr (!Streams<op, T>::kApply) return;

  for (int i = 0; i < run.count; ++i) {
    if constexpr (is_backward(op)) {
      for (int k = 0; k < segments; ++k) {
        const int64_t begin = p.pooling.edge[k];
        apply_channels(s, i * p.channels + begin, p.pooling.edge[k + 1] - begin, last_row[i],
                       rows[k * stride + i]);
      }
    } else {
      apply_channels(s, i * p.channels, p.channels, last_row[i], S(0));
    }
  }
}

// ---- tiles of a run of chunks

template <Op op, class T>
void run(const Problem& p, int64_t first_chunk, int64_t last_chunk) {
  using S = typename Accumulate<T>::type;
  alignas(64) S rows[kScratchBytes / sizeof(S)];
  GateStep<S> gate_step(p, is_backward(op));
  const int64_t tiles = p.tiles();
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t per_chunk = tiles / p.chunks,
                  longer = tiles % p.chunks;  // the first `longer` chunks hold one tile more
    const int64_t begin = chunk * per_chunk + (chunk < longer ? chunk : longer);
    const int64_t end = begin + per_chunk + (chunk < longer ? 1 : 0);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t image = tile / p.tiles_per_image, in_image = tile % p.tiles_per_image,
                    pixel = in_image * p.tile_pixels;
      const Run<S> run(in_image + 1 == p.tiles_per_image ? p.pixels - pixel : p.tile_pixels,
                       p.pixel_major);
      if (p.pixel_major)
        pixel_major_tile<op, T>(p, image, pixel, gate_step, rows, run);
      else if (run.partial())
        channel_major_tile<true, op, T>(p, image, pixel, gate_step, rows, run);
      else
        channel_major_tile<false, op, T>(p, image, pixel, gate_step, rows, run);
      if constexpr (is_backward(op)) gate_step.add_to(p.partial + chunk * (p.pooling.contexts + 1));
    }
  }
}

template <Op op>
Kernel kernel_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat:
      return run<op, float>;
    case Dtype::kDouble:
      return run<op, double>;
    case Dtype::kHalf:
      return run<op, Half>;
    default:
      return run<op, BFloat16>;
  }
}
static Kernel find(Op op, Dtype dtype) {
  switch (op) {
    case Op::kForward:
      return kernel_of<Op::kForward>(dtype);
    case Op::kBackward:
      return kernel_of<Op::kBackward>(dtype);
    case Op::kGate:
      return kernel_of<Op::kGate>(dtype);
    case Op::kGateBackward:
      return kernel_of<Op::kGateBackward>(dtype);
    case Op::kAddRelu:
      return kernel_of<Op::kAddRelu>(dtype);
    default:
      return kernel_of<Op::kAddReluBackward>(dtype);
  }
}

}  // namespace PPCR_CAPABILITY
}  // namespace ppcr
