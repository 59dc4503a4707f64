// The CPU kernels for x86-64 CPUs with AVX2, FMA and F16C.
#include <cstring>
#include <utility>

#include "../ppcr_types.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the system's headers, so that nothing of theirs is compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,prfchw"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,prfchw")
#endif

#define PPCR_CAPABILITY avx2
#define PPCR_FIND_KERNEL find_kernel_avx2
#define PPCR_SIMD_BYTES 32
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
