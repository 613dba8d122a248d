/*
 * Draws without noise per token: a zone by the inverse of the distribution function of the zones'
 * masses, then a token by that of the weights inside it, which their sums by strip shorten to one strip.
 * Two uniforms, 256 logits read.
 *
 * The masses of a target law lie ready (zones.cuh, or the filters). The residual max(share * p - q, 0)
 * is drawn by thinning: a try draws v from p and keeps it with probability 1 - q(v) / (share * p(v));
 * what is kept has the law of the residual, for any law q of which one value is known at a time, and
 * without the cancellation that a difference of masses would bring. A warp makes a try, all at once,
 * and the kept one of the lowest number wins, so that the result depends on no order. A try succeeds
 * with the mass of the residual: hardly ever does a request need more than a round. After kTries
 * without success (or with several rejections, whose residual p does not bound) the row is swept:
 * masses of the weights of all its zones, then the same two steps.
 *
 * Exact: sums inside a lane are f32 of at most 8 weights, the running sums above them f64, and what a
 * strip's share of the uniform leaves is stretched over its weights, so that a token's share is right to
 * some 1e-7 of itself, however small it is. The uniforms have 52 bits.
 *
 * Bytes: a strip per try, from L2; a sweep reads the row. Limited by latency, and by how fast code that
 * runs once comes from the caches: loops stay rolled.
 */
#pragma once

#include "kernels/verify/weights.cuh"

namespace dspark {

struct DrawPolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kTries = 64; /* a multiple of kNumWarps */
  static constexpr uint32_t kNumbersWord = 2u; /* the fourth word of counters */
};

struct DrawShared {
  Strips masses[kMaxZones];
  int32_t tokens[DrawPolicy::kNumWarps];
  float sum_scratch[DrawPolicy::kNumWarps];
};

/* u in (0, 1) of 52 bits, exact. */
__device__ __forceinline__ double uniform_from_words(uint32_t high, uint32_t low) {
  const uint64_t bits = static_cast<uint64_t>(high) << 20 | low >> 12;
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

/* The uniforms of draw `number` of a key. */
struct DrawNumbers {
  double zone;
  double token;
};

__device__ __forceinline__ DrawNumbers draw_numbers(const DrawKey& key, uint32_t number) {
  const uint4 words =
      philox4x32_10(key.seed, make_uint4(number, static_cast<uint32_t>(key.position), key.purpose,
                                         DrawPolicy::kNumbersWord));
  return {uniform_from_words(words.x, words.y), uniform_from_words(words.z, words.w)};
}

/* Something picked by weight, and where in [0, 1) of its own part of the running sum the pick fell. */
struct Picked {
  int32_t index; /* -1: nothing has weight */
  double within;
};

/* The lane in whose part of the running sum over lanes `uniform` of the whole lies. */
__device__ __forceinline__ Picked pick_lane(double own, double uniform) {
  const double upto = warp_inclusive_sum(own);
  const double target = uniform * __shfl_sync(kAllLanes, upto, kWarpSize - 1);
  const uint32_t heavy = __ballot_sync(kAllLanes, own > 0.0);
  const uint32_t behind = __ballot_sync(kAllLanes, own > 0.0 && upto > target);
  if (heavy == 0) return {-1, 0.0};
  const int lane =
      behind != 0 ? __ffs(static_cast<int>(behind)) - 1 : 31 - __clz(static_cast<int>(heavy));
  const double within = (target - (upto - own)) / own;
  return {lane, __shfl_sync(kAllLanes, within, lane)};
}

/* One of `count` by its weight(i), which is called in ascending order. By one thread. */
template <typename F>
__device__ __forceinline__ Picked pick_of(int32_t count, double within, double whole, F&& weight) {
  double rest = within * whole;
  Picked picked = {-1, 0.0};
  for (int32_t i = 0; i < count; ++i) {
    const auto own = static_cast<double>(weight(i));
    if (!(own > 0.0)) continue;
    picked = {i, fmin(fmax(rest / own, 0.0), 1.0)};
    rest -= own;
    if (rest < 0.0) break;
  }
  return picked;
}

/* A zone by its mass(zone). By a warp. */
template <typename F>
__device__ __forceinline__ int32_t pick_zone(int32_t num_zones, double uniform, F&& mass) {
  const int32_t per_lane = (num_zones + kWarpSize - 1) / kWarpSize;
  const int32_t first = static_cast<int32_t>(threadIdx.x % kWarpSize) * per_lane;
  const int32_t count = max(min(per_lane, num_zones - first), 0);
  double own = 0.0;
#pragma unroll 4
  for (int32_t i = 0; i < count; ++i) own += static_cast<double>(mass(first + i));
  const Picked lane = pick_lane(own, uniform);
  if (lane.index < 0) return -1;
  Picked picked = {-1, 0.0};
  if (static_cast<int>(threadIdx.x % kWarpSize) == lane.index) {
    picked = pick_of(count, lane.within, own, [&](int32_t i) { return mass(first + i); });
  }
  return __shfl_sync(kAllLanes, first + picked.index, lane.index);
}

/* A token of a strip by the weights of its lanes, and its weight; kNoRunner when none has any. By a
 * warp. */
__device__ __forceinline__ Indexed pick_token(int32_t strip,
                                              double uniform,
                                              const float (&weights)[kGroup]) {
  double own = 0.0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) own += static_cast<double>(weights[j]);
  const Picked lane = pick_lane(own, uniform);
  if (lane.index < 0) return {0.f, kNoRunner};
  double rest = lane.within * own;
  Indexed picked = {0.f, kNoRunner};
  bool found = false;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (found || !(weights[j] > 0.f)) continue;
    picked = {weights[j], strip_token(strip) + j};
    rest -= static_cast<double>(weights[j]);
    found = rest < 0.0;
  }
  return {__shfl_sync(kAllLanes, picked.value, lane.index),
          __shfl_sync(kAllLanes, picked.index, lane.index)};
}

/* The strip of a zone by their sums, the same in every lane. */
__device__ __forceinline__ Picked pick_strip(const Strips& sums, double uniform) {
  const double whole = (static_cast<double>(sums.of[0]) + static_cast<double>(sums.of[1])) +
                       (static_cast<double>(sums.of[2]) + static_cast<double>(sums.of[3]));
  return pick_of(kStripsPerZone, uniform, whole, [&](int32_t i) {
    return i < 2 ? (i == 0 ? sums.of[0] : sums.of[1]) : (i == 2 ? sums.of[2] : sums.of[3]);
  });
}

/* Draw `number` from p, with p of the token. By a warp. */
__device__ __noinline__ Indexed draw_from_target(const VerifyInputs& in,
                                                 const WeightSource& source,
                                                 const DrawKey& key,
                                                 uint32_t number) {
  const DrawNumbers numbers = draw_numbers(key, number);
  const RowLaw& law = source.law;
  const RowZones& zones = source.zones;
  const int32_t zone = pick_zone(in.num_zones, numbers.zone, [&](int32_t z) {
    return zone_mass(zones.maxima[z], zones.sums[z], law.max, law.scale);
  });
  if (zone < 0) return {0.f, kNoRunner};
  const Picked strip = pick_strip(zones.sums[zone], numbers.token);
  const int32_t at = zone * kStripsPerZone + strip.index;
  float weights[kGroup];
  load_target_strip(in, source.row, at, weights);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) weights[j] = probability(law, weights[j]);
  return pick_token(at, strip.within, weights);
}

/* shared.masses: the masses of the weights of all strips. All threads of the CTA take part. */
__device__ __noinline__ void sweep_row(const VerifyInputs& in,
                                       const WeightSource& source,
                                       DrawShared& shared) {
  __syncthreads(); /* readers of an earlier use are done */
  for (int32_t zone = threadIdx.x / kWarpSize; zone < in.num_zones; zone += DrawPolicy::kNumWarps) {
    const bool kept = zone_max(source.zones.maxima[zone]) >= source.law.threshold;
    if (kept) touch_zone(in.target, source.row.index, zone, in.vocab_size);
#pragma unroll 1
    for (int i = 0; i < kStripsPerZone; ++i) {
      float sum = 0.f;
      if (kept) {
        float weights[kGroup];
        load_weights(in, source, zone * kStripsPerZone + i, weights);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) sum += weights[j];
        sum = warp_reduce(sum, SumOp{});
      }
      if (threadIdx.x % kWarpSize == 0) shared.masses[zone].of[i] = sum;
    }
  }
  __syncthreads();
}

/* The sum of the weights of a row. All threads of the CTA take part and get it. */
__device__ __forceinline__ float row_mass(const VerifyInputs& in,
                                          const WeightSource& source,
                                          DrawShared& shared) {
  sweep_row(in, source, shared);
  float sum = 0.f;
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += DrawPolicy::kNumThreads) {
    sum += zone_sum(shared.masses[zone]);
  }
  return cta_reduce<DrawPolicy::kNumThreads>(sum, SumOp{}, 0.f, shared.sum_scratch);
}

/* The lowest try of a residual behind one rejection that is kept; kNoRunner when none of kTries is.
 * All threads of the CTA take part and get it. */
__device__ __forceinline__ int32_t thin_target(const VerifyInputs& in,
                                               const WeightSource& source,
                                               const DrawKey& key,
                                               DrawShared& shared) {
  const int warp = threadIdx.x / kWarpSize;
  const Rejection& rejection = source.rejections[0];
#pragma unroll 1
  for (int first = 0; first < DrawPolicy::kTries; first += DrawPolicy::kNumWarps) {
    const auto number = static_cast<uint32_t>(first + warp);
    const Indexed drawn = draw_from_target(in, source, key, number);
    bool keeps = drawn.index != kNoRunner;
    if (keeps) {
      const double target = static_cast<double>(drawn.value * source.share);
      const float draft =
          draft_probability(in, source.row.req, rejection.row, rejection.law, drawn.index);
      const uint4 words = philox_quad(key.seed, number, key.position, key.purpose);
      keeps = uniform_from_word(words.x) * target < target - static_cast<double>(draft);
    }
    __syncthreads(); /* readers of an earlier round are done */
    if (threadIdx.x % kWarpSize == 0) shared.tokens[warp] = keeps ? drawn.index : kNoRunner;
    __syncthreads();
    const int lane = threadIdx.x % kWarpSize;
    const int32_t own = lane < DrawPolicy::kNumWarps ? shared.tokens[lane] : kNoRunner;
    const uint32_t kept = __ballot_sync(kAllLanes, own != kNoRunner);
    if (kept != 0) return __shfl_sync(kAllLanes, own, __ffs(static_cast<int>(kept)) - 1);
  }
  return kNoRunner;
}

/* Draw kTries from the swept weights of a row, or from p when nothing is left of them. By a warp. */
__device__ __noinline__ int32_t draw_from_masses(const VerifyInputs& in,
                                                 const WeightSource& source,
                                                 const DrawKey& key,
                                                 const DrawShared& shared) {
  const DrawNumbers numbers = draw_numbers(key, DrawPolicy::kTries);
  const int32_t zone = pick_zone(in.num_zones, numbers.zone,
                                 [&](int32_t z) { return zone_sum(shared.masses[z]); });
  if (zone < 0) return draw_from_target(in, source, key, DrawPolicy::kTries).index;
  const Picked strip = pick_strip(shared.masses[zone], numbers.token);
  const int32_t at = zone * kStripsPerZone + strip.index;
  float weights[kGroup];
  load_weights(in, source, at, weights);
  return pick_token(at, strip.within, weights).index;
}

/* The next token from the weights of a row. All threads of the CTA take part and get it. */
__device__ __forceinline__ int32_t draw_row(const VerifyInputs& in,
                                            const WeightSource& source,
                                            const DrawKey& key,
                                            DrawShared& shared) {
  if (source.num_rejections == 1) {
    const int32_t kept = thin_target(in, source, key, shared);
    if (kept != kNoRunner) return kept;
  }
  if (source.num_rejections > 0) sweep_row(in, source, shared);
  if (threadIdx.x < kWarpSize) {
    const int32_t drawn = source.num_rejections > 0
                              ? draw_from_masses(in, source, key, shared)
                              : draw_from_target(in, source, key, 0u).index;
    if (threadIdx.x == 0) shared.tokens[0] = drawn;
  }
  __syncthreads();
  return shared.tokens[0];
}

}  // namespace dspark
