/*
 * What both ways of filtering (filter.cuh, descent.cuh) work with: a request's filters, and the shared
 * memory of a CTA.
 */
#pragma once

#include "common/cluster.cuh"
#include "kernels/verify/row_law.cuh"

namespace dspark {

struct FilterPolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kCtasPerSm = 1;
  static constexpr uint32_t kMaxTeam = 8; /* CTAs of a row */
  static constexpr int kMaxKept = 1024;   /* candidates */
  static constexpr int kFloorRank = 64;   /* zones read without top-k */
  static constexpr int kStripsAtOnce = 4; /* of a warp */
  static constexpr int kMaxListed = 4096;
  static constexpr int kNumBins = 2048;
  static constexpr int kBinsPerThread = kNumBins / kNumThreads;
};

/* The CTAs that filter a row together: a cluster, or one. */
struct Team {
  uint32_t rank;
  uint32_t size;
};

/* 64-bit sums by bin, from two native 32-bit atomics. */
struct alignas(16) Histogram {
  uint32_t low[FilterPolicy::kNumBins];
  uint32_t high[FilterPolicy::kNumBins];
};

__device__ __forceinline__ void add_wide(uint32_t* low_word, uint32_t* high_word, uint64_t value) {
  const uint32_t low = static_cast<uint32_t>(value);
  uint32_t high = static_cast<uint32_t>(value >> 32);
  if (low != 0) high += atomicAdd(low_word, low) + low < low; /* the carry */
  if (high != 0) atomicAdd(high_word, high);
}

/* A 64-bit sum in two words. */
struct Wide {
  uint32_t low;
  uint32_t high;
};

/* What step 3 knows about the candidates. */
struct Ranks {
  uint64_t weights[FilterPolicy::kMaxKept];
  union {
    uint64_t above
        [FilterPolicy::kMaxKept]; /* weight of the larger ones; all bits set: not in the top k */
    Wide masses[FilterPolicy::kMaxKept]; /* of what is kept, by slot of the strip */
  };
};

/* Of step 3. */
struct RankShared {
  Ranks ranks;
  float candidates[FilterPolicy::kMaxKept];
  uint16_t slots[FilterPolicy::kMaxKept];  /* of the candidates' strips in `strips` */
  uint16_t strips[FilterPolicy::kMaxKept]; /* that are read */
};

/* Of the descent. */
struct DescentShared {
  Histogram histogram;
  float list[FilterPolicy::kMaxListed]; /* this CTA's logits of the range that is looked at */
};

/* What a CTA tells the others of its row; behind it, of all. */
struct alignas(16) TeamWords {
  uint64_t first;
  uint64_t second;
};

struct FilterShared {
  union {
    RankShared by_rank;
    DescentShared descent;
  };
  float zone_max[kMaxZones];
  TeamWords words;
  RowLaw law;
  float floor;
  uint32_t num_strips;
  uint32_t num_candidates;
  uint32_t num_listed;
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

/* The same of a sum of weights. */
__device__ __forceinline__ uint64_t fixed_sum(float sum, float unit) {
  return __float2ull_rn(sum * unit);
}

/* The share `fraction` of `total`, at least 1. */
__device__ __forceinline__ uint64_t target_mass(float fraction, uint64_t total) {
  const double target = ceil(static_cast<double>(fraction) * static_cast<double>(total));
  return max(min(static_cast<uint64_t>(target), total), static_cast<uint64_t>(1));
}

/* for_strips where strips are raw: several are on their way at once. */
template <typename StripOf, typename F>
__device__ __forceinline__ void for_raw_strips(const VerifyInputs& in,
                                               int64_t row,
                                               int32_t first,
                                               int32_t count,
                                               int32_t stride,
                                               StripOf&& strip_of,
                                               F&& f) {
  constexpr int kAtOnce = FilterPolicy::kStripsAtOnce;
#pragma unroll 1
  for (; first < count; first += kAtOnce * stride) {
    uint4 raws[kAtOnce] = {};
    int32_t strips[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t at = first + i * stride;
      strips[i] = at < count ? strip_of(at) : -1;
      if (strips[i] >= 0) raws[i] = load_raw_strip(in, row, strips[i]);
    }
#pragma unroll 1
    for (int left = kAtOnce; left > 0; --left) { /* the first of those left */
      const int32_t strip = strips[0];
      float values[kGroup];
      unpack_strip(in, raws[0], values);
#pragma unroll
      for (int i = 1; i < kAtOnce; ++i) {
        strips[i - 1] = strips[i];
        raws[i - 1] = raws[i];
      }
      if (strip >= 0) f(strip, values);
    }
  }
}

/* f(strip, shaped logits of this lane) for the strips strip_of(i) of a row, i < count, that are not
 * negative: a warp's share of the CTA's share. Both answers are a whole warp's. */
template <typename StripOf, typename F>
__device__ __forceinline__ void for_strips(const VerifyInputs& in,
                                           const TargetRow& row,
                                           const Team& team,
                                           int32_t count,
                                           StripOf&& strip_of,
                                           F&& f) {
  const auto stride = static_cast<int32_t>(team.size) * FilterPolicy::kNumWarps;
  const int32_t first = static_cast<int32_t>(team.rank) * FilterPolicy::kNumWarps +
                        static_cast<int32_t>(threadIdx.x) / kWarpSize;
  if (has_raw_strips(in)) {
    for_raw_strips(in, row.index, first, count, stride, strip_of, f);
    return;
  }
#pragma unroll 1
  for (int32_t at = first; at < count; at += stride) {
    const int32_t strip = strip_of(at);
    if (strip < 0) continue;
    Group group = load_any_strip(in, row, strip);
    f(strip, group.of);
  }
}

__device__ __forceinline__ float strip_max(const Strips* maxima, int32_t strip) {
  return maxima[strip / kStripsPerZone].of[strip % kStripsPerZone];
}

/* A sum of integers over the CTA. All threads take part and get it. */
__device__ __forceinline__ uint64_t cta_sum(uint64_t value, FilterShared& shared) {
  return cta_reduce<FilterPolicy::kNumThreads>(value, SumOp{}, static_cast<uint64_t>(0),
                                               shared.warp_totals);
}

__device__ __forceinline__ Team own_team() {
  Team team = {0, 1};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(team.rank));
  asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(team.size));
#endif
  return team;
}

/* What the threads of the team did before, all see behind it. All threads take part. */
__device__ __forceinline__ void team_sync(const Team& team) {
  if (team.size == 1) {
    __syncthreads();
    return;
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cluster_arrive();
  cluster_wait();
#endif
}

/* f(what each CTA of the team has in shared memory at `words`, a multiple of 16 bytes). */
template <typename F>
__device__ __forceinline__ void for_team(const Team& team, const void* words, F&& f) {
  if (team.size == 1) {
    f(*static_cast<const uint4*>(words));
    return;
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(words));
  for (uint32_t cta = 0; cta < team.size; ++cta) f(load_remote(shared, cta));
#endif
}

__device__ __forceinline__ uint64_t wide(uint32_t low, uint32_t high) {
  return static_cast<uint64_t>(high) << 32 | low;
}

/* Sums of two integers over the team. All threads take part and get them. */
__device__ __forceinline__ TeamWords team_sums(const Team& team,
                                               uint64_t first,
                                               uint64_t second,
                                               FilterShared& shared) {
  const TeamWords own = {cta_sum(first, shared), cta_sum(second, shared)};
  if (team.size == 1) return own;
  if (threadIdx.x == 0) shared.words = own;
  team_sync(team);
  TeamWords sums = {0, 0};
  for_team(team, &shared.words, [&](const uint4& words) {
    sums.first += wide(words.x, words.y);
    sums.second += wide(words.z, words.w);
  });
  team_sync(team); /* all have read */
  return sums;
}

}  // namespace dspark
