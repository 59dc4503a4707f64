// What differs between nvcc and the build that runs the kernels on a CPU (tests/cuda_on_cpu). Every other .cuh file is compiled
// unchanged by both, so this is the only device code that the tests cannot execute: keep it small.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define PPCR_DEVICE __device__ __forceinline__
#define PPCR_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define PPCR_UNROLLED _Pragma("unroll")
#define PPCR_ROLLED _Pragma("unroll 1")
#define PPCR_BY_FOUR _Pragma("unroll 4")

namespace ppcr::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

PPCR_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Not the .aligned form, which would demand that no thread of a warp comes late from a loop.
PPCR_DEVICE void cluster_sync() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
// The value at the same place in the shared memory of another block of the cluster.
PPCR_DEVICE unsigned cluster_address(const void* own, unsigned rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank));
  return address;
}
PPCR_DEVICE float cluster_load(const float* own, unsigned rank) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(cluster_address(own, rank)) : "memory");
  return value;
}
PPCR_DEVICE double cluster_load(const double* own, unsigned rank) {
  double value;
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(cluster_address(own, rank)) : "memory");
  return value;
}

#else  // before sm_90 the planner asks for clusters of one block, and these are never reached

PPCR_DEVICE unsigned cluster_rank() { return 0; }
PPCR_DEVICE void cluster_sync() { __syncthreads(); }
template <class A>
PPCR_DEVICE A cluster_load(const A* own, unsigned) {
  return *own;
}

#endif

// The same bits, opaque to the optimiser. Without it nvcc keeps the unpacked floats of 16-bit types alive from the first pass to
// the second instead of the packed words, and spills.
#define PPCR_OPAQUE(register) asm volatile("" : "+r"(register))
PPCR_DEVICE uint4 opaque(uint4 word) {
  PPCR_OPAQUE(word.x);
  PPCR_OPAQUE(word.y);
  PPCR_OPAQUE(word.z);
  PPCR_OPAQUE(word.w);
  return word;
}
PPCR_DEVICE uint2 opaque(uint2 word) {
  PPCR_OPAQUE(word.x);
  PPCR_OPAQUE(word.y);
  return word;
}
PPCR_DEVICE unsigned opaque(unsigned word) {
  PPCR_OPAQUE(word);
  return word;
}
PPCR_DEVICE unsigned short opaque(unsigned short word) {
  asm volatile("" : "+h"(word));
  return word;
}

// One predicated store instruction per word. Plain uint4 stores were split into four of 4 bytes, and __stwb makes a STRONG.SM
// store. With a branch around each store, ptxas moved the load that feeds it into the branch, so that only one load was in flight.
PPCR_DEVICE void store_word_if(bool wanted, uint4* to, uint4 word) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %5, 0; @p st.global.v4.b32 [%0], {%1,%2,%3,%4}; }" ::"l"(__cvta_generic_to_global(to)),
      "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "r"(int(wanted))
      : "memory");
}
PPCR_DEVICE void store_word_if(bool wanted, uint2* to, uint2 word) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %3, 0; @p st.global.v2.b32 [%0], {%1,%2}; }" ::"l"(__cvta_generic_to_global(to)),
               "r"(word.x), "r"(word.y), "r"(int(wanted))
               : "memory");
}
PPCR_DEVICE void store_word_if(bool wanted, unsigned* to, unsigned word) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b32 [%0], %1; }" ::"l"(__cvta_generic_to_global(to)), "r"(word),
               "r"(int(wanted))
               : "memory");
}
PPCR_DEVICE void store_word_if(bool wanted, unsigned short* to, unsigned short word) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b16 [%0], %1; }" ::"l"(__cvta_generic_to_global(to)), "h"(word),
               "r"(int(wanted))
               : "memory");
}

PPCR_DEVICE float widen(Half value) { return __half2float(value); }
PPCR_DEVICE float widen(BFloat16 value) { return __bfloat162float(value); }
PPCR_DEVICE void narrow(float value, Half& result) { result = __float2half_rn(value); }
PPCR_DEVICE void narrow(float value, BFloat16& result) { result = __float2bfloat16_rn(value); }

}  // namespace ppcr::cuda

#else  // a CPU: the including file has brought cuda_on_cpu.h, which supplies cluster_rank, cluster_sync, cluster_load

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define PPCR_DEVICE inline
#define PPCR_SHARED(name) unsigned char* name = reinterpret_cast<unsigned char*>(cuda_on_cpu::shared_memory())
#define PPCR_UNROLLED
#define PPCR_ROLLED
#define PPCR_BY_FOUR

namespace ppcr::cuda {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;
using cuda_on_cpu::cluster_load;
using cuda_on_cpu::cluster_rank;
using cuda_on_cpu::cluster_sync;

template <class Word>
Word opaque(Word word) {
  return word;
}
template <class Word>
void store_word_if(bool wanted, Word* to, Word word) {
  if (wanted) *to = word;
}
inline float widen(Half value) { return static_cast<float>(value); }
inline float widen(BFloat16 value) { return static_cast<float>(value); }
inline void narrow(float value, Half& result) { result = Half(value); }
inline void narrow(float value, BFloat16& result) { result = BFloat16(value); }

}  // namespace ppcr::cuda

#endif

namespace ppcr::cuda {

PPCR_DEVICE float widen(float value) { return value; }
PPCR_DEVICE double widen(double value) { return value; }
PPCR_DEVICE void narrow(float value, float& result) { result = value; }
PPCR_DEVICE void narrow(double value, double& result) { result = value; }

}  // namespace ppcr::cuda
