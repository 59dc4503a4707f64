// The planner and the kernels for Python: NumPy arrays in, NumPy arrays out. bfloat16 arrays are
// uint16 that hold its bits.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

// clang-format off: the kernels need what cuda_on_cpu.h defines
#include "cuda_on_cpu.h"
#include "../../csrc/cuda/dispatch.cuh"
// clang-format on
#include "../../csrc/cuda/traffic.h"
#include "run.h"

namespace py = pybind11;
using namespace ppcr::cuda;
using ppcr::Pooling;

namespace {

struct Request {
  Problem problem;
  Pooling pooling;
  DeviceLimits device;
};

template <class Value>
void take(const py::dict& from, const char* name, Value& to) {
  if (from.contains(name)) to = from[name].cast<Value>();
}

std::unique_ptr<Request> request_from(const py::dict& fields) {
  auto request = std::make_unique<Request>();
  Problem& problem = request->problem;
  take(fields, "images", problem.images);
  take(fields, "channels", problem.channels);
  take(fields, "image_pixels", problem.image_pixels);
  take(fields, "pixel_major", problem.pixel_major);
  take(fields, "element_size", problem.element_size);
  take(fields, "alignment", problem.alignment);
  take(fields, "backward", problem.backward);
  int mode = 0;
  take(fields, "mode", mode);
  problem.mode = static_cast<Mode>(mode);
  take(fields, "multiprocessors", request->device.multiprocessors);
  take(fields, "max_cluster", request->device.max_cluster);
  take(fields, "shared_bytes", request->device.shared_bytes);
  std::vector<int64_t> levels = {1, 2, 4};
  take(fields, "levels", levels);
  const char* const wrong = make_pooling(levels.data(), static_cast<int64_t>(levels.size()),
                                         problem.channels, request->pooling);
  if (wrong != nullptr) throw py::value_error(wrong);
  problem.pooling = &request->pooling;
  return request;
}

Plan plan_for(const Request& request, const std::string& forced) {
  Plan plan = make_plan(request.problem, request.device, forced.empty() ? nullptr : forced.c_str());
  if (!plan.error.empty()) throw py::value_error(plan.error);
  return plan;
}

py::dict describe(const Request& request, const Plan& plan) {
  const Traffic traffic = predicted_traffic(request.problem, plan);
  py::dict result;
  const char* const kinds[] = {"channel_major", "pixel_major", "pixel_tile"};
  result["kind"] = kinds[static_cast<int>(plan.kind)];
  result["vector"] = plan.vector;
  result["steps"] = plan.steps;
  result["variant"] = plan.variant;
  result["threads"] = plan.threads;
  result["blocks"] = plan.blocks;
  result["partial_count"] = plan.partial_count;
  result["tiles"] = plan.tile.tiles;
  result["cluster_tiles"] = plan.cluster_tiles;
  result["shared_bytes"] = plan.shared_bytes;
  result["score"] = plan.score;
  result["warp_pixels"] = plan.warp_pixels;
  result["staged"] = plan.staged;
  result["q"] = plan.kind == KernelKind::kPixelTile ? plan.pixel_tile.q : plan.tile.q;
  result["rows"] = plan.tile.rows;
  result["active"] = plan.tile.active;
  result["groups"] = plan.tile.groups;
  result["cluster"] = plan.kind == KernelKind::kChannelMajor ? plan.tile.cluster : 1;
  result["rounds"] = plan.tile.rounds;
  result["unit_count"] = plan.unit_count;
  result["tensor_bytes"] = traffic.tensor;
  result["read_bytes"] = traffic.read;
  result["written_bytes"] = traffic.written;
  result["parameter_bytes"] = traffic.parameters;
  return result;
}

void* data_of(const py::object& array) {
  return array.is_none() ? nullptr : py::cast<py::array>(array).mutable_data();
}

Parameter parameter_from(const py::object& array, int element_size, bool wide) {
  if (array.is_none()) return {};
  const py::array values = py::cast<py::array>(array);
  const int own = element_size, accumulator = element_size == 8 ? 8 : 4;
  if (values.itemsize() != (wide ? accumulator : own))
    throw py::value_error("parameter of a wrong size");
  return {values.data(), wide ? Parameter::kWide : Parameter::kOwn};
}

// Arrays are checked for size here, since the kernels trust their plan.
void expect_bytes(const char* name, const py::object& array, int64_t bytes) {
  if (!array.is_none() && py::cast<py::array>(array).nbytes() < bytes)
    throw py::value_error(std::string(name) + " is smaller than the problem says");
}

py::dict run(const py::dict& fields, const std::string& dtype, const py::dict& arrays, double eps,
             const std::string& forced, uint32_t seed, unsigned only_blocks) {
  const auto request = request_from(fields);
  Problem& problem = request->problem;
  const auto array = [&](const char* name) {
    return arrays.contains(name) ? py::object(arrays[name]) : py::none();
  };
  const int64_t gate_bytes = problem.images * problem.image_pixels * problem.element_size;
  const int64_t bytes = gate_bytes * problem.channels;
  const bool gate = problem.mode == Mode::kGate;
  expect_bytes("x", array("x"), bytes);
  expect_bytes("grad", array("grad"), gate ? gate_bytes : bytes);
  expect_bytes("extra_in", array("extra_in"), bytes);
  expect_bytes("out", array("out"), gate && !problem.backward ? gate_bytes : bytes);
  expect_bytes("extra_out", array("extra_out"), bytes);

  Operands operands;
  operands.x = data_of(array("x"));
  operands.grad = data_of(array("grad"));
  operands.extra_in = data_of(array("extra_in"));
  operands.out = data_of(array("out"));
  operands.extra_out = data_of(array("extra_out"));
  operands.eps = eps;
  operands.dweight = data_of(array("dweight"));
  operands.dbias = data_of(array("dbias"));
  bool weight_wide = true, bias_wide = true;
  take(fields, "weight_wide", weight_wide);
  take(fields, "bias_wide", bias_wide);
  operands.weight = parameter_from(array("weight"), problem.element_size, weight_wide);
  operands.bias = parameter_from(array("bias"), problem.element_size, bias_wide);
  // Gate mode reads or writes one value per pixel beside x: single elements, whatever their
  // address.
  problem.alignment =
      gate ? common_alignment({operands.x, problem.backward ? operands.out : nullptr})
           : common_alignment(
                 {operands.x, operands.grad, operands.extra_in, operands.out, operands.extra_out});

  const Plan plan = plan_for(*request, forced);
  // NaN, so that a share that no block has written shows.
  const size_t accumulator = problem.element_size == 8 ? 8 : 4;
  std::vector<unsigned char> partials(
      size_t(plan.partial_count) * size_t(request->pooling.contexts + 1) * accumulator, 0xFF);
  operands.partials = problem.backward ? partials.data() : nullptr;

  const CpuRun call{&problem, &plan, &operands, seed, only_blocks};
  {
    py::gil_scoped_release release;
    if (dtype == "float32") run_on_cpu<float>(call);
    if (dtype == "float16") run_on_cpu<Half>(call);
    if (dtype == "bfloat16") run_on_cpu<BFloat16>(call);
    if (dtype == "float64") run_on_cpu<double>(call);
  }
  return describe(*request, plan);
}

}  // namespace

PYBIND11_MODULE(ppcr_cuda_on_cpu, module) {
  module.def(
      "plan",
      [](const py::dict& fields, const std::string& forced) {
        const auto request = request_from(fields);
        return describe(*request, plan_for(*request, forced));
      },
      py::arg("fields"), py::arg("forced") = "");
  module.def("run", &run, py::arg("fields"), py::arg("dtype"), py::arg("arrays"),
             py::arg("eps") = 1e-5, py::arg("forced") = "", py::arg("seed") = 0,
             py::arg("only_blocks") = 0);
  module.def("statistics", [] {
    py::dict result;
    result["launches"] = cpu_statistics.launches;
    result["threads"] = cpu_statistics.threads;
    result["switches"] = cpu_statistics.switches;
    return result;
  });
  py::list variants;
  for (const LaneVariant& variant : kLaneVariants)
    variants.append(py::make_tuple(variant.lanes, variant.steps, variant.pixels));
  module.attr("lane_variants") = variants;
}
