// The operators on CUDA devices: a plan, and launches on torch's current stream. Nothing here
// synchronizes, and all memory comes from torch's allocator, so that calls can be captured in a
// CUDA graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <map>
#include <tuple>

#include "../operators.h"
#include "launch.h"

#ifndef PPCR_CUDA_ARCHITECTURES
#define PPCR_CUDA_ARCHITECTURES ""
#endif

// What the library was compiled for, such as "sm_80 sm_90 compute_120": binaries, then PTX.
extern "C" __attribute__((visibility("default"))) const char* ppcr_cuda_architectures() {
  return PPCR_CUDA_ARCHITECTURES;
}

namespace ppcr::cuda {
namespace {

// ---- devices

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Of the current device, which is `device`.
DeviceLimits limits_of(int device) {
  DeviceLimits limits;
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // Code compiled for less than compute_90 has no cluster instructions, even on a device that could
  // run them. Asked first: it throws where the library holds no code for the device.
  const bool clusters =
      running_architecture() >= 90 && attribute(cudaDevAttrClusterLaunch, device) != 0;
  limits.max_cluster = clusters ? kMaxCluster : 1;
  return limits;
}

// torch calls the CUDA operator if any of its tensors is on such a device.
int device_of(const Tensor& x) {
  PPCR_CHECK(x.is_cuda(), "x must be on a CUDA device, as the other tensors are");
  return x.get_device_index();
}

// ---- plans

// The kernels name the dtype: two of one size need not leave room for equally many blocks.
using PlanKey = std::tuple<int64_t, int64_t, int64_t, bool, const Kernels*, int, Operation, Pass,
                           int, Levels, std::string>;

// Planning takes tens to hundreds of microseconds, and a network calls with the same few shapes
// again and again.
const Plan& plan_for(const Workload& w, const Levels& levels, int device, const Kernels& kernels) {
  thread_local std::map<PlanKey, Plan> known;
  const char* const variable = std::getenv("PPCR_PLAN");
  const std::string forced = variable == nullptr ? "" : variable;
  PlanKey key{w.images,    w.channels, w.image_pixels, w.channels_last, &kernels, w.alignment,
              w.operation, w.pass,     device,         levels,          forced};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() > 1000) known.clear();
  const DeviceLimits limits = limits_of(device);
  Plan plan = make_plan(w, limits, forced);
  PPCR_CHECK(plan.error.empty(), plan.error);
  if (plan.method == Method::kContiguousPipelined && !plan.fixed_grid)
    set_clusters(plan, kernels.resident_clusters(w, plan, limits.multiprocessors));
  return known[std::move(key)] = plan;
}

// ---- calls

using torch::stable::accelerator::DeviceGuard;

struct Call : private DeviceGuard, Arguments {
  // The guard comes first, since a copy of x is made on the current device.
  Call(Operation operation, Pass pass, const Tensor& input, const Tensor& given_weight,
       const MaybeTensor& bias, const Levels& levels, double eps)
      : DeviceGuard(device_of(input)),
        Arguments(operation, pass, input, given_weight, bias, levels, eps) {
    if (!is_backward(pass)) return;
    d_weight_ = new_vector(weight, weight.size(0));
    d_bias_ = bias ? new_vector(*bias, 1) : new_vector(weight, 0);
    if (x.numel() > 0) return;
    torch::stable::zero_(d_weight_);
    torch::stable::zero_(d_bias_);
  }

  void launch() {
    Operands operands{tensors};
    operands.weight = parameter(weight);
    if (bias) operands.bias = parameter(*bias);
    operands.eps = eps;
    const int bytes = static_cast<int>(x.element_size()),
              alignment = alignment_of(operation, tensors);
    const Workload workload{shape.samples,       shape.channels, shape.pixels,
                            shape.channels_last, bytes,          alignment,
                            operation,           pass,           &pooling};
    const int device = x.get_device_index();
    const ScalarType type = x.scalar_type();
    const Kernels& kernels = type == ScalarType::Float    ? kFloat
                             : type == ScalarType::Half   ? kHalf
                             : type == ScalarType::Double ? kDouble
                                                          : kBFloat16;
    const Plan& plan = plan_for(workload, levels, device, kernels);
    Tensor partials;
    if (is_backward(pass)) {
      partials = new_contiguous(x, {pooling.contexts + 1, plan.partial_count}, accumulator());
      operands.partials = partials.mutable_data_ptr();
      operands.dweight = d_weight_.mutable_data_ptr();
      operands.dbias = bias ? d_bias_.mutable_data_ptr() : nullptr;
    }
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    kernels.launch(workload, plan, operands, static_cast<cudaStream_t>(stream));
  }

  Tensor d_weight() const { return d_weight_; }
  Tensor d_bias() const { return d_bias_; }

 private:
  ScalarType accumulator() const { return is_double() ? ScalarType::Double : ScalarType::Float; }

  Parameter parameter(const Tensor& t) const {
    const bool wide = t.scalar_type() == accumulator();
    return {t.const_data_ptr(), wide ? Parameter::kWide : Parameter::kOwn};
  }

  Tensor d_weight_, d_bias_;
};

}  // namespace
}  // namespace ppcr::cuda

STABLE_TORCH_LIBRARY_IMPL(ppcr_ext, CUDA, m) { ppcr::Operators<ppcr::cuda::Call>::register_in(m); }
