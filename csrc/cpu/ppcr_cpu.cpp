// The operators on the CPU: one parallel loop over the kernels.
#include <algorithm>
#include <vector>

#include "../operators.h"
#include "kernels.h"

extern "C" __attribute__((visibility("default"))) const char* ppcr_cpu_capability() {
  return ppcr::cpu_capability();
}

namespace ppcr {
namespace {

// Calls visit(T{}) with the C++ type of a dtype.
template <class Visit>
auto with_type_of(const Tensor& t, Visit visit) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return visit(float{});
    case ScalarType::Double:
      return visit(double{});
    case ScalarType::Half:
      return visit(torch::headeronly::Half{});
    default:
      return visit(torch::headeronly::BFloat16{});
  }
}

static_assert(int(Dtype::kHalf) == int(ScalarType::Half) &&
              int(Dtype::kFloat) == int(ScalarType::Float) &&
              int(Dtype::kDouble) == int(ScalarType::Double) &&
              int(Dtype::kBFloat16) == int(ScalarType::BFloat16));

// The few values of weight or bias.
void read(const Tensor& t, double* values) {
  with_type_of(
      t, [&](auto zero) { std::copy_n(t.const_data_ptr<decltype(zero)>(), t.size(0), values); });
}
Tensor vector_of(const Tensor& like, int64_t count, const double* values) {
  const Tensor t = new_contiguous(like, {count});
  with_type_of(t, [&](auto zero) {
    using T = decltype(zero);
    std::transform(values, values + count, t.mutable_data_ptr<T>(),
                   [](double value) { return static_cast<T>(value); });
  });
  return t;
}

struct Call : Arguments {
  using Arguments::Arguments;

  void launch() {
    const char* const wrong = wrong_settings();
    PPCR_CHECK(wrong == nullptr, wrong);
    const bool backward = is_backward(pass);
    Problem problem{shape.samples, shape.channels, shape.pixels, shape.channels_last,
                    pooling,       tensors,        eps};
    read(weight, problem.weight);
    if (bias) read(*bias, &problem.bias);
    plan(problem, static_cast<int64_t>(x.element_size()));
    std::vector<double> partial;
    if (backward) {
      partial.resize(problem.chunks * (pooling.contexts + 1));
      problem.partial = partial.data();
    }
    const Kernel kernel =
        find_kernel(problem, operation, pass, static_cast<Dtype>(x.scalar_type()));
    constexpr int64_t kWorthAThread = 32768;  // elements, as in torch's own loops
    const int64_t grain = std::max<int64_t>(1, problem.chunks * kWorthAThread / x.numel());
    torch::stable::parallel_for(0, problem.chunks, grain,
                                [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
    const double* share = partial.data();
    for (int64_t chunk = 0; backward && chunk < problem.chunks; ++chunk)
      for (int l = 0; l <= pooling.contexts; ++l) d_parameters_[l] += *share++;
  }

  Tensor d_weight() const { return vector_of(weight, pooling.contexts, d_parameters_); }
  Tensor d_bias() const {
    return vector_of(bias ? *bias : weight, bias ? 1 : 0, d_parameters_ + pooling.contexts);
  }

 private:
  double d_parameters_[kMaxContexts + 1] = {};
};

}  // namespace
}  // namespace ppcr

STABLE_TORCH_LIBRARY_IMPL(ppcr_ext, CPU, m) { ppcr::Operators<ppcr::Call>::register_in(m); }
