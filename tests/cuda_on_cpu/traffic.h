// What a plan moves through memory, for tests/test_cuda_plan.py.
#pragma once
#include "../../csrc/cuda/plan.h"

namespace ppcr::cuda {

// Bytes that a launch (backward: with its finishing kernel) moves through memory if every byte that
// is read a second time comes from there again.
struct Traffic {
  int64_t tensor = 0;  // one pass over x
  int64_t read = 0, written = 0;
  int64_t parameters = 0;  // partial sums, written and read
};

inline Traffic predicted_traffic(const Workload& workload, const Plan& plan) {
  Traffic traffic;
  const int64_t pixels = workload.images * workload.image_pixels;
  const int64_t tensor = traffic.tensor = pixels * workload.channels * workload.element_size;
  const int64_t gates = pixels * workload.element_size;
  const int64_t accumulator = accumulator_size(workload.element_size);
  const bool backward = is_backward(workload.pass);
  const bool add_relu = workload.operation == Operation::kAddRelu;
  const bool gate = workload.operation == Operation::kGate;
  if (gate) {
    traffic.read = tensor + (backward ? gates : 0);
    traffic.written = backward ? tensor : gates;
  } else {
    traffic.read = (1 + backward + add_relu) * tensor;
    traffic.written = (1 + (backward && add_relu)) * tensor;
  }
  const int64_t cached_tensors = backward && add_relu ? 2 : 1;  // x, or gy and the y that masks it
  if (plan.method == Method::kChannelsLastShared && !plan.staged && !gate)
    traffic.read += cached_tensors * tensor;
  if (plan.method == Method::kContiguousPipelined && !gate) {
    // Channels of a first-round unit beyond the cached steps, and all of later rounds.
    const bool standard = workload.pooling->standard;
    const TableUnits units =
        standard ? TableUnits{} : table_units(*workload.pooling, plan.unit_count);
    const int first_round = plan.tile.groups * plan.tile.cluster;
    int64_t again = 0;
    for (int unit = 0; unit < plan.unit_count; ++unit) {
      const int64_t channels = standard ? workload.channels / plan.unit_count : units.count(unit);
      const int64_t cached = unit < first_round ? int64_t(plan.steps) * plan.tile.rows : 0;
      again += std::max<int64_t>(0, channels - cached);
    }
    traffic.read += cached_tensors * again * pixels * workload.element_size;
  }
  if (backward)
    traffic.parameters = 2 * plan.partial_count * (workload.pooling->contexts + 1) * accumulator;
  return traffic;
}

}  // namespace ppcr::cuda
