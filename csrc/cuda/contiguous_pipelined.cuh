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

template <class T, class Bins>
struct ContiguousArguments {
  Tensors<T> tensors;
  Tile tile;
  typename UnitsOf<Bins>::type units;
  Bins bins;
};

// What stays the same from tile to tile. It is computed anew where it is needed, since it would
// take registers from the vectors of a thread.
struct TileThread {
  unsigned rank;    // of the block in its cluster
  int group;        // of the thread in its block
  bool active;      // has work in a step
  int element;      // of its vector in a step
  int row, column;  // the same, as channel and pixel
};

// A tile of the batch, and where its first pixel lies at channel 0.
struct TilePlace {
  unsigned image;
  int64_t first;  // pixel of the image
  int64_t offset;
  // Whether this thread's pixels exist: the last tile of an image may reach beyond it, and there is
  // no tile behind the last.
  bool inside;
};

// A thread's part of one unit in a tile: `steps` vectors, the first of them at `offset`.
struct UnitPart {
  int unit;
  int steps;
  int64_t offset;
};

// Vectors that a thread has copied to shared memory ahead of their use. No other thread reads them,
// so that they need no barrier, and the vectors of neighbouring threads lie side by side.
template <class T, int V>
struct Slots {
  unsigned char* own;
  PPCR_DEVICE Word<T, V>* at(int step) const {
    return reinterpret_cast<Word<T, V>*>(own + step * kThreads * kSlotBytes);
  }
};

template <class T, int V>
PPCR_DEVICE void add_word(const Word<T, V>& word, Acc<T> (&sum)[V]) {
  Acc<T> values[V];
  unpack<T, V>(word, values);
  PPCR_UNROLL
  for (int j = 0; j < V; ++j) sum[j] += values[j];
}

template <class T, int V, int STEPS, class Bins, Operation OP, Pass PASS>
struct ContiguousBlock {
  using A = Acc<T>;
  using Units = typename UnitsOf<Bins>::type;
  static constexpr int kStagedTensors = staged_tensors(OP, PASS, int(sizeof(T)) * V, STEPS);
  static constexpr int kWide = 16 / int(sizeof(A));  // values of an access to shared memory
  const Tensors<T>& tensors;
  const Tile& tile;
  const Units& units;
  const Bins& bins;
  const TileMemory memory;
  unsigned char* const slots;
  A* const values;
  Mbarrier* const barriers;  // two, used alternately, as are two copies of the parts
  int64_t stride;            // elements from one step to the next
  unsigned turn = 0;

  PPCR_DEVICE ContiguousBlock(const ContiguousArguments<T, Bins>& arguments, unsigned char* raw)
      : tensors(arguments.tensors),
        tile(arguments.tile),
        units(arguments.units),
        bins(arguments.bins),
        memory(tile_memory(tile, bins.contexts(), bins.segments(), OP, PASS)),
        slots(raw),
        values(reinterpret_cast<A*>(raw + kStagedTensors * STEPS * kThreads * kSlotBytes)),
        barriers(reinterpret_cast<Mbarrier*>(values)),
        stride(int64_t(tile.rows) * tile.image_pixels) {
    if (tile.cluster == 1) return;
    if (threadIdx.x == 0) init_barriers(barriers);
    cluster_arrive();  // no block sends to one that has not come here: see await_cluster
  }

  PPCR_DEVICE unsigned first_tile() const { return blockIdx.x >> tile.cluster_log2; }
  PPCR_DEVICE unsigned tile_stride() const { return gridDim.x >> tile.cluster_log2; }
  PPCR_DEVICE unsigned rank() const { return tile.cluster > 1 ? cluster_rank() : 0; }
  PPCR_DEVICE bool is_first() const { return tile.cluster == 1 || cluster_rank() == 0; }
  PPCR_DEVICE A* parameters() const { return values + memory.parameters; }
  PPCR_DEVICE A* sums() const { return values + memory.sums; }
  PPCR_DEVICE A* gates() const { return values + memory.pixels; }
  PPCR_DEVICE A* parts() const {
    return values + memory.parts + (tile.cluster > 1 ? int(turn & 1) * memory.part_values : 0);
  }
  PPCR_DEVICE Slots<T, V> slots_of(int tensor) const {
    return {slots + (tensor * STEPS * kThreads + int(threadIdx.x)) * kSlotBytes};
  }

  PPCR_DEVICE TileThread thread() const {
    TileThread thread;
    const int index = int(opaque(unsigned(threadIdx.x))), in_group = index & (tile.group - 1);
    thread.rank = rank();
    thread.group = index >> tile.group_log2;
    thread.element = in_group * V;
    thread.row = int(tile.by_q.quotient(unsigned(thread.element)));
    thread.column = thread.element - thread.row * tile.q;
    thread.active = in_group < tile.active;
    return thread;
  }
  PPCR_DEVICE TilePlace place(const TileThread& thread, unsigned index) const {
    TilePlace place;
    place.image = tile.by_image_tiles.quotient(index);
    place.first = int64_t(index - place.image * tile.image_tiles) * tile.q;
    place.offset = int64_t(place.image) * tile.image_elements + place.first;
    place.inside = index < tile.tiles && place.first + thread.column < tile.image_pixels;
    return place;
  }
  // The thread's part of a tile, in a round.
  PPCR_DEVICE UnitPart part_in(unsigned index, int round) const {
    const TileThread thread = this->thread();
    UnitPart part;
    part.unit = (round * tile.cluster + int(thread.rank)) * tile.groups + thread.group;
    const int left = units.count(part.unit) * tile.q - thread.element;
    part.steps = thread.active && left > 0
                     ? int(tile.by_step.quotient(unsigned(left + tile.rows * tile.q - 1)))
                     : 0;
    part.offset = int64_t(units.begin(part.unit) + thread.row) * tile.image_pixels + thread.column;
    const TilePlace place = this->place(thread, index);
    return {part.unit, place.inside ? part.steps : 0, place.offset + part.offset};
  }

  PPCR_DEVICE Word<T, V> load_step(const T* from, int step, const UnitPart& part) const {
    return load_if<T, V>(step < part.steps, from + part.offset + step * stride);
  }
  PPCR_DEVICE void copy_step(const Slots<T, V>& to, const T* from, int step,
                             const UnitPart& part) const {
    copy_async(to.at(step), from + part.offset + step * stride, step < part.steps);
  }
  // Adds steps that are not in registers to the sums.
  PPCR_DEVICE void sum_from_memory(const UnitPart& part, int from, A (&sum)[V]) const {
    PPCR_ROLLED
    for (int step = from; step < part.steps; step += kBatch) {
      Word<T, V> words[kBatch];
      PPCR_UNROLL
      for (int b = 0; b < kBatch; ++b) words[b] = load_step(tensors.x, step + b, part);
      PPCR_UNROLL
      for (int b = 0; b < kBatch; ++b) add_word<T, V>(words[b], sum);
    }
  }

  // Writes the sums of all rounds of a tile. `sum` holds the steps of the first round that were in
  // registers; add(part, from) adds the steps from `from` on to it.
  template <class Add>
  PPCR_DEVICE void write_sums(unsigned index, A (&sum)[V], Add add) const {
    if (tile.steps > STEPS) add(part_in(index, 0), STEPS);
    write_line(0, sum);
    if constexpr (!Units::kOneRound) {
      PPCR_ROLLED
      for (int round = 1; round < tile.rounds; ++round) {
        PPCR_UNROLL
        for (int j = 0; j < V; ++j) sum[j] = 0;
        add(part_in(index, round), 0);
        write_line(round, sum);
      }
    }
  }
  // V sums of a thread, side by side in the line of its group; each round has as many lines as
  // groups, and the dot products have them behind all rounds.
  PPCR_DEVICE void write_line(int round, const A (&sum)[V]) const {
    const TileThread thread = this->thread();
    const int line = round * tile.groups + thread.group;
    if (!thread.active) return;
    A* const to = sums() + line * tile.rows * tile.q + thread.element;
    if constexpr (V % kWide == 0) {
      PPCR_UNROLL
      for (int j = 0; j < V; j += kWide) {
        uint4 word;
        memcpy(&word, sum + j, sizeof word);
        *reinterpret_cast<uint4*>(to + j) = word;
      }
    } else {
      PPCR_UNROLL
      for (int j = 0; j < V; ++j) to[j] = sum[j];
    }
  }

  // No block of the cluster sends before all have initialized their barriers.
  PPCR_DEVICE void await_cluster() const {
    if (tile.cluster > 1) cluster_wait();
  }
  // parts[rank][line][pixel] = sum over the rows of a step of sums[line][row][pixel], of this block
  // for all blocks of its cluster. Where there are fewer columns than threads, neighbouring lanes
  // share one. Between blocks the values travel with a barrier that completes when all have come.
  PPCR_DEVICE void exchange_sums() const {
    __syncthreads();
    Mbarrier* const barrier = barriers + (turn & 1);
    const int lanes = 1 << tile.column_lanes_log2, lane = int(threadIdx.x) & (lanes - 1);
    const int count = memory.lines * tile.q;
    const unsigned own = rank();
    A* const to_parts = parts();
    if (tile.cluster > 1 && threadIdx.x == 0)
      expect_bytes(barrier, unsigned(count * tile.cluster * int(sizeof(A))));
    const int columns = kThreads >> tile.column_lanes_log2;
    const int warp_columns = kWarp >> tile.column_lanes_log2;
    const int end = (count + warp_columns - 1) & -warp_columns;  // whole warps, for the shuffles
    PPCR_ROLLED
    for (int i = int(threadIdx.x) >> tile.column_lanes_log2; i < end; i += columns) {
      A value = 0;
      if (i < count) {
        const int line = int(tile.by_q.quotient(unsigned(i)));
        const A* column = sums() + line * tile.rows * tile.q + (i - line * tile.q);
        PPCR_BY_FOUR
        for (int row = lane; row < tile.rows; row += lanes) value += column[row * tile.q];
      }
      value = sum_lanes(value, lanes);
      if (i >= count) continue;
      A* const part = to_parts + int(own) * count + i;
      if (tile.cluster == 1) {
        if (lane == 0) *part = value;
      } else {
        for (int to = lane; to < tile.cluster; to += lanes)
          cluster_send(part, value, unsigned(to), barrier);
      }
    }
    if (tile.cluster == 1) __syncthreads();
  }
  // Called by the threads that compute gates.
  PPCR_DEVICE void await_parts() const {
    if (tile.cluster > 1) wait_for(barriers + (turn & 1), turn >> 1 & 1);
  }
  PPCR_DEVICE A part_of(int from_rank, int line, int pixel) const {
    return parts()[(from_rank * memory.lines + line) * tile.q + pixel];
  }
  // The sums of every segment for one pixel, from all blocks, in the order of the units.
  PPCR_DEVICE void segment_sums(int pixel, A* sums) const {
    PPCR_UNROLL
    for (int k = 0; k < bins.segments(); ++k) {
      A sum = 0;
      PPCR_BY_TWO
      for (int unit = units.first(k); unit < units.first(k + 1); ++unit) {
        const int block = unit >> tile.groups_log2;  // round * cluster + rank
        const int round = Units::kOneRound ? 0 : block >> tile.cluster_log2;
        const int line = round * tile.groups + (unit & (tile.groups - 1));
        sum += part_of(block & (tile.cluster - 1), line, pixel);
      }
      sums[k] = sum;
    }
  }
  // The dot products of one pixel, from all groups of all blocks.
  PPCR_DEVICE A dot_sum(int pixel) const {
    A sum = 0;
    PPCR_BY_FOUR
    for (int group = 0; group < tile.cluster * tile.groups; ++group) {
      const int line = tile.rounds * tile.groups + (group & (tile.groups - 1));
      sum += part_of(group >> tile.groups_log2, line, pixel);
    }
    return sum;
  }

  // The values of a vector's pixels. A vector that straddles channels (q is then the whole image)
  // wraps to the first pixel of the image.
  PPCR_DEVICE void pixel_values(const A* row, int column, A (&of_pixels)[V]) const {
    if (V % kWide == 0 && !tile.straddles) {
      PPCR_UNROLL
      for (int j = 0; j + kWide <= V; j += kWide) {
        const uint4 word = *reinterpret_cast<const uint4*>(row + column + j);
        memcpy(of_pixels + j, &word, sizeof word);
      }
    } else {
      PPCR_UNROLL
      for (int j = 0; j < V; ++j)
        of_pixels[j] = row[column + j - (column + j >= tile.q ? tile.q : 0)];
    }
  }
};

}  // namespace ppcr::cuda
