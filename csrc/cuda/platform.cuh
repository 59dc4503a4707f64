// What differs between nvcc and the build that runs the kernels on a CPU (tests/cuda_on_cpu). All
// other device code is compiled unchanged by both, so this is all of it that the tests cannot
// execute: keep it small.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define PPCR_DEVICE __device__ __forceinline__
#define PPCR_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define PPCR_ROLLED _Pragma("unroll 1")
#define PPCR_BY_FOUR _Pragma("unroll 4")
#define PPCR_BY_TWO _Pragma("unroll 2")

namespace ppcr::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

PPCR_DEVICE unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes to shared memory, or zeros where they are not wanted; they are there after
// wait_for_copies().
PPCR_DEVICE void copy_async(uint4* to, const void* from, bool wanted) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(wanted ? 16 : 0)
               : "memory");
#else
  uint4 word = {};
  if (wanted) word = *static_cast<const uint4*>(from);
  *to = word;
#endif
}
// Copies since the last call are a group; at most so many of the last groups are under way after a
// wait.
PPCR_DEVICE void close_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LATER>
PPCR_DEVICE void wait_for_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
#endif
}

// A barrier in shared memory that completes when as many bytes have come as are expected, and
// begins anew.
struct Mbarrier {
  uint64_t word;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

PPCR_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// A barrier of the cluster in two halves. It orders no memory but what init_barriers() has written.
PPCR_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
PPCR_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// One thread of the block calls this, and then arrives at the cluster's barrier.
PPCR_DEVICE void init_barriers(Mbarrier* two) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nmbarrier.init.shared::cta.b64 [%0+8], "
      "1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(two))
      : "memory");
}
PPCR_DEVICE void expect_bytes(Mbarrier* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits for the end of the phase with this parity: what was sent in it can be read then.
PPCR_DEVICE void wait_for(Mbarrier* barrier, unsigned parity) {
  unsigned done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}
// The address of the same place in the shared memory of another block of the cluster.
PPCR_DEVICE unsigned cluster_address(const void* own, unsigned rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(own)), "r"(rank));
  return address;
}
// Stores a word at the same place of another block, or of this one, and counts its bytes at that
// block's barrier.
PPCR_DEVICE void cluster_send(uint4* own, uint4 word, unsigned rank, Mbarrier* barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, "
      "[%5];" ::"r"(cluster_address(own, rank)),
      "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "r"(cluster_address(barrier, rank))
      : "memory");
}
PPCR_DEVICE void cluster_send(float* own, float value, unsigned rank, Mbarrier* barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
          cluster_address(own, rank)),
      "r"(__float_as_uint(value)), "r"(cluster_address(barrier, rank))
      : "memory");
}
PPCR_DEVICE void cluster_send(double* own, double value, unsigned rank, Mbarrier* barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(
          cluster_address(own, rank)),
      "l"(__double_as_longlong(value)), "r"(cluster_address(barrier, rank))
      : "memory");
}
// What the kernels before this one in the stream have written can be read from here on, also where
// this one was let in early. Not with __ldg: it promises memory that nobody writes while this
// kernel runs, and ptxas moves such loads before the wait.
PPCR_DEVICE void wait_for_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#else  // before sm_90 the planner asks for clusters of one block, and these are never reached

PPCR_DEVICE unsigned cluster_rank() { return 0; }
PPCR_DEVICE void cluster_arrive() {}
PPCR_DEVICE void cluster_wait() {}
PPCR_DEVICE void init_barriers(Mbarrier*) {}
PPCR_DEVICE void expect_bytes(Mbarrier*, unsigned) {}
PPCR_DEVICE void wait_for(Mbarrier*, unsigned) {}
template <class A>
PPCR_DEVICE void cluster_send(A*, A, unsigned, Mbarrier*) {}
PPCR_DEVICE void wait_for_kernels_before() {}

#endif

// The same bits, opaque to the optimiser. Without it nvcc keeps the unpacked floats of 16-bit types
// alive from the first pass to the second instead of the packed words, and spills.
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
PPCR_DEVICE int64_t opaque(int64_t number) {
  asm volatile("" : "+l"(number));
  return number;
}

// One predicated store instruction per word. Plain uint4 stores were split into four of 4 bytes,
// and __stwb makes a STRONG.SM store. With a branch around each store, ptxas moved the load that
// feeds it into the branch, so that only one load was in flight.
PPCR_DEVICE void store_word_if(bool wanted, uint4* to, uint4 word) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %5, 0; @p st.global.v4.b32 [%0], {%1,%2,%3,%4}; }" ::"l"(
          __cvta_generic_to_global(to)),
      "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "r"(int(wanted))
      : "memory");
}
PPCR_DEVICE void store_word_if(bool wanted, uint2* to, uint2 word) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %3, 0; @p st.global.v2.b32 [%0], {%1,%2}; }" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(word.x), "r"(word.y), "r"(int(wanted))
               : "memory");
}
PPCR_DEVICE void store_word_if(bool wanted, unsigned* to, unsigned word) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b32 [%0], %1; }" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(word), "r"(int(wanted))
               : "memory");
}
PPCR_DEVICE void store_word_if(bool wanted, unsigned short* to, unsigned short word) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b16 [%0], %1; }" ::"l"(
                   __cvta_generic_to_global(to)),
               "h"(word), "r"(int(wanted))
               : "memory");
}

// The same for a load of 16 bytes to the registers of a word that is used much later. A plain load
// under a condition nvcc moves to other registers, for which it waits at once.
PPCR_DEVICE void reload_word_if(bool wanted, const uint4* from, uint4& word) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %5, 0; @!p mov.b32 %0, 0; @!p mov.b32 %1, 0; @!p mov.b32 %2, "
      "0; @!p mov.b32 %3, 0; @p ld.global.v4.b32 {%0,%1,%2,%3}, [%4]; }"
      : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w)
      : "l"(__cvta_generic_to_global(from)), "r"(int(wanted)));
}
template <class Word>
PPCR_DEVICE void reload_word_if(bool wanted, const Word* from, Word& word) {
  word = wanted ? __ldca(from) : Word{};
}

// One instruction: nvcc splits a plain store of four floats.
PPCR_DEVICE void store_shared(uint4* to, uint4 word) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(to)), "r"(word.x),
               "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}

}  // namespace ppcr::cuda

#else  // a CPU: the including file has brought cuda_on_cpu.h, which supplies clusters and copies

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define PPCR_DEVICE inline
#define PPCR_SHARED(name) \
  unsigned char* name = reinterpret_cast<unsigned char*>(cuda_on_cpu::shared_memory())
#define PPCR_ROLLED
#define PPCR_BY_FOUR
#define PPCR_BY_TWO

namespace ppcr::cuda {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;
using namespace cuda_on_cpu::device;

template <class Word>
Word opaque(Word word) {
  return word;
}
template <class Word>
void store_word_if(bool wanted, Word* to, Word word) {
  if (wanted) *to = word;
}
template <class Word>
void reload_word_if(bool wanted, const Word* from, Word& word) {
  word = wanted ? __ldca(from) : Word{};
}
inline void store_shared(uint4* to, uint4 word) { *to = word; }

}  // namespace ppcr::cuda

#endif
