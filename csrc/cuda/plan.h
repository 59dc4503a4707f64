// Chooses, from sizes alone, which kernel runs and how it cuts the tensor. Plain C++: tested
// without CUDA (tests/test_cuda_plan.py), and the same plans drive the kernels on a GPU and on the
// CPU (tests/cuda_on_cpu).
#pragma once
#include "plan_channels_last.h"
#include "plan_contiguous.h"

namespace ppcr::cuda {

// Indices of channels are 32 bits wide, and loops of the kernels run up to a step beyond the last
// channel.
constexpr int64_t kMaxChannels = 0x7fffffff - kThreads;

inline Plan make_plan(const Workload& workload, const DeviceLimits& device,
                      const std::string& forced_text = "") {
  const Forced forced(forced_text);
  Plan plan;
  if (!forced.error.empty()) {
    plan.error = forced.error;
  } else if (workload.channels > kMaxChannels) {
    plan.error = "the CUDA kernels take at most 2147483391 channels";
  } else {
    // Of one pixel both layouts are the same.
    const bool channels_last = workload.channels_last || workload.image_pixels == 1;
    plan = channels_last ? plan_channels_last(workload, device, forced)
                         : plan_contiguous(workload, device, forced);
    if (plan.blocks > kMaxBlocks) plan.error = "x has too many pixels for one launch";
    plan.shared_limit = device.shared_bytes;
    plan.early = device.max_cluster > 1;  // sm_90 on, as clusters are
    if (!plan.error.empty() && !forced_text.empty()) plan.error += " with PPCR_PLAN=" + forced_text;
  }
  return plan;
}

}  // namespace ppcr::cuda
