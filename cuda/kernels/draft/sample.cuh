/*
 * One step of the draft head over the vocabulary: add the Markov bias, sample. The form for ranks and
 * alignments that tiled_steps.cuh does not take, and for heads without bias.
 *
 *   l_k(v) = U_k(v) + W2[v] . latent       written over U_k, f32; -inf where the grammar forbids v
 *   x_k    = argmax over v of l_k(v) - T log E_v   (the race of common/philox.cuh; T = 0: argmax)
 *
 * Mapping: a CTA takes kTileRows tokens for up to kNumReqs requests, so that a batch reads W2 once
 * per kNumReqs requests. Two phases:
 *   1. bias: kLanesPerRow lanes share a row of W2 (128 neighbouring bytes per access and row) and
 *      keep kRowsPerGroup rows x kNumReqs requests of partial dots in registers against latents in
 *      shared memory; the dots go to shared memory.
 *   2. race: a thread takes four neighbouring tokens of a request: one 16-byte read and write of
 *      the logits and one Philox call. The tile's winner goes to `winners`.
 * finish_kernel merges the tiles of a row; it is a launch of its own, which orders it after all
 * tiles without counters or fences. A head without bias runs phase 2 alone, all steps at once.
 *
 * Per step: W2 (2 * vocab_size * rank bytes, 78 MB at 152k x 256) once per kNumReqs requests and
 * 8 * vocab_size bytes of logits per request; 2 * vocab_size * rank flops per request. Limited by
 * the read of W2 up to a handful of requests, by FMA issue beyond. A request's dot is summed in the
 * same order whatever kNumReqs is.
 *
 * A token whose score is NaN or -inf never wins; a row without a winner yields token 0.
 */
#pragma once

#include "common/logit_row.cuh"
#include "common/philox.cuh"
#include "dspark.h"
#include "kernels/draft/grammar.cuh"
#include "kernels/draft/latent.cuh"

namespace dspark {

template <int kReqs>
struct SamplePolicy {
  static constexpr int kNumThreads = 256;
  static constexpr int kMinCtasPerSm = 3; /* 85 registers: room for the partial dots */
  static constexpr int kNumReqs = kReqs;  /* requests of a CTA */
  static constexpr int kTileRows = 256;   /* tokens of a CTA */
  static constexpr int kLanesPerRow = 8;
  static constexpr int kRowsPerGroup = 2;
  static constexpr int kNumGroups = kNumThreads / kLanesPerRow;
  static constexpr int kQuadsPerTile = kTileRows / kQuad;
  static_assert(kTileRows % (kNumGroups * kRowsPerGroup) == 0);
  static_assert(kTileRows % kQuad == 0);
};

constexpr int kSampleTileRows = SamplePolicy<1>::kTileRows;

/* How requests sample, for the kernels that race. */
struct SampleInputs {
  float* logits; /* [num_reqs * draft_len, vocab_size] */
  const int32_t* anchor_positions;
  const float* temperature;
  const uint64_t* seeds;
  const int32_t* rules; /* nullptr: none is coupled */
  Indexed* winners;     /* [rows, num_tiles] */
  GrammarMask mask;
  int64_t stride_logits_row;
  int32_t vocab_size;
  int32_t draft_len;
  int32_t num_tiles;
  bool aligned_rows; /* every row of logits starts at a multiple of 16 bytes */
};

/* What the tokens of one tile race with. */
struct TileNoise {
  float temperature;
  uint64_t seed;
  int32_t position;
  uint32_t purpose;
};

/* Coupled drafts share the target's noise. */
__device__ __forceinline__ TileNoise tile_noise(const SampleInputs& in, int32_t req, int32_t step) {
  TileNoise noise = {};
  noise.temperature = in.temperature[req];
  if (!(noise.temperature > 0.f)) return noise;
  noise.seed = in.seeds[req];
  noise.position = in.anchor_positions[req] + step + 1;
  const bool coupled = in.rules != nullptr && in.rules[req] == DSPARK_RULE_COUPLED;
  noise.purpose = coupled ? DSPARK_PURPOSE_BONUS : DSPARK_PURPOSE_DRAFT;
  return noise;
}

/* The four tokens of a quad run; tokens past the vocabulary are -inf and take no part. */
__device__ __forceinline__ void race_quad(Indexed& best,
                                          float4 logits,
                                          const TileNoise& tile,
                                          int32_t quad) {
  float scores[kQuad] = {logits.x, logits.y, logits.z, logits.w};
  if (tile.temperature > 0.f) {
    const uint4 noise =
        philox_quad(tile.seed, static_cast<uint32_t>(quad), tile.position, tile.purpose);
    const ZoneNoise zone =
        zone_noise(tile.seed, quad / (kNoiseZone / kQuad), tile.position, tile.purpose);
    const uint32_t words[kQuad] = {noise.x, noise.y, noise.z, noise.w};
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const float exponential = zone_exponential(zone, (quad * kQuad + i) % kNoiseZone, words[i]);
      scores[i] = race_score_logit(scores[i], tile.temperature, exponential);
    }
  }
  /* Past INT32_MAX only for tokens outside the vocabulary, whose score is -inf. */
#pragma unroll
  for (int i = 0; i < kQuad; ++i) race_step(best, scores[i], quad * kQuad + i);
}

template <typename T>
struct BiasArgs {
  HeadInputs<T> in;
  SampleInputs sample;
  const T* markov_w2;  /* [vocab_size, markov_rank] */
  const float* latent; /* [num_reqs, markov_rank]; nullptr: W1[x_{k-1}] (vanilla) */
  int32_t step;
};

/* Latents of the CTA's requests into shared memory [kNumReqs, rank]. */
template <typename T, typename Policy>
__device__ __forceinline__ void stage_latents(const BiasArgs<T>& args,
                                              int32_t first_req,
                                              int num_reqs,
                                              float* latents) {
  const int32_t rank = args.in.markov_rank;
  for (int q = 0; q < num_reqs; ++q) {
    const int32_t req = first_req + q;
    const T* markov = args.latent == nullptr ? markov_row(args.in, req, args.step) : nullptr;
    for (int32_t j = threadIdx.x; j < rank; j += Policy::kNumThreads) {
      float value = 0.f;
      if (args.latent != nullptr) {
        value = args.latent[static_cast<int64_t>(req) * rank + j];
      } else if (markov != nullptr) {
        value = Element<T>::to_float(markov[j]);
      }
      latents[q * rank + j] = value;
    }
  }
}

/* Phase 1: biases[q][i] = W2[first_token + i] . latent of request q. */
template <typename T, bool kVec, typename Policy>
__device__ __forceinline__ void compute_biases(const BiasArgs<T>& args,
                                               int32_t first_token,
                                               int num_reqs,
                                               const float* latents,
                                               float* biases) {
  constexpr int kChunk = kChunkSize<kVec>;
  constexpr int kLanes = Policy::kLanesPerRow;
  constexpr int kRows = Policy::kRowsPerGroup;
  const int32_t rank = args.in.markov_rank;
  const int sub_lane = threadIdx.x % kLanes;
  const int group = threadIdx.x / kLanes;
  for (int base = 0; base < Policy::kTileRows; base += Policy::kNumGroups * kRows) {
    const int first_row = base + group * kRows;
    const T* weights[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      /* A row past the vocabulary repeats the last one; its bias is never used. */
      const int32_t last = args.in.vocab_size - 1 - first_token;
      const int32_t row = min(first_row + i, last);
      weights[i] = args.markov_w2 + (static_cast<int64_t>(first_token) + row) * rank;
    }
    float sums[kRows][Policy::kNumReqs] = {};
#pragma unroll 2
    for (int32_t column = sub_lane * kChunk; column < rank; column += kLanes * kChunk) {
      float weight[kRows][kChunk];
#pragma unroll
      for (int i = 0; i < kRows; ++i) load_chunk<kVec>(weights[i] + column, weight[i]);
#pragma unroll
      for (int q = 0; q < Policy::kNumReqs; ++q) {
        if (q >= num_reqs) break;
        float input[kChunk];
        load_chunk<kVec>(latents + q * rank + column, input);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kChunk; ++j) sums[i][q] = fmaf(weight[i][j], input[j], sums[i][q]);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < Policy::kNumReqs; ++q) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float sum = warp_reduce<kLanes>(sums[i][q], SumOp{});
        if (sub_lane == 0) biases[q * Policy::kTileRows + first_row + i] = sum;
      }
    }
  }
}

/* Phase 2 for one request: adds the biases, writes l, races the tile. All threads take part. */
template <typename Policy>
__device__ __forceinline__ Indexed race_biased_tile(
    const SampleInputs& in, int32_t req, int32_t step, int32_t first_token, const float* biases) {
  const int64_t row_index = static_cast<int64_t>(req) * in.draft_len + step;
  float* row = in.logits + row_index * in.stride_logits_row;
  const TileNoise noise = tile_noise(in, req, step);
  Indexed best = empty_race();
  for (int i = threadIdx.x % kWarpSize; i < Policy::kQuadsPerTile; i += kWarpSize) {
    const int32_t quad = first_token / kQuad + i;
    if (static_cast<int64_t>(quad) * kQuad >= in.vocab_size) break;
    float4 l = load_quad(row, quad, in.vocab_size, in.aligned_rows, -INFINITY);
    const float4 bias = reinterpret_cast<const float4*>(biases)[i];
    l = make_float4(l.x + bias.x, l.y + bias.y, l.z + bias.z, l.w + bias.w);
    l = only_allowed(l, allowed_in_quad(in.mask, row_index, quad));
    store_quad(row, quad, in.vocab_size, in.aligned_rows, l);
    race_quad(best, l, noise, quad);
  }
  return warp_reduce(best, ArgmaxOp{});
}

/* Grid: tiles x request groups, flat. Shared memory: latents [kNumReqs, rank]. */
template <typename T, bool kVec, typename Policy>
__global__ void __launch_bounds__(Policy::kNumThreads, Policy::kMinCtasPerSm)
    bias_sample_kernel(BiasArgs<T> args) {
  extern __shared__ float4 shared_latents[];
  __shared__ float4 shared_biases[Policy::kNumReqs * Policy::kQuadsPerTile];
  float* latents = reinterpret_cast<float*>(shared_latents);
  float* biases = reinterpret_cast<float*>(shared_biases);
  const int32_t tile = blockIdx.x % args.sample.num_tiles;
  const int32_t first_req = blockIdx.x / args.sample.num_tiles * Policy::kNumReqs;
  const int32_t first_token = tile * Policy::kTileRows;
  const int num_reqs = min(Policy::kNumReqs, args.in.num_reqs - first_req);

  stage_latents<T, Policy>(args, first_req, num_reqs, latents);
  __syncthreads();
  compute_biases<T, kVec, Policy>(args, first_token, num_reqs, latents, biases);
  __syncthreads();
  for (int q = threadIdx.x / kWarpSize; q < num_reqs; q += Policy::kNumThreads / kWarpSize) {
    const Indexed best = race_biased_tile<Policy>(args.sample, first_req + q, args.step,
                                                  first_token, biases + q * Policy::kTileRows);
    if (threadIdx.x % kWarpSize == 0) {
      args.sample.winners[static_cast<int64_t>(first_req + q) * args.sample.num_tiles + tile] =
          best;
    }
  }
}

/* The head without bias: a warp per (row, tile), all steps of all requests. */
template <typename Policy>
__global__ void __launch_bounds__(Policy::kNumThreads)
    sample_kernel(SampleInputs in, int64_t num_row_tiles) {
  const int64_t row_tile = static_cast<int64_t>(blockIdx.x) * (Policy::kNumThreads / kWarpSize) +
                           threadIdx.x / kWarpSize;
  if (row_tile >= num_row_tiles) return; /* whole warps */
  const int64_t row = row_tile / in.num_tiles;
  const int32_t tile = static_cast<int32_t>(row_tile % in.num_tiles);
  const int32_t req = static_cast<int32_t>(row / in.draft_len);
  const int32_t step = static_cast<int32_t>(row % in.draft_len);
  float* logits = in.logits + row * in.stride_logits_row;
  const TileNoise noise = tile_noise(in, req, step);
  Indexed best = empty_race();
  for (int i = threadIdx.x % kWarpSize; i < Policy::kQuadsPerTile; i += kWarpSize) {
    const int32_t quad = tile * Policy::kQuadsPerTile + i;
    if (static_cast<int64_t>(quad) * kQuad >= in.vocab_size) break;
    float4 l = load_quad(logits, quad, in.vocab_size, in.aligned_rows, -INFINITY);
    if (in.mask.words != nullptr) {
      l = only_allowed(l, allowed_in_quad(in.mask, row, quad));
      store_quad(logits, quad, in.vocab_size, in.aligned_rows, l);
    }
    race_quad(best, l, noise, quad);
  }
  best = warp_reduce(best, ArgmaxOp{});
  if (threadIdx.x % kWarpSize == 0) in.winners[row_tile] = best;
}

struct FinishPolicy {
  static constexpr int kNumThreads = 128;
};

/* A CTA per row of `winners`: tokens[row * stride_token] = the winner of its tiles. */
__global__ void __launch_bounds__(FinishPolicy::kNumThreads) finish_kernel(const Indexed* winners,
                                                                           int32_t num_tiles,
                                                                           int32_t* tokens,
                                                                           int64_t stride_token) {
  __shared__ Indexed scratch[FinishPolicy::kNumThreads / kWarpSize];
  const int64_t row = blockIdx.x;
  Indexed best = empty_race();
  for (int32_t tile = threadIdx.x; tile < num_tiles; tile += FinishPolicy::kNumThreads) {
    best = ArgmaxOp{}(best, winners[row * num_tiles + tile]);
  }
  best = cta_reduce<FinishPolicy::kNumThreads>(best, ArgmaxOp{}, empty_race(), scratch);
  if (threadIdx.x == 0) tokens[row * stride_token] = best.index == kNoRunner ? 0 : best.index;
}

}  // namespace dspark
