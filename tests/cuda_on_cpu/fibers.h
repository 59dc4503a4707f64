// The state of a launch, and fibers: a stack for every CUDA thread, and switching between it and
// the scheduler. Used by cuda_on_cpu.h.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_USES_UCONTEXT 1
#include <ucontext.h>
#else
#define CUDA_ON_CPU_USES_UCONTEXT 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define CUDA_ON_CPU_UNSEEN inline __attribute__((no_sanitize("thread"), noinline))
#else
#define CUDA_ON_CPU_UNSEEN inline
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct Index3 {
  unsigned x, y, z;
};

inline thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuardBytes =
    0;  // AddressSanitizer sees the overrun itself, where the allocation ends
#else
constexpr size_t kGuardBytes = 256;
#endif
constexpr unsigned char kGuard = 0xA5;
constexpr int kWarpSize = 32;

enum class State : uint8_t {
  kReady,
  kAtBlockBarrier,
  kAtClusterBarrier,
  kAtWarp,
  kAtMbarrier,
  kDone
};
enum class WarpOp : uint8_t { kSync, kShuffleXor };

// An asynchronous copy or store that has not happened yet.
struct Transfer {
  void* to;
  const void* from;  // null: the value
  size_t bytes;
  unsigned char value[16];
  const void* barrier;  // that counts it
};

struct Fiber {
#if CUDA_ON_CPU_USES_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;
  unsigned thread = 0, rank = 0;  // in its block; of the block in its cluster
  State state = State::kDone;
  WarpOp op = WarpOp::kSync;
  unsigned mask = 0;
  int argument = 0;
  uint64_t value = 0, result = 0;
  const char* file = "";
  int line = 0;
  std::vector<Transfer> copies;   // begun, not waited for
  const void* barrier = nullptr;  // waited for, where the state says so
  unsigned parity = 0;
  void* tsan = nullptr;  // ThreadSanitizer's view of it: a thread of its own
};

struct Configuration {
  unsigned blocks = 1, threads = 1;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  uint32_t seed =
      0;  // 0: threads and blocks in order; else permuted, the threads anew after every meeting
  unsigned only_blocks = 0;  // run just the first and last clusters with that many blocks: for
                             // tensors of over 2^31 elements
};

struct Statistics {
  uint64_t launches = 0, blocks = 0, threads = 0, switches = 0;
};

// One launch at a time per operating-system thread.
struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // of a cluster; kept for the next launch
  size_t count = 0;
  std::vector<char*> shared;   // per block of the cluster
  std::vector<bool> gone;      // blocks of the cluster that have exited
  std::vector<Transfer> sent;  // between the blocks of the cluster, not yet arrived
  Fiber* current = nullptr;
  unsigned first_block = 0;  // of the cluster that runs
  Configuration configuration;
  uint32_t random = 0;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  std::string error;
  Statistics statistics;
#if CUDA_ON_CPU_USES_UCONTEXT
  ucontext_t scheduler;
#else
  void* scheduler = nullptr;
#endif
  const void* scheduler_stack = nullptr;  // for AddressSanitizer
  size_t scheduler_stack_bytes = 0;
  void* scheduler_tsan = nullptr;
};
inline thread_local Machine machine;

// ThreadSanitizer takes every fiber for a thread and is told what orders them: the barriers, and
// the begin and end of a launch; neither switching nor a shuffle. What this header itself reads and
// writes on behalf of a fiber is none of its business.
inline void release_to(void* place) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(place);
#endif
  (void)place;
}
inline void acquire_from(void* place) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(place);
#endif
  (void)place;
}
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
#else
  Unseen() {}
#endif
};

// ---- fibers
#if !CUDA_ON_CPU_USES_UCONTEXT
// Saves what a called function must preserve on this stack, and goes on where the other stack
// stopped.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp,(%rdi); mov %rsi,%rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
#endif

CUDA_ON_CPU_UNSEEN void leave_fiber(bool for_good = false) {
  Fiber* const fiber = machine.current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if CUDA_ON_CPU_USES_UCONTEXT
  swapcontext(&fiber->context, &machine.scheduler);
#else
  switch_stack(&fiber->stack_pointer, machine.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  (void)for_good;
}

CUDA_ON_CPU_UNSEEN void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
  acquire_from(&machine.entry);
  machine.entry(machine.argument);
  release_to(&machine.argument);
  machine.current->state = State::kDone;
  leave_fiber(true);
}

inline void prepare(Fiber& fiber, size_t index) {
#if defined(__SANITIZE_THREAD__)
  if (fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
#endif
  if (fiber.stack == nullptr) {
    void* const memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(memory);
    mprotect(fiber.stack, kPage, PROT_NONE);  // running off the stack faults
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack + kPage,
                                kStackBytes);  // the frames of the run before, which never returned
#endif
#if CUDA_ON_CPU_USES_UCONTEXT
  (void)index;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack + kPage;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#else
  // Staggered, so that the stacks of neighbours do not compete for the same cache sets. A called
  // function finds the stack pointer 8 beyond a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kPage + kStackBytes - 64 - index % 61 * 192);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six registers that switch_stack pops
  fiber.stack_pointer = top;
#endif
  fiber.state = State::kReady;
  fiber.line = 0;
  fiber.copies.clear();
}

CUDA_ON_CPU_UNSEEN void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx.x = machine.first_block + fiber.rank;
  ++machine.statistics.switches;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack + kPage, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if CUDA_ON_CPU_USES_UCONTEXT
  swapcontext(&machine.scheduler, &fiber.context);
#else
  switch_stack(&machine.scheduler, fiber.stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

}  // namespace cuda_on_cpu
