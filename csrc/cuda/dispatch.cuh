// From a plan to the compiled kernel. A Launcher starts it: with cudaLaunchKernelEx on a GPU, or as
// fibers in the tests on a CPU. It is called with a kernel, a Launch and the kernel's arguments.
#pragma once
#include <stdexcept>

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
  int shared_bytes;
  int cluster;
  bool early;  // may start while the kernel before it in the stream ends, and waits for it itself
};

template <class T>
Tensors<T> typed(const Operands& operands) {
  Tensors<T> tensors;
  tensors.x = static_cast<const T*>(operands.x);
  tensors.grad = static_cast<const T*>(operands.grad);
  tensors.residual = static_cast<const T*>(operands.residual);
  tensors.y = static_cast<T*>(operands.y);
  tensors.dx = static_cast<T*>(operands.dx);
  tensors.d_residual = static_cast<T*>(operands.d_residual);
  tensors.weight = operands.weight;
  tensors.bias = operands.bias;
  tensors.eps = static_cast<Acc<T>>(operands.eps);
  tensors.partials = static_cast<Acc<T>*>(operands.partials);
  return tensors;
}

template <class T, class Launcher>
class Dispatch {
 public:
  Dispatch(const Workload& workload, const Plan& plan, const Operands& operands, Launcher& launcher)
      : workload_(workload), plan_(plan), operands_(operands), launcher_(launcher) {}

  void launch() {
    switch (workload_.operation) {
      case Operation::kPpcr:
        launch_operation<Operation::kPpcr>();
        break;
      case Operation::kGate:
        launch_operation<Operation::kGate>();
        break;
      case Operation::kAddRelu:
        launch_operation<Operation::kAddRelu>();
        break;
    }
    if (!launched_)
      throw std::runtime_error(
          "ppcr_ext: the planner chose a kernel that is not compiled; please report it");
    if (is_backward(workload_.pass)) finish();
  }

 private:
  static constexpr int kVector = 16 / int(sizeof(T));

  template <Operation OP>
  void launch_operation() {
    switch (plan_.method) {
      case Method::kContiguousPipelined:
        if (workload_.pooling->standard)
          choose_contiguous_vector<OP, StandardBins<Acc<T>>>(
              equal_units(*workload_.pooling, plan_.unit_count));
        else
          choose_contiguous_vector<OP, AnyBins<Acc<T>>>(
              table_units(*workload_.pooling, plan_.unit_count));
        break;
      case Method::kChannelsLastRegisters:
        if constexpr (OP != Operation::kGate) start_channels_last_registers<OP>();
        break;
      case Method::kChannelsLastShared:
        if (!plan_.staged)
          start_channels_last_shared<OP, AnyBins<Acc<T>>, false>();
        else if (workload_.pooling->standard)
          start_channels_last_shared<OP, StandardBins<Acc<T>>, true>();
        else
          start_channels_last_shared<OP, AnyBins<Acc<T>>, true>();
        break;
    }
  }

  template <Operation OP, class Bins, class Units>
  void choose_contiguous_vector(const Units& units) {
    if (plan_.vector == kVector) choose_contiguous_steps<OP, Bins, kVector>(units);
    if constexpr (sizeof(T) == 2) {
      if (plan_.vector == 4) choose_contiguous_steps<OP, Bins, 4>(units);
    }
    if (plan_.vector == 1) choose_contiguous_steps<OP, Bins, 1>(units);
  }

  template <Operation OP, class Bins, int V, class Units>
  void choose_contiguous_steps(const Units& units) {
    constexpr bool kStandard = Units::kOneRound;
    if constexpr (V == 1 && sizeof(T) < 8 && OP != Operation::kGate) {
      if (plan_.steps == 16) start_contiguous<OP, Bins, V, 16>(units);
    } else {
      if (plan_.steps == 8) start_contiguous<OP, Bins, V, 8>(units);
    }
    if constexpr (V > 1 && sizeof(T) < 8 && kStandard && OP != Operation::kGate) {
      if (plan_.steps == 13) start_contiguous<OP, Bins, V, 13>(units);
    }
  }

  template <Operation OP, class Bins, int V, int STEPS, class Units>
  void start_contiguous(const Units& units) {
    const ContiguousArguments<T, Bins> arguments{typed<T>(operands_), plan_.tile, units,
                                                 Bins(*workload_.pooling)};
    if (is_backward(workload_.pass))
      start("contiguous_pipelined_backward", contiguous_pipelined_backward<T, V, STEPS, Bins, OP>,
            arguments);
    else
      start("contiguous_pipelined_forward", contiguous_pipelined_forward<T, V, STEPS, Bins, OP>,
            arguments);
  }

  template <Operation OP, int INDEX = 0>
  void start_channels_last_registers() {
    if constexpr (INDEX < kLaneVariantCount) {
      constexpr LaneVariant kVariant = kLaneVariants[INDEX];
      if (plan_.variant != INDEX) return start_channels_last_registers<OP, INDEX + 1>();
      if constexpr (has_lane_variant(kVariant, int(sizeof(T)))) {
        const Lanes lanes{workload_.images * workload_.image_pixels, workload_.channels,
                          static_cast<int>(workload_.pooling->edge[1])};
        const LaneArguments<T> arguments{typed<T>(operands_), lanes,
                                         StandardBins<Acc<T>>(*workload_.pooling)};
        if (is_backward(workload_.pass))
          start("channels_last_registers_backward",
                channels_last_registers_backward<T, kVector, kVariant.steps, kVariant.pixels,
                                                 kVariant.lanes, OP>,
                arguments);
        else
          start("channels_last_registers_forward",
                channels_last_registers_forward<T, kVector, kVariant.steps, kVariant.pixels,
                                                kVariant.lanes, OP>,
                arguments);
      }
    }
  }

  template <Operation OP, class Bins, bool STAGED>
  void start_channels_last_shared() {
    const SharedTileArguments<T, Bins> arguments{typed<T>(operands_), plan_.shared_tile,
                                                 Bins(*workload_.pooling)};
    if (is_backward(workload_.pass))
      start("channels_last_shared_backward", channels_last_shared_backward<T, Bins, OP, STAGED>,
            arguments);
    else
      start("channels_last_shared_forward", channels_last_shared_forward<T, Bins, OP, STAGED>,
            arguments);
  }

  void finish() {
    FinishArguments<T> arguments;
    arguments.partials = static_cast<const Acc<T>*>(operands_.partials);
    arguments.count = plan_.partial_count;
    arguments.contexts = workload_.pooling->contexts;
    arguments.dweight = operands_.dweight;
    arguments.dbias = operands_.dbias;
    arguments.weight_kind = operands_.weight.kind;
    arguments.bias_kind = operands_.bias.kind;
    const int shared = kFinishThreads / kWarp * int(sizeof(Acc<T>));
    launcher_(
        finish_parameters<T>,
        Launch{"finish_parameters", arguments.contexts + 1, kFinishThreads, shared, 1, plan_.early},
        arguments);
  }

  template <class Arguments>
  void start(const char* name, void (*kernel)(Arguments), const Arguments& arguments) {
    const int cluster = plan_.method == Method::kContiguousPipelined ? plan_.tile.cluster : 1;
    launcher_(kernel,
              Launch{name, plan_.blocks, plan_.threads, plan_.shared_bytes, cluster, plan_.early},
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
