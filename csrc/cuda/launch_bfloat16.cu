#include "launch_dtype.cuh"

void ppcr::cuda::run_bfloat16(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream) {
  run_dtype<BFloat16>(problem, plan, operands, stream);
}
