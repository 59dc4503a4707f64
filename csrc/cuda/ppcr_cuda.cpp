// The operators on CUDA devices: checks, allocation, a plan, and launches on torch's current
// stream. Nothing here synchronizes, and all memory comes from torch's allocator, so that calls can
// be captured in a CUDA graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "launch.h"

#ifndef PPCR_CUDA_ARCHITECTURES
#define PPCR_CUDA_ARCHITECTURES ""
#endif

// What the library was compiled for, such as "sm_80 sm_90 compute_120": binaries and, in the end,
// PTX.
extern "C" __attribute__((visibility("default"))) const char* ppcr_cuda_architectures() {
  return PPCR_CUDA_ARCHITECTURES;
}

namespace ppcr::cuda {
namespace {

// ----------------------------------------------------------------------------------------------------------------
// devices
int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Of the current device, which is `device`; asked once.
DeviceLimits limits_of(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceLimits limits;
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // Code compiled for less than compute_90 has no cluster instructions, even on a device that could
  // run them. Asked first: it throws where the library holds no code for the device.
  const bool clusters =
      running_architecture() >= 90 && attribute(cudaDevAttrClusterLaunch, device) != 0;
  limits.max_cluster = clusters ? kMaxCluster : 1;
  return known[device] = limits;
}

// torch calls the CUDA operator if any of its tensors is on such a device.
int device_of(const Tensor& x) {
  PPCR_CHECK(x.is_cuda(), "x must be on a CUDA device, as the other tensors are");
  return x.get_device_index();
}

// ------------------------------------------------------------------------------------------------------------------
// plans
using PlanKey = std::tuple<int64_t, int64_t, int64_t, bool, int, int, int, bool, int>;

// Planning takes tens to hundreds of microseconds, and a network calls with the same few shapes
// again and again.
const Plan& plan_for(const Problem& problem, const std::vector<int64_t>& levels, int device,
                     const Kernels& kernels) {
  thread_local std::map<std::pair<PlanKey, std::vector<int64_t>>, Plan> known;
  thread_local std::string known_forced;
  const char* const forced = std::getenv("PPCR_PLAN");
  const std::string text = forced == nullptr ? "" : forced;
  if (text != known_forced || known.size() > 1000) known.clear();
  known_forced = text;
  const PlanKey key{problem.images,      problem.channels,     problem.image_pixels,
                    problem.pixel_major, problem.element_size, problem.alignment,
                    int(problem.mode),   problem.backward,     device};
  const auto found = known.find({key, levels});
  if (found != known.end()) return found->second;
  Plan plan = make_plan(problem, limits_of(device), text.empty() ? nullptr : text.c_str());
  PPCR_CHECK(plan.error.empty(), plan.error);
  if (plan.kind == KernelKind::kChannelMajor && !plan.fixed_grid)
    set_clusters(plan, kernels.resident_clusters(problem, plan, limits_of(device).multiprocessors));
  return known[{key, levels}] = plan;
}

// -------------------------------------------------------------------------------------------------------------------
// calls One call of an operator: checks on construction, then the operands are set, then run().
class Call {
 public:
  Call(Mode mode, bool backward, const Tensor& input, const Tensor& weight,
       const std::optional<Tensor>& bias, const std::vector<int64_t>& levels, double eps)
      : guard_(device_of(input)), levels_(levels) {
    check_x(input);
    pooling_ = check_parameters(input, weight, bias, levels, eps);
    Shape shape;
    x = to_layout(input, shape);
    weight_ = to_contiguous(weight);
    if (bias) bias_ = *bias;
    problem_.images = shape.samples;
    problem_.channels = shape.channels;
    problem_.image_pixels = shape.pixels;
    problem_.pixel_major = shape.pixel_major;
    problem_.element_size = static_cast<int>(x.element_size());
    problem_.mode = mode;
    problem_.backward = backward;
    problem_.pooling = &pooling_;
    operands.x = x.const_data_ptr();
    operands.weight = parameter(weight_);
    if (bias_) operands.bias = parameter(*bias_);
    // Zero would divide by zero where all contexts agree.
    operands.eps = std::max<double>(
        eps, is_double() ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min());
    if (backward) {
      d_weight = new_vector(weight, weight.size(0));
      d_bias = bias ? new_vector(*bias, 1) : new_vector(weight, 0);
      operands.dweight = d_weight.mutable_data_ptr();
      operands.dbias = bias ? d_bias.mutable_data_ptr() : nullptr;
    }
  }

  void run() {
    if (x.numel() == 0) {
      if (problem_.backward) {
        torch::stable::zero_(d_weight);
        torch::stable::zero_(d_bias);
      }
      return;
    }
    // Gate mode reads and writes its one value per pixel singly, whatever the address.
    problem_.alignment =
        problem_.mode == Mode::kGate
            ? common_alignment({operands.x, problem_.backward ? operands.out : nullptr})
            : common_alignment(
                  {operands.x, operands.grad, operands.extra_in, operands.out, operands.extra_out});
    const int device = x.get_device_index();
    const ScalarType type = x.scalar_type();
    const Kernels& kernels = type == ScalarType::Float    ? kFloat
                             : type == ScalarType::Half   ? kHalf
                             : type == ScalarType::Double ? kDouble
                                                          : kBFloat16;
    const Plan& plan = plan_for(problem_, levels_, device, kernels);
    Tensor partials;
    if (problem_.backward) {
      const ScalarType wide = is_double() ? ScalarType::Double : ScalarType::Float;
      partials = new_contiguous(x, {pooling_.contexts + 1, plan.partial_count}, wide);
      operands.partials = partials.mutable_data_ptr();
    }
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    kernels.run(problem_, plan, operands, static_cast<cudaStream_t>(stream));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<int64_t> levels_;
  Pooling pooling_;
  Problem problem_;
  Tensor weight_;
  std::optional<Tensor> bias_;

  bool is_double() const { return x.scalar_type() == ScalarType::Double; }

  Parameter parameter(const Tensor& t) const {
    const ScalarType accumulator = is_double() ? ScalarType::Double : ScalarType::Float;
    return {t.const_data_ptr(),
            t.scalar_type() == accumulator ? Parameter::kWide : Parameter::kOwn};
  }

 public:
  Tensor x;  // in a layout that the kernels read
  Operands operands;
  Tensor d_weight, d_bias;  // backward
};

using Levels = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// ---------------------------------------------------------------------------------------------------------------
// operators
Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Levels& levels,
               double eps) {
  Call call(Mode::kScale, false, x, weight, bias, levels, eps);
  const Tensor y = new_like(call.x);
  call.operands.out = y.mutable_data_ptr();
  call.run();
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                            const Tensor& weight, const MaybeTensor& bias,
                                            const Levels& levels, double eps) {
  Call call(Mode::kScale, true, x, weight, bias, levels, eps);
  check_like_x("grad", grad, x);
  const Tensor gradient = to_layout_of(grad, call.x), dx = new_like(call.x);
  call.operands.grad = gradient.const_data_ptr();
  call.operands.out = dx.mutable_data_ptr();
  call.run();
  return {dx, call.d_weight, call.d_bias};
}

Tensor gate(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Levels& levels,
            double eps) {
  Call call(Mode::kGate, false, x, weight, bias, levels, eps);
  const Tensor g = new_gate(x);
  call.operands.out = g.mutable_data_ptr();
  call.run();
  return g;
}

std::tuple<Tensor, Tensor, Tensor> gate_backward(const Tensor& grad, const Tensor& x,
                                                 const Tensor& weight, const MaybeTensor& bias,
                                                 const Levels& levels, double eps) {
  Call call(Mode::kGate, true, x, weight, bias, levels, eps);
  check_gate_like("grad", grad, x);
  const Tensor gradient = to_contiguous(grad), dx = new_like(call.x);
  call.operands.grad = gradient.const_data_ptr();
  call.operands.out = dx.mutable_data_ptr();
  call.run();
  return {dx, call.d_weight, call.d_bias};
}

Tensor add_relu(const Tensor& x, const Tensor& residual, const Tensor& weight,
                const MaybeTensor& bias, const Levels& levels, double eps) {
  Call call(Mode::kAddRelu, false, x, weight, bias, levels, eps);
  check_like_x("residual", residual, x);
  const Tensor added = to_layout_of(residual, call.x), y = new_like(call.x);
  call.operands.extra_in = added.const_data_ptr();
  call.operands.out = y.mutable_data_ptr();
  call.run();
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_relu_backward(const Tensor& grad, const Tensor& x,
                                                             const Tensor& y, const Tensor& weight,
                                                             const MaybeTensor& bias,
                                                             const Levels& levels, double eps) {
  Call call(Mode::kAddRelu, true, x, weight, bias, levels, eps);
  check_like_x("grad", grad, x);
  check_like_x("y", y, x);
  const Tensor gradient = to_layout_of(grad, call.x), output = to_layout_of(y, call.x);
  const Tensor dx = new_like(call.x), d_residual = new_like(call.x);
  call.operands.grad = gradient.const_data_ptr();
  call.operands.extra_in = output.const_data_ptr();
  call.operands.out = dx.mutable_data_ptr();
  call.operands.extra_out = d_residual.mutable_data_ptr();
  call.run();
  return {dx, d_residual, call.d_weight, call.d_bias};
}

}  // namespace
}  // namespace ppcr::cuda

STABLE_TORCH_LIBRARY_IMPL(ppcr_ext, CUDA, m) {
  m.impl("ppcr", TORCH_BOX(&ppcr::cuda::forward));
  m.impl("ppcr_backward", TORCH_BOX(&ppcr::cuda::backward));
  m.impl("ppcr_gate", TORCH_BOX(&ppcr::cuda::gate));
  m.impl("ppcr_gate_backward", TORCH_BOX(&ppcr::cuda::gate_backward));
  m.impl("ppcr_add_relu", TORCH_BOX(&ppcr::cuda::add_relu));
  m.impl("ppcr_add_relu_backward", TORCH_BOX(&ppcr::cuda::add_relu_backward));
}
