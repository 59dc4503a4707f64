// What a plan moves through memory: predicted from the plan, asserted in tests/test_cuda_plan.py,
// and the bytes that a measured time is to be compared with.
#pragma once
#include "plan.h"

namespace ppcr::cuda {

// Bytes that a launch (backward: with its finishing kernel) moves through memory if every byte that
// is read a second time comes from there again.
struct Traffic {
  int64_t tensor = 0;  // one pass over x
  int64_t read = 0, written = 0;
  int64_t parameters = 0;  // partial sums, written and read
};

inline Traffic predicted_traffic(const Problem& problem, const Plan& plan) {
  Traffic traffic;
  const int64_t pixels = problem.images * problem.image_pixels;
  const int64_t tensor = traffic.tensor = pixels * problem.channels * problem.element_size;
  const int64_t gates = pixels * problem.element_size;
  const int64_t accumulator = problem.element_size == 8 ? 8 : 4;
  switch (problem.mode) {
    case Mode::kScale:
      traffic.read = problem.backward ? 2 * tensor : tensor;
      traffic.written = tensor;
      break;
    case Mode::kAddRelu:
      traffic.read = problem.backward ? 3 * tensor : 2 * tensor;
      traffic.written = problem.backward ? 2 * tensor : tensor;
      break;
    case Mode::kGate:
      traffic.read = tensor + (problem.backward ? gates : 0);
      traffic.written = problem.backward ? tensor : gates;
      break;
  }
  const int64_t held_streams =
      problem.backward && problem.mode == Mode::kAddRelu ? 2 : 1;  // x, or gy with y where it masks
  if (plan.kind == KernelKind::kPixelTile && !plan.staged && problem.mode != Mode::kGate)
    traffic.read += held_streams * tensor;
  if (plan.kind == KernelKind::kChannelMajor && problem.mode != Mode::kGate) {
    // Channels of a first-round unit beyond the held steps, and all of later rounds.
    const bool standard = problem.pooling->standard;
    const TableUnits units =
        standard ? TableUnits{} : table_units(*problem.pooling, plan.unit_count);
    const int first_round = plan.tile.groups * plan.tile.cluster;
    int64_t again = 0;
    for (int unit = 0; unit < plan.unit_count; ++unit) {
      const int64_t channels = standard ? problem.channels / plan.unit_count : units.count(unit);
      const int64_t held = unit < first_round ? int64_t(plan.steps) * plan.tile.rows : 0;
      again += std::max<int64_t>(0, channels - held);
    }
    traffic.read += held_streams * again * pixels * problem.element_size;
  }
  if (problem.backward)
    traffic.parameters = 2 * plan.partial_count * (problem.pooling->contexts + 1) * accumulator;
  return traffic;
}

}  // namespace ppcr::cuda
