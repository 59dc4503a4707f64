// Devices, errors, and what the tests ask and plant.
#include <cstdio>

#include "state.h"

namespace cuda_host {

thread_local int current_device = 0;
thread_local cudaStreamCaptureMode thread_capture_mode = cudaStreamCaptureModeGlobal;
namespace {
thread_local cudaError_t last_error = cudaSuccess;
}

std::string setting(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value != nullptr && *value != 0 ? value : otherwise;
}

// CUDA_HOST_DEVICES: a device a word, such as "9.0 9.0:sms=24,kb=99,clusters=0,mb=512".
State::State() : guard(setting("CUDA_HOST_GUARD", "0") != "0") {
  std::string words = setting("CUDA_HOST_DEVICES", "9.0") + " ";
  while (!words.empty()) {
    const std::string word = words.substr(0, words.find(' '));
    words.erase(0, word.size() + 1);
    if (word.empty()) continue;
    Device device;
    std::sscanf(word.c_str(), "%d.%d", &device.major, &device.minor);
    const int capability = device.capability();
    if (capability < 90) device.clusters = false;
    if (capability < 90) device.shared_bytes = (capability == 80 ? 163 : 99) << 10;
    const auto number = [&](const char* name, int otherwise) {
      const size_t at = word.find(name);
      return at == std::string::npos ? otherwise : std::atoi(word.c_str() + at + std::strlen(name));
    };
    device.multiprocessors = number("sms=", device.multiprocessors);
    device.shared_bytes = number("kb=", device.shared_bytes >> 10) << 10;
    device.clusters = number("clusters=", device.clusters) != 0;
    device.total = size_t(number("mb=", int(device.total >> 20))) << 20;
    legacy.push_back(std::make_unique<CUstream_st>(CUstream_st{int(devices.size())}));
    streams.insert(legacy.back().get());
    devices.push_back(device);
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
  const int call = ++s.calls[function];
  const auto planted = s.planted.find(function);
  if (planted != s.planted.end())
    if (const auto found = planted->second.find(call); found != planted->second.end())
      return found->second;
  return s.sticky;
}

}  // namespace cuda_host

using namespace cuda_host;

extern "C" {

// ---- for the tests

// One line a launch: device, stream, blocks, threads, cluster, shared bytes, early, kernel.
const char* cuda_host_log() { return state().log.c_str(); }
// Calls of a function so far.
int cuda_host_calls(const char* function) { return state().calls[function]; }
// The nth call of a function from now on (1: the next) returns an error instead of doing anything.
void cuda_host_plant(const char* function, int nth, int error) {
  State& s = state();
  s.planted[function][s.calls[function] + nth] = static_cast<cudaError_t>(error);
}
// Forgets launches, planted errors, and (as no device can) that a kernel has failed.
void cuda_host_forget() {
  State& s = state();
  s.log.clear();
  s.planted.clear();
  s.sticky = last_error = cudaSuccess;
}
// Work that waits in streams.
int cuda_host_pending() {
  int count = 0;
  for (const cudaStream_t stream : state().streams) count += int(stream->queue.size());
  return count;
}
unsigned long long cuda_host_stream_number(cudaStream_t handle) {
  const cudaStream_t stream = stream_of(state(), handle);
  return stream == nullptr ? ~0ull : stream->number;
}
// Runs what a stream holds, without being a call of the runtime that a test would count.
int cuda_host_wait(cudaStream_t handle) {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> lock(s.mutex);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr || stream->capture) return cudaErrorStreamCaptureUnsupported;
  if (stream->waits_for_legacy()) drain(s, s.legacy[stream->device].get());
  if (stream->number == 0)
    for (const cudaStream_t blocking : s.streams)
      if (blocking->device == stream->device && blocking->waits_for_legacy()) drain(s, blocking);
  drain(s, stream);
  return s.sticky;
}
// What PyTorch imports and nobody has written; the build makes such stubs.
int cuda_host_lacks(const char* name) {
  return refuse(cudaErrorNotSupported, std::string(name) + " is not emulated");
}

// ---- errors

cudaError_t cudaGetLastError() {
  const cudaError_t error = state().sticky != cudaSuccess ? state().sticky : last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  return state().sticky != cudaSuccess ? state().sticky : last_error;
}

namespace {
struct Words {
  cudaError_t error;
  const char *name, *text;
};
#define WORDS(error, text) {error, #error, text}
const Words kWords[] = {
    WORDS(cudaSuccess, "no error"),
    WORDS(cudaErrorInvalidValue, "invalid argument"),
    WORDS(cudaErrorMemoryAllocation, "out of memory"),
    WORDS(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    WORDS(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    WORDS(cudaErrorInvalidDevice, "invalid device ordinal"),
    WORDS(cudaErrorInvalidDeviceFunction, "invalid device function"),
    WORDS(cudaErrorNoKernelImageForDevice, "no kernel image is available for the device"),
    WORDS(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    WORDS(cudaErrorNotReady, "device not ready"),
    WORDS(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    WORDS(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    WORDS(cudaErrorInvalidClusterSize, "cluster misconfiguration"),
    WORDS(cudaErrorLaunchFailure, "unspecified launch failure"),
    WORDS(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    WORDS(cudaErrorNotSupported, "operation not supported"),
    WORDS(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    WORDS(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error in capture"),
};
const Words& words_of(cudaError_t error) {
  static const Words unknown{cudaErrorUnknown, "cudaErrorUnknown", "an error without words here"};
  for (const Words& words : kWords)
    if (words.error == error) return words;
  return unknown;
}
}  // namespace
const char* cudaGetErrorName(cudaError_t error) { return words_of(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return words_of(error).text; }

// ---- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = int(state().devices.size());
  return *count > 0 ? cudaSuccess : result(cudaErrorNoDevice);
}
// These two need no context: they succeed after a kernel has failed, too.
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= int(state().devices.size())) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  ENTER(__func__);
  if (index < 0 || index >= int(s.devices.size())) return result(cudaErrorInvalidDevice);
  const Device& device = s.devices[index];
  const std::map<int, int> values = {
      {cudaDevAttrMultiProcessorCount, device.multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrClusterLaunch, device.clusters},
      {cudaDevAttrComputeCapabilityMajor, device.major},
      {cudaDevAttrComputeCapabilityMinor, device.minor},
  };
  const auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  ENTER(__func__);
  if (index < 0 || index >= int(s.devices.size())) return result(cudaErrorInvalidDevice);
  const Device& device = s.devices[index];
  cudaDeviceProp p = {};
  std::snprintf(p.name, sizeof p.name, "emulated device %d", index);
  p.uuid.bytes[0] = char(index + 1);
  p.totalGlobalMem = device.total;
  p.major = device.major;
  p.minor = device.minor;
  p.multiProcessorCount = device.multiprocessors;
  p.clusterLaunch = device.clusters;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerBlockOptin = device.shared_bytes;
  p.sharedMemPerMultiprocessor = device.shared_bytes + 1024;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.maxThreadsPerBlock = p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxGridSize[0] = 0x7fffffff;
  p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.textureAlignment = 512;
  p.unifiedAddressing = 1;
  p.l2CacheSize = 50 << 20;
  *properties = p;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ENTER(__func__);
  if (const auto error = forbidden_in_capture(s, __func__); error != cudaSuccess) return error;
  drain_device(s, current_device);
  return result(s.sticky);
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  return std::snprintf(text, size_t(bytes), "0000:%02x:00.0", device + 1), cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
// PyTorch asks so for functions of the driver that it can do without.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  if (found != nullptr) *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
