// Where launches meet the kernels that tests/cuda_on_cpu compiles: nothing of CUDA, and nothing of
// the project's stand-ins for it.
#pragma once
#include <cstddef>
#include <functional>
#include <map>
#include <string>

namespace cuda_host {

struct FiberLaunch {
  unsigned blocks, threads, cluster;
  size_t shared_bytes;
};
struct FiberKernel {
  size_t argument_bytes;
  // Runs it. Empty, or what the fibers found wrong.
  std::function<std::string(const FiberLaunch&, const void* argument)> run;
};
std::map<std::string, FiberKernel> fiber_kernels();  // by mangled name

}  // namespace cuda_host
