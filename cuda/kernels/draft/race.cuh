/*
 * The race of common/philox.cuh run by many CTAs at once: the leader of a row lives in one 64-bit
 * word, and most tokens are turned away before their noise is made.
 *
 * The key. High half: the score as an integer of the same order. Low half: the complement of the
 * token, so that the lowest index wins a tie. 0 is a race without runners. A maximum does not
 * depend on the order in which keys arrive: atomicMax on it is deterministic.
 *
 * The screen. With a score S known to be reached by somebody, a token of logit l can only win if
 * l - T log E >= S, that is E <= exp((l - S) / T). All E of a zone are at least its least, which
 * turns away most quads before any random number is made; and E >= least + u, since
 * -log1p(-u) >= u, turns away most of the other tokens for one exponential of 2 ulp instead of two
 * exact logarithms. The bound may be stale and is widened for rounding: which tokens are turned away
 * changes nothing but the time.
 */
#pragma once

#include "common/logit_row.cuh"
#include "common/philox.cuh"
#include "dspark.h"

namespace dspark {

using RaceKey = unsigned long long;
constexpr RaceKey kEmptyRaceKey = 0;
constexpr RaceKey kNoLeader = 1; /* below every other: nobody takes part, and that is final */

/* Coupled drafts share the target's noise. `rules` may be nullptr: none is coupled. */
__device__ __forceinline__ uint32_t draft_purpose(const int32_t* rules, int32_t req) {
  const bool coupled = rules != nullptr && rules[req] == DSPARK_RULE_COUPLED;
  return coupled ? DSPARK_PURPOSE_BONUS : DSPARK_PURPOSE_DRAFT;
}

/* An integer of the score's order, and back. */
__device__ __forceinline__ uint32_t score_order(float score) {
  const uint32_t bits = __float_as_uint(score + 0.f); /* -0 is 0 */
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of_order(uint32_t order) {
  return __uint_as_float((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ RaceKey race_key(Indexed leader) {
  if (leader.index == kNoRunner) return kEmptyRaceKey;
  return static_cast<RaceKey>(score_order(leader.value)) << 32 |
         ~static_cast<uint32_t>(leader.index);
}

/* The token that leads; 0 when none takes part. */
__device__ __forceinline__ int32_t race_token(RaceKey key) {
  return key == kEmptyRaceKey ? 0 : static_cast<int32_t>(~static_cast<uint32_t>(key));
}

/* The score that leads; -inf when no token takes part. */
__device__ __forceinline__ float race_score(RaceKey key) {
  return key == kEmptyRaceKey ? -INFINITY : score_of_order(static_cast<uint32_t>(key >> 32));
}

/* The best of a warp's keys, for every lane. */
__device__ __forceinline__ RaceKey warp_leader(RaceKey key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32);
  const uint32_t most = __reduce_max_sync(kAllLanes, order);
  const uint32_t low = order == most ? static_cast<uint32_t>(key) : 0u;
  return static_cast<RaceKey>(most) << 32 | __reduce_max_sync(kAllLanes, low);
}

/* How one request draws at one step. */
struct Runner {
  uint64_t seed;
  float temperature;
  float log2e_per_temperature; /* read only where temperature > 0 */
  int32_t position;            /* of the token to be drawn */
  uint32_t purpose;
};

/* Rounding of scores near S, as a share of |S| and of the noise's range. */
constexpr float kScreenSlack = 0x1p-20f;
/* log2(1 + 2^-10): rounding of the exponential and its argument. */
constexpr float kScreenSlackLog2 = 0.0014082f;

/* The score that a token must be able to reach, given that `score` has been reached. */
__device__ __forceinline__ float screen_bound(float score, float temperature) {
  return score - kScreenSlack * (fabsf(score) + 32.f * temperature);
}

/* 2^x to 2 ulp; results below 2^-126 are 0. */
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/* The largest E with which a token of logit l can reach the bound. */
__device__ __forceinline__ float largest_exponential(float l, float bound, const Runner& runner) {
  return fast_exp2(fmaf(l - bound, runner.log2e_per_temperature, kScreenSlackLog2));
}

/* E of one token; `zone` is its zone's noise. */
__device__ __forceinline__ float token_exponential(const Runner& runner,
                                                   const ZoneNoise& zone,
                                                   int32_t token) {
  const uint4 noise = philox_quad(runner.seed, static_cast<uint32_t>(token) / kQuad,
                                  runner.position, runner.purpose);
  const uint32_t words[kQuad] = {noise.x, noise.y, noise.z, noise.w};
  uint32_t word = words[0];
#pragma unroll
  for (int j = 1; j < kQuad; ++j) word = token % kQuad == j ? words[j] : word;
  return zone_exponential(zone, token % kNoiseZone, word);
}

/* Whether a token's E, made from its zone's and its own word, is past `largest` for certain. A comparison
 * with NaN says no. */
__device__ __forceinline__ bool is_beaten(const ZoneNoise& zone,
                                          int32_t offset,
                                          uint32_t word,
                                          float largest) {
  /* 1 + u rounded down to a multiple of 2^-23: no conversion, and never above 1 + u. */
  const float one_plus_u = __uint_as_float(word >> 9 | 0x3f800000u);
  return offset == zone.least_at ? zone.least > largest : one_plus_u > 1.f + (largest - zone.least);
}

/* Lets the tokens of a quad run that can still win; `zone` is theirs. A comparison with NaN lets the
 * token run, which judges it exactly. */
__device__ __forceinline__ void race_screened(Indexed& best,
                                              float4 logits,
                                              const Runner& runner,
                                              const ZoneNoise& zone,
                                              float bound,
                                              int32_t quad) {
  const float scores[kQuad] = {logits.x, logits.y, logits.z, logits.w};
  if (!(runner.temperature > 0.f)) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) race_step(best, scores[i], quad * kQuad + i);
    return;
  }
  const float top = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3]));
  if (zone.least > largest_exponential(top, bound, runner)) return;
  const uint4 noise =
      philox_quad(runner.seed, static_cast<uint32_t>(quad), runner.position, runner.purpose);
  const uint32_t words[kQuad] = {noise.x, noise.y, noise.z, noise.w};
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const int32_t offset = (quad * kQuad + i) % kNoiseZone;
    if (is_beaten(zone, offset, words[i], largest_exponential(scores[i], bound, runner))) continue;
    const float exponential = zone_exponential(zone, offset, words[i]);
    const float score = race_score_logit(scores[i], runner.temperature, exponential);
    race_step(best, score, quad * kQuad + i);
  }
}

}  // namespace dspark
