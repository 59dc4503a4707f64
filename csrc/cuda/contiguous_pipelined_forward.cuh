// The forward kernel of the contiguous layout; contiguous_pipelined.cuh says how it works.
#pragma once
#include "contiguous_pipelined.cuh"

namespace ppcr::cuda {

// Steps that are not in registers: all loads of a batch before its first store, which they could
// not pass.
template <class T, int V, Operation OP>
PPCR_DEVICE void write_forward_from_memory(const Tensors<T>& tensors, const UnitPart& part,
                                           int64_t stride, int from, const Acc<T> (&gate)[V]) {
  PPCR_ROLLED
  for (int step = from; step < part.steps; step += kBatch) {
    Word<T, V> words[kBatch] = {}, residual[kBatch] = {};
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t at = part.offset + (step + b) * stride;
      reload_if<T, V>(step + b < part.steps, tensors.x + at, words[b]);
      if constexpr (OP == Operation::kAddRelu)
        reload_if<T, V>(step + b < part.steps, tensors.residual + at, residual[b]);
    }
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b)
      store_if<T, V>(step + b < part.steps, tensors.y + part.offset + (step + b) * stride,
                     recalibrate<T, V, OP>(words[b], residual[b], gate));
  }
}

template <class T, int V, int STEPS, class Bins, Operation OP>
__global__ void __launch_bounds__(kThreads,
                                  contiguous_blocks(int(sizeof(T)) * V * STEPS, OP, Pass::kForward))
    contiguous_pipelined_forward(const __grid_constant__ ContiguousArguments<T, Bins> arguments) {
  using A = Acc<T>;
  const Tensors<T>& tensors = arguments.tensors;
  const Tile& tile = arguments.tile;
  const Bins& bins = arguments.bins;
  constexpr bool kGate = OP == Operation::kGate, kAdd = OP == Operation::kAddRelu;

  wait_for_kernels_before();
  PPCR_SHARED(raw);
  using Block = ContiguousBlock<T, V, STEPS, Bins, OP, Pass::kForward>;
  Block block{arguments, raw};
  constexpr bool kSlots = Block::kStagedTensors > 0;
  const Slots<T, V> xs = block.slots_of_tensor(0), residuals = block.slots_of_tensor(1);
  A* const gates = block.gates();
  int64_t stride = step_stride(tile);

  Word<T, V> cached[STEPS] = {};
  const auto load_cached = [&](int r, const UnitPart& part) {
    reload_if<T, V>(r < part.steps, tensors.x + part.offset + r * stride, cached[r]);
  };
  const auto copy_x = [&](int r, const UnitPart& part) {
    if constexpr (kSlots)
      copy_async(xs.at(r), tensors.x + part.offset + r * stride, r < part.steps);
  };
  const auto copy_residual = [&](int r, const UnitPart& part) {
    if constexpr (kSlots && kAdd)
      copy_async(residuals.at(r), tensors.residual + part.offset + r * stride, r < part.steps);
  };
  unsigned index = block.first_tile();
  {
    const UnitPart part = block.part_in(index, 0);
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) {
      copy_x(r, part);
      if constexpr (!kSlots) load_cached(r, part);
      if (r == Block::kBeginsBehind) block.begin();
    }
    close_copies();
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) copy_residual(r, part);
    close_copies();
  }
  stage_parameters<T>(tensors.weight, tensors.bias, bins.contexts(), block.parameters());
  block.await_cluster();

  // At each wait the copies of two groups are under way, x of one tile and the residual of another;
  // the older group is needed.
  constexpr int kLater = kAdd ? 1 : 0;
  for (; index < tile.tiles; index += block.tile_stride(), ++block.turn) {
    // Opaque, or the compiler would keep in registers from tile to tile, and from phase to phase,
    // what is quick to compute anew.
    stride = opaque(step_stride(tile));
    A sum[V] = {};
    if constexpr (kSlots || kGate) {
      const UnitPart next = block.part_in(index + block.tile_stride(), 0);
      if constexpr (kSlots) wait_for_copies<kLater>();
      PPCR_UNROLL
      for (int r = 0; r < STEPS; ++r) {
        if constexpr (kSlots) cached[r] = *xs.at(r);
        add_word<T, V>(cached[r], sum);
        if constexpr (kSlots) {
          copy_x(r, next);
        } else {
          load_cached(r, next);
          stride = opaque(stride);
        }
      }
      close_copies();
    } else {
      PPCR_UNROLL
      for (int r = 0; r < STEPS; ++r) add_word<T, V>(cached[r], sum);
    }
    if (tile.steps > STEPS)
      sum_from_memory<T, V>(tensors.x, block.part_in(index, 0), stride, STEPS, sum);
    block.put_sums(0, sum);
    if constexpr (!Block::Units::kOneRound) {
      PPCR_ROLLED
      for (int round = 1; round < tile.rounds; ++round) {
        PPCR_UNROLL
        for (int j = 0; j < V; ++j) sum[j] = 0;
        sum_from_memory<T, V>(tensors.x, block.part_in(index, round), stride, 0, sum);
        block.put_sums(round, sum);
      }
    }
    block.exchange();

    PPCR_ROLLED
    for (int q = int(threadIdx.x); q < tile.q; q += kThreads) {
      block.await_parts();
      A segments[Bins::kSegments];
      segment_sums(tile, block.units, bins, block.parts(), q, segments);
      Pixel<A, Bins> pixel;
      compute_gate(bins, segments, block.parameters(), tensors.eps, pixel);
      if constexpr (kGate) {
        const TilePlace place = tile_place(tile, tile_thread<V>(tile), index);
        if (block.is_first() && place.first + q < tile.image_pixels)
          tensors.y[int64_t(place.image) * tile.image_pixels + place.first + q] = T(pixel.g);
      } else {
        gates[q] = pixel.g;
      }
    }
    __syncthreads();
    index = opaque(index);
    if constexpr (!kGate) {
      A gate[V];
      pixel_values<V>(tile, gates, tile_thread<V>(tile).column, gate);
      if constexpr (kSlots && kAdd) wait_for_copies<kLater>();
      const UnitPart part = block.part_in(index, 0),
                     next = block.part_in(index + block.tile_stride(), 0);
      constexpr int kAtOnce = kSlots ? 1 : 2;  // residuals
      PPCR_UNROLL
      for (int first = 0; first < STEPS; first += kAtOnce) {
        const int end = first + kAtOnce < STEPS ? first + kAtOnce : STEPS;
        Word<T, V> residual[kAtOnce] = {};
        if constexpr (kAdd) {
          PPCR_UNROLL
          for (int r = first; r < end; ++r) {
            if constexpr (kSlots)
              residual[r - first] = *residuals.at(r);
            else
              residual[r - first] =
                  load_if<T, V>(r < part.steps, tensors.residual + part.offset + r * stride);
          }
        }
        PPCR_UNROLL
        for (int r = first; r < end; ++r) {
          store_if<T, V>(r < part.steps, tensors.y + part.offset + r * stride,
                         recalibrate<T, V, OP>(cached[r], residual[r - first], gate));
          if constexpr (!kSlots) load_cached(r, next);
          copy_residual(r, next);
        }
      }
      close_copies();
      if (tile.steps > STEPS)
        write_forward_from_memory<T, V, OP>(tensors, part, stride, STEPS, gate);
      if constexpr (!Block::Units::kOneRound) {
        PPCR_ROLLED
        for (int round = 1; round < tile.rounds; ++round)
          write_forward_from_memory<T, V, OP>(tensors, block.part_in(index, round), stride, 0,
                                              gate);
      }
    }
  }
}

}  // namespace ppcr::cuda
