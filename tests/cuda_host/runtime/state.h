// The state of the emulated CUDA runtime, and what its files share. ../README.md says what it is.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "kernels.h"

namespace cuda_host {

struct Device {
  int major = 9, minor = 0, multiprocessors = 132;
  int shared_bytes = 227 << 10;  // of a block that asks for it
  bool clusters = true;
  size_t total = size_t(8) << 30, used = 0;

  int capability() const { return major * 10 + minor; }
};

constexpr int kHost = -1;  // the device of pinned memory
struct Allocation {
  size_t bytes;
  int device;
  char* mapping;  // null where the caller owns the memory
  size_t mapped;
};

using Work = std::function<cudaError_t()>;

// What a capture has recorded. It replays in the order of the calls, which respects every edge.
struct Graph {
  unsigned long long id;
  std::vector<Work> nodes;
  bool invalid = false;
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
  unsigned flags = 0;
  int priority = 0;
  unsigned long long number = 0;  // 0: the legacy stream of its device
  std::deque<cuda_host::Work> queue = {};
  uint64_t enqueued = 0, done = 0;
  std::shared_ptr<cuda_host::Graph> capture = nullptr;
  bool began_capture = false;

  bool waits_for_legacy() const { return number != 0 && (flags & cudaStreamNonBlocking) == 0; }
};
struct CUevent_st {
  int device;
  cudaStream_t stream = nullptr;
  uint64_t ticket = 0;  // of the stream's work, all that was enqueued before the event
  double milliseconds = 0;
  std::shared_ptr<cuda_host::Graph> capture = nullptr;
};
struct CUgraph_st {
  std::shared_ptr<cuda_host::Graph> graph;
};
struct CUgraphExec_st {
  std::shared_ptr<cuda_host::Graph> graph;
};

namespace cuda_host {

struct State {
  std::recursive_mutex mutex;
  std::vector<Device> devices;
  std::vector<std::unique_ptr<CUstream_st>> legacy;  // one a device
  std::set<cudaStream_t> streams;
  std::set<std::shared_ptr<Graph>> captures;  // under way
  std::map<uintptr_t, Allocation> allocations;
  std::map<const void*, Function> functions;                  // by the address of the host's stub
  std::map<std::pair<const void*, int>, int> allowed_shared;  // by cudaFuncSetAttribute, per device
  std::map<const void*, std::vector<char>> variables;
  std::map<std::string, FiberKernel> kernels;
  std::map<std::string, std::map<int, cudaError_t>> planted;  // function -> call -> error
  std::map<std::string, int> calls;
  unsigned long long numbers = 0;    // of streams and graphs
  cudaError_t sticky = cudaSuccess;  // a kernel that failed makes its context unusable
  std::string log;
  // Allocations end at a page that faults, are filled with NaN, and what was written between their
  // end and that page is an error.
  bool guard = false;

  State();
};

State& state();
std::string setting(const char* name, const char* otherwise);
extern thread_local int current_device;
extern thread_local cudaStreamCaptureMode thread_capture_mode;

// Remembers an error for cudaGetLastError; the second one prints why.
cudaError_t result(cudaError_t error);
cudaError_t refuse(cudaError_t error, const std::string& why);

// streams.cpp. A handle's stream, null where there is none.
cudaStream_t stream_of(State& s, cudaStream_t handle);
cudaError_t submit(State& s, cudaStream_t handle, Work work);
void drain(State& s, cudaStream_t stream, uint64_t ticket = UINT64_MAX);
void drain_device(State& s, int device);
// What a capture forbids this thread to call: an error, which also invalidates the capture.
cudaError_t forbidden_in_capture(State& s, const char* what);

// memory.cpp
const Allocation* allocation_at(State& s, const void* address);
// Null, or which allocation was written beyond its end.
std::string overrun(State& s);

// Begins every function of the runtime: takes the lock, counts, and returns an error that a test
// has planted here or that an earlier kernel has left.
#define ENTER(name)                                          \
  using namespace cuda_host;                                 \
  State& s = state();                                        \
  const std::lock_guard<std::recursive_mutex> lock(s.mutex); \
  if (const cudaError_t early = enter(s, name); early != cudaSuccess) return result(early)
cudaError_t enter(State& s, const char* function);

}  // namespace cuda_host
