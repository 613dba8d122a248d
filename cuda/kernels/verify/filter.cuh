/*
 * Top-k, top-p and min-p without sorting the vocabulary: a law's threshold and normaliser.
 *
 * One CTA per target row; rows without filters only have their zones merged. Otherwise
 *
 *   1. floor       the k-th largest of the zones' maxima (the 64th without top-k): at least that many
 *                  tokens are at or above it, so the threshold of top-k is, too.
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

/* The rank-th largest (from 1) of the zones' maxima. All threads take part and get it. */
__device__ __forceinline__ float zone_floor(const VerifyInputs& in,
                                            FilterShared& shared,
                                            int32_t rank) {
  const int32_t parts = threads_each(in.num_zones);
  const int32_t part = static_cast<int32_t>(threadIdx.x) % parts;
  const int32_t stride = FilterPolicy::kNumThreads / parts;
  for (int32_t first = 0; first < in.num_zones; first += stride) {
    const int32_t zone = first + static_cast<int32_t>(threadIdx.x) / parts;
    const float own = zone < in.num_zones ? shared.zone_max[zone] : 0.f;
    int32_t before = 0;
#pragma unroll 4
    for (int32_t other = part; other < in.num_zones; other += parts) {
      const float value = shared.zone_max[other];
      before += value > own || (value == own && other < zone);
    }
    for (int mask = 1; mask < parts; mask *= 2) before += shuffle_xor(before, mask);
    if (part == 0 && zone < in.num_zones && before == rank - 1) shared.floor = own;
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
        shared.strips[at] = static_cast<uint16_t>(zone * kStripsPerZone + i);
      }
    }
  }
  __syncthreads();
  const uint32_t num_strips = shared.num_strips;
  if (num_strips > FilterPolicy::kMaxKept) return num_strips; /* of one candidate each, at least */
#pragma unroll 1
  for (uint32_t i = threadIdx.x / kWarpSize; i < num_strips; i += FilterPolicy::kNumWarps) {
    const int32_t strip = shared.strips[i];
    float values[kGroup];
    load_target_strip(in, row, strip, values);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (!(values[j] >= floor)) continue;
      const uint32_t at = atomicAdd(&shared.num_candidates, 1u);
      if (at >= FilterPolicy::kMaxKept) continue;
      shared.candidates[at] = values[j];
      shared.candidate_strips[at] = static_cast<uint16_t>(strip);
    }
  }
  __syncthreads();
  return shared.num_candidates;
}

/* shared.ranks. All threads take part and get the weight of the top k (of all without one). */
__device__ __forceinline__ uint64_t
rank_candidates(const RowLaw& law, int32_t count, int32_t top_k, float unit, FilterShared& shared) {
  for (int32_t i = threadIdx.x; i < count; i += FilterPolicy::kNumThreads) {
    shared.ranks.weights[i] = fixed_weight(law, shared.candidates[i], unit);
  }
  __syncthreads();
  const int32_t parts = threads_each(count);
  const int32_t part = static_cast<int32_t>(threadIdx.x) % parts;
  uint64_t held = 0;
  for (int32_t first = 0; first < count; first += FilterPolicy::kNumThreads / parts) {
    const int32_t index = first + static_cast<int32_t>(threadIdx.x) / parts;
    const float own = index < count ? shared.candidates[index] : INFINITY;
    int32_t larger = 0;
    uint64_t above = 0;
    for (int32_t other = part; other < count; other += parts) {
      if (!(shared.candidates[other] > own)) continue;
      ++larger;
      above += shared.ranks.weights[other];
    }
    for (int mask = 1; mask < parts; mask *= 2) {
      larger += shuffle_xor(larger, mask);
      above += shuffle_xor(above, mask);
    }
    if (part != 0 || index >= count) continue;
    const bool kept = top_k == 0 || larger < top_k;
    shared.ranks.above[index] = kept ? above : UINT64_MAX;
    if (kept) held += shared.ranks.weights[index];
  }
  return cta_sum(held, shared); /* its barriers stand behind the writes */
}

/* Sums of the kept candidates by strip, relative to the zone's maximum, in place of those of all; returns
 * the mass of the law. shared.ranks.weights is 0 for those not kept. All threads take part. */
__device__ __forceinline__ uint64_t write_kept(const VerifyInputs& in,
                                               const RowLaw& law,
                                               int32_t count,
                                               float unit,
                                               FilterShared& shared,
                                               Strips* sums) {
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += FilterPolicy::kNumThreads) {
    sums[zone] = Strips{};
  }
  __syncthreads(); /* also behind the weights */
  const int32_t parts = threads_each(count);
  const int32_t part = static_cast<int32_t>(threadIdx.x) % parts;
  uint64_t kept = 0;
  for (int32_t first = 0; first < count; first += FilterPolicy::kNumThreads / parts) {
    const int32_t index = first + static_cast<int32_t>(threadIdx.x) / parts;
    const bool counts = index < count && shared.ranks.weights[index] > 0;
    const int32_t strip = counts ? shared.candidate_strips[index] : -1;
    uint64_t mass = 0;
    bool is_first = counts; /* of its strip: it writes for all */
    for (int32_t other = part; other < count; other += parts) {
      if (shared.candidate_strips[other] != strip) continue;
      const uint64_t weight = shared.ranks.weights[other];
      mass += weight;
      is_first &= weight == 0 || other >= index;
    }
    for (int mask = 1; mask < parts; mask *= 2) {
      mass += shuffle_xor(mass, mask);
      is_first &= shuffle_xor(is_first ? 1 : 0, mask) != 0;
    }
    if (part != 0 || !counts) continue;
    kept += shared.ranks.weights[index];
    if (!is_first) continue;
    const int32_t zone = strip / kStripsPerZone;
    const float most = logit_weight(shared.zone_max[zone], law.max, law.scale);
    sums[zone].of[strip % kStripsPerZone] = __ull2float_rn(mass) / unit / most;
  }
  return cta_sum(kept, shared);
}

/* Steps 1 to 3; false when the candidates cannot decide. All threads take part. */
__device__ __forceinline__ bool filter_by_ranks(const VerifyInputs& in,
                                                const TargetRow& row,
                                                const Filters& filters,
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
    const uint64_t above = shared.ranks.above[i];
    const bool kept = above != UINT64_MAX && (filters.top_p >= 1.f || above < target);
    if (kept) threshold = fminf(threshold, shared.candidates[i]);
  }
  law->threshold =
      cta_reduce<FilterPolicy::kNumThreads>(threshold, MinOp{}, INFINITY, shared.float_scratch);
  law->min_weight = filters.min_p;
  for (int32_t i = threadIdx.x; i < count; i += FilterPolicy::kNumThreads) {
    const float logit = shared.candidates[i];
    const bool in_law =
        logit >= law->threshold && logit_weight(logit, law->max, law->scale) >= law->min_weight;
    if (!in_law) shared.ranks.weights[i] = 0;
  }
  const uint64_t kept = write_kept(in, *law, count, unit, shared, sums);
  law->inv_sum = unit / __ull2float_rn(kept);
  return true;
}

/* Grid: target rows. */
__global__ void __launch_bounds__(FilterPolicy::kNumThreads, FilterPolicy::kCtasPerSm)
    filter_kernel(const __grid_constant__ VerifyInputs in,
                  const Strips* maxima,
                  Strips* sums,
                  RowLaw* laws) {
  __shared__ FilterShared shared;
  const auto index = static_cast<int32_t>(blockIdx.x);
  const int32_t req = find_request_by_warp(in, index);
  if (threadIdx.x == 0) shared.num_strips = shared.num_candidates = 0;
  wait_for_prerequisites();
  release_dependents();
  if (req < 0) return; /* whole CTA, as all returns here */
  const TargetRow row = {index, req, index - in.qo_indptr[req]};
  maxima += row.index * in.num_zones;
  sums += row.index * in.num_zones;
  const Filters filters = filters_of(in, req);
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += FilterPolicy::kNumThreads) {
    shared.zone_max[zone] = zone_max(maxima[zone]);
  }
  if (threadIdx.x / kWarpSize == FilterPolicy::kNumWarps - 1) {
    const RowLaw merged = merge_zones({maxima, sums}, in.num_zones, target_scale(in, req));
    if (threadIdx.x % kWarpSize == 0) shared.law = merged;
  }
  __syncthreads();
  RowLaw law = shared.law;
  const bool filtered = filters.top_k > 0 || filters.top_p < 1.f || filters.min_p > 0.f;
  if (filtered && law.bad == 0 && !filter_by_ranks(in, row, filters, shared, maxima, sums, &law)) {
    filter_by_descent(in, row, filters, shared, maxima, sums, &law);
  }
  if (threadIdx.x == 0) laws[index] = law;
}

}  // namespace dspark
