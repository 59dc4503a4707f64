// From a plan to the compiled kernel. A Launcher starts it: with cudaLaunchKernelEx on a GPU, or as
// fibers in the tests on a CPU. It is called with a kernel, a Launch and the kernel's arguments.
#pragma once
#include <stdexcept>

#include "channels_last_gate.cuh"
#include "channels_last_registers.cuh"
#include "channels_last_shared.cuh"
#include "contiguous_pipelined_backward.cuh"
#include "contiguous_pipelined_forward.cuh"
#include "finish_kernels.cuh"
#include "plan.h"

namespace ppcr::cuda {

struct Launch {
  const char* name;
  int64_t blocks;
  int threads;
  int shared_bytes, shared_limit;
  int cluster;
  bool early;  // may start while the kernel before it in the stream ends, and waits for it itself
};

template <class T>
Tensors<T> typed(const Operands& of) {
  const auto in = [](const void* tensor) { return static_cast<const T*>(tensor); };
  const auto out = [](void* tensor) { return static_cast<T*>(tensor); };
  auto* const partials = static_cast<Acc<T>*>(of.partials);
  return {in(of.x),           in(of.grad), in(of.residual), out(of.y),      out(of.dx),
          out(of.d_residual), of.weight,   of.bias,         Acc<T>(of.eps), partials};
}

template <class T, class Launcher>
class Dispatch {
 public:
  Dispatch(const Workload& workload, const Plan& plan, const Operands& operands, Launcher& launcher)
      : workload_(workload), plan_(plan), operands_(operands), launcher_(launcher) {}

  void launch() {
    const Operation operation = workload_.operation;
    if (operation == Operation::kPpcr) launch_operation<Operation::kPpcr>();
    if (operation == Operation::kGate) launch_operation<Operation::kGate>();
    if (operation == Operation::kAddRelu) launch_operation<Operation::kAddRelu>();
    if (!launched_)
      throw std::runtime_error(
          "ppcr_ext: the planner chose a kernel that is not compiled; please report it");
    if (workload_.backward()) finish();
  }

 private:
  using A = Acc<T>;
  static constexpr int kVector = 16 / int(sizeof(T));

  // Tiles in shared memory; gates of standard bins hardly ever need them.
  template <Operation OP>
  using StandardOf = std::conditional_t<OP == Operation::kGate, AnyBins<A>, StandardBins<A>>;

  template <Operation OP>
  void launch_operation() {
    const bool standard = workload_.pooling->standard;
    if (plan_.method == Method::kContiguousPipelined && standard)
      choose_contiguous<OP, StandardBins<A>>();
    else if (plan_.method == Method::kContiguousPipelined)
      choose_contiguous<OP, AnyBins<A>>();
    else if (plan_.method == Method::kChannelsLastRegisters)
      start_channels_last_registers<OP>();
    else if (plan_.method == Method::kChannelsLastGate)
      choose_gate_lanes();
    else if (!plan_.staged)
      start_channels_last_shared<OP, AnyBins<A>, false>();
    else if (standard)
      start_channels_last_shared<OP, StandardOf<OP>, true>();
    else
      start_channels_last_shared<OP, AnyBins<A>, true>();
  }

  // As step_choices in plan_contiguous.h.
  template <Operation OP, class Bins>
  void choose_contiguous() {
    constexpr bool kMore = sizeof(T) < 8 && OP != Operation::kGate;
    start_contiguous<OP, Bins, kVector, 8>();
    if constexpr (kMore && Bins::kStandard) start_contiguous<OP, Bins, kVector, 13>();
    if constexpr (sizeof(T) == 2) start_contiguous<OP, Bins, 4, 8>();
    start_contiguous<OP, Bins, 1, kMore ? 16 : 8>();
  }

  template <Operation OP, class Bins, int V, int STEPS>
  void start_contiguous() {
    if (plan_.vector != V || plan_.steps != STEPS) return;
    const ContiguousArguments<T, Bins> arguments{
        typed<T>(operands_), plan_.tile, units_of<Bins>(*workload_.pooling, plan_.unit_count),
        Bins(*workload_.pooling)};
    start("contiguous_pipelined", contiguous_pipelined_forward<T, V, STEPS, Bins, OP>,
          contiguous_pipelined_backward<T, V, STEPS, Bins, OP>, arguments);
  }

  template <Operation OP, int INDEX = 0>
  void start_channels_last_registers() {
    if constexpr (INDEX < kLaneVariantCount && OP != Operation::kGate) {
      constexpr LaneVariant kVariant = kLaneVariants[INDEX];
      constexpr int kSteps = kVariant.steps, kPixels = kVariant.pixels, kLanes = kVariant.lanes;
      if (plan_.variant != INDEX) return start_channels_last_registers<OP, INDEX + 1>();
      if constexpr (has_lane_variant(kVariant, int(sizeof(T))))
        start("channels_last_registers",
              channels_last_registers_forward<T, kVector, kSteps, kPixels, kLanes, OP>,
              channels_last_registers_backward<T, kVector, kSteps, kPixels, kLanes, OP>,
              lane_arguments());
    }
  }

  void choose_gate_lanes() {
    if (plan_.variant == 8) start_channels_last_gate<8>();
    if (plan_.variant == 32) start_channels_last_gate<32>();
  }
  template <int LANES>
  void start_channels_last_gate() {
    start("channels_last_gate", channels_last_gate_forward<T, kVector, LANES, Operation::kGate>,
          channels_last_gate_backward<T, kVector, LANES, Operation::kGate>, lane_arguments());
  }
  LaneArguments<T> lane_arguments() const {
    const Pooling& pooling = *workload_.pooling;
    const Lanes lanes{workload_.pixels(), workload_.channels, static_cast<int>(pooling.edge[1])};
    return {typed<T>(operands_), lanes, StandardBins<A>(pooling)};
  }

  template <Operation OP, class Bins, bool STAGED>
  void start_channels_last_shared() {
    const SharedTileArguments<T, Bins> arguments{typed<T>(operands_), plan_.shared_tile,
                                                 Bins(*workload_.pooling)};
    start("channels_last_shared", channels_last_shared_forward<T, Bins, OP, STAGED>,
          channels_last_shared_backward<T, Bins, OP, STAGED>, arguments);
  }

  void finish() {
    const FinishArguments arguments{operands_, plan_.partial_count, workload_.pooling->contexts};
    const int shared = kFinishThreads / kWarp * int(sizeof(A));
    launcher_(finish_parameters<T>,
              Launch{"finish_parameters", arguments.contexts + 1, kFinishThreads, shared,
                     plan_.shared_limit, 1, plan_.early},
              arguments);
  }

  template <class Arguments>
  void start(const char* name, void (*forward)(Arguments), void (*backward)(Arguments),
             const Arguments& arguments) {
    const int cluster = plan_.method == Method::kContiguousPipelined ? plan_.tile.cluster : 1;
    launcher_(workload_.backward() ? backward : forward,
              Launch{name, plan_.blocks, plan_.threads, plan_.shared_bytes, plan_.shared_limit,
                     cluster, plan_.early},
              arguments);
    launched_ = true;
  }

  const Workload& workload_;
  const Plan& plan_;
  const Operands& operands_;
  Launcher& launcher_;
  bool launched_ = false;
};

}  // namespace ppcr::cuda
