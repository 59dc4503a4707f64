// What one operator reads and writes where: the elements of a tile's tensors.
#pragma once
#include "gate_step.h"

namespace ppcr::PPCR_CAPABILITY {

template <Operation operation, Pass pass, class T>
struct Elements {
  static constexpr bool kBackward = is_backward(pass);
  static constexpr bool kGate = operation == Operation::kGate;
  static constexpr bool kAddRelu = operation == Operation::kAddRelu;
  static constexpr bool kDot = kBackward && !kGate;    // the gate's gradient is a sum over channels
  static constexpr bool kApply = kBackward || !kGate;  // an element is written for each of x
  static constexpr bool kPairs = PPCR_SIMD_BYTES > 16 && std::is_same_v<T, BFloat16>;

  const T *x, *grad, *residual, *y;
  T *out, *d_residual;  // out: y or dx

  PPCR_HD Elements(const TensorPointers& t, int64_t offset) {
    const auto at = [&](const void* p) { return p ? static_cast<const T*>(p) + offset : nullptr; };
    x = at(t.x);
    grad = kGate ? nullptr : at(t.grad);
    residual = at(t.residual);
    y = kGate ? nullptr : at(t.y);
    out = const_cast<T*>(kBackward ? at(t.dx) : y);
    d_residual = const_cast<T*>(at(t.d_residual));
  }
  // The gradient that reaches x * g: add_relu's passes the mask of the relu and is stored as the
  // residual's, that of two vectors at once with the second.
  template <class Count>
  PPCR_HD auto gradient(int64_t at, Count count) const {
    auto g = load(grad + at, count);
    if constexpr (kAddRelu) {
      g = load(y + at, count) <= 0 ? decltype(g){} : g;
      if constexpr (std::is_same_v<Count, Odd>)
        store(d_residual + at, gradient(at, Even{}), g);
      else if constexpr (!std::is_same_v<Count, Even>)
        store(d_residual + at, g, count);
    }
    return g;
  }
  // The elements of y or dx.
  template <class Count, class V>
  PPCR_HD V value(int64_t at, Count count, V gate, V shift) const {
    if constexpr (kGate) {
      return shift;
    } else if constexpr (kBackward) {
      return multiply_add(load((kAddRelu ? d_residual : grad) + at, count), gate, shift);
    } else if constexpr (kAddRelu) {
      const V v = multiply_add(load(x + at, count), gate, load(residual + at, count));
      return v <= 0 ? V{} : v;  // NaN passes, as in torch
    } else {
      return load(x + at, count) * gate;
    }
  }
  template <class Count, class V>
  PPCR_HD void apply(int64_t at, Count count, V gate, V shift) const {
    store(out + at, value(at, count, gate, shift), count);
  }
};

// A tile of pixels. Between its two passes it keeps rows of one value per pixel: row k < segments
// the sum of segment k (after the gate step of a backward pass: what its channels add to dx), the
// row after them the dot product or gate gradient (after the gate step: the gate).
template <Operation operation, Pass pass, class T>
struct Tile : Elements<operation, pass, T> {
  using S = Acc<T>;
  Run<S> run;
  S* rows;
  int stride;  // from row to row
  int segments;

  PPCR_HD Tile(const Problem& p, int64_t offset, Run<S> run, S* rows, int stride)
      : Elements<operation, pass, T>(p.tensors, offset),
        run(run),
        rows(rows),
        stride(stride),
        segments(p.pooling.segments) {}
  PPCR_HD S* row(int k) const { return rows + k * stride; }
  PPCR_HD S* gates() const { return row(segments); }

  // The gate, or its gradient, between memory and the last row. pixel: of the whole tensor.
  PPCR_HD void move_gates(const Problem& p, int64_t pixel) const {
    for (int i = 0; i < run.vectors; ++i) {
      const int64_t at = pixel + run.offset(i);
      const int n = run.lanes(i);
      S* const row = gates() + i * kLanes<S>;
      if constexpr (Tile::kBackward) {
        const T* const grad = static_cast<const T*>(p.tensors.grad) + at;
        store(row, n < kLanes<S> ? load(grad, n) : load(grad));
      } else {
        T* const y = static_cast<T*>(p.tensors.y) + at;
        n < kLanes<S> ? store(y, load(row), n) : store(y, load(row));
      }
    }
  }
};

}  // namespace ppcr::PPCR_CAPABILITY
