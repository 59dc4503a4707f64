// The library of kernels: those that tests/cuda_on_cpu compiles for the CPU, each by the name that
// nvcc's library registers it under. The only file here that knows the project's headers.
#include <dlfcn.h>

#include <fstream>
#include <map>

// clang-format off: what follows needs cuda_on_cpu.h
#include "../../cuda_on_cpu/cuda_on_cpu.h"
#include "../../../csrc/cuda/dispatch.cuh"
// clang-format on
#include "../../cuda_on_cpu/run.h"
#include "kernels.h"

using namespace ppcr::cuda;

namespace {

// The kernels are no dynamic symbols; the build has written their names and offsets beside the
// library.
std::map<uintptr_t, std::string> names_by_address() {
  Dl_info library;
  dladdr(reinterpret_cast<void*>(&names_by_address), &library);
  std::ifstream file(std::string(library.dli_fname) + ".names");
  std::map<uintptr_t, std::string> names;
  std::string name;
  for (uintptr_t offset; file >> std::hex >> offset >> name;)
    names[reinterpret_cast<uintptr_t>(library.dli_fbase) + offset] = name;
  return names;
}

struct Registrar : KernelVisitor {
  cuda_host::AddKernel add;
  std::map<uintptr_t, std::string> names = names_by_address();

  void visit(const void* kernel, size_t argument_bytes, RunKernel run) override {
    const auto found = names.find(reinterpret_cast<uintptr_t>(kernel));
    if (found == names.end()) return;
    const auto on_fibers = [kernel, run](const cuda_host::FiberLaunch& launch,
                                         const void* argument) -> const char* {
      thread_local std::string error;
      cuda_on_cpu::Configuration configuration;
      configuration.blocks = launch.blocks;
      configuration.threads = launch.threads;
      configuration.shared_bytes = launch.shared_bytes;
      configuration.cluster = launch.cluster;
      try {
        run(kernel, configuration, argument);
        return nullptr;
      } catch (const std::exception& caught) {
        error = caught.what();
        return error.c_str();
      }
    };
    add(found->second, {argument_bytes, on_fibers});
  }
};

template <class T>
void visit(const CpuRun& run) {
  try {
    run_on_cpu<T>(run);
  } catch (const std::runtime_error&) {
    // No kernel is compiled for this plan.
  }
}

// Of all that a plan says, dispatching looks at little; every value of it is tried.
template <class Call>
void for_every_plan(const Call& call) {
  Plan plan;
  plan.unit_count = 4;
  plan.method = Method::kContiguousPipelined;
  for (plan.vector = 1; plan.vector <= 8; plan.vector *= 2)
    for (plan.steps = 1; plan.steps <= 16; ++plan.steps) call(plan);
  plan.method = Method::kChannelsLastRegisters;
  for (plan.variant = 0; plan.variant < kLaneVariantCount; ++plan.variant) call(plan);
  plan.method = Method::kChannelsLastShared;
  for (const bool staged : {false, true}) {
    plan.staged = staged;
    call(plan);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void cuda_host_kernels(cuda_host::AddKernel add) {
  Registrar registrar;
  registrar.add = add;
  const Operands operands;
  for (const std::vector<int64_t>& levels : {std::vector<int64_t>{1, 2, 4}, {1, 3}}) {
    ppcr::Pooling pooling;
    ppcr::make_pooling(levels.data(), int64_t(levels.size()), 12, pooling);
    Workload workload;
    workload.channels = 12;
    workload.pooling = &pooling;
    for (const auto operation :
         {ppcr::Operation::kPpcr, ppcr::Operation::kGate, ppcr::Operation::kAddRelu})
      for (const auto pass : {ppcr::Pass::kForward, ppcr::Pass::kBackward}) {
        workload.operation = operation;
        workload.pass = pass;
        for_every_plan([&](const Plan& plan) {
          CpuRun run{&workload, &plan, &operands};
          run.visitor = &registrar;
          visit<float>(run);
          visit<Half>(run);
          visit<BFloat16>(run);
          visit<double>(run);
        });
      }
  }
}
