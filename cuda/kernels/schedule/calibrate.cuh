/*
 * sigmoid(logit(confidence) / temperature) in arithmetic that the host repeats bit for bit
 * (src/schedule/survival.rs): every operation is rounded to nearest on its own, none is fused, and
 * log2 and exp2 are the series written here. Both are good to 1e-6. One division and two reciprocals
 * are all that is slow in it.
 */
#pragma once

#include <cfloat>
#include <cstdint>

namespace dspark {

/* log2(a / b) of positive normal numbers: the difference of the exponents, then the odd series in
 * (a - b) / (a + b) of mantissas whose ratio is within sqrt(2) of 1. */
__device__ __forceinline__ float exact_log2_ratio(float a, float b) {
  constexpr float kSqrt2 = 1.41421356f;
  const int32_t bits_a = __float_as_int(a);
  const int32_t bits_b = __float_as_int(b);
  int32_t whole = (bits_a >> 23) - (bits_b >> 23);
  a = __int_as_float((bits_a & 0x007fffff) | 0x3f800000);
  b = __int_as_float((bits_b & 0x007fffff) | 0x3f800000);
  const bool halve_a = a > __fmul_rn(b, kSqrt2);
  const bool halve_b = b > __fmul_rn(a, kSqrt2);
  whole += halve_a - halve_b;
  a = halve_a ? __fmul_rn(a, 0.5f) : a;
  b = halve_b ? __fmul_rn(b, 0.5f) : b;
  const float s = __fdiv_rn(__fsub_rn(a, b), __fadd_rn(a, b));
  const float z = __fmul_rn(s, s);
  float series = __fadd_rn(__fmul_rn(0.4121986f, z), 0.577078f);
  series = __fadd_rn(__fmul_rn(series, z), 0.9617967f);
  series = __fadd_rn(__fmul_rn(series, z), 2.88539f);
  return __fadd_rn(__int2float_rn(whole), __fmul_rn(s, series));
}

/* 2^y; y is held to the exponents of normal numbers. */
__device__ __forceinline__ float exact_exp2(float y) {
  y = fminf(fmaxf(y, -126.f), 126.f);
  const float whole = rintf(y);
  const float f = __fsub_rn(y, whole);
  float series = __fadd_rn(__fmul_rn(0.0001540353f, f), 0.0013333558f);
  series = __fadd_rn(__fmul_rn(series, f), 0.009618129f);
  series = __fadd_rn(__fmul_rn(series, f), 0.05550411f);
  series = __fadd_rn(__fmul_rn(series, f), 0.2402265f);
  series = __fadd_rn(__fmul_rn(series, f), 0.69314718f);
  const float scale = __int_as_float((__float2int_rn(whole) + 127) << 23);
  return __fmul_rn(__fadd_rn(__fmul_rn(series, f), 1.f), scale);
}

/* Exact at 0 and 1; NaN counts as 0, others are clamped to [0, 1]. */
__device__ __forceinline__ float calibrate(float confidence, float temperature) {
  const float c = fminf(fmaxf(confidence, 0.f), 1.f); /* fmaxf(NaN, 0) is 0 */
  if (temperature == 1.f || c < FLT_MIN || c == 1.f) return c;
  const float log_odds = __fmul_rn(exact_log2_ratio(c, __fsub_rn(1.f, c)), __frcp_rn(temperature));
  return __frcp_rn(__fadd_rn(1.f, exact_exp2(-log_odds)));
}

}  // namespace dspark
