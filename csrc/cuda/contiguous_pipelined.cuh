// What both passes of the contiguous kernels share. A cluster of blocks works on a tile of q pixels
// with all their channels, then on every so many tiles after it.
//
// Vectors of a tile are copied to shared memory while the tile before it is worked on. Those of one
// tensor stay in registers from the sums to the result: x forward, gy backward (dx = gy g + dsum
// needs no x), so that it crosses the memory bus once. Vectors of less than 16 bytes are loaded to
// the registers as soon as the last result is stored. Channels beyond what the registers hold are
// read a second time.
//
//   threads sum their vectors -> shared memory -> sums over the rows of a step, sent to all blocks
//   of the cluster -> a thread per pixel computes the gate -> every thread writes its vectors
#pragma once
#include "device_common.cuh"

namespace ppcr::cuda {

// What stays the same from tile to tile. It is computed anew where it is needed, since it would
// take registers from the vectors of a thread.
struct TileThread {
  unsigned rank;    // of the block in its cluster
  int group;        // of the thread in its block
  bool active;      // has work in a step
  int element;      // of its vector in a step
  int row, column;  // the same, as channel and pixel
};

template <int V>
PPCR_DEVICE TileThread tile_thread(const Tile& tile) {
  TileThread thread;
  const int index = int(opaque(unsigned(threadIdx.x))), in_group = index & (tile.group - 1);
  thread.rank = tile.cluster > 1 ? cluster_rank() : 0;
  thread.group = index >> tile.group_log2;
  thread.element = in_group * V;
  thread.row = int(tile.by_q.quotient(unsigned(thread.element)));
  thread.column = thread.element - thread.row * tile.q;
  thread.active = in_group < tile.active;
  return thread;
}

// A tile of the batch: where its first pixel lies at channel 0. `inside`: this thread's pixels
// exist (the last tile of an image may reach beyond it, and behind the last tile there is none).
struct TilePlace {
  unsigned image;
  int64_t first;  // pixel of the image
  int64_t offset;
  bool inside;
};

PPCR_DEVICE TilePlace tile_place(const Tile& tile, const TileThread& thread, unsigned index) {
  TilePlace place;
  place.image = tile.by_image_tiles.quotient(index);
  place.first = int64_t(index - place.image * tile.image_tiles) * unsigned(tile.q);
  place.offset = int64_t(place.image) * tile.image_elements + place.first;
  place.inside = index < tile.tiles && place.first + thread.column < tile.image_pixels;
  return place;
}

// A thread's part of one unit: `steps` vectors, `stride` elements apart; the first lies `offset`
// elements behind that of its tile.
struct UnitPart {
  int unit;
  int steps;
  int64_t offset;
  PPCR_DEVICE UnitPart in(const TilePlace& place) const {
    return {unit, place.inside ? steps : 0, place.offset + offset};
  }
};

template <class Units>
PPCR_DEVICE UnitPart unit_part(const Tile& tile, const Units& units, const TileThread& thread,
                               int round) {
  UnitPart part;
  part.unit = (round * tile.cluster + int(thread.rank)) * tile.groups + thread.group;
  part.steps = thread.active ? units.steps(tile, part.unit, thread.element) : 0;
  part.offset = int64_t(unsigned(units.begin(part.unit) + thread.row)) * tile.image_pixels +
                unsigned(thread.column);
  return part;
}

// Elements from a step to the next.
PPCR_DEVICE int64_t step_stride(const Tile& tile) {
  return int64_t(unsigned(tile.rows)) * tile.image_pixels;
}

// Vectors that a thread has copied to shared memory ahead of their use. No other thread reads them,
// so that they need no barrier, and neighbouring threads' vectors lie side by side.
template <class T, int V>
struct Slots {
  unsigned char* own;
  PPCR_DEVICE Word<T, V>* at(int step) const {
    return reinterpret_cast<Word<T, V>*>(own + step * kThreads * kSlotBytes);
  }
};

// V sums of a thread, side by side in shared memory.
template <int V, class A>
PPCR_DEVICE void write_line(const A (&values)[V], A* to) {
  constexpr int kWide = 16 / int(sizeof(A));
  if constexpr (V % kWide == 0) {
    PPCR_UNROLL
    for (int j = 0; j < V; j += kWide) {
      uint4 word;
      memcpy(&word, values + j, sizeof word);
      store_shared(reinterpret_cast<uint4*>(to + j), word);
    }
  } else {
    PPCR_UNROLL
    for (int j = 0; j < V; ++j) to[j] = values[j];
  }
}

// W values side by side in shared memory: 16 bytes, or one value.
template <int W, class A>
using Columns = std::conditional_t<W == 1, A, uint4>;

// parts[unit][pixel] = sum over the rows of a step of sums[line][row][pixel], of this block for all
// blocks of its cluster; behind the units of all rounds the dot products of all groups. W pixels at
// a time. Where there are fewer columns than threads, lanes of a warp share one. Between blocks the
// values travel with `barrier`, which completes when all have come.
template <int W, class A>
PPCR_DEVICE void sum_rows(const Tile& tile, unsigned rank, int lines, const A* sums, A* parts,
                          Mbarrier* barrier) {
  const int warp_columns = kWarp >> tile.column_lanes_log2, lanes = 1 << tile.column_lanes_log2,
            in_warp = int(threadIdx.x) & (kWarp - 1),
            lane = in_warp >> (kWarpLog2 - tile.column_lanes_log2);
  const int count = lines * tile.q, last = count / W - 1;
  if (tile.cluster > 1 && threadIdx.x == 0)
    expect_bytes(barrier, unsigned(count * tile.cluster * int(sizeof(A))));
  // Whole warps, for the shuffles: behind the last column they sum it once more.
  const int end = last | (warp_columns - 1);
  PPCR_ROLLED
  for (int column = int(threadIdx.x) / kWarp * warp_columns + (in_warp & (warp_columns - 1));
       column <= end; column += kThreads / kWarp * warp_columns) {
    const int i = (column < last ? column : last) * W, line = int(tile.by_q.quotient(unsigned(i)));
    A values[W] = {};
    const A* from = sums + (line * (tile.rows - 1) + lane) * tile.q + i;
    PPCR_BY_TWO
    for (int row = lane; row < tile.rows; row += lanes, from += lanes * tile.q) {
      A added[W];
      const Columns<W, A> word = *reinterpret_cast<const Columns<W, A>*>(from);
      memcpy(added, &word, sizeof added);
      PPCR_UNROLL
      for (int j = 0; j < W; ++j) values[j] += added[j];
    }
    for (int offset = warp_columns; offset < kWarp; offset <<= 1) {
      PPCR_UNROLL
      for (int j = 0; j < W; ++j) values[j] += __shfl_xor_sync(0xffffffffu, values[j], offset);
    }
    if (column > last) continue;
    const int before = (line >> tile.groups_log2) * (tile.cluster - 1) + int(rank);
    auto* const part = reinterpret_cast<Columns<W, A>*>(parts + before * tile.groups * tile.q + i);
    Columns<W, A> word;
    memcpy(&word, values, sizeof word);
    if (tile.cluster == 1) {
      if (lane == 0) *part = word;
    } else {
      for (int to = lane; to < tile.cluster; to += lanes)
        cluster_send(part, word, unsigned(to), barrier);
    }
  }
}

// The sums of every segment for one pixel, from all blocks of the cluster, in the order of the
// units.
template <class A, class Units, class Bins>
PPCR_DEVICE void segment_sums(const Tile& tile, const Units& units, const Bins& bins,
                              const A* parts, int pixel, A* sums) {
  PPCR_UNROLL
  for (int k = 0; k < bins.segments(); ++k) {
    A sum = 0;
    PPCR_BY_TWO
    for (int unit = units.first(k); unit < units.first(k + 1); ++unit)
      sum += parts[unit * tile.q + pixel];
    sums[k] = sum;
  }
}

// The dot products of one pixel, from all groups of all blocks of the cluster.
template <class A>
PPCR_DEVICE A dot_sum(const Tile& tile, const A* parts, int pixel) {
  const int groups = tile.cluster * tile.groups;
  const A* const dots = parts + tile.rounds * groups * tile.q + pixel;
  A sum = 0;
  PPCR_BY_FOUR
  for (int group = 0; group < groups; ++group) sum += dots[group * tile.q];
  return sum;
}

// A vector that straddles channels (q is then the whole image) wraps to the image's first pixel.
template <int V, class A>
PPCR_DEVICE void pixel_values(const Tile& tile, const A* row, int column, A (&values)[V]) {
  constexpr int kWide = 16 / int(sizeof(A));
  const auto pixel = [&](int j) { return row + column + j - (column + j >= tile.q ? tile.q : 0); };
  if (V % kWide == 0 && tile.wraps_wide) {
    PPCR_UNROLL
    for (int j = 0; j + kWide <= V; j += kWide) {
      const uint4 word = *reinterpret_cast<const uint4*>(pixel(j));
      memcpy(values + j, &word, sizeof word);
    }
  } else {
    PPCR_UNROLL
    for (int j = 0; j < V; ++j) values[j] = *pixel(j);
  }
}

template <class T, class Bins>
struct ContiguousArguments {
  Tensors<T> tensors;
  Tile tile;
  UnitsOf<Bins> units;
  Bins bins;
};

// What both passes set up.
template <class T, int V, int STEPS, class Bins, Operation OP, Pass PASS>
struct ContiguousBlock {
  using A = Acc<T>;
  static constexpr int kStagedTensors = staged_tensors(OP, PASS, int(sizeof(T)) * V, STEPS);
  using Units = UnitsOf<Bins>;
  const ContiguousArguments<T, Bins>& arguments;
  unsigned char* const slots;  // at the beginning of shared memory
  unsigned turn = 0;           // tiles so far
  const Tensors<T>& tensors = arguments.tensors;
  const Tile& tile = arguments.tile;
  const Units& units = arguments.units;
  const TileMemory& memory = tile.memory;
  A* const values = reinterpret_cast<A*>(slots + kStagedTensors * STEPS * kThreads * kSlotBytes);
  // Two, used alternately, as are two copies of the parts.
  Mbarrier* const barriers = reinterpret_cast<Mbarrier*>(values);

  PPCR_DEVICE unsigned first_tile() const { return blockIdx.x >> tile.cluster_log2; }
  PPCR_DEVICE unsigned tile_stride() const { return gridDim.x >> tile.cluster_log2; }
  PPCR_DEVICE A* parameters() const { return values + memory.parameters; }
  PPCR_DEVICE A* sums() const { return values + memory.sums; }
  PPCR_DEVICE A* gates() const { return values + memory.pixels; }
  PPCR_DEVICE A* parts() const {
    return values + memory.parts + (tile.cluster > 1 ? int(turn & 1) * memory.part_values : 0);
  }
  PPCR_DEVICE Slots<T, V> slots_of_tensor(int index) const {
    return {slots + (index * STEPS * kThreads + int(threadIdx.x)) * kSlotBytes};
  }

  // Nobody sends to a block before it has begun. That needs no order with the copies under way:
  // they write the slots alone, and the fence and the cluster's barrier show others the barriers.
  // Behind all loads to registers: of less than 16 bytes nvcc moves a loaded one at the branch, and
  // waits for it.
  static constexpr int kBeginsBehind = (kStagedTensors > 0 ? kBatch : STEPS) - 1;
  PPCR_DEVICE void begin() const {
    if (tile.cluster == 1) return;
    if (threadIdx.x == 0) init_barriers(barriers);
    cluster_arrive();
  }
  PPCR_DEVICE void await_cluster() const {
    if (tile.cluster > 1) cluster_wait();
  }
  // Writes a thread's sums into the line of its group. Each kind of sum, and each round, has a line
  // for every group.
  PPCR_DEVICE void put_sums(int kind, const A (&sum)[V]) const {
    const TileThread thread = tile_thread<V>(tile);
    const int line = kind * tile.groups + thread.group;
    if (thread.active) write_line<V>(sum, sums() + line * tile.rows * tile.q + thread.element);
  }
  // The thread's part of a tile, in a round.
  PPCR_DEVICE UnitPart part_in(unsigned index, int round) const {
    const TileThread thread = tile_thread<V>(tile);
    return unit_part(tile, units, thread, round).in(tile_place(tile, thread, index));
  }
  PPCR_DEVICE bool is_first() const { return tile.cluster == 1 || cluster_rank() == 0; }
  // The sums of all threads are on their way to where the gates are computed.
  PPCR_DEVICE void exchange() const {
    __syncthreads();
    const unsigned rank = tile.cluster > 1 ? cluster_rank() : 0;
    Mbarrier* const barrier = barriers + (turn & 1);
    if (tile.wraps_wide)
      sum_rows<16 / int(sizeof(A))>(tile, rank, memory.lines, sums(), parts(), barrier);
    else
      sum_rows<1>(tile, rank, memory.lines, sums(), parts(), barrier);
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
  PPCR_UNROLL
  for (int j = 0; j < V; ++j) sum[j] += values[j];
}

template <class T, int V>
PPCR_DEVICE void sum_from_memory(const T* x, const UnitPart& part, int64_t stride, int from,
                                 Acc<T> (&sum)[V]) {
  PPCR_ROLLED
  for (int step = from; step < part.steps; step += kBatch) {
    Word<T, V> words[kBatch] = {};
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b)
      reload_if<T, V>(step + b < part.steps, x + part.offset + (step + b) * stride, words[b]);
    PPCR_UNROLL
    for (int b = 0; b < kBatch; ++b) add_word<T, V>(words[b], sum);
  }
}

}  // namespace ppcr::cuda
