/*
 * The laws of acceptance, one per row of logits: the target law p (temperature, top-k, top-p,
 * min-p) and the draft law q (temperature), each as the few numbers from which any token's
 * probability follows:
 *
 *   w(v) = exp((l(v) - max l) / T),   kept(v) = l(v) >= threshold and w(v) >= min_weight
 *   p(v) = kept(v) ? w(v) / Z : 0,    Z = sum of w over the kept tokens
 *
 * stats_kernel: CTAs of kChunk logits each, held in registers, give (max, argmax, sum of w relative
 * to the chunk's max, bad) per chunk. A row is cut into chunks by vocab_size alone, so a law is the
 * same bits in every batch, and one row fills several SMs.
 *
 * laws_kernel: one CTA per row merges the chunks in a fixed order. A row with a filter then looks
 * for its threshold by a descent over the order of the logits: first 2048 equal bins of (max - l) /
 * T (spread, so that shared atomics seldom meet), then the 32 bits of the order-preserving key of
 * the logits in the chosen bin, 11 + 11 + 10. Each level is one pass that adds up a measure per bin
 * and takes the first bin where the running sum reaches the target:
 *   top-k   measure 1, target k                                      (the exact k-th largest)
 *   top-p   measure w as a 64-bit fixed-point number, target top_p * mass of the top-k set
 * Measures are integers, so atomics in any order give the same sums. Ties at a threshold are kept,
 * since the threshold is a logit. min-p needs no search: w = p / max p up to the common normaliser.
 *
 * Passes depend on one another, so several CTAs per row would pay a grid-wide barrier for each;
 * one CTA per row reads the row from L2 at most 9 times (4 per search, 1 for Z) and costs nothing
 * when no filter is on. Bytes: 4 * vocab_size per row from memory, once. Sums are trees of f32:
 * a thread adds at most kLogitsPerThread terms or vocab_size / kNumThreads of them, then by pairs.
 */
#pragma once

#include <cfloat>
#include <cmath>

#include "common/logit_row.cuh"
#include "common/reduce.cuh"

namespace dspark {

struct StatsPolicy {
  static constexpr int kNumThreads = 256;
  static constexpr int kQuadsPerThread = 4;
  static constexpr int kQuadsPerCta = kNumThreads * kQuadsPerThread;
  static constexpr int kChunk = kQuadsPerCta * kQuad; /* logits of a CTA */
};

struct LawsPolicy {
  static constexpr int kNumThreads = 1024;
  static constexpr int kNumBins = 2048;
  static constexpr int kBinsPerThread = kNumBins / kNumThreads;
  static constexpr float kBinsPerNat = 32.f; /* of the first level: bins of 1/32 in (max - l) / T */
  static constexpr int kNumLevels = 4;
};

/* What a row needs and where it is. Draft rows follow the target rows in all per-row arrays. */
struct VerifyInputs {
  const float* target_logits; /* [num_rows, vocab_size] */
  const float* draft_logits;  /* [num_reqs * draft_len, vocab_size]; nullptr: point mass */
  const int32_t* draft_tokens;
  const int32_t* qo_indptr;
  const int32_t* anchor_positions;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const uint64_t* seeds;
  int64_t stride_target_row;
  int64_t stride_draft_row;
  int32_t num_rows;
  int32_t num_reqs;
  int32_t draft_len;
  int32_t vocab_size;
  int32_t num_chunks;  /* vocab_size / kChunk, rounded up */
  bool aligned_target; /* every row starts at a multiple of 16 bytes */
  bool aligned_draft;
};

struct ChunkStats {
  float max;
  float sum; /* of exp((l - max) / T); 0 for greedy rows and when max is -inf */
  int32_t argmax;
  int32_t bad; /* holds NaN or +inf */
};

struct RowLaw {
  float max;
  float inv_sum;    /* 1 / Z; 0 for greedy rows */
  float threshold;  /* a logit; -inf: top-k and top-p keep all */
  float min_weight; /* 0: min-p keeps all */
  int32_t argmax;
  int32_t bad; /* NaN, +inf or nothing but -inf: no law */
};

/* One row of logits and the request whose parameters shape it. */
struct RowRef {
  const float* logits; /* nullptr: the row takes no part */
  int32_t req;
  bool aligned;
  bool is_target;
};

/* 1 / T for T > 0, finite: 0 * it stays 0 and anything below goes to -inf. */
__device__ __forceinline__ float inverse_temperature(float temperature) {
  return fminf(1.f / temperature, FLT_MAX);
}

__device__ __forceinline__ float logit_weight(float logit, float max, float inv_temperature) {
  return expf((logit - max) * inv_temperature);
}

/* p(v) of one logit under a law. */
__device__ __forceinline__ float probability(const RowLaw& law,
                                             float logit,
                                             float inv_temperature) {
  const float weight = logit_weight(logit, law.max, inv_temperature);
  return logit >= law.threshold && weight >= law.min_weight ? weight * law.inv_sum : 0.f;
}

/* Drafts of `req` that go to verification; -1 when it has no rows. */
__device__ __forceinline__ int32_t verify_len(const VerifyInputs& in, int32_t req) {
  return min(in.qo_indptr[req + 1] - in.qo_indptr[req] - 1, in.draft_len);
}

/* The request whose rows include `row`, or -1: the last r with qo_indptr[r] <= row. */
__device__ __forceinline__ int32_t find_request(const VerifyInputs& in, int32_t row) {
  if (row < in.qo_indptr[0] || row >= in.qo_indptr[in.num_reqs]) return -1;
  int32_t low = 0, high = in.num_reqs; /* qo_indptr[low] <= row < qo_indptr[high] */
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (in.qo_indptr[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/* Row `index` of target and draft rows together. */
__device__ __forceinline__ RowRef find_row(const VerifyInputs& in, int64_t index) {
  if (index < in.num_rows) {
    const int32_t req = find_request(in, static_cast<int32_t>(index));
    return {req < 0 ? nullptr : in.target_logits + index * in.stride_target_row, req,
            in.aligned_target, true};
  }
  const int64_t draft_row = index - in.num_rows;
  const int32_t req = static_cast<int32_t>(draft_row / in.draft_len);
  const int32_t k = static_cast<int32_t>(draft_row % in.draft_len);
  const bool needed =
      in.draft_logits != nullptr && k < verify_len(in, req) && in.temperature[req] > 0.f;
  return {needed ? in.draft_logits + draft_row * in.stride_draft_row : nullptr, req,
          in.aligned_draft, false};
}

/* Grid: all rows x num_chunks, flat. */
__global__ void __launch_bounds__(StatsPolicy::kNumThreads)
    stats_kernel(VerifyInputs in, ChunkStats* stats) {
  constexpr int kNumQuads = StatsPolicy::kQuadsPerThread;
  __shared__ Indexed argmax_scratch[StatsPolicy::kNumThreads / kWarpSize];
  __shared__ float sum_scratch[StatsPolicy::kNumThreads / kWarpSize];
  const RowRef row = find_row(in, blockIdx.x / in.num_chunks);
  if (row.logits == nullptr) return; /* whole CTA */
  const int32_t first_quad = blockIdx.x % in.num_chunks * StatsPolicy::kQuadsPerCta + threadIdx.x;

  float values[kNumQuads * kQuad];
#pragma unroll
  for (int i = 0; i < kNumQuads; ++i) {
    const float4 quad = load_quad(row.logits, first_quad + i * StatsPolicy::kNumThreads,
                                  in.vocab_size, row.aligned, -INFINITY);
    values[i * kQuad] = quad.x;
    values[i * kQuad + 1] = quad.y;
    values[i * kQuad + 2] = quad.z;
    values[i * kQuad + 3] = quad.w;
  }

  Indexed best = {-INFINITY, INT32_MAX};
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kNumQuads * kQuad; ++i) {
    bad |= isnan(values[i]) || values[i] == INFINITY;
    if (values[i] > best.value) {
      const int32_t quad = first_quad + i / kQuad * StatsPolicy::kNumThreads;
      best = {values[i], quad * kQuad + i % kQuad};
    }
  }
  bad = __syncthreads_or(bad) != 0;
  best = cta_reduce<StatsPolicy::kNumThreads>(best, ArgmaxOp{}, Indexed{-INFINITY, INT32_MAX},
                                              argmax_scratch);

  const float temperature = in.temperature[row.req];
  float sum = 0.f;
  if (temperature > 0.f && best.value > -INFINITY) { /* the same for the whole CTA */
    const float inv_temperature = inverse_temperature(temperature);
#pragma unroll
    for (int i = 0; i < kNumQuads * kQuad; ++i) {
      sum += logit_weight(values[i], best.value, inv_temperature);
    }
    sum = cta_reduce<StatsPolicy::kNumThreads>(sum, SumOp{}, 0.f, sum_scratch);
  }
  if (threadIdx.x == 0) stats[blockIdx.x] = {best.value, sum, best.index, bad ? 1 : 0};
}

/* Descending order of logits as ascending unsigned keys; -0 and +0 are one. */
__device__ __forceinline__ uint32_t descending_key(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.f);
  return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu;
}

__device__ __forceinline__ float logit_of_key(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key : ~key & 0x7fffffffu);
}

/* 64-bit sums by bin, from two native 32-bit atomics. */
struct Histogram {
  uint32_t low[LawsPolicy::kNumBins];
  uint32_t high[LawsPolicy::kNumBins];
};

__device__ __forceinline__ void histogram_add(Histogram& histogram, int bin, uint64_t value) {
  const uint32_t low = static_cast<uint32_t>(value);
  uint32_t high = static_cast<uint32_t>(value >> 32);
  if (low != 0) high += atomicAdd(&histogram.low[bin], low) + low < low; /* the carry */
  if (high != 0) atomicAdd(&histogram.high[bin], high);
}

struct LawsShared {
  Histogram histogram;
  uint64_t warp_totals[LawsPolicy::kNumThreads / kWarpSize];
  Indexed argmax_scratch[LawsPolicy::kNumThreads / kWarpSize];
  float sum_scratch[LawsPolicy::kNumThreads / kWarpSize];
  uint64_t before; /* measure of the bins before the chosen one */
  int32_t bin;
};

/* f(logit) for this thread's share of a row; all -inf fills are skipped. */
template <typename F>
__device__ __forceinline__ void for_each_logit(const VerifyInputs& in, const RowRef& row, F&& f) {
  const int32_t num_quads = in.vocab_size / kQuad + (in.vocab_size % kQuad != 0);
  for (int32_t quad = threadIdx.x; quad < num_quads; quad += LawsPolicy::kNumThreads) {
    const float4 values = load_quad(row.logits, quad, in.vocab_size, row.aligned, -INFINITY);
    if (values.x > -INFINITY) f(values.x);
    if (values.y > -INFINITY) f(values.y);
    if (values.z > -INFINITY) f(values.z);
    if (values.w > -INFINITY) f(values.w);
  }
}

/* Inclusive sums over the CTA's threads, and their total. All threads take part. */
__device__ __forceinline__ uint64_t cta_inclusive_sum(uint64_t value,
                                                      LawsShared& shared,
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
  for (int i = 0; i < LawsPolicy::kNumThreads / kWarpSize; ++i) {
    const uint64_t warp_total = shared.warp_totals[i];
    if (i < warp) before += warp_total;
    *total += warp_total;
  }
  return before + value;
}

/* A search for the logit at which a measure of the tokens above, ties included, reaches a target. */
struct Search {
  float max;
  float inv_temperature;
  uint32_t last_key; /* tokens with a larger key are out (of the top-k set) */
  bool by_mass;      /* measure w; else every token counts 1 */
  uint64_t count;    /* target when !by_mass */
  float fraction;    /* target as a share of all mass when by_mass */
  float mass_scale;  /* fixed-point unit: 2^bits, with vocab_size * 2^bits < 2^63 */
};

/* Level 0 of the descent: ascending bins of descending logits. */
__device__ __forceinline__ int spread_bin(const Search& search, float logit) {
  const float distance = (search.max - logit) * search.inv_temperature;
  return static_cast<int>(
      fminf(distance * LawsPolicy::kBinsPerNat, static_cast<float>(LawsPolicy::kNumBins - 1)));
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
    LawsShared& shared, const Search& search, int level, uint64_t before, uint64_t* target) {
  constexpr int kPerThread = LawsPolicy::kBinsPerThread;
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
    if (search.by_mass) {
      *target = static_cast<uint64_t>(
          ceil(static_cast<double>(search.fraction) * static_cast<double>(total)));
    }
    *target = max(min(*target, total), static_cast<uint64_t>(1));
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
                                   const RowRef& row,
                                   const Search& search,
                                   LawsShared& shared) {
  uint64_t target = search.count;
  uint64_t before = 0;
  int first_bin = 0;
  uint32_t prefix = 0;
  for (int level = 0; level < LawsPolicy::kNumLevels; ++level) {
    for (int bin = threadIdx.x; bin < LawsPolicy::kNumBins; bin += LawsPolicy::kNumThreads) {
      shared.histogram.low[bin] = 0;
      shared.histogram.high[bin] = 0;
    }
    __syncthreads();
    for_each_logit(in, row, [&](float logit) {
      const uint32_t key = descending_key(logit);
      if (key > search.last_key) return;
      int bin = spread_bin(search, logit);
      if (level > 0) bin = bin == first_bin ? key_bin(key, level, prefix) : -1;
      if (bin < 0) return;
      uint64_t measure = 1;
      if (search.by_mass) {
        const float weight = logit_weight(logit, search.max, search.inv_temperature);
        measure = __float2ull_rn(weight * search.mass_scale);
      }
      histogram_add(shared.histogram, bin, measure);
    });
    __syncthreads();
    choose_bin(shared, search, level, before, &target);
    before = shared.before;
    if (level == 0) {
      first_bin = shared.bin;
    } else {
      prefix = prefix << (level == 3 ? 10 : 11) | static_cast<uint32_t>(shared.bin);
    }
    __syncthreads(); /* shared.bin and the histogram are read before the next level writes them */
  }
  return prefix;
}

/* The smallest unit that keeps a sum of vocab_size weights of at most 1 below 2^63. */
__device__ __forceinline__ float mass_scale(int32_t vocab_size) {
  return exp2f(static_cast<float>(62 - (32 - __clz(vocab_size))));
}

/* Threshold and normaliser of a row with at least one filter on. All threads take part. */
__device__ __forceinline__ void filter_law(const VerifyInputs& in,
                                           const RowRef& row,
                                           float inv_temperature,
                                           LawsShared& shared,
                                           RowLaw* law) {
  Search search = {};
  search.max = law->max;
  search.inv_temperature = inv_temperature;
  search.last_key = UINT32_MAX;
  search.mass_scale = mass_scale(in.vocab_size);
  const int32_t top_k = in.top_k[row.req];
  if (top_k > 0 && top_k < in.vocab_size) {
    search.count = static_cast<uint64_t>(top_k);
    search.last_key = find_threshold(in, row, search, shared);
    law->threshold = logit_of_key(search.last_key);
  }
  const float top_p = in.top_p[row.req];
  if (top_p < 1.f) {
    search.by_mass = true;
    search.fraction = fmaxf(top_p, 0.f);
    law->threshold = logit_of_key(find_threshold(in, row, search, shared));
  }
  law->min_weight = fminf(fmaxf(in.min_p[row.req], 0.f), 1.f);

  float sum = 0.f;
  for_each_logit(in, row, [&](float logit) {
    const float weight = logit_weight(logit, law->max, inv_temperature);
    if (logit >= law->threshold && weight >= law->min_weight) sum += weight;
  });
  sum = cta_reduce<LawsPolicy::kNumThreads>(sum, SumOp{}, 0.f, shared.sum_scratch);
  law->inv_sum = 1.f / sum;
}

/* The chunks of a row as one law without filters. All threads take part. */
__device__ __forceinline__ RowLaw merge_chunks(const ChunkStats* stats,
                                               int32_t num_chunks,
                                               float inv_temperature,
                                               LawsShared& shared) {
  Indexed best = {-INFINITY, INT32_MAX};
  int bad = 0;
  for (int32_t i = threadIdx.x; i < num_chunks; i += LawsPolicy::kNumThreads) {
    best = ArgmaxOp{}(best, Indexed{stats[i].max, stats[i].argmax});
    bad |= stats[i].bad;
  }
  bad = __syncthreads_or(bad);
  best = cta_reduce<LawsPolicy::kNumThreads>(best, ArgmaxOp{}, Indexed{-INFINITY, INT32_MAX},
                                             shared.argmax_scratch);
  float sum = 0.f;
  for (int32_t i = threadIdx.x; i < num_chunks; i += LawsPolicy::kNumThreads) {
    if (stats[i].max > -INFINITY) {
      sum += stats[i].sum * logit_weight(stats[i].max, best.value, inv_temperature);
    }
  }
  sum = cta_reduce<LawsPolicy::kNumThreads>(sum, SumOp{}, 0.f, shared.sum_scratch);
  const bool is_bad = bad != 0 || best.value == -INFINITY;
  return {best.value, 1.f / sum, -INFINITY, 0.f, best.index, is_bad ? 1 : 0};
}

/* Grid: all rows. */
__global__ void __launch_bounds__(LawsPolicy::kNumThreads)
    laws_kernel(VerifyInputs in, const ChunkStats* stats, RowLaw* laws) {
  __shared__ LawsShared shared;
  const int64_t index = blockIdx.x;
  const RowRef row = find_row(in, index);
  if (row.logits == nullptr) return; /* whole CTA */
  const float temperature = in.temperature[row.req];
  const bool greedy = !(temperature > 0.f);
  const float inv_temperature = greedy ? 0.f : inverse_temperature(temperature);
  RowLaw law = merge_chunks(stats + index * in.num_chunks, in.num_chunks, inv_temperature, shared);
  if (greedy) law.inv_sum = 0.f;
  const bool filtered = row.is_target && !greedy && law.bad == 0 &&
                        ((in.top_k[row.req] > 0 && in.top_k[row.req] < in.vocab_size) ||
                         in.top_p[row.req] < 1.f || in.min_p[row.req] > 0.f);
  if (filtered) filter_law(in, row, inv_temperature, shared, &law); /* the same for the whole CTA */
  if (threadIdx.x == 0) laws[index] = law;
}

}  // namespace dspark
