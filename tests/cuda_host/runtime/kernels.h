// What the runtime and the library of kernels agree on; nothing of CUDA or the project.
#pragma once
#include <cstddef>
#include <functional>
#include <string>

namespace cuda_host {

// How a launch reaches the fibers.
struct FiberLaunch {
  unsigned blocks, threads, cluster;
  size_t shared_bytes;
};
struct FiberKernel {
  size_t argument_bytes = 0;
  // Null, or what the fibers found wrong.
  std::function<const char*(const FiberLaunch&, const void* argument)> run;
};
using AddKernel = void (*)(const std::string& name, const FiberKernel& kernel);

}  // namespace cuda_host
