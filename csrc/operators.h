// The operators, written once for every device. A device derives its `Call` from Arguments, with
//   Call(Operation, Pass, x, weight, bias, levels, eps)
//   void launch()                        runs the kernels on `tensors`; x has at least one element
//   Tensor d_weight(), Tensor d_bias()   backward pass, after launch(); zero where it did not run
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "checks.h"

namespace ppcr {

using Levels = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// What all operators take, checked.
struct Arguments {
  Operation operation;
  Pass pass;
  const Levels& levels;
  Pooling pooling;
  Shape shape;
  Tensor x, weight;  // x in a layout that the kernels read, weight contiguous
  MaybeTensor bias;
  double eps;
  TensorPointers tensors;

  Arguments(Operation operation, Pass pass, const Tensor& input, const Tensor& given_weight,
            const MaybeTensor& bias, const Levels& levels, double given_eps)
      : operation(operation), pass(pass), levels(levels), bias(bias) {
    check_x(input);
    pooling = check_parameters(input, given_weight, bias, levels, given_eps);
    x = to_layout(input, shape);
    weight = to_contiguous(given_weight);
    tensors.x = x.const_data_ptr();
    // Zero would divide by zero where all contexts agree.
    eps = std::max<double>(given_eps, is_double() ? std::numeric_limits<double>::min()
                                                  : std::numeric_limits<float>::min());
  }
  bool is_double() const { return x.scalar_type() == ScalarType::Double; }
};

template <class Call>
struct Operators {
  using Gradients = std::tuple<Tensor, Tensor, Tensor>;                     // dx, dweight, dbias
  using GradientsAndResidual = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, d_residual, ...

  static Tensor ppcr(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                     const Levels& levels, double eps) {
    Call call(Operation::kPpcr, Pass::kForward, x, weight, bias, levels, eps);
    return forward(call, new_like(call.x));
  }

  static Gradients ppcr_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                 const MaybeTensor& bias, const Levels& levels, double eps) {
    Call call(Operation::kPpcr, Pass::kBackward, x, weight, bias, levels, eps);
    check_like_x("grad", grad, x);
    return backward(call, to_layout_of(grad, call.x));
  }

  static Tensor gate(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                     const Levels& levels, double eps) {
    Call call(Operation::kGate, Pass::kForward, x, weight, bias, levels, eps);
    return forward(call, new_gate(x));
  }

  static Gradients gate_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                 const MaybeTensor& bias, const Levels& levels, double eps) {
    Call call(Operation::kGate, Pass::kBackward, x, weight, bias, levels, eps);
    check_like_gate("grad", grad, x);
    return backward(call, to_contiguous(grad));
  }

  static Tensor add_relu(const Tensor& x, const Tensor& residual, const Tensor& weight,
                         const MaybeTensor& bias, const Levels& levels, double eps) {
    Call call(Operation::kAddRelu, Pass::kForward, x, weight, bias, levels, eps);
    check_like_x("residual", residual, x);
    const Tensor added = to_layout_of(residual, call.x);
    call.tensors.residual = added.const_data_ptr();
    return forward(call, new_like(call.x));
  }

  static GradientsAndResidual add_relu_backward(const Tensor& grad, const Tensor& x,
                                                const Tensor& y, const Tensor& weight,
                                                const MaybeTensor& bias, const Levels& levels,
                                                double eps) {
    Call call(Operation::kAddRelu, Pass::kBackward, x, weight, bias, levels, eps);
    check_like_x("grad", grad, x);
    check_like_x("y", y, x);
    const Tensor output = to_layout_of(y, call.x), d_residual = new_like(call.x);
    call.tensors.y = const_cast<void*>(output.const_data_ptr());  // the backward pass reads it
    call.tensors.d_residual = d_residual.mutable_data_ptr();
    auto [dx, d_weight, d_bias] = backward(call, to_layout_of(grad, call.x));
    return {std::move(dx), d_residual, std::move(d_weight), std::move(d_bias)};
  }

  template <class Library>
  static void register_in(Library& library) {
    library.impl("ppcr", TORCH_BOX(&ppcr));
    library.impl("ppcr_backward", TORCH_BOX(&ppcr_backward));
    library.impl("ppcr_gate", TORCH_BOX(&gate));
    library.impl("ppcr_gate_backward", TORCH_BOX(&gate_backward));
    library.impl("ppcr_add_relu", TORCH_BOX(&add_relu));
    library.impl("ppcr_add_relu_backward", TORCH_BOX(&add_relu_backward));
  }

 private:
  static Tensor forward(Call& call, Tensor y) {
    call.tensors.y = y.mutable_data_ptr();
    if (call.x.numel() > 0) call.launch();
    return y;
  }
  static Gradients backward(Call& call, const Tensor& grad) {
    Tensor dx = new_like(call.x);
    call.tensors.grad = grad.const_data_ptr();
    call.tensors.dx = dx.mutable_data_ptr();
    if (call.x.numel() > 0) call.launch();
    return {std::move(dx), call.d_weight(), call.d_bias()};
  }
};

}  // namespace ppcr
