// The compiled kernels, for the entry (ppcr_cuda.cpp), which knows torch and no kernels.
#pragma once
#include <cuda_runtime_api.h>

#include "operands.h"
#include "plan.h"

namespace ppcr::cuda {

// The kernels of one dtype; a file each.
struct Kernels {
  // Starts what `plan` says on `stream`; throws std::runtime_error where a launch is refused.
  void (*launch)(const Workload& workload, const Plan& plan, const Operands& operands,
                 cudaStream_t stream);
  // How many clusters of a contiguous plan the current device holds at once.
  int64_t (*resident_clusters)(const Workload& workload, const Plan& plan, int multiprocessors);
};
extern const Kernels kFloat, kHalf, kBFloat16, kDouble;

// The virtual architecture (90 for compute_90) from which the code was compiled that the current
// device runs; throws where the library holds none for it.
int running_architecture();

}  // namespace ppcr::cuda
