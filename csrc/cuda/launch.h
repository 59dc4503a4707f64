// The compiled kernels, for the entry (ppcr_cuda.cpp), which knows torch and no kernels.
#pragma once
#include <cuda_runtime_api.h>

#include "operands.h"
#include "plan.h"

namespace ppcr::cuda {

// Starts what `plan` says on `stream`; throws std::runtime_error where a launch is refused. One file per dtype.
void run_float(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream);
void run_half(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream);
void run_bfloat16(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream);
void run_double(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream);

// The virtual architecture (90 for compute_90) from which the code was compiled that the current device runs; throws where the
// library holds none for it.
int running_architecture();

}  // namespace ppcr::cuda
