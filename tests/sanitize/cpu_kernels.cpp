// Runs the CPU kernels, without torch, over edge shapes: every operator, dtype and layout, on one
// thread and on three. Built and run by tools/sanitize.py under AddressSanitizer,
// UndefinedBehaviorSanitizer and ThreadSanitizer.
//   cpu_kernels                the cases; prints how many
//   cpu_kernels overrun|race   a fault that the sanitizer must report
#include <thread>

#include "../../csrc/cpu/kernels.h"
#include "operands.h"

using namespace ppcr;

namespace {

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

template <class T>
void check(Kernel (*find)(Op, Dtype), Dtype dtype, Op op, const Sizes& sizes, bool pixel_major,
           int64_t offset, Fault fault) {
  const bool gate = op == Op::kGate || op == Op::kGateBackward,
             added = op == Op::kAddRelu || op == Op::kAddReluBackward;
  const int64_t per_pixel = sizes.images * sizes.pixels, count = per_pixel * sizes.channels;
  Tensor<T> x(count, offset), grad(gate ? per_pixel : count, offset),
      other(added ? count : 0, offset);
  x.draw(1);
  grad.draw(2);
  other.draw(3);
  Problem problem{};
  problem.images = sizes.images;
  problem.channels = sizes.channels;
  problem.pixels = sizes.pixels;
  problem.pixel_major = pixel_major;
  problem.pooling = pooling_of(sizes);
  for (int l = 0; l < problem.pooling.contexts; ++l) problem.weight[l] = 0.25 * (l % 5) - 0.5;
  problem.bias = 0.1;
  problem.eps = 1e-5;
  plan(problem, sizeof(T));
  problem.x = x.data();
  problem.grad = is_backward(op) ? grad.data() : nullptr;
  problem.other = added ? other.data() : nullptr;

  const int64_t outputs = (op == Op::kGate ? per_pixel : count) - fault.overrun;
  const int64_t partials = is_backward(op) ? problem.chunks * (problem.pooling.contexts + 1) : 0;
  Tensor<T> out[2] = {Tensor<T>(outputs, offset), Tensor<T>(outputs, offset)};
  Tensor<T> grad_residual[2] = {Tensor<T>(op == Op::kAddReluBackward ? count : 0, offset),
                                Tensor<T>(op == Op::kAddReluBackward ? count : 0, offset)};
  for (int run = 0; run < 2; ++run) {
    std::vector<double> partial(partials);
    problem.partial = partial.data();
    problem.out = out[run].fill_with_nan().data();
    problem.grad_residual =
        op == Op::kAddReluBackward ? grad_residual[run].fill_with_nan().data() : nullptr;
    run_threads(find(op, dtype), problem, run == 0 && !fault.race ? 1 : 3, fault.race);
  }
  const std::string what = "operator " + std::to_string(static_cast<int>(op)) + ", " +
                           std::to_string(sizes.images) + " x " + std::to_string(sizes.channels) +
                           " x " + std::to_string(sizes.pixels);
  expect(out[0].finite() && grad_residual[0].finite(), what + " is not finite");
  expect(out[0].same_bits(out[1]) && grad_residual[0].same_bits(grad_residual[1]),
         what + " depends on the number of threads");
}

const Op kOps[] = {Op::kForward,      Op::kBackward, Op::kGate,
                   Op::kGateBackward, Op::kAddRelu,  Op::kAddReluBackward};

// One pixel; less than a vector; around one; planes whose rows straddle vectors; tiles of several
// images, with a tail; a last tile that takes in what would be shorter than a vector; bins that
// overlap; the most contexts and segments; channels of one element a bin; more channels than a tile
// of the shortest length may hold.
const Sizes kSizes[] = {
    {1, 4, 1, {1, 2, 4}},      {3, 4, 1, {1, 2, 4}},    {2, 8, 3, {1, 2, 4}},
    {1, 5, 7, {1, 2, 4}},      {2, 7, 8, {2, 3}},       {1, 6, 9, {1, 2}},
    {2, 64, 49, {1, 2, 4}},    {1, 12, 31, {1, 3, 7}},  {1, 67, 33, {2, 30, 32}},
    {2, 64, 16, {64}},         {1, 9, 2100, {1, 2, 4}}, {1, 40, 1031, {1, 2, 4, 8}},
    {2, 20, 1025, {1, 2, 4}},  {1, 65, 65, {1, 62}},    {1, 70001, 5, {1, 2, 4}},
    {1, 1030, 150, {1, 2, 4}},
};

template <class T>
int check_all(Kernel (*find)(Op, Dtype), Dtype dtype) {
  int cases = 0;
  for (const Sizes& sizes : kSizes)
    for (const bool pixel_major : {false, true})
      for (const Op op : kOps) {
        check<T>(find, dtype, op, sizes, pixel_major, cases % 2, {});
        ++cases;
      }
  return cases;
}

int check_capability(Kernel (*find)(Op, Dtype)) {
  return check_all<float>(find, Dtype::kFloat) + check_all<c10::Half>(find, Dtype::kHalf) +
         check_all<c10::BFloat16>(find, Dtype::kBFloat16) + check_all<double>(find, Dtype::kDouble);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string fault = count > 1 ? arguments[1] : "";
  if (!fault.empty()) {
    for (const bool pixel_major : {false, true})
      check<float>(find_kernel_default, Dtype::kFloat, Op::kBackward, {2, 64, 49, {1, 2, 4}},
                   pixel_major, 0, {fault == "overrun", fault == "race"});
    return 0;
  }
  int cases = check_capability(find_kernel_default);
  std::string names = "default";
#if defined(__x86_64__)
  const std::string best = cpu_capability();
  if (best != "default") {
    cases += check_capability(find_kernel_avx2);
    names += ", avx2";
  }
  if (best == "avx512") {
    cases += check_capability(find_kernel_avx512);
    names += ", avx512";
  }
#endif
  std::printf("%d cases of the CPU kernels (%s)\n", cases, names.c_str());
}
