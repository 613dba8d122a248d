/*
 * Laws of rows, and what a request's next token is drawn from.
 *
 * The weights of a row: share * p, less the law of each draft turned down there, one after another:
 *
 *   w_0 = share * p,   w_i = max(w_{i-1} - q_i, 0) * inv_mass_i
 *
 * One rejection in chains (share is the block rule's joint ratio, else 1; the last inv_mass is never
 * needed, since a draw takes any scale), several behind the siblings of a tree.
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
  constexpr int kHeld = 6; /* zones of a lane that are read once */
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
    for (int32_t zone = lane + kHeld * kWarpSize; zone < num_zones; zone += kWarpSize) {
      sum += zone_mass(zones.maxima[zone], zones.sums[zone], max, scale);
    }
    sum = warp_reduce(sum, SumOp{});
  }
  return {max, scale, sum > 0.f ? 1.f / sum : 0.f, -INFINITY, 0.f, bad};
}

/* A draft that was turned down: its row, its law (bad: a point mass), 1 / mass that it left. */
struct Rejection {
  int32_t row;
  RowLaw law;
  float inv_mass;
};

/* The weights of a row. */
struct WeightSource {
  TargetRow row;
  RowLaw law;
  RowZones zones;
  float share;
  const Rejection* rejections;
  int32_t num_rejections;
};

/* q of one token under the law of draft `row` of `req`, by a warp. */
__device__ __forceinline__ float draft_probability(
    const VerifyInputs& in, int32_t req, int32_t row, const RowLaw& law, int32_t token) {
  if (law.bad != 0) return token == draft_token(in, req, row) ? 1.f : 0.f;
  const int64_t index = static_cast<int64_t>(req) * in.draft_len + row - 1;
  if (in.draft.data != nullptr) return probability(law, load_logit(in.draft, index, token));
  const int32_t* tokens = in.candidate_tokens + index * in.num_candidates;
  const float* logits = in.candidate_logits + index * in.num_candidates;
  float prob = 0.f;
  for (int32_t i = threadIdx.x % kWarpSize; i < in.num_candidates; i += kWarpSize) {
    const float logit = logits[i];
    if (tokens[i] == token) prob = probability(law, logit);
  }
  return warp_reduce(prob, MaxOp{});
}

/* weights = max(weights - q, 0) for the warp's strip. */
__device__ __forceinline__ void subtract_draft(const VerifyInputs& in,
                                               int32_t req,
                                               const Rejection& rejection,
                                               int32_t strip,
                                               float (&weights)[kGroup]) {
  const auto subtract = [&](int32_t token, float prob) {
    update_token(weights, strip_token(strip), token,
                 [&](float weight) { return fmaxf(weight - prob, 0.f); });
  };
  if (rejection.law.bad != 0) {
    subtract(draft_token(in, req, rejection.row), 1.f);
    return;
  }
  const int64_t index = static_cast<int64_t>(req) * in.draft_len + rejection.row - 1;
  if (in.draft.data != nullptr) {
    float logits[kGroup];
    load_strip(in.draft, index, strip, in.vocab_size, logits);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      weights[j] = fmaxf(weights[j] - probability(rejection.law, logits[j]), 0.f);
    }
    return;
  }
  const int64_t first = index * in.num_candidates;
  for (int32_t base = 0; base < in.num_candidates; base += kWarpSize) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x % kWarpSize);
    const int32_t token = i < in.num_candidates ? in.candidate_tokens[first + i] : -1;
    const bool here = token >= 0 && token / kStrip == strip;
    const float prob = here ? probability(rejection.law, in.candidate_logits[first + i]) : 0.f;
    for (uint32_t left = __ballot_sync(kAllLanes, here); left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      subtract(__shfl_sync(kAllLanes, token, lane), __shfl_sync(kAllLanes, prob, lane));
    }
  }
}

/* Weights of the warp's strip. */
__device__ __forceinline__ void load_weights(const VerifyInputs& in,
                                          const WeightSource& source,
                                          int32_t strip,
                                          float (&weights)[kGroup]) {
  load_target_strip(in, source.row, strip, weights);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) weights[j] = probability(source.law, weights[j]) * source.share;
  for (int32_t i = 0; i < source.num_rejections; ++i) {
    subtract_draft(in, source.row.req, source.rejections[i], strip, weights);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) weights[j] *= source.rejections[i].inv_mass;
  }
}

}  // namespace dspark
