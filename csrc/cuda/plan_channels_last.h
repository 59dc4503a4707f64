// Plans of the channels_last kernels, in plain C++.
#pragma once
#include "forced_plan.h"
#include "workload.h"

namespace ppcr::cuda {

// Eight warps a block; four where the registers hold no second block of eight, which would load
// while the first one stores. Fewer while there are multiprocessors without a block, but no more
// blocks than keep the shares of dweight and dbias, one per block, under 1 % of the traffic.
inline int warps_for(const Workload& workload, int warp_pixels, int cached_bytes,
                     const DeviceLimits& device) {
  const int blocks =
      lane_blocks(workload.element_size, cached_bytes, workload.operation, workload.pass);
  int warps = kThreads / kWarp / (blocks == 1 ? 2 : 1);
  while (warps > 1 &&
         ceil_div(workload.pixels(), int64_t(warps) * warp_pixels) <
             2 * int64_t(device.multiprocessors) &&
         workload.share_bytes() < 0.01 * double(workload.pixel_bytes()) * warp_pixels * (warps / 2))
    warps /= 2;
  return warps;
}

// Standard bins whose segments are whole 16-byte vectors.
inline bool lanes_fit(const Workload& workload) {
  return workload.pooling->standard && workload.alignment >= 16 &&
         workload.channels * workload.element_size % (4 * 16) == 0;
}

// Lanes that keep a pixel in registers; for the gate alone, lanes that keep nothing.
inline Plan plan_channels_last_lanes(const Workload& workload, const DeviceLimits& device,
                                     const Forced& forced) {
  Plan plan;
  plan.vector = 16 / workload.element_size;
  const int64_t vectors = ceil_div(workload.pooling->edge[1], plan.vector);  // of a segment
  LaneVariant found{};
  if (workload.is_gate()) {
    plan.method = Method::kChannelsLastGate;
    plan.variant = forced.variant >= 0 ? forced.variant : vectors >= 8 ? 32 : 8;
    if (plan.variant == 8 || plan.variant == 32) found = {plan.variant, 1, kGatePixels};
  } else {
    plan.method = Method::kChannelsLastRegisters;
    for (int i = 0; i < kLaneVariantCount && found.lanes == 0; ++i) {
      const LaneVariant& variant = kLaneVariants[i];
      if (!has_lane_variant(variant, workload.element_size) ||
          variant.lanes / 4 * variant.steps < vectors ||
          (forced.variant >= 0 && i != forced.variant))
        continue;
      found = variant;
      plan.variant = i;
      plan.steps = variant.steps;
    }
  }
  if (found.lanes == 0) return plan;
  plan.warp_pixels = kWarp / found.lanes * found.pixels;
  const int warps = forced.warps != 0 ? std::min(forced.warps, kThreads / kWarp)
                                      : warps_for(workload, plan.warp_pixels,
                                                  16 * found.steps * found.pixels, device);
  plan.threads = warps * kWarp;
  plan.shared_bytes =
      workload.accumulator() * lanes_memory(warps, plan.warp_pixels, workload.pooling->contexts,
                                            workload.pooling->segments, workload.pass);
  plan.blocks = ceil_div(workload.pixels(), int64_t(warps) * plan.warp_pixels);
  plan.score = 1;
  return plan;
}

// Everything else: tiles in shared memory.
inline Plan plan_channels_last_shared(const Workload& workload, const DeviceLimits& device,
                                      const Forced& forced) {
  // Of one tensor: what the threads of a block read at once.
  constexpr int64_t kTileBytes = 16 << 10;
  // At most, where it can be helped, so that a multiprocessor holds four blocks.
  constexpr int kSharedBytes = 56 << 10;
  const Pooling& pooling = *workload.pooling;
  const int64_t pixels = workload.pixels(), pixel_bytes = workload.pixel_bytes();
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
  // A tile of our own choice shrinks until it fits.
  plan.staged = fits(forced.q != 0 ? q : whole, device.shared_bytes);
  if (!plan.staged) q = std::max(1, (kThreads >> tile.lanes_log2) / pooling.segments);
  if (plan.staged && forced.q == 0) {
    while (q > whole && !fits(q, kSharedBytes)) q = half();
    // Smaller tiles while there are multiprocessors without a block, as in warps_for.
    while (q > whole && ceil_div(pixels, q) < 2 * int64_t(device.multiprocessors) &&
           workload.share_bytes() < 0.01 * double(pixel_bytes * half()))
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
  if (lanes_fit(workload) && forced.vector != 1 && forced.q == 0)
    plan = plan_channels_last_lanes(workload, device, forced);
  if (plan.score == 0 && forced.variant < 0)
    plan = plan_channels_last_shared(workload, device, forced);
  plan.partial_count = plan.blocks;
  if (plan.score == 0) plan.error = "that variant does not fit";
  return plan;
}

}  // namespace ppcr::cuda
