/*
 * The head over the whole vocabulary where only the winner counts (greedy and coupled rows): rows of
 * W2 that cannot win are not read. The drafts are those of full.cuh, bit for bit.
 *
 *   l_v <= U_v + largest_bias(v)   (skip_bound.cuh);   v is passed over when that cannot reach what
 *                                  somebody has reached already (coupled: with its noise)
 *
 * What has been reached comes from seeds: the largest base logits of 16 parts of the row, which a
 * first kernel finds in one pass, and whose logits every CTA computes at the start of a step; then from the
 * leaders so far (64-bit atomic maxima, race.cuh), looked at again before rows are read. A stale
 * bound costs time and changes nothing: which tokens are read decides no draft, a tie neither, since
 * a bound that equals the leader is not passed over.
 *
 * Mapping: one CTA per SM with its share of the vocabulary, spans of 64 tokens; a warp has a span for
 * some requests, a lane two tokens of it. Tokens that pass wait in a queue of the warp until there
 * are eight, whose products are one chain of mma (low_rank_logit.cuh). Between steps the exchange of
 * full.cuh.
 *
 * Per step: base logits twice (the second time from L2 as far as it goes), 16 bytes of bounds a
 * token, 2 r bytes for each token that passes.
 */
#pragma once

#include "kernels/draft/full_latents.cuh"
#include "kernels/draft/full_rows.cuh"
#include "kernels/draft/skip_bound.cuh"

namespace dspark {

struct SkipPolicy {
  static constexpr int kMaxReqs = 64;
  static constexpr int kNumWarps = 20;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kPairs = 8;  /* products at once */
  static constexpr int kQueue = kSpan + kPairs;
  static constexpr int kSeedThreads = 256;
};

template <typename T, typename W>
struct SkipArgs {
  FullArgs<T, W> full; /* shape: num_reqs, num_spans, spans_per_share, latent_row_bytes */
  const float4* bounds; /* [vocab_size] */
  const float* basis;
  const RaceKey* seeds; /* [num_reqs * draft_len, kSkipSeeds] */
  uint64_t* rows_read; /* [num_reqs] or nullptr */
  int32_t num_seeds;             /* looked at: 1, 2, 4, 8, 16 */
  bool paired_logits;            /* rows start at multiples of two elements */
};

/* ---- the first pass ---- */

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
  const int32_t stride = SkipPolicy::kSeedThreads * kChunk;
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

/* Grid: (kSkipSeeds, rows). */
__global__ void __launch_bounds__(SkipPolicy::kSeedThreads) seed_kernel(SeedArgs args) {
  constexpr int kWarps = SkipPolicy::kSeedThreads / kWarpSize;
  __shared__ Indexed bests[kWarps];
  const auto row = static_cast<int32_t>(blockIdx.y);
  const int32_t req = row / args.draft_len;
  const int32_t step = row % args.draft_len;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    args.keys[static_cast<int64_t>(step) * args.num_reqs + req] = kEmptyRaceKey;
    if (step == 0 && args.rows_read != nullptr) args.rows_read[req] = 0;
  }
  if (row == 0 && blockIdx.x == 0) {
    for (int32_t i = threadIdx.x; i < args.num_arrivals; i += SkipPolicy::kSeedThreads) {
      args.arrivals[i] = 0;
    }
  }
  if (args.draft_lens != nullptr && step >= args.draft_lens[req]) return;
  const int32_t part =
      (args.vocab_size + kSkipSeeds * 8 - 1) / (kSkipSeeds * 8) * 8;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * part;
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
    args.seeds[static_cast<int64_t>(row) * kSkipSeeds + blockIdx.x] = race_key(best);
  }
}

/* ---- the steps ---- */

/* A token whose row of W2 is wanted. */
struct SkipPair {
  int32_t q; /* -1: none */
  int32_t token;
  float base;
  float noise; /* coupled: E */
};

struct SkipState {
  SpanRunner runners[SkipPolicy::kMaxReqs];
  float4 latent_bounds[SkipPolicy::kMaxReqs];
  uint32_t reached[SkipPolicy::kMaxReqs]; /* score_order() */
  uint32_t rows_read[SkipPolicy::kMaxReqs];
  SkipPair queues[SkipPolicy::kNumWarps][SkipPolicy::kQueue];
};

template <typename T, typename W>
struct SkipCta {
  using Latent = typename LowRank<W>::Latent;
  const SkipArgs<T, W>& args;
  SkipState& state;
  unsigned char* latents; /* rows of latent_row_bytes */
  int32_t first_span;
  int32_t num_spans;

  __device__ __forceinline__ bool takes_part(int32_t q, int32_t step) const {
    return q < args.full.shape.num_reqs && step < state.runners[q].draft_len;
  }
  __device__ __forceinline__ int64_t row_of(int32_t q, int32_t step) const {
    return static_cast<int64_t>(args.full.first_req + q) * args.full.in.draft_len + step;
  }
  __device__ __forceinline__ RaceKey* key_of(int32_t q, int32_t step) const {
    return args.full.keys + static_cast<int64_t>(step) * args.full.in.num_reqs +
           args.full.first_req + q;
  }
  __device__ __forceinline__ const Latent* latent_of(int32_t q) const {
    return reinterpret_cast<const Latent*>(latents + q * args.full.shape.latent_row_bytes);
  }
  __device__ __forceinline__ float reached(int32_t q) const {
    return score_of_order(*const_cast<volatile uint32_t*>(state.reached + q));
  }

  /* Base logits of `token` and the next; -inf past the vocabulary. */
  __device__ __forceinline__ float2 base_pair(int32_t q, int32_t step, int32_t token) const {
    const FullArgs<T, W>& full = args.full;
    const int32_t left = full.in.vocab_size - token;
    const int64_t at = row_of(q, step) * full.stride_logits_row + token;
    if (left >= 2 && args.paired_logits) {
      if (full.f32_logits) {
        return *reinterpret_cast<const float2*>(static_cast<const float*>(full.logits) + at);
      }
      return Element<__nv_bfloat16>::unpack(*reinterpret_cast<const uint32_t*>(
          static_cast<const __nv_bfloat16*>(full.logits) + at));
    }
    const auto one = [&](int i) {
      if (left <= i) return -INFINITY;
      return full.f32_logits ? static_cast<const float*>(full.logits)[at + i]
                             : Element<__nv_bfloat16>::to_float(
                                   static_cast<const __nv_bfloat16*>(full.logits)[at + i]);
    };
    return make_float2(one(0), one(1));
  }

  /* Bits 0, 1: whether `token` and the next are allowed. */
  __device__ __forceinline__ uint32_t allowed_pair(int32_t q, int32_t step, int32_t token) const {
    const GrammarMask& mask = args.full.mask;
    if (mask.words == nullptr || token >= args.full.in.vocab_size) return 3u;
    const auto word =
        static_cast<uint32_t>(mask.words[row_of(q, step) * mask.words_per_row + token / 32]);
    return word >> token % 32 & 3u;
  }

  /* Scores of up to kPairs pairs, four lanes bring each and get it. */
  __device__ __forceinline__ float score_pairs(const SkipPair& pair) const {
    const FullArgs<T, W>& full = args.full;
    const bool some = pair.q >= 0;
    const int32_t rank = full.in.markov_rank;
    const W* row = some ? full.markov_w2 + static_cast<int64_t>(pair.token) * rank : nullptr;
    const Latent* latent = some ? latent_of(pair.q) : nullptr;
    const float scale = LowRank<W>::kScaled && some ? full.w2_scales[pair.token] : 1.f;
    const float dot = rank == FullPolicy::kMaxRank ? pair_dot<true>(row, latent, rank)
                                                   : pair_dot<false>(row, latent, rank);
    const float logit = low_rank_logit<W>(pair.base, dot, scale);
    const Runner& runner = state.runners[some ? pair.q : 0].runner;
    return runner.temperature > 0.f ? race_score_logit(logit, runner.temperature, pair.noise)
                                    : logit;
  }

  /* low_rank_pair_dot() with all of a row on its way at once. */
  template <bool kWhole>
  __device__ __forceinline__ float pair_dot(const W* row, const Latent* latent, int32_t rank) const {
    const int lane = threadIdx.x % kWarpSize;
    constexpr int kAtOnce = FullPolicy::kMaxSteps / 2;
    const bool none = row == nullptr;
    float dots[4] = {};
#pragma unroll 1
    for (int first = 0; first < FullPolicy::kMaxSteps; first += kAtOnce) {
      if (!kWhole && first * kLowRankStep >= rank) break;
      uint2 words[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool there = !none && (kWhole || (first + i) * kLowRankStep < rank);
        words[i] = there ? LowRank<W>::weight_words(row, first + i, lane) : make_uint2(0u, 0u);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (!kWhole && (first + i) * kLowRankStep >= rank) break;
        const uint2 b = none ? make_uint2(0u, 0u) : latent_words<W>(latent, first + i, lane);
        const uint32_t a[4] = {words[i].x, 0u, words[i].y, 0u};
        mma_m16n8k16<Latent>(dots, a, b.x, b.y);
      }
    }
    const int pair = lane / 4;
    const float even = __shfl_sync(kAllLanes, dots[0], pair * 4 + pair / 2);
    const float odd = __shfl_sync(kAllLanes, dots[1], pair * 4 + pair / 2);
    return pair % 2 == 0 ? even : odd;
  }

  /* The exact E of a token of a coupled row. */
  __device__ __forceinline__ float noise_of(int32_t q, int32_t step, int32_t token) const {
    Runner runner = state.runners[q].runner;
    runner.position += step;
    const ZoneNoise zone =
        zone_noise(runner.seed, token / kNoiseZone, runner.position, runner.purpose);
    return token_exponential(runner, zone, token);
  }
};

/* The step's latents into shared memory, with what bounds their products. */
template <typename T, typename W>
__device__ __forceinline__ void set_up_step(const SkipCta<T, W>& cta, int32_t step) {
  using Latent = typename LowRank<W>::Latent;
  const FullArgs<T, W>& full = cta.args.full;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = full.in.markov_rank;
  for (int32_t q = threadIdx.x / kWarpSize; q < full.shape.num_reqs; q += SkipPolicy::kNumWarps) {
    if (!cta.takes_part(q, step)) continue; /* whole warps */
    uint4 words = {};
    if (lane < rank / 8) {
      if (full.vanilla) {
        const T* row = led_markov_row(full, q, step);
        if (row != nullptr) words = __ldg(reinterpret_cast<const uint4*>(row) + lane);
        words = to_latents<Latent, T>(words);
      } else {
        words = __ldcg(
            reinterpret_cast<const uint4*>(full.latents + cta.row_of(q, step) * rank) + lane);
      }
      reinterpret_cast<uint4*>(cta.latents + q * full.shape.latent_row_bytes)[lane] = words;
      if (full.vanilla && q % gridDim.x == blockIdx.x) {
        reinterpret_cast<uint4*>(full.latents + cta.row_of(q, step) * rank)[lane] = words;
      }
    }
    float values[8];
    unpack_vec<Latent>(words, values);
    const float4 bound = bound_of(values, cta.args.basis, rank);
    if (lane == 0) {
      cta.state.latent_bounds[q] = bound;
      cta.state.reached[q] = score_order(-INFINITY);
    }
  }
}

/* Logits of the seeds: what is reached at least. */
template <typename T, typename W>
__device__ __forceinline__ void run_seeds(const SkipCta<T, W>& cta, int32_t step) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t num_seeds = cta.args.num_seeds;
  const int32_t count = cta.args.full.shape.num_reqs * num_seeds;
  for (int32_t i = threadIdx.x / kWarpSize * SkipPolicy::kPairs; i < count;
       i += SkipPolicy::kNumWarps * SkipPolicy::kPairs) {
    const int32_t q = (i + lane / 4) / num_seeds;
    SkipPair pair = {-1, 0, 0.f, 1.f};
    if (q < cta.args.full.shape.num_reqs && cta.takes_part(q, step)) {
      const RaceKey* seeds = cta.args.seeds + cta.row_of(q, step) * kSkipSeeds;
      RaceKey seed = kEmptyRaceKey;
      for (int j = (i + lane / 4) % num_seeds; j < kSkipSeeds; j += num_seeds) {
        seed = max(seed, __ldg(seeds + j));
      }
      if (seed != kEmptyRaceKey) {
        pair = {q, race_token(seed), race_score(seed), 1.f};
        if (cta.state.runners[q].runner.temperature > 0.f) {
          pair.noise = cta.noise_of(q, step, pair.token);
        }
      }
    }
    const float score = cta.score_pairs(pair);
    if (pair.q >= 0 && lane % 4 == 0 && score > -INFINITY) {
      atomicMax_block(&cta.state.reached[pair.q], score_order(score));
    }
  }
}

/* Rows of up to eight of the warp's queue; out of line: needs registers. */
template <typename T, typename W>
__device__ __forceinline__ void read_rows(const SkipCta<T, W>& cta,
                                       const SkipPair* queue,
                                       int32_t count,
                                       int32_t step) {
  const int lane = threadIdx.x % kWarpSize;
  SkipPair pair = {-1, 0, 0.f, 1.f};
  if (lane / 4 < count) pair = queue[lane / 4];
  const float score = cta.score_pairs(pair);
  if (pair.q < 0 || lane % 4 != 0) return;
  atomicAdd_block(&cta.state.rows_read[pair.q], 1u);
  Indexed best = empty_race();
  race_step(best, score, pair.token);
  if (best.index == kNoRunner || best.value < cta.reached(pair.q)) return;
  atomicMax_block(&cta.state.reached[pair.q], score_order(best.value));
  atomicMax(cta.key_of(pair.q, step), race_key(best));
}

/* A warp's requests of one span. */
template <typename T, typename W>
__device__ __forceinline__ void run_span(
    const SkipCta<T, W>& cta, int32_t step, int32_t span, int32_t begin_q, int32_t end_q) {
  const int lane = threadIdx.x % kWarpSize;
  SkipPair* queue = cta.state.queues[threadIdx.x / kWarpSize];
  const int32_t token = (cta.first_span + span) * kSpan + 2 * lane;
  const int32_t vocab = cta.args.full.in.vocab_size;
  const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
  const float4 rows[2] = {token < vocab ? __ldg(cta.args.bounds + token) : none,
                          token + 1 < vocab ? __ldg(cta.args.bounds + token + 1) : none};
  int32_t count = 0;
  const auto base_of = [&](int32_t q) {
    return q < end_q && cta.takes_part(q, step) ? cta.base_pair(q, step, token)
                                                : make_float2(-INFINITY, -INFINITY);
  };
  float2 base = base_of(begin_q);
  for (int32_t q = begin_q; q < end_q; ++q) {
    const float2 now = base;
    base = base_of(q + 1);
    const SpanRunner& runner = cta.state.runners[q];
    const float4 latent = cta.state.latent_bounds[q];
    const float bound = cta.reached(q);
    const float bases[2] = {now.x, now.y};
    const uint32_t allowed = cta.allowed_pair(q, step, token);
    float tops[2];
    bool wanted[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tops[i] = __fadd_rn(bases[i], largest_bias(rows[i], latent));
      wanted[i] = (allowed >> i & 1u) != 0 && !(bases[i] == -INFINITY);
    }
    float noise[2] = {1.f, 1.f};
    if (runner.mode == DrawMode::kCoupled) {
      const int32_t position = runner.runner.position + step;
      const float least = zone_least(runner.runner.seed, cta.first_span + span, position,
                                     runner.runner.purpose);
      const float screen = screen_bound(bound, runner.runner.temperature);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wanted[i] = wanted[i] && !(least > largest_exponential(tops[i], screen, runner.runner));
      }
      if (__any_sync(kAllLanes, wanted[0] || wanted[1])) {
        const ZoneNoise zone = {least,
                                zone_least_at(runner.runner.seed, cta.first_span + span, position,
                                              runner.runner.purpose)};
        Runner at = runner.runner;
        at.position = position;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!wanted[i]) continue;
          noise[i] = token_exponential(at, zone, token + i);
          wanted[i] = !(race_score_logit(tops[i], at.temperature, noise[i]) < bound);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) wanted[i] = wanted[i] && !(tops[i] < bound);
      if (runner.mode == DrawMode::kSampled) wanted[0] = wanted[1] = false;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t votes = __ballot_sync(kAllLanes, wanted[i]);
      if (wanted[i]) {
        queue[count + __popc(votes & ((1u << lane) - 1u))] = {q, token + i, bases[i], noise[i]};
      }
      count += __popc(votes);
    }
    __syncwarp();
    const bool is_last = q + 1 == end_q;
    while (count >= (is_last ? 1 : SkipPolicy::kPairs)) {
      const int32_t taken = min(count, SkipPolicy::kPairs);
      count -= taken;
      read_rows(cta, queue + count, taken, step);
      __syncwarp();
    }
  }
}

/* Grid: shares of the vocabulary, all resident. */
template <typename T, typename W>
__global__ void __launch_bounds__(SkipPolicy::kNumThreads, 1)
    skip_kernel(const __grid_constant__ SkipArgs<T, W> args) {
  extern __shared__ float4 shared_skip[];
  __shared__ SkipState state;
  const FullArgs<T, W>& full = args.full;
  SkipCta<T, W> cta = {args, state, reinterpret_cast<unsigned char*>(shared_skip)};
  cta.first_span = static_cast<int32_t>(blockIdx.x) * full.shape.spans_per_share;
  cta.num_spans = min(full.shape.spans_per_share, full.shape.num_spans - cta.first_span);
  set_up_runners(full, state.runners, SkipPolicy::kMaxReqs);
  for (int q = threadIdx.x; q < SkipPolicy::kMaxReqs; q += blockDim.x) state.rows_read[q] = 0;
  __syncthreads();

  const int32_t warp = threadIdx.x / kWarpSize;
  const int32_t num_parts = max(1, min(SkipPolicy::kNumWarps / cta.num_spans, full.shape.num_reqs));
  const int32_t part = (full.shape.num_reqs + num_parts - 1) / num_parts;
  for (int32_t step = full.first_step; step < full.first_step + full.num_steps; ++step) {
    if (!full.vanilla) {
      make_latents(full, state.runners, cta.latents, step, SkipPolicy::kNumWarps,
                   [] { __syncthreads(); });
    }
    set_up_step(cta, step);
    __syncthreads();
    run_seeds(cta, step);
    __syncthreads();
    for (int32_t i = warp; i < cta.num_spans * num_parts; i += SkipPolicy::kNumWarps) {
      const int32_t begin = i / cta.num_spans * part;
      run_span(cta, step, i % cta.num_spans, begin, min(begin + part, full.shape.num_reqs));
    }
    __syncthreads(); /* all leaders are pushed */
    if (threadIdx.x == 0) {
      signal_arrival(full.arrivals + step);
      wait_for_arrivals(full.arrivals + step, gridDim.x);
    }
    __syncthreads();
  }
  if (args.rows_read != nullptr) {
    for (int q = threadIdx.x; q < full.shape.num_reqs; q += blockDim.x) {
      atomicAdd(reinterpret_cast<unsigned long long*>(args.rows_read) + full.first_req + q,
                static_cast<unsigned long long>(state.rows_read[q]));
    }
  }
  finish_rows(full, state.runners, SkipPolicy::kNumWarps,
              [](int64_t) { return __int_as_float(0x7fffffff); });
}

}  // namespace dspark
