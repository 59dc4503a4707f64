// The forward kernel of the contiguous layout; contiguous_pipelined.cuh says how it works.
#pragma once
#include "contiguous_pipelined.cuh"

namespace ppcr::cuda {

// Steps that are not in registers: all loads of a batch before its first store, which they could
// not pass.
template <class T, int V, Operation OP, class Block>
PPCR_DEVICE void write_forward_from_memory(const Block& block, const UnitPart& part, int from,
                                           const Acc<T> (&gate)[V]) {
  const Tensors<T>& tensors = block.tensors;
  PPCR_ROLLED
  for (int step = from; step < part.steps; step += kBatch) {
    Word<T, V> words[kBatch], residual[kBatch] = {};
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      words[b] = block.load_step(tensors.x, step + b, part);
      if constexpr (OP == Operation::kAddRelu)
        residual[b] = block.load_step(tensors.residual, step + b, part);
    }
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b)
      store_if<T, V>(step + b < part.steps, tensors.y + part.offset + (step + b) * block.stride,
                     recalibrate<T, V, OP>(words[b], residual[b], gate));
  }
}

template <class T, int V, int STEPS, class Bins, Operation OP>
__global__ void __launch_bounds__(kThreads, contiguous_blocks(V, int(sizeof(T)) * V * STEPS, OP,
                                                              Pass::kForward))
    contiguous_pipelined_forward(const __grid_constant__ ContiguousArguments<T, Bins> arguments) {
  using A = Acc<T>;
  const Tensors<T>& tensors = arguments.tensors;
  const Tile& tile = arguments.tile;
  constexpr bool kGate = OP == Operation::kGate, kAdd = OP == Operation::kAddRelu;

  wait_for_kernels_before();
  PPCR_SHARED(raw);
  using Block = ContiguousBlock<T, V, STEPS, Bins, OP, Pass::kForward>;
  Block block(arguments, raw);
  constexpr bool kSlots = Block::kStagedTensors > 0;
  const Slots<T, V> x_slots = block.slots_of(0), residual_slots = block.slots_of(1);
  A* const gates = block.gates();

  Word<T, V> cached[STEPS];
  const auto copy_x = [&](int r, const UnitPart& part) {
    if constexpr (kSlots) block.copy_step(x_slots, tensors.x, r, part);
  };
  const auto copy_residual = [&](int r, const UnitPart& part) {
    if constexpr (kSlots && kAdd) block.copy_step(residual_slots, tensors.residual, r, part);
  };
  unsigned index = block.first_tile();
  {
    const UnitPart part = block.part_in(index, 0);
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) {
      copy_x(r, part);
      if constexpr (!kSlots) cached[r] = block.load_step(tensors.x, r, part);
    }
    close_copies();
    PPCR_UNROLL
    for (int r = 0; r < STEPS; ++r) copy_residual(r, part);
    close_copies();
  }
  stage_parameters<T>(tensors.weight, tensors.bias, block.bins.contexts(), block.parameters());
  block.await_cluster();

  // At each wait the copies of two groups are under way, x of one tile and the residual of another;
  // the older group is needed.
  constexpr int kLater = kAdd ? 1 : 0;
  for (; index < tile.tiles; index += block.tile_stride(), ++block.turn) {
    // Opaque, or the compiler would keep in registers from tile to tile, and from phase to phase,
    // what is quick to compute anew.
    block.stride = opaque(block.stride);
    A sum[V] = {};
    if constexpr (kSlots || kGate) {
      const UnitPart next = block.part_in(index + block.tile_stride(), 0);
      if constexpr (kSlots) wait_for_copies<kLater>();
      PPCR_UNROLL
      for (int r = 0; r < STEPS; ++r) {
        if constexpr (kSlots) cached[r] = *x_slots.at(r);
        add_word<T, V>(cached[r], sum);
        if constexpr (kSlots)
          copy_x(r, next);
        else
          cached[r] = block.load_step(tensors.x, r, next);
      }
      close_copies();
    } else {
      PPCR_UNROLL
      for (int r = 0; r < STEPS; ++r) add_word<T, V>(cached[r], sum);
    }
    block.write_sums(index, sum, [&](const UnitPart& part, int from) {
      block.sum_from_memory(part, from, sum);
    });
    block.exchange_sums();

    PPCR_ROLLED
    for (int q = int(threadIdx.x); q < tile.q; q += kThreads) {
      block.await_parts();
      A segments[Bins::kSegments];
      block.segment_sums(q, segments);
      Pixel<A, Bins> pixel;
      compute_gate(block.bins, segments, block.parameters(), tensors.eps, pixel);
      if constexpr (kGate) {
        const TilePlace place = block.place(block.thread(), index);
        if (block.is_first() && place.first + q < tile.image_pixels) {
          T gate;
          narrow(pixel.g, gate);
          tensors.y[int64_t(place.image) * tile.image_pixels + place.first + q] = gate;
        }
      } else {
        gates[q] = pixel.g;
      }
    }
    __syncthreads();
    index = opaque(index);
    if constexpr (!kGate) {
      A gate[V];
      block.pixel_values(gates, block.thread().column, gate);
      if constexpr (kSlots && kAdd) wait_for_copies<kLater>();
      const UnitPart part = block.part_in(index, 0);
      const UnitPart next = block.part_in(index + block.tile_stride(), 0);
      constexpr int kAtOnce = kSlots ? 1 : 2;  // residuals
      PPCR_UNROLL
      for (int first = 0; first < STEPS; first += kAtOnce) {
        const int end = first + kAtOnce < STEPS ? first + kAtOnce : STEPS;
        Word<T, V> residual[kAtOnce] = {};
        if constexpr (kAdd) {
          PPCR_UNROLL
          for (int r = first; r < end; ++r) {
            if constexpr (kSlots)
              residual[r - first] = *residual_slots.at(r);
            else
              residual[r - first] = block.load_step(tensors.residual, r, part);
          }
        }
        PPCR_UNROLL
        for (int r = first; r < end; ++r) {
          store_if<T, V>(r < part.steps, tensors.y + part.offset + r * block.stride,
                         recalibrate<T, V, OP>(cached[r], residual[r - first], gate));
          if constexpr (!kSlots) cached[r] = block.load_step(tensors.x, r, next);
          copy_residual(r, next);
        }
      }
      close_copies();
      if (tile.steps > STEPS) write_forward_from_memory<T, V, OP>(block, part, STEPS, gate);
      if constexpr (!Block::Units::kOneRound) {
        PPCR_ROLLED
        for (int round = 1; round < tile.rounds; ++round)
          write_forward_from_memory<T, V, OP>(block, block.part_in(index, round), 0, gate);
      }
    }
  }
}

}  // namespace ppcr::cuda
