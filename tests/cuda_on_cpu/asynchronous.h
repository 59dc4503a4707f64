// What the kernels call for clusters and for copies and stores that happen later;
// csrc/cuda/platform.cuh has it for a GPU. Part of cuda_on_cpu.h.
#pragma once

namespace cuda_on_cpu {

// A barrier that has all its bytes: what it counted arrives, and the next phase begins.
inline void complete_if_full(Mbarrier* barrier) {
  if (barrier->armed == 0) return;
  if (barrier->missing < 0) fail("more bytes came than a barrier expects", *machine.current);
  if (barrier->missing != 0) return;
  const auto counted = [&](const Transfer& transfer) {
    if (transfer.barrier != barrier) return false;
    std::memcpy(transfer.to, &transfer.value, transfer.bytes);
    return true;
  };
  machine.sent.erase(std::remove_if(machine.sent.begin(), machine.sent.end(), counted),
                     machine.sent.end());
  barrier->armed = 0;
  barrier->phase ^= 1;
}
inline void check_initialized(const Mbarrier* barrier) {
  if (barrier->mark != kInitialized) fail("a barrier that is not initialized", *machine.current);
}
// The same place in the shared memory of another block.
template <class A>
A* in_block(A* own, unsigned rank) {
  if (rank >= machine.configuration.cluster || machine.gone[rank]) {
    fail("a store to a block that has left its cluster, or is outside it", *machine.current);
    return own;
  }
  return reinterpret_cast<A*>(machine.shared[rank] + (reinterpret_cast<char*>(own) -
                                                      machine.shared[machine.current->rank]));
}

// What the kernels call; csrc/cuda/platform.cuh has it for a GPU.
namespace device {

using cuda_on_cpu::Mbarrier;

CUDA_ON_CPU_UNSEEN unsigned cluster_rank() { return machine.current->rank; }
inline void cluster_arrive() {
}  // the wait stands for both halves: blocks can only run further ahead on a GPU before it
inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  meet(State::kAtClusterBarrier, file, line);
}
template <class Word>
void copy_async(Word* to, const void* from, bool wanted) {
  const Unseen unseen;
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Word) != 0)
    fail("a misaligned copy", *machine.current);
  machine.current->copies.push_back({to, wanted ? from : nullptr, sizeof(Word), {}, nullptr});
}
inline void close_copies() {
  const Unseen unseen;
  machine.current->copies.push_back({nullptr, nullptr, 0, {}, nullptr});  // the end of a group
}
template <int LATER>
void wait_for_copies() {
  std::vector<Transfer> copies;
  {
    const Unseen unseen;
    std::vector<Transfer>& begun = machine.current->copies;
    auto end = begun.end();
    for (int later = LATER + 1; end != begun.begin(); --end)
      if (std::prev(end)->to == nullptr && --later == 0) break;
    copies.assign(begun.begin(), end);
    begun.erase(begun.begin(), end);
  }
  for (const Transfer& copy : copies) {
    if (copy.to == nullptr) continue;
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      std::memset(copy.to, 0, copy.bytes);
  }
}
inline void init_barriers(Mbarrier* two) {
  for (int i = 0; i < 2; ++i) two[i] = {0, 0, 0, kInitialized};
}
inline void expect_bytes(Mbarrier* barrier, unsigned bytes) {
  const Unseen unseen;
  check_initialized(barrier);
  if (barrier->armed != 0) fail("a barrier is armed twice", *machine.current);
  barrier->missing += static_cast<int32_t>(bytes);
  barrier->armed = 1;
  complete_if_full(barrier);
}
template <class A>
void cluster_send(A* own, A value, unsigned rank, Mbarrier* own_barrier) {
  release_to(own_barrier);
  const Unseen unseen;
  Transfer transfer{in_block(own, rank), nullptr, sizeof value, {}, in_block(own_barrier, rank)};
  std::memcpy(&transfer.value, &value, sizeof value);
  // It arrives when the barrier completes, or (where threads run in a random order) at once.
  if (machine.configuration.seed != 0 && next_random() % 2 == 0)
    std::memcpy(transfer.to, &transfer.value, transfer.bytes);
  else
    machine.sent.push_back(transfer);
  Mbarrier* const barrier = in_block(own_barrier, rank);
  check_initialized(barrier);
  barrier->missing -= static_cast<int32_t>(sizeof value);
  complete_if_full(barrier);
}
inline void wait_for(Mbarrier* barrier, unsigned parity, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) {
  {
    const Unseen unseen;
    check_initialized(barrier);
    machine.current->barrier = barrier;
    machine.current->parity = parity;
  }
  wait(State::kAtMbarrier, file, line);
  acquire_from(barrier);
}
inline void wait_for_kernels_before() {}

}  // namespace device

}  // namespace cuda_on_cpu
