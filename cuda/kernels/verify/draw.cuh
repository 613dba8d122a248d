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
  static constexpr int kNumThreads = 256;
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

__device__ __noinline__ PickedLane pick_lane(double own, double uniform) {
  const double upto = warp_inclusive_sum(own);
  const double target = uniform * __shfl_sync(kAllLanes, upto, kWarpSize - 1);
  const uint32_t heavy = __ballot_sync(kAllLanes, own > 0.0);
  const uint32_t passing = __ballot_sync(kAllLanes, own > 0.0 && upto > target);
  if (heavy == 0) return {-1, 0.0};
  const int lane =
      passing != 0 ? __ffs(static_cast<int>(passing)) - 1 : 31 - __clz(static_cast<int>(heavy));
  return {lane, __shfl_sync(kAllLanes, target - (upto - own), lane)};
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

/* What is drawn from without a sweep: share * p of a row, less q of the draft `rejected` if that is not 0. */
struct DrawFrom {
  TargetRow row;
  const RowLaw* law;
  RowZones zones;
  float share;
  int32_t rejected;
  const RowLaw* draft_law;
};

/* Masses of the strips of a zone under p, in units in which the row's largest logit weighs 1. */
__device__ __forceinline__ Strips strip_masses(const RowLaw& law,
                                               const RowZones& zones,
                                               int32_t zone) {
  const Strips sums = zones.sums[zone];
  const float weight = logit_weight(zone_max(zones.maxima[zone]), law.max, law.scale);
  Strips masses;
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) {
    masses.of[i] = sums.of[i] > 0.f ? sums.of[i] * weight : 0.f;
  }
  return masses;
}

__device__ __forceinline__ double whole_of(const Strips& masses) {
  return (static_cast<double>(masses.of[0]) + static_cast<double>(masses.of[1])) +
         (static_cast<double>(masses.of[2]) + static_cast<double>(masses.of[3]));
}

/* shared.masses of p. All threads of the CTA take part. */
__device__ __forceinline__ void load_zone_masses(const VerifyInputs& in,
                                                 const DrawFrom& from,
                                                 DrawShared& shared) {
#pragma unroll 1
  for (int32_t z = threadIdx.x; z < in.num_zones; z += DrawPolicy::kNumThreads) {
    shared.masses[z] = whole_of(strip_masses(*from.law, from.zones, z));
  }
  __syncthreads();
}

/* A zone by shared.masses, and what is left of the uniform there; -1 when none has any. By a warp. */
__device__ __forceinline__ int32_t pick_zone(int32_t num_zones,
                                             double uniform,
                                             const DrawShared& shared,
                                             double& rest) {
  const int32_t per_lane = (num_zones + kWarpSize - 1) / kWarpSize;
  const int32_t first = static_cast<int32_t>(threadIdx.x % kWarpSize) * per_lane;
  double own = 0.0;
#pragma unroll 1
  for (int32_t zone = first; zone < min(first + per_lane, num_zones); ++zone) {
    own += shared.masses[zone];
  }
  const PickedLane picked = pick_lane(own, uniform);
  if (picked.lane < 0) return -1;
  const int32_t from = picked.lane * per_lane; /* every lane walks the chosen one's zones */
  int32_t chosen = from;
  double left = picked.rest;
#pragma unroll 1
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

/* The draw of `numbers` from p, whose masses are loaded, with its weight under p. By a warp. */
__device__ __forceinline__ Indexed draw_from_target(const VerifyInputs& in,
                                                    const DrawFrom& from,
                                                    const DrawNumbers& numbers,
                                                    const DrawShared& shared) {
  double rest = 0.0;
  const int32_t zone = pick_zone(in.num_zones, numbers.strip, shared, rest);
  if (zone < 0) return {0.f, kNoRunner};
  const int32_t strip = pick_strip(strip_masses(*from.law, from.zones, zone), zone, rest);
  float weights[kGroup];
  load_target_strip(in, from.row, strip, weights);
  const RowLaw law = *from.law;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) weights[j] = probability(law, weights[j]);
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
      const Group weights = load_weights(in, source, zone * kStripsPerZone + i);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum += weights.of[j];
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
  const Group weights = load_weights(in, source, strip);
  return pick_token(strip, draw_numbers(key, number).token, weights.of).index;
}

/* Tries before a sweep, whose draw has that number. */
__device__ __forceinline__ int32_t num_tries(const VerifyInputs& in) {
  return in.low_rank.w2 != nullptr ? DrawPolicy::kTriesLowRank : DrawPolicy::kTries;
}

/* Draw num_tries from the weights themselves, or from p when nothing is left of them. All threads of the
 * CTA take part; warp 0 gets it. */
__device__ __noinline__ int32_t sweep_and_draw(const VerifyInputs& in,
                                               const WeightSource& source,
                                               const DrawKey& key,
                                               DrawShared& shared) {
  __syncthreads(); /* readers of the last round are done */
  const auto number = static_cast<uint32_t>(num_tries(in));
  const bool swept = sweep_row(in, source, shared) > 0.0;
  const DrawFrom from = {source.row, &source.law, source.zones, source.share, 0, nullptr};
  if (!swept) load_zone_masses(in, from, shared);
  if (threadIdx.x >= kWarpSize) return kNoRunner;
  return swept ? draw_from_sweep(in, source, key, number, shared)
               : draw_from_target(in, from, draw_numbers(key, number), shared).index;
}

/* A draw from p without a rejection, which the first warp makes and gets; else the lowest try of the
 * residual that is kept, for all threads of the CTA; kNoRunner when there is none. All take part. */
__device__ __forceinline__ int32_t draw_by_tries(const VerifyInputs& in,
                                                 const DrawFrom& from,
                                                 const DrawKey& key,
                                                 DrawShared& shared) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  load_zone_masses(in, from, shared);
  if (from.rejected == 0 && warp > 0) return kNoRunner;
  const HeldPair held = hold_pair(in, from.row.req, from.rejected);
#pragma unroll 1
  for (auto number = static_cast<uint32_t>(warp); number < static_cast<uint32_t>(num_tries(in));
       number += DrawPolicy::kNumWarps) { /* the same number of rounds for all warps */
    const uint4 words = philox_quad(key.seed, number, key.position, key.purpose);
    const Indexed drawn = draw_from_target(in, from, draw_numbers(key, number), shared);
    if (from.rejected == 0) return drawn.index;
    bool keeps = drawn.index != kNoRunner;
    if (keeps) {
      const float draft =
          draft_probability(in, from.row.req, from.rejected, *from.draft_law, held, drawn.index);
      const auto target = static_cast<double>(drawn.value * from.share);
      keeps = uniform_from_word(words.x) * target < target - static_cast<double>(draft);
    }
    if (lane == 0) shared.tokens[warp] = keeps ? drawn.index : kNoRunner;
    __syncthreads();
    const int32_t own = lane < DrawPolicy::kNumWarps ? shared.tokens[lane] : kNoRunner;
    const uint32_t kept = __ballot_sync(kAllLanes, own != kNoRunner);
    if (kept != 0) return __shfl_sync(kAllLanes, own, __ffs(static_cast<int>(kept)) - 1);
    __syncthreads(); /* all have read */
  }
  return kNoRunner;
}

}  // namespace dspark
