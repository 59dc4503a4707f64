// Chooses, from sizes alone, which kernel runs and how it cuts the tensor. Plain C++: tested
// without CUDA (tests/test_cuda_plan.py), and the same plans drive the kernels on a GPU and on the
// CPU (tests/cuda_on_cpu).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <numeric>
#include <string>

#include "forced_plan.h"
#include "units.h"

namespace ppcr::cuda {

struct DeviceLimits {
  int multiprocessors = 132;
  int max_cluster = 1;  // 8 where both the device and the compiled kernels know clusters (sm_90 on)
  int shared_bytes = 99 << 10;  // of a block, at most
};

struct Workload {
  int64_t images = 0, channels = 0, image_pixels = 0;
  bool channels_last = false;
  int element_size = 4;
  int alignment = 16;  // bytes: what the addresses of all tensors are multiples of, at most 16
  Operation operation = Operation::kPpcr;
  Pass pass = Pass::kForward;
  const Pooling* pooling = nullptr;
};

// The largest power of two, up to 16, that divides all addresses.
inline int common_alignment(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 16;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return static_cast<int>(bits & (~bits + 1));
}

// In the gate's passes the tensors of one value per pixel are read and written singly, at any
// address.
inline int alignment_of(Operation operation, const TensorPointers& tensors) {
  if (operation == Operation::kGate) return common_alignment({tensors.x, tensors.dx});
  return common_alignment(
      {tensors.x, tensors.grad, tensors.residual, tensors.y, tensors.dx, tensors.d_residual});
}

enum class Method : int { kContiguousPipelined, kChannelsLastRegisters, kChannelsLastShared };

struct Plan {
  Method method = Method::kContiguousPipelined;
  int vector = 1;      // elements per load
  int steps = 0;       // vectors that a thread holds (of each pixel, in the channels_last kernel)
  int variant = -1;    // of kLaneVariants, channels_last
  Tile tile{};         // contiguous
  int unit_count = 0;  // contiguous
  SharedTile shared_tile{};
  bool staged = false;      // pixel tile
  int warp_pixels = 0;      // channels_last
  int cluster_tiles = 0;    // contiguous: tiles of a cluster; 0: what comes to as many clusters as
                            // the device holds
  bool fixed_grid = false;  // contiguous: PPCR_PLAN says how many clusters there are
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

// Vectors per thread for which contiguous kernels are compiled (0 ends the list). Standard bins:
// 8 keeps four blocks on a multiprocessor, 13 holds the tiles of 14x14 and 7x7 images in three.
struct StepChoices {
  int steps[2];
};
inline StepChoices step_choices(int vector, int element_size, Operation operation, bool standard) {
  if (operation == Operation::kGate) return {{8, 0}};
  if (vector == 1) return {{element_size == 8 ? 8 : 16, 0}};
  if (element_size == 8 || !standard) return {{8, 0}};
  return {{8, 13}};
}

// ---- contiguous

// The grid. Blocks that the device starts one after the other, each for a tile or
// two, share the work evenly even where multiprocessors differ in speed. Against that stands what a
// cluster or a backward block costs to start and to end: with large tiles as many clusters as the
// device holds at once take all tiles in turn. Measured on an H200.
inline int tiles_of_cluster(Operation operation, Pass pass, bool whole_image, int q, int cluster) {
  constexpr int kAsManyAsNeeded = 0;
  if (whole_image || (is_backward(pass) && q > 128)) return kAsManyAsNeeded;
  if (!is_backward(pass)) return operation == Operation::kAddRelu ? 2 : 1;
  return operation == Operation::kPpcr && cluster > 2 ? 4 : 2;
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
inline Plan contiguous_candidate(const Workload& workload, const DeviceLimits& device, int q,
                                 int vector, int groups, int cluster, int steps) {
  const Pooling& pooling = *workload.pooling;
  const bool standard = pooling.standard;
  const bool whole = q == workload.image_pixels;
  Plan plan;
  Tile& tile = plan.tile;
  plan.vector = vector;
  plan.steps = steps;
  plan.tile.q = q;
  tile.image_pixels = workload.image_pixels;
  tile.image_elements = workload.channels * workload.image_pixels;
  tile.groups = groups;
  tile.group = kThreads / groups;
  tile.cluster = cluster;

  const int round_units = groups * cluster;
  int64_t unit_channels;
  if (standard) {
    if (round_units % pooling.segments != 0 || workload.channels % round_units != 0) return plan;
    tile.rounds = 1;
    plan.unit_count = round_units;
    unit_channels = workload.channels / round_units;
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
  if (!whole && workload.image_pixels % vector != 0) return plan;
  int64_t rows = std::min(fitting_rows, unit_channels);
  if (straddles) {
    const int whole_vectors = vector / std::gcd(q, vector);  // rows must be a multiple of this
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
  const int64_t image_tiles = ceil_div(workload.image_pixels, q);
  if (image_tiles > kMaxBlocks) return plan;
  tile.image_tiles = static_cast<unsigned>(image_tiles);
  if (workload.images * image_tiles > kMaxTiles) return plan;
  tile.tiles = static_cast<unsigned>(workload.images * image_tiles);
  tile.steps = static_cast<int>(ceil_div(unit_channels, rows));
  tile.group_log2 = log2_of(tile.group);
  tile.groups_log2 = log2_of(groups);
  tile.cluster_log2 = log2_of(cluster);
  tile.straddles = straddles;
  tile.by_q = divider(unsigned(q));
  tile.by_step = divider(unsigned(rows * q));
  tile.by_image_tiles = divider(tile.image_tiles);
  const int lines =
      tile_memory(tile, pooling.contexts, pooling.segments, workload.operation, workload.pass)
          .lines;
  while (tile.column_lanes_log2 < 3 && lines * q << (tile.column_lanes_log2 + 1) <= kThreads &&
         2 << tile.column_lanes_log2 <= rows)
    ++tile.column_lanes_log2;
  const int accumulator = accumulator_size(workload.element_size);
  const int64_t slots = int64_t(staged_tensors(workload.operation, workload.pass,
                                               vector * workload.element_size, steps)) *
                        steps * kThreads * kSlotBytes;
  const int64_t shared =
      slots + int64_t(accumulator) * tile_memory(tile, pooling.contexts, pooling.segments,
                                                 workload.operation, workload.pass)
                                         .total;
  if (shared > device.shared_bytes) return plan;
  plan.shared_bytes = static_cast<int>(shared);

  const bool gate = workload.operation == Operation::kGate,
             added = workload.operation == Operation::kAddRelu;
  const double unit_steps = double(ceil_div(unit_channels, rows));
  const double cached_steps = gate ? unit_steps : std::min<double>(steps, unit_steps);
  const double tensor_bytes =
      double(workload.images) * double(tile.image_elements) * workload.element_size;

  // What the registers do not hold crosses the bus again (part of it may be found in the L2: not
  // counted on).
  const double units = gate ? 1 + is_backward(workload.pass)
                            : (added ? 3 : 2) + is_backward(workload.pass) * (added ? 2 : 1);
  const double again = gate ? 0
                            : (1 + (added && is_backward(workload.pass))) *
                                  (1 - cached_steps / (unit_steps * tile.rounds));
  const double once = units / (units + again) * (again > 0 ? 0.9 : 1);

  const double threads_busy =
      double(tile.active) / tile.group * double(unit_channels) / (unit_steps * double(rows));
  const double pixels_busy = double(workload.image_pixels) / (double(image_tiles) * q);

  // Bytes that a step reads without a gap: 128 fill a line, 32 a sector.
  const double run = double(whole ? unit_channels * q : q) * workload.element_size;
  const double long_runs = run >= 512   ? 1
                           : run >= 256 ? 0.99 + 0.01 * (run - 256) / 256
                           : run >= 128 ? 0.95 + 0.04 * (run - 128) / 128
                           : run >= 64  ? 0.86 + 0.09 * (run - 64) / 64
                           : run >= 32  ? 0.65 + 0.21 * (run - 32) / 32
                                        : run * 0.65 / 32;
  // A run that starts inside a sector moves that sector twice, and writes a part of it.
  const bool aligned = workload.image_pixels * workload.element_size % 32 == 0 &&
                       q * workload.element_size % 32 == 0;
  const double sectors = aligned ? 1 : run / (run + 48);

  double cluster_cost = 1;
  for (int blocks = 1; blocks < cluster; blocks *= 2) cluster_cost *= 0.985;

  // Full tiles hide the latency of everything between their loads and their stores; a second block
  // on the multiprocessor, too.
  const double full = 0.4 + 0.6 * cached_steps / steps;
  const int by_registers = contiguous_blocks(vector, steps * vector * workload.element_size,
                                             workload.operation, workload.pass);
  const int by_memory = static_cast<int>((device.shared_bytes + 1024) / (shared + 1024));
  const int resident = std::max(1, std::min(by_registers, by_memory));
  const double company = resident > 1 ? 1 : 0.88;

  // Small tensors: every multiprocessor should have a block.
  const double busy = std::min(1., double(tile.tiles) * cluster / device.multiprocessors);
  const double spread = tensor_bytes < (16 << 20) ? 0.5 + 0.5 * busy : 1;

  plan.cluster_tiles = tiles_of_cluster(workload.operation, workload.pass, whole, q, cluster);
  set_clusters(plan, int64_t(resident) * device.multiprocessors / cluster);

  // dweight and dbias are summed from a share per cluster: under 1 % of the traffic, or rather
  // another tile.
  const double share =
      2. * double(plan.partial_count) * (pooling.contexts + 1) * accumulator / tensor_bytes;
  const double partials = is_backward(workload.pass) && share > 0.01 ? 0.7 : 1;

  plan.score = partials * once * threads_busy * std::sqrt(pixels_busy) * long_runs * sectors *
               cluster_cost * full * company * spread;
  return plan;
}

inline Plan plan_contiguous(const Workload& workload, const DeviceLimits& device,
                            const Forced& forced) {
  const bool standard = workload.pooling->standard;
  Plan best;
  const auto consider = [&](int64_t q, int vector) {
    if (q < 1 || q > workload.image_pixels || q > 4096 || (forced.q != 0 && q != forced.q)) return;
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2)
      for (int groups = 1; groups <= kMaxGroups; groups *= 2) {
        if ((forced.cluster != 0 && cluster != forced.cluster) ||
            (forced.groups != 0 && groups != forced.groups))
          continue;
        for (const int steps :
             step_choices(vector, workload.element_size, workload.operation, standard).steps) {
          if (steps == 0 || (forced.steps != 0 && steps != forced.steps)) continue;
          const Plan plan = contiguous_candidate(workload, device, static_cast<int>(q), vector,
                                                 groups, cluster, steps);
          if (plan.score > best.score) best = plan;
        }
      }
  };
  for (const int bytes : {16, 8, 1}) {
    // 16 bytes; 8 where 16-bit elements are aligned no better; single elements, which always work.
    const int vector = bytes == 1 ? 1 : bytes / workload.element_size;
    if (bytes == 8 && workload.element_size != 2) continue;
    if (vector * workload.element_size > workload.alignment ||
        (forced.vector != 0 && vector != forced.vector))
      continue;
    consider(workload.image_pixels, vector);
    for (int64_t run = 32; run <= 2048; run *= 2)
      consider(run / workload.element_size / vector * vector, vector);
    for (int pieces = 2; pieces <= 32; ++pieces)
      consider(ceil_div(ceil_div(workload.image_pixels, pieces), vector) * vector, vector);
    consider(vector, vector);
    if (forced.q != 0) consider(forced.q, vector);
    if (best.score > 0.15) break;  // narrower vectors would not do better
  }
  best.method = Method::kContiguousPipelined;
  best.fixed_grid = forced.clusters != 0;
  if (best.fixed_grid) {
    best.cluster_tiles = 0;
    set_clusters(best, forced.clusters);
  }
  if (best.score == 0) best.error = "no plan fits a contiguous tensor of these sizes in one launch";
  return best;
}

// ---- channels_last

// Fewer warps per block while there are multiprocessors without a block, but (backward)
// no more blocks than keep the shares of dweight and dbias, one per block, under 1 % of the
// traffic.
inline int warps_for(const Workload& workload, int warp_pixels, const DeviceLimits& device) {
  const int64_t pixels = workload.images * workload.image_pixels;
  const double pixel_bytes = double(workload.channels) * workload.element_size;
  const double shares = is_backward(workload.pass) ? 2. * (workload.pooling->contexts + 1) *
                                                         accumulator_size(workload.element_size)
                                                   : 0;
  int warps = kThreads / kWarp;
  while (warps > 1 &&
         ceil_div(pixels, int64_t(warps) * warp_pixels) < 2 * int64_t(device.multiprocessors) &&
         shares < 0.01 * pixel_bytes * warp_pixels * (warps / 2))
    warps /= 2;
  return warps;
}

// Lanes and registers: standard bins whose segments are whole 16-byte vectors.
inline Plan plan_channels_last_registers(const Workload& workload, const DeviceLimits& device,
                                         const Forced& forced) {
  const Pooling& pooling = *workload.pooling;
  const int vector = 16 / workload.element_size,
            accumulator = accumulator_size(workload.element_size);
  Plan plan;
  if (!pooling.standard || workload.operation == Operation::kGate || workload.alignment < 16 ||
      workload.channels % (4 * vector) != 0)
    return plan;
  for (int i = 0; i < kLaneVariantCount; ++i) {
    const LaneVariant variant = kLaneVariants[i];
    if (!has_lane_variant(variant, workload.element_size)) continue;
    if (int64_t(variant.lanes / 4) * variant.steps * vector < pooling.edge[1]) continue;
    if (forced.variant >= 0 && i != forced.variant) continue;
    plan.method = Method::kChannelsLastRegisters;
    plan.variant = i;
    plan.vector = vector;
    plan.steps = variant.steps;
    plan.warp_pixels = kWarp / variant.lanes * variant.pixels;
    const int warps = forced.warps != 0 ? std::min(forced.warps, kThreads / kWarp)
                                        : warps_for(workload, plan.warp_pixels, device);
    plan.threads = warps * kWarp;
    plan.shared_bytes = accumulator * lanes_memory(warps, plan.warp_pixels, pooling.contexts,
                                                   pooling.segments, workload.pass);
    plan.blocks =
        ceil_div(workload.images * workload.image_pixels, int64_t(warps) * plan.warp_pixels);
    plan.score = 1;
    break;
  }
  return plan;
}

// Everything else: tiles in shared memory.
inline Plan plan_channels_last_shared(const Workload& workload, const DeviceLimits& device,
                                      const Forced& forced) {
  constexpr int64_t kTileBytes = 16
                                 << 10;  // of one tensor: what the threads of a block read at once
  constexpr int kSharedBytes =
      56 << 10;  // at most, where it can be helped: four blocks on a multiprocessor
  const Pooling& pooling = *workload.pooling;
  const int64_t pixels = workload.images * workload.image_pixels,
                pixel_bytes = workload.channels * workload.element_size;
  Plan plan;
  SharedTile& tile = plan.shared_tile;
  plan.method = Method::kChannelsLastShared;
  tile.pixels = pixels;
  tile.channels = static_cast<int>(workload.channels);
  const int64_t segment = workload.channels / pooling.segments;
  while (tile.lanes_log2 < 5 && (int64_t(2) << tile.lanes_log2) <= segment) ++tile.lanes_log2;
  for (int k = 0; k <= pooling.segments; ++k) tile.edge[k] = static_cast<int>(pooling.edge[k]);
  const auto shared = [&](int64_t q, bool staged) {
    tile.q = static_cast<int>(q);
    return shared_tile_memory(tile, pooling.contexts, pooling.segments, workload.element_size,
                              workload.operation, workload.pass, staged)
        .total;
  };
  const auto fits = [&](int64_t q, int64_t limit) {
    return q * pixel_bytes < (1 << 29) && shared(q, true) <= limit;
  };

  // So many pixels are whole vectors, and then every tile starts at one.
  int64_t whole = 1;
  while (whole * pixel_bytes % 16 != 0) whole *= 2;
  tile.vector = 16 / workload.element_size;
  if (workload.alignment < 16 || forced.vector == 1 || !fits(whole, device.shared_bytes))
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
    const double shares = is_backward(workload.pass) ? 2. * (pooling.contexts + 1) *
                                                           accumulator_size(workload.element_size)
                                                     : 0;
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

inline Plan plan_channels_last(const Workload& workload, const DeviceLimits& device,
                               const Forced& forced) {
  Plan plan;
  if (forced.vector != 1 && forced.q == 0)
    plan = plan_channels_last_registers(workload, device, forced);
  if (plan.score == 0 && forced.variant < 0)
    plan = plan_channels_last_shared(workload, device, forced);
  plan.partial_count = plan.blocks;
  if (plan.score == 0) plan.error = "that variant does not fit";
  if (plan.blocks > kMaxBlocks) plan.error = "x has too many pixels for one launch";
  return plan;
}

inline Plan make_plan(const Workload& workload, const DeviceLimits& device,
                      const std::string& forced_text = "") {
  const Forced forced = parse_forced(forced_text);
  Plan plan;
  if (!forced.error.empty()) {
    plan.error = forced.error;
  } else if (workload.channels > 0x7fffffff) {
    plan.error = "the CUDA kernels take at most 2147483647 channels";
  } else {
    const bool channels_last =
        workload.channels_last ||
        workload.image_pixels == 1;  // of one pixel both layouts are the same
    plan = channels_last ? plan_channels_last(workload, device, forced)
                         : plan_contiguous(workload, device, forced);
    plan.early = device.max_cluster > 1;  // sm_90 on, as clusters are
    if (!plan.error.empty() && !forced_text.empty()) plan.error += " with PPCR_PLAN=" + forced_text;
  }
  return plan;
}

}  // namespace ppcr::cuda
