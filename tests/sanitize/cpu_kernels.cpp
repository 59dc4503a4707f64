// Runs the CPU kernels, without torch, over edge shapes: every operator, dtype, layout and method,
// on one thread and on three, against a plain evaluation in double. Built and run by
// tools/sanitize.py under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
//   cpu_kernels                the cases; prints how many
//   cpu_kernels overrun|race   a fault that the sanitizer must report
#include <thread>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/ppcr_pixel.h"
#include "operands.h"

using namespace ppcr;

namespace {

using Find = Kernel (*)(Operation, Pass, Dtype);

struct Case {
  Operation operation;
  Pass pass;
  Sizes sizes;
  bool channels_last;
  Method method;
};
struct Fault {
  bool overrun = false, race = false;
};

void run_threads(Kernel kernel, const Problem& problem, int threads, bool race) {
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) {
    const int64_t begin = race ? 0 : problem.chunks * i / threads,
                  end = race ? 1 : problem.chunks * (i + 1) / threads;
    pool.emplace_back([=, &problem] { kernel(problem, begin, end); });
  }
  for (std::thread& thread : pool) thread.join();
}

struct ScalarMath {
  static double inv_sqrt(double v) { return 1 / std::sqrt(v); }
  static double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
};

// The largest error of what the kernels wrote, relative where a value is above 1. Normalization
// amplifies rounding where the contexts of a pixel hardly differ, so that counts for less.
template <class T>
double error_of(const Case& c, const Problem& p) {
  const TensorPointers& t = p.tensors;
  const auto value = [](const void* tensor, int64_t i) {
    return static_cast<double>(static_cast<const T*>(tensor)[i]);
  };
  double worst = 0, amplification = 0;
  const auto compare = [&](double got, double expected) {
    const double unit = std::fmax(1, std::fabs(expected)) * (1 + amplification / 10);
    worst = std::fmax(worst, std::fabs(got - expected) / unit);
  };
  const bool gate = c.operation == Operation::kGate, added = c.operation == Operation::kAddRelu;
  const AnyBins<double> bins(p.pooling);
  const int contexts = p.pooling.contexts;
  double weight_mean = 0;
  for (int l = 0; l < contexts; ++l) weight_mean += p.weight[l] / contexts;
  std::vector<double> d_parameters(contexts + 1), magnitude(contexts + 1);
  for (int64_t pixel = 0; pixel < c.sizes.images * c.sizes.pixels; ++pixel) {
    const int64_t channels = c.sizes.channels, pixels = c.sizes.pixels;
    const auto at = [&](int64_t channel) {
      return c.channels_last ? pixel * channels + channel
                             : (pixel / pixels * channels + channel) * pixels + pixel % pixels;
    };
    const auto gradient = [&](int64_t i) {
      return added && value(t.y, i) <= 0 ? 0 : value(t.grad, i);
    };
    double sums[kMaxSegments] = {}, dot = 0;
    for (int k = 0; k < p.pooling.segments; ++k)
      for (int64_t channel = p.pooling.edge[k]; channel < p.pooling.edge[k + 1]; ++channel) {
        sums[k] += value(t.x, at(channel));
        if (is_backward(c.pass) && !gate) dot += value(t.x, at(channel)) * gradient(at(channel));
      }
    Pixel<double, AnyBins<double>> result;
    pixel_forward<ScalarMath>(bins, sums, p.weight, p.bias, p.eps, result);
    amplification =
        std::fmax(amplification, std::fabs(sums[0] / p.pooling.edge[1]) * result.inv_std);
    if (is_backward(c.pass)) {
      if (gate) dot = value(t.grad, pixel);
      const double dz = pixel_backward(bins, result, dot, p.weight, weight_mean, sums);
      for (int l = 0; l <= contexts; ++l) {
        const double term = l < contexts ? dz * result.n[l] : dz;
        d_parameters[l] += term;
        magnitude[l] += std::fabs(term);
      }
    } else if (gate) {
      compare(value(t.y, pixel), result.g);
    }
    for (int k = 0; k < p.pooling.segments; ++k)
      for (int64_t channel = p.pooling.edge[k]; channel < p.pooling.edge[k + 1]; ++channel) {
        const int64_t i = at(channel);
        const double y =
            value(t.x, i) * result.g + (added && t.residual ? value(t.residual, i) : 0);
        if (is_backward(c.pass)) {
          compare(value(t.dx, i), (gate ? 0 : gradient(i) * result.g) + sums[k]);
          if (added) compare(value(t.d_residual, i), gradient(i));
        } else if (!gate) {
          compare(value(t.y, i), added ? std::fmax(y, 0) : y);
        }
      }
  }
  for (int l = 0; is_backward(c.pass) && l <= contexts; ++l) {
    double got = 0;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) got += p.partial[chunk * (contexts + 1) + l];
    compare(got / (1 + magnitude[l]), d_parameters[l] / (1 + magnitude[l]));
  }
  return worst;
}

template <class T>
void check(Find find, Dtype dtype, const Case& c, int64_t offset, Fault fault) {
  const bool gate = c.operation == Operation::kGate, added = c.operation == Operation::kAddRelu,
             backward = is_backward(c.pass);
  const int64_t per_pixel = c.sizes.images * c.sizes.pixels, count = per_pixel * c.sizes.channels;
  const auto drawn = [&](bool wanted, int64_t size, int seed) {
    Tensor<T> tensor(wanted ? size : 0, offset);
    tensor.draw(seed);
    return tensor;
  };
  Tensor<T> x = drawn(true, count, 1), grad = drawn(backward, gate ? per_pixel : count, 2),
            residual = drawn(added && !backward, count, 3), y = drawn(added && backward, count, 3);
  Problem problem{};
  problem.images = c.sizes.images;
  problem.channels = c.sizes.channels;
  problem.pixels = c.sizes.pixels;
  problem.channels_last = c.channels_last;
  problem.pooling = pooling_of(c.sizes);
  for (int l = 0; l < problem.pooling.contexts; ++l) problem.weight[l] = 0.25 * (l % 5) - 0.5;
  problem.bias = 0.1;
  problem.eps = 1e-5;

  const int64_t outputs = (gate && !backward ? per_pixel : count) - fault.overrun,
                others = added && backward ? count : 0;
  Tensor<T> out[2] = {Tensor<T>(outputs, offset), Tensor<T>(outputs, offset)};
  Tensor<T> d_residual[2] = {Tensor<T>(others, offset), Tensor<T>(others, offset)};
  problem.tensors.dx = backward ? out[0].data() : nullptr;
  plan(problem, sizeof(T), &c.method);
  const int64_t partials = backward ? problem.chunks * (problem.pooling.contexts + 1) : 0;
  std::vector<double> partial;
  for (int run = 0; run < 2; ++run) {
    partial.assign(partials, 0);
    problem.partial = partial.data();
    problem.tensors.x = x.data();
    problem.tensors.grad = backward ? grad.data() : nullptr;
    problem.tensors.residual = added && !backward ? residual.data() : nullptr;
    void* const written = out[run].fill_with_nan().data();
    problem.tensors.y = backward ? (added ? y.data() : nullptr) : written;
    problem.tensors.dx = backward ? written : nullptr;
    problem.tensors.d_residual = others ? d_residual[run].fill_with_nan().data() : nullptr;
    run_threads(find(c.operation, c.pass, dtype), problem, run == 0 && !fault.race ? 1 : 3,
                fault.race);
  }
  const std::string what =
      "operation " + std::to_string(static_cast<int>(c.operation)) + ", pass " +
      std::to_string(static_cast<int>(c.pass)) + ", method " +
      std::to_string(static_cast<int>(c.method)) + (c.channels_last ? ", channels_last " : ", ") +
      std::to_string(c.sizes.images) + " x " + std::to_string(c.sizes.channels) + " x " +
      std::to_string(c.sizes.pixels) + ", " + std::to_string(sizeof(T)) + " bytes";
  expect(out[0].finite() && d_residual[0].finite(), what + " is not finite");
  expect(out[0].same_bits(out[1]) && d_residual[0].same_bits(d_residual[1]),
         what + " depends on the number of threads");
  if (fault.overrun) return;
  const double error = error_of<T>(c, problem);
  const double most = dtype == Dtype::kDouble  ? 1e-10
                      : dtype == Dtype::kFloat ? 1e-3
                      : dtype == Dtype::kHalf  ? 4e-3
                                               : 2e-2;
  expect(error <= most, what + " has an error of " + std::to_string(error));
}

// One pixel; less than a vector; around one; planes whose rows straddle vectors; planes of 49 to 64
// pixels; tiles of several images, with a tail; a last tile that takes in what would be shorter
// than a vector; bins that overlap; the most contexts and segments; channels of one element a bin;
// four equal segments, short and longer, odd and even; more channels than a tile of the shortest
// length may hold; a plane that is just too long for the scratch; channels of a page and more, in
// several tiles, a page apart, and as whole planes.
const Sizes kSizes[] = {
    {1, 4, 1, {1, 2, 4}},      {3, 4, 1, {1, 2, 4}},     {2, 8, 3, {1, 2, 4}},
    {1, 5, 7, {1, 2, 4}},      {2, 7, 8, {2, 3}},        {1, 6, 9, {1, 2}},
    {2, 64, 49, {1, 2, 4}},    {1, 12, 31, {1, 3, 7}},   {1, 67, 33, {2, 30, 32}},
    {2, 64, 16, {64}},         {1, 37, 2100, {1, 2, 4}}, {1, 40, 1031, {1, 2, 4, 8}},
    {2, 20, 1025, {1, 2, 4}},  {1, 65, 65, {1, 62}},     {1, 70001, 5, {1, 2, 4}},
    {1, 1030, 150, {1, 2, 4}}, {3, 36, 64, {1, 2, 4}},   {2, 516, 53, {1, 2, 4}},
    {1, 127, 53, {31, 32}},    {300, 4, 3, {1, 2, 4}},   {1, 516, 560, {1, 2, 4}},
    {1, 100, 37, {1, 2, 4}},   {1, 4, 2450, {1, 2, 4}},  {1, 36, 2048, {1, 2, 4}},
    {16, 5, 1030, {1, 2, 4}},  {1, 88, 45, {1, 2, 4}},
};

template <class T>
int check_all(Find find, Dtype dtype) {
  int cases = 0;
  for (const Sizes& sizes : kSizes)
    for (const bool channels_last : {false, true})
      for (const Operation operation : {Operation::kPpcr, Operation::kGate, Operation::kAddRelu})
        for (const Pass pass : {Pass::kForward, Pass::kBackward})
          for (const Method method : {Method::kGrouped, Method::kSequential}) {
            check<T>(find, dtype, {operation, pass, sizes, channels_last, method}, cases % 2, {});
            ++cases;
          }
  return cases;
}

int check_capability(Find find) {
  return check_all<float>(find, Dtype::kFloat) + check_all<c10::Half>(find, Dtype::kHalf) +
         check_all<c10::BFloat16>(find, Dtype::kBFloat16) + check_all<double>(find, Dtype::kDouble);
}

}  // namespace

int main(int count, char** arguments) {
  if (wrong_settings() != nullptr) {
    std::printf("%s\n", wrong_settings());
    return 2;
  }
  const std::string fault = count > 1 ? arguments[1] : "";
  if (!fault.empty()) {
    for (const bool channels_last : {false, true})
      check<float>(find_kernel_default, Dtype::kFloat,
                   {Operation::kPpcr,
                    Pass::kBackward,
                    {2, 64, 49, {1, 2, 4}},
                    channels_last,
                    Method::kGrouped},
                   0, {fault == "overrun", fault == "race"});
    return 0;
  }
  int cases = 0;
  std::string names;
  const auto check_named = [&](const char* name, Find find) {
    cases += check_capability(find);
    names += (names.empty() ? "" : ", ") + std::string(name);
  };
#if defined(__x86_64__)
  const std::string best = cpu_capability();
  if (best == "avx512") check_named("avx512", find_kernel_avx512);
  if (best != "default") check_named("avx2", find_kernel_avx2);
#endif
  check_named("default", find_kernel_default);
  std::printf("%d cases of the CPU kernels (%s)\n", cases, names.c_str());
}
