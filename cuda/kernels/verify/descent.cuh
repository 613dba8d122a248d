/*
 * The general way of filtering: the row is searched by a descent over the order of the logits: 2048
 * equal bins of (max - l) / T, then the 32 bits of the logits' order-preserving key, 11 + 11 + 10, each
 * level one pass that adds the measure (1 or w) per bin and takes the bin where the running sum reaches
 * the target. At most 9 passes of one CTA, from L2: for flat laws, large k and masses of ties.
 */
#pragma once

#include "kernels/verify/filter_shared.cuh"

namespace dspark {

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
__device__ __noinline__ uint32_t find_threshold(const VerifyInputs& in,
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
    for_each_strip(in, row, [&](int32_t, const float (&values)[kGroup]) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float logit = values[j];
        const uint32_t key = descending_key(logit);
        if (!(logit > -INFINITY) || key > search.last_key) continue;
        int bin = spread_bin(law, logit);
        if (level > 0) bin = bin == first_bin ? key_bin(key, level, prefix) : -1;
        if (bin < 0) continue;
        const uint64_t measure = search.by_mass ? fixed_weight(law, logit, unit) : 1;
        add_wide(&shared.histogram.low[bin], &shared.histogram.high[bin], measure);
      }
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

/* Sums of what the law keeps by strip, in place of those of all. All threads take part. */
__device__ __forceinline__ void keep_by_sweep(
    const VerifyInputs& in, const TargetRow& row, FilterShared& shared, Strips* sums, RowLaw* law) {
  for_each_strip(in, row, [&](int32_t strip, const float (&values)[kGroup]) {
    const float most = shared.zone_max[strip / kStripsPerZone];
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float logit = values[j];
      const bool in_law = logit > -INFINITY && logit >= law->threshold &&
                          logit_weight(logit, law->max, law->scale) >= law->min_weight;
      if (in_law) sum += logit_weight(logit, most, law->scale);
    }
    sum = warp_reduce(sum, SumOp{});
    if (threadIdx.x % kWarpSize == 0) sums[strip / kStripsPerZone].of[strip % kStripsPerZone] = sum;
  });
  __syncthreads();
  float sum = 0.f;
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += FilterPolicy::kNumThreads) {
    const float own = zone_sum(sums[zone]);
    if (own > 0.f) sum += own * logit_weight(shared.zone_max[zone], law->max, law->scale);
  }
  sum = cta_reduce<FilterPolicy::kNumThreads>(sum, SumOp{}, 0.f, shared.float_scratch);
  law->inv_sum = 1.f / sum;
}

/* The general way. All threads take part. */
__device__ __noinline__ void filter_by_descent(const VerifyInputs& in,
                                               const TargetRow& row,
                                               const Filters& filters,
                                               FilterShared& shared,
                                               Strips* sums,
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
  keep_by_sweep(in, row, shared, sums, law);
}

}  // namespace dspark
