// The backward kernel of the contiguous layout; contiguous_pipelined.cuh says how it works.
#pragma once
#include "contiguous_pipelined.cuh"

namespace ppcr::cuda {

template <class T, int V>
PPCR_DEVICE void add_product(const Word<T, V>& x, const Word<T, V>& grad, Acc<T> (&sum)[V],
                             Acc<T> (&dot)[V]) {
  Acc<T> values[V], gradients[V];
  unpack<T, V>(x, values);
  unpack<T, V>(grad, gradients);
  PPCR_UNROLL
  for (int j = 0; j < V; ++j) {
    sum[j] += values[j];
    dot[j] += gradients[j] * values[j];
  }
}

template <class T, int V, Operation OP>
PPCR_DEVICE void products_from_memory(const Tensors<T>& tensors, const UnitPart& part,
                                      int64_t stride, int from, Acc<T> (&sum)[V],
                                      Acc<T> (&dot)[V]) {
  PPCR_ROLLED
  for (int step = from; step < part.steps; step += kBatch) {
    Word<T, V> words[kBatch], gradients[kBatch];
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t at = part.offset + (step + b) * stride;
      words[b] = load_if<T, V>(step + b < part.steps, tensors.x + at);
      gradients[b] = load_gradient<T, V, OP>(tensors, step + b < part.steps, at);
    }
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b) add_product<T, V>(words[b], gradients[b], sum, dot);
  }
}

template <class T, int V, Operation OP>
PPCR_DEVICE void write_backward_from_memory(const Tensors<T>& tensors, const UnitPart& part,
                                            int64_t stride, int from, const Acc<T> (&gate)[V],
                                            const Acc<T> (&dsum)[V]) {
  if constexpr (OP == Operation::kGate) {
    const Word<T, V> word = pack<T, V>(dsum);
    PPCR_BY_FOUR
    for (int step = from; step < part.steps; ++step)
      store_if<T, V>(true, tensors.dx + part.offset + step * stride, word);
  } else {
    PPCR_ROLLED
    for (int step = from; step < part.steps; step += kBatch) {
      Word<T, V> gradients[kBatch];
      PPCR_UNROLL
      for (int b = 0; b < kBatch; ++b)
        gradients[b] = load_gradient<T, V, OP>(tensors, step + b < part.steps,
                                               part.offset + (step + b) * stride);
      PPCR_UNROLL
      for (int b = 0; b < kBatch; ++b)
        write_backward<T, V, OP>(tensors, step + b < part.steps, part.offset + (step + b) * stride,
                                 gradients[b], gate, dsum);
    }
  }
}

// The cluster's share of dweight and dbias: a warp per parameter, the pixels in a fixed order.
template <class A>
PPCR_DEVICE void write_partials(const Tile& tile, unsigned cluster, unsigned clusters, int contexts,
                                const A* contributions, A* partials) {
  for (int l = int(threadIdx.x) / kWarp; l <= contexts; l += kThreads / kWarp) {
    A value = 0;
    for (int q = int(threadIdx.x) % kWarp; q < tile.q; q += kWarp)
      value += contributions[l * tile.q + q];
    value = sum_lanes(value, kWarp);
    if (threadIdx.x % kWarp == 0) partials[int64_t(l) * clusters + cluster] = value;
  }
}

template <class T, int V, int STEPS, class Bins, Operation OP>
__global__ void __launch_bounds__(kThreads, contiguous_blocks(int(sizeof(T)) * V * STEPS, OP,
                                                              Pass::kBackward))
    contiguous_pipelined_backward(const __grid_constant__ ContiguousArguments<T, Bins> arguments) {
  using A = Acc<T>;
  const Tensors<T>& tensors = arguments.tensors;
  const Tile& tile = arguments.tile;
  const Bins& bins = arguments.bins;
  constexpr bool kGate = OP == Operation::kGate, kAdd = OP == Operation::kAddRelu;

  wait_for_kernels_before();
  PPCR_SHARED(raw);
  using Block = ContiguousBlock<T, V, STEPS, Bins, OP, Pass::kBackward>;
  Block block{arguments, raw};
  constexpr bool kSlots = Block::kStagedTensors > 0;
  constexpr bool kGradAhead = kSlots && grad_ahead(OP, STEPS);
  const Slots<T, V> xs = block.slots_of_tensor(0);
  const Slots<T, V> seconds = block.slots_of_tensor(1);  // y or gy
  A* const gates = block.gates();
  A* const dsums = gates + tile.q;  // [segments][q]
  A* const contributions =
      dsums + bins.segments() * tile.q;  // [contexts + 1][q]: dz n_l, dz, over the tiles
  int64_t stride = step_stride(tile);

  Word<T, V> cached[STEPS] = {};
  const auto load_cached = [&](int r, const UnitPart& part) {
    const T* const from = kGate ? tensors.x : tensors.grad;
    reload_if<T, V>(r < part.steps, from + part.offset + r * stride, cached[r]);
  };
  const auto copy_ahead = [&](int r, const UnitPart& part) {
    if constexpr (kSlots) {
      const int64_t at = part.offset + r * stride;
      copy_async(xs.at(r), tensors.x + at, r < part.steps);
      if constexpr (kAdd || kGradAhead)
        copy_async(seconds.at(r), (kAdd ? tensors.y : tensors.grad) + at, r < part.steps);
    }
  };
  unsigned index = block.first_tile();
  {
    const UnitPart part = block.part_in(index, 0);
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) {
      copy_ahead(r, part);
      if constexpr (!kGradAhead) load_cached(r, part);
      if (r == Block::kBeginsBehind) block.begin();
    }
  }
  close_copies();
  stage_parameters<T>(tensors.weight, tensors.bias, bins.contexts(), block.parameters());
  for (int l = 0; l <= bins.contexts(); ++l) {
    PPCR_ROLLED
    for (int q = int(threadIdx.x); q < tile.q; q += kThreads) contributions[l * tile.q + q] = 0;
  }
  block.await_cluster();

  for (; index < tile.tiles; index += block.tile_stride(), ++block.turn) {
    stride = opaque(step_stride(tile));  // as in the forward kernel
    A sum[V] = {}, dot[V] = {};
    {
      const UnitPart next = block.part_in(index + block.tile_stride(), 0);
      [[maybe_unused]] UnitPart part;
      if constexpr (!kGate && !kSlots) part = block.part_in(index, 0);
      if constexpr (kSlots) wait_for_copies<0>();
      PPCR_UNROLL
      for (int r = 0; r < STEPS; ++r) {
        if constexpr (kGate) {
          add_word<T, V>(cached[r], sum);
          load_cached(r, next);
        } else {
          const auto staged_or_loaded = [&](const Slots<T, V>& slots, const T* from) {
            if constexpr (kSlots)
              return *slots.at(r);
            else
              return load_if<T, V>(r < part.steps, from + part.offset + r * stride);
          };
          if constexpr (kGradAhead) cached[r] = *seconds.at(r);
          if constexpr (kAdd)
            cached[r] = mask_relu<T, V>(cached[r], staged_or_loaded(seconds, tensors.y));
          add_product<T, V>(staged_or_loaded(xs, tensors.x), cached[r], sum, dot);
          copy_ahead(r, next);
        }
      }
      close_copies();
    }
    if (tile.steps > STEPS) {
      if constexpr (kGate)
        sum_from_memory<T, V>(tensors.x, block.part_in(index, 0), stride, STEPS, sum);
      else
        products_from_memory<T, V, OP>(tensors, block.part_in(index, 0), stride, STEPS, sum, dot);
    }
    block.put_sums(0, sum);
    if constexpr (!Block::Units::kOneRound) {
      PPCR_ROLLED
      for (int round = 1; round < tile.rounds; ++round) {
        PPCR_UNROLL
        for (int j = 0; j < V; ++j) sum[j] = 0;
        if constexpr (kGate)
          sum_from_memory<T, V>(tensors.x, block.part_in(index, round), stride, 0, sum);
        else
          products_from_memory<T, V, OP>(tensors, block.part_in(index, round), stride, 0, sum, dot);
        block.put_sums(round, sum);
      }
    }
    if constexpr (!kGate) block.put_sums(tile.rounds, dot);
    block.exchange();

    PPCR_ROLLED
    for (int q = int(threadIdx.x); q < tile.q; q += kThreads) {
      A dg = 0;  // beyond the image it stays 0 and adds nothing to the parameters' gradients
      if constexpr (kGate) {
        const TilePlace place = tile_place(tile, tile_thread<V>(tile), index);
        if (place.first + q < tile.image_pixels)
          dg = A(tensors.grad[int64_t(place.image) * tile.image_pixels + place.first + q]);
      }
      block.await_parts();
      const A* const parts = block.parts();
      A segments[Bins::kSegments];
      segment_sums(tile, block.units, bins, parts, q, segments);
      if constexpr (!kGate) dg = dot_sum(tile, parts, q);
      Pixel<A, Bins> pixel;
      compute_gate(bins, segments, block.parameters(), tensors.eps, pixel);
      A gradients[Bins::kSegments];
      const A dz = compute_gradients(bins, pixel, dg, block.parameters(), gradients);
      gates[q] = pixel.g;
      PPCR_UNROLL
      for (int k = 0; k < bins.segments(); ++k) dsums[k * tile.q + q] = gradients[k];
      PPCR_UNROLL
      for (int l = 0; l < bins.contexts(); ++l) contributions[l * tile.q + q] += dz * pixel.n[l];
      contributions[bins.contexts() * tile.q + q] += dz;
    }
    __syncthreads();

    index = opaque(index);
    A gate[V], dsum[V];
    const UnitPart part = block.part_in(index, 0);
    const int column = tile_thread<V>(tile).column;
    pixel_values<V>(tile, gates, column, gate);
    pixel_values<V>(tile, dsums + block.units.segment(part.unit) * tile.q, column, dsum);
    if constexpr (kGate) {
      write_backward_from_memory<T, V, OP>(tensors, part, stride, 0, gate, dsum);
    } else {
      const UnitPart next = block.part_in(index + block.tile_stride(), 0);
      PPCR_UNROLL
      for (int r = 0; r < STEPS; ++r) {
        write_backward<T, V, OP>(tensors, r < part.steps, part.offset + r * stride, cached[r], gate,
                                 dsum);
        if constexpr (!kGradAhead) load_cached(r, next);
      }
      if (tile.steps > STEPS)
        write_backward_from_memory<T, V, OP>(tensors, part, stride, STEPS, gate, dsum);
    }
    if constexpr (!Block::Units::kOneRound) {
      PPCR_ROLLED
      for (int round = 1; round < tile.rounds; ++round) {
        const UnitPart later = block.part_in(index, round);
        pixel_values<V>(tile, dsums + block.units.segment(later.unit) * tile.q, column, dsum);
        write_backward_from_memory<T, V, OP>(tensors, later, stride, 0, gate, dsum);
      }
    }
  }
  // All threads see what the others added, since a barrier came after it.
  if (block.is_first())
    write_partials(tile, block.first_tile(), block.tile_stride(), bins.contexts(), contributions,
                   tensors.partials);
}

}  // namespace ppcr::cuda
