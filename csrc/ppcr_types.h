// Plain data that goes from the PyTorch glue to the kernels of every device: the operation, pooling
// bins, limits. It includes nothing of torch or CUDA, so that it compiles anywhere.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define PPCR_HD __host__ __device__ __forceinline__
#define PPCR_UNROLL _Pragma("unroll")
#else
#define PPCR_HD inline __attribute__((always_inline))
#define PPCR_UNROLL _Pragma("GCC unroll 8")
#endif

namespace ppcr {

// What is computed: y = x g, the gate g alone, or y = relu(x g + residual).
enum class Operation : int { kPpcr, kGate, kAddRelu };
enum class Pass : int { kForward, kBackward };
PPCR_HD constexpr bool is_backward(Pass pass) { return pass == Pass::kBackward; }

// The type of sums.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The tensors of one call. The gate and its gradient have one value per pixel; all others have the
// shape and layout of x.
struct TensorPointers {
  const void* x = nullptr;
  const void* grad = nullptr;      // of y; backward
  const void* residual = nullptr;  // add_relu, forward
  void* y = nullptr;               // result of the forward pass; add_relu's backward pass reads it
  void* dx = nullptr;
  void* d_residual = nullptr;  // add_relu, backward
};

// L that the fused kernels take; the Python layer sends more to the reference.
constexpr int kMaxContexts = 64;
// Levels with L bins in all cut the channels at most 2 (L - number of levels) times.
constexpr int kMaxSegments = 127;

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
  bool standard = false;            // levels (1, 2, 4) and 4 divides C: four segments, unrolled
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
  const auto edge_of = [channels](int64_t i, int64_t k, bool up) {
    return i * (channels / k) + (i * (channels % k) + (up ? k - 1 : 0)) / k;
  };

  int64_t edge[2 * kMaxContexts];
  int edges = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t b = 0; b < levels[i]; ++b) {
      edge[edges++] = edge_of(b, levels[i], false);
      edge[edges++] = edge_of(b + 1, levels[i], true);
    }
  std::sort(edge, edge + edges);
  const auto unique = std::unique_copy(edge, edge + edges, pooling.edge) - pooling.edge;

  const auto segment_at = [&](int64_t channel) {
    return static_cast<uint8_t>(std::find(pooling.edge, pooling.edge + unique, channel) -
                                pooling.edge);
  };
  pooling.contexts = static_cast<int>(contexts);
  pooling.segments = static_cast<int>(unique) - 1;
  int l = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t b = 0; b < levels[i]; ++b, ++l) {
      const int64_t begin = edge_of(b, levels[i], false), end = edge_of(b + 1, levels[i], true);
      pooling.first[l] = segment_at(begin);
      pooling.last[l] = segment_at(end);
      pooling.size[l] = end - begin;
    }
  pooling.standard =
      count == 3 && levels[0] == 1 && levels[1] == 2 && levels[2] == 4 && channels % 4 == 0;
  return nullptr;
}

}  // namespace ppcr
