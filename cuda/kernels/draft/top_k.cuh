/*
 * The K largest logits of every row, in one pass over the logits.
 *
 * zone_top_kernel: the largest logit of every zone of 64 tokens, 8 lanes a zone. Reads each logit
 * once, 16 bytes a lane: limited by memory.
 *
 * select_top_kernel: a CTA per row. K zones have a maximum of at least t, so at least K logits do:
 * t is found by bisection of the bits of the zone maxima, which threads hold in registers. Only
 * zones that reach t are read again (about K of them), and what reaches t there (little more than K
 * logits) is ranked by counting, so that equal logits come in order of index and nothing depends on
 * the order of atomics. Should more reach t than fit, as in a row of equal logits, the K-th key
 * itself is found by bisection over those zones: slower, not wrong. While it is there it asks L2
 * for what the walk will want.
 *
 * An LM head that keeps the K largest itself, without logits in memory, is not built. cuBLASLt takes
 * 277 / 287 / 295 / 499 / 1022 us for 7 / 56 / 112 / 448 / 896 rows (H100, bf16, d 2560, V 151,936: 2.8 TB/s of the
 * weights, then 700 TFLOP/s), and 2 / 17 / 34 / 136 / 272 MB of logits are written and read once more. So a fused
 * kernel as good as cuBLASLt could save what this pass takes beyond its ranking, 1 / 6 / 11 / 46 / 91 us at most,
 * and up to 18 us of writing where reading weights is the limit: 4 to 9 % of product and pass together.
 *
 * NaN, -inf and what a grammar forbids are not candidates. Keys as in race.cuh: order of the logit,
 * then lowest token; descending, 0 where there are fewer.
 */
#pragma once

#include "common/dependent_launch.cuh"
#include "common/vec.cuh"
#include "kernels/draft/grammar.cuh"
#include "kernels/draft/race.cuh"

namespace dspark {

struct TopPolicy {
  static constexpr int kNumThreads = 256;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kMaxTop = kNumThreads;
  static constexpr int kLaneTokens = 8;
  static constexpr int kZoneLanes = 8;
  static constexpr int kZoneTokens = kLaneTokens * kZoneLanes;
  static constexpr int kRounds = 4; /* of kNumThreads lanes, in a CTA of zone_top_kernel */
  static constexpr int kCtaTokens = kRounds * kNumThreads * kLaneTokens;
  static constexpr int kZonesPerThread = 16; /* of select_top_kernel */
  static constexpr int kMaxZones = kZonesPerThread * kNumThreads;
  static constexpr int kMaxVocab = kMaxZones * kZoneTokens;
  static constexpr int kMaxSurvivors = 2048;
};

/* Rows of weights that the walk will read for a row's candidates. */
struct CandidateRows {
  const void* weights; /* nullptr: none */
  int32_t row_bytes;
};

template <typename U>
struct TopArgs {
  const U* logits;     /* [num_rows, vocab_size], f32 or bf16 */
  uint32_t* zone_tops; /* [num_rows, num_zones], see logit_order */
  RaceKey* keys;       /* [num_rows, num_top] */
  GrammarMask mask;
  CandidateRows ahead[2];
  int64_t stride_row;
  int32_t vocab_size;
  int32_t num_zones;
  int32_t num_parts; /* CTAs of a row in zone_top_kernel */
  int32_t num_top;
  bool aligned_rows; /* rows start at multiples of 16 bytes */
};

/* An integer of the logit's order, the upper half of its key; 0 for what can never be drawn. */
__device__ __forceinline__ uint32_t logit_order(float logit) {
  return logit > -INFINITY ? static_cast<uint32_t>(race_key({logit, 0}) >> 32) : 0u;
}

/* A lane's eight neighbouring logits as f32; -inf past the row's end and for what is forbidden. */
template <typename U>
__device__ __forceinline__ void load_allowed(const TopArgs<U>& args,
                                             int64_t row,
                                             int32_t token,
                                             float (&values)[TopPolicy::kLaneTokens]) {
  const U* logits = args.logits + row * args.stride_row + token;
  const int32_t left = args.vocab_size - token;
  if (args.aligned_rows && left >= TopPolicy::kLaneTokens) {
    if constexpr (sizeof(U) == 4) {
      load_vec(logits, *reinterpret_cast<float (*)[4]>(&values[0]));
      load_vec(logits + 4, *reinterpret_cast<float (*)[4]>(&values[4]));
    } else {
      load_vec(logits, values);
    }
  } else {
#pragma unroll
    for (int i = 0; i < TopPolicy::kLaneTokens; ++i) {
      values[i] = i < left ? Element<U>::to_float(logits[i]) : -INFINITY;
    }
  }
  if (args.mask.words == nullptr || left <= 0) return;
  const uint32_t allowed =
      static_cast<uint32_t>(args.mask.words[row * args.mask.words_per_row + token / 32]) >>
      token % 32;
#pragma unroll
  for (int i = 0; i < TopPolicy::kLaneTokens; ++i) {
    if ((allowed >> i & 1u) == 0) values[i] = -INFINITY;
  }
}

/* Grid: rows x parts, flat. */
template <typename U>
__global__ void __launch_bounds__(TopPolicy::kNumThreads) zone_top_kernel(TopArgs<U> args) {
  using Policy = TopPolicy;
  release_dependents();
  const int64_t row = blockIdx.x / args.num_parts;
  const int32_t first = static_cast<int32_t>(blockIdx.x % args.num_parts) * Policy::kCtaTokens +
                        static_cast<int32_t>(threadIdx.x) * Policy::kLaneTokens;
  float values[Policy::kRounds][Policy::kLaneTokens];
#pragma unroll
  for (int i = 0; i < Policy::kRounds; ++i) {
    load_allowed(args, row, first + i * Policy::kNumThreads * Policy::kLaneTokens, values[i]);
  }
#pragma unroll
  for (int i = 0; i < Policy::kRounds; ++i) {
    float top = values[i][0];
#pragma unroll
    for (int j = 1; j < Policy::kLaneTokens; ++j) top = fmaxf(top, values[i][j]);
    top = warp_reduce<Policy::kZoneLanes>(top, MaxOp{});
    const int32_t token = first + i * Policy::kNumThreads * Policy::kLaneTokens;
    if (threadIdx.x % Policy::kZoneLanes == 0 && token < args.vocab_size) {
      args.zone_tops[row * args.num_zones + token / Policy::kZoneTokens] = logit_order(top);
    }
  }
}

/* Counts over the CTA, one barrier each: calls alternate between two places. */
template <int kNumWarps>
struct CtaCounter {
  int (&counts)[2][kNumWarps]; /* shared */
  int turn;

  /* Sum of the threads' counts; every thread gets it. */
  __device__ __forceinline__ int sum(int count) {
    turn ^= 1;
    count = __reduce_add_sync(kAllLanes, count);
    if (threadIdx.x % kWarpSize == 0) counts[turn][threadIdx.x / kWarpSize] = count;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) total += counts[turn][warp];
    return total;
  }
};

/* The largest multiple of 2^kLowBit in Key that at least `quota` keys reach, 0 if there is none;
 * count(t) is how many keys reach t. */
template <int kLowBit, typename Key, typename Count>
__device__ __forceinline__ Key largest_reached(int quota, Count count) {
  Key reached = 0;
#pragma unroll 1
  for (int bit = static_cast<int>(sizeof(Key)) * 8 - 1; bit >= kLowBit; --bit) {
    const Key trial = reached | Key{1} << bit;
    if (count(trial) >= quota) reached = trial;
  }
  return reached;
}

/* Calls visit(key) for every logit of the listed zones that can be drawn. */
template <typename U, typename Visit>
__device__ __forceinline__ void visit_zones(
    const TopArgs<U>& args, int64_t row, const uint16_t* zones, int num_zones, Visit visit) {
  constexpr int kZoneLanes = TopPolicy::kZoneLanes;
  for (int i = threadIdx.x / kZoneLanes; i < num_zones; i += TopPolicy::kNumThreads / kZoneLanes) {
    const int32_t token = zones[i] * TopPolicy::kZoneTokens +
                          static_cast<int32_t>(threadIdx.x) % kZoneLanes * TopPolicy::kLaneTokens;
    float values[TopPolicy::kLaneTokens];
    load_allowed(args, row, token, values);
#pragma unroll
    for (int j = 0; j < TopPolicy::kLaneTokens; ++j) {
      if (values[j] > -INFINITY) visit(race_key({values[j], token + j}));
    }
  }
}

struct TopShared {
  uint16_t zones[TopPolicy::kMaxZones];
  RaceKey survivors[TopPolicy::kMaxSurvivors];
  int counts[2][TopPolicy::kNumWarps];
  int num_zones;
  int num_survivors;
};

/* Zones whose maximum reaches `bound` into shared.zones. */
__device__ __forceinline__ void list_zones(const uint32_t (&tops)[TopPolicy::kZonesPerThread],
                                           uint32_t bound,
                                           TopShared& shared) {
#pragma unroll
  for (int i = 0; i < TopPolicy::kZonesPerThread; ++i) {
    if (tops[i] == 0 || tops[i] < bound) continue;
    shared.zones[atomicAdd(&shared.num_zones, 1)] =
        static_cast<uint16_t>(i * TopPolicy::kNumThreads + threadIdx.x);
  }
}

/* Keys of the listed zones that reach `bound` into shared.survivors, as many as fit. */
template <typename U>
__device__ __forceinline__ void collect(const TopArgs<U>& args,
                                        int64_t row,
                                        RaceKey bound,
                                        TopShared& shared) {
  visit_zones(args, row, shared.zones, shared.num_zones, [&](RaceKey key) {
    if (key < bound) return;
    const int at = atomicAdd(&shared.num_survivors, 1);
    if (at < TopPolicy::kMaxSurvivors) shared.survivors[at] = key;
  });
  __syncthreads();
}

/* Asks L2 for 128 bytes. */
__device__ __forceinline__ void prefetch_line(const char* line) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(line)));
}

/* Asks L2 for the rows of a token. */
__device__ __forceinline__ void prefetch_row(const CandidateRows& rows, int32_t token) {
  constexpr int kLineBytes = 128;
  if (rows.weights == nullptr) return;
  const char* row =
      static_cast<const char*>(rows.weights) + static_cast<int64_t>(token) * rows.row_bytes;
  for (int at = 0; at < rows.row_bytes; at += kLineBytes) prefetch_line(row + at);
}

/* Grid: rows. */
template <typename U>
__global__ void __launch_bounds__(TopPolicy::kNumThreads) select_top_kernel(TopArgs<U> args) {
  using Policy = TopPolicy;
  __shared__ TopShared shared;
  wait_for_prerequisites();
  release_dependents();
  const int64_t row = blockIdx.x;
  const int32_t num_top = args.num_top;
  if (threadIdx.x == 0) shared.num_zones = shared.num_survivors = 0;
  uint32_t tops[Policy::kZonesPerThread];
#pragma unroll
  for (int i = 0; i < Policy::kZonesPerThread; ++i) {
    const int32_t zone = i * Policy::kNumThreads + static_cast<int32_t>(threadIdx.x);
    tops[i] = zone < args.num_zones ? __ldcg(args.zone_tops + row * args.num_zones + zone) : 0u;
  }
  CtaCounter<Policy::kNumWarps> counter{shared.counts, 0};
  constexpr int kLowBit = 16; /* a bf16 is these; of an f32 the rest is rounded down */
  const uint32_t bound = largest_reached<kLowBit, uint32_t>(num_top, [&](uint32_t trial) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < Policy::kZonesPerThread; ++i) count += tops[i] >= trial;
    return counter.sum(count);
  });
  list_zones(tops, bound, shared); /* a barrier lies between this and the zero above */
  __syncthreads();
  collect(args, row, static_cast<RaceKey>(bound) << 32, shared);
  if (shared.num_survivors > Policy::kMaxSurvivors) {
    const RaceKey last = largest_reached<0, RaceKey>(num_top, [&](RaceKey trial) {
      int count = 0;
      visit_zones(args, row, shared.zones, shared.num_zones,
                  [&](RaceKey key) { count += key >= trial; });
      return counter.sum(count);
    });
    __syncthreads();
    if (threadIdx.x == 0) shared.num_survivors = 0;
    __syncthreads();
    collect(args, row, last, shared);
  }
  const int count = shared.num_survivors;
  RaceKey* out = args.keys + row * num_top;
  for (int i = count + threadIdx.x; i < num_top; i += Policy::kNumThreads) out[i] = kEmptyRaceKey;
  for (int i = threadIdx.x; i < count; i += Policy::kNumThreads) {
    const RaceKey key = shared.survivors[i];
    int rank = 0;
    for (int other = 0; other < count; ++other) rank += shared.survivors[other] > key;
    if (rank >= num_top) continue;
    out[rank] = key;
    prefetch_row(args.ahead[0], race_token(key));
    prefetch_row(args.ahead[1], race_token(key));
  }
}

}  // namespace dspark
