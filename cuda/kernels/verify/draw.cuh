/*
 * Draws without noise per token: a strip of the row by the inverse of the distribution function of the
 * strips' masses, then a token by that of the weights inside it. Two uniforms, 256 logits read.
 *
 * The masses of a target law lie ready (zones.cuh, or the filters). The residual max(share * p - q, 0)
 * is drawn by thinning: a try draws v from p and keeps it with probability 1 - q(v) / (share * p(v));
 * what is kept has the law of the residual, for any law q of which one value is known at a time, and
 * without the cancellation that a difference of masses would bring. A warp makes a try, all at once,
 * and the kept one of the lowest number wins, so that the result depends on no order. A try succeeds
 * with the mass of the residual: hardly ever does a request need more than a round. After kTries
 * (kTriesLowRank where a sweep reads all of W2) without success, or with several rejections, whose
 * residual p does not bound, the row is swept: masses of the weights of all its zones, then the same.
 *
 * Exact: a strip's mass is an f32 sum of trees of weights, all running sums are f64, so that a token's
 * share is right to some 1e-7 of itself. The uniforms have 52 bits.
 *
 * Bytes: a strip per try, from L2; a sweep reads the row. Limited by latency: it is a chain of some
 * hundred dependent instructions, which is why sums run over lanes and not over tokens.
 */
#pragma once

#include "kernels/verify/weights.cuh"

namespace dspark {

struct DrawPolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kTries = 64; /* multiples of kNumWarps */
  static constexpr int kTriesLowRank = 1024;
  static constexpr uint32_t kNumbersWord = 2u; /* the fourth word of counters */
};

struct DrawShared {
  double masses[kMaxZones];
  int32_t tokens[DrawPolicy::kNumWarps];
};

/* u in (0, 1) of 52 bits, exact. */
__device__ __forceinline__ double uniform_from_words(uint32_t high, uint32_t low) {
  const uint64_t bits = static_cast<uint64_t>(high) << 20 | low >> 12;
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

/* The uniforms of draw `number` of a key. */
struct DrawNumbers {
  double strip;
  double token;
};

__device__ __forceinline__ DrawNumbers draw_numbers(const DrawKey& key, uint32_t number) {
  const uint4 words =
      philox4x32_10(key.seed, make_uint4(number, static_cast<uint32_t>(key.position), key.purpose,
                                         DrawPolicy::kNumbersWord));
  return {uniform_from_words(words.x, words.y), uniform_from_words(words.z, words.w)};
}

/* The lane in whose part of the running sum over lanes `uniform` of the whole lies, and what is left of
 * it there, in every lane; -1: nothing has weight. By a warp. */
struct PickedLane {
  int lane;
  double rest;
};

__device__ __forceinline__ PickedLane pick_lane(double own, double uniform) {
  const double upto = warp_inclusive_sum(own);
  const double target = uniform * __shfl_sync(kAllLanes, upto, kWarpSize - 1);
  const uint32_t heavy = __ballot_sync(kAllLanes, own > 0.0);
  const uint32_t passing = __ballot_sync(kAllLanes, own > 0.0 && upto > target);
  if (heavy == 0) return {-1, 0.0};
  const int lane =
      passing != 0 ? __ffs(static_cast<int>(passing)) - 1 : 31 - __clz(static_cast<int>(heavy));
  return {lane, __shfl_sync(kAllLanes, target - (upto - own), lane)};
}

/* A zone by shared.masses, and what is left of the uniform there; -1 when none has any. By a warp. */
__device__ __forceinline__ int32_t pick_zone(int32_t num_zones,
                                             double uniform,
                                             const DrawShared& shared,
                                             double& rest) {
  const int32_t per_lane = (num_zones + kWarpSize - 1) / kWarpSize;
  const int32_t first = static_cast<int32_t>(threadIdx.x % kWarpSize) * per_lane;
  double own = 0.0;
  for (int32_t zone = first; zone < min(first + per_lane, num_zones); ++zone) {
    own += shared.masses[zone];
  }
  const PickedLane picked = pick_lane(own, uniform);
  if (picked.lane < 0) return -1;
  const int32_t from = picked.lane * per_lane; /* every lane walks the chosen one's zones */
  int32_t chosen = from;
  double left = picked.rest;
  for (int32_t zone = from; zone < min(from + per_lane, num_zones); ++zone) {
    const double mass = shared.masses[zone];
    if (!(mass > 0.0)) continue;
    chosen = zone;
    rest = left;
    if (left < mass) break;
    left -= mass;
  }
  return chosen;
}

/* A token of a strip by the weights of its lanes, and its weight; kNoRunner when none has any. By a
 * warp. */
__device__ __forceinline__ Indexed pick_token(int32_t strip,
                                              double uniform,
                                              const float (&weights)[kGroup]) {
  double upto[kGroup];
  upto[0] = static_cast<double>(weights[0]);
#pragma unroll
  for (int j = 1; j < kGroup; ++j) upto[j] = upto[j - 1] + static_cast<double>(weights[j]);
  const PickedLane picked = pick_lane(upto[kGroup - 1], uniform);
  if (picked.lane < 0) return {0.f, kNoRunner};
  Indexed own = {0.f, kNoRunner}; /* the first that passes, or the last with weight */
#pragma unroll
  for (int j = kGroup - 1; j >= 0; --j) {
    const bool passes = weights[j] > 0.f && (upto[j] > picked.rest || own.index == kNoRunner);
    if (passes) own = {weights[j], strip_token(strip) + j};
  }
  return {__shfl_sync(kAllLanes, own.value, picked.lane),
          __shfl_sync(kAllLanes, own.index, picked.lane)};
}

/* Masses of the strips of a zone under p, in units in which the row's largest logit weighs 1. */
__device__ __forceinline__ Strips strip_masses(const WeightSource& source, int32_t zone) {
  const Strips sums = source.zones.sums[zone];
  const float most = zone_max(source.zones.maxima[zone]);
  Strips masses;
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) {
    const float weight = logit_weight(most, source.law.max, source.law.scale);
    masses.of[i] = sums.of[i] > 0.f ? sums.of[i] * weight : 0.f;
  }
  return masses;
}

__device__ __forceinline__ double whole_of(const Strips& masses) {
  return (static_cast<double>(masses.of[0]) + static_cast<double>(masses.of[1])) +
         (static_cast<double>(masses.of[2]) + static_cast<double>(masses.of[3]));
}

/* The strip of a zone in which `rest` lies. */
__device__ __forceinline__ int32_t pick_strip(const Strips& masses, int32_t zone, double rest) {
  int32_t picked = 0;
  bool found = false;
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) {
    const auto own = static_cast<double>(masses.of[i]);
    if (found || !(own > 0.0)) continue;
    picked = i;
    found = rest < own;
    rest -= own;
  }
  return zone * kStripsPerZone + picked;
}

/* shared.masses of p. All threads of the CTA take part. */
__device__ __forceinline__ void load_masses(const VerifyInputs& in,
                                            const WeightSource& source,
                                            DrawShared& shared) {
  for (int32_t z = threadIdx.x; z < in.num_zones; z += DrawPolicy::kNumThreads) {
    shared.masses[z] = whole_of(strip_masses(source, z));
  }
  __syncthreads();
}

/* The draw of `numbers` from p, whose masses are loaded, with p of the token. By a warp. */
__device__ __forceinline__ Indexed draw_from_target(const VerifyInputs& in,
                                                    const WeightSource& source,
                                                    const DrawNumbers& numbers,
                                                    const DrawShared& shared) {
  double rest = 0.0;
  const int32_t zone = pick_zone(in.num_zones, numbers.strip, shared, rest);
  if (zone < 0) return {0.f, kNoRunner};
  const int32_t strip = pick_strip(strip_masses(source, zone), zone, rest);
  float weights[kGroup];
  load_target_strip(in, source.row, strip, weights);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) weights[j] = probability(source.law, weights[j]);
  return pick_token(strip, numbers.token, weights);
}

/* Sums of the weights of the strips of a zone, the same in every lane. By a warp. */
__device__ __noinline__ Strips sum_strips(const VerifyInputs& in,
                                          const WeightSource& source,
                                          int32_t zone) {
  float own = 0.f;                                                   /* lane i: of strip i */
  if (zone_max(source.zones.maxima[zone]) >= source.law.threshold) { /* for the whole warp */
#pragma unroll 1
    for (int i = 0; i < kStripsPerZone; ++i) {
      float weights[kGroup];
      load_weights(in, source, zone * kStripsPerZone + i, weights);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum += weights[j];
      sum = warp_reduce(sum, SumOp{});
      if (static_cast<int>(threadIdx.x % kWarpSize) == i) own = sum;
    }
  }
  Strips sums;
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) sums.of[i] = __shfl_sync(kAllLanes, own, i);
  return sums;
}

/* shared.masses of the weights. All threads of the CTA take part and get the whole. */
__device__ __noinline__ double sweep_row(const VerifyInputs& in,
                                         const WeightSource& source,
                                         DrawShared& shared) {
  for (int32_t zone = threadIdx.x / kWarpSize; zone < in.num_zones; zone += DrawPolicy::kNumWarps) {
    const Strips masses = sum_strips(in, source, zone);
    if (threadIdx.x % kWarpSize == 0) shared.masses[zone] = whole_of(masses);
  }
  __syncthreads();
  double whole = 0.0;
  for (int32_t zone = threadIdx.x % kWarpSize; zone < in.num_zones; zone += kWarpSize) {
    whole += shared.masses[zone];
  }
  whole = warp_reduce(whole, SumOp{});
  __syncthreads(); /* all have read */
  return whole;
}

/* Draw `number` from the swept weights of a row. By a warp. */
__device__ __noinline__ int32_t draw_from_sweep(const VerifyInputs& in,
                                                const WeightSource& source,
                                                const DrawKey& key,
                                                uint32_t number,
                                                const DrawShared& shared) {
  double rest = 0.0;
  const int32_t zone = pick_zone(in.num_zones, draw_numbers(key, number).strip, shared, rest);
  const int32_t strip = pick_strip(sum_strips(in, source, zone), zone, rest);
  float weights[kGroup];
  load_weights(in, source, strip, weights);
  return pick_token(strip, draw_numbers(key, number).token, weights).index;
}

/* Tries before a sweep, whose draw has that number. */
__device__ __forceinline__ int32_t num_tries(const VerifyInputs& in) {
  return in.low_rank.w2 != nullptr ? DrawPolicy::kTriesLowRank : DrawPolicy::kTries;
}

/* Draw num_tries from the weights themselves, or from p when nothing is left of them. All threads of the
 * CTA take part and get it. */
__device__ __noinline__ int32_t sweep_and_draw(const VerifyInputs& in,
                                               const WeightSource& source,
                                               const DrawKey& key,
                                               DrawShared& shared) {
  __syncthreads(); /* readers of the last round are done */
  const auto number = static_cast<uint32_t>(num_tries(in));
  const bool swept = sweep_row(in, source, shared) > 0.0;
  if (!swept) load_masses(in, source, shared);
  if (threadIdx.x < kWarpSize) {
    const int32_t drawn =
        swept ? draw_from_sweep(in, source, key, number, shared)
              : draw_from_target(in, source, draw_numbers(key, number), shared).index;
    if (threadIdx.x == 0) shared.tokens[0] = drawn;
  }
  __syncthreads();
  return shared.tokens[0];
}

/* The lowest try of a residual behind one rejection that is kept; kNoRunner when none is. All threads of
 * the CTA take part and get it. */
__device__ __forceinline__ int32_t thin_target(const VerifyInputs& in,
                                               const WeightSource& source,
                                               const DrawKey& key,
                                               DrawShared& shared) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const Rejection& rejection = source.rejections[0];
  auto number = static_cast<uint32_t>(warp);
  uint4 words = philox_quad(key.seed, number, key.position, key.purpose);
  DrawNumbers numbers = draw_numbers(key, number); /* while the masses are on their way */
  load_masses(in, source, shared);
#pragma unroll 1
  while (true) {
    const Indexed drawn = draw_from_target(in, source, numbers, shared);
    bool keeps = drawn.index != kNoRunner;
    if (keeps) {
      const float draft =
          draft_probability(in, source.row.req, rejection.row, rejection.law, drawn.index);
      const auto target = static_cast<double>(drawn.value * source.share);
      keeps = uniform_from_word(words.x) * target < target - static_cast<double>(draft);
    }
    if (lane == 0) shared.tokens[warp] = keeps ? drawn.index : kNoRunner;
    __syncthreads();
    const int32_t own = lane < DrawPolicy::kNumWarps ? shared.tokens[lane] : kNoRunner;
    const uint32_t kept = __ballot_sync(kAllLanes, own != kNoRunner);
    if (kept != 0) return __shfl_sync(kAllLanes, own, __ffs(static_cast<int>(kept)) - 1);
    number += DrawPolicy::kNumWarps;
    if (number >= static_cast<uint32_t>(num_tries(in))) return kNoRunner; /* in all warps */
    words = philox_quad(key.seed, number, key.position, key.purpose);
    numbers = draw_numbers(key, number);
    __syncthreads(); /* readers of this round are done */
  }
}

/* The next token from the weights of a row; what was read from `shared` before, all threads have read.
 * All threads of the CTA take part and get it. */
__device__ __forceinline__ int32_t draw_row(const VerifyInputs& in,
                                            const WeightSource& source,
                                            const DrawKey& key,
                                            DrawShared& shared) {
  if (source.num_rejections > 0) {
    const int32_t kept =
        source.num_rejections > 1 ? kNoRunner : thin_target(in, source, key, shared);
    return kept != kNoRunner ? kept : sweep_and_draw(in, source, key, shared);
  }
  const DrawNumbers numbers = draw_numbers(key, 0u);
  load_masses(in, source, shared);
  if (threadIdx.x < kWarpSize) {
    const int32_t drawn = draw_from_target(in, source, numbers, shared).index;
    if (threadIdx.x == 0) shared.tokens[0] = drawn;
  }
  __syncthreads();
  return shared.tokens[0];
}

}  // namespace dspark
