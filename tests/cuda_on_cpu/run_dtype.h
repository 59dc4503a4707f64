// Included once per dtype, in a file of its own so that the four compile side by side.
#pragma once
// clang-format off: the kernels need what cuda_on_cpu.h defines
#include "cuda_on_cpu.h"
#include "../../csrc/cuda/dispatch.cuh"
// clang-format on
#include "run.h"

namespace ppcr::cuda {

struct CpuLauncher {
  const CpuRun& run;

  template <class Arguments>
  void operator()(void (*kernel)(Arguments), const Launch& launch, const Arguments& arguments) {
    if (run.visitor != nullptr)
      return run.visitor->visit(reinterpret_cast<void*>(kernel), sizeof(Arguments),
                                run_kernel<Arguments>);
    cuda_on_cpu::Configuration configuration;
    configuration.blocks = static_cast<unsigned>(launch.blocks);
    configuration.threads = static_cast<unsigned>(launch.threads);
    configuration.shared_bytes = static_cast<size_t>(launch.shared_bytes);
    configuration.cluster = static_cast<unsigned>(launch.cluster);
    configuration.seed = run.seed;
    configuration.only_blocks = kernel_is_finish(launch) ? 0 : run.only_blocks;
    const cuda_on_cpu::Statistics before = cuda_on_cpu::machine.statistics;
    try {
      cuda_on_cpu::launch(configuration, [&] { kernel(arguments); });
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(launch.name) + ": " + error.what());
    }
    cpu_statistics.threads += cuda_on_cpu::machine.statistics.threads - before.threads;
    cpu_statistics.switches += cuda_on_cpu::machine.statistics.switches - before.switches;
    // Every instantiation of a kernel has an address of its own.
    ++cpu_statistics.launches[std::string(launch.name) + " " +
                              std::to_string(reinterpret_cast<uintptr_t>(kernel))];
  }

 private:
  template <class Arguments>
  static void run_kernel(const void* kernel, const cuda_on_cpu::Configuration& configuration,
                         const void* argument) {
    const auto typed = reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(kernel));
    cuda_on_cpu::launch(configuration, [&] { typed(*static_cast<const Arguments*>(argument)); });
  }
  static bool kernel_is_finish(const Launch& launch) {
    return std::string(launch.name) == "finish_parameters";
  }
};

template <class T>
void run_on_cpu(const CpuRun& run) {
#if defined(CUDA_ON_CPU_LEFT_OUT)
  (void)run;
  throw std::runtime_error("the kernels of this dtype were left out of the build");
#else
  CpuLauncher launcher{run};
  Dispatch<T, CpuLauncher>(*run.workload, *run.plan, *run.operands, launcher).launch();
#endif
}

}  // namespace ppcr::cuda
