/*
 * The coupled rule's race (common/philox.cuh) in the one read of the logits.
 *
 * Score of a token: l / T - ln E_v in units of ln 2; the largest wins. No score of a zone is above max /
 * T - ln least, so that a zone is passed over when a score that its CTA has seen in the row is higher,
 * then quads of it are. What is left, about one quad of a zone, waits in a queue of the warp until 32 of
 * them can draw their noise side by side, a Philox call each; and of their tokens only those need
 * logarithms whose uniform is small enough, since E_v >= least + u. The first zone of a row, where nothing
 * was seen, starts with the token of the least noise, then with the largest logit of each lane: behind
 * those few remain. What is passed over cannot be the winner, so that the winner depends on no order.
 *
 * Per zone: some 40 instructions a lane; per 32 quads some 250.
 */
#pragma once

#include "kernels/verify/zone_row.cuh"

namespace dspark {

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

/* Quads of a warp's zones of one row that may hold its winner. */
struct RaceQueue {
  static constexpr int kCapacity = kWarpSize * (kQuadsPerLane + 1); /* what is left and a zone */
  float4 logits[kCapacity];
  int32_t tokens[kCapacity]; /* first of the quad */
};

struct RaceShared {
  RowBests bests;
  RaceQueue queues[ZonesPolicy::kWarpsPerCta];
};

/* A warp's race in a row. */
struct RowRace {
  /* Lane i has the noise of zone `first` + i * kWarpsPerCta, and -log2 of its least. */
  int32_t first;
  ZoneNoise zone;
  float lift;
  Indexed best;  /* of this lane */
  float seen;    /* of the CTA, as far as the warp knows */
  int32_t count; /* of the queue */
};

/* Whether a logit's score may reach `floor` when its noise is the least, whose -log2 is `lift`. */
__device__ __forceinline__ bool reaches(float logit, float scale, float lift, float floor) {
  const float margin = ZonesPolicy::kMargin * (1.f + 0.1f * fabsf(floor));
  return fmaf(logit, scale, lift) >= floor - margin;
}

__device__ __forceinline__ void load_noise(const ZoneRow& open, int32_t first, RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  race.first = first;
  race.zone = zone_noise(open.key.seed, first + lane * ZonesPolicy::kWarpsPerCta, open.key.position,
                         open.key.purpose);
  race.lift = -log2f(race.zone.least);
}

/* The lane that has the noise of `zone`; out of range when none has. */
__device__ __forceinline__ int noise_lane(const RowRace& race, int32_t zone) {
  return (zone - race.first) / ZonesPolicy::kWarpsPerCta;
}

/* A quad runs, whose zone has the noise `zone`. */
__device__ __forceinline__ void run_quad(
    const ZoneRow& open, const ZoneNoise& zone, const float4& quad, int32_t token, RowRace& race) {
  const float logits[4] = {quad.x, quad.y, quad.z, quad.w};
  const float margin = ZonesPolicy::kMargin * (1.f + 0.1f * fabsf(race.seen));
  const uint4 drawn = philox_quad(open.key.seed, static_cast<uint32_t>(token / 4),
                                  open.key.position, open.key.purpose);
  const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
  uint32_t left = 0; /* tokens that may reach what was seen */
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float latest = exp2_flushed(fmaf(logits[j], open.race_scale, margin - race.seen));
    const float u = static_cast<float>(words[j]) * kTwoPowMinus32;
    const bool has_least = token % kZone + j == zone.least_at;
    if (has_least || u * 0.9999f <= latest - zone.least) left |= 1u << j;
  }
  for (; left != 0; left &= left - 1) {
    const int j = __ffs(static_cast<int>(left)) - 1;
    const uint32_t word = j < 2 ? (j == 0 ? words[0] : words[1]) : (j == 2 ? words[2] : words[3]);
    const float logit = j < 2 ? (j == 0 ? logits[0] : logits[1]) : (j == 2 ? logits[2] : logits[3]);
    if (!(logit > -INFINITY)) continue;
    const float e = zone_exponential(zone, token % kZone + j, word);
    race_step(race.best, fmaf(logit, open.race_scale, -log2f(e)), token + j);
  }
}

/* The last 32 quads of the queue, or fewer, run. */
__device__ __forceinline__ void run_batch(const ZoneRow& open,
                                          const RaceQueue& queue,
                                          RowBests& bests,
                                          RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t num = min(race.count, kWarpSize);
  race.count -= num;
  const int32_t at = race.count + min(lane, num - 1);
  const float4 quad = queue.logits[at];
  const int32_t token = queue.tokens[at];
  const int from = noise_lane(race, token / kZone);
  ZoneNoise zone;
  zone.least = __shfl_sync(kAllLanes, race.zone.least, from);
  zone.least_at = __shfl_sync(kAllLanes, race.zone.least_at, from);
  const float lift = __shfl_sync(kAllLanes, race.lift, from);
  const float largest = fmaxf(fmaxf(quad.x, quad.y), fmaxf(quad.z, quad.w));
  if (lane < num && reaches(largest, open.race_scale, lift, race.seen)) {
    run_quad(open, zone, quad, token, race);
  }
  const float best = from_ordered(__reduce_max_sync(kAllLanes, ordered(race.best.value)));
  if (!(best > race.seen)) return;
  race.seen = best;
  if (lane == 0) note_best(bests, open.row.index, best);
}

/* Drops the quads of the queue that what was seen is out of reach for. */
__device__ __forceinline__ void thin_queue(const ZoneRow& open, RaceQueue& queue, RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  int32_t kept = 0;
#pragma unroll 1
  for (int32_t first = 0; first < race.count; first += kWarpSize) {
    const int32_t at = min(first + lane, race.count - 1);
    const float4 quad = queue.logits[at];
    const int32_t token = queue.tokens[at];
    const float lift = __shfl_sync(kAllLanes, race.lift, noise_lane(race, token / kZone));
    const float largest = fmaxf(fmaxf(quad.x, quad.y), fmaxf(quad.z, quad.w));
    const bool keep =
        first + lane < race.count && reaches(largest, open.race_scale, lift, race.seen);
    const uint32_t keeping = __ballot_sync(kAllLanes, keep);
    __syncwarp(); /* all have read */
    if (keep) {
      const int32_t to = kept + __popc(keeping & ((1u << lane) - 1));
      queue.logits[to] = quad;
      queue.tokens[to] = token;
    }
    kept += __popc(keeping);
    __syncwarp();
  }
  race.count = kept;
}

/* Runs what fills a warp, and with `all` the rest. */
__device__ __forceinline__ void drain_queue(
    const ZoneRow& open, RaceQueue& queue, RowBests& bests, bool all, RowRace& race) {
  __syncwarp();
  while (race.count >= kWarpSize || (all && race.count > 0)) {
    run_batch(open, queue, bests, race);
    if (race.count >= kWarpSize) thin_queue(open, queue, race);
  }
}

/* The quads in `left` of every lane go to the end of the queue. */
template <typename T>
__device__ __forceinline__ void enqueue_quads(
    const ZoneWords<T>& words, int32_t zone, uint32_t left, RaceQueue& queue, RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  while (__any_sync(kAllLanes, left != 0)) {
    const uint32_t pushing = __ballot_sync(kAllLanes, left != 0);
    if (left != 0) {
      const int quad = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      float logits[4];
      words.pick_quad(quad, logits);
      const int32_t to = race.count + __popc(pushing & ((1u << lane) - 1));
      queue.logits[to] = make_float4(logits[0], logits[1], logits[2], logits[3]);
      queue.tokens[to] = strip_token(zone * kStripsPerZone + quad / 2) + quad % 2 * 4;
    }
    race.count += __popc(pushing);
  }
}

/* The token of the zone's least noise runs: its arrival is known. */
template <typename T>
__device__ __forceinline__ void run_least(const ZoneRow& open,
                                          const ZoneWords<T>& words,
                                          int32_t zone,
                                          int32_t at,
                                          float lift,
                                          RowRace& race) {
  float logits[4];
  words.pick_quad(at / kStrip * 2 + at / 4 % 2, logits);
  const float logit =
      at % 4 < 2 ? (at % 4 == 0 ? logits[0] : logits[1]) : (at % 4 == 2 ? logits[2] : logits[3]);
  const bool has_it = static_cast<int>(threadIdx.x % kWarpSize) == at % kStrip / kGroup;
  if (has_it && logit > -INFINITY) {
    race_step(race.best, fmaf(logit, open.race_scale, lift), zone * kZone + at);
  }
  race.seen = from_ordered(__reduce_max_sync(kAllLanes, ordered(race.best.value)));
}

/* A zone enters the race of its row. The warp's zones of a row come in ascending order. */
template <typename T>
__device__ __forceinline__ void race_zone(const ZoneRow& open,
                                          const ZoneWords<T>& words,
                                          int32_t zone,
                                          float max,
                                          RaceShared& shared,
                                          RowRace& race) {
  RaceQueue& queue = shared.queues[threadIdx.x / kWarpSize];
  int from = noise_lane(race, zone);
  if (from < 0 || from >= kWarpSize) {
    drain_queue(open, queue, shared.bests, true, race); /* it knows the old noise alone */
    load_noise(open, zone, race);
    from = 0;
  }
  const float lift = __shfl_sync(kAllLanes, race.lift, from);
  const float seen = __shfl_sync(kAllLanes, seen_best(shared.bests, open.row.index), 0);
  race.seen = fmaxf(race.seen, seen);
  if (!reaches(max, open.race_scale, lift, race.seen)) return;
  const bool is_first = race.seen == -INFINITY;
  if (is_first) {
    const int32_t at = __shfl_sync(kAllLanes, race.zone.least_at, from);
    run_least(open, words, zone, at, lift, race);
  }
  float quad_max[kQuadsPerLane];
  float lane_max = -INFINITY;
#pragma unroll
  for (int quad = 0; quad < kQuadsPerLane; ++quad) {
    quad_max[quad] = words.quad_max(quad);
    lane_max = fmaxf(lane_max, quad_max[quad]);
  }
  uint32_t done = 0;
#pragma unroll 1
  for (int round = is_first ? 0 : 1; round < 2; ++round) { /* 0: the lanes' largest logits */
    uint32_t left = 0;
    const float least = round == 0 ? lane_max : -INFINITY;
    if (is_first) { /* the CTA's other warps are at their first zones, too */
      const float other = __shfl_sync(kAllLanes, seen_best(shared.bests, open.row.index), 0);
      race.seen = fmaxf(race.seen, other);
    }
#pragma unroll
    for (int quad = 0; quad < kQuadsPerLane; ++quad) {
      const bool runs =
          quad_max[quad] >= least && reaches(quad_max[quad], open.race_scale, lift, race.seen);
      if (runs) left |= 1u << quad;
    }
    left &= ~done;
    done = left;
    enqueue_quads(words, zone, left, queue, race);
    drain_queue(open, queue, shared.bests, round == 0, race);
  }
}

__device__ __forceinline__ void open_race(RowRace& race) {
  race.first = -kWarpSize * ZonesPolicy::kWarpsPerCta; /* no zone's noise */
  race.best = empty_race();
  race.seen = -INFINITY;
  race.count = 0;
}

/* The warp's part of the row is through: its best goes to the entry of its zone. */
__device__ __forceinline__ void close_race(
    const ZoneRow& open, int32_t num_zones, RaceShared& shared, ZoneRace* races, RowRace& race) {
  drain_queue(open, shared.queues[threadIdx.x / kWarpSize], shared.bests, true, race);
  const Indexed best = warp_reduce(race.best, ArgmaxOp{});
  if (threadIdx.x % kWarpSize != 0 || best.index == kNoRunner) return;
  races[open.row.index * num_zones + best.index / kZone] = {best.value, best.index};
}

}  // namespace dspark
