/*
 * Buffers in shared memory that a warp fills behind the computation (cp.async, sm_80), counted by
 * a barrier there (mbarrier).
 *
 * Fill n of a buffer completes phase n of its barrier; a reader waits for the parity of the fill that
 * it needs. To fill, a warp calls begin_fill(), copies, and calls end_fill(), all lanes. Who refills
 * a buffer must know that its readers have used what they loaded.
 *
 * Dropped: one bulk copy (TMA) for each row. With rows of 512 bytes it was no faster, with 256 bytes
 * slower (the draft head with one request and fp8 W2: 217 us against 183).
 */
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/reduce.cuh"

namespace dspark {

/* The fills of one buffer; in shared memory. */
struct Fill {
  uint64_t barrier;
  int32_t begun; /* fills so far */
  int32_t done;  /* readers that have used the last one: for the caller */
};

/* One thread, before any use; a barrier of the CTA follows. */
__device__ __forceinline__ void fill_init(Fill* fill) {
  fill->begun = fill->done = 0;
  asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(&fill->barrier)),
               "r"(kWarpSize)
               : "memory");
}

__device__ __forceinline__ bool barrier_passed(uint64_t* barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\n"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
      "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(passed)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return passed != 0;
}

/* Returns when the fill with this number (from 0) has arrived. A parity tells a phase from its
 * neighbours alone: a reader that comes before the fill has begun waits for that first. */
__device__ __forceinline__ void wait_for_fill(Fill* fill, int32_t number) {
  while (*static_cast<const volatile int32_t*>(&fill->begun) <= number) {
  }
  while (!barrier_passed(&fill->barrier, number & 1)) {
  }
}

__device__ __forceinline__ void begin_fill(Fill* fill, int32_t number) {
  if (threadIdx.x % kWarpSize == 0) *static_cast<volatile int32_t*>(&fill->begun) = number + 1;
}

__device__ __forceinline__ void end_fill(Fill* fill) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared.b64 [%0];\n" ::"r"(shared_address(&fill->barrier))
      : "memory");
}

}  // namespace dspark
