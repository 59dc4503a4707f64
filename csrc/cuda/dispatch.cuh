// From a plan to the compiled kernel. A Launcher starts kernels: on a GPU with cudaLaunchKernelEx,
// in the tests on the CPU. It has
//   template <class Arguments> void operator()(void (*kernel)(Arguments), const Launch&, const
//   Arguments&)
#pragma once
#include "channel_major_backward.cuh"
#include "channel_major_forward.cuh"
#include "finish_kernels.cuh"
#include "pixel_major_kernels.cuh"
#include "pixel_tile_kernels.cuh"
#include "plan.h"

namespace ppcr::cuda {

struct Launch {
  const char* name;
  int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster;
  bool early;  // may be set up while the kernel before it in the stream ends, for which it waits
               // itself
};

template <class T>
Tensors<T> typed(const Operands& operands) {
  Tensors<T> tensors;
  tensors.x = static_cast<const T*>(operands.x);
  tensors.grad = static_cast<const T*>(operands.grad);
  tensors.extra_in = static_cast<const T*>(operands.extra_in);
  tensors.out = static_cast<T*>(operands.out);
  tensors.extra_out = static_cast<T*>(operands.extra_out);
  tensors.weight = operands.weight;
  tensors.bias = operands.bias;
  tensors.eps = static_cast<Acc<T>>(operands.eps);
  tensors.partials = static_cast<Acc<T>*>(operands.partials);
  return tensors;
}

template <class T, class Launcher>
class Dispatch {
 public:
  Dispatch(const Problem& problem, const Plan& plan, const Operands& operands, Launcher& launcher)
      : problem_(problem), plan_(plan), operands_(operands), launcher_(launcher) {}

  void run() {
    switch (problem_.mode) {
      case Mode::kScale:
        run_mode<Mode::kScale>();
        break;
      case Mode::kAddRelu:
        run_mode<Mode::kAddRelu>();
        break;
      case Mode::kGate:
        run_mode<Mode::kGate>();
        break;
    }
    if (problem_.backward) finish();
  }

  // False where a plan names something that is not compiled: a bug of the planner.
  bool launched() const { return launched_; }

 private:
  static constexpr int kVector = 16 / int(sizeof(T));

  template <Mode MODE>
  void run_mode() {
    switch (plan_.kind) {
      case KernelKind::kChannelMajor:
        if (problem_.pooling->standard)
          channel_major_vector<MODE, StandardBins<Acc<T>>>(
              equal_units(*problem_.pooling, plan_.unit_count));
        else
          channel_major_vector<MODE, AnyBins<Acc<T>>>(
              table_units(*problem_.pooling, plan_.unit_count));
        break;
      case KernelKind::kPixelMajor:
        if constexpr (MODE != Mode::kGate) pixel_major<MODE>();
        break;
      case KernelKind::kPixelTile:
        if (!plan_.staged)
          pixel_tile<MODE, AnyBins<Acc<T>>, false>();
        else if (problem_.pooling->standard)
          pixel_tile<MODE, StandardBins<Acc<T>>, true>();
        else
          pixel_tile<MODE, AnyBins<Acc<T>>, true>();
        break;
    }
  }

  template <Mode MODE, class Bins, class Units>
  void channel_major_vector(const Units& units) {
    if (plan_.vector == kVector) channel_major_steps<MODE, Bins, kVector>(units);
    if constexpr (sizeof(T) == 2) {
      if (plan_.vector == 4) channel_major_steps<MODE, Bins, 4>(units);
    }
    if (plan_.vector == 1) channel_major_steps<MODE, Bins, 1>(units);
  }

  template <Mode MODE, class Bins, int V, class Units>
  void channel_major_steps(const Units& units) {
    constexpr bool kStandard = Units::kOneRound;
    if constexpr (V == 1 && sizeof(T) < 8 && MODE != Mode::kGate) {
      if (plan_.steps == 16) channel_major<MODE, Bins, V, 16>(units);
    } else {
      if (plan_.steps == 8) channel_major<MODE, Bins, V, 8>(units);
    }
    if constexpr (V > 1 && sizeof(T) < 8 && kStandard && MODE != Mode::kGate) {
      if (plan_.steps == 13) channel_major<MODE, Bins, V, 13>(units);
    }
  }

  template <Mode MODE, class Bins, int V, int STEPS, class Units>
  void channel_major(const Units& units) {
    const ChannelMajorArguments<T, Bins> arguments{typed<T>(operands_), plan_.tile, units,
                                                   Bins(*problem_.pooling)};
    if (problem_.backward)
      launch("channel_major_backward", channel_major_backward<T, V, STEPS, Bins, MODE>, arguments);
    else
      launch("channel_major_forward", channel_major_forward<T, V, STEPS, Bins, MODE>, arguments);
  }

  template <Mode MODE, int INDEX = 0>
  void pixel_major() {
    if constexpr (INDEX < kLaneVariantCount) {
      constexpr LaneVariant kVariant = kLaneVariants[INDEX];
      if (plan_.variant != INDEX) return pixel_major<MODE, INDEX + 1>();
      if constexpr (has_lane_variant(kVariant, int(sizeof(T)))) {
        const Lanes lanes{problem_.images * problem_.image_pixels, problem_.channels,
                          static_cast<int>(problem_.pooling->edge[1])};
        const PixelMajorArguments<T> arguments{typed<T>(operands_), lanes,
                                               StandardBins<Acc<T>>(*problem_.pooling)};
        if (problem_.backward)
          launch("pixel_major_backward",
                 pixel_major_backward<T, kVector, kVariant.steps, kVariant.pixels, kVariant.lanes,
                                      MODE>,
                 arguments);
        else
          launch("pixel_major_forward",
                 pixel_major_forward<T, kVector, kVariant.steps, kVariant.pixels, kVariant.lanes,
                                     MODE>,
                 arguments);
      }
    }
  }

  template <Mode MODE, class Bins, bool STAGED>
  void pixel_tile() {
    const PixelTileArguments<T, Bins> arguments{typed<T>(operands_), plan_.pixel_tile,
                                                Bins(*problem_.pooling)};
    if (problem_.backward)
      launch("pixel_tile_backward", pixel_tile_backward<T, Bins, MODE, STAGED>, arguments);
    else
      launch("pixel_tile_forward", pixel_tile_forward<T, Bins, MODE, STAGED>, arguments);
  }

  void finish() {
    FinishArguments<T> arguments;
    arguments.partials = static_cast<const Acc<T>*>(operands_.partials);
    arguments.count = plan_.partial_count;
    arguments.contexts = problem_.pooling->contexts;
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
  void launch(const char* name, void (*kernel)(Arguments), const Arguments& arguments) {
    const int cluster = plan_.kind == KernelKind::kChannelMajor ? plan_.tile.cluster : 1;
    launcher_(kernel,
              Launch{name, plan_.blocks, plan_.threads, plan_.shared_bytes, cluster, plan_.early},
              arguments);
    launched_ = true;
  }

  const Problem& problem_;
  const Plan& plan_;
  const Operands& operands_;
  Launcher& launcher_;
  bool launched_ = false;
};

}  // namespace ppcr::cuda
