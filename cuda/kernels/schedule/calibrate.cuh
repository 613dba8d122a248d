/*
 * sigmoid(logit(confidence) / temperature) in arithmetic that the host repeats bit for bit
 * (src/schedule/survival.rs): every operation is rounded to nearest on its own, none is fused, and
 * log2 and exp2 are the series written here. Both are good to 4e-7.
 */
#pragma once

#include <cfloat>
#include <cstdint>

namespace dspark {

/* log2 of a positive normal number: exponent, then the odd series in (m - 1) / (m + 1). */
__device__ __forceinline__ float exact_log2(float x) {
  const int32_t bits = __float_as_int(x);
  int32_t exponent = (bits >> 23) - 127;
  float mantissa = __int_as_float((bits & 0x007fffff) | 0x3f800000);
  if (mantissa > 1.41421356f) {
    mantissa = __fmul_rn(mantissa, 0.5f);
    exponent += 1;
  }
  const float s = __fdiv_rn(__fsub_rn(mantissa, 1.f), __fadd_rn(mantissa, 1.f));
  const float z = __fmul_rn(s, s);
  float series = __fadd_rn(__fmul_rn(0.4121986f, z), 0.577078f);
  series = __fadd_rn(__fmul_rn(series, z), 0.9617967f);
  series = __fadd_rn(__fmul_rn(series, z), 2.88539f);
  return __fadd_rn(__int2float_rn(exponent), __fmul_rn(s, series));
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
  const float log_odds =
      __fdiv_rn(__fsub_rn(exact_log2(c), exact_log2(__fsub_rn(1.f, c))), temperature);
  return __fdiv_rn(1.f, __fadd_rn(1.f, exact_exp2(-log_odds)));
}

}  // namespace dspark
