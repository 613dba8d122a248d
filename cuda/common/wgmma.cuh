/*
 * Products of a group of four warps (sm_90a): wgmma.m64n64k16 with 16-bit inputs in shared memory
 * and f32 accumulation.
 *
 * Operands are rows of up to 64 columns (128 bytes) in *slabs*, A of 64 rows (M), B of 64 rows (N):
 * 16-byte piece p of row r lies at slab_offset(r, p), the permutation of 128 bytes that the
 * instruction undoes. Slabs start at multiples of 1024 bytes. Warp w of the group gets rows 16 w ..
 * 16 w + 15 of A, as C fragments (mma.cuh): with g = lane / 4, c = lane % 4 element 4 j + 2 h + e is
 * row 16 w + g + 8 h of A with row 8 j + 2 c + e of B.
 *
 * One step adds 16 products to the accumulator as mma.m16n8k16 does, bit for bit on sm_90 (shown by
 * tests/cuda_full.rs: requests draft the same in either).
 */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dspark {

constexpr int kSlabRows = 64;
constexpr int kSlabColumns = 64;
constexpr int kSlabBytes = kSlabRows * kSlabColumns * 2;

__host__ __device__ constexpr uint32_t slab_offset(uint32_t row, uint32_t piece) {
  return row * 128 + ((piece ^ row) & 7u) * 16;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* What the instruction wants to know of the operand at a shared address: 8 rows are 1024 bytes. The
 * compiler has to see that the address is the same for all lanes, or it moves words for each. */
__device__ __forceinline__ uint64_t slab_descriptor(uint32_t shared) {
  constexpr uint64_t kPermuted128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 / 16} << 32;
  return static_cast<uint64_t>(shared >> 4) | kEightRows | kPermuted128; /* below 2^18 */
}

/* Before the first product of a batch, after the last, and until all are done. */
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void wgmma_end() {
  asm volatile(
      "wgmma.commit_group.sync.aligned;\n"
      "wgmma.wait_group.sync.aligned 0;\n" ::
          : "memory");
}

/* What plain stores and cp.async wrote to shared memory becomes visible to products. */
__device__ __forceinline__ void fence_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

#define DSPARK_WGMMA_M64N64K16(T, type)                                                           \
  template <>                                                                                     \
  __device__ __forceinline__ void wgmma_m64n64k16<T>(float (&d)[32], uint64_t a, uint64_t b,      \
                                                     bool accumulate) {                           \
    asm volatile(                                                                                 \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                              \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                               \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, "   \
        "0, 0;\n}\n"                                                                              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),     \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),           \
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),           \
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])            \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                     \
  }

/* d (+)= A . B^T over 16 columns. */
template <typename T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32],
                                                uint64_t a,
                                                uint64_t b,
                                                bool accumulate);
DSPARK_WGMMA_M64N64K16(__nv_bfloat16, "bf16")
DSPARK_WGMMA_M64N64K16(__half, "f16")
#undef DSPARK_WGMMA_M64N64K16

#endif

}  // namespace dspark
