#include "launch_dtype.cuh"

void ppcr::cuda::run_half(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream) {
  run_dtype<Half>(problem, plan, operands, stream);
}
