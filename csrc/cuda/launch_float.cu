#include "launch_dtype.cuh"

void ppcr::cuda::run_float(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream) {
  run_dtype<float>(problem, plan, operands, stream);
}

int ppcr::cuda::running_architecture() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, finish_parameters<float>),
             "this library holds no kernels for this device; rebuild with its architecture in TORCH_CUDA_ARCH_LIST");
  return attributes.ptxVersion;
}
