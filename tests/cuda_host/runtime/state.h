// The state of the emulated CUDA runtime, and what its files share. ../README.md says what it is.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace cuda_host {

using Work = std::function<cudaError_t()>;

struct Device {
  cudaDeviceProp properties = {};
  size_t used = 0;
};

constexpr int kHost = -1;  // the device of pinned memory
struct Allocation {
  size_t bytes;
  int device;
  char* mapping;
  size_t mapped;
};

// A library's fat binary: the architectures, such as 90, of its machine code and of its PTX.
struct Module {
  std::vector<int> binaries, ptx;
};
struct Function {
  const Module* module;
  std::string name;  // demangled
};

}  // namespace cuda_host

// Streams are lazy: work is queued, and runs when something waits for it.
struct CUstream_st {
  int device;
  std::deque<cuda_host::Work> queue = {};
  uint64_t enqueued = 0, done = 0;
  cudaGraph_t capture = nullptr;
  bool began_capture = false;
};
struct CUevent_st {
  int device;
  cudaStream_t stream = nullptr;
  uint64_t ticket = 0;  // of the stream's work, all that was enqueued before the event
  double milliseconds = 0;
  cudaGraph_t capture = nullptr;
};
// What a capture has recorded. It replays in the order of the calls, which respects every edge. Its
// memory stays, as that of streams: events and queues may name it.
struct CUgraph_st {
  std::vector<cuda_host::Work> nodes = {};
  bool invalid = false;
};

namespace cuda_host {

struct State {
  std::recursive_mutex mutex;
  std::vector<Device> devices;
  std::vector<cudaStream_t> legacy;  // one a device
  std::set<cudaStream_t> streams;
  std::set<cudaGraph_t> captures;  // under way
  std::map<uintptr_t, Allocation> allocations;
  std::map<const void*, Function> functions;                  // by the address of the host's stub
  std::map<std::pair<const void*, int>, int> allowed_shared;  // by cudaFuncSetAttribute, per device
  std::map<std::string, std::map<int, cudaError_t>> planted;  // function -> call -> error
  std::map<std::string, int> calls;
  cudaError_t sticky = cudaSuccess;  // a kernel that failed makes its context unusable
  std::string log, allowances;       // for the tests
  // Allocations end at a page that faults, are filled with NaN, and what was written between their
  // end and that page is an error.
  bool guard = false;

  State();
};

State& state();
extern thread_local int current_device;
extern thread_local cudaStreamCaptureMode thread_capture_mode;

// Remembers an error for cudaGetLastError; the second one prints why.
cudaError_t result(cudaError_t error);
cudaError_t refuse(cudaError_t error, const std::string& why);

// streams.cpp. A handle's stream, null where there is none.
cudaStream_t stream_of(State& s, cudaStream_t handle);
cudaError_t submit(cudaStream_t stream, Work work);
void drain(State& s, cudaStream_t stream, uint64_t ticket = UINT64_MAX);
// What a capture forbids this thread to call: an error, which also invalidates the capture.
cudaError_t forbidden_in_capture(State& s, const char* what);

// memory.cpp. Empty, or which allocation was written beyond its end.
std::string overrun(State& s);

cudaError_t enter(State& s, const char* function);
// Begins every function of the runtime: takes the lock, counts, and returns an error that a test
// has planted here or that an earlier kernel has left.
#define ENTER                                                \
  using namespace cuda_host;                                 \
  State& s = state();                                        \
  const std::lock_guard<std::recursive_mutex> lock(s.mutex); \
  TRY(enter(s, __func__))
#define TRY(call) \
  if (const cudaError_t failed = (call); failed != cudaSuccess) return result(failed)
// The stream of a handle, under the name `stream`.
#define STREAM(handle)                              \
  const cudaStream_t stream = stream_of(s, handle); \
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle)

}  // namespace cuda_host
