/*
 * Copies by the tensor memory accelerator (sm_90) and the shared memory barriers that count them.
 *
 * A barrier's phase ends when the arrivals it was made for and all bytes that were announced have
 * come. Waiting for parity 0 returns once the first phase is over, parity 1 the second, and so on;
 * waiting for parity 1 on a new barrier returns at once.
 */
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/async_copy.cuh"

namespace dspark {

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/* Makes new barriers known to the accelerator; a CTA barrier has to follow. */
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

/* Arrives, and announces `bytes` that copies will bring. */
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

/* Announces `bytes` that copies will bring, ahead of an arrival of the same thread in this phase. */
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/* As barrier_wait, where what is waited for comes from other CTAs of the cluster. */
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/* Hands registers of the calling group of four warps (warps 4 i .. 4 i + 3 of the CTA) back, or takes
 * such as others handed back; kCount is what each thread has after, a multiple of 8. */
template <int kCount>
__device__ __forceinline__ void release_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
#endif
}

/* A box of a five-dimensional tensor at these coordinates, innermost first; counts at `barrier`. */
__device__ __forceinline__ void copy_box(void* shared,
                                         const CUtensorMap* map,
                                         uint64_t* barrier,
                                         const int32_t (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "r"(at[4])
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

#endif

/* Some kThreads threads of the CTA, whole warps, by barrier `name` (1 .. 15). */
template <int kThreads>
__device__ __forceinline__ void sync_threads(int name) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(name), "n"(kThreads) : "memory");
}

}  // namespace dspark
