/*
 * How CTAs of one launch wait for each other: counters in global memory that start at zero.
 *
 * arrive() makes all that the calling CTA wrote before it visible to whoever sees the count; only
 * one thread of the CTA calls it, after a __syncthreads(). A CTA may wait for others only in a
 * cooperative launch, which keeps all of them resident.
 */
#pragma once

#include <cstdint>

namespace dspark {

/* Adds one to the counter and returns what it was. */
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  __threadfence();
  const uint32_t before = atomicAdd(counter, 1u);
  __threadfence();
  return before;
}

/* The same for who does not want to know, without a wait for the answer. */
__device__ __forceinline__ void signal_arrival(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(__cvta_generic_to_global(counter))
               : "memory");
}

/* One word that is a message by itself: nothing else becomes visible with it. */
__device__ __forceinline__ void store_relaxed(unsigned long long* to, unsigned long long word) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;\n" ::"l"(__cvta_generic_to_global(to)),
               "l"(word)
               : "memory");
}
__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* from) {
  unsigned long long word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];\n"
               : "=l"(word)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return word;
}

/* Returns once `count` CTAs have arrived. */
__device__ __forceinline__ void wait_for_arrivals(const uint32_t* counter, uint32_t count) {
  uint32_t arrived;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n"
                 : "=r"(arrived)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
  } while (arrived < count);
}

}  // namespace dspark
