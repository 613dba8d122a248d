/*
 * The coupled rule's draw from a law with filters: the race of common/philox.cuh over a row whose
 * threshold is known only now (without filters it is run in the one read of the logits, zones.cuh).
 *
 * The minima of a strip's noise zones are known from one Philox call, and no weight in the strip is above
 * p(its largest logit), so that the least of them / that is a bound on all arrivals in the strip. Zones
 * are taken in ascending order of their strips' bounds, a warp each, until the bound is behind the winner
 * so far. The result is the argmin over all tokens, whatever the order. One thread per zone ranks the
 * bounds: num_zones^2 comparisons for the CTA.
 */
#pragma once

#include "kernels/verify/draw.cuh"

namespace dspark {

struct RacePolicy {
  static constexpr int kNumThreads = DrawPolicy::kNumThreads;
  static constexpr int kNumWarps = DrawPolicy::kNumWarps;
  static constexpr float kMargin = 1.00001f; /* on bounds, for the rounding of weights */
};

struct RowRaceShared {
  float bounds[kMaxZones];
  uint16_t order[kMaxZones];
  uint32_t best; /* bits of the smallest arrival so far */
  Indexed argmin_scratch[RacePolicy::kNumWarps];
};

/* The warp's zone runs: the winner with its arrival, in every lane; arrivals above `cutoff` need not
 * take part. */
__device__ __forceinline__ Indexed race_zone_of_law(const VerifyInputs& in,
                                                    const TargetRow& row,
                                                    const RowLaw& law,
                                                    const Strips& maxima,
                                                    const DrawKey& key,
                                                    int32_t zone,
                                                    float cutoff) {
  Indexed best = {INFINITY, kNoRunner};
#pragma unroll 1
  for (int i = 0; i < kStripsPerZone; ++i) {
    const int32_t strip = zone * kStripsPerZone + i;
    const int32_t first = strip_token(strip);
    ZoneNoise noise = {zone_least(key.seed, first / kNoiseZone, key.position, key.purpose), 0};
    const float latest = fminf(cutoff, best.value) * RacePolicy::kMargin;
    const float most = probability(law, maxima.of[i]);
    if (!__any_sync(kAllLanes, most > 0.f && noise.least <= latest * most)) continue;
    noise.least_at = zone_least_at(key.seed, first / kNoiseZone, key.position, key.purpose);
    float logits[kGroup];
    load_target_strip(in, row, strip, logits);
#pragma unroll
    for (int quad = 0; quad < kGroup / 4; ++quad) {
      float probs[4];
      float largest = 0.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        probs[j] = probability(law, logits[quad * 4 + j]);
        largest = fmaxf(largest, probs[j]);
      }
      if (!(largest > 0.f && noise.least <= latest * largest)) continue;
      const uint4 drawn =
          philox_quad(key.seed, static_cast<uint32_t>(first / 4 + quad), key.position, key.purpose);
      const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!(probs[j] > 0.f)) continue;
        const int32_t token = first + quad * 4 + j;
        const float arrival = zone_exponential(noise, token % kNoiseZone, words[j]) / probs[j];
        best = ArgminOp{}(best, Indexed{arrival, token});
      }
    }
    best = warp_reduce(best, ArgminOp{}); /* the bound of the strips to come */
  }
  return best;
}

/* A bound on all arrivals of a strip; infinite where none can arrive. */
__device__ __forceinline__ float strip_bound(const RowLaw& law,
                                             const DrawKey& key,
                                             int32_t strip,
                                             float max) {
  static_assert(kStrip == kZonesPerCounter * kNoiseZone);
  const float largest = probability(law, max);
  if (!(largest > 0.f)) return INFINITY;
  const float4 leasts = zone_leasts(key.seed, strip, key.position, key.purpose);
  return fminf(fminf(leasts.x, leasts.y), fminf(leasts.z, leasts.w)) / largest;
}

/* The coupled token of a row; kNoRunner when no weight is above 0. All threads of the CTA take part and
 * get it. */
__device__ __noinline__ int32_t race_row(const VerifyInputs& in,
                                         const TargetRow& row,
                                         const RowLaw& law,
                                         const Strips* maxima,
                                         const DrawKey& key,
                                         RowRaceShared& shared) {
  __syncthreads(); /* readers of an earlier use are done */
  const int32_t num_strips = in.num_zones * kStripsPerZone;
  const int32_t own = static_cast<int32_t>(threadIdx.x); /* whole zones of a warp's lanes */
#pragma unroll 1
  for (int32_t first = 0; first < num_strips; first += RacePolicy::kNumThreads) {
    const int32_t strip = first + own;
    const bool exists = strip < num_strips;
    const int part = strip % kStripsPerZone;
    const int32_t zone = strip / kStripsPerZone;
    float bound = exists ? strip_bound(law, key, strip, maxima[zone].of[part]) : INFINITY;
    bound = warp_reduce<kStripsPerZone>(bound, MinOp{});
    if (exists && part == 0) shared.bounds[zone] = bound;
  }
  if (threadIdx.x == 0) shared.best = __float_as_uint(INFINITY);
  __syncthreads();
#pragma unroll 1
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += RacePolicy::kNumThreads) {
    const float bound = shared.bounds[zone];
    int32_t rank = 0;
#pragma unroll 1
    for (int32_t other = 0; other < in.num_zones; ++other) {
      const float value = shared.bounds[other];
      rank += value < bound || (value == bound && other < zone);
    }
    shared.order[rank] = static_cast<uint16_t>(zone);
  }
  __syncthreads();

  Indexed best = {INFINITY, kNoRunner};
#pragma unroll 1
  for (int32_t i = threadIdx.x / kWarpSize; i < in.num_zones; i += RacePolicy::kNumWarps) {
    const int32_t zone = shared.order[i];
    const float bound = shared.bounds[zone];
    const uint32_t bits = *static_cast<volatile uint32_t*>(&shared.best);
    const float cutoff = __shfl_sync(kAllLanes, __uint_as_float(bits), 0);
    if (bound == INFINITY || bound > cutoff * RacePolicy::kMargin) break;
    const Indexed winner = race_zone_of_law(in, row, law, maxima[zone], key, zone, cutoff);
    best = ArgminOp{}(best, winner);
    if (threadIdx.x % kWarpSize == 0) atomicMin(&shared.best, __float_as_uint(winner.value));
  }
  best = cta_reduce<RacePolicy::kNumThreads>(best, ArgminOp{}, Indexed{INFINITY, kNoRunner},
                                             shared.argmin_scratch);
  return best.index;
}

}  // namespace dspark
