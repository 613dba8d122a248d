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

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/* What this CTA wrote, also to others, is seen behind their next wait. Whole warps. */
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}

/* The same, but that it promises nothing of what was written. */
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}

/* Returns when every thread of the cluster has arrived or ended. Whole warps. */
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

/* What the CTA `cta` of the cluster has at this CTA's shared address. */
__device__ __forceinline__ uint32_t remote_address(uint32_t shared, uint32_t cta) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared), "r"(cta));
  return remote;
}

/* Writes to what the CTA `cta` of the cluster has at this CTA's shared address. It must have begun. */
__device__ __forceinline__ void store_remote(uint32_t shared, uint32_t cta, uint32_t value) {
  const uint32_t remote = remote_address(shared, cta);
  asm volatile("st.shared::cluster.u32 [%0], %1;\n" ::"r"(remote), "r"(value) : "memory");
}

/* Writes to a remote address; the bytes count at the barrier at another one, of the same CTA. */
__device__ __forceinline__ void store_remote(uint32_t remote, float4 value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];\n" ::"r"(remote),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_remote(uint32_t remote, float2 value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::
          "r"(remote),
      "f"(value.x), "f"(value.y), "r"(barrier)
      : "memory");
}

/* Four words that the CTA `cta` of the cluster has at this CTA's shared address, a multiple of 16. */
__device__ __forceinline__ uint4 load_remote(uint32_t shared, uint32_t cta) {
  const uint32_t remote = remote_address(shared, cta);
  uint4 words;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(remote)
               : "memory");
  return words;
}

/* Writes 16 bytes to what the CTA `cta` has at the shared address `shared`, which count at the
 * barrier (bulk_copy.cuh) that it has at `barrier`; nothing else becomes visible with them. */
__device__ __forceinline__ void store_remote_counted(uint32_t shared,
                                                     uint32_t barrier,
                                                     uint32_t cta,
                                                     const uint4& words) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];\n" ::"r"(remote_address(shared, cta)),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(remote_address(barrier, cta))
      : "memory");
}

#endif

}  // namespace dspark
