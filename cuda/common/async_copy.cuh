/*
 * cp.async (sm_80): 16-byte and 4-byte copies from global to shared memory that run behind the computation.
 *
 * Copies belong to the group closed by the issuing thread's next commit. wait<N> returns when at
 * most N of this thread's latest groups are still in flight; other threads see the data only after
 * a barrier that follows the wait.
 */
#pragma once

#include <cstdint>

namespace dspark {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* Writes 16 bytes, the first source_bytes (0 .. 16) from `source`, past L1, the others zero; nothing
 * behind them is read. */
__device__ __forceinline__ void copy_async_up_to_16(uint32_t shared,
                                                    const void* source,
                                                    int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(__cvta_generic_to_global(source)), "r"(source_bytes)
               : "memory");
}

/* Copies 16 bytes past L1, or writes 16 zero bytes without reading `source` when !valid. */
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* source, bool valid) {
  copy_async_up_to_16(shared, source, valid ? 16 : 0);
}

/* Copies 4 bytes. */
__device__ __forceinline__ void copy_async_4(uint32_t shared, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared),
               "l"(__cvta_generic_to_global(source))
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

template <int kPendingGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPendingGroups) : "memory");
}

}  // namespace dspark
