/*
 * The law of a row, merged from its zones in a fixed order by one warp: max of the row, Z = sum over
 * zones of sum * exp((max of the zone - max) / T). A filter adds a threshold to it.
 */
#pragma once

#include "kernels/verify/zones.cuh"

namespace dspark {

/* The law of a row: p(v) = kept(v) ? w(v) * inv_sum : 0, kept(v) = l >= threshold and w >=
 * min_weight, w(v) = exp2((l - max) * scale). */
struct RowLaw {
  float max;
  float scale;
  float inv_sum;    /* 0 for greedy rows */
  float threshold;  /* a logit; -inf: top-k and top-p keep all */
  float min_weight; /* 0: min-p keeps all */
  int32_t bad;      /* NaN, +inf or nothing but -inf: no law */
};

__device__ __forceinline__ float probability(const RowLaw& law, float logit) {
  const float weight = logit_weight(logit, law.max, law.scale);
  return logit >= law.threshold && weight >= law.min_weight ? weight * law.inv_sum : 0.f;
}

/* The zones of a row. */
struct RowZones {
  const Strips* maxima;
  const Strips* sums;
};

/* Weight of a zone in its row, where the row's largest logit weighs 1. */
__device__ __forceinline__ float zone_mass(const Strips& maxima,
                                           const Strips& sums,
                                           float max,
                                           float scale) {
  const float sum = zone_sum(sums);
  return sum > 0.f ? sum * logit_weight(zone_max(maxima), max, scale) : 0.f;
}

/* A warp merges the zones of a row into a law without filters, in a fixed order. */
__device__ __forceinline__ RowLaw merge_zones(const RowZones& zones,
                                              int32_t num_zones,
                                              float scale) {
  constexpr int kHeld = 5; /* zones of a lane that are read once */
  const int lane = threadIdx.x % kWarpSize;
  float held[kHeld], held_sums[kHeld];
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int32_t zone = lane + i * kWarpSize;
    held[i] = zone < num_zones ? zone_max(zones.maxima[zone]) : -INFINITY;
    held_sums[i] = zone < num_zones && scale > 0.f ? zone_sum(zones.sums[zone]) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) max = max_nan(max, held[i]);
#pragma unroll 1
  for (int32_t zone = lane + kHeld * kWarpSize; zone < num_zones; zone += kWarpSize) {
    max = max_nan(max, zone_max(zones.maxima[zone]));
  }
  max = from_ordered(__reduce_max_sync(kAllLanes, ordered(max)));
  const bool bad = !(fabsf(max) < INFINITY);
  float sum = 0.f;
  if (scale > 0.f && !bad) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (held_sums[i] > 0.f) sum += held_sums[i] * logit_weight(held[i], max, scale);
    }
#pragma unroll 1
    for (int32_t zone = lane + kHeld * kWarpSize; zone < num_zones; zone += kWarpSize) {
      sum += zone_mass(zones.maxima[zone], zones.sums[zone], max, scale);
    }
    sum = warp_reduce(sum, SumOp{});
  }
  return {max, scale, sum > 0.f ? 1.f / sum : 0.f, -INFINITY, 0.f, bad};
}

}  // namespace dspark
