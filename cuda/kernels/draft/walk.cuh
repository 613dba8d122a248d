/*
 * The candidate form of the draft head: the law lives on the K largest base logits of the row and,
 * if a table is given, the M tokens that the previous token favours most.
 *
 *   C_k  = top-K of U_k  joined with  bigram_tokens[x_{k-1}]
 *   l(v) = U_k(v) + W2[v] . latent for v in C_k;   x_k ~ softmax(l / T) over C_k alone
 *
 * Mapping: a CTA walks the steps of one request; nothing crosses CTAs. What does not depend on the
 * tokens drawn is done beforehand: the top-K of all steps and their noise go to shared memory, and
 * the W2 rows of the next step are in registers when its latent comes. A step then is one read of
 * W1 (from L2, where select_top_kernel had it brought), dots by kLanesPerRow lanes a candidate, and
 * a reduction: four barriers.
 *
 * Bytes per request and step: (K + M) * 2 * rank, and the pairs written. Limited by latency. gated
 * and rnn latents come from a kernel of their own, with a launch per step. On sm_90 vanilla heads
 * without bigrams take cluster_walk.cuh.
 */
#pragma once

#include "common/dependent_launch.cuh"
#include "kernels/draft/latent.cuh"
#include "kernels/draft/race.cuh"
#include "kernels/draft/top_k.cuh"

namespace dspark {

struct WalkPolicy {
  static constexpr int kNumThreads = 256;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
  static constexpr int kLanesPerRow = 4;
  static constexpr int kNumGroups = kNumThreads / kLanesPerRow; /* candidates at a time */
  static constexpr int kChunk = 8;                              /* columns of 16 bytes */
  static constexpr int kAheadChunks = 8; /* of a lane, in registers: 64 columns, rank 256 */
  static constexpr int kAheadRank = kAheadChunks * kLanesPerRow * kChunk;
};

struct Candidate {
  float logit; /* U */
  float noise; /* T log E: what the score loses; 0 at temperature 0 */
  int32_t token;
};

template <typename T, typename U>
struct WalkArgs {
  HeadInputs<T> in;
  const T* markov_w2;     /* nullptr: no bias */
  const float* latent;    /* [num_reqs, markov_rank]; nullptr: W1[x_{k-1}] */
  const U* logits;        /* [num_reqs * draft_len, vocab_size] */
  const RaceKey* top;     /* [num_reqs * draft_len, num_top] */
  const int32_t* bigrams; /* [vocab_size, num_bigram], each token once per row; negative: none */
  const int32_t* anchor_positions;
  const float* temperature;
  const uint64_t* seeds;
  const int32_t* rules; /* nullptr: none is coupled */
  const int32_t* top_k; /* these three: nullptr: off */
  const float* top_p;
  const float* min_p;
  int32_t* draft_tokens;     /* [num_reqs, draft_len] */
  int32_t* candidate_tokens; /* [num_reqs * draft_len, num_top + num_bigram] */
  float* candidate_logits;
  GrammarMask mask;
  int64_t stride_logits_row;
  int32_t num_top;
  int32_t num_bigram;
  int32_t first_step;
  int32_t num_steps; /* of this launch */
  /* These: cluster_walk.cuh. */
  int32_t num_ctas;          /* of a cluster */
  bool aligned_rows;         /* rows of base logits start at multiples of 16 bytes */
  bool ask_for_w1;           /* L2 for the candidates' rows */
  const uint32_t* zone_tops; /* of zone_top_kernel, where it ran */
  int32_t num_zones;
};

constexpr int32_t kNoCandidate = -1;

/* Dynamic shared memory of a walk: latent, then top and bigram candidates of each step. */
__host__ __device__ constexpr size_t walk_latent_floats(int32_t rank) {
  return static_cast<size_t>(rank + 7) / 8 * 8;
}

__host__ __device__ constexpr size_t walk_shared_bytes(int32_t rank,
                                                       int32_t num_candidates,
                                                       int32_t num_steps) {
  return walk_latent_floats(rank) * sizeof(float) +
         static_cast<size_t>(num_candidates) * num_steps * sizeof(Candidate);
}

/* T log E of a token of the race, 0 where the temperature is. */
__device__ __forceinline__ float token_noise(const Runner& runner, int32_t token) {
  if (!(runner.temperature > 0.f)) return 0.f;
  const ZoneNoise zone =
      zone_noise(runner.seed, token / kNoiseZone, runner.position, runner.purpose);
  return runner.temperature * logf(token_exponential(runner, zone, token));
}

/* A walk's request. */
template <typename T, typename U>
struct Walk {
  const WalkArgs<T, U>& args;
  int32_t req;
  int32_t num_candidates;
  float* latent;         /* shared */
  Candidate* candidates; /* shared, [num_steps, num_candidates] */
  Runner runner;         /* position: of the launch's first step */

  __device__ __forceinline__ Walk(const WalkArgs<T, U>& args, float4* shared)
      : args(args),
        req(static_cast<int32_t>(blockIdx.x)),
        num_candidates(args.num_top + args.num_bigram),
        latent(reinterpret_cast<float*>(shared)),
        candidates(reinterpret_cast<Candidate*>(latent + walk_latent_floats(args.in.markov_rank))),
        runner{args.seeds[req], args.temperature[req], 0.f,
               args.anchor_positions[req] + 1 + args.first_step, draft_purpose(args.rules, req)} {}

  /* The i-th step of the launch. */
  __device__ __forceinline__ int64_t row(int32_t i) const {
    return static_cast<int64_t>(req) * args.in.draft_len + args.first_step + i;
  }

  __device__ __forceinline__ Candidate* of_step(int32_t i) const {
    return candidates + i * num_candidates;
  }

  __device__ __forceinline__ Candidate candidate(int32_t i, int32_t token, float logit) const {
    Runner at = runner;
    at.position += i;
    return {logit, token < 0 ? 0.f : token_noise(at, token), token};
  }

  /* The top of all steps. */
  __device__ __forceinline__ void stage_top() {
    for (int32_t at = threadIdx.x; at < args.num_steps * args.num_top;
         at += WalkPolicy::kNumThreads) {
      const int32_t i = at / args.num_top;
      const RaceKey key = args.top[row(0) * args.num_top + at];
      const int32_t token = key == kEmptyRaceKey ? kNoCandidate : race_token(key);
      of_step(i)[at % args.num_top] = candidate(i, token, race_score(key));
    }
  }

  /* The bigrams of a step. */
  __device__ __forceinline__ void stage_bigrams(int32_t i, int32_t previous) {
    const bool known = previous >= 0 && previous < args.in.vocab_size;
    const Candidate* top = of_step(i);
    for (int32_t j = threadIdx.x; j < args.num_bigram; j += WalkPolicy::kNumThreads) {
      int32_t token =
          known ? args.bigrams[static_cast<int64_t>(previous) * args.num_bigram + j] : kNoCandidate;
      const bool allowed =
          token >= 0 && token < args.in.vocab_size &&
          (allowed_in_quad(args.mask, row(i), token / kQuad) >> token % kQuad & 1u) != 0;
      if (!allowed) token = kNoCandidate;
      for (int32_t other = 0; other < args.num_top && token >= 0; ++other) {
        if (top[other].token == token) token = kNoCandidate;
      }
      float logit = -INFINITY;
      if (token >= 0) {
        logit = Element<U>::to_float(args.logits[row(i) * args.stride_logits_row + token]);
        if (!(logit > -INFINITY)) token = kNoCandidate;
      }
      of_step(i)[args.num_top + j] = candidate(i, token, logit);
    }
  }

  __device__ __forceinline__ void stage_latent(int32_t previous) {
    const int32_t rank = args.in.markov_rank;
    const bool known = previous >= 0 && previous < args.in.vocab_size;
    for (int32_t j = threadIdx.x; j < rank; j += WalkPolicy::kNumThreads) {
      if (args.latent != nullptr) {
        latent[j] = args.latent[static_cast<int64_t>(req) * rank + j];
      } else {
        latent[j] =
            known
                ? Element<T>::to_float(args.in.markov_w1[static_cast<int64_t>(previous) * rank + j])
                : 0.f;
      }
    }
  }
};

/* 16-byte pieces of this thread's share of its group's candidate: columns (i * kLanesPerRow + lane)
 * * kChunk. */
using AheadRow = uint4[WalkPolicy::kAheadChunks];

/* Starts the reads of the first kNumGroups candidates of a step. */
template <typename T, typename U>
__device__ __forceinline__ void read_ahead(const Walk<T, U>& walk, int32_t i, AheadRow& ahead) {
  const int32_t at = threadIdx.x / WalkPolicy::kLanesPerRow;
  if (i >= walk.args.num_steps || at >= walk.args.num_top) return;
  const int32_t token = walk.of_step(i)[at].token;
  if (token < 0) return;
  const int32_t rank = walk.args.in.markov_rank;
  const T* row = walk.args.markov_w2 + static_cast<int64_t>(token) * rank;
#pragma unroll
  for (int piece = 0; piece < WalkPolicy::kAheadChunks; ++piece) {
    const int32_t column = (piece * WalkPolicy::kLanesPerRow +
                            static_cast<int32_t>(threadIdx.x) % WalkPolicy::kLanesPerRow) *
                           WalkPolicy::kChunk;
    if (column < rank) ahead[piece] = *reinterpret_cast<const uint4*>(row + column);
  }
}

/* This lane's part of the dot of a row that was read ahead. */
template <typename T>
__device__ __forceinline__ float dot_ahead(const AheadRow& ahead,
                                           const float* latent,
                                           int32_t rank) {
  float sum = 0.f;
#pragma unroll
  for (int piece = 0; piece < WalkPolicy::kAheadChunks; ++piece) {
    const int32_t column = (piece * WalkPolicy::kLanesPerRow +
                            static_cast<int32_t>(threadIdx.x) % WalkPolicy::kLanesPerRow) *
                           WalkPolicy::kChunk;
    if (column >= rank) continue;
    float weight[WalkPolicy::kChunk];
    float input[WalkPolicy::kChunk];
    unpack_vec<T>(ahead[piece], weight);
    load_chunk<true>(latent + column, input);
#pragma unroll
    for (int j = 0; j < WalkPolicy::kChunk; ++j) sum = fmaf(weight[j], input[j], sum);
  }
  return sum;
}

/* The same from memory, in the same order where kVec is set. kVec as in accumulate_dots. */
template <bool kVec, typename T>
__device__ __forceinline__ float dot_row(const T* row, const float* latent, int32_t rank) {
  constexpr int kChunk = kChunkSize<kVec>;
  constexpr int kUnroll = kVec ? 4 : 1; /* four single elements spilled predicates on sm_80 */
  float sum = 0.f;
#pragma unroll kUnroll
  for (int32_t column = static_cast<int32_t>(threadIdx.x) % WalkPolicy::kLanesPerRow * kChunk;
       column < rank; column += WalkPolicy::kLanesPerRow * kChunk) {
    float weight[kChunk];
    float input[kChunk];
    load_chunk<kVec>(row + column, weight);
    load_chunk<kVec>(latent + column, input);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum = fmaf(weight[j], input[j], sum);
  }
  return sum;
}

/* Adds the bias to the candidates of a step. kAhead: the first round's rows are in `ahead`. */
template <bool kVec, bool kAhead, typename T, typename U>
__device__ __forceinline__ void bias_candidates(const Walk<T, U>& walk,
                                                int32_t step,
                                                const AheadRow& ahead) {
  const WalkArgs<T, U>& args = walk.args;
  const int32_t rank = args.in.markov_rank;
  /* All lanes of a warp run the same number of rounds: the sums shuffle. */
  for (int32_t base = 0; base < walk.num_candidates; base += WalkPolicy::kNumGroups) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x) / WalkPolicy::kLanesPerRow;
    const int32_t token = i < walk.num_candidates ? walk.of_step(step)[i].token : kNoCandidate;
    float sum = 0.f;
    if (token >= 0) {
      if (kAhead && base == 0 && i < args.num_top) {
        sum = dot_ahead<T>(ahead, walk.latent, rank);
      } else {
        sum = dot_row<kVec>(args.markov_w2 + static_cast<int64_t>(token) * rank, walk.latent, rank);
      }
    }
    sum = warp_reduce<WalkPolicy::kLanesPerRow>(sum, SumOp{});
    if (threadIdx.x % WalkPolicy::kLanesPerRow == 0 && token >= 0) {
      walk.of_step(step)[i].logit += sum;
    }
  }
}

/* What a request cuts its law down to; as in the target's law. */
struct LawFilter {
  int32_t top_k; /* 0: off */
  float top_p;   /* 1: off */
  float min_p;   /* 0: off */
};

template <typename T, typename U>
__device__ __forceinline__ LawFilter law_filter(const WalkArgs<T, U>& args, int32_t req) {
  return {args.top_k == nullptr ? 0 : args.top_k[req],
          args.top_p == nullptr ? 1.f : args.top_p[req],
          args.min_p == nullptr ? 0.f : args.min_p[req]};
}

/* Drops the candidates whose logit keep() refuses, all decisions before all drops; by the first
 * kNumThreads threads, whose barrier is sync(). */
template <typename C, typename Keep, typename Sync>
__device__ __forceinline__ void drop_candidates(C* candidates,
                                                int32_t count,
                                                Keep keep,
                                                Sync sync) {
  constexpr int kMaxPerThread = 2;
  uint32_t dropped = 0; /* bit j; an array of bool spilled on sm_80 */
#pragma unroll
  for (int j = 0; j < kMaxPerThread; ++j) {
    const int32_t i = threadIdx.x + j * WalkPolicy::kNumThreads;
    if (i < count && !keep(candidates[i].logit)) dropped |= 1u << j;
  }
  sync();
#pragma unroll
  for (int j = 0; j < kMaxPerThread; ++j) {
    if ((dropped >> j & 1u) != 0) {
      candidates[threadIdx.x + j * WalkPolicy::kNumThreads].logit = -INFINITY;
    }
  }
  sync();
}

/* Cuts softmax(l / temperature) over the candidates down: what is left out gets -inf. Threads as
 * above. */
template <typename C, typename Sync>
__device__ __forceinline__ void filter_candidates(
    C* candidates, int32_t count, float temperature, const LawFilter& filter, Sync sync) {
  const auto in_top_k = [&](float l) {
    int32_t larger = 0;
    for (int32_t i = 0; i < count; ++i) larger += candidates[i].logit > l;
    return larger < filter.top_k;
  };
  if (filter.top_k > 0) drop_candidates(candidates, count, in_top_k, sync);
  float top = -INFINITY;
  for (int32_t i = 0; i < count; ++i) top = fmaxf(top, candidates[i].logit);
  const auto in_mass = [&](float l) {
    float larger = 0.f;
    float all = 0.f;
    for (int32_t i = 0; i < count; ++i) {
      const float other = candidates[i].logit;
      const float weight = expf((other - top) / temperature);
      all += weight;
      larger += other > l ? weight : 0.f;
    }
    return (filter.top_p >= 1.f || larger < filter.top_p * all) &&
           expf((l - top) / temperature) >= filter.min_p;
  };
  drop_candidates(candidates, count, in_mass, sync);
}

/* Writes the pairs and races them; every thread gets the winner. */
template <typename T, typename U>
__device__ __forceinline__ Indexed race_candidates(const Walk<T, U>& walk,
                                                   int32_t step,
                                                   Indexed* scratch) {
  Indexed best = empty_race();
  for (int32_t i = threadIdx.x; i < walk.num_candidates; i += WalkPolicy::kNumThreads) {
    const Candidate candidate = walk.of_step(step)[i];
    const int64_t pair = walk.row(step) * walk.num_candidates + i;
    const float l = candidate.token < 0 ? -INFINITY : candidate.logit;
    walk.args.candidate_tokens[pair] = candidate.token;
    walk.args.candidate_logits[pair] = l;
    if (candidate.token >= 0) race_step(best, l - candidate.noise, candidate.token);
  }
  return cta_reduce<WalkPolicy::kNumThreads>(best, ArgmaxOp{}, empty_race(), scratch);
}

/* Grid: requests. Shared memory: walk_shared_bytes. kAhead: kVec and rank at most kAheadRank. */
template <typename T, typename U, bool kVec, bool kAhead>
__global__ void __launch_bounds__(WalkPolicy::kNumThreads) walk_kernel(WalkArgs<T, U> args) {
  extern __shared__ float4 shared_walk[];
  __shared__ Indexed scratch[WalkPolicy::kNumWarps];
  wait_for_prerequisites();
  Walk<T, U> walk(args, shared_walk);
  int32_t previous = args.first_step == 0 && args.markov_w2 == nullptr
                         ? 0
                         : previous_token(args.in, walk.req, args.first_step);
  const LawFilter filter = law_filter(args, walk.req);
  const float temperature = walk.runner.temperature;
  const bool filtered =
      temperature > 0.f && (filter.top_k > 0 || filter.top_p < 1.f || filter.min_p > 0.f);
  walk.stage_top();
  __syncthreads();
  AheadRow ahead = {};
  if constexpr (kAhead) read_ahead(walk, 0, ahead);
  for (int32_t i = 0; i < args.num_steps; ++i) {
    if (args.markov_w2 != nullptr) walk.stage_latent(previous);
    if (args.num_bigram > 0) walk.stage_bigrams(i, previous);
    __syncthreads();
    if (args.markov_w2 != nullptr) {
      bias_candidates<kVec, kAhead>(walk, i, ahead);
      __syncthreads();
    }
    if (filtered) {
      filter_candidates(walk.of_step(i), walk.num_candidates, temperature, filter,
                        [] { __syncthreads(); });
    }
    const Indexed best = race_candidates(walk, i, scratch);
    if constexpr (kAhead) read_ahead(walk, i + 1, ahead);
    previous = best.index == kNoRunner ? 0 : best.index;
    if (threadIdx.x == 0) args.draft_tokens[walk.row(i)] = previous;
  }
}

}  // namespace dspark
