// Launches of one dtype. Included once per dtype, in files that know nothing of torch, so that they compile fast and side by side.
#pragma once
#include <stdexcept>
#include <string>

#include "dispatch.cuh"
#include "launch.h"

namespace ppcr::cuda {

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a refused launch is not to be reported again by the next call
  throw std::runtime_error("ppcr_ext: " + what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

inline void check_launch(cudaError_t error, const Launch& launch) {
  if (error == cudaSuccess) return;
  check_cuda(error, std::string(launch.name) + " could not be launched with " + std::to_string(launch.blocks) + " blocks of " +
                        std::to_string(launch.threads) + " threads, clusters of " + std::to_string(launch.cluster) + ", " +
                        std::to_string(launch.shared_bytes) + " bytes of shared memory");
}

struct StreamLauncher {
  cudaStream_t stream;

  template <class Arguments>
  void operator()(void (*kernel)(Arguments), const Launch& launch, const Arguments& arguments) {
    if (launch.shared_bytes > 48 << 10)  // beyond this a kernel has to ask
      check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes), launch);
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    configuration.blockDim = dim3(static_cast<unsigned>(launch.threads));
    configuration.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    configuration.stream = stream;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    configuration.attrs = &cluster;
    configuration.numAttrs = launch.cluster > 1 ? 1 : 0;
    check_launch(cudaLaunchKernelEx(&configuration, kernel, arguments), launch);
    check_launch(cudaGetLastError(), launch);
  }
};

template <class T>
void run_dtype(const Problem& problem, const Plan& plan, const Operands& operands, cudaStream_t stream) {
  StreamLauncher launcher{stream};
  Dispatch<T, StreamLauncher> dispatch(problem, plan, operands, launcher);
  dispatch.run();
  if (!dispatch.launched()) throw std::runtime_error("ppcr_ext: the planner chose a kernel that is not compiled; please report it");
}

}  // namespace ppcr::cuda
