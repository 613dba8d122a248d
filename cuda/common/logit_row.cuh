/*
 * Rows of f32 logits, four neighbours (a quad) at a time: the unit of both a 16-byte access and one
 * Philox call. Quads past the end of the row are filled, so that loops need no tail.
 */
#pragma once

#include <cstdint>

namespace dspark {

constexpr int kQuad = 4;

/* Logits 4 * quad .. 4 * quad + 3 of a row of `vocab_size`; `fill` past its end. `aligned`: the row
 * starts at a multiple of 16 bytes. */
__device__ __forceinline__ float4
load_quad(const float* row, int32_t quad, int32_t vocab_size, bool aligned, float fill) {
  const int64_t first = static_cast<int64_t>(quad) * kQuad;
  const int64_t left = vocab_size - first;
  if (aligned && left >= kQuad) return *reinterpret_cast<const float4*>(row + first);
  float4 values;
  values.x = left > 0 ? row[first] : fill;
  values.y = left > 1 ? row[first + 1] : fill;
  values.z = left > 2 ? row[first + 2] : fill;
  values.w = left > 3 ? row[first + 3] : fill;
  return values;
}

__device__ __forceinline__ void store_quad(
    float* row, int32_t quad, int32_t vocab_size, bool aligned, float4 values) {
  const int64_t first = static_cast<int64_t>(quad) * kQuad;
  const int64_t left = vocab_size - first;
  if (aligned && left >= kQuad) {
    *reinterpret_cast<float4*>(row + first) = values;
    return;
  }
  if (left > 0) row[first] = values.x;
  if (left > 1) row[first + 1] = values.y;
  if (left > 2) row[first + 2] = values.z;
  if (left > 3) row[first + 3] = values.w;
}

}  // namespace dspark
