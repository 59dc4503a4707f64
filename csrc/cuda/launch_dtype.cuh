// Launches of one dtype. Included once per dtype, in files that know nothing of torch, so that they
// compile fast and side by side.
#pragma once
#include <stdexcept>
#include <string>

#include "dispatch.cuh"
#include "launch.h"

namespace ppcr::cuda {

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a refused launch is not to be reported again by the next call
  throw std::runtime_error("ppcr_ext: " + what + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

inline void check_launch(cudaError_t error, const Launch& launch) {
  if (error == cudaSuccess) return;
  check_cuda(error, std::string(launch.name) + " could not be launched with " +
                        std::to_string(launch.blocks) + " blocks of " +
                        std::to_string(launch.threads) + " threads, clusters of " +
                        std::to_string(launch.cluster) + ", " +
                        std::to_string(launch.shared_bytes) + " bytes of shared memory");
}

// Beyond 48 KB a kernel has to ask. The limit belongs to the kernel on its device, so that it is
// always all that the device has: a thread that asked for less would forbid the launch that another
// thread is about to make.
inline void allow_shared_memory(const void* kernel, const Launch& launch) {
  if (launch.shared_bytes <= 48 << 10) return;
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    launch.shared_limit),
               launch);
}

// What cudaLaunchKernelEx takes; it points into itself.
struct LaunchConfiguration {
  cudaLaunchConfig_t configuration{};
  cudaLaunchAttribute attributes[3];

  LaunchConfiguration(const Launch& launch, cudaStream_t stream) {
    configuration.gridDim = dim3(static_cast<unsigned>(launch.blocks));
    configuration.blockDim = dim3(static_cast<unsigned>(launch.threads));
    configuration.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    configuration.stream = stream;
    configuration.attrs = attributes;
    if (launch.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[configuration.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
      // Measured on an H200: up to 5 % faster than clusters spread over it.
      cudaLaunchAttribute& policy = attributes[configuration.numAttrs++];
      policy.id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
      policy.val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
    }
    if (launch.early) {
      cudaLaunchAttribute& early = attributes[configuration.numAttrs++];
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfiguration(const LaunchConfiguration&) = delete;
};

struct StreamLauncher {
  cudaStream_t stream;

  template <class Arguments>
  void operator()(void (*kernel)(Arguments), const Launch& launch, const Arguments& arguments) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel), launch);
    const LaunchConfiguration with(launch, stream);
    check_launch(cudaLaunchKernelEx(&with.configuration, kernel, arguments), launch);
  }
};

// Launches nothing: asks how many clusters (or blocks) of the kernel the current device holds at
// once.
struct ResidencyQuery {
  int multiprocessors;
  int64_t clusters = 0;
  bool asked = false;

  template <class Arguments>
  void operator()(void (*kernel)(Arguments), const Launch& launch, const Arguments&) {
    if (asked) return;  // the finishing kernel, after the one that was asked about
    asked = true;
    allow_shared_memory(reinterpret_cast<const void*>(kernel), launch);
    int found = 0;
    if (launch.cluster > 1) {
      const LaunchConfiguration with(launch, nullptr);
      check_launch(cudaOccupancyMaxActiveClusters(&found, kernel, &with.configuration), launch);
      clusters = found;
    } else {
      const size_t shared = static_cast<size_t>(launch.shared_bytes);
      check_launch(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, launch.threads, shared),
          launch);
      clusters = int64_t(found) * multiprocessors;
    }
  }
};

template <class T>
void launch_dtype(const Workload& workload, const Plan& plan, const Operands& operands,
                  cudaStream_t stream) {
  StreamLauncher launcher{stream};
  Dispatch<T, StreamLauncher>(workload, plan, operands, launcher).launch();
}

template <class T>
int64_t resident_clusters(const Workload& workload, const Plan& plan, int multiprocessors) {
  ResidencyQuery query{multiprocessors};
  const Operands operands;
  Dispatch<T, ResidencyQuery>(workload, plan, operands, query).launch();
  return query.clusters;
}

}  // namespace ppcr::cuda
