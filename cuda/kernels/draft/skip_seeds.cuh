/*
 * First pass of the skipping head: the largest base logits of kSkipSeeds parts of every row.
 *
 * They are what a step starts from (skip.cuh): their logits bound from below what a draft must reach. One
 * CTA per row and part, 16-byte loads where rows allow it; masked tokens are passed over. It also clears what
 * the steps count in. Memory bandwidth limits it; the steps find the rows in L2 as far as they fit.
 */
#pragma once

#include "kernels/draft/full_rows.cuh"
#include "kernels/draft/skip_bound.cuh"

namespace dspark {

struct SeedPolicy {
  static constexpr int kNumThreads = 256;
};

struct SeedArgs {
  const void* logits;
  bool f32_logits;
  bool aligned_logits;
  int64_t stride_logits_row;
  GrammarMask mask;
  const int32_t* draft_lens;
  int32_t num_reqs;
  int32_t draft_len;
  int32_t vocab_size;
  RaceKey* seeds;
  RaceKey* keys; /* to be emptied: [draft_len, num_reqs] */
  uint32_t* arrivals;
  int32_t num_arrivals;
  uint64_t* rows_read; /* [num_reqs] or nullptr */
};

template <typename U>
__device__ __forceinline__ Indexed
largest_of(const U* row, const SeedArgs& args, int64_t mask_row, int32_t begin, int32_t end) {
  constexpr int kChunk = kVecSize<U>;
  Indexed best = empty_race();
  const int32_t stride = SeedPolicy::kNumThreads * kChunk;
#pragma unroll 4
  for (int32_t token = begin + static_cast<int32_t>(threadIdx.x) * kChunk; token < end;
       token += stride) {
    float values[kChunk];
    if (args.aligned_logits && token + kChunk <= end) {
      load_vec(row + token, values);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        values[i] = token + i < end ? Element<U>::to_float(row[token + i]) : -INFINITY;
      }
    }
    if (args.mask.words != nullptr) {
#pragma unroll
      for (int i = 0; i < kChunk; i += kQuad) {
        const uint32_t allowed =
            token + i < end ? allowed_in_quad(args.mask, mask_row, (token + i) / kQuad) : 0u;
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if ((allowed >> j & 1u) == 0) values[i + j] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) race_step(best, values[i], token + i);
  }
  return best;
}

/* Grid: (rows, kSkipSeeds). */
static __global__ void __launch_bounds__(SeedPolicy::kNumThreads) seed_kernel(SeedArgs args) {
  constexpr int kWarps = SeedPolicy::kNumThreads / kWarpSize;
  __shared__ Indexed bests[kWarps];
  const auto row = static_cast<int32_t>(blockIdx.x);
  const int32_t req = row / args.draft_len;
  const int32_t step = row % args.draft_len;
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    args.keys[static_cast<int64_t>(step) * args.num_reqs + req] = kEmptyRaceKey;
    if (step == 0 && args.rows_read != nullptr) args.rows_read[req] = 0;
  }
  if (row == 0 && blockIdx.y == 0) {
    for (int32_t i = threadIdx.x; i < args.num_arrivals; i += SeedPolicy::kNumThreads) {
      args.arrivals[i] = 0;
    }
  }
  if (args.draft_lens != nullptr && step >= args.draft_lens[req]) {
    if (threadIdx.x == 0)
      args.seeds[static_cast<int64_t>(row) * kSkipSeeds + blockIdx.y] = kEmptyRaceKey;
    return;
  }
  const int32_t part = (args.vocab_size + kSkipSeeds * 8 - 1) / (kSkipSeeds * 8) * 8;
  const int32_t begin = static_cast<int32_t>(blockIdx.y) * part;
  const int32_t end = min(begin + part, args.vocab_size);
  const int64_t offset = row * args.stride_logits_row;
  Indexed best =
      args.f32_logits
          ? largest_of(static_cast<const float*>(args.logits) + offset, args, row, begin, end)
          : largest_of(static_cast<const __nv_bfloat16*>(args.logits) + offset, args, row, begin,
                       end);
  best = warp_reduce(best, ArgmaxOp{});
  if (threadIdx.x % kWarpSize == 0) bests[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  best = threadIdx.x < kWarps ? bests[threadIdx.x] : empty_race();
  best = warp_reduce(best, ArgmaxOp{});
  if (threadIdx.x == 0) {
    args.seeds[static_cast<int64_t>(row) * kSkipSeeds + blockIdx.y] = race_key(best);
  }
}

}  // namespace dspark
