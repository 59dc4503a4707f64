// Contiguous tensors: a tile is a run of pixels, a row of it one channel.
#pragma once
#include "elements.h"

namespace ppcr::PPCR_CAPABILITY {

// From one value per vector slot to one per pixel, and the first again, for spans of several rows.
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
// i % period. Where a partial store is one instruction the stores are aligned: one that straddles
// two cache lines takes as long as two.
template <class Tile, class S>
PPCR_INLINE void apply_span(const Tile& tile, int64_t at, int64_t length, const S* gate,
                            const S* shift, int64_t period) {
  constexpr int W = kLanes<S>, bytes = W * static_cast<int>(sizeof(*tile.out));
  const int64_t step = W % period, last = length - W;
  int64_t i = 0, pixel = 0;
  if constexpr (PPCR_SIMD_BYTES == 64) {
    const int over =
        static_cast<int>(reinterpret_cast<uintptr_t>(tile.out + at) % bytes) * W / bytes;
    if (over) {
      i = W - over < length ? W - over : length;
      tile.apply(at, static_cast<int>(i), load(gate), load(shift));
      pixel = i % period;
    }
  }
  for (; i <= last; i += W) {
    tile.apply(at + i, All{}, load(gate + pixel), load(shift + pixel));
    pixel += step;
    if (pixel >= period) pixel -= period;
  }
  if (i < length)
    tile.apply(at + i, static_cast<int>(length - i), load(gate + pixel), load(shift + pixel));
}

template <Operation operation, Pass pass, class T>
struct Contiguous {
  using S = Acc<T>;
  using V = typename VectorOf<S>::type;
  using Tile = PPCR_CAPABILITY::Tile<operation, pass, T>;
  static constexpr int kRows = Tile::kDot ? 4 : 8;

  static PPCR_HD Tile tile(const Problem& p, int64_t image, int64_t pixel, int64_t count, S* rows) {
    const Run<S> run(count, false);
    return {p, image * p.channels * p.pixels + pixel, run, rows, (run.vectors + 1) * kLanes<S>};
  }
  // Applies gate and shift to channels of segment k from c on, `rows` at once. Returns the next.
  template <int rows>
  static PPCR_HD int64_t apply_rows(const Problem& p, const Tile& tile, int k, int64_t c) {
    constexpr int ahead = 384 / sizeof(T);  // six cache lines of the outputs
    for (; c + rows <= p.pooling.edge[k + 1]; c += rows)
      for (int i = 0; i < tile.run.vectors; ++i) {
        const int pixel = tile.run.offset(i);
        const V gate = load(tile.gates() + pixel), shift = load(tile.row(k) + pixel);
        PPCR_UNROLL
        for (int r = 0; r < rows; ++r) {
          const int64_t at = (c + r) * p.pixels + pixel;
          __builtin_prefetch(tile.out + at + ahead, 1);
          tile.apply(at, All{}, gate, shift);
        }
      }
    return c;
  }
  static PPCR_HD void apply(const Problem& p, const Tile& tile) {
    // A row that is a whole channel: then the rows of a segment are one span.
    const bool plane = tile.run.count == p.pixels;
    const bool several = p.method == Method::kSequential && !plane && !tile.run.partial();
    // Rows that lie whole pages apart share sets of the L1 cache: eight of them are too many.
    const bool pages_apart = p.pixels * int64_t{sizeof(T)} % kPageBytes == 0;
    lay_out(tile.gates(), tile.run, plane);
    for (int k = 0; k < tile.segments; ++k) {
      if constexpr (Tile::kBackward) lay_out(tile.row(k), tile.run, plane);
      int64_t c = p.pooling.edge[k];
      if (several) c = pages_apart ? apply_rows<4>(p, tile, k, c) : apply_rows<8>(p, tile, k, c);
      const int64_t end = p.pooling.edge[k + 1], rows = plane ? end - c : 1;
      for (; c < end; c += rows)
        apply_span(tile, c * p.pixels, rows * tile.run.count, tile.gates(), tile.row(k),
                   tile.run.count);
    }
  }
  // Adds `rows` channels from c on to the sums of segment k: several at once, because that shortens
  // the chain of additions (and its rounding) and the traffic to the accumulators.
  template <int rows, class Count>
  static PPCR_HD void add_rows(const Problem& p, const Tile& tile, int k, int64_t c, Count count,
                               bool prefetch) {
    const int64_t at = c * p.pixels, stride = p.pixels;
    const bool first = c == p.pooling.edge[k];
    const auto add = [&](int64_t from, int slot) __attribute__((always_inline)) {
      V v[rows], d[rows];
      PPCR_UNROLL
      for (int r = 0; r < rows; ++r, from += stride) {
        v[r] = load(tile.x + from, count);
        if constexpr (Tile::kApply)
          if (prefetch) __builtin_prefetch(tile.out + from, 1);
        if constexpr (Tile::kDot) d[r] = v[r] * tile.gradient(from, count);
      }
      PPCR_UNROLL
      for (int half = rows / 2; half; half /= 2) {
        PPCR_UNROLL
        for (int r = 0; r < half; ++r) {
          v[r] = v[r] + v[r + half];
          if constexpr (Tile::kDot) d[r] = d[r] + d[r + half];
        }
      }
      S* const sum = tile.row(k) + slot;
      store(sum, first ? v[0] : load(sum) + v[0]);
      if constexpr (Tile::kDot) {
        S* const dot = tile.gates() + slot;
        store(dot, c == 0 ? d[0] : load(dot) + d[0]);
      }
    };
    const int last = (tile.run.vectors - 1) * kLanes<S>;
    for (int i = 0; i < last; i += kLanes<S>) add(at + i, i);
    add(at + tile.run.last, last);
  }
  template <int rows, class Count>
  static PPCR_HD void sum_rows(const Problem& p, const Tile& tile, Count count,
                               bool prefetch = false) {
    for (int k = 0; k < tile.segments; ++k) {
      int64_t c = p.pooling.edge[k];
      const int64_t end = p.pooling.edge[k + 1];
      for (; c + rows <= end; c += rows) add_rows<rows>(p, tile, k, c, count, prefetch);
      for (; rows > 4 && c + 4 <= end; c += 4) add_rows<4>(p, tile, k, c, count, prefetch);
      for (; c < end; ++c) add_rows<1>(p, tile, k, c, count, prefetch);
    }
  }
  // Sums segment k row after row in memory order, a small plane in N registers.
  template <int N>
  static PPCR_HD void sum_plane(const Problem& p, const Tile& tile, int k) {
    const Run<S>& run = tile.run;
    // A plane of fewer vectors repeats the last.
    const auto slot = [&](int i) { return (i < run.vectors ? i : run.vectors - 1) * kLanes<S>; };
    V v[N] = {}, d[N];
    if constexpr (Tile::kDot)
      for (int i = 0; i < N; ++i) d[i] = k == 0 ? V{} : load(tile.gates() + slot(i));
    for (int64_t c = p.pooling.edge[k]; c < p.pooling.edge[k + 1]; ++c) {
      PPCR_UNROLL
      for (int i = 0; i < N; ++i) {
        const int64_t from = c * p.pixels + run.offset(i);
        const V x = load(tile.x + from);
        v[i] = v[i] + x;
        if constexpr (Tile::kDot) d[i] = d[i] + x * tile.gradient(from, All{});
      }
    }
    PPCR_UNROLL
    for (int i = 0; i < N; ++i) {
      store(tile.row(k) + slot(i), v[i]);
      if constexpr (Tile::kDot) store(tile.gates() + slot(i), d[i]);
    }
  }
  static PPCR_HD void sum(const Problem& p, const Tile& tile) {
    if (tile.run.partial())
      sum_rows<kRows>(p, tile, tile.run.count);
    else if (p.method == Method::kGrouped)
      sum_rows<kRows>(p, tile, All{}, true);
    else if (tile.run.count != p.pixels || p.long_channels(sizeof(T)))
      sum_rows<kRows>(p, tile, All{});
    else if (kLanes<S> >= 8 && p.pixels > 48 && p.pixels <= 64)
      for (int k = 0; k < tile.segments; ++k) sum_plane<64 / kLanes<S>>(p, tile, k);
    else
      sum_rows<1>(p, tile, All{});
  }
};

}  // namespace ppcr::PPCR_CAPABILITY
