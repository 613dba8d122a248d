/*
 * Top-k, top-p and min-p without sorting the vocabulary: a law's threshold and normaliser.
 *
 * One CTA per target row, or a cluster while rows are few: the general way is its CTAs' together, ranks are
 * one CTA's. Rows without filters only have their zones merged. Otherwise
 *
 *   1. floor       the k-th largest of the zones' maxima (the 64th without top-k) or a bit less, by the bits
 *                  of its key: at least that many tokens are at or above it, so the threshold of top-k
 *                  is, too.
 *   2. candidates  the logits at or above the floor, into shared memory. Strips below the floor are not
 *                  read: some k of 594 strips for top-k, 64 else.
 *   3. ranks       for every candidate the larger ones are counted and their weights added up, by as
 *                  many threads as there are. A token is in the top-k set iff fewer than k are larger;
 *                  a token of that set is in the top-p set iff those above it weigh less than top_p of
 *                  the set: both keep ties, since tied tokens count the same. min-p compares w with
 *                  min_p * (max w = 1).
 *
 * What is handed on is the law and, in place of the sums of its strips, those of what it keeps of
 * them: a draw (draw.cuh) does not know whether a law was filtered.
 *
 * Weights are added as 64-bit fixed-point integers, so that no order of candidates or atomics shows.
 * The candidates decide when they must hold the threshold: always for top-k up to num_zones; for top-p
 * without top-k when they hold top_p of all mass; for min-p when the floor weighs less than min_p. They
 * do not when a law is flat, k is large or thousands of logits are tied (kMaxKept): then descent.cuh
 * does.
 *
 * Bytes: k / num_zones of the row a second time, from L2 or memory. Limited by latency at few rows.
 */
#pragma once

#include "kernels/verify/descent.cuh"

namespace dspark {

/* Threads that share the work on each of `count` things: a power of two, in one warp. */
__device__ __forceinline__ int32_t threads_each(int32_t count) {
  int32_t parts = kWarpSize;
  while (parts > 1 && parts * count > FilterPolicy::kNumThreads) parts /= 2;
  return parts;
}

/* A logit that `rank` (from 1) of the zones' maxima reach, or a few more: a key of the same order, bit by bit
 * from the first in which the keys differ. By a warp. */
__device__ __forceinline__ float warp_floor(const VerifyInputs& in,
                                            const FilterShared& shared,
                                            int32_t rank) {
  constexpr int kHeld = 5; /* keys of a lane that are read once */
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpSize);
  const auto key_of =
      [&](int32_t zone) { /* 0, below all others: no zone */
                          return zone < in.num_zones
                                     ? static_cast<uint32_t>(ordered(shared.zone_max[zone])) ^
                                           0x80000000u
                                     : 0u;
      };
  uint32_t held[kHeld];
  uint32_t most = 0;
  uint32_t least = UINT32_MAX;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = key_of(lane + i * kWarpSize);
    most = max(most, held[i]);
    least = held[i] != 0 ? min(least, held[i]) : least;
  }
#pragma unroll 1
  for (int32_t zone = lane + kHeld * kWarpSize; zone < in.num_zones; zone += kWarpSize) {
    most = max(most, key_of(zone));
    least = min(least, key_of(zone));
  }
  most = __reduce_max_sync(kAllLanes, most);
  least = __reduce_min_sync(kAllLanes, least);
  const int first = 31 - __clz(static_cast<int>(most ^ least)); /* bit; -1: all are equal */
  uint32_t floor = first < 0 ? most : most >> first >> 1 << 1 << first;
#pragma unroll 1
  for (int bit = first; bit >= 0; --bit) {
    const uint32_t next = floor | 1u << bit;
    int32_t reach = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) reach += held[i] >= next;
#pragma unroll 1
    for (int32_t zone = lane + kHeld * kWarpSize; zone < in.num_zones; zone += kWarpSize) {
      reach += key_of(zone) >= next;
    }
    reach = __reduce_add_sync(kAllLanes, reach);
    if (reach >= rank) floor = next;
    if (reach == rank) break;
  }
  /* Below -inf there are NaNs. */
  return fmaxf(from_ordered(static_cast<int32_t>(floor ^ 0x80000000u)), -INFINITY);
}

/* The same for all threads, which take part. */
__device__ __forceinline__ float zone_floor(const VerifyInputs& in,
                                            FilterShared& shared,
                                            int32_t rank) {
  if (threadIdx.x < kWarpSize) {
    const float floor = warp_floor(in, shared, rank);
    if (threadIdx.x == 0) shared.floor = floor;
  }
  __syncthreads();
  return shared.floor;
}

/* Step 2: the logits of at least `floor` and their number, which is above kMaxKept when they do not
 * fit. All threads take part. */
__device__ __forceinline__ uint32_t collect_candidates(const VerifyInputs& in,
                                                       const TargetRow& row,
                                                       const Strips* maxima,
                                                       float floor,
                                                       FilterShared& shared) {
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += FilterPolicy::kNumThreads) {
    if (shared.zone_max[zone] < floor) continue;
    const Strips own = maxima[zone];
#pragma unroll
    for (int i = 0; i < kStripsPerZone; ++i) {
      if (own.of[i] < floor) continue;
      const uint32_t at = atomicAdd(&shared.num_strips, 1u);
      if (at < FilterPolicy::kMaxKept) {
        shared.by_rank.strips[at] = static_cast<uint16_t>(zone * kStripsPerZone + i);
      }
    }
  }
  __syncthreads();
  const uint32_t num_strips = shared.num_strips;
  if (num_strips > FilterPolicy::kMaxKept) return num_strips; /* of one candidate each, at least */
  int32_t slot = static_cast<int32_t>(threadIdx.x) / kWarpSize - FilterPolicy::kNumWarps;
  for_strips(
      in, row, Team{0, 1}, static_cast<int32_t>(num_strips),
      [&](int32_t i) { return static_cast<int32_t>(shared.by_rank.strips[i]); },
      [&](int32_t, const float (&values)[kGroup]) {
        slot += FilterPolicy::kNumWarps; /* in order */
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (!(values[j] >= floor)) continue;
          const uint32_t at = atomicAdd(&shared.num_candidates, 1u);
          if (at >= FilterPolicy::kMaxKept) continue;
          shared.by_rank.candidates[at] = values[j];
          shared.by_rank.slots[at] = static_cast<uint16_t>(slot);
        }
      });
  __syncthreads();
  return shared.num_candidates;
}

/* shared.by_rank.ranks. All threads take part and get the weight of the top k (of all without one). */
__device__ __forceinline__ uint64_t
rank_candidates(const RowLaw& law, int32_t count, int32_t top_k, float unit, FilterShared& shared) {
  for (int32_t i = threadIdx.x; i < count; i += FilterPolicy::kNumThreads) {
    shared.by_rank.ranks.weights[i] = fixed_weight(law, shared.by_rank.candidates[i], unit);
  }
  __syncthreads();
  const int32_t parts = threads_each(count);
  const int32_t part = static_cast<int32_t>(threadIdx.x) % parts;
  uint64_t held = 0;
  for (int32_t first = 0; first < count; first += FilterPolicy::kNumThreads / parts) {
    const int32_t index = first + static_cast<int32_t>(threadIdx.x) / parts;
    const float own = index < count ? shared.by_rank.candidates[index] : INFINITY;
    int32_t larger = 0;
    uint64_t above = 0;
#pragma unroll 4
    for (int32_t other = part; other < count; other += parts) {
      if (!(shared.by_rank.candidates[other] > own)) continue;
      ++larger;
      above += shared.by_rank.ranks.weights[other];
    }
    for (int mask = 1; mask < parts; mask *= 2) {
      larger += shuffle_xor(larger, mask);
      above += shuffle_xor(above, mask);
    }
    if (part != 0 || index >= count) continue;
    const bool kept = top_k == 0 || larger < top_k;
    shared.by_rank.ranks.above[index] = kept ? above : UINT64_MAX;
    if (kept) held += shared.by_rank.ranks.weights[index];
  }
  return cta_sum(held, shared); /* its barriers stand behind the writes */
}

/* Sums of the kept candidates by strip, relative to the zone's maximum; returns the mass of the law. Those
 * of all strips are 0 before; ranks.weights is 0 for candidates that are not kept. All threads take
 * part. */
__device__ __forceinline__ uint64_t
write_kept(const RowLaw& law, int32_t count, float unit, FilterShared& shared, Strips* sums) {
  RankShared& ranked = shared.by_rank;
  __syncthreads(); /* all are done with the weights above */
  for (uint32_t i = threadIdx.x; i < shared.num_strips; i += FilterPolicy::kNumThreads) {
    ranked.ranks.masses[i] = {0, 0};
  }
  __syncthreads();
  uint64_t kept = 0;
  for (int32_t i = threadIdx.x; i < count; i += FilterPolicy::kNumThreads) {
    const uint64_t weight = ranked.ranks.weights[i];
    Wide& mass = ranked.ranks.masses[ranked.slots[i]];
    add_wide(&mass.low, &mass.high, weight);
    kept += weight;
  }
  kept = cta_sum(kept, shared); /* its barriers stand behind the masses */
  for (uint32_t i = threadIdx.x; i < shared.num_strips; i += FilterPolicy::kNumThreads) {
    const int32_t strip = ranked.strips[i];
    const int32_t zone = strip / kStripsPerZone;
    const uint64_t mass = wide(ranked.ranks.masses[i].low, ranked.ranks.masses[i].high);
    const float most = logit_weight(shared.zone_max[zone], law.max, law.scale);
    if (mass > 0) sums[zone].of[strip % kStripsPerZone] = __ull2float_rn(mass) / unit / most;
  }
  return kept;
}

/* Steps 1 to 3; false when the candidates cannot decide. All threads take part. */
__device__ __forceinline__ bool filter_by_ranks(const VerifyInputs& in,
                                                const TargetRow& row,
                                                const Filters& filters,
                                                const Team& team,
                                                FilterShared& shared,
                                                const Strips* maxima,
                                                Strips* sums,
                                                RowLaw* law) {
  if (filters.top_k > in.num_zones) return false;
  const bool by_rank = filters.top_k > 0;
  const int32_t rank = by_rank ? filters.top_k : min(FilterPolicy::kFloorRank, in.num_zones);
  const float floor = zone_floor(in, shared, rank);
  const uint32_t found = collect_candidates(in, row, maxima, floor, shared);
  if (found > FilterPolicy::kMaxKept) return false;
  const auto count = static_cast<int32_t>(found);
  if (team.size > 1) team_sync(team); /* all have read the sums */
  for (int32_t zone = threadIdx.x; zone < in.num_zones && team.rank == 0;
       zone += FilterPolicy::kNumThreads) {
    sums[zone] = Strips{};
  }

  const float unit = mass_unit(in.vocab_size);
  const uint64_t held = rank_candidates(*law, count, filters.top_k, unit, shared);
  /* Without top-k the set is the whole row, whose mass is 1 / inv_sum. */
  const uint64_t total = by_rank ? held : __float2ull_rn(unit / law->inv_sum);
  const uint64_t target = target_mass(filters.top_p, total);
  if (!by_rank) {
    const bool top_p_held = filters.top_p < 1.f && held >= target;
    const bool min_p_held = logit_weight(floor, law->max, law->scale) < filters.min_p;
    if (!top_p_held && !min_p_held) return false;
    if (filters.top_p < 1.f && !top_p_held) return false;
  }
  float threshold = INFINITY;
  for (int32_t i = threadIdx.x; i < count; i += FilterPolicy::kNumThreads) {
    const uint64_t above = shared.by_rank.ranks.above[i];
    const bool kept = above != UINT64_MAX && (filters.top_p >= 1.f || above < target);
    if (kept) threshold = fminf(threshold, shared.by_rank.candidates[i]);
  }
  law->threshold =
      cta_reduce<FilterPolicy::kNumThreads>(threshold, MinOp{}, INFINITY, shared.float_scratch);
  law->min_weight = filters.min_p;
  for (int32_t i = threadIdx.x; i < count; i += FilterPolicy::kNumThreads) {
    const float logit = shared.by_rank.candidates[i];
    const bool in_law =
        logit >= law->threshold && logit_weight(logit, law->max, law->scale) >= law->min_weight;
    if (!in_law) shared.by_rank.ranks.weights[i] = 0;
  }
  if (team.rank > 0) return true;
  const uint64_t kept = write_kept(*law, count, unit, shared, sums);
  law->inv_sum = unit / __ull2float_rn(kept);
  return true;
}

/* Grid: target rows, a team of CTAs for each. */
__global__ void __launch_bounds__(FilterPolicy::kNumThreads, FilterPolicy::kCtasPerSm)
    filter_kernel(const __grid_constant__ VerifyInputs in,
                  const Strips* maxima,
                  Strips* sums,
                  RowLaw* laws) {
  __shared__ FilterShared shared;
  fetch_params(in);
  Team team = own_team();
  const auto index = static_cast<int32_t>(blockIdx.x / team.size);
  const int32_t req = find_request_by_warp(in, index);
  if (threadIdx.x == 0) shared.num_strips = shared.num_candidates = 0;
  wait_for_prerequisites();
  release_dependents();
  if (req < 0) return; /* whole CTA, as all returns here */
  const TargetRow row = {index, req, index - in.qo_indptr[req]};
  const Filters filters = filters_of(in, req);
  const bool filtered = filters.top_k > 0 || filters.top_p < 1.f || filters.min_p > 0.f;
  if (!filtered || (filters.top_k > 0 && filters.top_k <= in.num_zones)) { /* work for one */
    if (team.rank > 0) return;
    team.size = 1;
  }
  maxima += row.index * in.num_zones;
  sums += row.index * in.num_zones;
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += FilterPolicy::kNumThreads) {
    shared.zone_max[zone] = zone_max(maxima[zone]);
  }
  if (threadIdx.x / kWarpSize == FilterPolicy::kNumWarps - 1) {
    const RowLaw merged = merge_zones({maxima, sums}, in.num_zones, target_scale(in, req));
    if (threadIdx.x % kWarpSize == 0) shared.law = merged;
  }
  __syncthreads();
  RowLaw law = shared.law;
  if (filtered && law.bad == 0 &&
      !filter_by_ranks(in, row, filters, team, shared, maxima, sums, &law)) {
    filter_by_descent(in, row, filters, team, shared, maxima, sums, &law);
  }
  if (threadIdx.x == 0 && team.rank == 0) laws[index] = law;
}

}  // namespace dspark
