// The CPU kernels for any CPU that the compiler targets by default (SSE2 on x86-64).
#define PPCR_CAPABILITY baseline
#define PPCR_FIND_KERNEL find_kernel_default
#define PPCR_SIMD_BYTES 16
#include "kernels_impl.h"
