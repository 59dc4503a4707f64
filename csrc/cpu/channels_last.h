// channels_last tensors: a tile is a run of pixels, a row of it all channels of one pixel.
#pragma once
#include "elements.h"

namespace ppcr::PPCR_CAPABILITY {

constexpr int kGroup = 4;  // pixels whose sums are stored together

// Adds a vector of x (Even: a pair) at each of at[0..N) + offset to v[0..N), its product with the
// gradient to d. First: what v holds does not count.
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
  if constexpr (std::is_same_v<Count, Even>) add_vectors(tile, at, offset, Odd{}, v, d, false);
}
// Adds channels begin .. end-1 of N pixels or segments that lie at `at`.
template <bool First = false, int N, class Tile, class V>
PPCR_INLINE void add_channels(const Tile& tile, const int64_t (&at)[N], int64_t begin, int64_t end,
                              V* v, V* d, bool prefetch) {
  constexpr int W = kLanes<typename Tile::S>;
  if constexpr (First) {
    if (end - begin < W)
      return add_vectors<true>(tile, at, begin, static_cast<int>(end - begin), v, d, prefetch);
    add_vectors<true>(tile, at, begin, All{}, v, d, prefetch);
    begin += W;
  }
  if constexpr (Tile::kPairs)
    for (; begin + 2 * W <= end; begin += 2 * W)
      add_vectors(tile, at, begin, Even{}, v, d, prefetch);
  for (; begin + W <= end; begin += W) add_vectors(tile, at, begin, All{}, v, d, prefetch);
  if (begin < end) add_vectors(tile, at, begin, static_cast<int>(end - begin), v, d, prefetch);
}

template <Operation operation, Pass pass, class T>
struct ChannelsLast {
  using S = Acc<T>;
  using V = typename VectorOf<S>::type;
  using Tile = PPCR_CAPABILITY::Tile<operation, pass, T>;
  static constexpr int W = kLanes<S>;
  using Unit = std::conditional_t<Tile::kPairs, Even, All>;
  static constexpr int kStep = Tile::kPairs ? 2 : 1;  // channels from lane to lane of a unit
  using Group = int64_t[kGroup];                      // where the pixels of a group begin
  static constexpr int kByLane = 16;  // vectors of a pixel at most, where segments end within them

  static PPCR_HD Tile tile(const Problem& p, int64_t image, int64_t pixel, int64_t count, S* rows) {
    const Run<S> run(count, true);
    return {p, (image * p.pixels + pixel) * p.channels, run, rows, (run.count + 15) / 16 * 16};
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
    VU segment[kByLane];
    for (int64_t c = 0, n = 0, step; c < p.channels; c += step * W, ++n) {
      step = c + kStep * W <= p.channels ? kStep : 1;
      for (int l = 0; l < W; ++l) segment[n][l] = uint32_t((S(c + l * step) + S(.5)) * inverse);
    }
    for (int i = 0; i < tile.run.count; ++i) {
      const Four<S> shifts = {tile.row(0)[i], tile.row(1)[i], tile.row(2)[i], tile.row(3)[i]};
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
  // The sums of the pixels from i on. Four pixels at once, segment after segment: as many
  // independent chains of additions.
  static PPCR_HD void sum_grouped(const Problem& p, const Tile& tile, const Group& at, int i) {
    V d[kGroup] = {};
    for (int k = 0; k < tile.segments; ++k) {
      V v[kGroup];
      add_channels<true>(tile, at, p.pooling.edge[k], p.pooling.edge[k + 1], v, d, true);
      store_sums(tile.row(k) + i, v);
    }
    if constexpr (Tile::kDot) store_sums(tile.gates() + i, d);
  }
  // Four pixels at once, vector after vector: four segments of `blocks` blocks of four lanes.
  template <class Count>
  static PPCR_HD void sum_blocked(const Tile& tile, const Group& at, int i, Count count,
                                  int blocks) {
    constexpr int unit = std::is_same_v<Count, Even> ? 2 * W : W;
    V d[kGroup] = {};
    Four<S> sums[4 * 3], *next = sums;
    PPCR_UNROLL
    for (int n = 0; n < blocks * 16 / W; ++n) {
      V v[kGroup];
      add_vectors<true>(tile, at, n * unit, count, v, d, false);
      sum_blocks<S>(v, sums + n * W / 4);
    }
    PPCR_UNROLL
    for (int k = 0; k < 4; ++k) {
      Four<S> sum = *next++;
      for (int b = 1; b < blocks; ++b) sum = sum + *next++;
      std::memcpy(tile.row(k) + i, &sum, sizeof sum);
    }
    if constexpr (Tile::kDot) store_sums(tile.gates() + i, d);
  }
  // One pixel after the other, in memory order. Segments: four short ones of one length, unrolled.
  template <int Segments>
  static PPCR_HD void sum_sequential(const Problem& p, const Tile& tile, const Group& at, int i) {
    constexpr int unit = kStep * W;
    const int segments = Segments ? Segments : tile.segments;
    V sums[(Segments ? Segments : kMaxSegments) + 1][kGroup];
    PPCR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      V d[4] = {};
      if constexpr (Segments == 4) {
        const int64_t size = p.channels / 4, c = at[j];
        V v[4];
        add_channels<true>(tile, {c, c + size, c + 2 * size, c + 3 * size}, 0, size, v, d, false);
        for (int k = 0; k < 4; ++k) sums[k][j] = v[k];
      } else {
        for (int k = 0; k < segments; ++k) {
          int64_t c = at[j] + p.pooling.edge[k];
          // Pixels of many channels come in tiles of two: the other two must cost nothing.
          const int64_t end = i + j < tile.run.count ? at[j] + p.pooling.edge[k + 1] : c;
          V v[4] = {};
          for (; c + 4 * unit <= end; c += 4 * unit)
            add_vectors(tile, {c, c + unit, c + 2 * unit, c + 3 * unit}, 0, Unit{}, v, d, false);
          add_channels(tile, {0}, c, end, v, d, false);
          sums[k][j] = (v[0] + v[1]) + (v[2] + v[3]);
        }
      }
      sums[segments][j] = (d[0] + d[1]) + (d[2] + d[3]);
    }
    PPCR_UNROLL
    for (int k = 0; k < segments + Tile::kDot; ++k) store_sums(tile.row(k) + i, sums[k]);
  }

  static PPCR_HD void sum(const Problem& p, const Tile& tile) {
    const int count = tile.run.count;
    const auto each = [&](auto sum_group) __attribute__((always_inline)) {
      for (int i = 0; i < count; i += kGroup) {
        Group at;  // a group of fewer pixels repeats its last
        for (int j = 0; j < kGroup; ++j) at[j] = (i + j < count ? i + j : count - 1) * p.channels;
        sum_group(at, i);
      }
    };
    const int64_t bytes = p.channels * int64_t{sizeof(T)};
    const bool pairs = Tile::kPairs && p.channels % 32 == 0;
    const int64_t blocks = p.channels / (pairs ? 32 : 16);  // of a segment: one to three
    const auto blocked = [&](auto unit) __attribute__((always_inline)) {
      each([&](auto& at, int i) __attribute__((always_inline)) {
        blocks == 1   ? sum_blocked(tile, at, i, unit, 1)
        : blocks == 2 ? sum_blocked(tile, at, i, unit, 2)
                      : sum_blocked(tile, at, i, unit, 3);
      });
    };
    if (p.method == Method::kGrouped)
      each([&](auto& at, int i) { sum_grouped(p, tile, at, i); });
    else if (!p.pooling.standard || bytes > 512)
      each([&](auto& at, int i) { sum_sequential<0>(p, tile, at, i); });
    // Whole blocks: from memory, four larger pixels at once took up to 1.9 times as long.
    else if (bytes <= 128 && pairs)
      blocked(Unit{});
    else if (bytes <= 128 && p.channels % 16 == 0 && p.channels / 4 % W != 0)
      blocked(All{});
    else
      each([&](auto& at, int i) { sum_sequential<4>(p, tile, at, i); });
    for (int k = 0; k < tile.segments + Tile::kDot; ++k)
      for (int i = count; i < tile.stride; ++i) tile.row(k)[i] = 0;
  }
};

}  // namespace ppcr::PPCR_CAPABILITY
