/*
 * Tensor core products of a warp (sm_80): mma.m16n8k16 with 16-bit inputs and f32 accumulation, and
 * the ldmatrix loads that feed it.
 *
 * Fragments, with g = lane / 4 and c = lane % 4; a 32-bit word holds two neighbours, low half first:
 *   A 16x16  a0 (g, 2c)   a1 (g + 8, 2c)   a2 (g, 2c + 8)   a3 (g + 8, 2c + 8)      (row, k)
 *   B 16x8   b0 (2c, g)   b1 (2c + 8, g)                                            (k, column)
 *   C 16x8   c0 c1 (g, 2c) (g, 2c + 1)     c2 c3 (g + 8, 2c) (g + 8, 2c + 1)        (row, column)
 * So C of two neighbouring column tiles, rounded and packed, is A of a k = 16 step:
 *   a0 = (c0, c1) a1 = (c2, c3) of the first tile, a2 a3 of the second.
 */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dspark {

/* c += a * b */
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4],
                                             const uint32_t (&a)[4],
                                             uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4],
                                                            const uint32_t (&a)[4],
                                                            uint32_t b0,
                                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4],
                                                     const uint32_t (&a)[4],
                                                     uint32_t b0,
                                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The two e4m3 values in the low half of a word as f16, which holds them exactly: in units of
 * e4m3_unit(). */
__device__ __forceinline__ uint32_t halves_of_e4m3(uint32_t word) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "}\n"
      : "=r"(halves)
      : "r"(word));
  return halves;
#else
  /* The bits of an e4m3 number, shifted into place, are the f16 number 2^-8 times as large. */
  const uint32_t spread = __byte_perm(word, 0, 0x1404);
  return (spread & 0x80008000u) | (spread >> 1 & 0x3f803f80u);
#endif
}

__device__ __forceinline__ float e4m3_unit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return 1.0f;
#else
  return 256.0f;
#endif
}

/* Four 8x8 matrices of 16-bit elements. Lane l gives the shared address of row l % 8 of matrix
 * l / 8 and gets, of every matrix i, elements (g, 2c) and (g, 2c + 1) in words[i]. */
__device__ __forceinline__ void load_matrix_x4(uint32_t (&words)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

/* The same, transposed: every lane gets elements (2c, g) and (2c + 1, g). */
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&words)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

}  // namespace dspark
