/*
 * The one read of the logits: per row and zone of kZone tokens, what every later step needs.
 *
 *   maxima  of the zone's four strips; NaN where a strip holds one
 *   sums    of exp((l - max of the zone) / T) over the strips, for rows that need a law
 *   race    the winner of the zone under the coupled rule's noise, unless it cannot win the row
 *
 * A law is merged from these in a microsecond of one warp. And they are an index into the row: a draw,
 * an argmax, a search for a threshold or for the likeliest tokens reads the strips that matter.
 *
 * The CTAs that fit on the device at once share all zones in equal runs; a warp takes every eighth
 * zone of its CTA's run, with the loads of its next zone (2 KiB of 16-bit logits) in flight while it
 * works on one. So some 64 KiB per SM are always on their way, a request is looked up once per row and
 * warp, and there is no barrier. Zones are cut by the vocabulary alone and a zone's numbers come from
 * it alone, so a law is the same bits in every batch. 16-bit logits stay packed until they are summed:
 * a maximum costs less than an instruction a logit, its sum five (unpack, subtract, scale, ex2, add).
 *
 * The coupled race (common/philox.cuh) happens here because most zones of a flat law could hold the
 * winner: reading them again would cost as much as reading them. Score of a token: l / T - ln E_v in
 * units of ln 2. No score of a zone is above max / T - ln least, so a zone is passed over when a score
 * that its CTA has seen in the row is higher, then quads of it are. Of what is left (about one token of
 * a zone) only those tokens need a logarithm whose uniform is small enough: E_v >= least + u. The first
 * zone of a row, where nothing was seen, starts from the token of the least noise and from the largest
 * logit of each lane. What is passed over cannot be the winner, so the winner depends on no order.
 *
 * Bytes: 2 or 4 * vocab_size per row. Limited by memory from a few requests on, before that by latency.
 */
#pragma once

#include "common/dependent_launch.cuh"
#include "kernels/verify/logit_words.cuh"

namespace dspark {

struct ZonesPolicy {
  static constexpr int kWarpsPerCta = 8;
  static constexpr int kNumThreads = kWarpsPerCta * kWarpSize;
  static constexpr int kCtasPerSm = 4;     /* plain 16-bit rows: 64 registers */
  static constexpr int kCtasPerSmWide = 2; /* f32 or shaped rows */
  static constexpr int kCtasPerSmRaces = 2;
  static constexpr int kBestSlots = 16; /* rows that a CTA works on at once, at least */
  static constexpr float kMargin = 1e-4f; /* on bounds of scores, for rounding */
  static constexpr float kMaxRaceScale = 0x1p96f;
};

/* One number for each strip of a zone. */
struct alignas(16) Strips {
  float of[kStripsPerZone];
};

/* NaN if one is. */
__device__ __forceinline__ float zone_max(const Strips& maxima) {
  return max_nan(max_nan(maxima.of[0], maxima.of[1]), max_nan(maxima.of[2], maxima.of[3]));
}

__device__ __forceinline__ float zone_sum(const Strips& sums) {
  return (sums.of[0] + sums.of[1]) + (sums.of[2] + sums.of[3]);
}

/* Winner of a zone under the coupled rule; kNoRunner when it cannot win the row. */
struct alignas(8) ZoneRace {
  float score;
  int32_t token;
};

enum class ZonesKind { kTarget, kRaces, kShaped, kDraft };

/* Coupled rows race here unless filters are still to come. */
__device__ __forceinline__ bool races_in_zones(const VerifyInputs& in, int32_t req) {
  return in.rules != nullptr && in.rules[req] == DSPARK_RULE_COUPLED && !in.has_filters &&
         in.temperature[req] > 0.f;
}

/* What a warp knows about the row of its zone. */
struct ZoneRow {
  TargetRow row;
  bool skipped;
  bool races;
  float scale; /* 0: no law is needed */
  float race_scale;
  DrawKey key;
};

template <ZonesKind kKind>
__device__ __forceinline__ ZoneRow open_row(const VerifyInputs& in, int64_t row_index) {
  ZoneRow open = {};
  open.row.index = row_index;
  if constexpr (kKind == ZonesKind::kDraft) {
    const auto req = static_cast<int32_t>(row_index / in.draft_len);
    const auto k = static_cast<int32_t>(row_index % in.draft_len);
    const float temperature = in.temperature[req];
    open.scale = temperature > 0.f ? weight_scale(temperature) : 0.f;
    const bool compares = in.rules == nullptr || in.rules[req] != DSPARK_RULE_COUPLED;
    open.skipped = k >= verify_len(in, req) || !(temperature > 0.f) || !compares;
  } else {
    const auto index = static_cast<int32_t>(row_index);
    const int32_t req = find_request_by_warp(in, index);
    open.skipped = req < 0; /* padding */
    if (open.skipped) return open;
    open.row.req = req;
    open.row.local = index - in.qo_indptr[req];
    open.scale = target_scale(in, req);
    if constexpr (kKind != ZonesKind::kTarget) {
      open.races = races_in_zones(in, req);
      if (open.races) {
        open.race_scale = fminf(kLog2E / in.temperature[req], ZonesPolicy::kMaxRaceScale);
        if (!in.wants_logprobs) open.scale = 0.f;
        open.key.seed = in.seeds[req];
        open.key.position = in.anchor_positions[req] + 1 + row_depth(in, req, open.row.local);
        open.key.purpose = DSPARK_PURPOSE_BONUS;
      }
    }
  }
  return open;
}

/* The sum of `values` [i] over all lanes, in the lanes of the i-th quarter of the warp. */
__device__ __forceinline__ float quarter_sums(const float (&values)[kStripsPerZone]) {
  static_assert(kStripsPerZone == 4);
  const int lane = threadIdx.x % kWarpSize;
  const bool upper = (lane & 16) != 0;
  float low = upper ? values[2] : values[0];
  float high = upper ? values[3] : values[1];
  low += shuffle_xor(upper ? values[0] : values[2], 16);
  high += shuffle_xor(upper ? values[1] : values[3], 16);
  const bool odd = (lane & 8) != 0;
  const float own = (odd ? high : low) + shuffle_xor(odd ? low : high, 8);
  return warp_reduce<8>(own, SumOp{});
}

/* Sum of the weights of strip i of the warp's zone, in the lanes of the i-th quarter. */
template <typename T>
__device__ __forceinline__ float strip_sums(const ZoneWords<T>& words, float max, float scale) {
  float sums[kStripsPerZone] = {};
#pragma unroll
  for (int i = 0; i < kPairsPerLane; ++i) {
    const float2 pair = words.pair(i);
    sums[i / 4] += logit_weight(pair.x, max, scale) + logit_weight(pair.y, max, scale);
  }
  return quarter_sums(sums);
}

/* Noise of the zones that a warp comes to in a row: lane i has that of zone `first` + i * kWarpsPerCta. */
struct LaneNoise {
  int32_t first;
  ZoneNoise zone;
  float lift; /* -log2 of the least */
};

__device__ __forceinline__ LaneNoise lane_noise(const ZoneRow& open, int32_t first) {
  LaneNoise noise;
  noise.first = first;
  const int32_t zone = first + static_cast<int32_t>(threadIdx.x % kWarpSize) *
                                   ZonesPolicy::kWarpsPerCta;
  noise.zone = zone_noise(open.key.seed, zone, open.key.position, open.key.purpose);
  noise.lift = -log2f(noise.zone.least);
  return noise;
}

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

/* A zone that races. */
struct ZoneRun {
  const ZoneRow& open;
  int32_t zone;
  ZoneNoise noise;
  float lift; /* -log2 of the least noise */
};

/* Whether a logit's score may reach `floor`, as far as the least noise of the zone tells. */
__device__ __forceinline__ bool reaches(const ZoneRun& run, float logit, float floor) {
  const float margin = ZonesPolicy::kMargin * (1.f + 0.1f * fabsf(floor));
  return fmaf(logit, run.open.race_scale, run.lift) >= floor - margin;
}

/* The quad of this lane that starts at `token` runs, but for the token of the least noise. */
__device__ __forceinline__ void race_quad(
    const ZoneRun& run, int32_t token, const float (&logits)[4], float seen, Indexed& best) {
  const float scale = run.open.race_scale;
  const float margin = ZonesPolicy::kMargin * (1.f + 0.1f * fabsf(seen));
  const uint4 drawn = philox_quad(run.open.key.seed, static_cast<uint32_t>(token / 4),
                                  run.open.key.position, run.open.key.purpose);
  const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
  uint32_t left = 0; /* tokens that may reach `seen`: E_v >= least + u */
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float latest = exp2_flushed(fmaf(logits[j], scale, margin - seen));
    const float u = static_cast<float>(words[j]) * kTwoPowMinus32;
    if (u * 0.9999f <= latest - run.noise.least) left |= 1u << j;
  }
  if (run.noise.least_at / 4 == token % kZone / 4) left &= ~(1u << run.noise.least_at % 4);
  for (; left != 0; left &= left - 1) {
    const int j = __ffs(static_cast<int>(left)) - 1;
    const uint32_t word = j < 2 ? (j == 0 ? words[0] : words[1]) : (j == 2 ? words[2] : words[3]);
    const float logit =
        j < 2 ? (j == 0 ? logits[0] : logits[1]) : (j == 2 ? logits[2] : logits[3]);
    if (!(logit > -INFINITY)) continue;
    const float e = run.noise.least + exponential_from_word(word);
    race_step(best, fmaf(logit, scale, -log2f(e)), token + j);
  }
}

/* The zone's winner, in every lane, or nobody when `seen` is out of its reach. */
template <typename T>
__device__ __forceinline__ Indexed race_words(const ZoneWords<T>& words,
                                              const ZoneRun& run,
                                              float max,
                                              float seen) {
  Indexed best = empty_race();
  if (!reaches(run, max, seen)) return best;
  float quad_max[kQuadsPerLane];
  float lane_max = -INFINITY;
#pragma unroll
  for (int quad = 0; quad < kQuadsPerLane; ++quad) {
    quad_max[quad] = words.quad_max(quad);
    lane_max = fmaxf(lane_max, quad_max[quad]);
  }
  const auto first_of = [&](int quad) {
    return strip_token(run.zone * kStripsPerZone + quad / 2) + quad % 2 * 4;
  };
  float logits[4];
  { /* the token of the least noise */
    const int32_t at = run.noise.least_at;
    words.pick_quad(at / kStrip * 2 + at / 4 % 2, logits);
    const float logit = at % 4 < 2 ? (at % 4 == 0 ? logits[0] : logits[1])
                                   : (at % 4 == 2 ? logits[2] : logits[3]);
    const bool has_it = static_cast<int>(threadIdx.x % kWarpSize) == at % kStrip / kGroup;
    if (has_it && logit > -INFINITY) {
      race_step(best, fmaf(logit, run.open.race_scale, run.lift), run.zone * kZone + at);
    }
  }
  uint32_t left = 0; /* quads of this lane that may hold the winner: at first the one of its maximum */
#pragma unroll
  for (int quad = kQuadsPerLane - 1; quad >= 0; --quad) {
    if (quad_max[quad] == lane_max) left = 1u << quad;
  }
  uint32_t done = left;
  bool first_round = true;
  while (true) {
    seen = fmaxf(seen, from_ordered(__reduce_max_sync(kAllLanes, ordered(best.value))));
    if (first_round) {
      if (!reaches(run, lane_max, seen)) left = 0;
    } else {
      left = 0;
#pragma unroll
      for (int quad = 0; quad < kQuadsPerLane; ++quad) {
        if (reaches(run, quad_max[quad], seen)) left |= 1u << quad;
      }
      left &= ~done;
      if (!__any_sync(kAllLanes, left != 0)) break;
    }
    first_round = false;
    if (left == 0) continue;
    const int quad = __ffs(static_cast<int>(left)) - 1;
    done |= 1u << quad;
    words.pick_quad(quad, logits);
    race_quad(run, first_of(quad), logits, seen, best);
  }
  return warp_reduce(best, ArgmaxOp{});
}

/* The zones of one matrix of logits. */
struct ZonesWork {
  LogitMatrix matrix;
  int64_t num_rows; /* bound */
  Strips* maxima;    /* [num_rows, num_zones] */
  Strips* sums;      /* [num_rows, num_zones]; 0 where no law is needed */
  ZoneRace* races;   /* [num_rows, num_zones]; written for rows that race */
  uint32_t* tickets; /* [num_reqs] to be cleared; may be nullptr */
};

template <typename T, ZonesKind kKind>
constexpr int kZonesCtasPerSm = kKind == ZonesKind::kShaped || sizeof(T) == 4
                                    ? ZonesPolicy::kCtasPerSmWide
                                : kKind == ZonesKind::kRaces ? ZonesPolicy::kCtasPerSmRaces
                                                             : ZonesPolicy::kCtasPerSm;

/* A zone worked out by its warp. */
template <typename T, ZonesKind kKind>
__device__ __forceinline__ void finish_zone(const ZonesWork& work,
                                            const VerifyInputs& in,
                                            const ZoneRow& open,
                                            int32_t zone,
                                            const ZoneWords<T>& words,
                                            LaneNoise& noise,
                                            RowBests& bests) {
  const int lane = threadIdx.x % kWarpSize;
  Strips maxima;
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) {
    maxima.of[i] = from_ordered(__reduce_max_sync(kAllLanes, ordered(words.strip_max(i))));
  }
  const float max = zone_max(maxima);
  const int64_t at = open.row.index * in.num_zones + zone;
  const bool is_number = fabsf(max) < INFINITY; /* the same for the whole warp, as all below */
  float sum = 0.f;
  if (open.scale > 0.f && is_number) sum = strip_sums(words, max, open.scale);
  if (lane == 0) work.maxima[at] = maxima;
  if (lane % 8 == 0) work.sums[at].of[lane / 8] = sum;
  if constexpr (kKind == ZonesKind::kRaces || kKind == ZonesKind::kShaped) {
    if (!open.races) return;
    Indexed winner = empty_race();
    if (is_number) {
      int32_t ahead = (zone - noise.first) / ZonesPolicy::kWarpsPerCta;
      if (ahead < 0 || ahead >= kWarpSize) {
        noise = lane_noise(open, zone);
        ahead = 0;
      }
      ZoneNoise own;
      own.least = __shfl_sync(kAllLanes, noise.zone.least, ahead);
      own.least_at = __shfl_sync(kAllLanes, noise.zone.least_at, ahead);
      const ZoneRun run = {open, zone, own, __shfl_sync(kAllLanes, noise.lift, ahead)};
      const float seen = __shfl_sync(kAllLanes, seen_best(bests, open.row.index), 0);
      winner = race_words(words, run, max, seen);
    }
    if (lane == 0) {
      if (winner.index != kNoRunner) note_best(bests, open.row.index, winner.value);
      work.races[at] = {winner.value, winner.index};
    }
  }
}

/* Grid: as many CTAs as the device holds, or fewer. */
template <typename T, ZonesKind kKind>
__global__ void __launch_bounds__(ZonesPolicy::kNumThreads, (kZonesCtasPerSm<T, kKind>))
    zones_kernel(VerifyInputs in, ZonesWork work) {
  __shared__ RowBests bests;
  wait_for_prerequisites();
  release_dependents();
  if constexpr (kKind == ZonesKind::kRaces || kKind == ZonesKind::kShaped) {
    if (threadIdx.x < ZonesPolicy::kBestSlots) bests.slots[threadIdx.x] = 0;
    __syncthreads();
  }
  if (blockIdx.x == 0 && work.tickets != nullptr) {
    for (int32_t r = threadIdx.x; r < in.num_reqs; r += ZonesPolicy::kNumThreads) {
      work.tickets[r] = 0;
    }
  }
  const int64_t total = work.num_rows * in.num_zones;
  const int64_t first = total * blockIdx.x / gridDim.x + threadIdx.x / kWarpSize;
  const int64_t end = total * (blockIdx.x + 1) / gridDim.x;
  if (first >= end) return; /* whole warps */
  int64_t row = first / in.num_zones;
  auto zone = static_cast<int32_t>(first % in.num_zones);
  auto left = static_cast<int32_t>((end - first - 1) / ZonesPolicy::kWarpsPerCta);
  ZoneWords<T> next;
  next.load(work.matrix, row, zone, in.vocab_size);
  ZoneRow open = {};
  open.row.index = -1;
  LaneNoise noise = {};
  for (;; --left) {
    const ZoneWords<T> words = next;
    const int64_t own_row = row;
    const int32_t own_zone = zone;
    if (left > 0) {
      for (zone += ZonesPolicy::kWarpsPerCta; zone >= in.num_zones; zone -= in.num_zones) ++row;
      next.load(work.matrix, row, zone, in.vocab_size);
    }
    if (own_row != open.row.index) {
      open = open_row<kKind>(in, own_row);
      noise.first = -kWarpSize * ZonesPolicy::kWarpsPerCta;
    }
    if (!open.skipped) {
      if constexpr (kKind == ZonesKind::kShaped) {
        ZoneWords<float> shaped;
        shaped.shape(in, open.row, own_zone, words);
        finish_zone<float, kKind>(work, in, open, own_zone, shaped, noise, bests);
      } else {
        finish_zone<T, kKind>(work, in, open, own_zone, words, noise, bests);
      }
    }
    if (left == 0) return;
  }
}

}  // namespace dspark
