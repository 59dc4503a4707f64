// The kernels that tests/cuda_on_cpu compiles for the CPU, each by the name that nvcc's library
// registers it under. The only file here that knows the project's headers.
#include "kernels.h"

// clang-format off: what follows needs cuda_on_cpu.h
#include "../../cuda_on_cpu/cuda_on_cpu.h"
#include "../../../csrc/cuda/dispatch.cuh"
// clang-format on
#include "../../cuda_on_cpu/run.h"

using namespace ppcr::cuda;

namespace cuda_host {

extern const std::map<const void*, const char*> kKernelNames;  // build.py writes it
namespace {

struct Registrar : KernelVisitor {
  std::map<std::string, FiberKernel> found;

  void visit(const void* kernel, size_t argument_bytes, RunKernel run) override {
    const auto on_fibers = [kernel, run](const FiberLaunch& launch, const void* argument) {
      const auto& [blocks, threads, cluster, shared_bytes] = launch;
      const cuda_on_cpu::Configuration configuration{blocks, threads, shared_bytes, cluster};
      try {
        run(kernel, configuration, argument);
        return std::string();
      } catch (const std::exception& caught) {
        return std::string(caught.what());
      }
    };
    found[kKernelNames.at(kernel)] = {argument_bytes, on_fibers};
  }
};

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
  plan.method = Method::kChannelsLastGate;
  for (plan.variant = 1; plan.variant <= kWarp; ++plan.variant) call(plan);
  plan.method = Method::kChannelsLastShared;
  for (const bool staged : {false, true}) {
    plan.staged = staged;
    call(plan);
  }
}

}  // namespace

std::map<std::string, FiberKernel> fiber_kernels() {
  Registrar registrar;
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
          for (const auto visit :
               {run_on_cpu<float>, run_on_cpu<Half>, run_on_cpu<BFloat16>, run_on_cpu<double>}) {
            try {
              visit(run);
            } catch (const std::runtime_error&) {
              // No kernel is compiled for this plan.
            }
          }
        });
      }
  }
  return registrar.found;
}

}  // namespace cuda_host
