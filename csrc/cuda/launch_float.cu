#include "launch_dtype.cuh"

const ppcr::cuda::Kernels ppcr::cuda::kFloat{launch_dtype<float>, resident_clusters<float>};

int ppcr::cuda::running_architecture() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, finish_parameters<float>);
  const bool no_code =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  check_cuda(error, no_code ? "this library holds no kernels for this device; rebuild with its "
                              "architecture in TORCH_CUDA_ARCH_LIST"
                            : "the kernels cannot be asked for their architecture");
  return attributes.ptxVersion;
}
