/*
 * The K largest logits of every row, in one pass.
 *
 * chunk_top_kernel: a CTA holds kChunk logits of a row in registers. Every warp takes the q-th
 * largest of its lanes' maxima, q = ceil(K / warps); the least of these over the warps is a
 * threshold that at least K logits of the chunk reach, and, where large logits do not crowd into
 * few lanes, not many more. Those go to shared memory and are ranked by counting, so that equal
 * logits come in order of index and nothing depends on the order of atomics. Row and chunk keep K
 * keys (race.cuh: order of the logit, then lowest token), descending, 0 where there are fewer.
 *
 * merge_top_kernel: a CTA per row; a key's rank is its place in its own chunk's list plus, by
 * bisection, the number of larger keys in the others.
 *
 * NaN, -inf and what a grammar forbids are not candidates. Reads each logit once: limited by memory. A chunk whose large
 * logits all lie with one lane (they are 1024 tokens apart) leaves up to kChunk survivors to count
 * among: slower, not wrong.
 */
#pragma once

#include "common/vec.cuh"
#include "kernels/draft/grammar.cuh"
#include "kernels/draft/race.cuh"

namespace dspark {

struct TopPolicy {
  static constexpr int kNumThreads = 256;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kQuadsPerThread = 8;
  static constexpr int kChunk = kNumThreads * kQuadsPerThread * kQuad; /* logits of a CTA */
  static constexpr int kMaxTop = kNumThreads;
  static_assert(kMaxTop <= kNumWarps * kWarpSize);
};

template <typename U>
struct TopArgs {
  const U* logits;     /* [num_rows, vocab_size], f32 or bf16 */
  RaceKey* chunk_keys; /* [num_rows, num_chunks, num_top] */
  RaceKey* keys;       /* [num_rows, num_top] */
  GrammarMask mask;
  int64_t stride_row;
  int32_t vocab_size;
  int32_t num_chunks;
  int32_t num_top;
  bool aligned_rows; /* quads of every row start at multiples of their size */
};

/* Four neighbouring logits as f32, -inf past the row's end. */
template <typename U>
__device__ __forceinline__ void load_logits(
    const U* row, int32_t first, int32_t vocab_size, bool aligned, float (&values)[kQuad]) {
  if (aligned && vocab_size - first >= kQuad) {
    if constexpr (sizeof(U) == 4) {
      const float4 quad = *reinterpret_cast<const float4*>(row + first);
      values[0] = quad.x, values[1] = quad.y, values[2] = quad.z, values[3] = quad.w;
    } else {
      const uint2 quad = *reinterpret_cast<const uint2*>(row + first);
      const float2 low = Element<U>::unpack(quad.x);
      const float2 high = Element<U>::unpack(quad.y);
      values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    values[i] = first + i < vocab_size ? Element<U>::to_float(row[first + i]) : -INFINITY;
  }
}

/* 0 for what can never be drawn. */
__device__ __forceinline__ RaceKey candidate_key(float logit, int32_t token) {
  return logit > -INFINITY ? race_key({logit, token}) : kEmptyRaceKey;
}

/* The largest key that at least `quota` of the warp's keys reach; 0 when fewer are not 0. */
__device__ __forceinline__ RaceKey warp_threshold(RaceKey key, int quota) {
  int num_larger = 0;
#pragma unroll 4
  for (int lane = 0; lane < kWarpSize; ++lane) {
    num_larger += __shfl_sync(kAllLanes, key, lane) > key;
  }
  RaceKey threshold = num_larger >= quota - 1 ? key : kEmptyRaceKey;
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    threshold = max(threshold, shuffle_xor(threshold, mask));
  }
  return threshold;
}

/* Grid: chunks x rows, flat. Shared memory: kChunk keys. */
template <typename U>
__global__ void __launch_bounds__(TopPolicy::kNumThreads) chunk_top_kernel(TopArgs<U> args) {
  using Policy = TopPolicy;
  extern __shared__ float4 shared_survivors[];
  __shared__ RaceKey thresholds[Policy::kNumWarps];
  __shared__ unsigned num_survivors;
  auto* survivors = reinterpret_cast<RaceKey*>(shared_survivors);
  const int64_t row = blockIdx.x / args.num_chunks;
  const int32_t chunk = blockIdx.x % args.num_chunks;
  const U* logits = args.logits + row * args.stride_row;
  if (threadIdx.x == 0) num_survivors = 0;

  float values[Policy::kQuadsPerThread][kQuad];
  Indexed best = empty_race();
#pragma unroll
  for (int i = 0; i < Policy::kQuadsPerThread; ++i) {
    const int32_t token =
        chunk * Policy::kChunk + (i * Policy::kNumThreads + static_cast<int>(threadIdx.x)) * kQuad;
    load_logits(logits, token, args.vocab_size, args.aligned_rows, values[i]);
    if (token >= args.vocab_size) continue;
    const uint32_t allowed = allowed_in_quad(args.mask, row, token / kQuad);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if ((allowed >> j & 1u) == 0) values[i][j] = -INFINITY;
    }
  }
#pragma unroll
  for (int i = 0; i < Policy::kQuadsPerThread; ++i) {
    const int32_t token =
        chunk * Policy::kChunk + (i * Policy::kNumThreads + static_cast<int>(threadIdx.x)) * kQuad;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) race_step(best, values[i][j], token + j);
  }
  const int quota = (args.num_top + Policy::kNumWarps - 1) / Policy::kNumWarps;
  const RaceKey of_warp = warp_threshold(race_key(best), quota);
  if (threadIdx.x % kWarpSize == 0) thresholds[threadIdx.x / kWarpSize] = of_warp;
  __syncthreads();
  RaceKey threshold = thresholds[0];
#pragma unroll
  for (int warp = 1; warp < Policy::kNumWarps; ++warp) {
    threshold = min(threshold, thresholds[warp]);
  }
#pragma unroll
  for (int i = 0; i < Policy::kQuadsPerThread; ++i) {
    const int32_t token =
        chunk * Policy::kChunk + (i * Policy::kNumThreads + static_cast<int>(threadIdx.x)) * kQuad;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const RaceKey key = candidate_key(values[i][j], token + j);
      if (key != kEmptyRaceKey && key >= threshold) survivors[atomicAdd(&num_survivors, 1u)] = key;
    }
  }
  __syncthreads();
  const int count = static_cast<int>(num_survivors);
  RaceKey* out = args.chunk_keys + static_cast<int64_t>(blockIdx.x) * args.num_top;
  for (int i = threadIdx.x; i < max(count, args.num_top); i += Policy::kNumThreads) {
    if (i >= count) {
      out[i] = kEmptyRaceKey;
      continue;
    }
    int rank = 0;
    for (int other = 0; other < count && rank < args.num_top; ++other) {
      rank += survivors[other] > survivors[i];
    }
    if (rank < args.num_top) out[rank] = survivors[i];
  }
}

/* Keys of a descending list that are larger than `key`. */
__device__ __forceinline__ int num_larger_keys(const RaceKey* list, int size, RaceKey key) {
  int low = 0;
  int high = size;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] > key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/* Grid: rows. Shared memory: num_chunks * num_top keys. */
template <typename U>
__global__ void __launch_bounds__(TopPolicy::kNumThreads) merge_top_kernel(TopArgs<U> args) {
  extern __shared__ float4 shared_keys[];
  auto* lists = reinterpret_cast<RaceKey*>(shared_keys);
  const int32_t num_top = args.num_top;
  const int32_t num_keys = args.num_chunks * num_top;
  const RaceKey* in = args.chunk_keys + static_cast<int64_t>(blockIdx.x) * num_keys;
  RaceKey* out = args.keys + static_cast<int64_t>(blockIdx.x) * num_top;
  for (int32_t i = threadIdx.x; i < num_keys; i += TopPolicy::kNumThreads) lists[i] = in[i];
  for (int32_t i = threadIdx.x; i < num_top; i += TopPolicy::kNumThreads) out[i] = kEmptyRaceKey;
  __syncthreads(); /* orders the zeros before the keys too */
  for (int32_t i = threadIdx.x; i < num_keys; i += TopPolicy::kNumThreads) {
    const RaceKey key = lists[i];
    if (key == kEmptyRaceKey) continue;
    int rank = i % num_top;
    for (int32_t chunk = 0; chunk < args.num_chunks && rank < num_top; ++chunk) {
      if (chunk == i / num_top) continue;
      rank += num_larger_keys(lists + chunk * num_top, num_top, key);
    }
    if (rank < num_top) out[rank] = key;
  }
}

}  // namespace dspark
