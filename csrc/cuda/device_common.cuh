// What all kernels share: vectors of elements, the parameters in shared memory, the arithmetic of a
// GPU for ppcr_pixel.h.
#pragma once
#include <type_traits>

#include "operands.h"
#include "platform.cuh"
#include "tile.h"

namespace ppcr::cuda {

// ---- vectors of elements

// Bytes as they lie in memory: one load or store instruction.
template <int BYTES>
using WordOf = std::conditional_t<
    BYTES == 16, uint4,
    std::conditional_t<BYTES == 8, uint2,
                       std::conditional_t<BYTES == 4, unsigned, unsigned short>>>;
template <class T, int V>
using Word = WordOf<int(sizeof(T)) * V>;

template <class T, int V>
PPCR_DEVICE Word<T, V> load_if(bool wanted, const T* from) {
  Word<T, V> word;
  memset(&word, 0, sizeof word);
  if (wanted) word = __ldca(reinterpret_cast<const Word<T, V>*>(from));
  return word;
}
template <class T, int V>
PPCR_DEVICE void reload_if(bool wanted, const T* from, Word<T, V>& word) {
  reload_word_if(wanted, reinterpret_cast<const Word<T, V>*>(from), word);
}
template <class T, int V>
PPCR_DEVICE void store_if(bool wanted, T* to, const Word<T, V>& word) {
  store_word_if(wanted, reinterpret_cast<Word<T, V>*>(to), word);
}

template <class T, int V>
PPCR_DEVICE void unpack(const Word<T, V>& word, Acc<T> (&values)[V]) {
  if constexpr (std::is_same_v<T, BFloat16> && V % 2 == 0) {
    // The upper half of a float: one instruction each, where nvcc takes two.
    unsigned pairs[V / 2];
    memcpy(pairs, &word, sizeof pairs);
    PPCR_UNROLL
    for (int j = 0; j < V; ++j) {
      const unsigned bits = j % 2 == 0 ? pairs[j / 2] << 16 : pairs[j / 2] & 0xffff0000u;
      memcpy(&values[j], &bits, sizeof bits);
    }
  } else {
    T elements[V];
    memcpy(static_cast<void*>(elements), &word, sizeof elements);
    PPCR_UNROLL
    for (int j = 0; j < V; ++j) values[j] = Acc<T>(elements[j]);
  }
}
// Rounds into its place. Where it returned the result, nvcc made other code of two gates of float.
template <class T>
PPCR_DEVICE void narrow(Acc<T> value, T& to) {
  to = T(value);
}
template <class T, int V>
PPCR_DEVICE Word<T, V> pack(const Acc<T> (&values)[V]) {
  T elements[V];
  PPCR_UNROLL
  for (int j = 0; j < V; ++j) narrow<T>(values[j], elements[j]);
  Word<T, V> word;
  memcpy(&word, elements, sizeof word);
  return word;
}

// The gradient behind the ReLU, as torch masks it: where(y <= 0, 0, gy), the bits of gy untouched.
// A NaN of y lets gy pass. The result is opaque, or nvcc would keep it unpacked.
template <class T, int V>
PPCR_DEVICE Word<T, V> mask_relu(const Word<T, V>& grad, const Word<T, V>& y) {
  T gradients[V];
  Acc<T> outputs[V];
  memcpy(static_cast<void*>(gradients), &grad, sizeof gradients);
  unpack<T, V>(y, outputs);
  PPCR_UNROLL
  for (int j = 0; j < V; ++j)
    if (outputs[j] <= Acc<T>(0)) gradients[j] = T(Acc<T>(0));
  Word<T, V> masked;
  memcpy(&masked, gradients, sizeof masked);
  return opaque(masked);
}
template <class A>
PPCR_DEVICE A relu(A value) {
  return value <= A(0) ? A(0) : value;  // a NaN stays one, as in torch
}

// ---- parameters

template <class T>
PPCR_DEVICE Acc<T> read_parameter(const Parameter& parameter, int i) {
  if (parameter.kind == Parameter::kAbsent) return Acc<T>(0);
  if (parameter.kind == Parameter::kOwn) return Acc<T>(static_cast<const T*>(parameter.data)[i]);
  return static_cast<const Acc<T>*>(parameter.data)[i];
}

// Weights and, behind them, the bias. The caller's next block-wide barrier publishes them.
template <class T>
PPCR_DEVICE void stage_parameters(const Parameter& weight, const Parameter& bias, int contexts,
                                  Acc<T>* to) {
  PPCR_ROLLED
  for (int l = threadIdx.x; l <= contexts; l += blockDim.x)
    to[l] = l < contexts ? read_parameter<T>(weight, l) : read_parameter<T>(bias, 0);
}

constexpr int kBatch = 4;  // vectors in flight where a kernel reads what its registers do not hold

// What every kernel gets: see operands.h.
template <class T>
struct Tensors {
  const T* x;
  const T* grad;
  const T* residual;
  T* y;
  T* dx;
  T* d_residual;
  Parameter weight, bias;
  Acc<T> eps;
  Acc<T>* partials;  // [contexts + 1][partial_count]: shares of dweight and, in the last row, dbias
};

// ---- arithmetic

// The one place where it is fast. sigmoid of a float by __expf (2 + |1.173 z| ulp) and
// __fdividef (2 ulp), so within (4 + 1.2 |z|) units in the last place of g. rsqrtf: 2 ulp.
struct DeviceMath {
  static PPCR_DEVICE float inv_sqrt(float v) { return rsqrtf(v); }
  static PPCR_DEVICE double inv_sqrt(double v) { return rsqrt(v); }
  static PPCR_DEVICE float sigmoid(float z) { return __fdividef(1.f, 1.f + __expf(-z)); }
  static PPCR_DEVICE double sigmoid(double z) { return 1. / (1. + exp(-z)); }
};

template <class A, class Bins>
PPCR_DEVICE void compute_gate(const Bins& bins, const A* sums, const A* parameters, A eps,
                              Pixel<A, Bins>& pixel) {
  pixel_forward<DeviceMath>(bins, sums, parameters, parameters[bins.contexts()], eps, pixel);
}
template <class A, class Bins>
PPCR_DEVICE A compute_gradients(const Bins& bins, const Pixel<A, Bins>& pixel, A dg,
                                const A* parameters, A* dsums) {
  A weight_mean = 0;
  PPCR_UNROLL
  for (int l = 0; l < bins.contexts(); ++l) weight_mean += parameters[l];
  weight_mean *= A(1) / A(bins.contexts());
  return pixel_backward(bins, pixel, dg, parameters, weight_mean, dsums);
}

// Sum over `lanes` neighbouring lanes (a power of two), in a fixed order; every lane of the warp
// calls it.
template <class A>
PPCR_DEVICE A sum_lanes(A value, int lanes) {
  PPCR_UNROLL
  for (int offset = 1; offset < lanes; offset <<= 1)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// ---- from words to words

// y = x g, of add_relu relu(x g + residual).
template <class T, int V, Operation OP>
PPCR_DEVICE Word<T, V> recalibrate(const Word<T, V>& x, const Word<T, V>& residual,
                                   const Acc<T> (&gate)[V]) {
  Acc<T> values[V];
  unpack<T, V>(opaque(x), values);
  if constexpr (OP == Operation::kAddRelu) {
    Acc<T> added[V];
    unpack<T, V>(opaque(residual), added);
    PPCR_UNROLL
    for (int j = 0; j < V; ++j) values[j] = relu(values[j] * gate[j] + added[j]);
  } else {
    PPCR_UNROLL
    for (int j = 0; j < V; ++j) values[j] *= gate[j];
  }
  return pack<T, V>(values);
}

// gy as it arrives, or behind the ReLU.
template <class T, int V, Operation OP>
PPCR_DEVICE Word<T, V> load_gradient(const Tensors<T>& tensors, bool wanted, int64_t at) {
  const Word<T, V> grad = load_if<T, V>(wanted, tensors.grad + at);
  if constexpr (OP == Operation::kAddRelu)
    return mask_relu<T, V>(grad, load_if<T, V>(wanted, tensors.y + at));
  return grad;
}

// dx = gy g + dsum, and d_residual = gy behind the ReLU.
template <class T, int V, Operation OP>
PPCR_DEVICE void write_backward(const Tensors<T>& tensors, bool wanted, int64_t at,
                                const Word<T, V>& grad, const Acc<T> (&gate)[V],
                                const Acc<T> (&dsum)[V]) {
  Acc<T> values[V];
  unpack<T, V>(opaque(grad), values);
  PPCR_UNROLL
  for (int j = 0; j < V; ++j) values[j] = values[j] * gate[j] + dsum[j];
  store_if<T, V>(wanted, tensors.dx + at, pack<T, V>(values));
  if constexpr (OP == Operation::kAddRelu) store_if<T, V>(wanted, tensors.d_residual + at, grad);
}

}  // namespace ppcr::cuda
