// The gate alone in the channels_last layout, standard bins: LANES lanes of a warp own a pixel, as
// in channels_last_registers.cuh. Nothing of x is needed twice, so that nothing is kept.
#pragma once
#include "channels_last_registers.cuh"

namespace ppcr::cuda {

// sums[pixel of the warp][segment]; kRow words a pixel.
template <class T, int V, class G>
PPCR_DEVICE void sum_segments(const T* tensor, const LanePlace<G>& place, Acc<T>* sums) {
  using A = Acc<T>;
  const T* const x = from_lane(tensor, place);
  A sum[G::kPixels] = {};
  PPCR_BY_TWO
  for (int channel = 0; channel < place.channels_left; channel += G::kStride) {
    Word<T, V> words[G::kPixels];
    PPCR_UNROLL
    for (int i = 0; i < G::kPixels; ++i)
      words[i] = load_if<T, V>(place.holds(i, 0), x + i * place.pixel_stride + channel);
    PPCR_UNROLL
    for (int i = 0; i < G::kPixels; ++i) {
      A values[V];
      unpack<T, V>(words[i], values);
      PPCR_UNROLL
      for (int j = 0; j < V; ++j) sum[i] += values[j];
    }
  }
  PPCR_UNROLL
  for (int i = 0; i < G::kPixels; ++i) {
    const A whole = sum_lanes(sum[i], G::kSegmentLanes);
    if (threadIdx.x % G::kSegmentLanes == 0) sums[place.row(i) + place.segment] = whole;
  }
}

template <class T, int V, int LANES, Pass PASS>
PPCR_DEVICE void channels_last_gate(const LaneArguments<T>& arguments) {
  using A = Acc<T>;
  using Bins = StandardBins<A>;
  using G = LaneGeometry<V, 1, kGatePixels, LANES>;
  const Tensors<T>& tensors = arguments.tensors;
  const Bins& bins = arguments.bins;

  wait_for_kernels_before();
  PPCR_SHARED(raw);
  const int warp = int(threadIdx.x / kWarp), lane = int(threadIdx.x % kWarp);
  A* const parameters = reinterpret_cast<A*>(raw);
  A* const behind = parameters + parameter_slots(Bins::kContexts);
  A* const rows = behind + warp * lanes_warp_values(G::kWarpPixels, Bins::kSegments, PASS);
  const LanePlace<G> place = lane_place<G, V, LANES>(arguments.lanes);
  stage_parameters<T>(tensors.weight, tensors.bias, Bins::kContexts, parameters);
  sum_segments<T, V>(tensors.x, place, rows);
  __syncthreads();  // the sums are the warp's own, the parameters the block's
  const int64_t at = warp_pixel<G>() + lane;
  const bool exists = lane < G::kWarpPixels && at < arguments.lanes.pixels;
  A* const row = rows + lane * G::kRow;
  if constexpr (PASS == Pass::kForward) {
    if (!exists) return;
    Pixel<A, Bins> pixel;
    compute_gate(bins, row, parameters, tensors.eps, pixel);
    tensors.y[at] = T(pixel.g);
  } else {
    const LaneShares<A, Bins> block(behind, G::kWarpPixels);
    A shares[Bins::kContexts + 1] = {};  // 0 beyond the last pixel
    if (exists) lane_gradients(bins, row, A(tensors.grad[at]), parameters, tensors.eps, shares);
    block.put(shares, G::kWarpPixels);
    __syncthreads();
    PPCR_UNROLL
    for (int i = 0; i < G::kPixels; ++i) {
      A dsum[V];
      fill<V>(rows[place.row(i) + place.segment], dsum);
      const Word<T, V> word = pack<T, V>(dsum);
      PPCR_BY_TWO
      for (int channel = 0; channel < place.channels_left; channel += G::kStride)
        store_if<T, V>(place.holds(i, 0),
                       tensors.dx + place.offset + i * place.pixel_stride + channel, word);
    }
    block.write(tensors.partials);
  }
}

template <class T, int V, int LANES, Operation OP>
__global__ void __launch_bounds__(kThreads, kGateBlocks)
    channels_last_gate_forward(const __grid_constant__ LaneArguments<T> arguments) {
  static_assert(OP == Operation::kGate, "it only names the kernel, as in every other one");
  channels_last_gate<T, V, LANES, Pass::kForward>(arguments);
}

template <class T, int V, int LANES, Operation OP>
__global__ void __launch_bounds__(kThreads, kGateBlocks)
    channels_last_gate_backward(const __grid_constant__ LaneArguments<T> arguments) {
  channels_last_gate<T, V, LANES, Pass::kBackward>(arguments);
}

}  // namespace ppcr::cuda
