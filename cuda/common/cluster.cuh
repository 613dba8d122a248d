/*
 * Thread block clusters (sm_90): CTAs that run together and write each other's shared memory. A
 * kernel says DSPARK_CLUSTER(size) among its attributes; below sm_90 it is a kernel without a body.
 */
#pragma once

#include <cstdint>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DSPARK_CLUSTER(size) __cluster_dims__(size, 1, 1)
#else
#define DSPARK_CLUSTER(size)
#endif

namespace dspark {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* What this CTA wrote, also to others, is seen behind their next wait. Whole warps. */
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}

/* Returns when every thread of the cluster has arrived or ended. Whole warps. */
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

/* Writes to what the CTA `cta` of the cluster has at this CTA's shared address. It must have begun. */
__device__ __forceinline__ void store_remote(uint32_t shared, uint32_t cta, uint32_t value) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared), "r"(cta));
  asm volatile("st.shared::cluster.u32 [%0], %1;\n" ::"r"(remote), "r"(value) : "memory");
}

/* Writes 16 bytes there, which count at the barrier (bulk_copy.cuh) that the other CTA has at the
 * shared address `barrier`; nothing else becomes visible with them. */
__device__ __forceinline__ void store_remote_counted(uint32_t shared,
                                                     uint32_t barrier,
                                                     uint32_t cta,
                                                     const uint4& words) {
  uint32_t remote;
  uint32_t remote_barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared), "r"(cta));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(remote_barrier)
               : "r"(barrier), "r"(cta));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];\n" ::"r"(remote),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(remote_barrier)
      : "memory");
}

#endif

}  // namespace dspark
