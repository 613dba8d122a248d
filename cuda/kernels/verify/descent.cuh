/*
 * The general way of filtering: the row is searched by a descent over the order of the logits: 2048
 * equal bins of (max - l) / T, then 2048 equal parts of what keys (order-preserving integers) logits of
 * the chosen bin can have, then of one of those, until a part has one logit: after two levels for 16-bit
 * logits, three for f32 ones. Each level is one pass that adds the measure (1 or w) per bin and takes the
 * bin where the running sum reaches the target. For flat laws, large k and masses of ties.
 *
 * A pass reads what strips may hold of its range, by their maxima. Of a search by mass the tail is left
 * out that all together weighs less than half of what is filtered away. One CTA, four strips of a warp on
 * their way at once; for a flat law of 152k tokens three passes.
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
  uint64_t count;    /* target; 0: the share `fraction` of what takes part */
  float fraction;
  float least; /* logits below it are out, and too light to matter */
};

/* Level 0 of the descent: ascending bins of descending logits. */
__device__ __forceinline__ int spread_bin(const RowLaw& law, float logit) {
  const float nats = (law.max - logit) * (law.scale / kLog2E);
  return static_cast<int>(
      fminf(nats * FilterPolicy::kBinsPerNat, static_cast<float>(FilterPolicy::kNumBins - 1)));
}

/* What a level looks at: keys first .. first + 2048 * 2^shift - 1 of bin `spread` of level 0, in parts of
 * 2^shift; spread -1: level 0. */
struct KeyRange {
  int spread;
  uint32_t first;
  int shift;
  float least; /* no logit of the range is below it */
};

/* Bits by which keys of different logits of a row differ at least. */
__device__ __forceinline__ int key_spacing(const VerifyInputs& in) {
  if (in.shape.any || in.target.dtype == DSPARK_DTYPE_F32) return 0;
  return in.target.dtype == DSPARK_DTYPE_BF16 ? 16 : 13;
}

__device__ __forceinline__ int shift_for(uint32_t num_keys_less_one) {
  static_assert(FilterPolicy::kNumBins == 1 << 11);
  return max(0, 32 - __clz(static_cast<int>(num_keys_less_one)) - 11);
}

/* The keys that logits of a bin of level 0 can have, or some more. */
__device__ __forceinline__ KeyRange keys_of_bin(const RowLaw& law, int bin) {
  const float temperature = kLog2E / law.scale;
  const float width = temperature / FilterPolicy::kBinsPerNat;
  const float nearer = static_cast<float>(bin) * width;
  const float slack = 1e-6f * (fabsf(law.max) + nearer + width);
  const bool is_last = bin == FilterPolicy::kNumBins - 1;
  const float most = fminf(law.max, law.max - nearer + slack);
  const float least = is_last ? -FLT_MAX : fmaxf(law.max - nearer - width - slack, -FLT_MAX);
  const uint32_t first = descending_key(most);
  return {bin, first, shift_for(descending_key(least) - first), least};
}

/* Bin of `logit` in a range; -1 when it is not there. */
__device__ __forceinline__ int bin_in_range(const RowLaw& law,
                                            const KeyRange& range,
                                            float logit,
                                            uint32_t key) {
  const int bin = spread_bin(law, logit);
  if (range.spread < 0) return bin;
  if (bin != range.spread || key < range.first) return -1;
  const uint32_t part = (key - range.first) >> range.shift;
  return part < FilterPolicy::kNumBins ? static_cast<int>(part) : -1;
}

/* The bin in which the running sum over `shared.histogram`, started at `before`, reaches the target,
 * which is at most the whole at level 0, and set from it in a search by mass behind top-k. All threads take
 * part. */
__device__ __forceinline__ void choose_bin(
    FilterShared& shared, const Search& search, bool is_first, uint64_t before, uint64_t* target) {
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
  if (is_first) {
    const bool of_total = search.by_mass && search.count == 0;
    *target = of_total ? target_mass(search.fraction, total)
                       : max(min(search.count, total), static_cast<uint64_t>(1));
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

/* shared.histogram of the measures of a range. All threads take part. */
__device__ __forceinline__ void measure_range(const VerifyInputs& in,
                                              const TargetRow& row,
                                              const RowLaw law, /* copies, for registers */
                                              const Search search,
                                              const KeyRange range,
                                              const Strips* maxima,
                                              FilterShared& shared) {
  const float unit = mass_unit(in.vocab_size);
  for (int bin = threadIdx.x; bin < FilterPolicy::kNumBins; bin += FilterPolicy::kNumThreads) {
    shared.histogram.low[bin] = 0;
    shared.histogram.high[bin] = 0;
  }
  __syncthreads();
  for_strips(
      in, row,
      [&](int32_t strip) {
        return maxima[strip / kStripsPerZone].of[strip % kStripsPerZone] >= range.least;
      },
      [&](int32_t, const float (&values)[kGroup]) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float logit = values[j];
          const uint32_t key = descending_key(logit);
          if (!(logit >= range.least) || !(logit > -INFINITY) || key > search.last_key) continue;
          const int bin = bin_in_range(law, range, logit, key);
          if (bin < 0) continue;
          const uint64_t measure = search.by_mass ? fixed_weight(law, logit, unit) : 1;
          add_wide(&shared.histogram.low[bin], &shared.histogram.high[bin], measure);
        }
      });
  __syncthreads();
}

/* The key of the threshold logit, or one behind it that no other logit has before. All threads take part
 * and get it. */
__device__ __noinline__ uint32_t find_threshold(const VerifyInputs& in,
                                                const TargetRow& row,
                                                const RowLaw& law,
                                                const Search& search,
                                                const Strips* maxima,
                                                FilterShared& shared) {
  const int spacing = key_spacing(in);
  uint64_t target = 0;
  uint64_t before = 0;
  KeyRange range = {-1, 0, 0, search.least};
#pragma unroll 1
  while (true) {
    __syncthreads(); /* readers of the histogram, of shared.bin and shared.before are done */
    measure_range(in, row, law, search, range, maxima, shared);
    const bool is_first = range.spread < 0;
    choose_bin(shared, search, is_first, before, &target);
    before = shared.before;
    const int bin = shared.bin;
    if (is_first) {
      range = keys_of_bin(law, bin);
      range.least = fmaxf(range.least, search.least);
      continue;
    }
    range.first += static_cast<uint32_t>(bin) << range.shift;
    const uint32_t rest = (1u << range.shift) - 1;
    if (range.shift <= spacing) {
      return min(min(range.first + rest, search.last_key), descending_key(-FLT_MAX));
    }
    range.shift = shift_for(rest);
  }
}

/* Sums of what the law keeps by strip, in place of those of all. All threads take part. */
__device__ __forceinline__ void keep_by_sweep(const VerifyInputs& in,
                                              const TargetRow& row,
                                              FilterShared& shared,
                                              const Strips* maxima,
                                              Strips* sums,
                                              RowLaw* out) {
  const RowLaw law = *out; /* in registers */
  const auto in_law = [&](float logit) {
    return logit > -INFINITY && logit >= law.threshold &&
           logit_weight(logit, law.max, law.scale) >= law.min_weight;
  };
  const auto write = [&](int32_t strip, float sum) {
    if (threadIdx.x % kWarpSize == 0) sums[strip / kStripsPerZone].of[strip % kStripsPerZone] = sum;
  };
  for_strips(
      in, row,
      [&](int32_t strip) {
        const bool holds = in_law(maxima[strip / kStripsPerZone].of[strip % kStripsPerZone]);
        if (!holds) write(strip, 0.f);
        return holds;
      },
      [&](int32_t strip, const float (&values)[kGroup]) {
        const float most = shared.zone_max[strip / kStripsPerZone];
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (in_law(values[j])) sum += logit_weight(values[j], most, law.scale);
        }
        write(strip, warp_reduce(sum, SumOp{}));
      });
  __syncthreads();
  float sum = 0.f;
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += FilterPolicy::kNumThreads) {
    const float own = zone_sum(sums[zone]);
    if (own > 0.f) sum += own * logit_weight(shared.zone_max[zone], law.max, law.scale);
  }
  sum = cta_reduce<FilterPolicy::kNumThreads>(sum, SumOp{}, 0.f, shared.float_scratch);
  out->inv_sum = 1.f / sum;
}

/* The general way. All threads take part. */
__device__ __noinline__ void filter_by_descent(const VerifyInputs& in,
                                               const TargetRow& row,
                                               const Filters& filters,
                                               FilterShared& shared,
                                               const Strips* maxima,
                                               Strips* sums,
                                               RowLaw* law) {
  Search search = {};
  search.last_key = UINT32_MAX;
  search.least = -INFINITY;
  law->threshold = -INFINITY;
  if (filters.top_k > 0) {
    search.count = static_cast<uint64_t>(filters.top_k);
    search.last_key = find_threshold(in, row, *law, search, maxima, shared);
    law->threshold = logit_of_key(search.last_key);
  }
  if (filters.top_p < 1.f) {
    search.by_mass = true;
    search.fraction = filters.top_p;
    search.count = 0;
    if (filters.top_k == 0) { /* the whole is known, and how much of it may be left out */
      const float whole = 1.f / law->inv_sum;
      search.count = target_mass(filters.top_p, __float2ull_rn(mass_unit(in.vocab_size) * whole));
      const float tail = 0.5f * (1.f - filters.top_p) * whole / static_cast<float>(in.vocab_size);
      if (tail > 0.f) search.least = law->max + log2f(tail) / law->scale;
    }
    law->threshold = logit_of_key(find_threshold(in, row, *law, search, maxima, shared));
  }
  law->min_weight = filters.min_p;
  keep_by_sweep(in, row, shared, maxima, sums, law);
}

}  // namespace dspark
