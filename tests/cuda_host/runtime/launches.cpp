// What nvcc's libraries register, and launches: checked as strictly as a driver would, then queued
// for the fibers.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <optional>

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
  uint32_t unused[2];
  uint16_t minor, major;
  uint32_t architecture;
};
constexpr int kPtx = 1;

void read_architectures(const Wrapper& wrapper, Module& module) {
  FatHeader header;
  std::memcpy(&header, wrapper.data, sizeof header);
  if (wrapper.magic != 0x466243b1 || header.magic != 0xba55ed50) return;
  const char* at = wrapper.data + header.header_bytes;
  for (const char* const end = at + header.bytes; at < end;) {
    FatEntry entry;
    std::memcpy(&entry, at, sizeof entry);
    (entry.kind == kPtx ? module.ptx : module.binaries).push_back(int(entry.architecture));
    at += entry.header_bytes + entry.bytes;
  }
}

// The architecture of the code that a device runs, 0 where there is none.
int architecture_for(const Module& module, const Device& device) {
  int best = 0;
  for (const int binary : module.binaries)
    if (binary / 10 == device.major && binary <= device.capability()) best = std::max(best, binary);
  if (best != 0) return best;
  for (const int ptx : module.ptx)
    if (ptx <= device.capability()) best = std::max(best, ptx);
  return best;
}

// nvcc's types and g++'s stand-ins for them get one name.
std::string readable(const char* mangled) {
  int status = 0;
  char* const text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  const std::pair<std::string, std::string> same[] = {{"c10::Half", "__half"},
                                                      {"c10::BFloat16", "__nv_bfloat16"}};
  for (const auto& [from, to] : same)
    for (size_t at = 0; (at = name.find(from, at)) != std::string::npos; at += to.size())
      name.replace(at, from.size(), to);
  return name;
}

const FiberKernel* fiber_kernel(State& s, const std::string& name) {
  if (s.kernels.empty()) {
    const std::string path = setting("CUDA_HOST_KERNELS", "");
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) std::fprintf(stderr, "cuda_host: no kernels: %s\n", dlerror());
    void* const all = library == nullptr ? nullptr : dlsym(library, "cuda_host_kernels");
    if (all != nullptr)
      reinterpret_cast<void (*)(AddKernel)>(all)(
          [](const std::string& mangled, const auto& kernel) {
            state().kernels[readable(mangled.c_str())] = kernel;
          });
  }
  const auto found = s.kernels.find(name);
  return found == s.kernels.end() ? nullptr : &found->second;
}

struct Request {
  const void* function;
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  dim3 cluster = {1, 1, 1};
  bool early = false;
};

uint64_t volume(dim3 d) { return uint64_t(d.x) * d.y * d.z; }

// Null where the device can start it.
std::optional<std::pair<cudaError_t, const char*>> objection(State& s, const Request& request,
                                                             const Function& function) {
  const auto& [stub, grid, block, shared_bytes, stream, cluster, early] = request;
  const Device& device = s.devices[current_device];
  const int architecture = architecture_for(*function.module, device);
  if (architecture == 0) return {{cudaErrorNoKernelImageForDevice, "no code for this device"}};
  if (volume(block) == 0 || volume(block) > 1024 || volume(grid) == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535)
    return {{cudaErrorInvalidConfiguration, "too many or no blocks or threads"}};
  const auto allowed = s.allowed_shared.find({stub, current_device});
  const int limit = allowed == s.allowed_shared.end() ? 48 << 10 : allowed->second;
  if (shared_bytes > size_t(std::max(limit, 48 << 10)))
    return {{cudaErrorInvalidValue, "more shared memory than cudaFuncSetAttribute has allowed"}};
  const bool has_clusters = device.clusters && architecture >= 90;
  if ((volume(cluster) > 1 || early) && !has_clusters)
    return {{cudaErrorNotSupported, "no clusters or early launches on this device"}};
  if (volume(cluster) == 0 || volume(cluster) > 8 || grid.x % cluster.x != 0 ||
      grid.y % cluster.y != 0 || grid.z % cluster.z != 0)
    return {{cudaErrorInvalidClusterSize, "a cluster that does not divide the grid, or over 8"}};
  return {};
}

std::string text_of(const Request& request, const std::string& name) {
  return name + " with " + std::to_string(volume(request.grid)) + " blocks of " +
         std::to_string(volume(request.block)) + " threads, clusters of " +
         std::to_string(volume(request.cluster)) + ", " + std::to_string(request.shared_bytes) +
         " bytes of shared memory, on device " + std::to_string(current_device);
}

cudaError_t launch(State& s, const Request& request, void** arguments) {
  const auto known = s.functions.find(request.function);
  if (known == s.functions.end()) return refuse(cudaErrorInvalidDeviceFunction, "not registered");
  const std::string& name = known->second.name;
  const std::string what = text_of(request, name);
  if (const auto wrong = objection(s, request, known->second))
    return refuse(wrong->first, std::string(wrong->second) + ": " + what);
  const cudaStream_t stream = stream_of(s, request.stream);
  if (stream == nullptr) return refuse(cudaErrorInvalidResourceHandle, "no such stream: " + what);
  if (stream->device != current_device)
    return refuse(cudaErrorInvalidResourceHandle, "a stream of another device: " + what);
  if (name.find("spin_kernel") != std::string::npos)  // of torch.cuda._sleep
    return submit(s, request.stream, [] { return cudaSuccess; });
  const FiberKernel* const kernel = fiber_kernel(s, name);
  if (kernel == nullptr) return refuse(cudaErrorNotSupported, "no kernel for the CPU: " + what);
  if (request.grid.y * request.grid.z * request.block.y * request.block.z != 1)
    return refuse(cudaErrorNotSupported, "more than one dimension: " + what);

  const FiberLaunch fibers{request.grid.x, request.block.x, request.cluster.x,
                           request.shared_bytes};
  s.log += std::to_string(current_device) + "\t" + std::to_string(stream->number) + "\t" +
           std::to_string(fibers.blocks) + "\t" + std::to_string(fibers.threads) + "\t" +
           std::to_string(fibers.cluster) + "\t" + std::to_string(fibers.shared_bytes) + "\t" +
           std::to_string(request.early) + "\t" + name + "\n";
  // The driver copies the arguments at the call.
  const auto* const begin = static_cast<const char*>(arguments[0]);
  const auto argument = std::make_shared<std::vector<char>>(begin, begin + kernel->argument_bytes);
  return submit(s, request.stream, [&s, kernel, fibers, argument, what] {
    const char* const wrong = kernel->run(fibers, argument->data());
    const std::string why = wrong != nullptr ? wrong : overrun(s);
    return why.empty() ? cudaSuccess : refuse(cudaErrorLaunchFailure, what + ": " + why);
  });
}

// As many blocks as registers, threads and shared memory of a multiprocessor allow.
int resident_blocks(const Device& device, int threads, size_t shared_bytes) {
  constexpr int kRegistersPerThread = 64;
  const int by_shared = int((device.shared_bytes + 1024) / (shared_bytes + 1024));
  return std::min({by_shared, 2048 / threads, 65536 / (kRegistersPerThread * threads)});
}

Request request_of(const cudaLaunchConfig_t& c, const void* function, cudaError_t& error) {
  Request request{function, c.gridDim, c.blockDim, c.dynamicSmemBytes, c.stream};
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    const auto& [id, padding, value] = c.attrs[i];
    if (id == cudaLaunchAttributeClusterDimension)
      request.cluster = dim3{value.clusterDim.x, value.clusterDim.y, value.clusterDim.z};
    else if (id == cudaLaunchAttributeProgrammaticStreamSerialization)
      request.early = value.programmaticStreamSerializationAllowed != 0;
    else
      error = refuse(cudaErrorNotSupported, "launch attribute " + std::to_string(id));
  }
  return request;
}

thread_local std::vector<Request> call_configurations;  // of <<<...>>>

}  // namespace
}  // namespace cuda_host

using namespace cuda_host;

extern "C" {

// Registered kernels whose names hold `part`, and of these (a line each) those without fibers.
int cuda_host_kernels_of(const char* part, char* missing, size_t bytes) {
  ENTER(__func__);
  int count = 0;
  std::string names;
  for (const auto& [stub, function] : s.functions) {
    if (function.name.find(part) == std::string::npos) continue;
    ++count;
    if (fiber_kernel(s, function.name) == nullptr) names += function.name + "\n";
  }
  std::snprintf(missing, bytes, "%s", names.c_str());
  return count;
}

// ---- registration

void** __cudaRegisterFatBinary(void* wrapper) {
  auto* const module = new Module;
  read_architectures(*static_cast<const Wrapper*>(wrapper), *module);
  return reinterpret_cast<void**>(module);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> lock(s.mutex);
  s.functions[stub] = {reinterpret_cast<const Module*>(module), readable(name)};
}
void __cudaRegisterVar(void**, char* host, char*, const char*, int, size_t bytes, int, int) {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> lock(s.mutex);
  s.variables[host].resize(bytes);
}
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  ENTER(__func__);
  const auto found = s.variables.find(symbol);
  if (found == s.variables.end()) return result(cudaErrorInvalidSymbol);
  *address = found->second.data();
  return cudaSuccess;
}

// ---- launches

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                     cudaStream_t stream) {
  call_configurations.push_back({nullptr, grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  if (call_configurations.empty()) return result(cudaErrorInvalidConfiguration);
  const Request& last = call_configurations.back();
  *grid = last.grid;
  *block = last.block;
  *shared_bytes = last.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  call_configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  ENTER(__func__);
  return launch(s, {function, grid, block, shared_bytes, stream}, arguments);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function,
                                void** arguments) {
  ENTER(__func__);
  cudaError_t error = cudaSuccess;
  const Request request = request_of(*configuration, function, error);
  return error != cudaSuccess ? error : launch(s, request, arguments);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  ENTER(__func__);
  const auto known = s.functions.find(function);
  if (known == s.functions.end()) return result(cudaErrorInvalidDeviceFunction);
  const int architecture = architecture_for(*known->second.module, s.devices[current_device]);
  if (architecture == 0) return result(cudaErrorNoKernelImageForDevice);
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->ptxVersion = attributes->binaryVersion = architecture;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  ENTER(__func__);
  const auto known = s.functions.find(function);
  if (known == s.functions.end()) return result(cudaErrorInvalidDeviceFunction);
  const Device& device = s.devices[current_device];
  if (architecture_for(*known->second.module, device) == 0)
    return result(cudaErrorNoKernelImageForDevice);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return refuse(cudaErrorNotSupported, "function attribute " + std::to_string(attribute));
  if (value < 0 || value > device.shared_bytes) return result(cudaErrorInvalidValue);
  s.allowed_shared[{function, current_device}] = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t bytes,
                                                                   unsigned) {
  ENTER(__func__);
  const auto known = s.functions.find(function);
  if (known == s.functions.end()) return result(cudaErrorInvalidDeviceFunction);
  const Request request{function, {1, 1, 1}, {unsigned(threads), 1, 1}, bytes, nullptr};
  if (const auto wrong = objection(s, request, known->second))
    return refuse(wrong->first, std::string(wrong->second) + ": " + known->second.name);
  *blocks = resident_blocks(s.devices[current_device], threads, bytes);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, bytes,
                                                                0);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* configuration) {
  ENTER(__func__);
  const auto known = s.functions.find(function);
  if (known == s.functions.end()) return result(cudaErrorInvalidDeviceFunction);
  cudaError_t error = cudaSuccess;
  const Request request = request_of(*configuration, function, error);
  if (error != cudaSuccess) return error;
  if (const auto wrong = objection(s, request, known->second))
    return refuse(wrong->first, std::string(wrong->second) + ": " + known->second.name);
  const Device& device = s.devices[current_device];
  const int blocks = resident_blocks(device, int(volume(request.block)), request.shared_bytes);
  *clusters = blocks * device.multiprocessors / int(volume(request.cluster));
  return cudaSuccess;
}

}  // extern "C"
