// The operators on the CPU: checks, allocation, and one parallel loop over the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "kernels.h"

extern "C" __attribute__((visibility("default"))) const char* ppcr_cpu_capability() {
  return ppcr::cpu_capability();
}

namespace ppcr {
namespace {

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      return Dtype::kBFloat16;
  }
}

// The few values of weight and bias, whatever their dtype.
template <class T>
void read_as(const Tensor& t, double* values) {
  const T* p = t.const_data_ptr<T>();
  for (int64_t i = 0; i < t.size(0); ++i) values[i] = static_cast<double>(p[i * t.stride(0)]);
}
template <class T>
void write_as(const Tensor& t, const double* values) {
  T* p = t.mutable_data_ptr<T>();
  for (int64_t i = 0; i < t.size(0); ++i) p[i] = static_cast<T>(values[i]);
}
void read(const Tensor& t, double* values) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return read_as<float>(t, values);
    case ScalarType::Double:
      return read_as<double>(t, values);
    case ScalarType::Half:
      return read_as<torch::headeronly::Half>(t, values);
    default:
      return read_as<torch::headeronly::BFloat16>(t, values);
  }
}
void write(const Tensor& t, const double* values) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return write_as<float>(t, values);
    case ScalarType::Double:
      return write_as<double>(t, values);
    case ScalarType::Half:
      return write_as<torch::headeronly::Half>(t, values);
    default:
      return write_as<torch::headeronly::BFloat16>(t, values);
  }
}

struct Call {
  Tensor x, weight;
  std::optional<Tensor> bias;
  Problem problem{};

  Call(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
       const std::vector<int64_t>& levels, double eps)
      : weight(weight), bias(bias) {
    check_x(input);
    problem.pooling = check_parameters(input, weight, bias, levels, eps);
    Shape shape;
    x = to_layout(input, shape);
    problem.images = shape.samples;
    problem.channels = shape.channels;
    problem.pixels = shape.pixels;
    problem.pixel_major = shape.pixel_major;
    problem.x = x.const_data_ptr();
    read(weight, problem.weight);
    if (bias) read(*bias, &problem.bias);
    // Zero would divide by zero where all contexts agree.
    problem.eps = std::max<double>(eps, x.scalar_type() == ScalarType::Double
                                            ? std::numeric_limits<double>::min()
                                            : std::numeric_limits<float>::min());
  }

  void run(Op op) {
    if (x.numel() == 0) return;
    plan(problem, static_cast<int64_t>(x.element_size()));
    std::vector<double> partial;
    if (is_backward(op)) {
      partial.resize(problem.chunks * (problem.pooling.contexts + 1));
      problem.partial = partial.data();
    }
    const Kernel kernel = find_kernel(op, dtype_of(x));
    constexpr int64_t kWorthAThread = 32768;  // elements, as in torch's own loops
    const int64_t grain = std::max<int64_t>(1, problem.chunks * kWorthAThread / x.numel());
    torch::stable::parallel_for(0, problem.chunks, grain,
                                [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
    for (int64_t c = 0; is_backward(op) && c < problem.chunks; ++c)
      for (int l = 0; l <= problem.pooling.contexts; ++l)
        d_params_[l] += partial[c * (problem.pooling.contexts + 1) + l];
  }

  Tensor d_weight() const {
    Tensor d = new_vector(weight, problem.pooling.contexts);
    write(d, d_params_);
    return d;
  }
  Tensor d_bias() const {
    Tensor d = bias ? new_vector(*bias, 1) : new_vector(weight, 0);
    write(d, d_params_ + problem.pooling.contexts);
    return d;
  }

 private:
  double d_params_[kMaxContexts + 1] = {};
};

using Parameters = std::vector<int64_t>;

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const Parameters& levels, double eps) {
  Call call(x, weight, bias, levels, eps);
  Tensor y = new_like(call.x);
  call.problem.out = y.mutable_data_ptr();
  call.run(Op::kForward);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                            const Tensor& weight, const std::optional<Tensor>& bias,
                                            const Parameters& levels, double eps) {
  Call call(x, weight, bias, levels, eps);
  check_like_x("grad", grad, x);
  const Tensor g = to_layout_of(grad, call.x);
  Tensor dx = new_like(call.x);
  call.problem.grad = g.const_data_ptr();
  call.problem.out = dx.mutable_data_ptr();
  call.run(Op::kBackward);
  return {dx, call.d_weight(), call.d_bias()};
}

Tensor gate(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Parameters& levels, double eps) {
  Call call(x, weight, bias, levels, eps);
  Tensor g = new_gate(x);
  call.problem.out = g.mutable_data_ptr();
  call.run(Op::kGate);
  return g;
}

std::tuple<Tensor, Tensor, Tensor> gate_backward(const Tensor& grad, const Tensor& x,
                                                 const Tensor& weight,
                                                 const std::optional<Tensor>& bias,
                                                 const Parameters& levels, double eps) {
  Call call(x, weight, bias, levels, eps);
  check_gate_like("grad", grad, x);
  const Tensor g = to_contiguous(grad);
  Tensor dx = new_like(call.x);
  call.problem.grad = g.const_data_ptr();
  call.problem.out = dx.mutable_data_ptr();
  call.run(Op::kGateBackward);
  return {dx, call.d_weight(), call.d_bias()};
}

Tensor add_relu(const Tensor& x, const Tensor& residual, const Tensor& weight,
                const std::optional<Tensor>& bias, const Parameters& levels, double eps) {
  Call call(x, weight, bias, levels, eps);
  check_like_x("residual", residual, x);
  const Tensor r = to_layout_of(residual, call.x);
  Tensor y = new_like(call.x);
  call.problem.other = r.const_data_ptr();
  call.problem.out = y.mutable_data_ptr();
  call.run(Op::kAddRelu);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_relu_backward(const Tensor& grad, const Tensor& x,
                                                             const Tensor& y, const Tensor& weight,
                                                             const std::optional<Tensor>& bias,
                                                             const Parameters& levels, double eps) {
  Call call(x, weight, bias, levels, eps);
  check_like_x("grad", grad, x);
  check_like_x("y", y, x);
  const Tensor g = to_layout_of(grad, call.x), out = to_layout_of(y, call.x);
  Tensor dx = new_like(call.x), d_residual = new_like(call.x);
  call.problem.grad = g.const_data_ptr();
  call.problem.other = out.const_data_ptr();
  call.problem.out = dx.mutable_data_ptr();
  call.problem.grad_residual = d_residual.mutable_data_ptr();
  call.run(Op::kAddReluBackward);
  return {dx, d_residual, call.d_weight(), call.d_bias()};
}

}  // namespace
}  // namespace ppcr

STABLE_TORCH_LIBRARY_IMPL(ppcr_ext, CPU, m) {
  m.impl("ppcr", TORCH_BOX(&ppcr::forward));
  m.impl("ppcr_backward", TORCH_BOX(&ppcr::backward));
  m.impl("ppcr_gate", TORCH_BOX(&ppcr::gate));
  m.impl("ppcr_gate_backward", TORCH_BOX(&ppcr::gate_backward));
  m.impl("ppcr_add_relu", TORCH_BOX(&ppcr::add_relu));
  m.impl("ppcr_add_relu_backward", TORCH_BOX(&ppcr::add_relu_backward));
}
