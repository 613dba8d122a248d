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
 *                  many threads as there are. A token is
 *                  in the top-k set iff fewer than k are larger; a token of that set is in the top-p
 *                  set iff those above it weigh less than top_p of the set: both keep ties, since tied
 *                  tokens count the same. min-p compares w with min_p * (max w = 1).
 *
 * What is handed on is the law and, in place of the sums of its strips, those of what it keeps of
 * them: a draw (draw.cuh) does not know whether a law was filtered.
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

#include "kernels/verify/weights.cuh"

namespace dspark {

struct FilterPolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kCtasPerSm = 1;
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

/* What step 3 knows about the candidates. */
struct Ranks {
  uint64_t weights[FilterPolicy::kMaxKept];
  uint64_t above[FilterPolicy::kMaxKept]; /* weight of the larger ones; all bits set: not in the top k */
};

struct FilterShared {
  union {
    Histogram histogram; /* of the descent */
    Ranks ranks;
  };
  float zone_max[kMaxZones];
  float candidates[FilterPolicy::kMaxKept];
  uint16_t candidate_strips[FilterPolicy::kMaxKept];
  uint16_t strips[FilterPolicy::kMaxKept]; /* that are read */
  RowLaw law;
  float floor;
  uint32_t num_strips;
  uint32_t num_candidates;
  uint64_t warp_totals[FilterPolicy::kNumWarps];
  float float_scratch[FilterPolicy::kNumWarps];
  uint64_t before; /* measure of the bins before the chosen one */
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

/* f(logit) for the shaped logits of the warp's strip; -inf is left out. */
template <typename F>
__device__ __forceinline__ void for_each_of_strip(const VerifyInputs& in,
                                                  const TargetRow& row,
                                                  int32_t strip,
                                                  F&& f) {
  float values[kGroup];
  load_target_strip(in, row, strip, values);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (values[j] > -INFINITY) f(values[j]);
  }
}

/* f(strip) for the strips of the warp's share of a row's zones, whose loads have been started. */
template <typename F>
__device__ __forceinline__ void for_each_strip(const VerifyInputs& in,
                                               const TargetRow& row,
                                               F&& f) {
  for (int32_t zone = threadIdx.x / kWarpSize; zone < in.num_zones;
       zone += FilterPolicy::kNumWarps) {
    touch_zone(in.target, row.index, zone, in.vocab_size);
#pragma unroll 1
    for (int i = 0; i < kStripsPerZone; ++i) f(zone * kStripsPerZone + i);
  }
}

/* A sum of integers over the CTA. All threads take part and get it. */
__device__ __forceinline__ uint64_t cta_sum(uint64_t value, FilterShared& shared) {
  return cta_reduce<FilterPolicy::kNumThreads>(value, SumOp{}, static_cast<uint64_t>(0),
                                               shared.warp_totals);
}

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
    for_each_of_strip(in, row, strip, [&](float logit) {
      if (logit < floor) return;
      const uint32_t at = atomicAdd(&shared.num_candidates, 1u);
      if (at >= FilterPolicy::kMaxKept) return;
      shared.candidates[at] = logit;
      shared.candidate_strips[at] = static_cast<uint16_t>(strip);
    });
  }
  __syncthreads();
  return shared.num_candidates;
}

/* shared.ranks. All threads take part and get the weight of the top k (of all without one). */
__device__ __forceinline__ uint64_t rank_candidates(const RowLaw& law,
                                                    int32_t count,
                                                    int32_t top_k,
                                                    float unit,
                                                    FilterShared& shared) {
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
    for_each_strip(in, row, [&](int32_t strip) {
      for_each_of_strip(in, row, strip, [&](float logit) {
        const uint32_t key = descending_key(logit);
        if (key > search.last_key) return;
        int bin = spread_bin(law, logit);
        if (level > 0) bin = bin == first_bin ? key_bin(key, level, prefix) : -1;
        if (bin < 0) return;
        const uint64_t measure = search.by_mass ? fixed_weight(law, logit, unit) : 1;
        add_wide(&shared.histogram.low[bin], &shared.histogram.high[bin], measure);
      });
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
__device__ __forceinline__ void keep_by_sweep(const VerifyInputs& in,
                                              const TargetRow& row,
                                              FilterShared& shared,
                                              Strips* sums,
                                              RowLaw* law) {
  for_each_strip(in, row, [&](int32_t strip) {
    const float most = shared.zone_max[strip / kStripsPerZone];
    float sum = 0.f;
    for_each_of_strip(in, row, strip, [&](float logit) {
      const bool in_law =
          logit >= law->threshold && logit_weight(logit, law->max, law->scale) >= law->min_weight;
      if (in_law) sum += logit_weight(logit, most, law->scale);
    });
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
    filter_by_descent(in, row, filters, shared, sums, &law);
  }
  if (threadIdx.x == 0) laws[index] = law;
}

}  // namespace dspark
