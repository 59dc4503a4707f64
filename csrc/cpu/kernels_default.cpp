// The CPU kernels for any CPU that the compiler targets by default (SSE2 on x86-64).
#include <cstdint>
#include <cstring>
#include <utility>

#define PPCR_CAPABILITY baseline
#define PPCR_SIMD_BYTES 16
#include "kernels_impl.h"

ppcr::Kernel ppcr::find_kernel_default(Operation operation, Pass pass, Dtype dtype) {
  return PPCR_CAPABILITY::find(operation, pass, dtype);
}
