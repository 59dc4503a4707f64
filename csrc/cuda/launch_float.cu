#include "launch_dtype.cuh"

const ppcr::cuda::Kernels ppcr::cuda::kFloat = ppcr::cuda::kernels_of<float>();

int ppcr::cuda::running_architecture() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, finish_parameters<float>),
             "this library holds no kernels for this device; rebuild with its architecture in TORCH_CUDA_ARCH_LIST");
  return attributes.ptxVersion;
}
