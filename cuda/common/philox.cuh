/*
 * Counter-based randomness and the race that turns it into categorical draws.
 *
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a key
 * (a request's 64-bit seed) and a counter (v / 4 or 0, position, purpose, 0) to four 32-bit words.
 * It has no state: a number depends on what it is for and on nothing that ran before, so that a
 * draw is the same in any batch, on any grid and in any order.
 *
 * Draws that share their noise (drafts and the coupled rule) are races; others invert the distribution
 * function (kernels/verify/draw.cuh).
 *
 * The race. With independent exponentials E_v (rate 1), the v that minimises E_v / weight(v) is
 * distributed as weight(v) / sum of weights: of runners with those speeds it finishes first. It
 * needs no normaliser and no prefix sum, every v is judged by itself, and partial winners merge in
 * any grouping. With weight = exp(l / T) the same v maximises race_score_logit, l - T log E, which
 * never overflows and goes to the greedy score l as T goes to 0. (-log E is Gumbel noise.)
 *
 * Zones. The E_v of kNoiseZone neighbouring tokens are made from their minimum m (an exponential of
 * rate kNoiseZone) and the token that has it; every other one is m plus an exponential of rate 1,
 * since what is left of an exponential after m is one again. So all are independent of rate 1, and a
 * zone whose m / (largest weight) is behind the winner so far need not be looked at: a race runs a
 * handful of zones instead of the vocabulary. m of four neighbouring zones comes from the words of
 * the counter (zone / 4, position, purpose, 1), whose it is from (zone, position, purpose, 3), asked
 * for by zones that are not passed over, the others from (v / 4, position, purpose, 0). A zone is
 * small, so that its m says much about it: of n tokens only some sixty are in the zone that wins, and
 * a tile of 64 tokens in the registers of a warp can be judged as a whole.
 *
 * Why E must be exact to a relative error, most of all where it is small: the winner of a race
 * over n tokens typically has E of order 1 / n, and a token of probability p far below 1 / n can
 * only win with E of order p. Were u a multiple of 2^-24, or were E rounded to an absolute step
 * (-logf(1 - u) with 1 - u rounded near 1), all small E would be tied multiples of 6e-8: ties would
 * be broken by index instead of by weight and the rare tokens' law would be wrong. So u = (x + 0.5)
 * * 2^-32 is formed by scaling x + 0.5, whose rounding is relative, and E = -log1p(-u). For u > 1/2
 * the same value comes from 1 - u = (~x + 0.5) * 2^-32, which is relative too and never 0: E is in
 * [1.16e-10, 22.9], and needs no clamp.
 */
#pragma once

#include <cmath>
#include <cstdint>

#include "common/reduce.cuh"

namespace dspark {

/* Four words for one counter: 10 rounds. */
__device__ __forceinline__ uint4 philox4x32_10(uint64_t key, uint4 counter) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u;
  constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u;
  constexpr uint32_t kWeyl1 = 0xBB67AE85u;
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(kMultiplier0, counter.x);
    const uint32_t low0 = kMultiplier0 * counter.x;
    const uint32_t high1 = __umulhi(kMultiplier1, counter.z);
    const uint32_t low1 = kMultiplier1 * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

/* Words of the tokens 4 * quad .. 4 * quad + 3 (quad 0 for a single number). */
__device__ __forceinline__ uint4 philox_quad(uint64_t seed,
                                             uint32_t quad,
                                             int32_t position,
                                             uint32_t purpose) {
  return philox4x32_10(seed, make_uint4(quad, static_cast<uint32_t>(position), purpose, 0u));
}

/* Tokens that share a minimum, and zones whose minima one counter makes. */
constexpr int kNoiseZone = 64;
constexpr int kZonesPerCounter = 4;
constexpr uint32_t kMinimaWord =
    1u; /* the fourth word of counters of minima, and of whose they are */
constexpr uint32_t kWhoseWord = 3u;

constexpr float kTwoPowMinus32 = 0x1p-32f;

/* u in (0, 1), exact: the one number of an accept decision is compared in f64. */
__device__ __forceinline__ double uniform_from_word(uint32_t word) {
  return (static_cast<double>(word) + 0.5) * 0x1p-32;
}

/* E = -log1p(-u), u = (word + 0.5) * 2^-32, to a relative error of a few f32 ulp everywhere. */
__device__ __forceinline__ float exponential_from_word(uint32_t word) {
  const bool low = word < 0x80000000u;
  const float u = (static_cast<float>(low ? word : ~word) + 0.5f) * kTwoPowMinus32;
  return low ? -log1pf(-u) : -logf(u);
}

/* The noise of a zone: its smallest E_v, and whose it is, relative to the zone. */
struct ZoneNoise {
  float least;
  int32_t least_at;
};

/* The smallest E_v of the zones kZonesPerCounter * `four` on. */
__device__ __forceinline__ float4 zone_leasts(uint64_t seed,
                                              int32_t four,
                                              int32_t position,
                                              uint32_t purpose) {
  constexpr float kShare = 1.f / kNoiseZone;
  const uint4 words =
      philox4x32_10(seed, make_uint4(static_cast<uint32_t>(four), static_cast<uint32_t>(position),
                                     purpose, kMinimaWord));
  return make_float4(
      exponential_from_word(words.x) * kShare, exponential_from_word(words.y) * kShare,
      exponential_from_word(words.z) * kShare, exponential_from_word(words.w) * kShare);
}

/* The smallest E_v of one zone. */
__device__ __forceinline__ float zone_least(uint64_t seed,
                                            int32_t zone,
                                            int32_t position,
                                            uint32_t purpose) {
  const auto four = static_cast<uint32_t>(zone) / kZonesPerCounter;
  const uint4 words =
      philox4x32_10(seed, make_uint4(four, static_cast<uint32_t>(position), purpose, kMinimaWord));
  const uint32_t low = zone % 2 == 0 ? words.x : words.y;
  const uint32_t high = zone % 2 == 0 ? words.z : words.w;
  return exponential_from_word(zone % kZonesPerCounter < 2 ? low : high) * (1.f / kNoiseZone);
}

/* Whose it is, relative to the zone. */
__device__ __forceinline__ int32_t zone_least_at(uint64_t seed,
                                                 int32_t zone,
                                                 int32_t position,
                                                 uint32_t purpose) {
  const uint4 words =
      philox4x32_10(seed, make_uint4(static_cast<uint32_t>(zone), static_cast<uint32_t>(position),
                                     purpose, kWhoseWord));
  return static_cast<int32_t>(words.x % kNoiseZone);
}

__device__ __forceinline__ ZoneNoise zone_noise(uint64_t seed,
                                                int32_t zone,
                                                int32_t position,
                                                uint32_t purpose) {
  return {zone_least(seed, zone, position, purpose), zone_least_at(seed, zone, position, purpose)};
}

/* E_v of the token `offset` tokens into the zone, whose own word is `word`. */
__device__ __forceinline__ float zone_exponential(const ZoneNoise& noise,
                                                  int32_t offset,
                                                  uint32_t word) {
  return offset == noise.least_at ? noise.least : noise.least + exponential_from_word(word);
}

__device__ __forceinline__ float race_score_logit(float logit,
                                                  float temperature,
                                                  float exponential) {
  return fmaf(-temperature, logf(exponential), logit);
}

/* A race without runners: index kNoRunner loses to everything that takes part. */
constexpr int32_t kNoRunner = INT32_MAX;

__device__ __forceinline__ Indexed empty_race() { return {-INFINITY, kNoRunner}; }

/* Lets `token` run. A score of NaN or -inf takes no part. */
__device__ __forceinline__ void race_step(Indexed& best, float score, int32_t token) {
  if (score > best.value || (score == best.value && token < best.index && score > -INFINITY)) {
    best = {score, token};
  }
}

}  // namespace dspark
