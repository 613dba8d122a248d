/*
 * What both ways of filtering (filter.cuh, descent.cuh) work with: a request's filters, and the shared
 * memory of a CTA.
 */
#pragma once

#include "kernels/verify/row_law.cuh"

namespace dspark {

struct FilterPolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kCtasPerSm = 1;
  static constexpr int kMaxKept = 1024;   /* candidates */
  static constexpr int kFloorRank = 64;   /* zones read without top-k */
  static constexpr int kStripsAtOnce = 4; /* of a warp */
  static constexpr int kNumBins = 2048;
  static constexpr int kBinsPerThread = kNumBins / kNumThreads;
  static constexpr float kBinsPerNat = 32.f;
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
  uint64_t
      above[FilterPolicy::kMaxKept]; /* weight of the larger ones; all bits set: not in the top k */
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

/* f(strip, shaped logits of this lane) for the strips of a row that wanted(strip) for, a warp's share of
 * them. A few are on their way at once. Both answers are a whole warp's. */
template <typename Wanted, typename F>
__device__ __forceinline__ void for_strips(const VerifyInputs& in,
                                           const TargetRow& row,
                                           Wanted&& wanted,
                                           F&& f) {
  constexpr int kAtOnce = FilterPolicy::kStripsAtOnce;
  const int32_t count = in.num_zones * kStripsPerZone;
#pragma unroll 1
  for (int32_t first = threadIdx.x / kWarpSize; first < count;
       first += kAtOnce * FilterPolicy::kNumWarps) {
    int32_t strips[kAtOnce];
    float values[kAtOnce][kGroup];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t at = first + i * FilterPolicy::kNumWarps;
      strips[i] = at < count && wanted(at) ? at : -1;
      if (strips[i] >= 0) load_strip(in.target, row.index, strips[i], in.vocab_size, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (strips[i] < 0) continue;
      shape_group(in, row, strips[i], values[i]);
      f(strips[i], values[i]);
    }
  }
}

/* A sum of integers over the CTA. All threads take part and get it. */
__device__ __forceinline__ uint64_t cta_sum(uint64_t value, FilterShared& shared) {
  return cta_reduce<FilterPolicy::kNumThreads>(value, SumOp{}, static_cast<uint64_t>(0),
                                               shared.warp_totals);
}

}  // namespace dspark
