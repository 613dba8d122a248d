/*
 * The coupled rule's race (common/philox.cuh) in the one read of the logits.
 *
 * Score of a token: l / T - ln E_v in units of ln 2; the largest wins. A lane's part of a strip, 8
 * neighbours, lies in one noise zone, so that no score of it is above its largest logit / T - ln least:
 * one fma for each strip says whether anything in the lane's hands may beat what its CTA has seen of the
 * row. Hardly ever it does; then the same is asked of its quads, and those left are run, one quad of each
 * lane at a time, a Philox call for their noise each, until none is left. Where nothing was seen, the
 * lanes begin with their most promising quads: behind the best of those few remain. What is passed over
 * cannot be the winner, so that the winner depends on no order.
 *
 * Noise: a lane makes the minima of a strip's four noise zones from one counter, a warp those of eight of
 * its zones at once, while logits are on their way.
 *
 * Per zone: some 60 instructions of a warp, noise included; per round of quads some 300. Of a flat law a
 * row's few dozen quads are run: its 152k tokens cost what a few thousand would.
 */
#pragma once

#include "kernels/verify/zone_row.cuh"

namespace dspark {

constexpr int kNoiseZonesPerStrip = kStrip / kNoiseZone;
constexpr int kLanesPerNoiseZone = kWarpSize / kNoiseZonesPerStrip;
static_assert(kNoiseZonesPerStrip == kZonesPerCounter && kNoiseZone % kGroup == 0);

/* The best scores that the CTA has seen, by row: (row + 1) << 32 | ordered score; newer rows win. */
struct RowBests {
  unsigned long long slots[ZonesPolicy::kBestSlots];
};

__device__ __forceinline__ float seen_best(const RowBests& bests, int64_t row) {
  const volatile unsigned long long* slot = &bests.slots[row % ZonesPolicy::kBestSlots];
  const unsigned long long seen = *slot;
  return static_cast<uint32_t>(seen >> 32) == static_cast<uint32_t>(row + 1)
             ? from_ordered(static_cast<int32_t>(static_cast<uint32_t>(seen) ^ 0x80000000u))
             : -INFINITY;
}

__device__ __forceinline__ void note_best(RowBests& bests, int64_t row, float score) {
  const auto key = static_cast<uint32_t>(ordered(score)) ^ 0x80000000u;
  atomicMax(&bests.slots[row % ZonesPolicy::kBestSlots],
            static_cast<unsigned long long>(row + 1) << 32 | key);
}

/* The minima of the noise zones of a warp's next zones, a strip's in each entry. */
struct WarpNoise {
  static constexpr int kZones = kWarpSize / kStripsPerZone;
  float4 leasts[kWarpSize];
  float4 lifts[kWarpSize]; /* -log2 of them */
};

struct RaceShared {
  RowBests bests;
  WarpNoise noise[ZonesPolicy::kWarpsPerCta];
};

/* A warp's race in a row. */
struct RowRace {
  int32_t first; /* the noise is of the zones first + i * kWarpsPerCta */
  Indexed best;  /* of this lane */
  float seen;    /* of the CTA, as far as the warp knows */
};

/* What a score's bound must reach, given that `seen` was seen. */
__device__ __forceinline__ float race_floor(float seen) {
  return seen - ZonesPolicy::kMargin * (1.f + 0.1f * fabsf(seen));
}

/* The entry of the warp's noise for `zone`; out of range when it has none. */
__device__ __forceinline__ int noise_entry(const RowRace& race, int32_t zone) {
  return (zone - race.first) / ZonesPolicy::kWarpsPerCta;
}

__device__ __forceinline__ void load_noise(const ZoneRow& open,
                                           int32_t first,
                                           WarpNoise& noise,
                                           RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  race.first = first;
  const int32_t zone = first + lane / kStripsPerZone * ZonesPolicy::kWarpsPerCta;
  const float4 leasts = zone_leasts(open.key.seed, zone * kStripsPerZone + lane % kStripsPerZone,
                                    open.key.position, open.key.purpose);
  __syncwarp(); /* all have read the last */
  noise.leasts[lane] = leasts;
  noise.lifts[lane] =
      make_float4(-log2f(leasts.x), -log2f(leasts.y), -log2f(leasts.z), -log2f(leasts.w));
  __syncwarp();
}

/* Of the noise zone of this lane's part of a strip. */
__device__ __forceinline__ float noise_of(const float4& strip) {
  const float* zones = reinterpret_cast<const float*>(&strip);
  return zones[threadIdx.x % kWarpSize / kLanesPerNoiseZone];
}

/* A quad runs, whose noise zone has the minimum `least`. */
__device__ __forceinline__ void run_quad(
    const ZoneRow& open, float least, const float (&logits)[4], int32_t token, RowRace& race) {
  const DrawKey& key = open.key;
  const uint4 drawn =
      philox_quad(key.seed, static_cast<uint32_t>(token / 4), key.position, key.purpose);
  const ZoneNoise noise = {least,
                           zone_least_at(key.seed, token / kNoiseZone, key.position, key.purpose)};
  const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
  const float margin = ZonesPolicy::kMargin * (1.f + 0.1f * fabsf(race.seen));
  uint32_t left = 0; /* tokens that may reach what was seen */
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    /* The largest noise with which it does. Its own is at least `least` + u. */
    const float latest = exp2_flushed(fmaf(logits[j], open.race_scale, margin - race.seen));
    const float u = static_cast<float>(words[j]) * kTwoPowMinus32;
    const bool has_least = token % kNoiseZone + j == noise.least_at;
    if (has_least || u * 0.9999f <= latest - least) left |= 1u << j;
  }
#pragma unroll 1
  for (; left != 0; left &= left - 1) {
    const int j = __ffs(static_cast<int>(left)) - 1;
    const uint32_t word = j < 2 ? (j == 0 ? words[0] : words[1]) : (j == 2 ? words[2] : words[3]);
    const float logit = j < 2 ? (j == 0 ? logits[0] : logits[1]) : (j == 2 ? logits[2] : logits[3]);
    const float e = zone_exponential(noise, token % kNoiseZone + j, word);
    race_step(race.best, fmaf(logit, open.race_scale, -log2f(e)), token + j);
  }
}

/* The quads of this lane whose bounds reach `floor`, less those in `done`. */
template <typename T>
__device__ __forceinline__ uint32_t quads_left(const ZoneRow& open,
                                               const ZoneWords<T>& words,
                                               const float (&lifts)[kStripsPerZone],
                                               float floor,
                                               uint32_t done) {
  uint32_t left = 0;
#pragma unroll
  for (int quad = 0; quad < kQuadsPerLane; ++quad) {
    const float bound = fmaf(words.quad_max(quad), open.race_scale, lifts[quad / 2]);
    if (bound >= floor && bound > -INFINITY) left |= 1u << quad;
  }
  return left & ~done;
}

/* Something of a zone may win: its quads run. The whole warp takes part. */
template <typename T>
__device__ __forceinline__ void run_zone(const ZoneRow& open,
                                         const ZoneWords<T>& words,
                                         int32_t zone,
                                         const float4* leasts, /* of its strips */
                                         const float (&lifts)[kStripsPerZone],
                                         RowBests& bests,
                                         RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  float floor = race_floor(race.seen);
  if (race.seen == -INFINITY) { /* only the most promising */
    floor = -INFINITY;
#pragma unroll
    for (int quad = 0; quad < kQuadsPerLane; ++quad) {
      floor = fmaxf(floor, fmaf(words.quad_max(quad), open.race_scale, lifts[quad / 2]));
    }
  }
  uint32_t done = 0;
#pragma unroll 1
  while (true) {
    const uint32_t left = quads_left(open, words, lifts, floor, done);
    if (!__any_sync(kAllLanes, left != 0)) break;
    if (left != 0) {
      const int quad = __ffs(static_cast<int>(left)) - 1;
      done |= 1u << quad;
      float logits[4];
      words.pick_quad(quad, logits);
      const int32_t token = strip_token(zone * kStripsPerZone + quad / 2) + quad % 2 * 4;
      run_quad(open, noise_of(leasts[quad / 2]), logits, token, race);
    }
    const float best = from_ordered(__reduce_max_sync(kAllLanes, ordered(race.best.value)));
    if (best > race.seen) {
      race.seen = best;
      if (lane == 0) note_best(bests, open.row.index, best);
    }
    const float other = __shfl_sync(kAllLanes, seen_best(bests, open.row.index), 0);
    race.seen = fmaxf(race.seen, other);
    floor = race_floor(race.seen);
  }
}

/* A zone enters the race of its row; strip_max are this lane's. The warp's zones of a row come in
 * ascending order. */
template <typename T>
__device__ __forceinline__ void race_zone(const ZoneRow& open,
                                          const ZoneWords<T>& words,
                                          int32_t zone,
                                          const float (&strip_max)[kStripsPerZone],
                                          RaceShared& shared,
                                          RowRace& race) {
  WarpNoise& noise = shared.noise[threadIdx.x / kWarpSize];
  int entry = noise_entry(race, zone);
  if (entry < 0 || entry >= WarpNoise::kZones) {
    load_noise(open, zone, noise, race);
    entry = 0;
  }
  const float seen = __shfl_sync(kAllLanes, seen_best(shared.bests, open.row.index), 0);
  race.seen = fmaxf(race.seen, seen);
  float lifts[kStripsPerZone];
  float bound = -INFINITY;
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) {
    lifts[i] = noise_of(noise.lifts[entry * kStripsPerZone + i]);
    bound = fmaxf(bound, fmaf(strip_max[i], open.race_scale, lifts[i]));
  }
  if (!__any_sync(kAllLanes, bound >= race_floor(race.seen))) return;
  run_zone(open, words, zone, &noise.leasts[entry * kStripsPerZone], lifts, shared.bests, race);
}

/* Before the first zone of a row. */
__device__ __forceinline__ void open_race(RowRace& race) {
  race.first = -WarpNoise::kZones * ZonesPolicy::kWarpsPerCta; /* no zone's noise */
  race.best = empty_race();
  race.seen = -INFINITY;
}

/* The warp's part of the row is through: its best goes to the entry of its zone. */
__device__ __forceinline__ void close_race(const ZoneRow& open,
                                           int32_t num_zones,
                                           ZoneRace* races,
                                           const RowRace& race) {
  const Indexed best = warp_reduce(race.best, ArgmaxOp{});
  if (threadIdx.x % kWarpSize != 0 || best.index == kNoRunner) return;
  races[open.row.index * num_zones + best.index / kZone] = {best.value, best.index};
}

}  // namespace dspark
