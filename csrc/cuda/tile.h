// How the kernels cut a tensor: plain structs that the planner fills and the kernels read. No CUDA,
// no torch.
#pragma once
#include <type_traits>

#include "../ppcr_pixel.h"

namespace ppcr::cuda {

constexpr int kThreads = 256;  // threads of a block, at most
constexpr int kWarp = 32, kWarpLog2 = 5;
constexpr int kMaxCluster = 8;  // blocks of a cluster: the portable limit
constexpr int kMaxGroups = 8;   // groups of threads in a block of the contiguous kernels
constexpr int kMaxUnits = 256;  // units of a TableUnits
constexpr int kTileWarps = kThreads / kWarp;
constexpr int kSlotBytes = 16;  // of a vector that a thread copies ahead of its use

PPCR_HD constexpr int accumulator_size(int element_size) { return element_size == 8 ? 8 : 4; }

// Division of numbers below 2^31 by a constant, which the host makes a multiplication and a shift.
struct Divider {
  unsigned multiplier, shift;
  PPCR_HD unsigned quotient(unsigned n) const {
    return (static_cast<unsigned>((static_cast<uint64_t>(n) * multiplier) >> 32) + n) >> shift;
  }
};
inline Divider divider(unsigned divisor) {
  unsigned shift = 0;
  while (shift < 31 && (1u << shift) < divisor) ++shift;
  return {static_cast<unsigned>(
              ((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1),
          shift};
}

// ---- contiguous layout

// Shared memory of a block of the contiguous kernels, in values of the accumulation type, behind
// the slots. A line is what one group sums in one round: a line per unit for the segment sums and,
// in the backward pass, a line per group for sum_c gy_c x_c.
struct TileMemory {
  int parameters;  // weights, bias; before them two barriers
  int sums;        // [lines][rows * q]: what each thread summed
  int parts;       // [units, then groups][q]: sums over the rows of a step; two copies in a cluster
  int pixels;  // [values][q]: gate; backward also dsum of each segment, dz n_l of each context, dz
  int lines;
  int part_values;  // of one copy of the parts
  int total;
};

// A tile is q neighbouring pixels of one image with all their channels; a cluster of blocks works
// on it, and on every so many tiles after it. The channels are cut into units, each inside one
// segment; a group of threads runs one unit per round. In one step a group reads `rows` channels of
// q pixels, V elements per thread. Where q is the whole image, channels follow each other without a
// gap, so that a vector may straddle two channels: that is how 7x7 images are read in 16-byte
// vectors.
struct Tile {
  int64_t image_pixels;    // pixels of an image
  int64_t image_elements;  // channels * image_pixels
  unsigned image_tiles;    // tiles that cover an image
  unsigned tiles;          // of all images
  int q;                   // pixels of a tile
  int rows;                // channels of a step
  int active;              // threads of a group that have work: rows * q / V
  int group;               // threads of a group
  int groups;              // groups of a block
  int cluster;             // blocks of a cluster
  int rounds;              // units that each group runs, one after another
  int steps;               // of the longest unit
  int last_step;           // elements of its last step, at most rows * q
  int group_log2, groups_log2, cluster_log2;
  int column_lanes_log2;                  // lanes that share a column where a block sums its rows
  bool wraps_wide;                        // a row of q values is whole 16-byte words
  Divider by_q, by_step, by_image_tiles;  // by_step: rows * q
  TileMemory memory;
};

// Standard bins: four equal segments, each of 2^per_segment_log2 equal units; as many groups as
// units.
struct EqualUnits {
  static constexpr bool kOneRound = true;
  int channels;  // of a unit
  int per_segment_log2;
  PPCR_HD int begin(int unit) const { return unit * channels; }
  PPCR_HD int count(int) const { return channels; }
  PPCR_HD int segment(int unit) const { return unit >> per_segment_log2; }
  // Of the thread whose vector lies so many elements behind the first of a step.
  PPCR_HD int steps(const Tile& tile, int, int element) const {
    return tile.steps - (element >= tile.last_step);
  }
  PPCR_HD int first(int segment) const { return segment << per_segment_log2; }  // unit of a segment
};

// Any bins: segments of any length. Units beyond the last one are empty.
struct TableUnits {
  static constexpr bool kOneRound = false;
  int edge[kMaxUnits + 1];  // unit u holds channels edge[u] .. edge[u+1]-1
  uint8_t segment_of[kMaxUnits];
  uint16_t first_of[kMaxSegments + 1];
  PPCR_HD int begin(int unit) const { return edge[unit]; }
  PPCR_HD int count(int unit) const { return edge[unit + 1] - edge[unit]; }
  PPCR_HD int segment(int unit) const { return segment_of[unit]; }
  PPCR_HD int steps(const Tile& tile, int unit, int element) const {
    const int left = count(unit) * tile.q - element;
    return left > 0 ? int(tile.by_step.quotient(unsigned(left + tile.rows * tile.q - 1))) : 0;
  }
  PPCR_HD int first(int segment) const { return first_of[segment]; }
};

template <class Bins>
using UnitsOf = std::conditional_t<Bins::kStandard, EqualUnits, TableUnits>;

// Blocks per multiprocessor to compile for: what the cached words leave of 65536 registers.
constexpr int contiguous_blocks(int cached_bytes, Operation operation, Pass pass) {
  const bool few = cached_bytes <= 128, added = operation == Operation::kAddRelu;
  if (operation == Operation::kGate) return is_backward(pass) ? 3 : 4;
  if (!is_backward(pass)) return (few ? 4 : 3) - added;
  if (added && !few) return 1;  // as many as the slots in shared memory leave room for
  return few && !added ? 3 : 2;
}

// Tensors that the contiguous kernels copy to shared memory ahead of their use, only in whole
// vectors of 16 bytes: x; of add_relu also the residual, or y; and gy where that leaves room for
// two blocks on a multiprocessor.
PPCR_HD constexpr bool grad_ahead(Operation operation, int steps) {
  return operation == Operation::kPpcr && steps <= 8;
}
PPCR_HD constexpr int staged_tensors(Operation operation, Pass pass, int vector_bytes, int steps) {
  if (vector_bytes != kSlotBytes || operation == Operation::kGate) return 0;
  return 1 +
         (operation == Operation::kAddRelu || (is_backward(pass) && grad_ahead(operation, steps)));
}

// Rounded up to whole 16 bytes, for what follows.
PPCR_HD int whole_vectors(int values) { return (values + 3) / 4 * 4; }
PPCR_HD int parameter_slots(int contexts) { return whole_vectors(contexts + 1); }

PPCR_HD TileMemory tile_memory(const Tile& tile, int contexts, int segments, Operation operation,
                               Pass pass) {
  const bool dots = is_backward(pass) && operation != Operation::kGate;
  TileMemory memory;
  memory.lines = tile.groups * (tile.rounds + (dots ? 1 : 0));
  memory.parameters = 4;
  memory.sums = memory.parameters + parameter_slots(contexts);
  memory.parts = memory.sums + whole_vectors(memory.lines * tile.rows * tile.q);
  memory.part_values = whole_vectors(memory.lines * tile.q * tile.cluster);
  memory.pixels = memory.parts + memory.part_values * (tile.cluster > 1 ? 2 : 1);
  memory.total = memory.pixels + (is_backward(pass) ? 2 + segments + contexts : 1) * tile.q;
  return memory;
}

// ---- channels_last layout

// Standard bins: `lanes` lanes of a warp share a pixel, a quarter of them each segment; every lane
// holds `steps` vectors of each of `pixels` pixels. These variants are compiled, smallest first.
struct LaneVariant {
  int lanes, steps, pixels;
};
constexpr LaneVariant kLaneVariants[] = {{4, 1, 4},  {8, 1, 4},  {16, 1, 4}, {32, 1, 4},
                                         {32, 2, 2}, {32, 4, 2}, {32, 8, 1}, {32, 16, 1}};
constexpr int kLaneVariantCount = sizeof(kLaneVariants) / sizeof(kLaneVariants[0]);

// A double takes two registers: 16 steps of them would spill.
constexpr bool has_lane_variant(const LaneVariant& variant, int element_size) {
  return variant.steps < 16 || element_size < 8;
}

constexpr int lane_blocks(int element_size, int cached_bytes, Operation operation, Pass pass) {
  const bool backward = is_backward(pass), added = operation == Operation::kAddRelu;
  if (cached_bytes > 128) return backward || added || element_size < 4 ? 1 : 2;
  return cached_bytes > 64 ? 2 : backward ? 3 : 4;
}

// The gate alone, standard bins: a lane reads one vector of each of so many pixels at a time.
constexpr int kGatePixels = 4, kGateBlocks = 4;

struct Lanes {
  int64_t pixels;  // of the whole tensor
  int64_t channels;
  int segment;  // channels of a segment
};

// Any bins, any number of channels, any alignment: a block owns q neighbouring pixels; 2^lanes_log2
// lanes share a segment.
struct SharedTile {
  int64_t pixels;  // of the whole tensor
  int channels;
  int q;       // at most kThreads
  int vector;  // elements of an access to global memory
  int lanes_log2;
  int edge[kMaxSegments + 1];
};

// Tensors of which a block of the tile needs every element twice: x, and the residual (forward) or
// gy (backward).
PPCR_HD constexpr int shared_tensors(Operation operation, Pass pass) {
  return 1 +
         (operation == Operation::kAddRelu || (is_backward(pass) && operation == Operation::kPpcr));
}

// Words of a pixel's sums: odd, against bank conflicts.
PPCR_HD int tile_row(int segments) { return segments | 1; }

// Shared memory of a block of the tile, in bytes. The elements come first, where 16-byte vectors
// want them.
struct SharedTileMemory {
  int second, parameters, sums, dots, gates, shares, edges, total;
};
PPCR_HD SharedTileMemory shared_tile_memory(const SharedTile& tile, int contexts, int segments,
                                            int element_size, Operation operation, Pass pass,
                                            bool staged) {
  const int accumulator = accumulator_size(element_size);
  const int elements = staged ? (tile.q * tile.channels * element_size + 15) / 16 * 16 : 0;
  const int sums = tile.q * tile_row(segments) * accumulator;
  SharedTileMemory memory;
  memory.second = elements;
  memory.parameters = shared_tensors(operation, pass) * elements;
  memory.sums = memory.parameters + parameter_slots(contexts) * accumulator;
  memory.dots = memory.sums + sums;
  memory.gates = memory.dots + (is_backward(pass) && operation != Operation::kGate ? sums : 0);
  memory.shares = memory.gates + tile.q * accumulator;
  memory.edges =
      memory.shares + (is_backward(pass) ? (contexts + 1) * kTileWarps * accumulator : 0);
  memory.total = memory.edges + (segments + 1) * int(sizeof(int));
  return memory;
}

// Values of shared memory: parameters, then what each warp has to itself, then (backward) the
// warps' parameter gradients.
PPCR_HD int lanes_warp_values(int warp_pixels, int segments, Pass pass) {
  return warp_pixels * (segments + 1 + (is_backward(pass) ? 0 : 1));
}
PPCR_HD int lanes_memory(int warps, int warp_pixels, int contexts, int segments, Pass pass) {
  return parameter_slots(contexts) + warps * lanes_warp_values(warp_pixels, segments, pass) +
         (is_backward(pass) ? (contexts + 1) * warps : 0);
}

}  // namespace ppcr::cuda
