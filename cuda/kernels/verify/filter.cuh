/*
 * Top-k, top-p and min-p without sorting the vocabulary: a law's threshold and normaliser.
 *
 * One CTA per target row; rows without filters only have their zones merged. Otherwise
 *
 *   1. floor       the k-th largest of the zones' maxima (the 64th without top-k): at least that many
 *                  tokens are at or above it, so the threshold of top-k is, too.
 *   2. candidates  the logits at or above the floor, into shared memory. Zones below the floor are not
 *                  read: k of 149 zones for top-k, 64 else.
 *   3. ranks       a thread per candidate counts the larger ones and adds up their weights. A token is
 *                  in the top-k set iff fewer than k are larger; a token of that set is in the top-p
 *                  set iff those above it weigh less than top_p of the set: both keep ties, since tied
 *                  tokens count the same. min-p compares w with min_p * (max w = 1).
 *
 * Weights are added as 64-bit fixed-point integers, so that no order of candidates or atomics shows.
 * The candidates decide when they must hold the threshold: always for top-k up to num_zones; for top-p
 * without top-k when they hold top_p of all mass; for min-p when the floor weighs less than min_p. They
 * do not when a law is flat, k is large or thousands of logits are tied (kMaxKept). Then the row is
 * searched by a descent over the order of the logits: 2048 equal bins of (max - l) / T, then the 32
 * bits of the logits' order-preserving key, 11 + 11 + 10, each level one pass that adds the measure (1
 * or w) per bin and takes the bin where the running sum reaches the target. At most 9 passes, from L2.
 *
 * Bytes: k / num_zones of the row a second time, from L2 or memory. Limited by latency at few rows.
 */
#pragma once

#include "kernels/verify/zones.cuh"

namespace dspark {

struct FilterPolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kMaxKept = 1024; /* candidates */
  static constexpr int kFloorRank = 64; /* zones read without top-k */
  static constexpr int kNumBins = 2048;
  static constexpr int kBinsPerThread = kNumBins / kNumThreads;
  static constexpr float kBinsPerNat = 32.f;
  static constexpr int kNumLevels = 4;
};

/* 64-bit sums by bin, from two native 32-bit atomics. */
struct Histogram {
  uint32_t low[FilterPolicy::kNumBins];
  uint32_t high[FilterPolicy::kNumBins];
};

__device__ __forceinline__ void add_wide(uint32_t* low_word, uint32_t* high_word, uint64_t value) {
  const uint32_t low = static_cast<uint32_t>(value);
  uint32_t high = static_cast<uint32_t>(value >> 32);
  if (low != 0) high += atomicAdd(low_word, low) + low < low; /* the carry */
  if (high != 0) atomicAdd(high_word, high);
}

struct FilterShared {
  Histogram histogram; /* its first words are the candidates of the ranks */
  float zone_max[kMaxZones];
  RowLaw law;
  uint64_t warp_totals[FilterPolicy::kNumWarps];
  float float_scratch[FilterPolicy::kNumWarps];
  uint32_t num_candidates;
  uint32_t mass[2]; /* low and high word of a sum */
  uint64_t before;  /* measure of the bins before the chosen one */
  int32_t bin;
};

/* A request's filters; top_k 0, top_p 1, min_p 0: off. */
struct Filters {
  int32_t top_k;
  float top_p;
  float min_p;
};

__device__ __forceinline__ Filters filters_of(const VerifyInputs& in, int32_t req) {
  Filters filters = {0, 1.f, 0.f};
  if (!(in.temperature[req] > 0.f)) return filters;
  if (in.top_k != nullptr && in.top_k[req] > 0 && in.top_k[req] < in.vocab_size) {
    filters.top_k = in.top_k[req];
  }
  if (in.top_p != nullptr && in.top_p[req] < 1.f) filters.top_p = fmaxf(in.top_p[req], 0.f);
  if (in.min_p != nullptr) filters.min_p = fminf(fmaxf(in.min_p[req], 0.f), 1.f);
  return filters;
}

/* A weight (at most 1) as an integer: a sum of vocab_size of them stays below 2^63. */
__device__ __forceinline__ float mass_unit(int32_t vocab_size) {
  return exp2f(static_cast<float>(62 - (32 - __clz(vocab_size))));
}

__device__ __forceinline__ uint64_t fixed_weight(const RowLaw& law, float logit, float unit) {
  return __float2ull_rn(logit_weight(logit, law.max, law.scale) * unit);
}

/* The share `fraction` of `total`, at least 1. */
__device__ __forceinline__ uint64_t target_mass(float fraction, uint64_t total) {
  const double target = ceil(static_cast<double>(fraction) * static_cast<double>(total));
  return max(min(static_cast<uint64_t>(target), total), static_cast<uint64_t>(1));
}

/* f(logit) for every shaped logit of zones whose maximum is at least `floor`; -inf is left out. */
template <typename F>
__device__ __forceinline__ void for_each_logit(
    const VerifyInputs& in, const TargetRow& row, const FilterShared& shared, float floor, F&& f) {
  for (int32_t zone = threadIdx.x / kWarpSize; zone < in.num_zones;
       zone += FilterPolicy::kNumWarps) {
    if (shared.zone_max[zone] < floor) continue; /* the same for the whole warp */
    touch_zone(in.target, row.index, zone, in.vocab_size);
#pragma unroll 1
    for (int group = 0; group < kGroupsPerLane; ++group) {
      float values[kGroup];
      load_target_group(in, row, zone, group, values);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (values[j] > -INFINITY) f(values[j]);
      }
    }
  }
}

/* A sum of integers over the CTA. All threads take part and get it. */
__device__ __forceinline__ uint64_t cta_sum(uint64_t value, FilterShared& shared) {
  __syncthreads();
  if (threadIdx.x < 2) shared.mass[threadIdx.x] = 0;
  __syncthreads();
  if (value != 0) add_wide(&shared.mass[0], &shared.mass[1], value);
  __syncthreads();
  return static_cast<uint64_t>(shared.mass[1]) << 32 | shared.mass[0];
}

/* The rank-th largest (from 1) of the zones' maxima. All threads take part and get it. */
__device__ __forceinline__ float zone_floor(const VerifyInputs& in,
                                            FilterShared& shared,
                                            int32_t rank) {
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += FilterPolicy::kNumThreads) {
    const float own = shared.zone_max[zone];
    int32_t before = 0;
    for (int32_t other = 0; other < in.num_zones; ++other) {
      const float value = shared.zone_max[other];
      before += value > own || (value == own && other < zone);
    }
    if (before == rank - 1) shared.float_scratch[0] = own;
  }
  __syncthreads();
  const float floor = shared.float_scratch[0];
  __syncthreads();
  return floor;
}

/* Steps 1 to 3; false when the candidates cannot decide. All threads take part. */
__device__ __forceinline__ bool filter_by_ranks(const VerifyInputs& in,
                                                const TargetRow& row,
                                                const Filters& filters,
                                                FilterShared& shared,
                                                RowLaw* law) {
  if (filters.top_k > in.num_zones) return false;
  const bool by_rank = filters.top_k > 0;
  const int32_t rank = by_rank ? filters.top_k : min(FilterPolicy::kFloorRank, in.num_zones);
  const float floor = zone_floor(in, shared, rank);
  float* candidates = reinterpret_cast<float*>(&shared.histogram);
  if (threadIdx.x == 0) shared.num_candidates = 0;
  __syncthreads();
  for_each_logit(in, row, shared, floor, [&](float logit) {
    if (logit < floor) return;
    const uint32_t at = atomicAdd(&shared.num_candidates, 1u);
    if (at < FilterPolicy::kMaxKept) candidates[at] = logit;
  });
  __syncthreads();
  const auto count = static_cast<int32_t>(min(shared.num_candidates, INT32_MAX + 0u));
  if (count > FilterPolicy::kMaxKept) return false;

  constexpr int kPerThread = FilterPolicy::kMaxKept / FilterPolicy::kNumThreads;
  const float unit = mass_unit(in.vocab_size);
  uint64_t above[kPerThread] = {}; /* weight of larger candidates */
  bool in_top_k[kPerThread] = {};
  uint64_t own_mass = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int32_t index = threadIdx.x + i * FilterPolicy::kNumThreads;
    if (index >= count) break;
    const float own = candidates[index];
    int32_t larger = 0;
    for (int32_t other = 0; other < count; ++other) {
      if (!(candidates[other] > own)) continue;
      ++larger;
      above[i] += fixed_weight(*law, candidates[other], unit);
    }
    in_top_k[i] = !by_rank || larger < filters.top_k;
    if (in_top_k[i]) own_mass += fixed_weight(*law, own, unit);
  }
  const uint64_t held = cta_sum(own_mass, shared);
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
  uint64_t kept_mass = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int32_t index = threadIdx.x + i * FilterPolicy::kNumThreads;
    if (index >= count || !in_top_k[i]) continue;
    if (filters.top_p < 1.f && above[i] >= target) continue;
    threshold = fminf(threshold, candidates[index]);
    const bool kept = logit_weight(candidates[index], law->max, law->scale) >= filters.min_p;
    if (kept) kept_mass += fixed_weight(*law, candidates[index], unit);
  }
  law->threshold =
      cta_reduce<FilterPolicy::kNumThreads>(threshold, MinOp{}, INFINITY, shared.float_scratch);
  law->min_weight = filters.min_p;
  const uint64_t kept = cta_sum(kept_mass, shared);
  law->inv_sum = unit / static_cast<float>(kept);
  return true;
}

/* Descending order of logits as ascending unsigned keys; -0 and +0 are one. */
__device__ __forceinline__ uint32_t descending_key(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.f);
  return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu;
}

__device__ __forceinline__ float logit_of_key(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key : ~key & 0x7fffffffu);
}

/* Inclusive sums over the CTA's threads, and their total. All threads take part. */
__device__ __forceinline__ uint64_t cta_inclusive_sum(uint64_t value,
                                                      FilterShared& shared,
                                                      uint64_t* total) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint64_t left = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += left;
  }
  __syncthreads(); /* readers of an earlier call are done */
  if (lane == kWarpSize - 1) shared.warp_totals[warp] = value;
  __syncthreads();
  uint64_t before = 0;
  *total = 0;
  for (int i = 0; i < FilterPolicy::kNumWarps; ++i) {
    const uint64_t warp_total = shared.warp_totals[i];
    if (i < warp) before += warp_total;
    *total += warp_total;
  }
  return before + value;
}

/* A search for the logit at which a measure of the tokens above, ties included, reaches a target. */
struct Search {
  uint32_t last_key; /* tokens with a larger key are out (of the top-k set) */
  bool by_mass;      /* measure w; else every token counts 1 */
  uint64_t count;    /* target when !by_mass */
  float fraction;    /* target as a share of all mass when by_mass */
};

/* Level 0 of the descent: ascending bins of descending logits. */
__device__ __forceinline__ int spread_bin(const RowLaw& law, float logit) {
  const float nats = (law.max - logit) * (law.scale / kLog2E);
  return static_cast<int>(
      fminf(nats * FilterPolicy::kBinsPerNat, static_cast<float>(FilterPolicy::kNumBins - 1)));
}

/* Bin of `logit` at `level` (1..3) among the keys that share `prefix`; -1 when it does not. */
__device__ __forceinline__ int key_bin(uint32_t key, int level, uint32_t prefix) {
  switch (level) {
    case 1:
      return static_cast<int>(key >> 21);
    case 2:
      return key >> 21 == prefix ? static_cast<int>(key >> 10 & 0x7ffu) : -1;
    default:
      return key >> 10 == prefix ? static_cast<int>(key & 0x3ffu) : -1;
  }
}

/* The bin in which the running sum over `shared.histogram`, started at `before`, reaches the
 * target (*target is set from the total at level 0 of a search by mass). All threads take part. */
__device__ __forceinline__ void choose_bin(
    FilterShared& shared, const Search& search, int level, uint64_t before, uint64_t* target) {
  constexpr int kPerThread = FilterPolicy::kBinsPerThread;
  uint64_t own[kPerThread];
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int bin = threadIdx.x * kPerThread + i;
    own[i] = static_cast<uint64_t>(shared.histogram.high[bin]) << 32 | shared.histogram.low[bin];
    sum += own[i];
  }
  uint64_t total;
  uint64_t running = before + cta_inclusive_sum(sum, shared, &total) - sum;
  if (level == 0) {
    *target = search.by_mass ? target_mass(search.fraction, total)
                             : max(min(*target, total), static_cast<uint64_t>(1));
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (running < *target && *target <= running + own[i]) { /* one bin of one thread */
      shared.bin = threadIdx.x * kPerThread + i;
      shared.before = running;
    }
    running += own[i];
  }
  __syncthreads();
}

/* The key of the threshold logit. All threads take part and get it. */
__device__ uint32_t find_threshold(const VerifyInputs& in,
                                   const TargetRow& row,
                                   const RowLaw& law,
                                   const Search& search,
                                   FilterShared& shared) {
  const float unit = mass_unit(in.vocab_size);
  uint64_t target = search.count;
  uint64_t before = 0;
  int first_bin = 0;
  uint32_t prefix = 0;
  for (int level = 0; level < FilterPolicy::kNumLevels; ++level) {
    __syncthreads(); /* readers of the histogram, of shared.bin and shared.before are done */
    for (int bin = threadIdx.x; bin < FilterPolicy::kNumBins; bin += FilterPolicy::kNumThreads) {
      shared.histogram.low[bin] = 0;
      shared.histogram.high[bin] = 0;
    }
    __syncthreads();
    for_each_logit(in, row, shared, -INFINITY, [&](float logit) {
      const uint32_t key = descending_key(logit);
      if (key > search.last_key) return;
      int bin = spread_bin(law, logit);
      if (level > 0) bin = bin == first_bin ? key_bin(key, level, prefix) : -1;
      if (bin < 0) return;
      const uint64_t measure = search.by_mass ? fixed_weight(law, logit, unit) : 1;
      add_wide(&shared.histogram.low[bin], &shared.histogram.high[bin], measure);
    });
    __syncthreads();
    choose_bin(shared, search, level, before, &target);
    before = shared.before;
    if (level == 0) {
      first_bin = shared.bin;
    } else {
      prefix = prefix << (level == 3 ? 10 : 11) | static_cast<uint32_t>(shared.bin);
    }
  }
  return prefix;
}

/* The general way. All threads take part. */
__device__ __forceinline__ void filter_by_descent(const VerifyInputs& in,
                                                  const TargetRow& row,
                                                  const Filters& filters,
                                                  FilterShared& shared,
                                                  RowLaw* law) {
  Search search = {};
  search.last_key = UINT32_MAX;
  law->threshold = -INFINITY;
  if (filters.top_k > 0) {
    search.count = static_cast<uint64_t>(filters.top_k);
    search.last_key = find_threshold(in, row, *law, search, shared);
    law->threshold = logit_of_key(search.last_key);
  }
  if (filters.top_p < 1.f) {
    search.by_mass = true;
    search.fraction = filters.top_p;
    law->threshold = logit_of_key(find_threshold(in, row, *law, search, shared));
  }
  law->min_weight = filters.min_p;
  float sum = 0.f;
  for_each_logit(in, row, shared, law->threshold, [&](float logit) {
    const float weight = logit_weight(logit, law->max, law->scale);
    if (logit >= law->threshold && weight >= law->min_weight) sum += weight;
  });
  sum = cta_reduce<FilterPolicy::kNumThreads>(sum, SumOp{}, 0.f, shared.float_scratch);
  law->inv_sum = 1.f / sum;
}

/* Grid: target rows. */
__global__ void __launch_bounds__(FilterPolicy::kNumThreads, 1)
    filter_kernel(VerifyInputs in, const ZoneStats* zones, RowLaw* laws) {
  __shared__ FilterShared shared;
  const auto index = static_cast<int32_t>(blockIdx.x);
  const int32_t req = find_request(in, index);
  if (req < 0) return; /* whole CTA, as all returns here */
  const TargetRow row = {index, req, index - in.qo_indptr[req]};
  zones += row.index * in.num_zones;
  if (threadIdx.x < kWarpSize) {
    const RowLaw merged = merge_zones(zones, in.num_zones, target_scale(in, req));
    if (threadIdx.x == 0) shared.law = merged;
  }
  const Filters filters = filters_of(in, req);
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += FilterPolicy::kNumThreads) {
    shared.zone_max[zone] = zones[zone].max;
  }
  __syncthreads();
  RowLaw law = shared.law;
  const bool filtered = filters.top_k > 0 || filters.top_p < 1.f || filters.min_p > 0.f;
  if (filtered && law.bad == 0 && !filter_by_ranks(in, row, filters, shared, &law)) {
    filter_by_descent(in, row, filters, shared, &law);
  }
  if (threadIdx.x == 0) laws[index] = law;
}

}  // namespace dspark
