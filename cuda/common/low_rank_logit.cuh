/*
 * The draft head's logit of one token, bit for bit the same wherever it is computed:
 *
 *   dot(v)  = W2[v] . latent        mma.m16n8k16 over k in steps of 16 from 0, f32 accumulation
 *                                   (or wgmma with k = 16, which adds a step alike: wgmma.cuh)
 *   l(v)    = U(v) + dot(v)         16-bit W2: one f32 addition
 *   l(v)    = U(v) + dot(v) * scale[v]         fp8 W2 (e4m3), a scale for each row: two roundings
 *
 * The head sweeps tiles of W2 and keeps no logits; acceptance comes back for single tokens and must
 * find the numbers that the draft was drawn from. An element of a product depends on its own row and
 * column alone, so it matters only that columns of W2 enter the same step at the same place. Word i
 * of a fragment (mma.cuh; g = lane / 4, c = lane % 4) holds, of step s,
 *
 *   16-bit   columns 16 s + 2c, + 1 (a0, a1, b0) and 16 s + 2c + 8, + 9 (a2, a3, b1)
 *   e4m3     columns 16 s + 4c, + 1 (a0, a1, b0) and 16 s + 4c + 2, + 3 (a2, a3, b1)
 *
 * so that ldmatrix on rows of bytes gives a lane what it needs. e4m3 becomes f16, which is exact;
 * the latent then is f16 too. Ranks are multiples of 16; rows start at multiples of 16 bytes.
 */
#pragma once

#include <cuda_fp8.h>

#include "common/mma.cuh"
#include "common/vec.cuh"

namespace dspark {

constexpr int kLowRankStep = 16; /* columns of a product */

/* How W2 of storage type W enters the product: as Latent, the 16-bit type of the latent. */
template <typename W>
struct LowRank {
  using Latent = W;
  static constexpr bool kScaled = false;

  /* Column of the lane's first pair within a step, and from there to its second pair. */
  static __device__ __forceinline__ int first_column(int lane) { return lane % 4 * 2; }
  static constexpr int kSecondPair = 8;

  /* The two words of a row at one step: the lane's first and second pair. */
  static __device__ __forceinline__ uint2 weight_words(const W* row, int step, int lane) {
    const W* pair = row + step * kLowRankStep + first_column(lane);
    return make_uint2(*reinterpret_cast<const uint32_t*>(pair),
                      *reinterpret_cast<const uint32_t*>(pair + kSecondPair));
  }
};

template <>
struct LowRank<__nv_fp8_e4m3> {
  using Latent = __half;
  static constexpr bool kScaled = true;

  static __device__ __forceinline__ int first_column(int lane) { return lane % 4 * 4; }
  static constexpr int kSecondPair = 2;

  /* Four neighbouring numbers as two words of f16; exact. */
  static __device__ __forceinline__ uint2 widen(uint32_t bytes) {
    const __half2_raw low =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bytes), __NV_E4M3);
    const __half2_raw high =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bytes >> 16), __NV_E4M3);
    return make_uint2(static_cast<uint32_t>(low.y) << 16 | low.x,
                      static_cast<uint32_t>(high.y) << 16 | high.x);
  }

  static __device__ __forceinline__ uint2 weight_words(const __nv_fp8_e4m3* row,
                                                       int step,
                                                       int lane) {
    return widen(
        *reinterpret_cast<const uint32_t*>(row + step * kLowRankStep + first_column(lane)));
  }
};

/* The words b0 and b1 of a latent row at one step. */
template <typename W>
__device__ __forceinline__ uint2 latent_words(const typename LowRank<W>::Latent* row,
                                              int step,
                                              int lane) {
  const auto* pair = row + step * kLowRankStep + LowRank<W>::first_column(lane);
  return make_uint2(*reinterpret_cast<const uint32_t*>(pair),
                    *reinterpret_cast<const uint32_t*>(pair + LowRank<W>::kSecondPair));
}

/* What is added to U(v); `scale` is read with fp8 only. */
template <typename W>
__device__ __forceinline__ float low_rank_bias(float dot, float scale) {
  return LowRank<W>::kScaled ? __fmul_rn(dot, scale) : dot;
}

/* l(v) of U(v) and the dot. */
template <typename W>
__device__ __forceinline__ float low_rank_logit(float base, float dot, float scale) {
  return __fadd_rn(base, low_rank_bias<W>(dot, scale));
}

/* Dots of 16 rows of W2 with 8 latents, by a warp: lane (g, c) brings rows g and g + 8 and latent g
 * and gets, as a C fragment, rows g, g + 8 with latents 2c, 2c + 1. nullptr counts as zeros. Rows
 * may be in global or in shared memory. */
template <typename W>
__device__ __forceinline__ void low_rank_dots(const W* row,
                                              const W* row_8,
                                              const typename LowRank<W>::Latent* latent,
                                              int rank,
                                              float (&dots)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) dots[i] = 0.f;
#pragma unroll 4
  for (int step = 0; step < rank / kLowRankStep; ++step) {
    const uint2 zeros = make_uint2(0u, 0u);
    const uint2 low = row == nullptr ? zeros : LowRank<W>::weight_words(row, step, lane);
    const uint2 high = row_8 == nullptr ? zeros : LowRank<W>::weight_words(row_8, step, lane);
    const uint2 b = latent == nullptr ? zeros : latent_words<W>(latent, step, lane);
    const uint32_t a[4] = {low.x, high.x, low.y, high.y};
    mma_m16n8k16<typename LowRank<W>::Latent>(dots, a, b.x, b.y);
  }
}

/* Dots of up to 8 pairs of a W2 row and a latent, by a warp: all four lanes 4 i .. 4 i + 3 bring
 * pair i (nullptr: none) and get its dot. */
template <typename W>
__device__ __forceinline__ float low_rank_pair_dot(const W* row,
                                                   const typename LowRank<W>::Latent* latent,
                                                   int rank) {
  float dots[4];
  low_rank_dots<W>(row, static_cast<const W*>(nullptr), latent, rank, dots);
  const int pair = threadIdx.x % 32 / 4; /* its dot: row `pair`, latent `pair` */
  const float even = __shfl_sync(0xffffffffu, dots[0], pair * 4 + pair / 2);
  const float odd = __shfl_sync(0xffffffffu, dots[1], pair * 4 + pair / 2);
  return pair % 2 == 0 ? even : odd;
}

}  // namespace dspark
