// The planner and the kernels for Python: NumPy arrays in, NumPy arrays out. bfloat16 arrays are
// uint16 that hold its bits.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <vector>

// clang-format off: the kernels need what cuda_on_cpu.h defines
#include "cuda_on_cpu.h"
#include "../../csrc/cuda/dispatch.cuh"
// clang-format on
#include "run.h"
#include "traffic.h"

namespace py = pybind11;
using namespace ppcr::cuda;
using ppcr::Operation;
using ppcr::Pass;
using ppcr::Pooling;

namespace {

struct Request {
  Workload workload;
  Pooling pooling;
  DeviceLimits device;
};

template <class Value>
void read(const py::dict& from, const char* name, Value& to) {
  if (from.contains(name)) to = from[name].cast<Value>();
}

std::unique_ptr<Request> request_from(const py::dict& fields) {
  auto request = std::make_unique<Request>();
  Workload& workload = request->workload;
  read(fields, "images", workload.images);
  read(fields, "channels", workload.channels);
  read(fields, "image_pixels", workload.image_pixels);
  read(fields, "channels_last", workload.channels_last);
  read(fields, "element_size", workload.element_size);
  read(fields, "alignment", workload.alignment);
  std::string operation = "ppcr";
  bool backward = false;
  read(fields, "operator", operation);
  read(fields, "backward", backward);
  const std::map<std::string, Operation> operations = {{"ppcr", Operation::kPpcr},
                                                       {"ppcr_gate", Operation::kGate},
                                                       {"ppcr_add_relu", Operation::kAddRelu}};
  workload.operation = operations.at(operation);
  workload.pass = backward ? Pass::kBackward : Pass::kForward;
  read(fields, "multiprocessors", request->device.multiprocessors);
  read(fields, "max_cluster", request->device.max_cluster);
  read(fields, "shared_bytes", request->device.shared_bytes);
  std::vector<int64_t> levels = {1, 2, 4};
  read(fields, "levels", levels);
  const char* const wrong = make_pooling(levels.data(), static_cast<int64_t>(levels.size()),
                                         workload.channels, request->pooling);
  if (wrong != nullptr) throw py::value_error(wrong);
  workload.pooling = &request->pooling;
  return request;
}

Plan plan_for(const Request& request, const std::string& forced) {
  Plan plan = make_plan(request.workload, request.device, forced);
  if (!plan.error.empty()) throw py::value_error(plan.error);
  return plan;
}

py::dict describe(const Request& request, const Plan& plan) {
  const Traffic traffic = predicted_traffic(request.workload, plan);
  py::dict result;
  const char* const methods[] = {"contiguous_pipelined", "channels_last_registers",
                                 "channels_last_gate", "channels_last_shared"};
  result["method"] = methods[static_cast<int>(plan.method)];
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
  result["q"] = plan.method == Method::kChannelsLastShared ? plan.shared_tile.q : plan.tile.q;
  result["rows"] = plan.tile.rows;
  result["active"] = plan.tile.active;
  result["groups"] = plan.tile.groups;
  result["cluster"] = plan.method == Method::kContiguousPipelined ? plan.tile.cluster : 1;
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

Parameter parameter_from(const py::object& array, int element_size, bool own) {
  if (array.is_none()) return {};
  const py::array values = py::cast<py::array>(array);
  if (values.itemsize() != (own ? element_size : accumulator_size(element_size)))
    throw py::value_error("parameter of a wrong size");
  return {values.data(), own ? Parameter::kOwn : Parameter::kWide};
}

py::dict run(const py::dict& fields, const std::string& dtype, const py::dict& arrays, double eps,
             const std::string& forced, uint32_t seed, unsigned only_blocks) {
  const auto request = request_from(fields);
  Workload& workload = request->workload;
  const auto array = [&](const char* name) {
    return arrays.contains(name) ? py::object(arrays[name]) : py::none();
  };
  const bool gate = workload.operation == Operation::kGate, backward = is_backward(workload.pass);
  const int64_t gate_bytes = workload.images * workload.image_pixels * workload.element_size;
  const int64_t bytes = gate_bytes * workload.channels;
  // The kernels trust their plan, so the arrays are checked for size.
  const auto tensor = [&](const char* name, int64_t least) {
    const py::object found = array(name);
    if (!found.is_none() && py::cast<py::array>(found).nbytes() < least)
      throw py::value_error(std::string(name) + " is smaller than the workload says");
    return data_of(found);
  };

  Operands operands;
  operands.x = tensor("x", bytes);
  operands.grad = tensor("grad", gate ? gate_bytes : bytes);
  operands.residual = tensor("residual", bytes);
  operands.y = tensor("y", gate ? gate_bytes : bytes);
  operands.dx = tensor("dx", bytes);
  operands.d_residual = tensor("dresidual", bytes);
  operands.eps = eps;
  operands.dweight = data_of(array("dweight"));
  operands.dbias = data_of(array("dbias"));
  bool own = false;
  read(fields, "own_parameters", own);
  operands.weight = parameter_from(array("weight"), workload.element_size, own);
  operands.bias = parameter_from(array("bias"), workload.element_size, own);
  workload.alignment = alignment_of(workload.operation, operands);

  const Plan plan = plan_for(*request, forced);
  // NaN, so that a share that no block has written shows.
  const size_t accumulator = accumulator_size(workload.element_size);
  std::vector<unsigned char> partials(
      size_t(plan.partial_count) * size_t(request->pooling.contexts + 1) * accumulator, 0xFF);
  operands.partials = backward ? partials.data() : nullptr;

  const CpuRun call{&workload, &plan, &operands, seed, only_blocks};
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
