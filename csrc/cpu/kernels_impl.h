// The CPU kernels, compiled once per instruction set. A tile of pixels is handled in three steps:
//   1. sum: the channel segments of x, per pixel (backward: also its product with the gradient);
//   2. gate: the mathematics of a pixel (gate_step.h), a SIMD vector of pixels at a time;
//   3. apply: the output is written; what it reads again is still in cache.
#pragma once
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// After the system's headers, so that nothing of theirs is compiled for this target. GCC prefers
// 256 bits where it vectorizes by itself, and then a backward pass of float16 took 6 % longer.
#define PPCR_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define PPCR_PRAGMA_OF(...) PPCR_PRAGMA(__VA_ARGS__)
#if defined(PPCR_TARGET) && defined(__clang__)
PPCR_PRAGMA_OF(clang attribute push(__attribute__((target(PPCR_TARGET))), apply_to = function))
#elif defined(PPCR_TARGET)
PPCR_PRAGMA_OF(GCC target(PPCR_TARGET, "prefer-vector-width=512"))
#endif

#include "channels_last.h"
#include "contiguous.h"

namespace ppcr::PPCR_CAPABILITY {

// Layout: how a tile is summed and applied.
template <class Layout, class S>
PPCR_INLINE void run_tiles(const Problem& p, int64_t begin, int64_t end, GateStep<S>& gate_step,
                           S* rows) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / p.tiles_per_image, in_image = i % p.tiles_per_image,
                  pixel = in_image * p.tile_pixels;
    const int64_t count = in_image + 1 == p.tiles_per_image ? p.pixels - pixel : p.tile_pixels;
    const auto tile = Layout::tile(p, image, pixel, count, rows);
    if constexpr (tile.kGate && tile.kBackward) tile.move_gates(p, image * p.pixels + pixel);
    Layout::sum(p, tile);
    const Run<S> pixels = tile.run;  // a copy, so that the tile itself stays in registers
    gate_step.template run<tile.kBackward>(rows, tile.stride, pixels);
    if constexpr (tile.kGate && !tile.kBackward) tile.move_gates(p, image * p.pixels + pixel);
    if constexpr (tile.kApply) Layout::apply(p, tile);
  }
}

template <Operation operation, Pass pass, class T>
void run(const Problem& p, int64_t first_chunk, int64_t last_chunk) {
  using S = Acc<T>;
  alignas(64) S rows[kScratchBytes / sizeof(S)];
  GateStep<S> gate_step(p);
  const int64_t tiles = p.tiles();
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t per_chunk = tiles / p.chunks,
                  longer = tiles % p.chunks;  // the first `longer` chunks hold one tile more
    const int64_t begin = chunk * per_chunk + (chunk < longer ? chunk : longer);
    const int64_t end = begin + per_chunk + (chunk < longer ? 1 : 0);
    if (p.channels_last)
      run_tiles<ChannelsLast<operation, pass, T>>(p, begin, end, gate_step, rows);
    else
      run_tiles<Contiguous<operation, pass, T>>(p, begin, end, gate_step, rows);
    if constexpr (is_backward(pass))
      gate_step.end_chunk(p.partial + chunk * (p.pooling.contexts + 1));
  }
}

template <class T>
constexpr Kernel kKernels[3][2] = {
    {run<Operation::kPpcr, Pass::kForward, T>, run<Operation::kPpcr, Pass::kBackward, T>},
    {run<Operation::kGate, Pass::kForward, T>, run<Operation::kGate, Pass::kBackward, T>},
    {run<Operation::kAddRelu, Pass::kForward, T>, run<Operation::kAddRelu, Pass::kBackward, T>}};

}  // namespace ppcr::PPCR_CAPABILITY

ppcr::Kernel ppcr::PPCR_FIND_KERNEL(Operation operation, Pass pass, Dtype dtype) {
  using namespace PPCR_CAPABILITY;
  const auto& kernels = dtype == Dtype::kFloat    ? kKernels<float>
                        : dtype == Dtype::kDouble ? kKernels<double>
                        : dtype == Dtype::kHalf   ? kKernels<Half>
                                                  : kKernels<BFloat16>;
  return kernels[static_cast<int>(operation)][static_cast<int>(pass)];
}

#if defined(PPCR_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
