// What the processor is and can, and what the environment asks of it.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"

namespace ppcr {
namespace {

enum { kDefault, kAvx2, kAvx512 };
constexpr const char* kCapabilities[] = {"default", "avx2", "avx512"};
constexpr const char* kMethods[] = {"grouped", "sequential"};

int best_capability() {
#if defined(__x86_64__)
  // Clang has no word for F16C in __builtin_cpu_supports before version 18.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
  if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? kAvx512
               : kAvx2;
#endif
  return kDefault;
}

struct Settings {
  int capability = best_capability();
  Processor processor{};
  std::string wrong;

  Settings() {
#if defined(__x86_64__)
    processor.amd = __builtin_cpu_is("amd");
#endif
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    if (const long l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE); l1 > 0) processor.l1_bytes = l1;
#endif
    processor.cores = sysconf(_SC_NPROCESSORS_CONF);
    read("PPCR_CPU_CAPABILITY", kCapabilities, capability + 1, capability);
    int method = 0;
    processor.forced = read("PPCR_CPU_METHOD", kMethods, 2, method);
    processor.method = static_cast<Method>(method);
  }
  // Whether a variable of the environment names one of `names`; keeps its index.
  bool read(const char* variable, const char* const* names, int count, int& index) {
    const char* const value = std::getenv(variable);
    if (value == nullptr || *value == 0) return false;
    std::string known;
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(value, names[i]) == 0) return index = i, true;
      known += (i ? ", " : "") + std::string(names[i]);
    }
    if (!wrong.empty()) wrong += "; ";
    wrong += std::string(variable) + ": '" + value + "' is not one of " + known + " on this CPU";
    return false;
  }
};

const Settings& settings() {
  static const Settings value;
  return value;
}

}  // namespace

const char* wrong_settings() {
  return settings().wrong.empty() ? nullptr : settings().wrong.c_str();
}
const char* cpu_capability() { return kCapabilities[settings().capability]; }
const Processor& processor() { return settings().processor; }

Kernel find_kernel(const Problem& p, Operation operation, Pass pass, Dtype dtype) {
#if defined(__x86_64__)
  const int capability = settings().capability;
  if (capability == kAvx512 && !p.narrow) return find_kernel_avx512(operation, pass, dtype);
  if (capability != kDefault) return find_kernel_avx2(operation, pass, dtype);
#endif
  (void)p;
  return find_kernel_default(operation, pass, dtype);
}

}  // namespace ppcr
