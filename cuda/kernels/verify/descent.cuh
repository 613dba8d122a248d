/*
 * The general way of filtering, for flat laws, large k and masses of ties. Three reads of the row:
 *
 *   1. count    2048 equal bins of (max - l) / T: how many logits each has. What weighs next to nothing
 *               is left out. The bins tell where the measure (a number of tokens, or a mass, of which a
 *               bin has count * w(its middle) or so) reaches its target, to a bin or three.
 *   2. gather   the exact mass before these bins, and a list of what lies in them: some hundred logits. A
 *               mass may show that they were the wrong ones, which the next are then asked for.
 *   3. keep     sums of what the law keeps by strip, and its mass.
 *
 * Between 2 and 3 the list is searched by 2048 equal parts of the keys (order-preserving integers) that
 * its logits can have, then of one of those, until a part has one logit: one level for 16-bit logits,
 * two for f32 ones. Where a list does not fit, the levels read the row.
 *
 * With few rows a cluster of CTAs shares the strips of each: every CTA has a histogram and a list of its
 * own, and all add up everybody's. Counts and masses are integers, so that a law does not depend on who
 * read what.
 *
 * Bytes: up to three times the row, of which strips are left out by their maxima.
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

/* A row that is searched. */
struct DescentRow {
  TargetRow row;
  Team team;
  RowLaw law;
  const Strips* maxima;
  float bins_per_logit;
};

/* A search for the logit at which a measure of the tokens above, ties included, reaches a target. */
struct Search {
  bool by_mass;    /* measure w; else every token counts 1 */
  uint64_t target; /* at least 1 */
  float least;     /* logits below it take no part: finite */
};

/* Where a logit lies on the scale of the bins. */
__device__ __forceinline__ float bin_scale(const DescentRow& at, float logit) {
  return (at.law.max - logit) * at.bins_per_logit;
}

/* Ascending bins of descending logits; the last one has no end. */
__device__ __forceinline__ int spread_bin(const DescentRow& at, float logit) {
  return static_cast<int>(
      fminf(bin_scale(at, logit), static_cast<float>(FilterPolicy::kNumBins - 1)));
}

/* Bins per logit: they reach as far down as a law of that spread is likely to be asked for. */
__device__ __forceinline__ float spread_of(const VerifyInputs& in,
                                           const RowLaw& law,
                                           const Filters& filters) {
  const auto vocab = static_cast<float>(in.vocab_size);
  float nats = 1.f + 2.f * logf(fmaxf(vocab * law.inv_sum, 1.f)); /* of a mean token, twice */
  if (filters.top_k == 0) nats = fminf(nats, logf(2.f * vocab / fmaxf(1.f - filters.top_p, 1e-6f)));
  return static_cast<float>(FilterPolicy::kNumBins) / nats * (law.scale / kLog2E);
}

/* Bins first .. last, and keys from .. from + 2048 * 2^shift - 1 of them in parts of 2^shift. */
struct KeyRange {
  int first;
  int last;
  uint32_t from;
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

/* The keys that logits of some bins can have, or some more. */
__device__ __forceinline__ KeyRange keys_of_bins(const DescentRow& at,
                                                 const Search& search,
                                                 int first,
                                                 int last) {
  const float width = 1.f / at.bins_per_logit;
  const float nearer = static_cast<float>(first) * width;
  const float farther = static_cast<float>(last + 1) * width;
  const float slack = 1e-6f * (fabsf(at.law.max) + farther);
  const float most = fminf(at.law.max, at.law.max - nearer + slack);
  float least = -FLT_MAX;
  if (last < FilterPolicy::kNumBins - 1) least = fmaxf(at.law.max - farther - slack, least);
  least = fminf(fmaxf(least, search.least), most);
  const uint32_t from = descending_key(most);
  return {first, last, from, shift_for(descending_key(least) - from), least};
}

/* Step 1: shared.descent.histogram.low of this CTA. All threads take part. */
__device__ __forceinline__ void count_bins(const VerifyInputs& in,
                                           const DescentRow at, /* copies, for registers */
                                           const float least,
                                           FilterShared& shared) {
  uint32_t* counts_of = shared.descent.histogram.low;
  __syncthreads(); /* readers of the histogram are done */
  for (int bin = threadIdx.x; bin < FilterPolicy::kNumBins; bin += FilterPolicy::kNumThreads) {
    counts_of[bin] = 0;
  }
  __syncthreads();
  uint32_t num_deep = 0; /* of the last bin, which many may crowd into */
  for_strips(
      in, at.row, at.team, in.num_zones * kStripsPerZone,
      [&](int32_t strip) { return strip_max(at.maxima, strip) >= least ? strip : -1; },
      [&](int32_t, const float (&values)[kGroup]) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float place = bin_scale(at, values[j]);
          const bool counts = values[j] >= least;
          const bool is_deep = !(place < static_cast<float>(FilterPolicy::kNumBins - 1));
          if (counts && !is_deep) atomicAdd(&counts_of[static_cast<int>(place)], 1u);
          num_deep += counts && is_deep;
        }
      });
  num_deep = __reduce_add_sync(kAllLanes, num_deep);
  if (threadIdx.x % kWarpSize == 0) atomicAdd(&counts_of[FilterPolicy::kNumBins - 1], num_deep);
  team_sync(at.team);
}

/* The team's counts of four bins. */
__device__ __forceinline__ void team_counts(const Team& team,
                                            const uint32_t* counts,
                                            uint64_t (&out)[FilterPolicy::kBinsPerThread]) {
  for_team(team, counts, [&](const uint4& words) {
    out[0] += words.x;
    out[1] += words.y;
    out[2] += words.z;
    out[3] += words.w;
  });
}

/* shared.bin: the first at which the running sum of `own` [i] of bin 4 * thread + i, started at `before`,
 * reaches `target`, and shared.before: the sum before it; the last bin that has anything where none does.
 * All threads take part. */
__device__ __forceinline__ void choose_bin(const uint64_t (&own)[FilterPolicy::kBinsPerThread],
                                           uint64_t before,
                                           uint64_t target,
                                           FilterShared& shared) {
  constexpr int kPerThread = FilterPolicy::kBinsPerThread;
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sum += own[i];
  uint64_t total;
  uint64_t running = before + cta_inclusive_sum(sum, shared, &total) - sum;
  target = min(target, before + total);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (running < target && target <= running + own[i]) { /* one bin of one thread */
      shared.bin = static_cast<int32_t>(threadIdx.x) * kPerThread + i;
      shared.before = running;
    }
    running += own[i];
  }
  __syncthreads();
}

/* The bin of step 1 in which the measure reaches the target, a mass by guess. All threads take part. */
__device__ __forceinline__ int locate_bin(const VerifyInputs& in,
                                          const DescentRow& at,
                                          const Search& search,
                                          FilterShared& shared) {
  static_assert(FilterPolicy::kBinsPerThread == 4);
  const auto first = static_cast<int32_t>(threadIdx.x) * FilterPolicy::kBinsPerThread;
  uint64_t own[FilterPolicy::kBinsPerThread] = {};
  team_counts(at.team, shared.descent.histogram.low + first, own);
  if (search.by_mass) {
    const float unit = mass_unit(in.vocab_size);
#pragma unroll
    for (int i = 0; i < FilterPolicy::kBinsPerThread; ++i) {
      const float middle = (static_cast<float>(first + i) + 0.5f) / at.bins_per_logit;
      const float weight = exp2_flushed(-middle * at.law.scale) * unit;
      own[i] = __float2ull_rn(weight * static_cast<float>(own[i]));
    }
  }
  choose_bin(own, 0, search.target, shared);
  const int bin = shared.bin;
  team_sync(at.team); /* all have read */
  return bin;
}

/* Step 2: lists what is in the range; the masses before and in it. All threads take part and get them. */
__device__ __forceinline__ TeamWords gather_range(const VerifyInputs& in,
                                                  const DescentRow at, /* copies, for registers */
                                                  const float least,
                                                  const KeyRange range,
                                                  FilterShared& shared) {
  const float unit = mass_unit(in.vocab_size);
  if (threadIdx.x == 0) shared.num_listed = 0;
  __syncthreads();
  const auto begin = static_cast<float>(range.first);
  const float end =
      range.last < FilterPolicy::kNumBins - 1 ? static_cast<float>(range.last + 1) : INFINITY;
  uint64_t before = 0, inside = 0;
  for_strips(
      in, at.row, at.team, in.num_zones * kStripsPerZone,
      [&](int32_t strip) { return strip_max(at.maxima, strip) >= range.least ? strip : -1; },
      [&](int32_t, const float (&values)[kGroup]) {
        float sum = 0.f;     /* of weights before the range */
        uint32_t listed = 0; /* those in it: few, as bits */
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float place = bin_scale(at, values[j]);
          const float weight = logit_weight(values[j], at.law.max, at.law.scale);
          const bool counts = values[j] >= least;
          sum += counts && place < begin ? weight : 0.f;
          listed |= counts && place >= begin && place < end ? 1u << j : 0u;
        }
        before += fixed_sum(sum, unit);
        if (!__any_sync(kAllLanes, listed != 0)) return;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if ((listed >> j & 1u) == 0) continue;
          inside += fixed_weight(at.law, values[j], unit);
          const uint32_t to = atomicAdd(&shared.num_listed, 1u);
          if (to < FilterPolicy::kMaxListed) shared.descent.list[to] = values[j];
        }
      });
  return team_sums(at.team, before, inside, shared);
}

/* Whether every list of the team is whole. All threads take part and get it. */
__device__ __forceinline__ bool lists_are_whole(const Team& team, FilterShared& shared) {
  const bool own = shared.num_listed <= FilterPolicy::kMaxListed;
  const uint64_t num_full = threadIdx.x == 0 && !own ? 1 : 0;
  return team_sums(team, num_full, 0, shared).first == 0;
}

/* shared.descent.histogram of the measures of parts of a range, from the lists or from the row. All
 * threads take part. */
__device__ __forceinline__ void measure_range(const VerifyInputs& in,
                                              const DescentRow at, /* copies, for registers */
                                              const Search search,
                                              const KeyRange range,
                                              bool from_list,
                                              FilterShared& shared) {
  const float unit = mass_unit(in.vocab_size);
  Histogram& histogram = shared.descent.histogram;
  for (int bin = threadIdx.x; bin < FilterPolicy::kNumBins; bin += FilterPolicy::kNumThreads) {
    histogram.low[bin] = 0;
    histogram.high[bin] = 0;
  }
  __syncthreads();
  const auto measure = [&](float logit) {
    const uint32_t key = descending_key(logit);
    if (!(logit >= search.least) || key < range.from) return;
    const uint32_t part = (key - range.from) >> range.shift;
    if (part >= FilterPolicy::kNumBins) return;
    const int bin = spread_bin(at, logit);
    if (bin < range.first || bin > range.last) return;
    const uint64_t value = search.by_mass ? fixed_weight(at.law, logit, unit) : 1;
    add_wide(&histogram.low[part], &histogram.high[part], value);
  };
  if (from_list) {
    for (uint32_t i = threadIdx.x; i < shared.num_listed; i += FilterPolicy::kNumThreads) {
      measure(shared.descent.list[i]);
    }
  } else {
    for_strips(
        in, at.row, at.team, in.num_zones * kStripsPerZone,
        [&](int32_t strip) { return strip_max(at.maxima, strip) >= range.least ? strip : -1; },
        [&](int32_t, const float (&values)[kGroup]) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) measure(values[j]);
        });
  }
  team_sync(at.team);
}

/* The part of a range at which the measure, started at `before`, reaches the target. All threads take
 * part. */
__device__ __forceinline__ void choose_part(const DescentRow& at,
                                            const Search& search,
                                            uint64_t before,
                                            FilterShared& shared) {
  const auto first = static_cast<int32_t>(threadIdx.x) * FilterPolicy::kBinsPerThread;
  uint64_t own[FilterPolicy::kBinsPerThread] = {};
  uint64_t high[FilterPolicy::kBinsPerThread] = {};
  team_counts(at.team, shared.descent.histogram.low + first, own);
  team_counts(at.team, shared.descent.histogram.high + first, high);
#pragma unroll
  for (int i = 0; i < FilterPolicy::kBinsPerThread; ++i) own[i] += high[i] << 32;
  choose_bin(own, before, search.target, shared);
}

/* Bins around `bin` that hold the target, their list, and the measure before them. All threads take
 * part. */
__device__ __forceinline__ KeyRange gather_target(const VerifyInputs& in,
                                                  const DescentRow& at,
                                                  const Search& search,
                                                  int bin,
                                                  uint64_t* before,
                                                  FilterShared& shared) {
  constexpr int kLastBin = FilterPolicy::kNumBins - 1;
  if (!search.by_mass) { /* counts are exact */
    *before = shared.before;
    const KeyRange range = keys_of_bins(at, search, bin, bin);
    gather_range(in, at, search.least, range, shared);
    return range;
  }
  int first = max(bin - 1, 0);
  int last = min(bin + 1, kLastBin);
#pragma unroll 1
  for (int more = 4;; more *= 4) {
    const KeyRange range = keys_of_bins(at, search, first, last);
    const TeamWords masses = gather_range(in, at, search.least, range, shared);
    *before = masses.first;
    const bool is_before = masses.first >= search.target && first > 0;
    const bool is_behind = masses.first + masses.second < search.target && last < kLastBin;
    if (!is_before && !is_behind) return range;
    last = is_before ? first - 1 : min(last + more, kLastBin);
    first = is_before ? max(first - more, 0) : range.last + 1;
  }
}

/* The threshold, or a logit below it that no other is between. All threads take part and get it. */
__device__ __forceinline__ float find_threshold(const VerifyInputs& in,
                                                const DescentRow& at,
                                                const Search& search,
                                                FilterShared& shared) {
  const int spacing = key_spacing(in);
  count_bins(in, at, search.least, shared);
  const int bin = locate_bin(in, at, search, shared);
  uint64_t before = 0;
  KeyRange range = gather_target(in, at, search, bin, &before, shared);
  const bool from_list = lists_are_whole(at.team, shared);
#pragma unroll 1
  while (true) {
    measure_range(in, at, search, range, from_list, shared);
    choose_part(at, search, before, shared);
    before = shared.before;
    range.from += static_cast<uint32_t>(shared.bin) << range.shift;
    team_sync(at.team); /* all have read the histograms */
    const uint32_t rest = (1u << range.shift) - 1;
    if (range.shift <= spacing) {
      return logit_of_key(min(range.from + rest, descending_key(search.least)));
    }
    range.shift = shift_for(rest);
  }
}

/* Sums of what the law keeps by strip, in place of those of all, and its mass. All threads take part and
 * get it. */
__device__ __forceinline__ uint64_t keep_by_sweep(const VerifyInputs& in,
                                                  const DescentRow& at,
                                                  const RowLaw law, /* in registers */
                                                  Strips* sums,
                                                  FilterShared& shared) {
  const float unit = mass_unit(in.vocab_size);
  const auto weight_in_law = [&](float logit) {
    const float weight = logit_weight(logit, law.max, law.scale);
    return logit >= law.threshold && weight >= law.min_weight ? weight : 0.f;
  };
  const auto write = [&](int32_t strip, float sum) {
    if (threadIdx.x % kWarpSize == 0) sums[strip / kStripsPerZone].of[strip % kStripsPerZone] = sum;
  };
  team_sync(at.team); /* all have read the sums */
  uint64_t kept = 0;
  for_strips(
      in, at.row, at.team, in.num_zones * kStripsPerZone,
      [&](int32_t strip) {
        if (weight_in_law(strip_max(at.maxima, strip)) > 0.f) return strip;
        write(strip, 0.f);
        return -1;
      },
      [&](int32_t strip, const float (&values)[kGroup]) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) sum += weight_in_law(values[j]);
        sum = warp_reduce(sum, SumOp{});
        const float most = shared.zone_max[strip / kStripsPerZone];
        write(strip, sum / logit_weight(most, law.max, law.scale));
        if (threadIdx.x % kWarpSize == 0) kept += fixed_sum(sum, unit);
      });
  return team_sums(at.team, kept, 0, shared).first;
}

/* The general way. All threads of the team take part. */
__device__ __forceinline__ void filter_by_descent(const VerifyInputs& in,
                                                  const TargetRow& row,
                                                  const Filters& filters,
                                                  const Team& team,
                                                  FilterShared& shared,
                                                  const Strips* maxima,
                                                  Strips* sums,
                                                  RowLaw* law) {
  const DescentRow at = {row, team, *law, maxima, spread_of(in, *law, filters)};
  const float unit = mass_unit(in.vocab_size);
  RowLaw out = *law;
  Search search = {filters.top_k == 0, static_cast<uint64_t>(filters.top_k), -FLT_MAX};
  if (search.by_mass) { /* the whole is known, and how much of it may be left out */
    const float whole = 1.f / law->inv_sum;
    search.target = target_mass(filters.top_p, __float2ull_rn(unit * whole));
    const float tail = 0.5f * (1.f - filters.top_p) * whole / static_cast<float>(in.vocab_size);
    if (tail > 0.f) search.least = fmaxf(law->max + log2f(tail) / law->scale, -FLT_MAX);
  }
#pragma unroll 1
  while (true) { /* top-k, and then top-p of what it keeps */
    const bool is_last = search.by_mass || filters.top_p >= 1.f;
    if (!search.by_mass || filters.top_p < 1.f) {
      out.threshold = find_threshold(in, at, search, shared);
    }
    if (is_last) out.min_weight = filters.min_p;
    const uint64_t kept = keep_by_sweep(in, at, out, sums, shared);
    if (is_last) {
      out.inv_sum = unit / __ull2float_rn(kept);
      break;
    }
    search = {true, target_mass(filters.top_p, kept), out.threshold};
  }
  *law = out;
}

}  // namespace dspark
