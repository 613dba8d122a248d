/*
 * How partial results are added: one rule for all, so that the order of the sums alone decides every
 * bit.
 */
#pragma once

#include "kernels/attention/tile.cuh"

namespace dspark {

/* Four values of a row of O, not normalised, and the row's (m, l). */
struct RowSum {
  float4 out;
  float2 max_sum;

  static __device__ __forceinline__ RowSum empty() {
    return {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float2(-INFINITY, 0.0f)};
  }

  /* Products and sums are rounded as written: where it is inlined, a compiler must not choose. */
  __device__ __forceinline__ void add(const RowSum& part) {
    const float total_max = fmaxf(max_sum.x, part.max_sum.x);
    const float reference = finite_max(total_max);
    const float own = exp2_approx(max_sum.x - reference);
    const float other = exp2_approx(part.max_sum.x - reference);
    max_sum = make_float2(total_max, weigh(own, max_sum.y, other, part.max_sum.y));
    out.x = weigh(own, out.x, other, part.out.x);
    out.y = weigh(own, out.y, other, part.out.y);
    out.z = weigh(own, out.z, other, part.out.z);
    out.w = weigh(own, out.w, other, part.out.w);
  }

 private:
  static __device__ __forceinline__ float weigh(float own, float a, float other, float b) {
    return __fmaf_rn(other, b, __fmul_rn(own, a));
  }
};

}  // namespace dspark
