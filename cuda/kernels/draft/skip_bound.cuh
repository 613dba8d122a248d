/*
 * How large the bias of a token can be, without its row of W2.
 *
 *   w . x  =  sum_i (w . e_i)(e_i . x)  +  w' . x'      e_i: a few orthonormal directions, w' and x'
 *          <= sum_i a_i y_i + |w'| |x'|                 what is left of row and latent without them
 *
 * a_i = w . e_i and |w'| are four numbers a token, made once when the weights are loaded; y_i and |x'|
 * are made once for a latent. Without directions this is |w| |x|, which says little of real heads:
 * their rows have much in common (the demo drafter's |w| is 2.4, without the mean of all rows
 * 1.4), and what all tokens get decides nothing. Of the demo pair's rounds 34 % of the rows can
 * win by |w| |x|, 3.6 % once the mean is a direction, 2.2 % with three, 1.1 % with seven.
 *
 * Rounding. The bias is computed with an error below 2^-15 |w| |x|: 256 products summed in f32, each sum
 * rounded or cut off at 2^-23 of the largest, and an f32 rounding more for fp8. What is computed here
 * adds less than 2^-16 |w| |x|, directions that are orthonormal to 1e-5 included. So |w'| + 2^-7 |w|
 * and |x'| + 2^-7 |x| are kept: their product is larger by at least 2^-14 |w| |x|. The logit of the
 * bound, fl(U + bound), is at least fl(U + bias), because rounding keeps the order.
 */
#pragma once

#include "common/low_rank_logit.cuh"
#include "common/reduce.cuh"

namespace dspark {

constexpr int kSkipSeeds = 16; /* of a row: see skip.cuh */

struct BoundPolicy {
  static constexpr int kDirections = 3;
  static constexpr int kWarpsPerCta = 8;
  static constexpr int kNumThreads = kWarpsPerCta * kWarpSize;
  static constexpr int kLaneColumns = 8; /* 32 lanes: ranks up to 256 */
};

/* What a side keeps of a vector: parts along the directions, and the length of the rest. */
__device__ __forceinline__ float4 bound_of(const float (&vector)[BoundPolicy::kLaneColumns],
                                           const float* basis, /* [kDirections, rank] */
                                           int32_t rank) {
  constexpr int kColumns = BoundPolicy::kLaneColumns;
  constexpr float kSlack = 0x1p-7f;
  constexpr float kUp = 1.f + 0x1p-16f;
  const int32_t first = static_cast<int32_t>(threadIdx.x) % kWarpSize * kColumns;
  float parts[BoundPolicy::kDirections];
  float rest[kColumns];
  float whole_squares = 0.f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    rest[i] = vector[i];
    whole_squares = fmaf(vector[i], vector[i], whole_squares);
  }
#pragma unroll
  for (int d = 0; d < BoundPolicy::kDirections; ++d) {
    float direction[kColumns] = {};
    if (first < rank) {
      const auto* from = reinterpret_cast<const float4*>(basis + d * rank + first);
      const float4 low = from[0];
      const float4 high = from[1];
      direction[0] = low.x, direction[1] = low.y, direction[2] = low.z, direction[3] = low.w;
      direction[4] = high.x, direction[5] = high.y, direction[6] = high.z, direction[7] = high.w;
    }
    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) dot = fmaf(vector[i], direction[i], dot);
    parts[d] = warp_reduce(dot, SumOp{});
#pragma unroll
    for (int i = 0; i < kColumns; ++i) rest[i] = fmaf(-parts[d], direction[i], rest[i]);
  }
  float rest_squares = 0.f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) rest_squares = fmaf(rest[i], rest[i], rest_squares);
  rest_squares = warp_reduce(rest_squares, SumOp{});
  whole_squares = warp_reduce(whole_squares, SumOp{});
  return make_float4(parts[0], parts[1], parts[2],
                     (sqrtf(rest_squares) + kSlack * sqrtf(whole_squares)) * kUp);
}

/* The largest bias of a token (`row`) under a latent; NaN where either is not finite. */
__device__ __forceinline__ float largest_bias(const float4& row, const float4& latent) {
  return fmaf(row.x, latent.x, fmaf(row.y, latent.y, fmaf(row.z, latent.z, row.w * latent.w)));
}

template <typename W>
struct BoundArgs {
  const W* markov_w2; /* [vocab_size, rank] */
  const float* w2_scales;
  const float* basis;
  float4* bounds; /* [vocab_size] */
  int32_t vocab_size;
  int32_t rank; /* a multiple of 16 */
};

/* A warp per row. */
template <typename W>
__global__ void __launch_bounds__(BoundPolicy::kNumThreads) bound_kernel(BoundArgs<W> args) {
  constexpr int kColumns = BoundPolicy::kLaneColumns;
  const int32_t token =
      static_cast<int32_t>(blockIdx.x) * BoundPolicy::kWarpsPerCta + threadIdx.x / kWarpSize;
  if (token >= args.vocab_size) return; /* whole warps */
  const int32_t first = static_cast<int32_t>(threadIdx.x) % kWarpSize * kColumns;
  float row[kColumns] = {};
  if (first < args.rank) {
    const W* from = args.markov_w2 + static_cast<int64_t>(token) * args.rank + first;
    if constexpr (LowRank<W>::kScaled) {
      const float scale = args.w2_scales[token];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) row[i] = static_cast<float>(from[i]) * scale;
    } else {
      load_vec(from, row);
    }
  }
  const float4 bound = bound_of(row, args.basis, args.rank);
  if (threadIdx.x % kWarpSize == 0) args.bounds[token] = bound;
}

}  // namespace dspark
