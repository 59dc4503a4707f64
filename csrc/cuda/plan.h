// Chooses, from sizes alone, which kernel runs and how it cuts the tensor. Plain C++: tested
// without CUDA (tests/test_cuda_plan.py), and the same plans drive the kernels on a GPU and on the
// CPU (tests/cuda_on_cpu).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <string>

#include "forced_plan.h"
#include "units.h"

namespace ppcr::cuda {

struct DeviceLimits {
  int multiprocessors = 132;
  int max_cluster = 1;  // 8 where both the device and the compiled kernels know clusters (sm_90 on)
  int shared_bytes = 99 << 10;  // of a block, at most
};

struct Problem {
  int64_t images = 0, channels = 0, image_pixels = 0;
  bool pixel_major = false;
  int element_size = 4;
  int alignment = 16;  // bytes: what the addresses of all tensors are multiples of, at most 16
  Mode mode = Mode::kScale;
  bool backward = false;
  const Pooling* pooling = nullptr;
};

// The largest power of two, up to 16, that divides all addresses.
inline int common_alignment(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 16;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return static_cast<int>(bits & (~bits + 1));
}

enum class KernelKind : int { kChannelMajor, kPixelMajor, kPixelTile };

struct Plan {
  KernelKind kind = KernelKind::kChannelMajor;
  int vector = 1;      // elements per load
  int steps = 0;       // vectors that a thread holds (of each pixel, in the pixel-major kernel)
  int variant = -1;    // of kLaneVariants, pixel-major
  Tile tile{};         // channel-major
  int unit_count = 0;  // channel-major
  PixelTile pixel_tile{};
  bool staged = false;    // pixel tile
  int warp_pixels = 0;    // pixel-major
  int cluster_tiles = 0;  // channel-major: tiles of a cluster; 0: what comes to as many clusters as
                          // the device holds
  bool fixed_grid = false;  // channel-major: PPCR_PLAN says how many clusters there are
  bool early = false;       // kernels may be set up while the one before them ends
  int threads = kThreads;
  int64_t blocks = 0;
  int64_t partial_count = 0;  // per parameter
  int shared_bytes = 0;
  double score = 0;
  std::string error;  // why there is no plan
};

constexpr int64_t kMaxTiles =
    1 << 30;  // so that the number of a tile and of the next one stay below 2^31

// Vectors per thread for which channel-major kernels are compiled (0 ends the list). Standard bins:
// 8 keeps four blocks on a multiprocessor, 13 holds the tiles of 14x14 and 7x7 images in three.
struct StepChoices {
  int steps[2];
};
inline StepChoices step_choices(int vector, int element_size, Mode mode, bool standard) {
  if (mode == Mode::kGate) return {{8, 0}};
  if (vector == 1) return {{element_size == 8 ? 8 : 16, 0}};
  if (element_size == 8 || !standard) return {{8, 0}};
  return {{8, 13}};
}

inline int greatest_common_divisor(int a, int b) {
  while (b != 0) {
    const int rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// -------------------------------------------------------------------------------------------------------
// channel-major The grid. Blocks that the device starts one after the other, each for a tile or
// two, share the work evenly even where multiprocessors differ in speed. Against that stands what a
// cluster or a backward block costs to start and to end: with large tiles as many clusters as the
// device holds at once take all tiles in turn. Measured on an H200.
inline int tiles_of_cluster(Mode mode, bool backward, bool whole_image, int q, int cluster) {
  constexpr int kAsManyAsNeeded = 0;
  if (whole_image || (backward && q > 128)) return kAsManyAsNeeded;
  if (!backward) return mode == Mode::kAddRelu ? 2 : 1;
  return mode == Mode::kScale && cluster > 2 ? 4 : 2;
}

inline void set_clusters(Plan& plan, int64_t resident) {
  const int64_t tiles = plan.tile.tiles, most = std::max<int64_t>(1, std::min(resident, tiles));
  const int64_t even = ceil_div(
      tiles, ceil_div(tiles, most));  // of those that fit at once, every one with as many tiles
  plan.partial_count =
      plan.cluster_tiles == 0 ? even : std::max(even, ceil_div(tiles, plan.cluster_tiles));
  plan.blocks = plan.partial_count * plan.tile.cluster;
}

// A candidate: a plan for given q, vector, groups, cluster and steps, with its score, or score 0
// where it is impossible.
//
// The score orders plans by the share of the memory bandwidth that they reach: a product of named
// factors, each 1 at best, fitted to what an H200 measured for some hundred plans of every stage of
// a ResNet. PPCR_PLAN is there to measure more.
inline Plan channel_major_candidate(const Problem& problem, const DeviceLimits& device, int q,
                                    int vector, int groups, int cluster, int steps) {
  const Pooling& pooling = *problem.pooling;
  const bool standard = pooling.standard;
  const bool whole = q == problem.image_pixels;
  Plan plan;
  Tile& tile = plan.tile;
  plan.vector = vector;
  plan.steps = steps;
  plan.tile.q = q;
  tile.image_pixels = problem.image_pixels;
  tile.image_elements = problem.channels * problem.image_pixels;
  tile.groups = groups;
  tile.group = kThreads / groups;
  tile.cluster = cluster;

  const int round_units = groups * cluster;
  int64_t unit_channels;
  if (standard) {
    if (round_units % pooling.segments != 0 || problem.channels % round_units != 0) return plan;
    tile.rounds = 1;
    plan.unit_count = round_units;
    unit_channels = problem.channels / round_units;
  } else {
    tile.rounds = static_cast<int>(ceil_div(pooling.segments, round_units));
    plan.unit_count = tile.rounds * round_units;
    if (plan.unit_count > kMaxUnits) return plan;
    unit_channels = longest_unit(pooling, plan.unit_count);
  }

  // Rows of a step, and whether every vector lies within one unit and starts at a multiple of its
  // size.
  const int64_t fitting_rows = int64_t(tile.group) * vector / q;
  if (fitting_rows < 1 || q < vector) return plan;
  const bool straddles = q % vector != 0;
  if (straddles && !whole) return plan;
  if (!whole && problem.image_pixels % vector != 0) return plan;
  int64_t rows = std::min(fitting_rows, unit_channels);
  if (straddles) {
    const int whole_vectors =
        vector / greatest_common_divisor(q, vector);  // rows must be a multiple of this
    rows -= rows % whole_vectors;
    if (rows < 1) return plan;
    if (standard) {
      if (unit_channels % whole_vectors != 0) return plan;
    } else {
      const TableUnits units = table_units(pooling, plan.unit_count);
      for (int unit = 0; unit <= plan.unit_count; ++unit)
        if (units.edge[unit] % whole_vectors != 0) return plan;
    }
  }
  tile.rows = static_cast<int>(rows);
  tile.active = static_cast<int>(rows * q / vector);
  if (unit_channels * q >= (int64_t(1) << 30))
    return plan;  // the kernels count the elements of a unit in 32 bits
  const int64_t image_tiles = ceil_div(problem.image_pixels, q);
  if (image_tiles > kMaxBlocks) return plan;
  tile.image_tiles = static_cast<unsigned>(image_tiles);
  if (problem.images * image_tiles > kMaxTiles) return plan;
  tile.tiles = static_cast<unsigned>(problem.images * image_tiles);
  tile.steps = static_cast<int>(ceil_div(unit_channels, rows));
  tile.group_log2 = log2_of(tile.group);
  tile.groups_log2 = log2_of(groups);
  tile.cluster_log2 = log2_of(cluster);
  tile.straddles = straddles;
  tile.by_q = divider(unsigned(q));
  tile.by_step = divider(unsigned(rows * q));
  tile.by_image_tiles = divider(tile.image_tiles);
  const int lines =
      tile_memory(tile, pooling.contexts, pooling.segments, problem.mode, problem.backward).lines;
  while (tile.column_lanes_log2 < 3 && lines * q << (tile.column_lanes_log2 + 1) <= kThreads &&
         2 << tile.column_lanes_log2 <= rows)
    ++tile.column_lanes_log2;
  const int accumulator = problem.element_size == 8 ? 8 : 4;
  const int64_t slots =
      int64_t(slot_streams(problem.mode, problem.backward, vector * problem.element_size, steps)) *
      steps * kThreads * kSlotBytes;
  const int64_t shared =
      slots + int64_t(accumulator) * tile_memory(tile, pooling.contexts, pooling.segments,
                                                 problem.mode, problem.backward)
                                         .total;
  if (shared > device.shared_bytes) return plan;
  plan.shared_bytes = static_cast<int>(shared);

  const bool gate = problem.mode == Mode::kGate, added = problem.mode == Mode::kAddRelu;
  const double unit_steps = double(ceil_div(unit_channels, rows));
  const double held_steps = gate ? unit_steps : std::min<double>(steps, unit_steps);
  const double tensor_bytes =
      double(problem.images) * double(tile.image_elements) * problem.element_size;

  // What the registers do not hold crosses the bus again (part of it may be found in the L2: not
  // counted on).
  const double units =
      gate ? 1 + problem.backward : (added ? 3 : 2) + problem.backward * (added ? 2 : 1);
  const double again =
      gate ? 0 : (1 + (added && problem.backward)) * (1 - held_steps / (unit_steps * tile.rounds));
  const double once = units / (units + again) * (again > 0 ? 0.9 : 1);

  const double threads_busy =
      double(tile.active) / tile.group * double(unit_channels) / (unit_steps * double(rows));
  const double pixels_busy = double(problem.image_pixels) / (double(image_tiles) * q);

  // Bytes that a step reads without a gap: 128 fill a line, 32 a sector.
  const double run = double(whole ? unit_channels * q : q) * problem.element_size;
  const double long_runs = run >= 512   ? 1
                           : run >= 256 ? 0.99 + 0.01 * (run - 256) / 256
                           : run >= 128 ? 0.95 + 0.04 * (run - 128) / 128
                           : run >= 64  ? 0.86 + 0.09 * (run - 64) / 64
                           : run >= 32  ? 0.65 + 0.21 * (run - 32) / 32
                                        : run * 0.65 / 32;
  // A run that starts inside a sector moves that sector twice, and writes a part of it.
  const bool aligned =
      problem.image_pixels * problem.element_size % 32 == 0 && q * problem.element_size % 32 == 0;
  const double sectors = aligned ? 1 : run / (run + 48);

  double cluster_cost = 1;
  for (int blocks = 1; blocks < cluster; blocks *= 2) cluster_cost *= 0.985;

  // Full tiles hide the latency of everything between their loads and their stores; a second block
  // on the multiprocessor, too.
  const double full = 0.4 + 0.6 * held_steps / steps;
  const int by_registers = channel_major_blocks(vector, steps * vector * problem.element_size,
                                                problem.mode, problem.backward);
  const int by_memory = static_cast<int>((device.shared_bytes + 1024) / (shared + 1024));
  const int resident = std::max(1, std::min(by_registers, by_memory));
  const double company = resident > 1 ? 1 : 0.88;

  // Small tensors: every multiprocessor should have a block.
  const double busy = std::min(1., double(tile.tiles) * cluster / device.multiprocessors);
  const double spread = tensor_bytes < (16 << 20) ? 0.5 + 0.5 * busy : 1;

  plan.cluster_tiles = tiles_of_cluster(problem.mode, problem.backward, whole, q, cluster);
  set_clusters(plan, int64_t(resident) * device.multiprocessors / cluster);

  // dweight and dbias are summed from a share per cluster: under 1 % of the traffic, or rather
  // another tile.
  const double share =
      2. * double(plan.partial_count) * (pooling.contexts + 1) * accumulator / tensor_bytes;
  const double partials = problem.backward && share > 0.01 ? 0.7 : 1;

  plan.score = partials * once * threads_busy * std::sqrt(pixels_busy) * long_runs * sectors *
               cluster_cost * full * company * spread;
  return plan;
}

inline Plan plan_channel_major(const Problem& problem, const DeviceLimits& device,
                               const Forced& forced) {
  const bool standard = problem.pooling->standard;
  Plan best;
  const auto consider = [&](int64_t q, int vector) {
    if (q < 1 || q > problem.image_pixels || q > 4096 || (forced.q != 0 && q != forced.q)) return;
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2)
      for (int groups = 1; groups <= kMaxGroups; groups *= 2) {
        if ((forced.cluster != 0 && cluster != forced.cluster) ||
            (forced.groups != 0 && groups != forced.groups))
          continue;
        for (const int steps :
             step_choices(vector, problem.element_size, problem.mode, standard).steps) {
          if (steps == 0 || (forced.steps != 0 && steps != forced.steps)) continue;
          const Plan plan = channel_major_candidate(problem, device, static_cast<int>(q), vector,
                                                    groups, cluster, steps);
          if (plan.score > best.score) best = plan;
        }
      }
  };
  for (const int bytes : {16, 8, 1}) {
    // 16 bytes; 8 where 16-bit elements are aligned no better; single elements, which always work.
    const int vector = bytes == 1 ? 1 : bytes / problem.element_size;
    if (bytes == 8 && problem.element_size != 2) continue;
    if (vector * problem.element_size > problem.alignment ||
        (forced.vector != 0 && vector != forced.vector))
      continue;
    consider(problem.image_pixels, vector);
    for (int64_t run = 32; run <= 2048; run *= 2)
      consider(run / problem.element_size / vector * vector, vector);
    for (int pieces = 2; pieces <= 32; ++pieces)
      consider(ceil_div(ceil_div(problem.image_pixels, pieces), vector) * vector, vector);
    consider(vector, vector);
    if (forced.q != 0) consider(forced.q, vector);
    if (best.score > 0.15) break;  // narrower vectors would not do better
  }
  best.kind = KernelKind::kChannelMajor;
  best.fixed_grid = forced.clusters != 0;
  if (best.fixed_grid) {
    best.cluster_tiles = 0;
    set_clusters(best, forced.clusters);
  }
  if (best.score == 0)
    best.error = "no plan fits a channel-major tensor of these sizes in one launch";
  return best;
}

// ---------------------------------------------------------------------------------------------------------
// pixel-major Fewer warps per block while there are multiprocessors without a block, but (backward)
// no more blocks than keep the shares of dweight and dbias, one per block, under 1 % of the
// traffic.
inline int warps_for(const Problem& problem, int warp_pixels, const DeviceLimits& device) {
  const int64_t pixels = problem.images * problem.image_pixels;
  const double pixel_bytes = double(problem.channels) * problem.element_size;
  const double shares =
      problem.backward ? 2. * (problem.pooling->contexts + 1) * (problem.element_size == 8 ? 8 : 4)
                       : 0;
  int warps = kThreads / kWarp;
  while (warps > 1 &&
         ceil_div(pixels, int64_t(warps) * warp_pixels) < 2 * int64_t(device.multiprocessors) &&
         shares < 0.01 * pixel_bytes * warp_pixels * (warps / 2))
    warps /= 2;
  return warps;
}

// Lanes and registers: standard bins whose segments are whole 16-byte vectors.
inline Plan plan_lanes(const Problem& problem, const DeviceLimits& device, const Forced& forced) {
  const Pooling& pooling = *problem.pooling;
  const int vector = 16 / problem.element_size, accumulator = problem.element_size == 8 ? 8 : 4;
  Plan plan;
  if (!pooling.standard || problem.mode == Mode::kGate || problem.alignment < 16 ||
      problem.channels % (4 * vector) != 0)
    return plan;
  for (int i = 0; i < kLaneVariantCount; ++i) {
    const LaneVariant variant = kLaneVariants[i];
    if (!has_lane_variant(variant, problem.element_size)) continue;
    if (int64_t(variant.lanes / 4) * variant.steps * vector < pooling.edge[1]) continue;
    if (forced.variant >= 0 && i != forced.variant) continue;
    plan.kind = KernelKind::kPixelMajor;
    plan.variant = i;
    plan.vector = vector;
    plan.steps = variant.steps;
    plan.warp_pixels = kWarp / variant.lanes * variant.pixels;
    const int warps = forced.warps != 0 ? std::min(forced.warps, kThreads / kWarp)
                                        : warps_for(problem, plan.warp_pixels, device);
    plan.threads = warps * kWarp;
    plan.shared_bytes = accumulator * lanes_memory(warps, plan.warp_pixels, pooling.contexts,
                                                   pooling.segments, problem.backward);
    plan.blocks =
        ceil_div(problem.images * problem.image_pixels, int64_t(warps) * plan.warp_pixels);
    plan.score = 1;
    break;
  }
  return plan;
}

// Everything else: tiles in shared memory.
inline Plan plan_pixel_tile(const Problem& problem, const DeviceLimits& device,
                            const Forced& forced) {
  constexpr int64_t kTileBytes = 16
                                 << 10;  // of one tensor: what the threads of a block read at once
  constexpr int kSharedBytes =
      56 << 10;  // at most, where it can be helped: four blocks on a multiprocessor
  const Pooling& pooling = *problem.pooling;
  const int64_t pixels = problem.images * problem.image_pixels,
                pixel_bytes = problem.channels * problem.element_size;
  Plan plan;
  PixelTile& tile = plan.pixel_tile;
  plan.kind = KernelKind::kPixelTile;
  tile.pixels = pixels;
  tile.channels = static_cast<int>(problem.channels);
  const int64_t segment = problem.channels / pooling.segments;
  while (tile.lanes_log2 < 5 && (int64_t(2) << tile.lanes_log2) <= segment) ++tile.lanes_log2;
  for (int k = 0; k <= pooling.segments; ++k) tile.edge[k] = static_cast<int>(pooling.edge[k]);
  const auto shared = [&](int64_t q, bool staged) {
    tile.q = static_cast<int>(q);
    return pixel_tile_memory(tile, pooling.contexts, pooling.segments, problem.element_size,
                             problem.mode, problem.backward, staged)
        .total;
  };
  const auto fits = [&](int64_t q, int64_t limit) {
    return q * pixel_bytes < (1 << 29) && shared(q, true) <= limit;
  };

  // So many pixels are whole vectors, and then every tile starts at one.
  int64_t whole = 1;
  while (whole * pixel_bytes % 16 != 0) whole *= 2;
  tile.vector = 16 / problem.element_size;
  if (problem.alignment < 16 || forced.vector == 1 || !fits(whole, device.shared_bytes))
    tile.vector = static_cast<int>(whole = 1);
  int64_t q = std::min<int64_t>(
      kThreads, forced.q != 0 ? forced.q : std::max<int64_t>(1, kTileBytes / pixel_bytes));
  q = std::max(whole, q / whole * whole);
  const auto half = [&] { return std::max(whole, q / 2 / whole * whole); };
  plan.staged = fits(q, device.shared_bytes);
  if (!plan.staged) q = std::max(1, (kThreads >> tile.lanes_log2) / pooling.segments);
  if (plan.staged && forced.q == 0) {
    while (q > whole && !fits(q, kSharedBytes)) q = half();
    // Smaller tiles while there are multiprocessors without a block, but (backward) no more than
    // keep the shares of dweight and dbias under 1 % of the traffic.
    const double shares =
        problem.backward ? 2. * (pooling.contexts + 1) * (problem.element_size == 8 ? 8 : 4) : 0;
    while (q > whole && ceil_div(pixels, q) < 2 * int64_t(device.multiprocessors) &&
           shares < 0.01 * double(pixel_bytes * half()))
      q = half();
  }
  if (!plan.staged && forced.q != 0) plan.error = "that tile does not fit into shared memory";
  plan.vector = tile.vector;
  plan.shared_bytes = shared(q, plan.staged);
  plan.blocks = ceil_div(pixels, q);
  plan.score = 1;
  return plan;
}

inline Plan plan_pixel_major(const Problem& problem, const DeviceLimits& device,
                             const Forced& forced) {
  Plan plan;
  if (forced.vector != 1 && forced.q == 0) plan = plan_lanes(problem, device, forced);
  if (plan.score == 0 && forced.variant < 0) plan = plan_pixel_tile(problem, device, forced);
  plan.partial_count = plan.blocks;
  if (plan.score == 0) plan.error = "that variant does not fit";
  if (plan.blocks > kMaxBlocks) plan.error = "x has too many pixels for one launch";
  return plan;
}

inline Plan make_plan(const Problem& problem, const DeviceLimits& device,
                      const char* forced_text = nullptr) {
  const Forced forced = parse_forced(forced_text);
  Plan plan;
  if (!forced.error.empty()) {
    plan.error = forced.error;
  } else if (problem.channels > 0x7fffffff) {
    plan.error = "the CUDA kernels take at most 2147483647 channels";
  } else {
    const bool pixel_major =
        problem.pixel_major || problem.image_pixels == 1;  // of one pixel both layouts are the same
    plan = pixel_major ? plan_pixel_major(problem, device, forced)
                       : plan_channel_major(problem, device, forced);
    plan.early = device.max_cluster > 1;  // sm_90 on, as clusters are
    if (!plan.error.empty() && forced_text != nullptr)
      plan.error += std::string(" with PPCR_PLAN=") + forced_text;
  }
  return plan;
}

}  // namespace ppcr::cuda
