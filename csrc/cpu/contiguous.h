// Contiguous tensors: a tile is a run of pixels, a row of it one channel.
#pragma once
#include "elements.h"

namespace ppcr {
namespace PPCR_CAPABILITY {

// Adds ROWS channels to the sums: several at once, because that shortens the chain of additions
// (and its rounding) and the traffic to the accumulators.
template <int ROWS, bool Partial, class Tile, class S>
PPCR_INLINE void add_rows(const Tile& tile, int64_t at, int64_t row_stride, S* sums, bool first,
                          bool first_dot, bool prefetch) {
  using V = typename VectorOf<S>::type;
  const int last = tile.run.vectors - 1;
  const auto add = [&](int64_t from, int slot) __attribute__((always_inline)) {
    V v[ROWS], d[ROWS];
    PPCR_UNROLL
    for (int r = 0; r < ROWS; ++r, from += row_stride) {
      v[r] = load_run<Partial>(tile.x + from, tile.run.count);
      if constexpr (Tile::kApply)
        if (prefetch) __builtin_prefetch(tile.out + from, 1);
      if constexpr (Tile::kDot) d[r] = v[r] * tile.template gradient<Partial>(from, tile.run.count);
    }
    PPCR_UNROLL
    for (int half = ROWS / 2; half; half /= 2) {
      PPCR_UNROLL
      for (int r = 0; r < half; ++r) {
        v[r] = v[r] + v[r + half];
        if constexpr (Tile::kDot) d[r] = d[r] + d[r + half];
      }
    }
    S* sum = sums + slot;
    store(sum, first ? v[0] : load(sum) + v[0]);
    if constexpr (Tile::kDot) {
      S* dot = tile.gates() + slot;
      store(dot, first_dot ? d[0] : load(dot) + d[0]);
    }
  };
  for (int i = 0; i < last * kLanes<S>; i += kLanes<S>) add(at + i, i);
  add(at + tile.run.last, last * kLanes<S>);
}

// Sums channels begin .. end-1 row after row in memory order, a small plane in N registers.
template <int N, class Tile, class S>
PPCR_INLINE void sum_plane(const Tile& tile, int64_t begin, int64_t end, int64_t row_stride,
                           S* sums) {
  using V = typename VectorOf<S>::type;
  const Run<S>& run = tile.run;
  // A plane of fewer vectors repeats the last.
  const auto slot = [&](int i) { return (i < run.vectors ? i : run.vectors - 1) * kLanes<S>; };
  V v[N] = {}, d[N];
  if constexpr (Tile::kDot)
    for (int i = 0; i < N; ++i) d[i] = begin == 0 ? V{} : load(tile.gates() + slot(i));
  for (int64_t c = begin; c < end; ++c) {
    PPCR_UNROLL
    for (int i = 0; i < N; ++i) {
      const int64_t from = c * row_stride + run.offset(i);
      const V x = load(tile.x + from);
      v[i] = v[i] + x;
      if constexpr (Tile::kDot) d[i] = d[i] + x * tile.template gradient<false>(from, run.count);
    }
  }
  PPCR_UNROLL
  for (int i = 0; i < N; ++i) {
    store(sums + slot(i), v[i]);
    if constexpr (Tile::kDot) store(tile.gates() + slot(i), d[i]);
  }
}

// From one value per vector slot to one per pixel, followed by one vector more: the first pixels
// again, for spans of several rows.
template <class S>
PPCR_INLINE void lay_out(S* row, const Run<S>& run, bool wrap) {
  constexpr int W = kLanes<S>;
  if (run.vectors > 1) store(row + run.last, load(row + (run.vectors - 1) * W));
  if (run.partial() || !wrap)
    for (int i = 0; i < W; ++i) row[run.count + i] = wrap ? row[i] : S(0);
  else
    store(row + run.count, load(row));
}

// Applies gate and shift to `length` consecutive elements from `at` on; element i belongs to pixel
// i % period. Where a partial store costs nothing the stores are aligned: one that straddles two
// cache lines takes as long as two.
template <class Tile, class S>
PPCR_INLINE void apply_span(const Tile& tile, int64_t at, int64_t length, const S* gate,
                            const S* shift, int64_t period) {
  constexpr int W = kLanes<S>, bytes = W * static_cast<int>(sizeof(*tile.out));
  const int64_t step = W % period, last = length - W;
  int64_t i = 0, pixel = 0;
  if constexpr (kMaskedStores) {
    const int over =
        static_cast<int>(reinterpret_cast<uintptr_t>(tile.out + at) % bytes) * W / bytes;
    if (over) {
      i = W - over < length ? W - over : length;
      tile.template apply<true>(at, static_cast<int>(i), load(gate), load(shift));
      pixel = i % period;
    }
  }
  for (; i <= last; i += W) {
    tile.template apply<false>(at + i, W, load(gate + pixel), load(shift + pixel));
    pixel += step;
    if (pixel >= period) pixel -= period;
  }
  if (i == length) return;
  if (kMaskedStores || length < W) {
    tile.template apply<true>(at + i, static_cast<int>(length - i), load(gate + pixel),
                              load(shift + pixel));
  } else {  // the last vector overlaps the one before it
    pixel = last % period;
    tile.template apply<false>(at + last, W, load(gate + pixel), load(shift + pixel));
  }
}

template <Operation operation, Pass pass, class T>
struct Contiguous {
  using S = Acc<T>;
  using Tile = PPCR_CAPABILITY::Tile<operation, pass, T>;
  static constexpr int kRows = Tile::kDot ? 4 : 8;

  static PPCR_HD Tile tile(const Problem& p, int64_t image, int64_t pixel, int64_t count, S* rows) {
    const Run<S> run(count, false);
    return {p, image * p.channels * p.pixels + pixel, run, rows, (run.vectors + 1) * kLanes<S>};
  }
  static PPCR_HD void apply(const Problem& p, const Tile& tile) {
    const bool plane = tile.run.count == p.pixels;  // then the rows of a segment are one span
    lay_out(tile.gates(), tile.run, plane);
    for (int k = 0; k < tile.segments; ++k) {
      if constexpr (Tile::kBackward) lay_out(tile.row(k), tile.run, plane);
      const int64_t begin = p.pooling.edge[k], end = p.pooling.edge[k + 1];
      const int64_t length = plane ? (end - begin) * p.pixels : tile.run.count;
      for (int64_t c = begin; c < end; c += plane ? end - begin : 1)
        apply_span(tile, c * p.pixels, length, tile.gates(), tile.row(k), tile.run.count);
    }
  }
  // Sums `rows` channels at once.
  template <int rows, bool Partial>
  static PPCR_HD void sum_rows(const Problem& p, const Tile& tile) {
    const bool prefetch = p.method == Method::kGrouped;
    for (int k = 0; k < tile.segments; ++k) {
      const int64_t begin = p.pooling.edge[k], end = p.pooling.edge[k + 1];
      int64_t c = begin;
      for (; c + rows <= end; c += rows)
        add_rows<rows, Partial>(tile, c * p.pixels, p.pixels, tile.row(k), c == begin, c == 0,
                                prefetch);
      for (; c < end; ++c)
        add_rows<1, Partial>(tile, c * p.pixels, p.pixels, tile.row(k), c == begin, c == 0,
                             prefetch);
    }
  }
  static PPCR_HD void sum(const Problem& p, const Tile& tile) {
    if (tile.run.partial())
      sum_rows<kRows, true>(p, tile);
    else if (p.method == Method::kGrouped)
      sum_rows<kRows, false>(p, tile);
    else if (kLanes<S> >= 8 && p.pixels > 48 && p.pixels <= 64)
      for (int k = 0; k < tile.segments; ++k)
        sum_plane<64 / kLanes<S>>(tile, p.pooling.edge[k], p.pooling.edge[k + 1], p.pixels,
                                  tile.row(k));
    else
      sum_rows<1, false>(p, tile);
  }
};

}  // namespace PPCR_CAPABILITY
}  // namespace ppcr
