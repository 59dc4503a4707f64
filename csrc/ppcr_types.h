// Plain data that crosses from the PyTorch glue to the kernels of every device: sizes, pooling
// bins, limits. Includes nothing of torch or CUDA, so that it compiles anywhere, in the tests
// included.
#pragma once
#include <cstdint>

namespace ppcr {

constexpr int kMaxContexts =
    64;  // L that the fused kernels take; the Python layer sends more to the reference
constexpr int kMaxSegments =
    127;  // m levels with L bins in all cut the channels at most 2 (L - m) times

// Cross-channel pyramid pooling for C channels. The edges of all bins cut the channels into
// elementary segments; every context (bin) is a run of whole segments, so that one pass over the
// channels that sums each segment serves all levels.
struct Pooling {
  int contexts = 0;                // L
  int segments = 0;                // K
  int64_t edge[kMaxSegments + 1];  // segment k holds channels edge[k] .. edge[k+1]-1
  uint8_t first[kMaxContexts];     // context l holds segments first[l] .. last[l]-1
  uint8_t last[kMaxContexts];
  int64_t size[kMaxContexts] = {};  // channels in context l
  bool standard =
      false;  // levels (1, 2, 4) with 4 | C: four equal segments, unrolled at compile time
};

// Fills `pooling`; returns null, or what is wrong with the levels.
inline const char* make_pooling(const int64_t* levels, int64_t count, int64_t channels,
                                Pooling& pooling) {
  if (channels < 1) return "x must have at least 1 channel";
  if (count < 1) return "levels must not be empty";
  int64_t contexts = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (levels[i] < 1) return "levels must be at least 1";
    if (levels[i] > channels) return "levels must not exceed the number of channels";
    if (levels[i] > kMaxContexts - contexts)
      return "levels have more than 64 contexts, which only the reference takes";
    contexts += levels[i];
  }
  if (contexts < 2) return "levels need at least 2 contexts: one alone normalizes to zero";

  // Quotient first: i * C may leave 64 bits, i * (C / k) never does.
  const auto floor_edge = [channels](int64_t i, int64_t k) {
    return i * (channels / k) + i * (channels % k) / k;
  };
  const auto ceil_edge = [channels](int64_t i, int64_t k) {
    return i * (channels / k) + (i * (channels % k) + k - 1) / k;
  };

  int64_t edge[2 * kMaxContexts];
  int edges = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t b = 0; b < levels[i]; ++b) {
      edge[edges++] = floor_edge(b, levels[i]);
      edge[edges++] = ceil_edge(b + 1, levels[i]);
    }
  for (int i = 1; i < edges;
       ++i) {  // insertion sort: at most 128 values, and no <algorithm> in a header that nvcc reads
    const int64_t value = edge[i];
    int j = i;
    for (; j > 0 && edge[j - 1] > value; --j) edge[j] = edge[j - 1];
    edge[j] = value;
  }
  int unique = 0;
  for (int i = 0; i < edges; ++i)
    if (unique == 0 || edge[i] != pooling.edge[unique - 1]) pooling.edge[unique++] = edge[i];

  const auto segment_at = [&pooling](int64_t channel) {
    int k = 0;
    while (pooling.edge[k] != channel) ++k;
    return static_cast<uint8_t>(k);
  };
  pooling.contexts = static_cast<int>(contexts);
  pooling.segments = unique - 1;
  int l = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t b = 0; b < levels[i]; ++b, ++l) {
      const int64_t begin = floor_edge(b, levels[i]), end = ceil_edge(b + 1, levels[i]);
      pooling.first[l] = segment_at(begin);
      pooling.last[l] = segment_at(end);
      pooling.size[l] = end - begin;
    }
  pooling.standard =
      count == 3 && levels[0] == 1 && levels[1] == 2 && levels[2] == 4 && channels % 4 == 0;
  return nullptr;
}

}  // namespace ppcr
