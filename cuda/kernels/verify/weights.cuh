/*
 * What a request's next token is drawn from.
 *
 * The weights of a row: share * p, less the law of each draft turned down there, one after another:
 *
 *   w_0 = share * p,   w_i = max(w_{i-1} - q_i, 0) * inv_mass_i
 *
 * One rejection in chains (share is the block rule's joint ratio, else 1; the last inv_mass is never
 * needed, since a draw takes any scale), several behind the siblings of a tree.
 */
#pragma once

#include "kernels/verify/draft_law.cuh"

namespace dspark {

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
  int32_t num_rejections;
  Rejection rejections[kMaxRows];
};

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
    const Group logits = load_draft_strip(in, index, strip);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      weights[j] = fmaxf(weights[j] - probability(rejection.law, logits.of[j]), 0.f);
    }
    return;
  }
  const int64_t first = index * in.num_candidates;
#pragma unroll 1
  for (int32_t base = 0; base < in.num_candidates; base += kWarpSize) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x % kWarpSize);
    const int32_t token = i < in.num_candidates ? in.candidate_tokens[first + i] : -1;
    const bool here = token >= 0 && token / kStrip == strip;
    const float prob = here ? probability(rejection.law, in.candidate_logits[first + i]) : 0.f;
#pragma unroll 1
    for (uint32_t left = __ballot_sync(kAllLanes, here); left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      subtract(__shfl_sync(kAllLanes, token, lane), __shfl_sync(kAllLanes, prob, lane));
    }
  }
}

/* Weights of the warp's strip. */
__device__ __noinline__ Group load_weights(const VerifyInputs& in,
                                           const WeightSource& source,
                                           int32_t strip) {
  Group group;
  float (&weights)[kGroup] = group.of;
  load_target_strip(in, source.row, strip, weights);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) weights[j] = probability(source.law, weights[j]) * source.share;
#pragma unroll 1
  for (int32_t i = 0; i < source.num_rejections; ++i) {
    subtract_draft(in, source.row.req, source.rejections[i], strip, weights);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) weights[j] *= source.rejections[i].inv_mass;
  }
  return group;
}

}  // namespace dspark
