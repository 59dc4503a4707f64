#include "launch_dtype.cuh"

void ppcr::cuda::run_double(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream) {
  run_dtype<double>(problem, plan, operands, stream);
}
