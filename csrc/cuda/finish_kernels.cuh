// dweight and dbias from the tiles' shares: one block per parameter adds them in an order that
// depends on their number alone, so the result is the same from run to run and on every device.
#pragma once
#include "device_common.cuh"

namespace ppcr::cuda {

constexpr int kFinishThreads = 512;

struct FinishArguments {
  Operands of;
  int64_t count;  // of shares
  int contexts;
};

template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_parameters(const __grid_constant__ FinishArguments arguments) {
  using A = Acc<T>;
  constexpr int kChains = 4;  // independent sums, so that many loads are in flight
  wait_for_kernels_before();
  PPCR_SHARED(raw);
  A* const warps = reinterpret_cast<A*>(raw);
  const Operands& of = arguments.of;
  const A* const row = static_cast<A*>(of.partials) + int64_t(blockIdx.x) * arguments.count;

  A sums[kChains] = {};
  for (int64_t i = threadIdx.x; i < arguments.count; i += kChains * kFinishThreads) {
    PPCR_UNROLL
    for (int s = 0; s < kChains; ++s)
      if (i + s * kFinishThreads < arguments.count) sums[s] += row[i + s * kFinishThreads];
  }
  const A sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]), kWarp);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  A total = 0;
  for (int i = 0; i < kFinishThreads / kWarp; ++i) total += warps[i];

  const bool is_weight = int(blockIdx.x) < arguments.contexts;
  const Parameter::Kind kind = is_weight ? of.weight.kind : of.bias.kind;
  void* const to = is_weight ? of.dweight : of.dbias;
  const int at = is_weight ? int(blockIdx.x) : 0;
  if (kind == Parameter::kWide) static_cast<A*>(to)[at] = total;
  if (kind == Parameter::kOwn) static_cast<T*>(to)[at] = T(total);
}

}  // namespace ppcr::cuda
