// channels_last tensors: a tile is a run of pixels, a row of it all channels of one pixel.
#pragma once
#include "elements.h"

namespace ppcr::PPCR_CAPABILITY {

constexpr int kGroup = 4;  // pixels whose sums are folded together

// Adds a vector of x at each of at[0..N) + offset to v[0..N), its product with the gradient to d.
// First: what v holds does not count.
template <bool First = false, int N, class Tile, class Count, class V>
PPCR_INLINE void add_vectors(const Tile& tile, const int64_t (&at)[N], int64_t offset, Count count,
                             V* v, V* d, bool prefetch) {
  PPCR_UNROLL
  for (int i = 0; i < N; ++i) {
    const V x = load(tile.x + at[i] + offset, count);
    if constexpr (Tile::kApply)
      if (prefetch) __builtin_prefetch(tile.out + at[i] + offset, 1);
    v[i] = First ? x : v[i] + x;
    if constexpr (Tile::kDot) d[i] = d[i] + x * tile.gradient(at[i] + offset, count);
  }
}
// Adds channels begin .. end-1 of N pixels or segments that lie at `at`.
template <int N, class Tile, class V>
PPCR_INLINE void add_channels(const Tile& tile, const int64_t (&at)[N], int64_t begin, int64_t end,
                              V* v, V* d, bool prefetch) {
  constexpr int W = kLanes<typename Tile::S>;
  if constexpr (Tile::kPairs)
    for (; begin + 2 * W <= end; begin += 2 * W) {
      add_vectors(tile, at, begin, Even{}, v, d, prefetch);
      add_vectors(tile, at, begin, Odd{}, v, d, false);
    }
  for (; begin + W <= end; begin += W) add_vectors(tile, at, begin, All{}, v, d, prefetch);
  if (begin < end) add_vectors(tile, at, begin, static_cast<int>(end - begin), v, d, prefetch);
}

template <Operation operation, Pass pass, class T>
struct ChannelsLast {
  using S = Acc<T>;
  using V = typename VectorOf<S>::type;
  using Tile = PPCR_CAPABILITY::Tile<operation, pass, T>;
  static constexpr int W = kLanes<S>, F = kFolded<S>;
  static constexpr int kStep = Tile::kPairs ? 2 : 1;  // channels from lane to lane
  static constexpr int kByLane = 16;  // vectors of a pixel at most, where segments end within them

  static PPCR_HD Tile tile(const Problem& p, int64_t image, int64_t pixel, int64_t count, S* rows) {
    constexpr int unit = W < kGroup ? kGroup : W;
    const Run<S> run(count, true);
    return {p, (image * p.pixels + pixel) * p.channels, run, rows,
            (run.count + unit - 1) / unit * unit};
  }

  // shift(): of the next vector, or of the next two.
  template <class Shift>
  static PPCR_HD void apply_run(const Tile& tile, int64_t from, int64_t n, V gate, Shift shift) {
    if constexpr (Tile::kPairs)
      for (; n >= 2 * W; from += 2 * W, n -= 2 * W) {
        const V both = shift();
        store(tile.out + from, tile.value(from, Even{}, gate, both),
              tile.value(from, Odd{}, gate, both));
      }
    for (; n >= W; from += W, n -= W) tile.apply(from, All{}, gate, shift());
    if (n > 0) tile.apply(from, static_cast<int>(n), gate, shift());
  }
  // A pixel as one run: every lane takes the shift of its own segment, one of four.
  static PPCR_HD void apply_by_lane(const Problem& p, const Tile& tile) {
    const S inverse = 4 / S(p.channels);
    typedef S Four __attribute__((vector_size(16)));
    VU segment[kByLane];
    for (int64_t c = 0, n = 0, step; c < p.channels; c += step * W, ++n) {
      step = c + kStep * W <= p.channels ? kStep : 1;
      for (int l = 0; l < W; ++l) segment[n][l] = uint32_t((S(c + l * step) + S(.5)) * inverse);
    }
    for (int i = 0; i < tile.run.count; ++i) {
      const Four shifts = {tile.row(0)[i], tile.row(1)[i], tile.row(2)[i], tile.row(3)[i]};
      const VU* next = segment;
      apply_run(tile, i * p.channels, p.channels, tile.gates()[i] + V{},
                [&] { return permute(shifts, *next++); });
    }
  }
  static PPCR_HD void apply(const Problem& p, const Tile& tile) {
    if constexpr (Tile::kBackward && sizeof(S) == 4 && W > 4)  // where there is permute
      if (const int64_t part = p.channels / 4 % (kStep * W);
          p.pooling.standard && part && part % kStep == 0 && p.channels <= kByLane * W)
        return apply_by_lane(p, tile);
    for (int i = 0; i < tile.run.count; ++i)
      for (int k = 0; k < (Tile::kBackward ? tile.segments : 1); ++k) {
        const int64_t c = Tile::kBackward ? p.pooling.edge[k] : 0,
                      end = Tile::kBackward ? p.pooling.edge[k + 1] : p.channels;
        const V shift = Tile::kBackward ? tile.row(k)[i] + V{} : V{};
        apply_run(tile, i * p.channels + c, end - c, tile.gates()[i] + V{}, [&] { return shift; });
      }
  }
  // Where pixel i begins. A group of fewer pixels than kGroup repeats its last.
  static PPCR_HD int64_t begin_of(const Problem& p, const Tile& tile, int i) {
    return (i < tile.run.count ? i : tile.run.count - 1) * p.channels;
  }
  // Four pixels at once, segment after segment: as many independent chains of additions.
  static PPCR_HD void sum_grouped(const Problem& p, const Tile& tile, int i, S* folded) {
    int64_t at[kGroup];
    for (int j = 0; j < kGroup; ++j) at[j] = begin_of(p, tile, i + j);
    V d[kGroup] = {};
    for (int k = 0; k < tile.segments; ++k) {
      V v[kGroup] = {};
      add_channels(tile, at, p.pooling.edge[k], p.pooling.edge[k + 1], v, d, true);
      store_folded(folded + (k * tile.stride + i) * F, v);
    }
    if constexpr (Tile::kDot) store_folded(folded + (tile.segments * tile.stride + i) * F, d);
  }
  // One pixel after the other, in memory order. Segments: four short ones of one length, unrolled.
  template <int Segments>
  static PPCR_HD void sum_sequential(const Problem& p, const Tile& tile, int i, S* folded) {
    const int segments = Segments ? Segments : tile.segments;
    const auto total = [](const V* v) { return (v[0] + v[1]) + (v[2] + v[3]); };
    V sums[(Segments ? Segments : kMaxSegments) + 1][kGroup];
    PPCR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const int64_t at = begin_of(p, tile, i + j);
      V d[4] = {};
      if constexpr (Segments == 4) {
        const int64_t size = p.channels / 4,
                      from[4] = {at, at + size, at + 2 * size, at + 3 * size};
        V v[4];
        if (size < W) {
          add_vectors<true>(tile, from, 0, static_cast<int>(size), v, d, false);
        } else {
          add_vectors<true>(tile, from, 0, All{}, v, d, false);
          add_channels(tile, from, W, size, v, d, false);
        }
        for (int k = 0; k < 4; ++k) sums[k][j] = v[k];
      } else {
        for (int k = 0; k < segments; ++k) {
          int64_t c = at + p.pooling.edge[k];
          // Pixels of many channels come in tiles of two: the other two must cost nothing.
          const int64_t end = i + j < tile.run.count ? at + p.pooling.edge[k + 1] : c;
          V v[4] = {};
          for (; c + 4 * W <= end; c += 4 * W)
            if constexpr (Tile::kPairs) {
              add_vectors(tile, {c, c + 2 * W}, 0, Even{}, v, d, false);
              add_vectors(tile, {c, c + 2 * W}, 0, Odd{}, v + 2, d + 2, false);
            } else {
              add_vectors(tile, {c, c + W, c + 2 * W, c + 3 * W}, 0, All{}, v, d, false);
            }
          add_channels(tile, {0}, c, end, v, d, false);
          sums[k][j] = total(v);
        }
      }
      sums[segments][j] = total(d);
    }
    PPCR_UNROLL
    for (int k = 0; k < segments + Tile::kDot; ++k)
      store_folded(folded + (k * tile.stride + i) * F, sums[k]);
  }

  static PPCR_HD void sum(const Problem& p, const Tile& tile) {
    const int kept = tile.segments + Tile::kDot, stride = tile.stride, count = tile.run.count;
    S* folded = tile.row(tile.segments + 1);  // [kept][stride][F]
    if (p.method == Method::kGrouped)
      for (int i = 0; i < count; i += kGroup) sum_grouped(p, tile, i, folded);
    else if (p.pooling.standard && p.channels <= 512 / int64_t{sizeof(T)})
      for (int i = 0; i < count; i += kGroup) sum_sequential<4>(p, tile, i, folded);
    else
      for (int i = 0; i < count; i += kGroup) sum_sequential<0>(p, tile, i, folded);
    for (int k = 0; k < kept; ++k) {
      S* row = folded + k * stride * F;
      for (int i = count * F; i < stride * F; ++i) row[i] = 0;
      for (int i = 0; i < stride; i += W) store(tile.row(k) + i, sum_groups(row + i * F));
    }
  }
};

}  // namespace ppcr::PPCR_CAPABILITY
