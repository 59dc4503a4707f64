// What the CPU kernels take and how to reach the set compiled for an instruction set. No torch
// here.
#pragma once
#include "../ppcr_types.h"

namespace ppcr {

enum class Dtype { kFloat, kDouble, kHalf, kBFloat16 };
enum class Op { kForward, kBackward, kGate, kGateBackward, kAddRelu, kAddReluBackward };
constexpr bool is_backward(Op op) {
  return op == Op::kBackward || op == Op::kGateBackward || op == Op::kAddReluBackward;
}

// Memory is seen as images of `pixels` pixels and `channels` channels: either each channel's pixels
// are consecutive (channel-major, torch's contiguous) or each pixel's channels are (pixel-major,
// torch's channels_last; one image then holds all samples).
struct Problem {
  int64_t images, channels, pixels;
  bool pixel_major;
  Pooling pooling;
  double weight[kMaxContexts], bias, eps;
  const void* x;
  const void* grad;     // gradient of the output; for the gate one value per pixel
  const void* other;    // residual (forward) or y (backward) of add_relu
  void* out;            // y, gate, or dx
  void* grad_residual;  // add_relu's backward only
  double* partial;      // backward: [chunks][L + 1], sums for the gradients of weight and bias
  int64_t tile_pixels;  // a tile of pixels with all channels stays in cache between its two passes
  int64_t tiles_per_image;
  int64_t chunks;  // runs of whole tiles, the unit of work of a thread: never a function of the
                   // number of threads
  int64_t tiles() const { return images * tiles_per_image; }
};

constexpr int64_t kScratchBytes = 48 << 10;  // on the stack of each thread

// Fills in tile_pixels, tiles_per_image and chunks.
void plan(Problem& problem, int64_t element_size);

using Kernel = void (*)(const Problem&, int64_t first_chunk, int64_t last_chunk);

// The kernel of the best instruction set that this CPU has, or of the one that PPCR_CPU_CAPABILITY
// names (default, avx2, avx512).
Kernel find_kernel(Op op, Dtype dtype);
const char* cpu_capability();

Kernel find_kernel_default(Op op, Dtype dtype);
Kernel find_kernel_avx2(Op op, Dtype dtype);
Kernel find_kernel_avx512(Op op, Dtype dtype);

}  // namespace ppcr
