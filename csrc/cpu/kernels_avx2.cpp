// The CPU kernels for x86-64 CPUs with AVX2, FMA and F16C.
#if defined(__x86_64__)
#define PPCR_TARGET "avx2,fma,f16c,bmi,bmi2,prfchw"
#define PPCR_CAPABILITY avx2
#define PPCR_FIND_KERNEL find_kernel_avx2
#define PPCR_SIMD_BYTES 32
#include "kernels_impl.h"
#endif
