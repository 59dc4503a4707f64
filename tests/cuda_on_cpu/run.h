// One call of an operator, without types: what the binding hands to the file that holds the kernels
// of a dtype.
#pragma once
#include <map>
#include <string>

#include "../../csrc/cuda/plan.h"

namespace cuda_on_cpu {
struct Configuration;
}

namespace ppcr::cuda {

struct Operands;

// Runs a kernel, whose type only its own file knows, with its argument.
using RunKernel = void (*)(const void* kernel, const cuda_on_cpu::Configuration& configuration,
                           const void* argument);
// Is told of a kernel instead of its launch.
struct KernelVisitor {
  virtual void visit(const void* kernel, size_t argument_bytes, RunKernel run) = 0;
};

struct CpuRun {
  const Workload* workload;
  const Plan* plan;
  const Operands* operands;
  uint32_t seed = 0;
  unsigned only_blocks = 0;
  KernelVisitor* visitor = nullptr;
};

// Of this process: launches by variant, and what the fibers did.
struct CpuStatistics {
  std::map<std::string, uint64_t> launches;
  uint64_t threads = 0, switches = 0;
};
inline CpuStatistics cpu_statistics;

template <class T>
void run_on_cpu(const CpuRun& run);

}  // namespace ppcr::cuda
