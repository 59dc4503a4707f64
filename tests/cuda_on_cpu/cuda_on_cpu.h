// Runs CUDA kernels on a CPU, for tests: a host compiler compiles the unchanged .cuh files, every
// CUDA thread is a fiber.
//
// A fiber runs until it reaches __syncthreads, a *_sync warp function, cluster_wait or wait_for.
// Then the scheduler looks whether all threads that must meet are there, at the same line, computes
// what a shuffle returns, and resumes them. Blocks run one after another, the blocks of a cluster
// together. A seed other than 0 permutes threads and blocks, and lets some run ahead of others.
//
// The rules of memory, each as strict as CUDA's or stricter, and what breaks one:
//
// - Shared memory starts as NaN. Guard bytes lie behind it. A read before the write, such as one
//   before a barrier, yields NaN, or results that differ between seeds.
// - A barrier is met by all threads of its block at one line, a warp function by all lanes of its
//   mask. A barrier in divergent code, a wrong mask or a return before a shuffle is an error that
//   names two threads and their lines.
// - An asynchronous copy happens when its own thread waits for its group, and not before. Without
//   the wait, or with one for fewer groups, the slot holds what it held before. No other thread may
//   read the slot without a barrier after that wait.
// - A store to another block happens when the barrier that counts it completes, and not before;
//   under a seed half of them happen at once. A read before the wait sees NaN, or the last tile.
// - A barrier completes when exactly the expected bytes have come. More are an error, fewer are a
//   deadlock, and both are reported. So are a barrier that is armed twice or not initialized.
// - The shared memory of a block that has exited is gone: a store to it, or to one outside the
//   cluster, is an error, and what it held is NaN.
//
// Misaligned vectors and overflow show under -fsanitize=undefined, races under -fsanitize=thread;
// the tensors of the tests end at guard pages.
//
// Invisible to it: coalescing, registers, weak memory order, the rounding of __expf. Bank conflicts
// are counted by bank_conflicts.cpp.
//
// Supplied: threadIdx .. gridDim, dynamic shared memory, __syncthreads, __syncwarp,
// __shfl_xor_sync, clusters, asynchronous copies, barriers that count bytes, __ldca, the vector
// words, a few intrinsics. Kernels must not spin on memory.
#pragma once
#include "fibers.h"

namespace cuda_on_cpu {

// ---- meetings
inline std::string place_of(const Fiber& fiber) {
  const std::string who = "thread " + std::to_string(fiber.thread) + " of block " +
                          std::to_string(machine.first_block + fiber.rank);
  if (fiber.state == State::kDone) return who + " has exited";
  const char* const slash = std::strrchr(fiber.file, '/');
  return who + " at " + (slash != nullptr ? slash + 1 : fiber.file) + ":" +
         std::to_string(fiber.line);
}
inline void fail(const std::string& what, const Fiber& fiber, const Fiber* other = nullptr) {
  if (machine.error.empty())
    machine.error =
        what + ": " + place_of(fiber) + (other != nullptr ? ", but " + place_of(*other) : "");
}

// Releases the fibers first .. last-1 if all of them wait in `state` at one line.
inline bool release_barrier(size_t first, size_t last, State state) {
  size_t waiting = 0, done = 0;
  const Fiber* sample = nullptr;
  for (size_t i = first; i < last; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    waiting += fiber.state == state;
    done += fiber.state == State::kDone;
    if (fiber.state == state && sample == nullptr) sample = &fiber;
  }
  if (waiting == 0 || waiting + done < last - first) return false;
  for (size_t i = first; i < last; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (fiber.state == State::kDone || fiber.line != sample->line ||
        std::strcmp(fiber.file, sample->file) != 0) {
      fail("divergent barrier", *sample, &fiber);
      return false;
    }
  }
  for (size_t i = first; i < last; ++i) machine.fibers[i]->state = State::kReady;
  return true;
}

// Releases the lanes of one warp whose partners in a warp function have all come.
inline bool release_warp(size_t first, size_t last) {
  bool released = false;
  for (size_t i = first; i < last; ++i) {
    const Fiber caller = *machine.fibers[i];
    if (caller.state != State::kAtWarp) continue;
    if (last - first < kWarpSize && (caller.mask >> (last - first)) != 0) {
      fail("a warp mask names lanes beyond the block", caller);
      return false;
    }
    if ((caller.mask >> (i - first) & 1) == 0) {
      fail("a warp mask lacks the calling lane", caller);
      return false;
    }
    const auto partner = [&](const Fiber& fiber) {
      return fiber.state == State::kAtWarp && fiber.mask == caller.mask && fiber.op == caller.op &&
             fiber.line == caller.line;
    };
    unsigned here = 0;
    for (size_t j = first; j < last; ++j) {
      const Fiber& fiber = *machine.fibers[j];
      if (partner(fiber)) here |= 1u << (j - first);
      if (fiber.state == State::kDone && (caller.mask >> (j - first) & 1) != 0) {
        fail("a warp mask names an exited lane", caller, &fiber);
        return false;
      }
    }
    if ((here & caller.mask) != caller.mask) continue;
    for (size_t j = first; j < last; ++j) {
      Fiber& fiber = *machine.fibers[j];
      if (fiber.op != WarpOp::kShuffleXor || !partner(fiber)) continue;
      const size_t source = (j - first) ^ size_t(fiber.argument);
      if (source >= kWarpSize || (fiber.mask >> source & 1) == 0) {
        fail("a shuffle reads a lane outside its mask", fiber);
        return false;
      }
      fiber.result = machine.fibers[first + source]->value;
    }
    for (size_t j = first; j < last; ++j)
      if (here >> (j - first) & 1) machine.fibers[j]->state = State::kReady;
    released = true;
  }
  return released;
}

// A barrier in shared memory, as the kernels place it there.
struct Mbarrier {
  int32_t missing;  // bytes: expected, less those that have come
  uint8_t phase, armed;
  uint16_t mark;  // kInitialized, or nobody has initialized it
};
constexpr uint16_t kInitialized = 0xBA27;

// Releases the fibers that wait for a phase of a barrier which is over.
inline bool release_mbarriers() {
  bool released = false;
  for (size_t i = 0; i < machine.count; ++i) {
    Fiber& fiber = *machine.fibers[i];
    if (fiber.state != State::kAtMbarrier ||
        static_cast<const Mbarrier*>(fiber.barrier)->phase == fiber.parity)
      continue;
    fiber.state = State::kReady;
    released = true;
  }
  return released;
}

inline unsigned next_random() {
  return (machine.random = machine.random * 1664525u + 1013904223u) >> 8;
}

inline void poison(char* shared) {
  std::memset(shared, 0xFF, machine.configuration.shared_bytes);
}  // every float of it is a NaN

inline void run_cluster(unsigned first_block) {
  machine.statistics.threads += machine.count;
  const Configuration& configuration = machine.configuration;
  const size_t per_block = configuration.threads;
  machine.first_block = first_block;
  blockIdx = {first_block, 0, 0};
  for (char* const shared : machine.shared) {
    poison(shared);
    std::memset(shared + configuration.shared_bytes, kGuard, kGuardBytes);
  }
  std::vector<size_t> order(machine.count);
  std::iota(order.begin(), order.end(), size_t(0));
  for (size_t i = 0; i < machine.count; ++i) prepare(*machine.fibers[i], i);
  machine.gone.assign(configuration.cluster, false);
  machine.sent.clear();
  const size_t block_warps = (per_block + kWarpSize - 1) / kWarpSize;
  std::vector<bool> delayed(block_warps * configuration.cluster, false);
  bool block_delayed = false;

  for (;;) {
    bool progress = false;
    if (configuration.seed != 0) {
      for (size_t i = machine.count; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
      for (size_t warp = 0; warp < delayed.size(); ++warp) {
        // Some warps, and whole blocks of a cluster, rest for a round while others run ahead of
        // them.
        if (warp % block_warps == 0)
          block_delayed = configuration.cluster > 1 && next_random() % 2 == 0;
        delayed[warp] = block_delayed || next_random() % 4 == 0;
      }
    }
    for (const size_t i : order)
      if (machine.fibers[i]->state == State::kReady) {
        progress = true;
        if (!delayed[i / per_block * block_warps + i % per_block / kWarpSize])
          resume(*machine.fibers[i]);
      }
    size_t alive = 0;
    for (unsigned block = 0; block < configuration.cluster; ++block) {
      const size_t first = block * per_block, last = first + per_block;
      for (size_t warp = first; warp < last; warp += kWarpSize)
        progress |= release_warp(warp, std::min(warp + kWarpSize, last));
      progress |= release_barrier(first, last, State::kAtBlockBarrier);
      size_t block_alive = 0;
      for (size_t i = first; i < last; ++i) block_alive += machine.fibers[i]->state != State::kDone;
      if (block_alive == 0 && !machine.gone[block] && configuration.cluster > 1) {
        machine.gone[block] = true;
        poison(machine.shared[block]);  // the shared memory of a block that has exited is gone for
                                        // its cluster
      }
      alive += block_alive;
    }
    progress |= release_barrier(0, machine.count, State::kAtClusterBarrier);
    progress |= release_mbarriers();
    if (alive == 0) break;
    if (!progress && machine.error.empty())
      for (size_t i = 0; i < machine.count; ++i)
        if (machine.fibers[i]->state != State::kDone) {
          fail("deadlock", *machine.fibers[i]);
          break;
        }
    if (!machine.error.empty()) throw std::runtime_error(machine.error);
  }
  for (unsigned block = 0; block < configuration.cluster; ++block)
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (static_cast<unsigned char>(machine.shared[block][configuration.shared_bytes + i]) !=
          kGuard)
        throw std::runtime_error("shared memory of block " + std::to_string(first_block + block) +
                                 " was written " + std::to_string(i) + " bytes beyond its end");
}

// ---- launch
template <class Kernel>
void launch(const Configuration& configuration, Kernel kernel) {
  if (configuration.threads < 1 || configuration.threads > 1024 ||
      configuration.shared_bytes > 232448 || configuration.blocks < 1 ||
      configuration.cluster < 1 || configuration.cluster > 8 ||
      configuration.blocks % configuration.cluster != 0)
    throw std::runtime_error("bad launch configuration");
  const Unseen unseen;
  release_to(&machine.entry);
#if defined(__SANITIZE_THREAD__)
  machine.scheduler_tsan = __tsan_get_current_fiber();
#endif
  machine.configuration = configuration;
  machine.random = configuration.seed;
  machine.error.clear();
  machine.argument = &kernel;
  machine.entry = [](void* argument) { (*static_cast<Kernel*>(argument))(); };
  gridDim = {configuration.blocks, 1, 1};
  blockDim = {configuration.threads, 1, 1};
  machine.count = size_t(configuration.threads) * configuration.cluster;
  while (machine.fibers.size() < machine.count) machine.fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < machine.count; ++i) {
    machine.fibers[i]->thread = static_cast<unsigned>(i % configuration.threads);
    machine.fibers[i]->rank = static_cast<unsigned>(i / configuration.threads);
  }
  std::vector<std::unique_ptr<char, void (*)(void*)>> owners;
  const auto allocate_shared = [&] {
    machine.shared.clear();
    for (unsigned block = 0; block < configuration.cluster; ++block) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, configuration.shared_bytes + kGuardBytes) != 0)
        throw std::bad_alloc();
      owners.emplace_back(static_cast<char*>(memory), &std::free);
      machine.shared.push_back(static_cast<char*>(memory));
    }
  };
  allocate_shared();
  // A seed permutes the clusters: i -> (i * step + seed) mod count, with step prime to count.
  const uint64_t clusters = configuration.blocks / configuration.cluster;
  uint64_t step = 1;
  if (configuration.seed != 0)
    for (step = (clusters * 5 / 8) | 1; std::gcd(step, clusters) != 1;) step += 2;
  const uint64_t only = configuration.only_blocks / configuration.cluster;
  for (uint64_t i = 0; i < clusters; ++i) {
    if (only != 0 && i == only && clusters > 2 * only) i = clusters - only;
    const uint64_t cluster =
        configuration.seed != 0 && only == 0 ? (i * step + configuration.seed) % clusters : i;
#if defined(__SANITIZE_THREAD__)
    if (i > 0)
      allocate_shared();  // of every cluster its own, else blocks would race for it that never meet
                          // on a GPU
#endif
    run_cluster(static_cast<unsigned>(cluster * configuration.cluster));
    machine.statistics.blocks += configuration.cluster;
  }
  acquire_from(&machine.argument);
  machine.statistics.launches += 1;
}

inline void* shared_memory() {
  const Unseen unseen;
  return machine.shared[machine.current->rank];
}

CUDA_ON_CPU_UNSEEN void wait(State state, const char* file, int line) {
  Fiber& fiber = *machine.current;
  fiber.state = state;
  fiber.file = file;
  fiber.line = line;
  leave_fiber();
}

// An address of its own for every warp, block or cluster: what its threads release and acquire
// where they meet.
inline void* meeting_place(State state) {
  const Unseen unseen;
  if (state == State::kAtClusterBarrier) return &machine;
  const Fiber& fiber = *machine.current;
  if (state == State::kAtBlockBarrier) return machine.shared[fiber.rank];
  return machine
      .fibers[fiber.rank * machine.configuration.threads + fiber.thread / kWarpSize * kWarpSize]
      .get();
}
inline void meet(State state, const char* file, int line) {
  void* const place = meeting_place(state);
  release_to(place);
  wait(state, file, line);
  acquire_from(place);
}

CUDA_ON_CPU_UNSEEN uint64_t meet_warp(WarpOp op, unsigned mask, uint64_t value, int argument,
                                      const char* file, int line) {
  Fiber& fiber = *machine.current;
  fiber.op = op;
  fiber.mask = mask;
  fiber.value = value;
  fiber.argument = argument;
  wait(State::kAtWarp, file, line);
  return machine.current->result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::meet(cuda_on_cpu::State::kAtBlockBarrier, file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  void* const place = cuda_on_cpu::meeting_place(cuda_on_cpu::State::kAtWarp);
  cuda_on_cpu::release_to(place);
  cuda_on_cpu::meet_warp(cuda_on_cpu::WarpOp::kSync, mask, 0, 0, file, line);
  cuda_on_cpu::acquire_from(place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_on_cpu::meet_warp(cuda_on_cpu::WarpOp::kShuffleXor, mask, bits, lanes, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __ldca(const T* from) {
  return *from;
}
inline float rsqrtf(float value) { return 1.f / std::sqrt(value); }
inline double rsqrt(double value) { return 1. / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }

#include "asynchronous.h"
