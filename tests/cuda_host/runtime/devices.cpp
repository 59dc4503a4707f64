// Devices, errors, what the tests ask and plant, and the functions of the driver that PyTorch
// calls.
#include <cuda.h>

#include <cstdio>
#include <sstream>

#include "state.h"

namespace cuda_host {

thread_local int current_device = 0;
thread_local cudaStreamCaptureMode thread_capture_mode = cudaStreamCaptureModeGlobal;
namespace {
thread_local cudaError_t last_error = cudaSuccess;

std::string setting(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value != nullptr && *value != 0 ? value : otherwise;
}

// A word of CUDA_HOST_DEVICES.
cudaDeviceProp properties_of(const std::string& word, int index) {
  cudaDeviceProp p = {};
  std::sscanf(word.c_str(), "%d.%d", &p.major, &p.minor);
  const auto number = [&](const std::string& name, int otherwise) {
    const size_t at = word.find(name);
    return at == std::string::npos ? otherwise : std::atoi(word.c_str() + at + name.size());
  };
  const int shared = p.major >= 9 ? 227 : p.major == 8 && p.minor == 0 ? 163 : 99;
  p.sharedMemPerBlockOptin = size_t(number("kb=", shared)) << 10;
  p.clusterLaunch = number("clusters=", p.major >= 9);
  p.multiProcessorCount = number("sms=", 132);
  p.totalGlobalMem = size_t(number("mb=", 8192)) << 20;
  std::snprintf(p.name, sizeof p.name, "emulated device %d", index);
  p.uuid.bytes[0] = char(index + 1);
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerMultiprocessor = p.sharedMemPerBlockOptin + 1024;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiProcessor = 2048;
  p.l2CacheSize = 50 << 20;
  return p;
}
}  // namespace

// CUDA_HOST_DEVICES: a device a word, such as "9.0 9.0:sms=24,kb=99,clusters=0,mb=512".
State::State() : guard(setting("CUDA_HOST_GUARD", "0") != "0") {
  std::istringstream words(setting("CUDA_HOST_DEVICES", "9.0"));
  for (std::string word; words >> word;) {
    const int index = int(devices.size());
    devices.push_back({properties_of(word, index)});
    legacy.push_back(new CUstream_st{index});
    streams.insert(legacy.back());
  }
}
State& state() {
  static State* const it = new State;  // never destroyed: PyTorch frees memory at exit
  return *it;
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t refuse(cudaError_t error, const std::string& why) {
  std::fprintf(stderr, "cuda_host: %s: %s\n", cudaGetErrorName(error), why.c_str());
  return result(error);
}

cudaError_t enter(State& s, const char* function) {
  const std::map<int, cudaError_t>& planted = s.planted[function];
  const auto found = planted.find(++s.calls[function]);
  return found == planted.end() ? s.sticky : found->second;
}

}  // namespace cuda_host

using namespace cuda_host;

extern "C" {

// ---- for the tests

// One line a launch: device, stream, blocks, threads, cluster, shared bytes, early, kernel.
const char* cuda_host_log() { return state().log.c_str(); }
// One line for each limit of shared memory that was set: device, bytes, kernel.
const char* cuda_host_allowances() { return state().allowances.c_str(); }
// Calls of a function so far.
int cuda_host_calls(const char* function) { return state().calls[function]; }
// The nth call of a function from now on (1: the next) returns an error instead of doing anything.
void cuda_host_plant(const char* function, int nth, int error) {
  State& s = state();
  s.planted[function][s.calls[function] + nth] = static_cast<cudaError_t>(error);
}
// Forgets launches, limits, planted errors, and (as no device can) that a kernel has failed.
void cuda_host_forget() {
  State& s = state();
  s.log.clear();
  s.allowances.clear();
  s.planted.clear();
  s.sticky = last_error = cudaSuccess;
}
// What PyTorch imports and nobody has written; the build makes such stubs.
int cuda_host_lacks(const char* name) {
  return refuse(cudaErrorNotSupported, std::string(name) + " is not emulated");
}

// ---- errors

cudaError_t cudaPeekAtLastError() {
  return state().sticky != cudaSuccess ? state().sticky : last_error;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  last_error = cudaSuccess;
  return error;
}

namespace {
#define WORDS(error, text) \
  case error:              \
    return { #error, text }
std::pair<const char*, const char*> words_of(cudaError_t error) {
  switch (error) {
    WORDS(cudaSuccess, "no error");
    WORDS(cudaErrorInvalidValue, "invalid argument");
    WORDS(cudaErrorMemoryAllocation, "out of memory");
    WORDS(cudaErrorInvalidConfiguration, "invalid configuration argument");
    WORDS(cudaErrorInvalidDevice, "invalid device ordinal");
    WORDS(cudaErrorInvalidDeviceFunction, "invalid device function");
    WORDS(cudaErrorNoKernelImageForDevice, "no kernel image is available for the device");
    WORDS(cudaErrorInvalidResourceHandle, "invalid resource handle");
    WORDS(cudaErrorNotReady, "device not ready");
    WORDS(cudaErrorIllegalState, "the operation cannot be performed in the present state");
    WORDS(cudaErrorInvalidClusterSize, "cluster misconfiguration");
    WORDS(cudaErrorLaunchFailure, "unspecified launch failure");
    WORDS(cudaErrorLaunchOutOfResources, "too many resources requested for launch");
    WORDS(cudaErrorNotSupported, "operation not supported");
    WORDS(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing");
    WORDS(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error in capture");
    default:
      return {"an error", "an error without words in devices.cpp"};
  }
}
}  // namespace
const char* cudaGetErrorName(cudaError_t error) { return words_of(error).first; }
const char* cudaGetErrorString(cudaError_t error) { return words_of(error).second; }

// ---- devices

cudaError_t cudaGetDeviceCount(int* count) {
  return *count = int(state().devices.size()), cudaSuccess;
}
// These two need no context: they succeed after a kernel has failed, too.
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= int(state().devices.size())) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  ENTER;
  if (index < 0 || index >= int(s.devices.size())) return result(cudaErrorInvalidDevice);
  *properties = s.devices[index].properties;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  ENTER;
  cudaDeviceProp p;
  TRY(cudaGetDeviceProperties(&p, index));
  const std::map<int, int> values = {
      {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(p.sharedMemPerBlockOptin)},
      {cudaDevAttrClusterLaunch, p.clusterLaunch},
  };
  const auto found = values.find(attribute);
  if (found == values.end())
    return refuse(cudaErrorNotSupported, "device attribute " + std::to_string(attribute));
  *value = found->second;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ENTER;
  TRY(forbidden_in_capture(s, __func__));
  for (const cudaStream_t stream : s.streams)
    if (stream->device == current_device) drain(s, stream);
  return result(s.sticky);
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
// PyTorch asks so for functions of the driver that it can do without.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  return *function = nullptr, *found = cudaDriverEntryPointSymbolNotFound, cudaSuccess;
}

// ---- the driver

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}

}  // extern "C"
