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

// Of all that a plan says, dispatching looks at little; every value of it is tried.
template <class Call>
void for_every_plan(const Call& call) {
  Plan plan;
  plan.unit_count = 4;
  plan.kind = KernelKind::kChannelMajor;
  for (plan.vector = 1; plan.vector <= 8; plan.vector *= 2)
    for (plan.steps = 1; plan.steps <= 16; ++plan.steps) call(plan);
  plan.kind = KernelKind::kPixelMajor;
  for (plan.variant = 0; plan.variant < kLaneVariantCount; ++plan.variant) call(plan);
  plan.kind = KernelKind::kPixelTile;
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
  const std::vector<int64_t> standard = {1, 2, 4}, any = {1, 3};
  for (const auto& levels : {standard, any}) {
    ppcr::Pooling pooling;
    ppcr::make_pooling(levels.data(), int64_t(levels.size()), 12, pooling);
    Problem problem;
    problem.channels = 12;
    problem.pooling = &pooling;
    for (const Mode mode : {Mode::kScale, Mode::kGate, Mode::kAddRelu})
      for (const bool backward : {false, true}) {
        problem.mode = mode;
        problem.backward = backward;
        for_every_plan([&](const Plan& plan) {
          CpuRun run{&problem, &plan, &operands};
          run.visitor = &registrar;
          run_on_cpu<float>(run);
          run_on_cpu<Half>(run);
          run_on_cpu<BFloat16>(run);
          run_on_cpu<double>(run);
        });
      }
  }
}
