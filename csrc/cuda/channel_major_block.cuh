// Channel-major layout (contiguous [N, C, *spatial]): a cluster of blocks works on a tile of q
// pixels with all their channels, then on every so many tiles after it.
//
// Vectors of a tile are copied to shared memory while the tile before it is worked on. Those of one
// tensor go on to registers, from the sums to the result: x forward, gy backward (dx = gy g + dsum
// needs no x). So the tensor crosses the memory bus once. Vectors of less than 16 bytes are loaded
// to the registers directly, as soon as the last result is stored. Channels beyond what the
// registers hold are read a second time: slower, not wrong.
//
//   threads sum their vectors -> shared memory -> sums over the rows of a step, sent to all blocks
//   of the cluster -> a thread per pixel computes the gate -> every thread multiplies what it holds
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

// What both passes set up.
template <class T, int V, int STEPS, class Bins, Mode MODE, bool BACKWARD>
struct ChannelMajorBlock {
  using A = Acc<T>;
  static constexpr int kStreams = slot_streams(MODE, BACKWARD, int(sizeof(T)) * V, STEPS);
  const Tile& tile;
  const TileMemory memory;
  unsigned char* const slots;
  A* const values;
  Mbarrier* const barriers;  // two, taken in turn, as are two copies of the parts
  unsigned turn = 0;

  PPCR_DEVICE ChannelMajorBlock(const ChannelMajorArguments<T, Bins>& arguments, unsigned char* raw)
      : tile(arguments.tile),
        memory(tile_memory(tile, arguments.bins.contexts(), arguments.bins.segments(), MODE,
                           BACKWARD)),
        slots(raw),
        values(reinterpret_cast<A*>(raw + kStreams * STEPS * kThreads * kSlotBytes)),
        barriers(reinterpret_cast<Mbarrier*>(values)) {}

  PPCR_DEVICE unsigned first_tile() const { return blockIdx.x >> tile.cluster_log2; }
  PPCR_DEVICE unsigned tile_stride() const { return gridDim.x >> tile.cluster_log2; }
  PPCR_DEVICE A* parameters() const { return values + memory.parameters; }
  PPCR_DEVICE A* sums() const { return values + memory.sums; }
  PPCR_DEVICE A* gates() const { return values + memory.pixels; }
  PPCR_DEVICE A* parts() const {
    return values + memory.parts + (tile.cluster > 1 ? int(turn & 1) * memory.part_values : 0);
  }
  PPCR_DEVICE Slots<T, V> stream(int index) const { return slots_of<T, V>(slots, index, STEPS); }

  // Nobody sends to a block before it has begun.
  PPCR_DEVICE void begin() const {
    if (tile.cluster == 1) return;
    if (threadIdx.x == 0) init_barriers(barriers);
    cluster_arrive();
  }
  PPCR_DEVICE void await_cluster() const {
    if (tile.cluster > 1) cluster_wait();
  }
  // Of the thread's group; each kind of sum and each round has so many lines.
  PPCR_DEVICE void put_sums(int kind, const A (&sum)[V]) const {
    const TileThread thread = tile_thread<V>(tile);
    const int line = kind * tile.groups + thread.group;
    if (thread.active) write_line<V>(sum, sums() + line * tile.rows * tile.q + thread.element);
  }
  // The thread's part of a tile, in a round.
  template <class Units>
  PPCR_DEVICE UnitPart part_in(const Units& units, unsigned index, int round) const {
    const TileThread thread = tile_thread<V>(tile);
    return unit_part(tile, units, thread, round).in(tile_place(tile, thread, index));
  }
  PPCR_DEVICE bool is_first() const { return tile.cluster == 1 || cluster_rank() == 0; }
  // The sums of all threads are on their way to where the gates are computed.
  PPCR_DEVICE void exchange() const {
    __syncthreads();
    sum_rows(tile, tile.cluster > 1 ? cluster_rank() : 0, memory.lines, sums(), parts(),
             barriers + (turn & 1));
    if (tile.cluster == 1) __syncthreads();
  }
  // Called by the threads that compute gates.
  PPCR_DEVICE void await_parts() const {
    if (tile.cluster > 1) wait_for(barriers + (turn & 1), turn >> 1 & 1);
  }
};

template <class T, int V>
PPCR_DEVICE void add_word(const Word<T, V>& word, Acc<T> (&sum)[V]) {
  Acc<T> values[V];
  unpack<T, V>(word, values);
  PPCR_UNROLLED
  for (int j = 0; j < V; ++j) sum[j] += values[j];
}

template <class T, int V, int BATCH>
PPCR_DEVICE void sum_from_memory(const T* x, const UnitPart& part, int64_t hop, int from,
                                 Acc<T> (&sum)[V]) {
  PPCR_ROLLED
  for (int step = from; step < part.steps; step += BATCH) {
    Word<T, V> words[BATCH];
    PPCR_UNROLLED
    for (int b = 0; b < BATCH; ++b)
      words[b] = load_if<T, V>(step + b < part.steps, x + part.offset + (step + b) * hop);
    PPCR_UNROLLED
    for (int b = 0; b < BATCH; ++b) add_word<T, V>(words[b], sum);
  }
}

}  // namespace ppcr::cuda
