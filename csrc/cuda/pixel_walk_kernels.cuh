// Pixel-major layout (channels_last), any bins, any number of channels, any alignment: the lanes of a group walk through the
// segments of a pixel one after another. A pixel's channels are read a second time for the product, a few kilobytes later, when
// they still lie in the caches. The gate mode of the standard bins runs here too.
#pragma once
#include "device_common.cuh"

namespace ppcr::cuda {

template <class T>
struct PixelWalkArguments {
  Tensors<T> tensors;
  Walk walk;
  AnyBins<Acc<T>> bins;
};

struct WalkPlace {
  int lanes, lane;  // of a group
  int group, groups;
  int64_t first;  // pixel of the warp
};

PPCR_DEVICE WalkPlace walk_place(const Walk& walk) {
  WalkPlace place;
  place.lanes = 1 << walk.lanes_log2;
  place.lane = int(threadIdx.x) & (place.lanes - 1);
  place.group = (int(threadIdx.x) % kWarp) >> walk.lanes_log2;
  place.groups = kWarp >> walk.lanes_log2;
  const int warps = int(blockDim.x) / kWarp;
  place.first = (int64_t(blockIdx.x) * warps + int(threadIdx.x) / kWarp) * walk.warp_pixels;
  return place;
}

template <class T, Mode MODE>
PPCR_DEVICE Acc<T> walk_gradient(const Tensors<T>& tensors, int64_t at) {
  const Acc<T> grad = widen(__ldg(tensors.grad + at));
  if constexpr (MODE == Mode::kAddRelu) return widen(__ldg(tensors.extra_in + at)) <= Acc<T>(0) ? Acc<T>(0) : grad;
  return grad;
}

template <class T, Mode MODE>
__global__ void __launch_bounds__(kThreads) pixel_walk_forward(const __grid_constant__ PixelWalkArguments<T> arguments) {
  using A = Acc<T>;
  using Bins = AnyBins<A>;
  const Tensors<T>& tensors = arguments.tensors;
  const Walk& walk = arguments.walk;
  const Bins& bins = arguments.bins;
  const int contexts = bins.contexts(), segments = bins.segments();

  PPCR_SHARED(raw);
  A* const parameters = reinterpret_cast<A*>(raw);
  A* const sums = parameters + parameter_slots(contexts) +
                  int(threadIdx.x) / kWarp * walk_warp_values(walk.warp_pixels, contexts, segments, false);
  A* const gates = sums + walk.warp_pixels * segments;

  stage_parameters<T>(tensors.weight, tensors.bias, contexts, parameters);
  const WalkPlace place = walk_place(walk);
  for (int i = place.group; i - place.group < walk.warp_pixels; i += place.groups) {
    const bool inside = i < walk.warp_pixels && place.first + i < walk.pixels;
    const T* const x = tensors.x + (place.first + i) * walk.channels;
    for (int k = 0; k < segments; ++k) {
      A sum = 0;
      if (inside) {
        PPCR_BY_FOUR
        for (int c = walk.edge[k] + place.lane; c < walk.edge[k + 1]; c += place.lanes) sum += widen(__ldg(x + c));
      }
      sum = sum_lanes(sum, place.lanes);
      if (place.lane == 0 && i < walk.warp_pixels) sums[i * segments + k] = sum;
    }
  }
  __syncthreads();  // the sums are the warp's own, the parameters the block's
  for (int i = int(threadIdx.x) % kWarp; i < walk.warp_pixels; i += kWarp) {
    Pixel<A, Bins> pixel;
    gate_forward(bins, sums + i * segments, parameters, tensors.eps, pixel);
    if constexpr (MODE == Mode::kGate) {
      if (place.first + i < walk.pixels) narrow(pixel.g, tensors.out[place.first + i]);
    } else {
      gates[i] = pixel.g;
    }
  }
  if constexpr (MODE != Mode::kGate) {
    __syncwarp();
    for (int i = place.group; i < walk.warp_pixels && place.first + i < walk.pixels; i += place.groups) {
      const A gate = gates[i];
      const int64_t offset = (place.first + i) * walk.channels;
      PPCR_BY_FOUR
      for (int64_t c = place.lane; c < walk.channels; c += place.lanes) {
        A value = widen(__ldg(tensors.x + offset + c)) * gate;
        if constexpr (MODE == Mode::kAddRelu) value = relu(value + widen(__ldg(tensors.extra_in + offset + c)));
        narrow(value, tensors.out[offset + c]);
      }
    }
  }
}

template <class T, Mode MODE>
__global__ void __launch_bounds__(kThreads) pixel_walk_backward(const __grid_constant__ PixelWalkArguments<T> arguments) {
  using A = Acc<T>;
  using Bins = AnyBins<A>;
  const Tensors<T>& tensors = arguments.tensors;
  const Walk& walk = arguments.walk;
  const Bins& bins = arguments.bins;
  const int contexts = bins.contexts(), segments = bins.segments();

  PPCR_SHARED(raw);
  const int warps = int(blockDim.x) / kWarp, warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int warp_values = walk_warp_values(walk.warp_pixels, contexts, segments, true);
  A* const parameters = reinterpret_cast<A*>(raw);
  A* const shared = parameters + parameter_slots(contexts);
  A* const sums = shared + warp * warp_values;          // [pixels][segments], later their gradients
  A* const gates = sums + walk.warp_pixels * segments;  // [pixels]: the dot product, later the gate
  A* const contributions = gates + walk.warp_pixels;    // [contexts + 1][pixels]

  stage_parameters<T>(tensors.weight, tensors.bias, contexts, parameters);
  const WalkPlace place = walk_place(walk);
  for (int i = place.group; i - place.group < walk.warp_pixels; i += place.groups) {
    const bool inside = i < walk.warp_pixels && place.first + i < walk.pixels;
    const int64_t offset = (place.first + i) * walk.channels;
    A dot = 0;
    for (int k = 0; k < segments; ++k) {
      A sum = 0;
      if (inside) {
        PPCR_BY_FOUR
        for (int c = walk.edge[k] + place.lane; c < walk.edge[k + 1]; c += place.lanes) {
          const A value = widen(__ldg(tensors.x + offset + c));
          sum += value;
          if constexpr (MODE != Mode::kGate) dot += walk_gradient<T, MODE>(tensors, offset + c) * value;
        }
      }
      sum = sum_lanes(sum, place.lanes);
      if (place.lane == 0 && i < walk.warp_pixels) sums[i * segments + k] = sum;
    }
    dot = sum_lanes(dot, place.lanes);
    if constexpr (MODE == Mode::kGate) {
      if (inside) dot = widen(tensors.grad[place.first + i]);
    }
    if (place.lane == 0 && i < walk.warp_pixels) gates[i] = dot;
  }
  __syncthreads();  // the sums are the warp's own, the parameters the block's
  for (int i = lane; i < walk.warp_pixels; i += kWarp) {
    A* const row = sums + i * segments;
    Pixel<A, Bins> pixel;
    gate_forward(bins, row, parameters, tensors.eps, pixel);
    A dsums[Bins::kSegments];
    const A dz = gate_backward(bins, pixel, gates[i], parameters, dsums);
    for (int k = 0; k < segments; ++k) row[k] = dsums[k];
    gates[i] = pixel.g;
    for (int l = 0; l < contexts; ++l) contributions[l * walk.warp_pixels + i] = dz * pixel.n[l];
    contributions[contexts * walk.warp_pixels + i] = dz;
  }
  __syncthreads();
  for (int l = int(threadIdx.x); l <= contexts; l += int(blockDim.x)) {
    A share = 0;
    for (int w = 0; w < warps; ++w) {
      const A* const pixels = shared + w * warp_values + walk.warp_pixels * (segments + 1 + l);
      for (int i = 0; i < walk.warp_pixels; ++i) share += pixels[i];
    }
    tensors.partials[int64_t(l) * gridDim.x + blockIdx.x] = share;
  }
  for (int i = place.group; i < walk.warp_pixels && place.first + i < walk.pixels; i += place.groups) {
    const A gate = gates[i];
    const int64_t offset = (place.first + i) * walk.channels;
    for (int k = 0; k < segments; ++k) {
      const A dsum = sums[i * segments + k];
      PPCR_BY_FOUR
      for (int c = walk.edge[k] + place.lane; c < walk.edge[k + 1]; c += place.lanes) {
        A value = dsum;
        if constexpr (MODE != Mode::kGate) {
          const A grad = walk_gradient<T, MODE>(tensors, offset + c);
          value += grad * gate;
          if constexpr (MODE == Mode::kAddRelu) narrow(grad, tensors.extra_out[offset + c]);
        }
        narrow(value, tensors.out[offset + c]);
      }
    }
  }
}

}  // namespace ppcr::cuda
