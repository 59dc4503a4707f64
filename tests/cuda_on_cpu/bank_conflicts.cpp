// Counts the bank conflicts of shared memory while kernels run on the CPU.
//
// The kernels are compiled with -fsanitize=thread, which calls a function at every access to
// memory; here these functions record the accesses of block 0 to its shared memory, instead of
// ThreadSanitizer's own. The k-th time that the lanes of a warp come to one place in the machine
// code counts as one instruction of the warp.
//
// The model: 32 banks, each one word of 4 bytes wide. A warp's access of up to 4 bytes a lane is
// one pass, of 8 bytes two (half a warp each), of 16 bytes four. A pass takes as many cycles as
// the most different words that it wants of one bank. What it does not see: stores to other blocks
// of a cluster, asynchronous copies (a thread's slots lie side by side, so they have no conflicts),
// and accesses that nvcc makes wider or narrower than the source says.
#include <dlfcn.h>

#include <array>
#include <map>
#include <set>
#include <unordered_map>

#include "cuda_on_cpu.h"

namespace {

constexpr int kBanks = 32, kBankBytes = 4;

struct Instruction {
  uint8_t bytes = 0;
  std::array<int32_t, cuda_on_cpu::kWarpSize> offset;  // in shared memory; -1: no access
};
struct Cost {
  uint64_t instructions = 0, cycles = 0, lower_bound = 0;
};

bool recording = false;
bool busy = false;  // templates of the standard library that this file shares are instrumented, too
std::unordered_map<uint64_t, unsigned> visits;                // by place and thread
std::map<std::array<uint64_t, 3>, Instruction> instructions;  // by place, warp and visit

void record(const void* address, size_t bytes, void* place) {
  using cuda_on_cpu::machine;
  if (!recording || busy) return;
  busy = true;
  struct Free {
    ~Free() { busy = false; }
  } free;
  if (machine.current == nullptr || machine.first_block + machine.current->rank != 0) return;
  const int64_t offset = static_cast<const char*>(address) - machine.shared[0];
  if (offset < 0 || offset >= static_cast<int64_t>(machine.configuration.shared_bytes)) return;
  const unsigned thread = machine.current->thread;
  const auto where = reinterpret_cast<uint64_t>(place);
  const unsigned visit = visits[where << 10 | thread]++;
  Instruction& instruction = instructions[{where, thread / cuda_on_cpu::kWarpSize, visit}];
  if (instruction.bytes == 0) instruction.offset.fill(-1);
  instruction.bytes = static_cast<uint8_t>(bytes);
  instruction.offset[thread % cuda_on_cpu::kWarpSize] = static_cast<int32_t>(offset);
}

void add(const Instruction& instruction, Cost& cost) {
  const int passes = std::max(1, instruction.bytes / kBankBytes);
  const int lanes = cuda_on_cpu::kWarpSize / passes;
  ++cost.instructions;
  for (int pass = 0; pass < passes; ++pass) {
    std::array<std::set<int>, kBanks> words;
    for (int lane = pass * lanes; lane < (pass + 1) * lanes; ++lane) {
      const int first = instruction.offset[size_t(lane)];
      for (int byte = 0; first >= 0 && byte < instruction.bytes; byte += kBankBytes) {
        const int word = (first + byte) / kBankBytes;
        words[size_t(word % kBanks)].insert(word);
      }
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    cost.cycles += most;
    cost.lower_bound += most > 0;
  }
}

}  // namespace

#define PUBLIC extern "C" __attribute__((visibility("default")))

PUBLIC void bank_conflicts_begin() {
  visits.clear();
  instructions.clear();
  recording = true;
}

// One line for every place: offset in this library, instructions, cycles, and their lower bound.
PUBLIC const char* bank_conflicts_end() {
  static std::string text;
  recording = false;
  std::map<uint64_t, Cost> costs;
  for (const auto& [key, instruction] : instructions) add(instruction, costs[key[0]]);
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&bank_conflicts_begin), &info);
  text.clear();
  for (const auto& [place, cost] : costs)
    text += std::to_string(place - reinterpret_cast<uint64_t>(info.dli_fbase)) + " " +
            std::to_string(cost.instructions) + " " + std::to_string(cost.cycles) + " " +
            std::to_string(cost.lower_bound) + "\n";
  return text.c_str();
}

#define PLACE __builtin_return_address(0)
#define ACCESS(BYTES)                                                            \
  PUBLIC void __tsan_read##BYTES(void* p) { record(p, BYTES, PLACE); }           \
  PUBLIC void __tsan_write##BYTES(void* p) { record(p, BYTES, PLACE); }          \
  PUBLIC void __tsan_unaligned_read##BYTES(void* p) { record(p, BYTES, PLACE); } \
  PUBLIC void __tsan_unaligned_write##BYTES(void* p) { record(p, BYTES, PLACE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
PUBLIC void __tsan_read_range(void* p, size_t bytes) { record(p, bytes, PLACE); }
PUBLIC void __tsan_write_range(void* p, size_t bytes) { record(p, bytes, PLACE); }
PUBLIC void __tsan_vptr_update(void**, void*) {}
PUBLIC void __tsan_vptr_read(void**) {}
PUBLIC void __tsan_func_entry(void*) {}
PUBLIC void __tsan_func_exit() {}
PUBLIC void __tsan_init() {}
