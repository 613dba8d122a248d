/*
 * A span of 64 tokens in the registers of a warp: what it weighs, and the token drawn from it.
 *
 *   weight   w = sum over v of exp(l_v / T), kept as 2^scaled_top * sum, base 2, so that the largest
 *            term is 1
 *   race     spans arrive at E / w, E exponential of rate 1 for (request, step, span); the first
 *            is drawn with probability w / (sum of all w)
 *   draw     in the span that arrives first, the first token whose running sum exceeds u w
 *
 * which together is softmax(l / T) with one exponential and one logarithm for 64 tokens, and sums
 * that the normaliser of the law needs anyway. Greedy rows race with their largest logit, coupled
 * ones with the best of race.cuh.
 *
 * Mapping. C fragments of 4 x kNTiles products m16n8k16: A are the tokens, B the requests. Lane
 * (g, c) holds tokens 8 g .. 8 g + 7 of the span for requests 2c, 2c + 1 of each of kNTiles groups
 * of 8: row i of product m is token 8 (i % 8) + 2 m + i / 8, so that the base logits of a lane and
 * request are 8 neighbours. Lane (g, c) *owns* request 2c + g % 2 of group g / 2: it makes its
 * noise, keeps its leader and judges whether the span can lead. Only then is the token looked for.
 *
 * Per element 1 conversion, 1 addition, 1 maximum, 1 fma, 1 ex2, 1 addition; per 8 elements and
 * request 6 shuffles.
 */
#pragma once

#include "common/low_rank_logit.cuh"
#include "kernels/draft/grammar.cuh"
#include "kernels/draft/race.cuh"

namespace dspark {

constexpr int kSpan = 64;      /* tokens: a zone of the coupled noise */
constexpr int kLaneTokens = 8; /* of a span, with one lane */
constexpr int kSpanTiles = 4;  /* products of 16 tokens */
constexpr int kGroupReqs = 8;  /* requests of a product */
constexpr float kLog2e = 1.44269504f;
static_assert(kSpan == kNoiseZone);

enum class DrawMode : int32_t { kGreedy, kSampled, kCoupled };

/* How a request draws; Runner.log2e_per_temperature is log2(e) where the temperature is 0. */
struct SpanRunner {
  Runner runner; /* position: of the first draft */
  DrawMode mode;
  int32_t draft_len; /* 0: takes no part */
};

/* 64 tokens x kNTiles * 8 requests: products first, then logits. */
template <int kNTiles>
using SpanTile = float[kSpanTiles][kNTiles][4];

/* Element i of 0 .. 7 of a lane's tokens for request `odd` of group `tile`. */
template <int kNTiles>
__device__ __forceinline__ float& span_element(SpanTile<kNTiles>& tile, int group, int odd, int i) {
  return tile[i / 2][group][i % 2 * 2 + odd];
}

/* log2(x) with an absolute error of 2^-22. */
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/* Reduces over the lanes that share c. */
template <typename V, typename Op>
__device__ __forceinline__ V column_reduce(V value, Op op) {
#pragma unroll
  for (int mask = 4; mask < kWarpSize; mask *= 2) value = op(value, shuffle_xor(value, mask));
  return value;
}

/* A span's weight for a request: sum * 2^scaled_top. */
struct SpanWeight {
  float scaled_top;
  float sum; /* 0: nothing can be drawn; NaN: no law */
};

/* What a lane knows of the request it owns. */
struct SpanOwner {
  const SpanRunner* runner; /* nullptr: owns none */
  float top;                /* largest logit of the span */
  SpanWeight weight;
  RaceKey seen; /* the request's leader at this step, as far as known */
};

/* The lane's request, relative to the warp's first. */
__device__ __forceinline__ int owned_request(int lane) {
  return lane / 8 * kGroupReqs + lane % 4 * 2 + lane / 4 % 2;
}

/* Top and weight of every request's logits; each goes to its owner. */
template <int kNTiles>
__device__ __forceinline__ void weigh_span(SpanTile<kNTiles>& logits,
                                           const SpanRunner* runners, /* from the warp's first */
                                           SpanOwner& owner) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < 2 * kNTiles; ++j) {
    float top = span_element<kNTiles>(logits, j / 2, j % 2, 0);
#pragma unroll
    for (int i = 1; i < kLaneTokens; ++i) {
      top = fmaxf(top, span_element<kNTiles>(logits, j / 2, j % 2, i));
    }
    top = column_reduce(top, MaxOp{});
    const float scale =
        runners[j / 2 * kGroupReqs + lane % 4 * 2 + j % 2].runner.log2e_per_temperature;
    const float scaled_top = top == -INFINITY ? 0.f : top * scale;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      sum += fast_exp2(fmaf(span_element<kNTiles>(logits, j / 2, j % 2, i), scale, -scaled_top));
    }
    sum = column_reduce(sum, SumOp{});
    if (lane / 4 == j) {
      owner.top = top;
      owner.weight = {scaled_top, sum};
    }
  }
}

/* An owner's noise for a span, made while the span is on its way. */
struct SpanNoise {
  float first;  /* sampled: log2 of the exponential; coupled: the least E of the span, a zone */
  float second; /* sampled: the uniform; greedy: 0, the first of the largest */
};

__device__ __forceinline__ SpanNoise span_noise(const SpanOwner& owner,
                                                int32_t step,
                                                int32_t span) {
  if (owner.runner == nullptr || owner.runner->mode == DrawMode::kGreedy) return {0.f, 0.f};
  const Runner& runner = owner.runner->runner;
  const int32_t position = runner.position + step;
  if (owner.runner->mode == DrawMode::kCoupled) {
    return {zone_least(runner.seed, span, position, runner.purpose), 0.f};
  }
  const uint4 words = philox4x32_10(
      runner.seed,
      make_uint4(static_cast<uint32_t>(span), static_cast<uint32_t>(position), runner.purpose, 2u));
  return {fast_log2(exponential_from_word(words.x)),
          (static_cast<float>(words.y) + 0.5f) * kTwoPowMinus32};
}

/* Whether the owner's request may find its leader in this span, and with what score. */
struct SpanClaim {
  bool may_lead;
  float score; /* coupled: what a token must reach */
};

__device__ __forceinline__ SpanClaim claim_span(const SpanOwner& owner, const SpanNoise& noise) {
  if (owner.runner == nullptr) return {false, 0.f};
  const float seen = race_score(owner.seen);
  if (owner.runner->mode == DrawMode::kCoupled) {
    const Runner& runner = owner.runner->runner;
    const float bound = screen_bound(seen, runner.temperature);
    const bool beaten = noise.first > largest_exponential(owner.top, bound, runner);
    return {owner.top > -INFINITY && !beaten, bound};
  }
  const float score = owner.runner->mode == DrawMode::kGreedy
                          ? owner.top
                          : owner.weight.scaled_top + fast_log2(owner.weight.sum) - noise.first;
  return {score >= seen && score > -INFINITY, score};
}

/* The first token of the column whose running sum of weights exceeds the share `uniform` of all;
 * never one of weight 0. */
__device__ __forceinline__ int32_t draw_token(const float (&weights)[kLaneTokens], float uniform) {
  const int lane = threadIdx.x % kWarpSize;
  const int column = lane % 4;
  float lane_sum = 0.f;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) lane_sum += weights[i];
  float running = lane_sum;
#pragma unroll
  for (int distance = 4; distance < kWarpSize; distance *= 2) {
    const float below = __shfl_up_sync(kAllLanes, running, distance);
    if (lane >= distance) running += below;
  }
  const float target = uniform * __shfl_sync(kAllLanes, running, kWarpSize - 4 + column);
  float before = __shfl_up_sync(kAllLanes, running, 4);
  if (lane < 4) before = 0.f;

  const uint32_t of_column = 0x11111111u << column;
  const bool positive = lane_sum > 0.f;
  const uint32_t live = __ballot_sync(kAllLanes, positive) & of_column;
  const uint32_t past = __ballot_sync(kAllLanes, positive && running > target) & of_column;
  int drawn = -1;
  int last = 0;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    before += weights[i];
    if (weights[i] > 0.f) last = i;
    if (weights[i] > 0.f && before > target && drawn < 0) drawn = i;
  }
  const int32_t token = lane / 4 * kLaneTokens + (drawn < 0 ? last : drawn);
  /* Past rounding: the last that has any weight. */
  const int from =
      past != 0 ? __ffs(static_cast<int>(past)) - 1 : 31 - __clz(static_cast<int>(live));
  return __shfl_sync(kAllLanes, token, from & 31);
}

/* The best coupled score of a request's column. Before anything is known to have been reached, the
 * largest logits of the lanes run first and set the bound for the others. */
__device__ __forceinline__ Indexed race_column(const float (&logits)[kLaneTokens],
                                               Runner runner,
                                               int32_t step,
                                               const ZoneNoise& zone,
                                               float bound,
                                               int32_t first_token) {
  Indexed best = empty_race();
  runner.position += step;
  if (__any_sync(kAllLanes, bound == -INFINITY)) {
    Indexed largest = empty_race();
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) race_step(largest, logits[i], first_token + i);
    if (largest.index != kNoRunner && runner.temperature > 0.f) {
      const float exponential = token_exponential(runner, zone, largest.index);
      best = {race_score_logit(largest.value, runner.temperature, exponential), largest.index};
    }
    best = column_reduce(best, ArgmaxOp{});
    bound = fmaxf(bound, screen_bound(best.value, runner.temperature));
  }
#pragma unroll
  for (int i = 0; i < kLaneTokens; i += kQuad) {
    race_screened(best, make_float4(logits[i], logits[i + 1], logits[i + 2], logits[i + 3]), runner,
                  zone, bound, first_token / kQuad + i / kQuad);
  }
  return column_reduce(best, ArgmaxOp{});
}

/* Of the four owners of a row of requests. */
__device__ __forceinline__ uint32_t claims_of(uint32_t claims, int j) {
  return claims >> 4 * j & 0xfu;
}

/* Token of the span drawn for the requests of row j: greedy and sampled ones. `from`: the owner. */
template <int kNTiles>
__device__ __forceinline__ int32_t draw_row(SpanTile<kNTiles>& logits,
                                            int j,
                                            const SpanRunner& runner,
                                            const SpanOwner& owner,
                                            const SpanNoise& noise,
                                            int from) {
  const float scaled_top = __shfl_sync(kAllLanes, owner.weight.scaled_top, from);
  const float top = __shfl_sync(kAllLanes, owner.top, from);
  const float scale = runner.runner.log2e_per_temperature;
  float weights[kLaneTokens];
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const float l = span_element<kNTiles>(logits, j / 2, j % 2, i);
    weights[i] = runner.mode == DrawMode::kGreedy ? (l == top ? 1.f : 0.f)
                                                  : fast_exp2(fmaf(l, scale, -scaled_top));
  }
  return draw_token(weights, __shfl_sync(kAllLanes, noise.second, from));
}

/* Lets the span run for every request: better leaders are seen, and go to `keys` (of the warp's
 * requests) if it pushes. */
template <int kNTiles>
__device__ __forceinline__ void race_span(SpanTile<kNTiles>& logits,
                                          const SpanRunner* runners,
                                          SpanOwner& owner,
                                          const SpanNoise& noise,
                                          int32_t step,
                                          int32_t span,
                                          RaceKey* keys,
                                          bool pushes) {
  const int lane = threadIdx.x % kWarpSize;
  const SpanClaim claim = claim_span(owner, noise);
  const uint32_t claims = __ballot_sync(kAllLanes, claim.may_lead);
  if (claims == 0) return;
  const bool owns_coupled = claim.may_lead && owner.runner->mode == DrawMode::kCoupled;
  const uint32_t coupled = __ballot_sync(kAllLanes, owns_coupled);
  Indexed best = empty_race();
#pragma unroll
  for (int j = 0; j < 2 * kNTiles; ++j) {
    if (claims_of(claims, j) == 0) continue;
    const int from = 4 * j + lane % 4;
    const SpanRunner& runner = runners[j / 2 * kGroupReqs + lane % 4 * 2 + j % 2];
    if (claims_of(claims, j) != claims_of(coupled, j)) {
      const int32_t token = draw_row<kNTiles>(logits, j, runner, owner, noise, from);
      if (lane / 4 == j) best = {claim.score, span * kSpan + token};
    }
    if (claims_of(coupled, j) == 0) continue;
    float own[kLaneTokens];
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) own[i] = span_element<kNTiles>(logits, j / 2, j % 2, i);
    const ZoneNoise zone = {__shfl_sync(kAllLanes, noise.first, from),
                            zone_least_at(runner.runner.seed, span, runner.runner.position + step,
                                          runner.runner.purpose)};
    const Indexed raced =
        race_column(own, runner.runner, step, zone, __shfl_sync(kAllLanes, claim.score, from),
                    span * kSpan + lane / 4 * kLaneTokens);
    if (lane / 4 == j && runner.mode == DrawMode::kCoupled) best = raced;
  }
  if (!claim.may_lead) return;
  const RaceKey key = race_key(best);
  if (key <= owner.seen) return;
  owner.seen = key;
  if (pushes) atomicMax(keys + owned_request(lane), key);
}

}  // namespace dspark
