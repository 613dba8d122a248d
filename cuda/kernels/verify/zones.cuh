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
 * The coupled race (common/philox.cuh) happens here, in race_zones.cuh, where the logits are in
 * registers: what may win is found without reading anything twice.
 *
 * Bytes: 2 or 4 * vocab_size per row. Limited by memory from a few requests on, before that by latency.
 */
#pragma once

#include "common/dependent_launch.cuh"
#include "kernels/verify/race_zones.cuh"

namespace dspark {

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

/* The zones of one matrix of logits. */
struct ZonesWork {
  LogitMatrix matrix;
  int64_t num_rows;  /* bound */
  Strips* maxima;    /* [num_rows, num_zones] */
  Strips* sums;      /* [num_rows, num_zones]; 0 where no law is needed */
  ZoneRace* races;   /* [num_rows, num_zones]; written for rows that race */
  uint32_t* tickets; /* [num_reqs] to be cleared; may be nullptr */
};

/* Whether rows of this kind may race. */
template <ZonesKind kKind>
constexpr bool kMayRace = kKind == ZonesKind::kRaces || kKind == ZonesKind::kShaped;

template <typename T, ZonesKind kKind>
constexpr int kZonesCtasPerSm =
    kMayRace<kKind> && sizeof(T) == 4               ? ZonesPolicy::kCtasPerSmWidest
    : kKind == ZonesKind::kShaped || sizeof(T) == 4 ? ZonesPolicy::kCtasPerSmWide
    : kKind == ZonesKind::kRaces                    ? ZonesPolicy::kCtasPerSmRaces
                                                    : ZonesPolicy::kCtasPerSm;

struct Nothing {};
template <ZonesKind kKind>
using ZonesShared = std::conditional_t<kMayRace<kKind>, RaceShared, Nothing>;

/* A zone worked out by its warp. */
template <typename T, ZonesKind kKind>
__device__ __forceinline__ void finish_zone(const ZonesWork& work,
                                            const VerifyInputs& in,
                                            const ZoneRow& open,
                                            int32_t zone,
                                            const ZoneWords<T>& words,
                                            ZonesShared<kKind>& shared,
                                            RowRace& race) {
  const int lane = threadIdx.x % kWarpSize;
  Strips maxima;
  float own_max[kStripsPerZone];
#pragma unroll
  for (int i = 0; i < kStripsPerZone; ++i) {
    own_max[i] = words.strip_max(i);
    maxima.of[i] = from_ordered(__reduce_max_sync(kAllLanes, ordered(own_max[i])));
  }
  const float max = zone_max(maxima);
  const int64_t at = open.row.index * in.num_zones + zone;
  const bool is_number = fabsf(max) < INFINITY; /* the same for the whole warp, as all below */
  float sum = 0.f;
  if (open.scale > 0.f && is_number) sum = strip_sums(words, max, open.scale);
  if (lane == 0) work.maxima[at] = maxima;
  if (lane % 8 == 0) work.sums[at].of[lane / 8] = sum;
  if constexpr (kMayRace<kKind>) {
    if (!open.races) return;
    if (lane == 0) work.races[at] = {-INFINITY, kNoRunner};
    if (is_number) race_zone(open, words, zone, own_max, shared, race);
  }
}

/* Grid: as many CTAs as the device holds, or fewer. */
template <typename T, ZonesKind kKind>
__global__ void __launch_bounds__(ZonesPolicy::kNumThreads, (kZonesCtasPerSm<T, kKind>))
    zones_kernel(const __grid_constant__ VerifyInputs in, const __grid_constant__ ZonesWork work) {
  __shared__ ZonesShared<kKind> shared;
  fetch_params(in);
  fetch_params(work);
  wait_for_prerequisites();
  release_dependents(); /* only now: the next kernel reads the inputs of the call before it waits */
  if constexpr (kMayRace<kKind>) {
    if (threadIdx.x < ZonesPolicy::kBestSlots) shared.bests.slots[threadIdx.x] = 0;
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
  RowRace race = {};
  ZoneRow open = {};
  open.row.index = -1;
#pragma unroll 1
  for (bool is_last = false; !is_last; --left) {
    const ZoneWords<T> words = next;
    const int64_t own_row = row;
    const int32_t own_zone = zone;
    is_last = left == 0;
    if (!is_last) {
      for (zone += ZonesPolicy::kWarpsPerCta; zone >= in.num_zones; zone -= in.num_zones) ++row;
      next.load(work.matrix, row, zone, in.vocab_size);
    }
    if (own_row != open.row.index) { /* while the zone is on its way */
      open = open_row<kKind>(in, own_row);
      if constexpr (kMayRace<kKind>) open_race(race);
    }
    if constexpr (kMayRace<kKind>) {
      if (open.races) prepare_noise(open, own_zone, shared.noise[threadIdx.x / kWarpSize], race);
    }
    if (!open.skipped) {
      if constexpr (kKind == ZonesKind::kShaped) {
        ZoneWords<float> shaped;
        shaped.shape(in, open.row, own_zone, words);
        finish_zone<float, kKind>(work, in, open, own_zone, shaped, shared, race);
      } else {
        finish_zone<T, kKind>(work, in, open, own_zone, words, shared, race);
      }
    }
    if constexpr (kMayRace<kKind>) {
      if (open.races && (is_last || row != own_row)) {
        close_race(open, in.num_zones, shared, work.races, race);
      }
    }
  }
}

}  // namespace dspark
