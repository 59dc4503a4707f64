// What nvcc's libraries register, and launches: checked as strictly as a driver would, then queued
// for the fibers.
#include <cxxabi.h>

#include <algorithm>
#include <sstream>

#include "kernels.h"
#include "state.h"

namespace cuda_host {
namespace {

// The headers of a fat binary, of which only the architectures matter here.
struct Wrapper {
  uint32_t magic, version;
  const char* data;
};
struct FatHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct FatEntry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t unused[3], architecture;
};
constexpr uint32_t kMagic = 0xba55ed50;
constexpr int kPtx = 1;

// The architecture of the code that a device runs, 0 where there is none.
int architecture_for(const Module& module, const cudaDeviceProp& device) {
  const int capability = device.major * 10 + device.minor;
  int best = 0;
  for (const int binary : module.binaries)
    if (binary / 10 == capability / 10 && binary <= capability) best = std::max(best, binary);
  if (best != 0) return best;
  for (const int ptx : module.ptx)
    if (ptx <= capability) best = std::max(best, ptx);
  return best;
}

// nvcc's types and g++'s stand-ins for them get one name.
std::string readable(const std::string& mangled) {
  char* const text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr);
  std::string name = text == nullptr ? mangled : text;
  std::free(text);
  for (size_t at; (at = name.find("c10::Half")) != name.npos;) name.replace(at, 9, "__half");
  for (size_t at; (at = name.find("c10::BFloat16")) != name.npos;)
    name.replace(at, 13, "__nv_bfloat16");
  return name;
}

// Null where tests/cuda_on_cpu knows no kernel of that name.
const FiberKernel* fiber_kernel(const std::string& name) {
  static const auto* const kernels = [] {
    auto* const readable_names = new std::map<std::string, FiberKernel>;
    for (const auto& [mangled, kernel] : fiber_kernels())
      (*readable_names)[readable(mangled)] = kernel;
    return readable_names;
  }();
  const auto found = kernels->find(name);
  return found == kernels->end() ? nullptr : &found->second;
}

// A launch, or the question how many of it the device holds at a time.
struct Request : FiberLaunch {
  const void* stub;
  bool early = false;
  const Function* function = nullptr;  // known when it has been checked

  std::string text() const {
    std::ostringstream text;
    text << function->name << " with " << blocks << " blocks of " << threads
         << " threads, clusters of " << cluster << ", " << shared_bytes
         << " bytes of shared memory, on device " << current_device;
    return text.str();
  }
};

cudaError_t read_request(const cudaLaunchConfig_t& c, const void* stub, Request& request) {
  const auto line = [](const auto& d) { return d.y == 1 && d.z == 1; };
  bool known = line(c.gridDim) && line(c.blockDim);
  request = {{c.gridDim.x, c.blockDim.x, 1, c.dynamicSmemBytes}, stub};
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    const auto& [id, padding, value] = c.attrs[i];
    if (id == cudaLaunchAttributeClusterDimension) {
      request.cluster = value.clusterDim.x;
      known &= line(value.clusterDim);
    } else if (id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      request.early = value.programmaticStreamSerializationAllowed != 0;
    } else if (id != cudaLaunchAttributeClusterSchedulingPolicyPreference) {  // only time shows it
      known = false;
    }
  }
  if (known) return cudaSuccess;
  return refuse(cudaErrorNotSupported, "more than one dimension, or an attribute nobody wrote");
}

// The architecture of the code that the current device has for a registered function.
cudaError_t find_code(State& s, const void* stub, int& architecture) {
  const auto known = s.functions.find(stub);
  if (known == s.functions.end()) return refuse(cudaErrorInvalidDeviceFunction, "not registered");
  const auto& [module, name] = known->second;
  architecture = architecture_for(*module, s.devices[current_device].properties);
  if (architecture != 0) return cudaSuccess;
  return refuse(cudaErrorNoKernelImageForDevice, "no code for this device: " + name);
}

// What the current device and the function do not allow.
cudaError_t check(State& s, Request& request) {
  int architecture;
  TRY(find_code(s, request.stub, architecture));
  request.function = &s.functions[request.stub];
  const auto refused = [&](cudaError_t error, const std::string& why) {
    return refuse(error, why + ": " + request.text());
  };
  if (request.threads - 1 >= 1024 || request.blocks - 1 >= 0x7fffffffu)
    return refused(cudaErrorInvalidConfiguration, "too many or no blocks or threads");
  const auto allowed = s.allowed_shared.find({request.stub, current_device});
  const int limit = allowed == s.allowed_shared.end() ? 48 << 10 : allowed->second;
  if (request.shared_bytes > size_t(std::max(limit, 48 << 10)))
    return refused(cudaErrorInvalidValue, "more shared memory than cudaFuncSetAttribute allowed");
  const bool has_clusters = s.devices[current_device].properties.clusterLaunch != 0;
  if ((request.cluster > 1 || request.early) && (!has_clusters || architecture < 90))
    return refused(cudaErrorNotSupported, "no clusters or early launches on this device");
  if (request.cluster - 1 >= 8 || request.blocks % request.cluster != 0)
    return refused(cudaErrorInvalidClusterSize, "clusters over 8, or that do not divide the grid");
  return cudaSuccess;
}

// As many blocks as registers, threads and shared memory of a multiprocessor allow.
int resident_blocks(const cudaDeviceProp& device, const Request& request) {
  constexpr int kRegistersPerThread = 64, kReserved = 1024;
  const int threads = int(request.threads);
  const size_t shared = device.sharedMemPerMultiprocessor / (request.shared_bytes + kReserved);
  return std::min({int(shared), device.maxThreadsPerMultiProcessor / threads,
                   device.regsPerMultiprocessor / (kRegistersPerThread * threads)});
}

}  // namespace
}  // namespace cuda_host

using namespace cuda_host;

extern "C" {

// A line a registered kernel: whether it has fibers, and its name.
const char* cuda_host_kernels() {
  static std::string text;
  text.clear();
  for (const auto& [stub, function] : state().functions)
    text += (fiber_kernel(function.name) != nullptr ? "1\t" : "0\t") + function.name + "\n";
  return text.c_str();
}

// ---- registration

void** __cudaRegisterFatBinary(void* wrapper) {
  auto* const module = new Module;
  const char* at = static_cast<const Wrapper*>(wrapper)->data;
  FatHeader header;
  std::memcpy(&header, at, sizeof header);
  const char* const end = at + header.header_bytes + header.bytes;
  for (at += header.header_bytes; header.magic == kMagic && at < end;) {
    FatEntry entry;
    std::memcpy(&entry, at, sizeof entry);
    (entry.kind == kPtx ? module->ptx : module->binaries).push_back(int(entry.architecture));
    at += entry.header_bytes + entry.bytes;
  }
  return reinterpret_cast<void**>(module);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  if (std::strstr(name, "ppcr") == nullptr) return;  // PyTorch's own run on the CPU
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().functions[stub] = {reinterpret_cast<const Module*>(module), readable(name)};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// ---- launches

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* stub,
                                void** arguments) {
  ENTER;
  Request request;
  TRY(read_request(*configuration, stub, request));
  TRY(check(s, request));
  const std::string what = request.text();
  STREAM(configuration->stream);
  if (stream->device != current_device)
    return refuse(cudaErrorInvalidResourceHandle, "a stream of another device: " + what);
  const FiberKernel* const kernel = fiber_kernel(request.function->name);
  if (kernel == nullptr) return refuse(cudaErrorNotSupported, "no kernel for the CPU: " + what);
  std::ostringstream line;
  line << current_device << '\t' << uintptr_t(configuration->stream) << '\t' << request.blocks
       << '\t' << request.threads << '\t' << request.cluster << '\t' << request.shared_bytes << '\t'
       << request.early << '\t' << request.function->name << '\n';
  s.log += line.str();
  // The driver copies the arguments at the call.
  const auto* const begin = static_cast<const char*>(arguments[0]);
  const std::vector<char> argument(begin, begin + kernel->argument_bytes);
  return submit(stream, [&s, kernel, request, argument, what] {
    const std::string wrong = kernel->run(request, argument.data());
    const std::string why = wrong.empty() ? overrun(s) : wrong;
    return why.empty() ? cudaSuccess : refuse(cudaErrorLaunchFailure, what + ": " + why);
  });
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  ENTER;
  int architecture;
  TRY(find_code(s, stub, architecture));
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return refuse(cudaErrorNotSupported, "function attribute " + std::to_string(attribute));
  if (value < 0 || size_t(value) > s.devices[current_device].properties.sharedMemPerBlockOptin)
    return result(cudaErrorInvalidValue);
  s.allowed_shared[{stub, current_device}] = value;
  s.allowances += std::to_string(current_device) + '\t' + std::to_string(value) + '\t' +
                  s.functions[stub].name + '\n';
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  ENTER;
  *attributes = {};
  TRY(find_code(s, stub, attributes->binaryVersion));
  attributes->ptxVersion = attributes->binaryVersion;
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub,
                                                                   int threads, size_t bytes,
                                                                   unsigned) {
  ENTER;
  Request request{{1, unsigned(threads), 1, bytes}, stub};
  TRY(check(s, request));
  *blocks = resident_blocks(s.devices[current_device].properties, request);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* stub,
                                           const cudaLaunchConfig_t* configuration) {
  ENTER;
  Request request;
  TRY(read_request(*configuration, stub, request));
  TRY(check(s, request));
  const cudaDeviceProp& device = s.devices[current_device].properties;
  const int blocks = resident_blocks(device, request) * device.multiProcessorCount;
  *clusters = blocks / int(request.cluster);
  return cudaSuccess;
}

}  // extern "C"
