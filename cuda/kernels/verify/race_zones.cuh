/*
 * The coupled rule's race (common/philox.cuh) in the one read of the logits.
 *
 * Score of a token: l / T - ln E_v in units of ln 2; the largest wins. A lane's part of a strip, 8
 * neighbours, lies in one noise zone, so that no score of it is above its largest logit / T - ln least:
 * one fma for each strip says whether anything in the lane's hands may beat what its CTA has seen of the
 * row. Where something may and nothing was seen, the tokens that have their noise zone's least E are
 * looked at first, since theirs is known: the best of these sixteen scores is one that the zone has. Then
 * the bound is asked of quads, and those left wait in a queue of the warp until 32 of them can draw their noise side by side,
 * or the row is through. What is passed over cannot be the winner, so that the winner depends on no order.
 *
 * Noise: a lane makes the minima of a strip's four noise zones from one counter, a warp those of eight
 * of its zones at once, and whose they are in one zone, both of the first zone while its logits are on
 * their way.
 *
 * Per zone: some 50 instructions of a warp, noise included; per batch of quads some 300, behind which
 * hardly any token is left for a logarithm. Of a flat law a row's hundred quads are run, of 38 thousand.
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

constexpr int kNoiseZonesPerZone = kStripsPerZone * kNoiseZonesPerStrip;

/* The minima of the noise zones of a warp's next zones, a strip's in each entry. */
struct WarpNoise {
  static constexpr int kZones = kWarpSize / kStripsPerZone;
  float4 lifts[kWarpSize]; /* -log2, kMargin exact */
  uint4 words[kWarpSize];  /* that they are made from */
  int32_t whose
      [kNoiseZonesPerZone]; /* the tokens that have them, of one zone; relative to the noise zone */
};

/* A quad that may hold its row's winner. */
struct Runner {
  int32_t token; /* first of the quad */
  uint32_t least_word;
};

/* Quads of a warp's zones of one row. */
struct RaceQueue {
  static constexpr int kCapacity = 2 * kWarpSize;
  float4 logits[kCapacity];
  Runner runners[kCapacity];
};

struct RaceShared {
  RowBests bests;
  WarpNoise noise[ZonesPolicy::kWarpsPerCta];
  RaceQueue queues[ZonesPolicy::kWarpsPerCta];
};

/* A warp's race in a row. */
struct RowRace {
  int32_t first; /* the noise is of the zones first + i * kWarpsPerCta */
  int32_t whose; /* the zone that WarpNoise::whose is of */
  int32_t count; /* of the queue */
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

__device__ __forceinline__ float log2_fast(float x) {
  float result = 0.f;
#ifdef __CUDA_ARCH__
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
#endif
  return result;
}

/* -log2 of E / kNoiseZone, E = -log1p(-u), to 2e-5: a series where log2(1 - u) would be too coarse. */
__device__ __forceinline__ float lift_from_word(uint32_t word) {
  constexpr float kLn2 = 0.6931471806f;
  static_assert(kNoiseZone == 64);
  const float u = (static_cast<float>(word) + 0.5f) * kTwoPowMinus32;
  const float rest = (static_cast<float>(~word) + 0.5f) * kTwoPowMinus32;
  const float small = fmaf(u * u, fmaf(u, 1.f / 3.f, 0.5f), u);
  const float e = word < 1u << 27 ? small : -kLn2 * log2_fast(rest);
  return 6.f - log2_fast(e);
}

__device__ __forceinline__ void load_noise(const DrawKey key, int32_t first, WarpNoise& noise) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t zone = first + lane / kStripsPerZone * ZonesPolicy::kWarpsPerCta;
  const auto strip = static_cast<uint32_t>(zone * kStripsPerZone + lane % kStripsPerZone);
  const uint4 words = philox4x32_10(
      key.seed, make_uint4(strip, static_cast<uint32_t>(key.position), key.purpose, kMinimaWord));
  __syncwarp(); /* all have read the last */
  noise.words[lane] = words;
  noise.lifts[lane] = make_float4(lift_from_word(words.x), lift_from_word(words.y),
                                  lift_from_word(words.z), lift_from_word(words.w));
  __syncwarp();
}

__device__ __noinline__ void load_whose(const DrawKey key, int32_t zone, WarpNoise& noise) {
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpSize);
  const int32_t at =
      zone_least_at(key.seed, zone * kNoiseZonesPerZone + lane, key.position, key.purpose);
  __syncwarp(); /* all have read the last */
  if (lane < kNoiseZonesPerZone) noise.whose[lane] = at;
  __syncwarp();
}

/* Of the noise zone of this lane's part of a strip. */
__device__ __forceinline__ float lift_of(const float4& strip) {
  const float* zones = reinterpret_cast<const float*>(&strip);
  return zones[threadIdx.x % kWarpSize / kLanesPerNoiseZone];
}

__device__ __forceinline__ uint32_t word_of(const uint4& strip) {
  const uint32_t* zones = reinterpret_cast<const uint32_t*>(&strip);
  return zones[threadIdx.x % kWarpSize / kLanesPerNoiseZone];
}

__device__ __forceinline__ int32_t whose_of(const WarpNoise& noise, int strip) {
  return noise.whose[strip * kNoiseZonesPerStrip +
                     static_cast<int>(threadIdx.x) % kWarpSize / kLanesPerNoiseZone];
}

/* A quad runs: its best token that may reach what was seen. */
__device__ __forceinline__ Indexed
run_quad(const DrawKey key, float race_scale, float seen, const float4 quad, const Runner runner) {
  const int32_t token = runner.token;
  const uint4 drawn =
      philox_quad(key.seed, static_cast<uint32_t>(token / 4), key.position, key.purpose);
  const ZoneNoise noise = {exponential_from_word(runner.least_word) * (1.f / kNoiseZone),
                           zone_least_at(key.seed, token / kNoiseZone, key.position, key.purpose)};
  const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
  const float logits[4] = {quad.x, quad.y, quad.z, quad.w};
  const float margin = ZonesPolicy::kMargin * (1.f + 0.1f * fabsf(seen));
  Indexed best = empty_race();
  uint32_t left = 0; /* tokens that may reach what was seen */
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    /* The largest noise with which it does. Its own is `least`, or at least `least` + u. */
    const float latest = exp2_flushed(fmaf(logits[j], race_scale, margin - seen));
    const bool has_least = token % kNoiseZone + j == noise.least_at;
    const float u = has_least ? 0.f : static_cast<float>(words[j]) * kTwoPowMinus32;
    if (u * 0.9999f <= latest - noise.least) left |= 1u << j;
  }
#pragma unroll 1
  for (; left != 0; left &= left - 1) {
    const int j = __ffs(static_cast<int>(left)) - 1;
    const uint32_t word = j < 2 ? (j == 0 ? words[0] : words[1]) : (j == 2 ? words[2] : words[3]);
    const float logit = j < 2 ? (j == 0 ? logits[0] : logits[1]) : (j == 2 ? logits[2] : logits[3]);
    const float e = zone_exponential(noise, token % kNoiseZone + j, word);
    race_step(best, fmaf(logit, race_scale, -log2f(e)), token + j);
  }
  return best;
}

/* A score that the row has; the same in every lane, and at least what the CTA has seen then. */
__device__ __forceinline__ void note_seen(const ZoneRow& open,
                                          float score,
                                          RowBests& bests,
                                          RowRace& race) {
  if (score > race.seen) {
    race.seen = score;
    if (threadIdx.x % kWarpSize == 0) note_best(bests, open.row.index, score);
    __syncwarp();
  }
  const float other = __shfl_sync(kAllLanes, seen_best(bests, open.row.index), 0);
  race.seen = fmaxf(race.seen, other);
}

/* The last 32 quads of the queue, or fewer, run. */
__device__ __forceinline__ void run_batch(const ZoneRow& open,
                                          const RaceQueue& queue,
                                          RowBests& bests,
                                          RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t num = min(race.count, kWarpSize);
  race.count -= num;
  __syncwarp(); /* all have pushed */
  if (lane < num) {
    const float4 quad = queue.logits[race.count + lane];
    const Indexed own =
        run_quad(open.key, open.race_scale, race.seen, quad, queue.runners[race.count + lane]);
    race_step(race.best, own.value, own.index);
  }
  __syncwarp(); /* all have read */
  note_seen(open, from_ordered(__reduce_max_sync(kAllLanes, ordered(race.best.value))), bests,
            race);
}

/* This lane's quad `quad` of a zone. */
template <typename T>
__device__ __forceinline__ float4 take_quad(const ZoneWords<T>& words, int quad) {
  float logits[4];
  words.pick_quad(quad, logits);
  return make_float4(logits[0], logits[1], logits[2], logits[3]);
}

__device__ __forceinline__ int32_t quad_token(int32_t zone, int quad) {
  return strip_token(zone * kStripsPerZone + quad / 2) + quad % 2 * 4;
}

/* Bounds on the scores of this lane's quads that reach `floor`, as bits. */
template <typename T>
__device__ __forceinline__ uint32_t quads_that_reach(const ZoneRow& open,
                                                     const ZoneWords<T>& words,
                                                     const float (&lifts)[kStripsPerZone],
                                                     float floor) {
  uint32_t reach = 0;
#pragma unroll
  for (int quad = 0; quad < kQuadsPerLane; ++quad) {
    const float bound = fmaf(words.quad_max(quad), open.race_scale, lifts[quad / 2]);
    if (bound >= floor && bound > -INFINITY) reach |= 1u << quad;
  }
  return reach;
}

/* The best score of a token that has its noise zone's least E; kMargin exact. By a warp. */
template <typename T>
__device__ __forceinline__ float best_of_least(const ZoneRow& open,
                                               const ZoneWords<T>& words,
                                               const float (&lifts)[kStripsPerZone],
                                               const WarpNoise& noise) {
  const int part = static_cast<int>(threadIdx.x) % kLanesPerNoiseZone; /* of a noise zone */
  float best = -INFINITY;
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) {
    const int32_t whose = whose_of(noise, i);
    const float score = fmaf(words.pick_logit(i, whose % kGroup), open.race_scale, lifts[i]);
    if (whose / kGroup == part) best = fmaxf(best, score);
  }
  return from_ordered(__reduce_max_sync(kAllLanes, ordered(best)));
}

/* Something of a zone may win: its quads join the queue. The whole warp takes part. */
template <typename T>
__device__ __forceinline__ void enter_zone(const ZoneRow& open,
                                           const ZoneWords<T>& words,
                                           int32_t zone,
                                           int entry, /* of the zone's first strip in the noise */
                                           const float (&lifts)[kStripsPerZone],
                                           RaceShared& shared,
                                           RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  WarpNoise& noise = shared.noise[threadIdx.x / kWarpSize];
  RaceQueue& queue = shared.queues[threadIdx.x / kWarpSize];
  if (race.seen == -INFINITY) {
    if (race.whose != zone) {
      load_whose(open.key, zone, noise);
      race.whose = zone;
    }
    note_seen(open, best_of_least(open, words, lifts, noise), shared.bests, race);
  }
  uint32_t done = 0;
#pragma unroll 1
  while (true) {
    const uint32_t left = quads_that_reach(open, words, lifts, race_floor(race.seen)) & ~done;
    const uint32_t pushing = __ballot_sync(kAllLanes, left != 0);
    if (pushing == 0) return;
    if (left != 0) {
      const int quad = __ffs(static_cast<int>(left)) - 1;
      done |= 1u << quad;
      const int32_t to = race.count + __popc(pushing & ((1u << lane) - 1));
      queue.logits[to] = take_quad(words, quad);
      queue.runners[to] = {quad_token(zone, quad), word_of(noise.words[entry + quad / 2])};
    }
    race.count += __popc(pushing);
    if (race.count >= kWarpSize) run_batch(open, queue, shared.bests, race);
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
  const WarpNoise& noise = shared.noise[threadIdx.x / kWarpSize];
  const int entry = noise_entry(race, zone);
  const float seen = __shfl_sync(kAllLanes, seen_best(shared.bests, open.row.index), 0);
  race.seen = fmaxf(race.seen, seen);
  float lifts[kStripsPerZone];
  float bound = -INFINITY;
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) {
    lifts[i] = lift_of(noise.lifts[entry * kStripsPerZone + i]);
    bound = fmaxf(bound, fmaf(strip_max[i], open.race_scale, lifts[i]));
  }
  if (!__any_sync(kAllLanes, bound >= race_floor(race.seen))) return;
  enter_zone(open, words, zone, entry * kStripsPerZone, lifts, shared, race);
}

/* The noise of a zone, while its logits are on their way. */
__device__ __forceinline__ void prepare_noise(const ZoneRow& open,
                                              int32_t zone,
                                              WarpNoise& noise,
                                              RowRace& race) {
  if (zone < race.first + WarpNoise::kZones * ZonesPolicy::kWarpsPerCta) return;
  load_noise(open.key, zone, noise);
  if (race.whose < 0) { /* the row's first, in which something is likely to be looked at */
    load_whose(open.key, zone, noise);
    race.whose = zone;
  }
  race.first = zone;
}

/* Before the first zone of a row. */
__device__ __forceinline__ void open_race(RowRace& race) {
  race.first = -WarpNoise::kZones * ZonesPolicy::kWarpsPerCta; /* no zone's noise */
  race.whose = -1;
  race.count = 0;
  race.best = empty_race();
  race.seen = -INFINITY;
}

/* The warp's part of the row is through: its best goes to the entry of its zone. */
__device__ __forceinline__ void close_race(
    const ZoneRow& open, int32_t num_zones, RaceShared& shared, ZoneRace* races, RowRace& race) {
  while (race.count > 0) {
    run_batch(open, shared.queues[threadIdx.x / kWarpSize], shared.bests, race);
  }
  const Indexed best = warp_reduce(race.best, ArgmaxOp{});
  if (threadIdx.x % kWarpSize != 0 || best.index == kNoRunner) return;
  races[open.row.index * num_zones + best.index / kZone] = {best.value, best.index};
}

}  // namespace dspark
