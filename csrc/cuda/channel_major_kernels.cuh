// Channel-major layout (contiguous [N, C, *spatial]): a cluster of blocks owns a tile of q pixels with all their channels.
//
// Forward holds its vectors of x in registers between the sums and the product, backward those of gy (dx = gy g + dsum needs no x),
// so that the tensor crosses the memory bus once. Channels beyond what the registers hold are read a second time: slower, not
// wrong.
//
//   threads sum their vectors -> shared memory -> sums over the rows of a step -> (cluster) -> a thread per pixel computes the gate
//   -> every thread multiplies what it holds
#pragma once
#include "channel_major_tile.cuh"

namespace ppcr::cuda {

template <class T, class Bins>
struct ChannelMajorArguments {
  Tensors<T> tensors;
  Tile tile;
  typename UnitsOf<Bins>::type units;
  Bins bins;
};

// ------------------------------------------------------------------------------------------------------------------ forward
template <class T, int V>
PPCR_DEVICE void add_word(const Word<T, V>& word, Acc<T> (&sum)[V]) {
  Acc<T> values[V];
  unpack<T, V>(word, values);
  PPCR_UNROLLED
  for (int j = 0; j < V; ++j) sum[j] += values[j];
}

template <class T, int V, int BATCH>
PPCR_DEVICE void sum_from_memory(const T* x, const UnitPart& part, int64_t hop, int from, Acc<T> (&sum)[V]) {
  PPCR_ROLLED
  for (int step = from; step < part.steps; step += BATCH) {
    Word<T, V> words[BATCH];
    PPCR_UNROLLED
    for (int b = 0; b < BATCH; ++b) words[b] = load_if<T, V>(step + b < part.steps, x + part.offset + (step + b) * hop);
    PPCR_UNROLLED
    for (int b = 0; b < BATCH; ++b) add_word<T, V>(words[b], sum);
  }
}

// Steps first .. first+BATCH-1: all loads before the first store, which they could not pass.
template <class T, int V, Mode MODE, int BATCH, class Held>
PPCR_DEVICE void write_forward(const Tensors<T>& tensors, const UnitPart& part, int64_t hop, int first, const Acc<T> (&gate)[V],
                               const Held& held) {
  Word<T, V> residual[BATCH] = {};
  if constexpr (MODE == Mode::kAddRelu) {
    PPCR_UNROLLED
    for (int b = 0; b < BATCH; ++b)
      residual[b] = load_if<T, V>(first + b < part.steps, tensors.extra_in + part.offset + (first + b) * hop);
  }
  PPCR_UNROLLED
  for (int b = 0; b < BATCH; ++b)
    store_if<T, V>(first + b < part.steps, tensors.out + part.offset + (first + b) * hop,
                   recalibrate<T, V, MODE>(held(b), residual[b], gate));
}

template <class T, int V, Mode MODE>
PPCR_DEVICE void write_forward_from_memory(const Tensors<T>& tensors, const UnitPart& part, int64_t hop, int from,
                                           const Acc<T> (&gate)[V]) {
  PPCR_ROLLED
  for (int step = from; step < part.steps; step += kBatch) {
    Word<T, V> words[kBatch];
    PPCR_UNROLLED
    for (int b = 0; b < kBatch; ++b) words[b] = load_if<T, V>(step + b < part.steps, tensors.x + part.offset + (step + b) * hop);
    write_forward<T, V, MODE, kBatch>(tensors, part, hop, step, gate, [&](int b) { return words[b]; });
  }
}

template <class T, int V, int STEPS, class Bins, Mode MODE>
__global__ void __launch_bounds__(kThreads, channel_major_blocks(int(sizeof(T)) * V * STEPS, MODE, false))
    channel_major_forward(const __grid_constant__ ChannelMajorArguments<T, Bins> arguments) {
  using A = Acc<T>;
  using Units = typename UnitsOf<Bins>::type;
  const Tensors<T>& tensors = arguments.tensors;
  const Tile& tile = arguments.tile;
  const Units& units = arguments.units;
  const Bins& bins = arguments.bins;
  constexpr bool kHold = MODE != Mode::kGate;

  PPCR_SHARED(raw);
  const TileMemory memory = tile_memory(tile, bins.contexts(), bins.segments(), MODE, false);
  A* const parameters = reinterpret_cast<A*>(raw) + memory.parameters;
  A* const sums = reinterpret_cast<A*>(raw) + memory.sums;
  A* const parts = reinterpret_cast<A*>(raw) + memory.parts;
  A* const gates = reinterpret_cast<A*>(raw) + memory.pixels;

  const TileThread thread = tile_thread<V>(tile);
  const int64_t hop = step_hop(tile);
  const UnitPart part = unit_part(tile, units, thread, 0);

  Word<T, V> held[kHold ? STEPS : 1];
  A sum[V] = {};
  if constexpr (kHold) {
    PPCR_UNROLLED
    for (int r = 0; r < STEPS; ++r) held[r] = load_if<T, V>(r < part.steps, tensors.x + part.offset + r * hop);
    stage_parameters<T>(tensors.weight, tensors.bias, bins.contexts(), parameters);
    PPCR_UNROLLED
    for (int r = 0; r < STEPS; ++r) add_word<T, V>(held[r], sum);
    sum_from_memory<T, V, kBatch>(tensors.x, part, hop, STEPS, sum);
  } else {
    stage_parameters<T>(tensors.weight, tensors.bias, bins.contexts(), parameters);
    sum_from_memory<T, V, STEPS>(tensors.x, part, hop, 0, sum);
  }
  const auto write_sum = [&](int line) {
    if (thread.active) {
      PPCR_UNROLLED
      for (int j = 0; j < V; ++j) sums[line * tile.rows * tile.q + thread.element + j] = sum[j];
    }
  };
  write_sum(thread.group);
  if constexpr (!Units::kOneRound) {
    PPCR_ROLLED
    for (int round = 1; round < tile.rounds; ++round) {
      PPCR_UNROLLED
      for (int j = 0; j < V; ++j) sum[j] = 0;
      sum_from_memory<T, V, kBatch>(tensors.x, unit_part(tile, units, thread, round), hop, 0, sum);
      write_sum(round * tile.groups + thread.group);
    }
  }
  __syncthreads();
  sum_rows(tile, memory.lines, sums, parts);
  block_or_cluster_sync(tile);

  for (int q = int(threadIdx.x); q < tile.q; q += int(blockDim.x)) {
    A segments[Bins::kSegments];
    segment_sums(tile, units, bins, parts, q, segments);
    Pixel<A, Bins> pixel;
    gate_forward(bins, segments, parameters, tensors.eps, pixel);
    if constexpr (MODE == Mode::kGate) {
      if (thread.rank == 0 && thread.first + q < tile.image_pixels) {
        T gate;
        narrow(pixel.g, gate);
        tensors.out[int64_t(thread.tile / tile.image_tiles) * tile.image_pixels + thread.first + q] = gate;
      }
    } else {
      gates[q] = pixel.g;
    }
  }
  block_or_cluster_sync(tile);  // also keeps a block's memory alive while others of its cluster read it
  if constexpr (MODE != Mode::kGate) {
    if (!thread.inside) return;
    A gate[V];
    pixel_values<V>(tile, gates, thread.column, gate);
    PPCR_UNROLLED
    for (int r = 0; r < STEPS; r += kBatch) {
      if (MODE == Mode::kAddRelu && r >= part.steps) break;  // a branch: more than a batch of residuals in flight would spill
      constexpr int kLast = STEPS % kBatch;
      if (kLast != 0 && r + kBatch > STEPS)
        write_forward<T, V, MODE, kLast == 0 ? kBatch : kLast>(tensors, part, hop, r, gate, [&](int b) { return held[r + b]; });
      else
        write_forward<T, V, MODE, kBatch>(tensors, part, hop, r, gate, [&](int b) { return held[r + b]; });
    }
    write_forward_from_memory<T, V, MODE>(tensors, part, hop, STEPS, gate);
    if constexpr (!Units::kOneRound) {
      PPCR_ROLLED
      for (int round = 1; round < tile.rounds; ++round)
        write_forward_from_memory<T, V, MODE>(tensors, unit_part(tile, units, thread, round), hop, 0, gate);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------- backward
template <class T, int V>
PPCR_DEVICE void add_product(const Word<T, V>& x, const Word<T, V>& grad, Acc<T> (&sum)[V], Acc<T> (&dot)[V]) {
  Acc<T> values[V], gradients[V];
  unpack<T, V>(x, values);
  unpack<T, V>(grad, gradients);
  PPCR_UNROLLED
  for (int j = 0; j < V; ++j) {
    sum[j] += values[j];
    dot[j] += gradients[j] * values[j];
  }
}

template <class T, int V, Mode MODE>
PPCR_DEVICE void products_from_memory(const Tensors<T>& tensors, const UnitPart& part, int64_t hop, int from, Acc<T> (&sum)[V],
                                      Acc<T> (&dot)[V]) {
  PPCR_ROLLED
  for (int step = from; step < part.steps; step += kBatch) {
    Word<T, V> words[kBatch], gradients[kBatch];
    PPCR_UNROLLED
    for (int b = 0; b < kBatch; ++b) {
      const int64_t at = part.offset + (step + b) * hop;
      words[b] = load_if<T, V>(step + b < part.steps, tensors.x + at);
      gradients[b] = load_gradient<T, V, MODE>(tensors, step + b < part.steps, at);
    }
    PPCR_UNROLLED
    for (int b = 0; b < kBatch; ++b) add_product<T, V>(words[b], gradients[b], sum, dot);
  }
}

template <class T, int V, Mode MODE>
PPCR_DEVICE void write_backward_from_memory(const Tensors<T>& tensors, const UnitPart& part, int64_t hop, int from,
                                            const Acc<T> (&gate)[V], const Acc<T> (&dsum)[V]) {
  if constexpr (MODE == Mode::kGate) {
    const Word<T, V> word = pack<T, V>(dsum);
    PPCR_BY_FOUR
    for (int step = from; step < part.steps; ++step) store_if<T, V>(true, tensors.out + part.offset + step * hop, word);
  } else {
    PPCR_ROLLED
    for (int step = from; step < part.steps; step += kBatch) {
      Word<T, V> gradients[kBatch];
      PPCR_UNROLLED
      for (int b = 0; b < kBatch; ++b)
        gradients[b] = load_gradient<T, V, MODE>(tensors, step + b < part.steps, part.offset + (step + b) * hop);
      PPCR_UNROLLED
      for (int b = 0; b < kBatch; ++b)
        write_backward<T, V, MODE>(tensors, step + b < part.steps, part.offset + (step + b) * hop, gradients[b], gate, dsum);
    }
  }
}

// The tile's share of dweight and dbias: a warp per parameter, the pixels in a fixed order.
template <class A>
PPCR_DEVICE void write_tile_partials(const Tile& tile, unsigned tile_index, int contexts, const A* contributions, A* partials) {
  const int64_t tiles = gridDim.x / unsigned(tile.cluster);
  for (int l = int(threadIdx.x) / kWarp; l <= contexts; l += int(blockDim.x) / kWarp) {
    A value = 0;
    for (int q = int(threadIdx.x) % kWarp; q < tile.q; q += kWarp) value += contributions[l * tile.q + q];
    value = sum_lanes(value, kWarp);
    if (threadIdx.x % kWarp == 0) partials[l * tiles + tile_index] = value;
  }
}

template <class T, int V, int STEPS, class Bins, Mode MODE>
__global__ void __launch_bounds__(kThreads, channel_major_blocks(int(sizeof(T)) * V * STEPS, MODE, true))
    channel_major_backward(const __grid_constant__ ChannelMajorArguments<T, Bins> arguments) {
  using A = Acc<T>;
  using Units = typename UnitsOf<Bins>::type;
  const Tensors<T>& tensors = arguments.tensors;
  const Tile& tile = arguments.tile;
  const Units& units = arguments.units;
  const Bins& bins = arguments.bins;
  constexpr bool kHold = MODE != Mode::kGate;

  PPCR_SHARED(raw);
  const TileMemory memory = tile_memory(tile, bins.contexts(), bins.segments(), MODE, true);
  A* const parameters = reinterpret_cast<A*>(raw) + memory.parameters;
  A* const sums = reinterpret_cast<A*>(raw) + memory.sums;
  A* const parts = reinterpret_cast<A*>(raw) + memory.parts;
  A* const gates = reinterpret_cast<A*>(raw) + memory.pixels;
  A* const dsums = gates + tile.q;                            // [segments][q]
  A* const contributions = dsums + bins.segments() * tile.q;  // [contexts + 1][q]: dz n_l, dz

  const TileThread thread = tile_thread<V>(tile);
  const int64_t hop = step_hop(tile);
  const UnitPart part = unit_part(tile, units, thread, 0);

  Word<T, V> held[kHold ? STEPS : 1];
  A sum[V] = {}, dot[V] = {};
  if constexpr (kHold) {
    PPCR_UNROLLED
    for (int r = 0; r < STEPS; ++r) held[r] = load_gradient<T, V, MODE>(tensors, r < part.steps, part.offset + r * hop);
    stage_parameters<T>(tensors.weight, tensors.bias, bins.contexts(), parameters);
    PPCR_UNROLLED
    for (int r = 0; r < STEPS; ++r)
      add_product<T, V>(load_if<T, V>(r < part.steps, tensors.x + part.offset + r * hop), held[r], sum, dot);
    products_from_memory<T, V, MODE>(tensors, part, hop, STEPS, sum, dot);
  } else {
    stage_parameters<T>(tensors.weight, tensors.bias, bins.contexts(), parameters);
    sum_from_memory<T, V, STEPS>(tensors.x, part, hop, 0, sum);
  }
  const auto write_line = [&](int line, const A(&values)[V]) {
    if (thread.active) {
      PPCR_UNROLLED
      for (int j = 0; j < V; ++j) sums[line * tile.rows * tile.q + thread.element + j] = values[j];
    }
  };
  write_line(thread.group, sum);
  if constexpr (!Units::kOneRound) {
    PPCR_ROLLED
    for (int round = 1; round < tile.rounds; ++round) {
      PPCR_UNROLLED
      for (int j = 0; j < V; ++j) sum[j] = 0;
      const UnitPart next = unit_part(tile, units, thread, round);
      if constexpr (kHold)
        products_from_memory<T, V, MODE>(tensors, next, hop, 0, sum, dot);
      else
        sum_from_memory<T, V, kBatch>(tensors.x, next, hop, 0, sum);
      write_line(round * tile.groups + thread.group, sum);
    }
  }
  const int dot_line = tile.rounds * tile.groups;
  if constexpr (kHold) write_line(dot_line + thread.group, dot);
  __syncthreads();
  sum_rows(tile, memory.lines, sums, parts);
  block_or_cluster_sync(tile);

  for (int q = int(threadIdx.x); q < tile.q; q += int(blockDim.x)) {
    A segments[Bins::kSegments];
    segment_sums(tile, units, bins, parts, q, segments);
    A dg = 0;  // stays 0 for pixels beyond the image, so that they add nothing to the parameters' gradients
    if constexpr (kHold) {
      for (int rank = 0; rank < tile.cluster; ++rank)
        for (int group = 0; group < tile.groups; ++group) dg += part_of(tile, parts, dot_line + group, rank, q);
    } else if (thread.first + q < tile.image_pixels) {
      dg = widen(tensors.grad[int64_t(thread.tile / tile.image_tiles) * tile.image_pixels + thread.first + q]);
    }
    Pixel<A, Bins> pixel;
    gate_forward(bins, segments, parameters, tensors.eps, pixel);
    A gradients[Bins::kSegments];
    const A dz = gate_backward(bins, pixel, dg, parameters, gradients);
    gates[q] = pixel.g;
    PPCR_UNROLLED
    for (int k = 0; k < bins.segments(); ++k) dsums[k * tile.q + q] = gradients[k];
    PPCR_UNROLLED
    for (int l = 0; l < bins.contexts(); ++l) contributions[l * tile.q + q] = dz * pixel.n[l];
    contributions[bins.contexts() * tile.q + q] = dz;
  }
  block_or_cluster_sync(tile);  // also keeps a block's memory alive while others of its cluster read it
  if (thread.rank == 0) write_tile_partials(tile, thread.tile, bins.contexts(), contributions, tensors.partials);
  if (!thread.inside) return;

  A gate[V], dsum[V];
  pixel_values<V>(tile, gates, thread.column, gate);
  pixel_values<V>(tile, dsums + units.segment(part.unit) * tile.q, thread.column, dsum);
  if constexpr (kHold) {
    PPCR_UNROLLED
    for (int r = 0; r < STEPS; ++r)
      if (r < part.steps) write_backward<T, V, MODE>(tensors, true, part.offset + r * hop, held[r], gate, dsum);
    write_backward_from_memory<T, V, MODE>(tensors, part, hop, STEPS, gate, dsum);
  } else {
    write_backward_from_memory<T, V, MODE>(tensors, part, hop, 0, gate, dsum);
  }
  if constexpr (!Units::kOneRound) {
    PPCR_ROLLED
    for (int round = 1; round < tile.rounds; ++round) {
      const UnitPart next = unit_part(tile, units, thread, round);
      pixel_values<V>(tile, dsums + units.segment(next.unit) * tile.q, thread.column, dsum);
      write_backward_from_memory<T, V, MODE>(tensors, next, hop, 0, gate, dsum);
    }
  }
}

}  // namespace ppcr::cuda
