// Where a thread of the channel-major kernels works, and how the sums of a tile come together.
#pragma once
#include "device_common.cuh"

namespace ppcr::cuda {

// What does not change from round to round.
struct TileThread {
  unsigned tile;    // over the whole batch
  unsigned rank;    // of the block in its cluster
  int group;        // of the thread in its block
  bool active;      // has work in a step
  bool inside;      // its pixels exist (the last tile of an image may reach beyond it)
  int element;      // of its vector in a step
  int row, column;  // the same, as channel and pixel
  int64_t first;    // of the tile's pixels, in the image
  int64_t offset;   // of its first pixel at channel 0
};

template <int V>
PPCR_DEVICE TileThread tile_thread(const Tile& tile) {
  TileThread thread;
  const int index = int(threadIdx.x);
  thread.group = index / tile.group;
  const int in_group = index - thread.group * tile.group;
  // Divisions of 32 bits: those of 64 are long routines, and the number of tiles fits.
  thread.rank = tile.cluster > 1 ? cluster_rank() : 0;
  thread.tile = blockIdx.x / unsigned(tile.cluster);
  const unsigned image = thread.tile / tile.image_tiles;
  thread.first = int64_t(thread.tile - image * tile.image_tiles) * tile.q;
  thread.element = in_group * V;
  thread.row = thread.element / tile.q;
  thread.column = thread.element - thread.row * tile.q;
  thread.active = in_group < tile.active;
  thread.inside = thread.active && thread.first + thread.column < tile.image_pixels;
  thread.offset = int64_t(image) * tile.image_elements + thread.first + thread.column;
  return thread;
}

// A thread's part of one unit: `steps` vectors, `hop` elements apart.
struct UnitPart {
  int unit;
  int steps;
  int64_t offset;
};

template <class Units>
PPCR_DEVICE UnitPart unit_part(const Tile& tile, const Units& units, const TileThread& thread, int round) {
  UnitPart part;
  part.unit = (round * tile.cluster + int(thread.rank)) * tile.groups + thread.group;
  const int stride = tile.rows * tile.q;
  const int left = units.count(part.unit) * tile.q - thread.element;
  part.steps = thread.inside && left > 0 ? (left + stride - 1) / stride : 0;
  part.offset = thread.offset + int64_t(units.begin(part.unit) + thread.row) * tile.image_pixels;
  return part;
}

PPCR_DEVICE int64_t step_hop(const Tile& tile) { return int64_t(tile.rows) * tile.image_pixels; }

PPCR_DEVICE void block_or_cluster_sync(const Tile& tile) {
  if (tile.cluster > 1)
    cluster_sync();
  else
    __syncthreads();
}

// parts[line][pixel] = sum over the rows of a step of sums[line][row][pixel]
template <class A>
PPCR_DEVICE void sum_rows(const Tile& tile, int lines, const A* sums, A* parts) {
  for (int i = int(threadIdx.x); i < lines * tile.q; i += int(blockDim.x)) {
    const int line = i / tile.q;
    const A* column = sums + line * tile.rows * tile.q + (i - line * tile.q);
    A value = 0;
    for (int row = 0; row < tile.rows; ++row) value += column[row * tile.q];
    parts[i] = value;
  }
}

template <class A>
PPCR_DEVICE A part_of(const Tile& tile, const A* parts, int line, int rank, int pixel) {
  const A* part = parts + line * tile.q + pixel;
  return tile.cluster > 1 ? cluster_load(part, unsigned(rank)) : *part;
}

// The sums of every segment for one pixel, from all blocks of the cluster, in the order of the units.
template <class A, class Units, class Bins>
PPCR_DEVICE void segment_sums(const Tile& tile, const Units& units, const Bins& bins, const A* parts, int pixel, A* sums) {
  const int round_units = tile.cluster * tile.groups;
  PPCR_UNROLLED
  for (int k = 0; k < bins.segments(); ++k) {
    A sum = 0;
    PPCR_ROLLED
    for (int unit = units.first(k); unit < units.first(k + 1); ++unit) {
      const int round = Units::kOneRound ? 0 : unit / round_units;
      const int in_round = unit - round * round_units, rank = in_round / tile.groups;
      sum += part_of(tile, parts, round * tile.groups + in_round - rank * tile.groups, rank, pixel);
    }
    sums[k] = sum;
  }
}

// A vector that straddles channels (q is then the whole image) wraps to the image's first pixel.
template <int V, class A>
PPCR_DEVICE void pixel_values(const Tile& tile, const A* row, int column, A (&values)[V]) {
  PPCR_UNROLLED
  for (int j = 0; j < V; ++j) values[j] = row[column + j - (column + j >= tile.q ? tile.q : 0)];
}

}  // namespace ppcr::cuda
