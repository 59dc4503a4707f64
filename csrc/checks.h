// Argument checks, layouts and allocation, shared by both devices. The Python layer has checked
// most arguments already, with its own error types; these checks keep a direct call of
// torch.ops.ppcr_ext.* from reading out of bounds.
#pragma once
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ppcr_types.h"

namespace ppcr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// PyTorch 2.10 to 2.12 have only the macro of the header-only library for calls of the C interface.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#define PPCR_CHECK(condition, ...) STD_TORCH_CHECK(condition, "ppcr_ext: ", __VA_ARGS__)

inline std::string shape_of(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t d = 0; d < dim; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}
inline std::string shape_of(const Tensor& t) { return shape_of(t.sizes().data(), t.dim()); }

inline std::string name_of(ScalarType type) { return torch::headeronly::toString(type); }

inline void check_same_device(const char* name, const Tensor& t, const Tensor& x) {
  PPCR_CHECK(t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() &&
                 t.get_device_index() == x.get_device_index(),
             name, " must be on x's device");
}

inline void check_x(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  PPCR_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                 type == ScalarType::BFloat16,
             "x must be float32, float64, float16 or bfloat16, got ", name_of(type));
  PPCR_CHECK(x.dim() >= 2, "x must have shape [N, C, *spatial], got ", shape_of(x));
}

// What has the shape of x, or of its gate where channels is 1, and its dtype and device.
inline void check_like(const char* name, const Tensor& t, const Tensor& x, int64_t channels,
                       const char* shape) {
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == (i == 1 ? channels : x.size(i));
  PPCR_CHECK(same, name, " must have ", shape, shape_of(x), ", got ", shape_of(t));
  PPCR_CHECK(t.scalar_type() == x.scalar_type(), name, " must have x's dtype ",
             name_of(x.scalar_type()), ", got ", name_of(t.scalar_type()));
  check_same_device(name, t, x);
}
inline void check_like_x(const char* name, const Tensor& t, const Tensor& x) {
  check_like(name, t, x, x.size(1), "x's shape ");
}
inline void check_like_gate(const char* name, const Tensor& t, const Tensor& x) {
  check_like(name, t, x, 1, "the gate's shape [N, 1, *spatial] of x ");
}

inline void check_parameter(const char* name, const Tensor& t, int64_t count, const Tensor& x) {
  PPCR_CHECK(t.dim() == 1 && t.size(0) == count, name, " must have shape [", count, "], got ",
             shape_of(t));
  const ScalarType type = t.scalar_type(), x_type = x.scalar_type();
  PPCR_CHECK(type == x_type || (type == ScalarType::Float && x_type != ScalarType::Double), name,
             " must be float32 or x's dtype (float64 for a float64 x), got ", name_of(type));
  check_same_device(name, t, x);
}

inline Pooling check_parameters(const Tensor& x, const Tensor& weight,
                                const std::optional<Tensor>& bias,
                                const std::vector<int64_t>& levels, double eps) {
  Pooling pooling;
  const char* wrong =
      make_pooling(levels.data(), static_cast<int64_t>(levels.size()), x.size(1), pooling);
  PPCR_CHECK(wrong == nullptr, wrong);
  check_parameter("weight", weight, pooling.contexts, x);
  if (bias) check_parameter("bias", *bias, 1, x);
  PPCR_CHECK(std::isfinite(eps) && eps > 0, "eps must be positive and finite, got ", eps);
  return pooling;
}

// Each pixel's channels are consecutive, and pixels dense: torch's channels_last, at any rank.
// Strides of size-1 dimensions say nothing.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  const auto dense = [&](int64_t d) {
    const bool ok = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return ok;
  };
  if (!dense(1)) return false;
  for (int64_t d = x.dim() - 1; d >= 2; --d)
    if (!dense(d)) return false;
  return dense(0);
}

// Uninitialized, on the device of `like` and with its dtype, unless another is named. Straight from
// the C interface: a call through the dispatcher by name, as torch::stable::empty_like makes it,
// takes 2 us, and a small backward pass makes three.
using MaybeType = std::optional<ScalarType>;
inline Tensor new_strided(const Tensor& like, int64_t dim, const int64_t* sizes,
                          const int64_t* strides, MaybeType of_type = std::nullopt) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (of_type) dtype = static_cast<int32_t>(*of_type);
  AtenTensorHandle handle = nullptr;
  try {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle));
  } catch (const std::runtime_error& error) {
    // Before 2.13 PyTorch names only this call and no reason. The sizes are those of existing
    // tensors, so the reason is memory.
    if (std::string(error.what()).rfind("aoti_torch_empty_strided", 0) != 0) throw;
    throw std::runtime_error("ppcr_ext: out of memory: no tensor of shape " + shape_of(sizes, dim) +
                             " fits");
  }
  return Tensor(handle);
}
// Shape and strides of a dense x.
inline Tensor new_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  return new_strided(x, x.dim(), sizes.data(), strides.data());
}

using Sizes = std::vector<int64_t>;
inline Tensor new_contiguous(const Tensor& like, const Sizes& sizes,
                             MaybeType of_type = std::nullopt) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  const auto dim = static_cast<int64_t>(sizes.size());
  return new_strided(like, dim, sizes.data(), strides.data(), of_type);
}

inline Tensor new_vector(const Tensor& like, int64_t n) { return new_contiguous(like, {n}); }

inline Tensor new_gate(const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = 1;
  return new_contiguous(x, sizes);
}

// t itself where it is contiguous, else its copy.
inline Tensor to_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor copy = new_contiguous(t, {t.sizes().begin(), t.sizes().end()});
  return torch::stable::copy_(copy, t);
}

struct Shape {
  int64_t samples, channels, pixels;  // N, C, product of the spatial sizes
  bool channels_last;
};

// x itself where its layout is one of the two that kernels read, else its one contiguous copy.
inline Tensor to_layout(const Tensor& x, Shape& shape) {
  shape = {x.size(0), x.size(1), 1, false};
  for (int64_t d = 2; d < x.dim(); ++d) shape.pixels *= x.size(d);
  const bool contiguous = x.is_contiguous(), last = !contiguous && is_channels_last(x);
  // With one pixel per sample both layouts are the same, and channels_last has the longer rows.
  shape.channels_last = last || shape.pixels == 1;
  return contiguous || last ? x : to_contiguous(x);
}

// t in x's layout, copied where it has another. x comes from to_layout.
inline Tensor to_layout_of(const Tensor& t, const Tensor& x) {
  bool same = true;
  for (int64_t d = 0; d < x.dim(); ++d)
    same = same && (x.size(d) == 1 || t.stride(d) == x.stride(d));
  if (same) return t;
  Tensor copy = new_like(x);
  return torch::stable::copy_(copy, t);
}

}  // namespace ppcr
