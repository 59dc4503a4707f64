// The channels_last layout with standard bins: LANES lanes of a warp own a pixel, a quarter of them
// each segment. Every lane keeps STEPS vectors of each of PIXELS pixels in registers (x forward, gy
// backward), so the tensor crosses the memory bus once.
//
// The segment sums pass through a few words of shared memory that only this warp touches, so that
// one lane per pixel computes the gate; when every lane did, arithmetic and not memory was the
// limit at 64 channels.
#pragma once
#include "device_common.cuh"

namespace ppcr::cuda {

template <class T>
struct LaneArguments {
  Tensors<T> tensors;
  Lanes lanes;
  StandardBins<Acc<T>> bins;
};

template <int V, int STEPS, int PIXELS, int LANES>
struct LaneGeometry {
  static constexpr int kSegments = 4;
  static constexpr int kPixels = PIXELS;
  static constexpr int kGroups = kWarp / LANES;  // pixels that a warp reads at once
  static constexpr int kWarpPixels = kGroups * PIXELS;
  static constexpr int kSegmentLanes = LANES / kSegments;
  static constexpr int kStride =
      kSegmentLanes * V;                      // channels from one vector of a lane to its next
  static constexpr int kRow = kSegments + 1;  // words per pixel: odd, against bank conflicts
  static_assert(kWarpPixels <= kWarp, "one lane per pixel computes the gate");
};

// Where a lane works. Its vector of pixel i and step r lies at(i, r) behind its first one.
template <class G>
struct LanePlace {
  int segment, group;  // of the warp's pixels that are read at once
  int pixels_left;     // from the lane's first pixel to the end of the tensor, or enough
  int channels_left;   // from the lane's first channel to the end of the segment
  int64_t offset;      // of the lane's first vector
  int64_t pixel_stride;
  PPCR_DEVICE bool holds(int i, int r) const {
    return i * G::kGroups < pixels_left && r * G::kStride < channels_left;
  }
  PPCR_DEVICE int64_t at(int i, int r) const { return i * pixel_stride + r * G::kStride; }
  PPCR_DEVICE int row(int i) const { return (i * G::kGroups + group) * G::kRow; }
};

// The warp's first pixel.
template <class G>
PPCR_DEVICE int64_t warp_pixel() {
  return (int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp) * G::kWarpPixels;
}

template <class G, int V, int LANES>
PPCR_DEVICE LanePlace<G> lane_place(const Lanes& lanes) {
  LanePlace<G> place;
  const unsigned lane = threadIdx.x % LANES, channel = lane % G::kSegmentLanes * V;
  place.segment = int(lane / G::kSegmentLanes);
  place.group = int(threadIdx.x % kWarp / LANES);
  const int64_t pixel = warp_pixel<G>() + place.group, left = lanes.pixels - pixel;
  place.pixels_left = left < kWarp ? int(left) : kWarp;
  place.channels_left = lanes.segment - int(channel);
  place.offset =
      pixel * lanes.channels + int64_t(unsigned(place.segment)) * unsigned(lanes.segment) + channel;
  place.pixel_stride = G::kGroups * lanes.channels;
  return place;
}

// A tensor from the lane's first vector on. Opaque, or the compiler would compute every address
// anew from the beginning of the tensor, before the first load.
template <class T, class G>
PPCR_DEVICE const T* from_lane(const T* tensor, const LanePlace<G>& place) {
  return reinterpret_cast<const T*>(opaque(reinterpret_cast<int64_t>(tensor + place.offset)));
}

// Backward, in shared memory: for every warp a row for each pixel, with the sums of its segments
// and the dot product, later their gradients and the gate; behind them the warps' shares of dweight
// and dbias, [contexts + 1][warps].
template <class A, class Bins>
struct LaneShares {
  A* const shared;
  const int warps, warp_values;
  PPCR_DEVICE LaneShares(A* from, int warp_pixels)
      : shared(from),
        warps(int(blockDim.x / kWarp)),
        warp_values(lanes_warp_values(warp_pixels, Bins::kSegments, Pass::kBackward)) {}
  PPCR_DEVICE A* rows() const { return shared + int(threadIdx.x / kWarp) * warp_values; }
  PPCR_DEVICE A* contributions() const { return shared + warps * warp_values; }
  PPCR_DEVICE void put(const A (&shares)[Bins::kContexts + 1], int warp_pixels) const {
    PPCR_UNROLL
    for (int l = 0; l <= Bins::kContexts; ++l) {
      const A share = sum_lanes(shares[l], warp_pixels);
      if (threadIdx.x % kWarp == 0) contributions()[l * warps + int(threadIdx.x / kWarp)] = share;
    }
  }
  // After a barrier of the block.
  PPCR_DEVICE void write(A* partials) const {
    if (int(threadIdx.x) > Bins::kContexts) return;
    A share = 0;
    for (int i = 0; i < warps; ++i) share += contributions()[int(threadIdx.x) * warps + i];
    partials[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = share;
  }
};

// From the sums of a pixel's segments (`row`) and the gradient of its gate: writes the gradients of
// the segments over the sums, and the pixel's part of dweight and dbias; returns the gate.
template <class A, class Bins>
PPCR_DEVICE A lane_gradients(const Bins& bins, A* row, A dg, const A* parameters, A eps,
                             A (&shares)[Bins::kContexts + 1]) {
  Pixel<A, Bins> pixel;
  compute_gate(bins, row, parameters, eps, pixel);
  A dsums[Bins::kSegments];
  const A dz = compute_gradients(bins, pixel, dg, parameters, dsums);
  PPCR_UNROLL
  for (int k = 0; k < Bins::kSegments; ++k) row[k] = dsums[k];
  PPCR_UNROLL
  for (int l = 0; l < Bins::kContexts; ++l) shares[l] = dz * pixel.n[l];
  shares[Bins::kContexts] = dz;
  return pixel.g;
}

// One value for all elements of a vector: they belong to one pixel.
template <int V, class A>
PPCR_DEVICE void fill(A value, A (&values)[V]) {
  PPCR_UNROLL
  for (int j = 0; j < V; ++j) values[j] = value;
}

template <class T, int V, int STEPS, int PIXELS, int LANES, Operation OP>
__global__ void __launch_bounds__(kThreads,
                                  lane_blocks(int(sizeof(T)), int(sizeof(T)) * V * STEPS * PIXELS,
                                              OP, Pass::kForward))
    channels_last_registers_forward(const __grid_constant__ LaneArguments<T> arguments) {
  using A = Acc<T>;
  using Bins = StandardBins<A>;
  using G = LaneGeometry<V, STEPS, PIXELS, LANES>;
  const Tensors<T>& tensors = arguments.tensors;
  const Lanes& lanes = arguments.lanes;
  const Bins& bins = arguments.bins;

  wait_for_kernels_before();
  PPCR_SHARED(raw);
  const int warp = int(threadIdx.x / kWarp), lane = int(threadIdx.x % kWarp);
  A* const parameters = reinterpret_cast<A*>(raw);
  A* const sums = parameters + parameter_slots(Bins::kContexts) +
                  warp * lanes_warp_values(G::kWarpPixels, Bins::kSegments, Pass::kForward);
  A* const gates = sums + G::kWarpPixels * G::kRow;

  LanePlace<G> place = lane_place<G, V, LANES>(lanes);
  const T* const x = from_lane(tensors.x, place);
  Word<T, V> cached[PIXELS][STEPS];
  PPCR_UNROLL
  for (int i = 0; i < PIXELS; ++i) {
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r)
      cached[i][r] = load_if<T, V>(place.holds(i, r), x + place.at(i, r));
  }
  stage_parameters<T>(tensors.weight, tensors.bias, Bins::kContexts, parameters);
  PPCR_UNROLL
  for (int i = 0; i < PIXELS; ++i) {
    A sum = 0;
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) {
      A values[V];
      unpack<T, V>(cached[i][r], values);
      PPCR_UNROLL
      for (int j = 0; j < V; ++j) sum += values[j];
    }
    sum = sum_lanes(sum, G::kSegmentLanes);
    if (lane % G::kSegmentLanes == 0) sums[place.row(i) + place.segment] = sum;
  }
  __syncthreads();  // the sums are the warp's own, the parameters the block's
  if (lane < G::kWarpPixels) {
    Pixel<A, Bins> pixel;
    compute_gate(bins, sums + lane * G::kRow, parameters, tensors.eps, pixel);
    gates[lane] = pixel.g;
  }
  __syncwarp();
  place.offset = opaque(place.offset);  // or addresses are kept in registers from the loads on
  // Vector s is step s % STEPS of pixel s / STEPS.
  static_assert(PIXELS * STEPS % kBatch == 0, "whole batches");
  const auto exists = [&](int s) { return place.holds(s / STEPS, s % STEPS); };
  const auto offset = [&](int s) { return place.offset + place.at(s / STEPS, s % STEPS); };
  PPCR_UNROLL
  for (int first = 0; first < PIXELS * STEPS; first += kBatch) {
    // All loads of a batch come before its first store, which they could not pass.
    Word<T, V> residual[kBatch] = {};
    if constexpr (OP == Operation::kAddRelu) {
      PPCR_UNROLL
      for (int b = 0; b < kBatch; ++b)
        residual[b] = load_if<T, V>(exists(first + b), tensors.residual + offset(first + b));
    }
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int s = first + b;
      A gate[V];
      fill<V>(gates[s / STEPS * G::kGroups + place.group], gate);
      store_if<T, V>(exists(s), tensors.y + offset(s),
                     recalibrate<T, V, OP>(cached[s / STEPS][s % STEPS], residual[b], gate));
    }
  }
}

template <class T, int V, int STEPS, int PIXELS, int LANES, Operation OP>
__global__ void __launch_bounds__(kThreads,
                                  lane_blocks(int(sizeof(T)), int(sizeof(T)) * V * STEPS * PIXELS,
                                              OP, Pass::kBackward))
    channels_last_registers_backward(const __grid_constant__ LaneArguments<T> arguments) {
  using A = Acc<T>;
  using Bins = StandardBins<A>;
  using G = LaneGeometry<V, STEPS, PIXELS, LANES>;
  constexpr int kContexts = Bins::kContexts, kSegments = Bins::kSegments;
  constexpr bool kAdd = OP == Operation::kAddRelu;
  const Tensors<T>& tensors = arguments.tensors;
  const Lanes& lanes = arguments.lanes;
  const Bins& bins = arguments.bins;

  wait_for_kernels_before();
  PPCR_SHARED(raw);
  const int lane = int(threadIdx.x % kWarp);
  A* const parameters = reinterpret_cast<A*>(raw);
  const LaneShares<A, Bins> block(parameters + parameter_slots(kContexts), G::kWarpPixels);
  A* const rows = block.rows();

  LanePlace<G> place = lane_place<G, V, LANES>(lanes);
  const T *const of_x = from_lane(tensors.x, place), *const of_grad =
                                                         from_lane(tensors.grad, place);
  const T* const of_y = kAdd ? from_lane<T>(tensors.y, place) : nullptr;
  Word<T, V> x[PIXELS][STEPS], y[PIXELS][STEPS], cached[PIXELS][STEPS];
  PPCR_UNROLL
  for (int i = 0; i < PIXELS; ++i) {
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) {
      x[i][r] = load_if<T, V>(place.holds(i, r), of_x + place.at(i, r));
      cached[i][r] = load_if<T, V>(place.holds(i, r), of_grad + place.at(i, r));
      if constexpr (kAdd) y[i][r] = load_if<T, V>(place.holds(i, r), of_y + place.at(i, r));
    }
  }
  if constexpr (kAdd) {  // after all loads, or the compiler would wait for the first ones
    PPCR_UNROLL
    for (int i = 0; i < PIXELS; ++i) {
      PPCR_UNROLL
      for (int r = 0; r < STEPS; ++r) cached[i][r] = mask_relu<T, V>(cached[i][r], y[i][r]);
    }
  }
  stage_parameters<T>(tensors.weight, tensors.bias, kContexts, parameters);
  PPCR_UNROLL
  for (int i = 0; i < PIXELS; ++i) {
    A sum = 0, dot = 0;
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) {
      A values[V], gradients[V];
      unpack<T, V>(x[i][r], values);
      unpack<T, V>(cached[i][r], gradients);
      PPCR_UNROLL
      for (int j = 0; j < V; ++j) {
        sum += values[j];
        dot += gradients[j] * values[j];
      }
    }
    sum = sum_lanes(sum, G::kSegmentLanes);
    dot = sum_lanes(dot, LANES);
    A* const row = rows + place.row(i);
    if (lane % G::kSegmentLanes == 0) row[place.segment] = sum;
    if (lane % LANES == 0) row[kSegments] = dot;
  }
  __syncthreads();  // the rows are the warp's own, the parameters the block's

  // Of this lane's pixel in dweight and dbias; 0 beyond the last pixel, where the dot product is 0.
  A shares[kContexts + 1] = {};
  if (lane < G::kWarpPixels) {
    A* const row = rows + lane * G::kRow;
    row[kSegments] = lane_gradients(bins, row, row[kSegments], parameters, tensors.eps, shares);
  }
  block.put(shares, G::kWarpPixels);
  __syncthreads();

  place.offset = opaque(place.offset);  // as in the forward kernel
  PPCR_UNROLL
  for (int i = 0; i < PIXELS; ++i) {
    if (!place.holds(i, 0)) break;
    const A* const row = rows + place.row(i);
    A gate[V], dsum[V];
    fill<V>(row[kSegments], gate);
    fill<V>(row[place.segment], dsum);
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) {
      if (!place.holds(i, r)) continue;
      write_backward<T, V, OP>(tensors, true, place.offset + place.at(i, r), cached[i][r], gate,
                               dsum);
    }
  }
  block.write(tensors.partials);
}

}  // namespace ppcr::cuda
