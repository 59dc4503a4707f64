// Plans of the contiguous kernels, in plain C++.
#pragma once
#include <cmath>
#include <numeric>
#include <vector>

#include "forced_plan.h"
#include "units.h"

namespace ppcr::cuda {

// The number of a tile and that of the next one stay below 2^31.
constexpr int64_t kMaxTiles = 1 << 30;

// Vectors per thread for which the contiguous kernels are compiled. Standard bins: 8 keeps four
// blocks on a multiprocessor, 13 holds the tiles of 14x14 and 7x7 images in three.
inline std::vector<int> step_choices(const Workload& workload, int vector) {
  if (workload.is_gate() || workload.element_size == 8) return {8};
  if (vector == 1) return {16};
  if (!workload.pooling->standard || vector * workload.element_size < kSlotBytes) return {8};
  return {8, 13};
}

inline void set_clusters(Plan& plan, int64_t resident) {
  const int64_t tiles = plan.tile.tiles, most = std::max<int64_t>(1, std::min(resident, tiles));
  const int64_t even =
      ceil_div(tiles, ceil_div(tiles, most));  // as many tiles in each, or one less
  plan.partial_count =
      plan.cluster_tiles == 0 ? even : std::max(even, ceil_div(tiles, plan.cluster_tiles));
  plan.blocks = plan.partial_count * plan.tile.cluster;
}

// The tile for given q, vector, groups, cluster and steps; false where there is none.
inline bool cut_contiguous(const Workload& workload, const DeviceLimits& device, int q, int groups,
                           int cluster, Plan& plan) {
  const Pooling& pooling = *workload.pooling;
  const int vector = plan.vector, round_units = groups * cluster;
  Tile& tile = plan.tile;
  tile.q = q;
  tile.image_pixels = workload.image_pixels;
  tile.image_elements = workload.channels * workload.image_pixels;
  tile.groups = groups;
  tile.group = kThreads / groups;
  tile.cluster = cluster;
  tile.rounds = pooling.standard ? 1 : static_cast<int>(ceil_div(pooling.segments, round_units));
  plan.unit_count = tile.rounds * round_units;
  if (pooling.standard &&
      (round_units % pooling.segments != 0 || workload.channels % round_units != 0))
    return false;
  if (plan.unit_count > kMaxUnits) return false;
  TableUnits units{};
  int64_t unit_channels = pooling.standard ? workload.channels / round_units : 0;
  if (!pooling.standard) {
    units = table_units(pooling, plan.unit_count);
    for (int unit = 0; unit < plan.unit_count; ++unit)
      unit_channels = std::max<int64_t>(unit_channels, units.count(unit));
  }
  plan.unit_channels = unit_channels;

  // Rows of a step, and whether every vector lies within one unit and starts at a multiple of its
  // size.
  const bool whole = q == workload.image_pixels;
  int64_t rows = std::min(int64_t(tile.group) * vector / q, unit_channels);
  if (rows < 1 || q < vector) return false;
  const bool straddles = q % vector != 0;
  if (!whole && (straddles || workload.image_pixels % vector != 0)) return false;
  tile.wraps_wide = q * workload.accumulator() % 16 == 0;
  if (straddles) {
    const int whole_vectors = vector / std::gcd(q, vector);  // rows must be a multiple of this
    rows -= rows % whole_vectors;
    if (rows < 1) return false;
    if (pooling.standard && unit_channels % whole_vectors != 0) return false;
    for (int unit = 0; unit <= plan.unit_count; ++unit)
      if (units.edge[unit] % whole_vectors != 0) return false;
  }
  // The kernels count the elements of a unit in 32 bits.
  if (unit_channels * q >= (int64_t(1) << 30)) return false;
  const int64_t image_tiles = ceil_div(workload.image_pixels, q);
  if (image_tiles > kMaxBlocks || workload.images * image_tiles > kMaxTiles) return false;
  tile.rows = static_cast<int>(rows);
  tile.active = static_cast<int>(rows * q / vector);
  tile.image_tiles = static_cast<unsigned>(image_tiles);
  tile.tiles = static_cast<unsigned>(workload.images * image_tiles);
  tile.steps = static_cast<int>(ceil_div(unit_channels, rows));
  tile.group_log2 = __builtin_ctz(unsigned(tile.group));
  tile.groups_log2 = __builtin_ctz(unsigned(groups));
  tile.cluster_log2 = __builtin_ctz(unsigned(cluster));
  tile.by_q = divider(unsigned(q));
  tile.by_step = divider(unsigned(rows * q));
  tile.by_image_tiles = divider(tile.image_tiles);
  tile.last_step = static_cast<int>((unit_channels - (tile.steps - 1) * rows) * q);
  tile.memory =
      tile_memory(tile, pooling.contexts, pooling.segments, workload.operation, workload.pass);
  const int columns = tile.memory.lines * q / (tile.wraps_wide ? 16 / workload.accumulator() : 1);
  while (tile.column_lanes_log2 < 3 && columns << (tile.column_lanes_log2 + 1) <= kThreads &&
         2 << tile.column_lanes_log2 <= rows)
    ++tile.column_lanes_log2;
  const int64_t staged =
      staged_tensors(workload.operation, workload.pass, vector * workload.element_size, plan.steps);
  const int64_t shared = staged * plan.steps * kThreads * kSlotBytes +
                         int64_t(workload.accumulator()) * tile.memory.total;
  plan.shared_bytes = static_cast<int>(std::min<int64_t>(shared, kMaxBlocks));
  return shared <= device.shared_bytes;
}

// The share of what a step reads without a gap, in bytes, that counts: 128 fill a line, 32 a
// sector.
inline double weight_of_run(double run) {
  constexpr double kPoints[][2] = {{0, 0},      {32, 0.65},  {64, 0.86},
                                   {128, 0.95}, {256, 0.99}, {512, 1}};
  for (int i = 1; i < 6; ++i) {
    const auto [from, low] = kPoints[i - 1];
    const auto [to, high] = kPoints[i];
    if (run < to) return low + (high - low) * (run - from) / (to - from);
  }
  return 1;
}

// Orders plans by the share of the memory bandwidth that they reach: a product of factors, each 1
// at best, fitted to what an H200 measured for some hundred plans of every stage of a ResNet.
// PPCR_PLAN is there to measure more. Sets the number of clusters, on which the score depends.
inline double score_contiguous(const Workload& workload, const DeviceLimits& device, Plan& plan) {
  const Tile& tile = plan.tile;
  const bool gate = workload.is_gate(), added = workload.operation == Operation::kAddRelu;
  const bool backward = workload.backward(), whole = tile.q == tile.image_pixels;
  const double unit_steps = tile.steps, unit_channels = double(plan.unit_channels);
  const double cached_steps = std::min<double>(plan.steps, unit_steps);
  const double tensor_bytes =
      double(workload.images) * double(tile.image_elements) * workload.element_size;

  // What the registers do not hold crosses the bus again; what the L2 cache still holds of it is
  // not counted on.
  const double units = (added ? 3 : 2) + backward * (added ? 2 : 1);
  const double again =
      gate ? 0 : (1 + (added && backward)) * (1 - cached_steps / (unit_steps * tile.rounds));
  const double once = units / (units + again) * (again > 0 ? 0.9 : 1);

  const double threads_busy =
      double(tile.active) / tile.group * unit_channels / (unit_steps * double(tile.rows));
  const double pixels_busy = double(tile.image_pixels) / (double(tile.image_tiles) * tile.q);

  // A run that starts inside a sector moves that sector twice, and writes a part of it.
  const double run = double(whole ? unit_channels * tile.q : tile.q) * workload.element_size;
  const bool aligned = workload.image_pixels * workload.element_size % 32 == 0 &&
                       tile.q * workload.element_size % 32 == 0;
  const double sectors = aligned ? 1 : run / (run + 48);
  const double cluster_cost = std::pow(0.985, tile.cluster_log2);

  // Full tiles hide the latency of everything between their loads and their stores, and so does a
  // second block on the multiprocessor.
  const double full = 0.4 + 0.6 * (cached_steps / plan.steps);
  const int by_registers = contiguous_blocks(plan.steps * plan.vector * workload.element_size,
                                             workload.operation, workload.pass);
  const int by_memory = (device.shared_bytes + 1024) / (plan.shared_bytes + 1024);
  const int resident = std::max(1, std::min(by_registers, by_memory));
  const double company = resident > 1 ? 1 : 0.8;

  // Small tensors: a block for every multiprocessor; gates, whose units are long: all it holds.
  const int64_t wanted = int64_t(gate ? resident : 1) * device.multiprocessors;
  const double busy = std::min(1., double(tile.tiles) * tile.cluster / double(wanted));
  const double spread = gate || tensor_bytes < (16 << 20) ? 0.5 + 0.5 * busy : 1;

  // Blocks that start one after the other, each for a tile or two, share the work evenly even where
  // multiprocessors differ in speed. But a cluster costs time to start and to end, so that whole
  // images get as many clusters as the device holds at once; the forward pass of ppcr only where it
  // has no second block beside it. Measured on an H200.
  const bool ppcr = !gate && !added, at_once = whole && (backward || !ppcr || resident == 1);
  plan.cluster_tiles = at_once ? 0 : ppcr && backward ? 2 : 1;
  set_clusters(plan, int64_t(resident) * device.multiprocessors / tile.cluster);
  // Another tile is better than a share of dweight and dbias per cluster that takes over 1 % of the
  // traffic.
  const double shares = double(plan.partial_count) * workload.share_bytes() / tensor_bytes;
  const double partials = shares > 0.01 ? 0.7 : 1;

  return partials * once * std::sqrt(threads_busy * pixels_busy) * weight_of_run(run) * sectors *
         cluster_cost * full * company * spread;
}

inline Plan plan_contiguous(const Workload& workload, const DeviceLimits& device,
                            const Forced& forced) {
  Plan best;
  const auto allows = [](int wanted, int value) { return wanted == 0 || value == wanted; };
  const auto consider = [&](int64_t q, int vector) {
    if (q < 1 || q > workload.image_pixels || q > 4096 || !allows(forced.q, int(q))) return;
    const std::vector<int> choices = step_choices(workload, vector);
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2)
      for (int groups = 1; groups <= kMaxGroups; groups *= 2) {
        if (!allows(forced.cluster, cluster) || !allows(forced.groups, groups)) continue;
        for (const int steps : choices) {
          if (!allows(forced.steps, steps)) continue;
          Plan plan;
          plan.vector = vector;
          plan.steps = steps;
          if (!cut_contiguous(workload, device, static_cast<int>(q), groups, cluster, plan))
            continue;
          plan.score = score_contiguous(workload, device, plan);
          if (plan.score > best.score) best = plan;
        }
      }
  };
  for (const int bytes : {16, 8, 1}) {
    // 16 bytes; 8 where 16-bit elements are aligned no better; single elements, which always work.
    const int vector = bytes == 1 ? 1 : bytes / workload.element_size;
    if (bytes == 8 && workload.element_size != 2) continue;
    if (vector * workload.element_size > workload.alignment || !allows(forced.vector, vector))
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
  if (best.score == 0) best.error = "no plan fits a contiguous tensor of these sizes in one launch";
  best.fixed_grid = forced.clusters != 0 && best.error.empty();
  if (best.fixed_grid) {
    best.cluster_tiles = 0;
    set_clusters(best, forced.clusters);
  }
  return best;
}

}  // namespace ppcr::cuda
