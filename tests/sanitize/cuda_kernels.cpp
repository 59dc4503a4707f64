// Runs the CUDA kernels on the CPU, a fiber per CUDA thread, over edge shapes: forward and backward
// of every mode and layout, under two schedules. Built and run by tools/sanitize.py under
// AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
//   cuda_kernels           the cases; prints how many
//   cuda_kernels FAULT     a fault that the sanitizer must report: overrun, shared, misaligned,
//   race, blocks
// clang-format off: the kernels need what cuda_on_cpu.h defines
#include "../cuda_on_cpu/cuda_on_cpu.h"
#include "../../csrc/cuda/dispatch.cuh"
// clang-format on
#include "../cuda_on_cpu/run.h"
#include "operands.h"

using namespace ppcr::cuda;
using ppcr::Acc;
using ppcr::Operation;
using ppcr::Pass;

namespace {

struct Case {
  Sizes sizes;
  bool channels_last;
  const char* forced;
};

template <class T>
void check(const Case& wanted, Operation operation, Pass pass, const std::string& fault = "") {
  const Sizes& sizes = wanted.sizes;
  const bool backward = is_backward(pass), add_relu = operation == Operation::kAddRelu;
  const bool gate = operation == Operation::kGate;
  const int64_t per_pixel = sizes.images * sizes.pixels, count = per_pixel * sizes.channels;
  const int64_t offset = fault == "misaligned";
  const ppcr::Pooling pooling = pooling_of(sizes);
  Tensor<T> x(count, offset), grad(gate ? per_pixel : count), added(add_relu ? count : 0);
  Tensor<Acc<T>> weight(pooling.contexts), bias(1);
  x.draw(1);
  grad.draw(2);
  added.draw(3);
  weight.draw(4);
  bias.draw(5);

  Workload workload;
  workload.images = sizes.images;
  workload.channels = sizes.channels;
  workload.image_pixels = sizes.pixels;
  workload.channels_last = wanted.channels_last;
  workload.element_size = sizeof(T);
  workload.operation = operation;
  workload.pass = pass;
  workload.pooling = &pooling;
  DeviceLimits device;
  device.max_cluster = 8;
  device.shared_bytes = 227 << 10;
  Plan plan = make_plan(workload, device, wanted.forced);
  if (!plan.error.empty()) {
    std::fprintf(stderr, "%s\n", plan.error.c_str());
    std::exit(2);
  }
  if (fault == "shared") plan.shared_bytes -= 16;

  const int64_t outputs = (gate && !backward ? per_pixel : count) - (fault == "overrun");
  const bool two_outputs = backward && add_relu;
  Tensor<T> result[2] = {Tensor<T>(outputs), Tensor<T>(outputs)};
  Tensor<T> d_residual[2] = {Tensor<T>(two_outputs ? count : 0),
                             Tensor<T>(two_outputs ? count : 0)};
  for (int run = 0; run < 2; ++run) {
    Tensor<Acc<T>> partials(backward ? plan.partial_count * (pooling.contexts + 1) : 0);
    partials.fill_with_nan();
    Operands operands;
    operands.x = x.data();
    operands.grad = backward ? grad.data() : nullptr;
    void* const to = result[run].fill_with_nan().data();
    void* const second = add_relu ? added.data() : nullptr;  // residual, or y
    operands.residual = second;
    operands.y = backward ? second : to;
    operands.dx = backward ? to : nullptr;
    operands.d_residual = two_outputs ? d_residual[run].fill_with_nan().data() : nullptr;
    operands.eps = 1e-5;
    operands.weight = {weight.data(), Parameter::kWide};
    operands.bias = {bias.data(), Parameter::kWide};
    operands.partials = backward ? partials.data() : nullptr;
    Tensor<Acc<T>> dweight(pooling.contexts), dbias(1);
    operands.dweight = dweight.fill_with_nan().data();
    operands.dbias = dbias.fill_with_nan().data();
    CpuRun call{&workload, &plan, &operands, run == 0 ? 0u : 7u, 0};
    run_on_cpu<T>(call);
    if (backward) expect(dweight.finite() && dbias.finite(), "gradients of the parameters");
  }
  const std::string what = std::to_string(sizes.images) + " x " + std::to_string(sizes.channels) +
                           " x " + std::to_string(sizes.pixels);
  expect(result[0].finite() && d_residual[0].finite(), what + " is not finite");
  expect(result[0].same_bits(result[1]) && d_residual[0].same_bits(d_residual[1]),
         what + " depends on the order of threads");
}

// Contiguous: planes whose rows straddle vectors, tails, clusters, several tiles of a cluster,
// single elements, channels beyond the registers, unequal bins; channels_last with lanes that share
// a pixel, with a tail of lanes and of pixels; and the walk that takes any channels.
const Case kCases[] = {
    {{2, 64, 49, {1, 2, 4}}, false, ""},
    {{1, 64, 256, {1, 2, 4}}, false, "q=96,groups=2,cluster=2"},
    {{1, 64, 256, {1, 2, 4}}, false, "groups=1,cluster=8"},
    {{3, 64, 49, {1, 2, 4}}, false, "groups=4,cluster=1,clusters=1"},
    {{3, 64, 96, {1, 2, 4}}, false, "q=64,groups=2,cluster=4,clusters=2"},
    {{1, 64, 37, {1, 2, 4}}, false, "vector=1,q=37,groups=4"},
    {{1, 600, 16, {1, 2, 4}}, false, "groups=4,cluster=1"},
    {{1, 600, 16, {1, 3, 7}}, false, "groups=4,cluster=1"},
    {{2, 7, 9, {2, 3}}, false, ""},
    {{1, 67, 12, {1, 2, 4, 8, 16, 32}}, false, ""},
    {{2, 64, 49, {1, 2, 4}}, true, ""},
    {{1, 96, 11, {1, 2, 4}}, true, ""},
    {{3, 30, 16, {1, 2, 4}}, true, ""},
    {{5, 64, 1, {64}}, true, ""},
    {{1, 5, 1, {1, 2, 4}}, true, ""},
};

template <class T>
int check_all() {
  int runs = 0;
  for (const Case& wanted : kCases)
    for (const Operation operation : {Operation::kPpcr, Operation::kAddRelu, Operation::kGate})
      for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
        check<T>(wanted, operation, pass);
        ++runs;
      }
  return runs;
}

// Kernels of which one lacks a barrier, and one has two blocks write the same element.
void race_in_a_block(float* out, bool barrier) {
  PPCR_SHARED(memory);
  float* const values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 33];
}
void run_race(bool barrier) {
  Tensor<float> out(64);
  cuda_on_cpu::Configuration configuration;
  configuration.threads = 64;
  configuration.shared_bytes = 64 * sizeof(float);
  cuda_on_cpu::launch(configuration, [&] { race_in_a_block(out.data(), barrier); });
}
void run_race_of_blocks() {
  Tensor<float> out(64);
  cuda_on_cpu::Configuration configuration;
  configuration.blocks = 2;
  configuration.threads = 32;
  cuda_on_cpu::launch(configuration, [&] { out.data()[blockIdx.x + threadIdx.x] = 1; });
}

}  // namespace

int main(int count, char** arguments) {
  const std::string fault = count > 1 ? arguments[1] : "";
  if (fault == "race") {
    run_race(false);
  } else if (fault == "blocks") {
    run_race_of_blocks();
  } else if (!fault.empty()) {
    for (const bool channels_last : {false, true})
      check<float>({{2, 64, 16, {1, 2, 4}}, channels_last, ""}, Operation::kPpcr, Pass::kBackward,
                   fault);
  } else {
    run_race(true);
    const int runs = check_all<float>() + check_all<ppcr::cuda::BFloat16>();
    std::printf("%d cases of the CUDA kernels, %.1f M CUDA threads\n", runs,
                double(cpu_statistics.threads) / 1e6);
  }
}
