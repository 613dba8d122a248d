/*
 * How partial results are added: one rule for all, so that the order of the sums alone decides every
 * bit.
 */
#pragma once

#include "kernels/attention/tile.cuh"

namespace dspark {

__device__ __forceinline__ void add_weighted(float4& o, float weight, float4 part) {
  o.x += weight * part.x;
  o.y += weight * part.y;
  o.z += weight * part.z;
  o.w += weight * part.w;
}

/* What a row of two partial results is multiplied by before they are added, and its (m, l) then.
 * Products and sums are rounded as written: where it is inlined, a compiler must not choose. */
struct RowWeights {
  float own;
  float other;
  float2 max_sum;

  __device__ __forceinline__ RowWeights(float2 own_max_sum, float2 other_max_sum) {
    const float total_max = fmaxf(own_max_sum.x, other_max_sum.x);
    const float reference = finite_max(total_max);
    own = exp2_approx(own_max_sum.x - reference);
    other = exp2_approx(other_max_sum.x - reference);
    max_sum = make_float2(total_max, weigh(own_max_sum.y, other_max_sum.y));
  }

  /* values = own * before + other * values. */
  __device__ __forceinline__ void add(const float4& before, float4* values) const {
    values->x = weigh(before.x, values->x);
    values->y = weigh(before.y, values->y);
    values->z = weigh(before.z, values->z);
    values->w = weigh(before.w, values->w);
  }

 private:
  __device__ __forceinline__ float weigh(float a, float b) const {
    return __fmaf_rn(other, b, __fmul_rn(own, a));
  }
};

/* Four values of a row of O, not normalised, and the row's (m, l). */
struct RowSum {
  float4 out;
  float2 max_sum;

  static __device__ __forceinline__ RowSum empty() {
    return {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float2(-INFINITY, 0.0f)};
  }

  __device__ __forceinline__ void add(const RowSum& part) {
    const RowWeights weights(max_sum, part.max_sum);
    float4 values = part.out;
    weights.add(out, &values);
    *this = {values, weights.max_sum};
  }
};

}  // namespace dspark
