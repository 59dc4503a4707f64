// The channels_last layout with any bins, any number of channels and any alignment: a block owns
// neighbouring pixels, which lie in memory without a gap. It copies them to shared memory in
// vectors of 16 bytes, whatever the number of channels, works on them there element by element, and
// copies the result back: the tensor crosses the memory bus once.
//
// Pixels too long for shared memory (STAGED false: some 57,000 channels of float32 on sm_90) are
// read from global memory twice.
#pragma once
#include <type_traits>

#include "device_common.cuh"

namespace ppcr::cuda {

template <class T, class Bins>
struct SharedTileArguments {
  Tensors<T> tensors;
  SharedTile tile;
  Bins bins;
};

// Copies `count` elements from `base` on to shared memory, as far as whole vectors go; returns how
// far. The second tensor is the residual (forward) or gy (backward); gy behind the ReLU is
// d_residual and is stored at once.
template <class T, int V, Operation OP, Pass PASS>
PPCR_DEVICE int stage(const Tensors<T>& tensors, int64_t base, int from, int count, T* x,
                      T* second) {
  constexpr bool kBackward = is_backward(PASS), kSecond = shared_tensors(OP, PASS) > 1;
  constexpr int kInFlight = V == 1 ? 2 * kBatch : kBatch;
  const int end = from + (count - from) / V * V;
  PPCR_ROLLED
  for (int first = from + int(threadIdx.x) * V; first < end;
       first += kInFlight * int(blockDim.x) * V) {
    Word<T, V> x_words[kInFlight], second_words[kInFlight] = {};
    PPCR_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int at = first + i * int(blockDim.x) * V;
      x_words[i] = load_if<T, V>(at < end, tensors.x + base + at);
      if constexpr (kSecond && kBackward)
        second_words[i] = load_gradient<T, V, OP>(tensors, at < end, base + at);
      if constexpr (kSecond && !kBackward)
        second_words[i] = load_if<T, V>(at < end, tensors.residual + base + at);
    }
    PPCR_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int at = first + i * int(blockDim.x) * V;
      if (at >= end) break;
      *reinterpret_cast<Word<T, V>*>(x + at) = x_words[i];
      if constexpr (kSecond) *reinterpret_cast<Word<T, V>*>(second + at) = second_words[i];
      if constexpr (kBackward && OP == Operation::kAddRelu)
        store_if<T, V>(true, tensors.d_residual + base + at, second_words[i]);
    }
  }
  return end;
}

template <class T, int V>
PPCR_DEVICE int write_back(const T* x, T* out, int from, int count) {
  const int end = from + (count - from) / V * V;
  PPCR_BY_FOUR
  for (int at = from + int(threadIdx.x) * V; at < end; at += int(blockDim.x) * V)
    store_if<T, V>(true, out + at, *reinterpret_cast<const Word<T, V>*>(x + at));
  return end;
}

template <Pass PASS, class T>
PPCR_DEVICE T* result_of(const Tensors<T>& tensors) {
  return is_backward(PASS) ? tensors.dx : tensors.y;
}

// Calls visit(exists, pixel, segment, first channel, channel stride, end) with a group of lanes for
// each segment of each pixel, and with whole warps, so that it may shuffle.
template <class Bins, class Visit>
PPCR_DEVICE void each_segment(const SharedTile& tile, const Bins& bins, const int* edges,
                              int pixels, Visit visit) {
  const int lanes = 1 << tile.lanes_log2, groups = int(blockDim.x) >> tile.lanes_log2;
  const int group = int(threadIdx.x) >> tile.lanes_log2, segments = bins.segments();
  const int warp_group = (int(threadIdx.x) & ~(kWarp - 1)) >> tile.lanes_log2;
  int pixel = group / segments, segment = group % segments;
  PPCR_ROLLED
  for (int first = warp_group; first < pixels * segments; first += groups) {
    visit(pixel < pixels, pixel, segment, edges[segment] + (int(threadIdx.x) & (lanes - 1)), lanes,
          edges[segment + 1]);
    pixel += groups / segments;
    segment += groups % segments;
    if (segment >= segments) {
      segment -= segments;
      ++pixel;
    }
  }
}

template <class T, class Bins, Operation OP, Pass PASS, bool STAGED>
PPCR_DEVICE void channels_last_shared(const SharedTileArguments<T, Bins>& arguments) {
  using A = Acc<T>;
  using Index = std::conditional_t<STAGED, int, int64_t>;
  const Tensors<T>& tensors = arguments.tensors;
  const SharedTile& tile = arguments.tile;
  const Bins& bins = arguments.bins;
  constexpr int kVector = 16 / int(sizeof(T));
  constexpr bool kBackward = is_backward(PASS), kDot = kBackward && OP != Operation::kGate;

  wait_for_kernels_before();
  PPCR_SHARED(raw);
  const SharedTileMemory memory =
      shared_tile_memory(tile, bins.contexts(), bins.segments(), int(sizeof(T)), OP, PASS, STAGED);
  T* const x = reinterpret_cast<T*>(raw);  // later the result
  T* const second = reinterpret_cast<T*>(raw + memory.second);
  A* const parameters = reinterpret_cast<A*>(raw + memory.parameters);
  A* const sums = reinterpret_cast<A*>(raw + memory.sums);  // [pixels][row], later their gradients
  A* const dots = reinterpret_cast<A*>(raw + memory.dots);  // [pixels][row]
  A* const gates = reinterpret_cast<A*>(raw + memory.gates);    // [pixels]
  A* const shares = reinterpret_cast<A*>(raw + memory.shares);  // [contexts + 1][warps]
  int* const edges = reinterpret_cast<int*>(raw + memory.edges);
  const int row = tile_row(bins.segments());

  const int64_t first = int64_t(blockIdx.x) * tile.q, base = first * tile.channels;
  const int pixels = tile.pixels - first < tile.q ? int(tile.pixels - first) : tile.q;
  const int count = STAGED ? pixels * tile.channels : 0;
  if constexpr (STAGED) {
    const int done =
        tile.vector > 1 ? stage<T, kVector, OP, PASS>(tensors, base, 0, count, x, second) : 0;
    stage<T, 1, OP, PASS>(tensors, base, done, count, x, second);
  }
  stage_parameters<T>(tensors.weight, tensors.bias, bins.contexts(), parameters);
  // From shared memory, where lanes may read different ones at once, and not from the arguments.
  for (int k = int(threadIdx.x); k <= bins.segments(); k += int(blockDim.x))
    edges[k] = tile.edge[k];
  __syncthreads();

  const auto value_of_x = [&](Index at) {
    return A(STAGED ? x[at] : __ldca(tensors.x + base + at));
  };
  // The residual, or gy as it arrives or behind the ReLU.
  const auto value_of_second = [&](Index at) {
    if constexpr (STAGED) return A(second[at]);
    if constexpr (!STAGED && !kBackward) return A(__ldca(tensors.residual + base + at));
    if constexpr (!STAGED && kBackward) {
      const A grad = A(__ldca(tensors.grad + base + at));
      if constexpr (OP == Operation::kAddRelu)
        return A(__ldca(tensors.y + base + at)) <= A(0) ? A(0) : grad;
      return grad;
    }
  };

  each_segment(tile, bins, edges, pixels,
               [&](bool exists, int pixel, int segment, int channel, int stride, int end) {
                 A sum = 0, dot = 0;
                 if (exists) {
                   PPCR_BY_FOUR
                   for (int c = channel; c < end; c += stride) {
                     const A value = value_of_x(Index(pixel) * tile.channels + c);
                     sum += value;
                     if constexpr (kDot)
                       dot += value_of_second(Index(pixel) * tile.channels + c) * value;
                   }
                 }
                 sum = sum_lanes(sum, stride);
                 if constexpr (kDot) dot = sum_lanes(dot, stride);
                 if (exists && (int(threadIdx.x) & (stride - 1)) == 0) {
                   sums[pixel * row + segment] = sum;
                   if constexpr (kDot) dots[pixel * row + segment] = dot;
                 }
               });
  __syncthreads();

  const int own = int(threadIdx.x);  // its pixel: the planner chooses no more pixels than threads
  if constexpr (!kBackward) {
    if (own < pixels) {
      Pixel<A, Bins> pixel;
      compute_gate(bins, sums + own * row, parameters, tensors.eps, pixel);
      if constexpr (OP == Operation::kGate)
        tensors.y[first + own] = T(pixel.g);
      else
        gates[own] = pixel.g;
    }
  } else if (own / kWarp * kWarp < pixels) {  // whole warps, for the sums over their lanes
    Pixel<A, Bins> pixel;
    A dz = 0;
    if (own < pixels) {
      A dg = 0;
      if constexpr (kDot) {
        PPCR_UNROLL
        for (int k = 0; k < bins.segments(); ++k) dg += dots[own * row + k];
      } else {
        dg = A(tensors.grad[first + own]);
      }
      compute_gate(bins, sums + own * row, parameters, tensors.eps, pixel);
      A gradients[Bins::kSegments];
      dz = compute_gradients(bins, pixel, dg, parameters, gradients);
      PPCR_UNROLL
      for (int k = 0; k < bins.segments(); ++k) sums[own * row + k] = gradients[k];
      gates[own] = pixel.g;
    }
    PPCR_UNROLL
    for (int l = 0; l <= bins.contexts(); ++l) {
      const A share = sum_lanes(own >= pixels         ? A(0)
                                : l < bins.contexts() ? dz * pixel.n[l]
                                                      : dz,
                                kWarp);
      if (own % kWarp == 0) shares[l * kTileWarps + own / kWarp] = share;
    }
  }
  if constexpr (OP == Operation::kGate && !kBackward) return;
  __syncthreads();

  each_segment(tile, bins, edges, pixels,
               [&](bool exists, int pixel, int segment, int channel, int stride, int end) {
                 if (!exists) return;
                 const A gate = OP == Operation::kGate ? A(0) : gates[pixel],
                         dsum = kBackward ? sums[pixel * row + segment] : A(0);
                 PPCR_BY_FOUR
                 for (int c = channel; c < end; c += stride) {
                   const Index at = Index(pixel) * tile.channels + c;
                   A value = dsum;
                   if constexpr (!kBackward) {
                     value = value_of_x(at) * gate;
                     if constexpr (OP == Operation::kAddRelu)
                       value = relu(value + value_of_second(at));
                   } else if constexpr (OP != Operation::kGate) {
                     const A grad = value_of_second(at);
                     value += grad * gate;
                     if constexpr (!STAGED && OP == Operation::kAddRelu)
                       tensors.d_residual[base + at] = T(grad);
                   }
                   if constexpr (STAGED)
                     x[at] = T(value);
                   else
                     result_of<PASS>(tensors)[base + at] = T(value);
                 }
               });
  if constexpr (STAGED) {
    __syncthreads();
    const int done =
        tile.vector > 1 ? write_back<T, kVector>(x, result_of<PASS>(tensors) + base, 0, count) : 0;
    write_back<T, 1>(x, result_of<PASS>(tensors) + base, done, count);
  }
  if constexpr (kBackward) {
    for (int l = int(threadIdx.x); l <= bins.contexts(); l += int(blockDim.x)) {
      A share = 0;
      for (int warp = 0; warp * kWarp < pixels; ++warp) share += shares[l * kTileWarps + warp];
      tensors.partials[int64_t(l) * gridDim.x + blockIdx.x] = share;
    }
  }
}

template <class T, class Bins, Operation OP, bool STAGED>
__global__ void __launch_bounds__(kThreads, 4)
    channels_last_shared_forward(const __grid_constant__ SharedTileArguments<T, Bins> arguments) {
  channels_last_shared<T, Bins, OP, Pass::kForward, STAGED>(arguments);
}

template <class T, class Bins, Operation OP, bool STAGED>
__global__ void __launch_bounds__(kThreads, 4)
    channels_last_shared_backward(const __grid_constant__ SharedTileArguments<T, Bins> arguments) {
  channels_last_shared<T, Bins, OP, Pass::kBackward, STAGED>(arguments);
}

}  // namespace ppcr::cuda
