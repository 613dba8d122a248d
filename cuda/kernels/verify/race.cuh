/*
 * What a request's next token is drawn from, and the draw.
 *
 * The weights of a row: share * p, less the law of each draft turned down there, one after another:
 *
 *   w_0 = share * p,   w_i = max(w_{i-1} - q_i, 0) * inv_mass_i
 *
 * One rejection in chains (share is the block rule's joint ratio, else 1; the last inv_mass is never
 * needed, since a race takes any scale), several behind the siblings of a tree.
 *
 * race_row: a CTA races a row. The noise of a zone has a minimum that is known from one Philox call
 * (common/philox.cuh), and no weight in the zone is above amplify * p(zone.max), so that least /
 * that is a bound on all arrivals in the zone. Zones are taken in ascending order of their bounds, a
 * warp each, until the bound is behind the winner so far: 5 to 20 of 149 zones for laws of language
 * models, 1 for a flat law; all of them only when a residual is so small that its winner arrives
 * late. The result is the argmin over all tokens, whatever the order. One thread per zone ranks the
 * bounds: num_zones^2 comparisons for the CTA.
 *
 * row_mass: the sum of the weights of a whole row by one CTA, zones by warps and then by a tree.
 */
#pragma once

#include "kernels/verify/zones.cuh"

namespace dspark {

struct RacePolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr float kMargin = 1.00001f; /* on bounds, for the rounding of weights */
};

struct RaceShared {
  float bounds[kMaxZones]; /* of zones; masses in row_mass */
  uint16_t order[kMaxZones];
  uint32_t best; /* bits of the smallest arrival so far */
  Indexed argmin_scratch[RacePolicy::kNumWarps];
  float sum_scratch[RacePolicy::kNumWarps];
};

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
  const ZoneStats* zones;
  float share;
  const Rejection* rejections;
  int32_t num_rejections;
};

/* q of one token under the law of draft `row` of `req`. */
__device__ __forceinline__ float draft_probability(
    const VerifyInputs& in, int32_t req, int32_t row, const RowLaw& law, int32_t token) {
  if (law.bad != 0) return token == draft_token(in, req, row) ? 1.f : 0.f;
  const int64_t index = static_cast<int64_t>(req) * in.draft_len + row - 1;
  if (in.draft.data != nullptr) return probability(law, load_logit(in.draft, index, token));
  const int32_t* tokens = in.candidate_tokens + index * in.num_candidates;
  for (int32_t i = 0; i < in.num_candidates; ++i) {
    if (tokens[i] == token) {
      return probability(law, in.candidate_logits[index * in.num_candidates + i]);
    }
  }
  return 0.f;
}

/* weights = max(weights - q, 0) for a group of tokens. */
__device__ __forceinline__ void subtract_draft(const VerifyInputs& in,
                                               int32_t req,
                                               const Rejection& rejection,
                                               int32_t first,
                                               float (&weights)[kGroup]) {
  if (rejection.law.bad != 0) {
    update_token(weights, first, draft_token(in, req, rejection.row),
                 [](float weight) { return fmaxf(weight - 1.f, 0.f); });
    return;
  }
  const int64_t index = static_cast<int64_t>(req) * in.draft_len + rejection.row - 1;
  if (in.draft.data != nullptr) {
    float logits[kGroup];
    load_group(in.draft, index, first, in.vocab_size, logits);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      weights[j] = fmaxf(weights[j] - probability(rejection.law, logits[j]), 0.f);
    }
    return;
  }
  for (int32_t i = 0; i < in.num_candidates; ++i) {
    const int64_t at = index * in.num_candidates + i;
    update_token(weights, first, in.candidate_tokens[at], [&](float weight) {
      return fmaxf(weight - probability(rejection.law, in.candidate_logits[at]), 0.f);
    });
  }
}

/* Weights of a group of this lane. */
__device__ __forceinline__ void load_weights(const VerifyInputs& in,
                                             const WeightSource& source,
                                             int32_t zone,
                                             int group,
                                             float (&weights)[kGroup]) {
  load_target_group(in, source.row, zone, group, weights);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    weights[j] = probability(source.law, weights[j]) * source.share;
  }
  for (int32_t i = 0; i < source.num_rejections; ++i) {
    subtract_draft(in, source.row.req, source.rejections[i], group_token(zone, group), weights);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) weights[j] *= source.rejections[i].inv_mass;
  }
}

/* The noise of one draw. */
struct DrawKey {
  uint64_t seed;
  int32_t position;
  uint32_t purpose;
};

/* A larger bound on the weights of a row than p alone. */
__device__ __forceinline__ float amplification(const WeightSource& source) {
  float factor = source.share;
  for (int32_t i = 0; i < source.num_rejections; ++i) factor *= source.rejections[i].inv_mass;
  return factor;
}

/* The warp's zone runs: the winner with its arrival, in every lane; arrivals above `cutoff` need not
 * take part. */
__device__ __forceinline__ Indexed race_zone(const VerifyInputs& in,
                                             const WeightSource& source,
                                             const DrawKey& key,
                                             int32_t zone,
                                             float cutoff) {
  touch_zone(in.target, source.row.index, zone, in.vocab_size);
  const ZoneNoise noise = zone_noise(key.seed, zone, key.position, key.purpose);
  Indexed best = {INFINITY, kNoRunner};
#pragma unroll 1
  for (int group = 0; group < kGroupsPerLane; ++group) {
    const int32_t first = group_token(zone, group);
    float weights[kGroup];
    load_weights(in, source, zone, group, weights);
#pragma unroll
    for (int quad = 0; quad < kGroup / 4; ++quad) {
      float largest = 0.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) largest = fmaxf(largest, weights[quad * 4 + j]);
      if (!(noise.least <= fminf(cutoff, best.value) * RacePolicy::kMargin * largest)) continue;
      const uint4 drawn =
          philox_quad(key.seed, static_cast<uint32_t>(first / 4 + quad), key.position, key.purpose);
      const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight = weights[quad * 4 + j];
        if (!(weight > 0.f)) continue;
        const int32_t token = first + quad * 4 + j;
        const float arrival = zone_exponential(noise, token % kZone, words[j]) / weight;
        best = ArgminOp{}(best, Indexed{arrival, token});
      }
    }
  }
  return warp_reduce(best, ArgminOp{});
}

/* The token drawn from the weights of a row; kNoRunner when all are 0. All threads of the CTA take
 * part and get it. */
__device__ int32_t race_row(const VerifyInputs& in,
                            const WeightSource& source,
                            const DrawKey& key,
                            RaceShared& shared) {
  const float amplify = amplification(source);
  __syncthreads(); /* readers of an earlier use are done */
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += RacePolicy::kNumThreads) {
    const float largest = probability(source.law, source.zones[zone].max) * amplify;
    const float least = zone_noise(key.seed, zone, key.position, key.purpose).least;
    shared.bounds[zone] = largest > 0.f ? least / largest : INFINITY;
  }
  if (threadIdx.x == 0) shared.best = __float_as_uint(INFINITY);
  __syncthreads();
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += RacePolicy::kNumThreads) {
    const float bound = shared.bounds[zone];
    int32_t rank = 0;
    for (int32_t other = 0; other < in.num_zones; ++other) {
      const float value = shared.bounds[other];
      rank += value < bound || (value == bound && other < zone);
    }
    shared.order[rank] = static_cast<uint16_t>(zone);
  }
  __syncthreads();

  Indexed best = {INFINITY, kNoRunner};
  for (int32_t i = threadIdx.x / kWarpSize; i < in.num_zones; i += RacePolicy::kNumWarps) {
    const int32_t zone = shared.order[i];
    const float bound = shared.bounds[zone];
    const uint32_t bits = *static_cast<volatile uint32_t*>(&shared.best);
    const float cutoff = __shfl_sync(kAllLanes, __uint_as_float(bits), 0);
    if (bound == INFINITY || bound > cutoff * RacePolicy::kMargin) break;
    const Indexed winner = race_zone(in, source, key, zone, cutoff);
    best = ArgminOp{}(best, winner);
    if (threadIdx.x % kWarpSize == 0) atomicMin(&shared.best, __float_as_uint(winner.value));
  }
  best = cta_reduce<RacePolicy::kNumThreads>(best, ArgminOp{}, Indexed{INFINITY, kNoRunner},
                                             shared.argmin_scratch);
  return best.index;
}

/* The sum of the weights of a row. All threads of the CTA take part and get it. */
__device__ float row_mass(const VerifyInputs& in, const WeightSource& source, RaceShared& shared) {
  __syncthreads(); /* readers of an earlier use are done */
  for (int32_t zone = threadIdx.x / kWarpSize; zone < in.num_zones; zone += RacePolicy::kNumWarps) {
    float sum = 0.f;
    if (source.zones[zone].max >= source.law.threshold) {
      touch_zone(in.target, source.row.index, zone, in.vocab_size);
#pragma unroll 1
      for (int group = 0; group < kGroupsPerLane; ++group) {
        float weights[kGroup];
        load_weights(in, source, zone, group, weights);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) sum += weights[j];
      }
      sum = warp_reduce(sum, SumOp{});
    }
    if (threadIdx.x % kWarpSize == 0) shared.bounds[zone] = sum;
  }
  __syncthreads();
  float sum = 0.f;
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += RacePolicy::kNumThreads) {
    sum += shared.bounds[zone];
  }
  return cta_reduce<RacePolicy::kNumThreads>(sum, SumOp{}, 0.f, shared.sum_scratch);
}

}  // namespace dspark
