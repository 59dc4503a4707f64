// What the planner is asked and what it answers, in plain C++.
#pragma once
#include <algorithm>
#include <string>

#include "tile.h"

namespace ppcr::cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a launch

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

struct DeviceLimits {
  int multiprocessors = 132;
  int max_cluster = 1;  // 8 where both the device and the compiled kernels know clusters (sm_90 on)
  int shared_bytes = 99 << 10;  // of a block, at most
};

struct Workload {
  int64_t images = 0, channels = 0, image_pixels = 0;
  bool channels_last = false;
  int element_size = 4;
  int alignment = 16;  // bytes: what the addresses of all tensors are multiples of, at most 16
  Operation operation = Operation::kPpcr;
  Pass pass = Pass::kForward;
  const Pooling* pooling = nullptr;

  bool backward() const { return is_backward(pass); }
  bool is_gate() const { return operation == Operation::kGate; }
  int accumulator() const { return accumulator_size(element_size); }  // bytes
  int64_t pixels() const { return images * image_pixels; }
  int64_t pixel_bytes() const { return channels * element_size; }
  // Bytes of one share of dweight and dbias, written and read.
  double share_bytes() const {
    return backward() ? 2. * (pooling->contexts + 1) * accumulator() : 0;
  }
};

// The largest power of two, up to 16, that divides the addresses of all tensors. The gate's own,
// and its gradient, are read and written singly, at any address.
inline int alignment_of(Operation operation, const TensorPointers& t) {
  const void* const tensors[] = {t.x, t.dx, t.grad, t.residual, t.y, t.d_residual};
  uintptr_t bits = 16;
  for (int i = 0; i < (operation == Operation::kGate ? 2 : 6); ++i)
    bits |= reinterpret_cast<uintptr_t>(tensors[i]);
  return static_cast<int>(bits & (~bits + 1));
}

enum class Method : int {
  kContiguousPipelined,
  kChannelsLastRegisters,
  kChannelsLastGate,
  kChannelsLastShared
};

struct Plan {
  Method method = Method::kContiguousPipelined;
  int vector = 1;  // elements per load
  int steps = 0;   // vectors of a thread in registers; kChannelsLastRegisters: of each pixel
  int threads = kThreads;
  int64_t blocks = 0;
  int64_t partial_count = 0;  // per parameter
  int shared_bytes = 0;
  int shared_limit = 0;  // of a block on the device
  bool early = false;    // kernels may be set up while the one before them ends
  double score = 0;
  std::string error;  // why there is no plan

  // kContiguousPipelined
  Tile tile{};
  int unit_count = 0;
  int64_t unit_channels = 0;  // of the longest
  int cluster_tiles = 0;    // of a cluster; 0: as many as make the clusters fit the device at once
  bool fixed_grid = false;  // PPCR_PLAN says how many clusters there are

  // kChannelsLastRegisters, kChannelsLastGate
  int variant = -1;  // of kLaneVariants; of the gate, lanes of a pixel
  int warp_pixels = 0;

  // kChannelsLastShared
  SharedTile shared_tile{};
  bool staged = false;
};

}  // namespace ppcr::cuda
