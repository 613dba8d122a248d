/*
 * The candidate form of the draft head: the law lives on the K largest base logits of the row and,
 * if a table is given, the M tokens that the previous token favours most.
 *
 *   C_k  = top-K of U_k  joined with  bigram_tokens[x_{k-1}]
 *   l(v) = U_k(v) + W2[v] . latent for v in C_k;   x_k ~ softmax(l / T) over C_k alone
 *
 * Mapping: a CTA walks the steps of one request; nothing crosses CTAs. Groups of kLanesPerRow lanes
 * take a candidate each: gathered rows of W2, 128 neighbouring bytes per access. Which rows the
 * top-K needs is known for all steps beforehand, so the walk begins by asking L2 for them.
 *
 * Bytes per request and step: (K + M) * 2 * rank, and the pairs written. Limited by latency: about
 * one read of L2 and two barriers per step. gated and rnn latents come from a kernel of their own,
 * with a launch per step.
 */
#pragma once

#include "kernels/draft/latent.cuh"
#include "kernels/draft/race.cuh"
#include "kernels/draft/top_k.cuh"

namespace dspark {

struct WalkPolicy {
  static constexpr int kNumThreads = 256;
  static constexpr int kLanesPerRow = 8;
  static constexpr int kNumGroups = kNumThreads / kLanesPerRow;
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
  const int32_t* rules;      /* nullptr: none is coupled */
  int32_t* draft_tokens;     /* [num_reqs, draft_len] */
  int32_t* candidate_tokens; /* [num_reqs * draft_len, num_top + num_bigram] */
  float* candidate_logits;
  GrammarMask mask;
  int64_t stride_logits_row;
  int32_t num_top;
  int32_t num_bigram;
  int32_t first_step;
  int32_t num_steps; /* of this launch */
};

constexpr int32_t kNoCandidate = -1;

/* Asks L2 for the rows of W2 that the top-K of this launch's steps will need. */
template <typename T, typename U>
__device__ __forceinline__ void prefetch_rows(const WalkArgs<T, U>& args, int64_t first_row) {
  constexpr int kLineBytes = 128;
  const int32_t row_bytes = args.in.markov_rank * static_cast<int32_t>(sizeof(T));
  const int32_t num_lines = (row_bytes + kLineBytes - 1) / kLineBytes;
  const RaceKey* top = args.top + first_row * args.num_top;
  for (int32_t i = threadIdx.x; i < args.num_steps * args.num_top * num_lines;
       i += WalkPolicy::kNumThreads) {
    const RaceKey key = top[i / num_lines];
    if (key == kEmptyRaceKey) continue;
    const char* line = reinterpret_cast<const char*>(args.markov_w2) +
                       static_cast<int64_t>(race_token(key)) * row_bytes +
                       i % num_lines * kLineBytes;
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(line)));
  }
}

/* Candidates of a step and their base logits into shared memory; kNoCandidate where there is none.
 */
template <typename T, typename U>
__device__ __forceinline__ void gather_candidates(
    const WalkArgs<T, U>& args, int64_t row, int32_t previous, int32_t* tokens, float* logits) {
  const int32_t vocab_size = args.in.vocab_size;
  for (int32_t i = threadIdx.x; i < args.num_top; i += WalkPolicy::kNumThreads) {
    const RaceKey key = args.top[row * args.num_top + i];
    tokens[i] = key == kEmptyRaceKey ? kNoCandidate : race_token(key);
    logits[i] = race_score(key);
  }
  __syncthreads();
  const bool known = previous >= 0 && previous < vocab_size;
  for (int32_t i = threadIdx.x; i < args.num_bigram; i += WalkPolicy::kNumThreads) {
    int32_t token =
        known ? args.bigrams[static_cast<int64_t>(previous) * args.num_bigram + i] : kNoCandidate;
    const bool allowed =
        token >= 0 && token < vocab_size &&
        (allowed_in_quad(args.mask, row, token / kQuad) >> token % kQuad & 1u) != 0;
    if (!allowed) token = kNoCandidate;
    for (int32_t j = 0; j < args.num_top && token >= 0; ++j) {
      if (tokens[j] == token) token = kNoCandidate;
    }
    float logit = -INFINITY;
    if (token >= 0) {
      logit = Element<U>::to_float(args.logits[row * args.stride_logits_row + token]);
      if (!(logit > -INFINITY)) token = kNoCandidate;
    }
    tokens[args.num_top + i] = token;
    logits[args.num_top + i] = logit;
  }
}

/* Adds the bias, writes the pairs and races them; every thread gets the winner. kVec as in
 * accumulate_dots. */
template <bool kVec, typename T, typename U>
__device__ __forceinline__ Indexed race_candidates(const WalkArgs<T, U>& args,
                                                   int64_t row,
                                                   const Runner& runner,
                                                   const int32_t* tokens,
                                                   const float* logits,
                                                   const float* latent,
                                                   Indexed* scratch) {
  constexpr int kChunk = kChunkSize<kVec>;
  const int32_t num_candidates = args.num_top + args.num_bigram;
  const int sub_lane = threadIdx.x % WalkPolicy::kLanesPerRow;
  Indexed best = empty_race();
  /* All lanes of a warp run the same number of rounds: the sums shuffle. */
  for (int32_t base = 0; base < num_candidates; base += WalkPolicy::kNumGroups) {
    const int32_t i = base + threadIdx.x / WalkPolicy::kLanesPerRow;
    const int32_t token = i < num_candidates ? tokens[i] : kNoCandidate;
    float sum = 0.f;
    if (token >= 0 && args.markov_w2 != nullptr) {
      const T* weights = args.markov_w2 + static_cast<int64_t>(token) * args.in.markov_rank;
#pragma unroll 4
      for (int32_t column = sub_lane * kChunk; column < args.in.markov_rank;
           column += WalkPolicy::kLanesPerRow * kChunk) {
        float weight[kChunk];
        float input[kChunk];
        load_chunk<kVec>(weights + column, weight);
        load_chunk<kVec>(latent + column, input);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) sum = fmaf(weight[j], input[j], sum);
      }
    }
    sum = warp_reduce<WalkPolicy::kLanesPerRow>(sum, SumOp{});
    if (sub_lane != 0 || i >= num_candidates) continue;
    const float l = token < 0 ? -INFINITY : logits[i] + sum;
    args.candidate_tokens[row * num_candidates + i] = token;
    args.candidate_logits[row * num_candidates + i] = l;
    if (token < 0) continue;
    float score = l;
    if (runner.temperature > 0.f) {
      const uint4 noise = philox_quad(runner.seed, static_cast<uint32_t>(token) / kQuad,
                                      runner.position, runner.purpose);
      const uint32_t words[kQuad] = {noise.x, noise.y, noise.z, noise.w};
      uint32_t word = words[0];
#pragma unroll
      for (int j = 1; j < kQuad; ++j) word = token % kQuad == j ? words[j] : word;
      const ZoneNoise zone =
          zone_noise(runner.seed, token / kZone, runner.position, runner.purpose);
      const float exponential = zone_exponential(zone, token % kZone, word);
      score = race_score_logit(l, runner.temperature, exponential);
    }
    race_step(best, score, token);
  }
  return cta_reduce<WalkPolicy::kNumThreads>(best, ArgmaxOp{}, empty_race(), scratch);
}

/* Grid: requests. Shared memory: latent f32 [markov_rank, rounded up to 8], candidate logits and
 * tokens. */
template <typename T, typename U, bool kVec>
__global__ void __launch_bounds__(WalkPolicy::kNumThreads) walk_kernel(WalkArgs<T, U> args) {
  extern __shared__ float4 shared_walk[];
  __shared__ Indexed scratch[WalkPolicy::kNumThreads / kWarpSize];
  const int32_t rank = args.in.markov_rank;
  const int32_t req = blockIdx.x;
  float* latent = reinterpret_cast<float*>(shared_walk);
  float* logits = latent + (rank + 7) / 8 * 8;
  auto* tokens = reinterpret_cast<int32_t*>(logits + args.num_top + args.num_bigram);
  const int64_t first_row = static_cast<int64_t>(req) * args.in.draft_len + args.first_step;
  if (args.markov_w2 != nullptr) prefetch_rows(args, first_row);

  int32_t previous = args.first_step == 0 && args.markov_w2 == nullptr
                         ? 0
                         : previous_token(args.in, req, args.first_step);
  for (int32_t i = 0; i < args.num_steps; ++i) {
    const bool known = previous >= 0 && previous < args.in.vocab_size;
    for (int32_t j = threadIdx.x; j < rank && args.markov_w2 != nullptr;
         j += WalkPolicy::kNumThreads) {
      if (args.latent != nullptr) {
        latent[j] = args.latent[static_cast<int64_t>(req) * rank + j];
      } else {
        latent[j] =
            known
                ? Element<T>::to_float(args.in.markov_w1[static_cast<int64_t>(previous) * rank + j])
                : 0.f;
      }
    }
    gather_candidates(args, first_row + i, previous, tokens, logits);
    __syncthreads();
    const Runner runner = {args.seeds[req], args.temperature[req], 0.f,
                           args.anchor_positions[req] + 1 + args.first_step + i,
                           draft_purpose(args.rules, req)};
    const Indexed best =
        race_candidates<kVec>(args, first_row + i, runner, tokens, logits, latent, scratch);
    previous = best.index == kNoRunner ? 0 : best.index;
    if (threadIdx.x == 0) args.draft_tokens[first_row + i] = previous;
    __syncthreads(); /* the shared arrays are free */
  }
}

}  // namespace dspark
