// The CPU kernels for x86-64 CPUs with AVX-512 F, BW, DQ and VL.
#include <cstring>
#include <utility>

#include "../ppcr_types.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the system's headers, so that nothing of theirs is compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prfchw"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prfchw,prefer-vector-width=512")
#endif

#define PPCR_CAPABILITY avx512
#define PPCR_FIND_KERNEL find_kernel_avx512
#define PPCR_SIMD_BYTES 64
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
