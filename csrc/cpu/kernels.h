// What the CPU kernels take, and how they are found. No torch here.
#pragma once
#include "../ppcr_types.h"

namespace ppcr {

enum class Dtype { kHalf = 5, kFloat, kDouble, kBFloat16 = 15 };  // as torch numbers them

// The order in which a kernel reads and writes memory. Which is fastest depends on the processor.
enum class Method {
  kGrouped,     // several pixels (channels_last) or channels at once, and the outputs prefetched
  kSequential,  // in memory order; contiguous channels that are long or cut up, several at once
};

constexpr int64_t kPageBytes = 4096;

// Memory is seen as images of `pixels` pixels and `channels` channels. The pixels of a channel are
// consecutive (contiguous), or the channels of a pixel (channels_last: one image for all samples).
struct Problem {
  int64_t images, channels, pixels;
  bool channels_last;
  Pooling pooling;
  TensorPointers tensors;
  double eps, bias, weight[kMaxContexts];
  double* partial;  // backward: [chunks][L + 1], sums for the gradients of weight and bias
  // What plan() fills in.
  Method method;
  bool narrow;          // with the AVX2 kernels where the CPU has AVX-512 as well
  int64_t tile_pixels;  // a tile of pixels with all channels stays in cache between its two passes
  int64_t tiles_per_image;
  int64_t chunks;  // runs of whole tiles, which threads share; no function of how many these are
  int64_t tiles() const { return images * tiles_per_image; }
  // Contiguous: whether the pixels of a channel fill a page of memory.
  bool long_channels(int64_t element_size) const { return pixels * element_size >= kPageBytes; }
};

constexpr int64_t kScratchBytes = 48 << 10;  // on the stack of each thread

struct Processor {
  bool amd = false;
  int64_t cores = 1, l1_bytes = 32 << 10;  // where the system says nothing else
  bool forced = false;                     // PPCR_CPU_METHOD names the method
  Method method = Method::kGrouped;
};
const Processor& processor();

// Chooses the method (or takes a given one), narrow, tile_pixels, tiles_per_image and chunks.
void plan(Problem& problem, int64_t element_size, const Method* method = nullptr);

using Kernel = void (*)(const Problem&, int64_t first_chunk, int64_t last_chunk);

// The kernel of the CPU's best instruction set, or of the one that PPCR_CPU_CAPABILITY names.
Kernel find_kernel(const Problem& problem, Operation operation, Pass pass, Dtype dtype);
const char* cpu_capability();
// What is wrong with PPCR_CPU_CAPABILITY or PPCR_CPU_METHOD, or null.
const char* wrong_settings();

Kernel find_kernel_default(Operation operation, Pass pass, Dtype dtype);
Kernel find_kernel_avx2(Operation operation, Pass pass, Dtype dtype);
Kernel find_kernel_avx512(Operation operation, Pass pass, Dtype dtype);

}  // namespace ppcr
