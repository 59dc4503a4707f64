// The CPU kernels for x86-64 CPUs with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#define PPCR_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prfchw"
#define PPCR_CAPABILITY avx512
#define PPCR_FIND_KERNEL find_kernel_avx512
#define PPCR_SIMD_BYTES 64
#include "kernels_impl.h"
#endif
