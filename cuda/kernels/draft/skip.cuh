/*
 * The head over the whole vocabulary where only the winner counts (greedy and coupled rows): rows of
 * W2 that cannot win are not read. The drafts are those of full.cuh, bit for bit.
 *
 *   l_v <= U_v + largest_bias(v)   (skip_bound.cuh);   v is passed over when that cannot reach what
 *                                  somebody has reached already (coupled: with its noise)
 *
 * What has been reached comes from seeds: the largest base logits of 16 parts of the row, which a
 * first kernel finds in one pass. Every CTA has their logits at the start of a step; their rows of W2 are
 * on the way while the step before ends. A looser bound costs time and changes nothing: which
 * tokens are read decides no draft, a tie neither, since a bound that equals what has been reached is
 * not passed over.
 *
 * Mapping: one CTA per SM with every grid-th span of 64 tokens: what many requests want are
 * neighbours (frequent tokens have low numbers). A warp screens a span for 8 requests, a lane two of
 * its tokens; what one of the 8 may draw goes to a list of the CTA, from which warps take 16 rows at
 * a time: one product m16n8k16 chain (low_rank_logit.cuh) for all 8 requests. Between steps the
 * exchange of full.cuh.
 *
 * Per step: base logits (a second time, from L2 as far as it goes), 16 bytes of bounds a token, 2 r bytes
 * for each row that passes. On an H100 with the demo pair's rounds, its W1 and W2 repeated to V 151,936 and
 * r 256 (0.1 to 8 % of (token, request) pairs pass; the union of 8 requests decides): greedy 67 / 148 /
 * 247 / 517 us at 1 / 8 / 16 / 32 requests against full's 183 / 191 / 210 / 274, coupled 79 / 179 / 300 / 673
 * against 190 / 236 / 456 / 684. As it is (V 49,152, r 64: W2 stays on chip) 53 / 81 against 49 / 53.
 * One request is limited by latency (9 us a step), many by the rows that they want between them.
 *
 * Dropped: whole tiles of 64 tokens (64 % of the demo pair's would be read against 2 % of the tokens); shares of
 * consecutive spans with a list for each warp (348 / 697 / 1411 us at 8 / 16 / 32 requests: the CTA of
 * the lowest tokens has most of the work).
 */
#pragma once

#include "common/async_copy.cuh"
#include "kernels/draft/full_latents.cuh"
#include "kernels/draft/skip_seeds.cuh"

namespace dspark {

struct SkipPolicy {
  static constexpr int kMaxReqs = 32;
  static constexpr int kMaxGroups = kMaxReqs / kGroupReqs;
  static constexpr int kNumWarps = 20;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kRows = 16; /* of W2 in a product, for a group of 8 requests */
  static constexpr int kPairs = 8; /* of a seed and a latent, in one of seeds */
  static constexpr int kMaxPairs = kNumWarps * kPairs;
};

template <typename T, typename W>
struct SkipArgs {
  FullArgs<T, W> full;  /* shape: num_reqs, num_spans, spans_per_share, latent_row_bytes */
  const float4* bounds; /* [vocab_size] */
  const float* basis;
  const RaceKey* seeds; /* [num_reqs * draft_len, kSkipSeeds] */
  uint64_t* rows_read;  /* [num_reqs] or nullptr */
  int32_t num_seeds;    /* looked at: 1, 2, 4, 8, 16 */
  bool paired_logits;   /* rows start at multiples of two elements */
};

/* A token whose row of W2 is wanted: bit i, by request i of the group. */
struct SkipEntry {
  int32_t token;
  uint32_t requests;
};

struct SkipState {
  SpanRunner runners[SkipPolicy::kMaxReqs];
  float4 latent_bounds[SkipPolicy::kMaxReqs];
  uint32_t reached[SkipPolicy::kMaxReqs]; /* score_order() */
  uint32_t rows_read[SkipPolicy::kMaxReqs];
  int32_t counts[SkipPolicy::kMaxGroups]; /* of entries */
};

/* Room for the entries of a group: every token of a share. */
__host__ __device__ constexpr int32_t skip_entries(const FullShape& shape) {
  return shape.spans_per_share * kSpan;
}

/* Latents, then rows of W2 for each warp, then entries. */
__host__ __device__ constexpr int32_t skip_rows_at(const FullShape& shape) {
  return shape.num_reqs * shape.latent_row_bytes;
}
__host__ __device__ constexpr int32_t skip_entries_at(const FullShape& shape) {
  return skip_rows_at(shape) + SkipPolicy::kNumWarps * SkipPolicy::kRows * shape.weight_row_bytes;
}
__host__ __device__ constexpr size_t skip_shared_bytes(const FullShape& shape) {
  const int32_t num_groups = (shape.num_reqs + kGroupReqs - 1) / kGroupReqs;
  return static_cast<size_t>(skip_entries_at(shape)) +
         static_cast<size_t>(num_groups) * skip_entries(shape) * sizeof(SkipEntry);
}

template <typename T, typename W>
struct SkipCta {
  using Latent = typename LowRank<W>::Latent;
  const SkipArgs<T, W>& args;
  SkipState& state;
  unsigned char* latents; /* rows of latent_row_bytes */
  unsigned char* rows;    /* the warp's: kRows of weight_row_bytes */
  SkipEntry* entries;     /* [groups, skip_entries()] */
  int32_t num_spans;      /* of the share */

  __device__ __forceinline__ int32_t span_at(int32_t i) const {
    return static_cast<int32_t>(blockIdx.x) + i * static_cast<int32_t>(gridDim.x);
  }

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
      return Element<__nv_bfloat16>::unpack(
          *reinterpret_cast<const uint32_t*>(static_cast<const __nv_bfloat16*>(full.logits) + at));
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

  /* Base logit of one token; the token is allowed. */
  __device__ __forceinline__ float base_of(int32_t q, int32_t step, int32_t token) const {
    const int64_t at = row_of(q, step) * args.full.stride_logits_row + token;
    return args.full.f32_logits ? static_cast<const float*>(args.full.logits)[at]
                                : Element<__nv_bfloat16>::to_float(
                                      static_cast<const __nv_bfloat16*>(args.full.logits)[at]);
  }

  /* The score of a token, given the product of its row; the request takes part. */
  __device__ __forceinline__ float score_of(
      int32_t q, int32_t step, int32_t token, float base, float dot) const {
    const float scale = LowRank<W>::kScaled ? args.full.w2_scales[token] : 1.f;
    const float logit = low_rank_logit<W>(base, dot, scale);
    const float temperature = state.runners[q].runner.temperature;
    if (!(temperature > 0.f)) return logit;
    return race_score_logit(logit, temperature, noise_of(q, step, token));
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

/* Asks for row i of the warp's place, for all i below `count`: W2's of the token that lane i brings. */
template <typename T, typename W>
__device__ __forceinline__ void fetch_rows(const SkipCta<T, W>& cta, int32_t token, int32_t count) {
  const FullArgs<T, W>& full = cta.args.full;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t row_bytes = full.in.markov_rank * static_cast<int32_t>(sizeof(W));
  const int32_t pieces = row_bytes / 16;
  const auto* weights = reinterpret_cast<const unsigned char*>(full.markov_w2);
  const uint32_t to = shared_address(cta.rows);
  for (int32_t first = 0; first < count * pieces; first += kWarpSize) {
    const int32_t i = first + lane;
    const int32_t row = min(i / pieces, count - 1);
    const int32_t of_row = __shfl_sync(kAllLanes, token, row);
    if (i >= count * pieces) continue;
    const int32_t at = i % pieces * 16;
    copy_async_16(to + row * full.shape.weight_row_bytes + at,
                  weights + static_cast<int64_t>(of_row) * row_bytes + at, true);
  }
  copy_async_commit();
}

/* Waits for what the warp asked for. */
__device__ __forceinline__ void wait_for_rows() {
  copy_async_wait<0>();
  __syncwarp();
}

/* The step's latents into shared memory, with what bounds their products. */
template <typename T, typename W>
__device__ __forceinline__ void set_up_step(const SkipCta<T, W>& cta, int32_t step) {
  using Latent = typename LowRank<W>::Latent;
  const FullArgs<T, W>& full = cta.args.full;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = full.in.markov_rank;
  if (threadIdx.x < SkipPolicy::kMaxGroups) cta.state.counts[threadIdx.x] = 0;
  for (int32_t q = threadIdx.x / kWarpSize; q < full.shape.num_reqs; q += SkipPolicy::kNumWarps) {
    if (!cta.takes_part(q, step)) continue; /* whole warps */
    uint4 words = {};
    if (lane < rank / 8) {
      if (full.vanilla) {
        const T* row = led_markov_row(full, q, step);
        if (row != nullptr) words = __ldg(reinterpret_cast<const uint4*>(row) + lane);
        words = to_latents<Latent, T>(words);
      } else {
        words = __ldcg(reinterpret_cast<const uint4*>(full.latents + cta.row_of(q, step) * rank) +
                       lane);
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

/* A seed and whose it is: pair lane % kPairs of the warp's. */
struct SkipSeed {
  int32_t q; /* -1: none */
  int32_t token;
  float base;
};

/* The warp's seeds of a step; asks for their rows. All warps together have room for all. */
template <typename T, typename W>
__device__ __forceinline__ SkipSeed fetch_seeds(const SkipCta<T, W>& cta, int32_t step) {
  const int32_t num_seeds = cta.args.num_seeds;
  const int32_t i = static_cast<int32_t>(SkipPolicy::kNumWarps - 1 - threadIdx.x / kWarpSize) *
                        SkipPolicy::kPairs +
                    static_cast<int32_t>(threadIdx.x) % SkipPolicy::kPairs;
  const int32_t q = i / num_seeds;
  RaceKey seed = kEmptyRaceKey;
  if (cta.takes_part(q, step)) {
    const RaceKey* seeds = cta.args.seeds + cta.row_of(q, step) * kSkipSeeds;
    for (int j = i % num_seeds; j < kSkipSeeds; j += num_seeds) seed = max(seed, __ldg(seeds + j));
  }
  const bool some = seed != kEmptyRaceKey;
  const SkipSeed found = {some ? q : -1, race_token(seed), race_score(seed)};
  if (__any_sync(kAllLanes, some)) fetch_rows(cta, found.token, SkipPolicy::kPairs);
  return found;
}

/* Scores of the warp's seeds: what is reached at least. */
template <typename T, typename W>
__device__ __forceinline__ void run_seeds(const SkipCta<T, W>& cta,
                                          int32_t step,
                                          const SkipSeed& seed) {
  const int lane = threadIdx.x % kWarpSize;
  if (!__any_sync(kAllLanes, seed.q >= 0)) return;
  wait_for_rows();
  const int pair = lane / 4;
  const int32_t q = __shfl_sync(kAllLanes, seed.q, pair);
  const int32_t token = __shfl_sync(kAllLanes, seed.token, pair);
  const float base = __shfl_sync(kAllLanes, seed.base, pair);
  const auto* row =
      reinterpret_cast<const W*>(cta.rows + pair * cta.args.full.shape.weight_row_bytes);
  const float dot =
      low_rank_pair_dot<W>(row, q < 0 ? nullptr : cta.latent_of(q), cta.args.full.in.markov_rank);
  __syncwarp(); /* the place is free again */
  if (q < 0 || lane % 4 != 0) return;
  const float score = cta.score_of(q, step, token, base, dot);
  if (score > -INFINITY) atomicMax_block(&cta.state.reached[q], score_order(score));
}

/* Which of `token` and the next (bits 0, 1) may win for request q; `base`: their base logits, `zone`:
 * a coupled request's noise there. */
template <typename T, typename W>
__device__ __forceinline__ uint32_t may_win(const SkipCta<T, W>& cta,
                                            int32_t q,
                                            int32_t step,
                                            int32_t token,
                                            float2 base,
                                            const ZoneNoise& zone,
                                            const float4 (&rows)[2]) {
  const SpanRunner& runner = cta.state.runners[q];
  if (runner.mode == DrawMode::kSampled) return 0;
  const float4 latent = cta.state.latent_bounds[q];
  const float bound = cta.reached(q);
  const float bases[2] = {base.x, base.y};
  const uint32_t allowed = cta.allowed_pair(q, step, token);
  float tops[2];
  bool wanted[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    tops[i] = __fadd_rn(bases[i], largest_bias(rows[i], latent));
    wanted[i] = (allowed >> i & 1u) != 0 && !(bases[i] == -INFINITY);
  }
  if (runner.mode == DrawMode::kGreedy) {
    return (wanted[0] && !(tops[0] < bound) ? 1u : 0u) |
           (wanted[1] && !(tops[1] < bound) ? 2u : 0u);
  }
  Runner at = runner.runner;
  at.position += step;
  const float screen = screen_bound(bound, at.temperature);
  uint32_t winners = 0;
  float largest[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    largest[i] = largest_exponential(tops[i], screen, at);
    if (wanted[i] && !(zone.least > largest[i])) winners |= 1u << i;
  }
  if (winners == 0) return 0;
  const uint4 words =
      philox_quad(at.seed, static_cast<uint32_t>(token) / kQuad, at.position, at.purpose);
  const bool upper = token % kQuad != 0; /* tokens are even */
  const uint32_t own[2] = {upper ? words.z : words.x, upper ? words.w : words.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (is_beaten(zone, token % kNoiseZone + i, own[i], largest[i])) winners &= ~(1u << i);
  }
  return winners;
}

/* Tokens of a span that may win for some request of a group, into the group's entries. */
template <typename T, typename W>
__device__ __forceinline__ void screen_span(const SkipCta<T, W>& cta,
                                            int32_t step,
                                            int32_t span,
                                            int32_t group) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t token = span * kSpan + 2 * lane;
  const int32_t vocab = cta.args.full.in.vocab_size;
  const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
  const float4 rows[2] = {token < vocab ? __ldg(cta.args.bounds + token) : none,
                          token + 1 < vocab ? __ldg(cta.args.bounds + token + 1) : none};
  float2 bases[kGroupReqs];
#pragma unroll
  for (int i = 0; i < kGroupReqs; ++i) {
    const int32_t q = group * kGroupReqs + i;
    bases[i] =
        cta.takes_part(q, step) ? cta.base_pair(q, step, token) : make_float2(-INFINITY, -INFINITY);
  }
  /* Lane i: of request i of the group. */
  const int32_t own_q = group * kGroupReqs + lane % kGroupReqs;
  ZoneNoise own_zone = {0.f, 0};
  if (cta.takes_part(own_q, step) && cta.state.runners[own_q].mode == DrawMode::kCoupled) {
    const Runner& runner = cta.state.runners[own_q].runner;
    own_zone = zone_noise(runner.seed, span, runner.position + step, runner.purpose);
  }
  uint32_t wanted[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kGroupReqs; ++i) {
    const int32_t q = group * kGroupReqs + i;
    if (!cta.takes_part(q, step)) continue; /* whole warps */
    const ZoneNoise zone = {__shfl_sync(kAllLanes, own_zone.least, i),
                            __shfl_sync(kAllLanes, own_zone.least_at, i)};
    const uint32_t winners = may_win(cta, q, step, token, bases[i], zone, rows);
    wanted[0] |= (winners & 1u) << i;
    wanted[1] |= (winners >> 1) << i;
  }
  const uint32_t votes[2] = {__ballot_sync(kAllLanes, wanted[0] != 0),
                             __ballot_sync(kAllLanes, wanted[1] != 0)};
  const int32_t counts[2] = {__popc(votes[0]), __popc(votes[1])};
  if (counts[0] + counts[1] == 0) return;
  int32_t first = 0;
  if (lane == 0) first = atomicAdd_block(&cta.state.counts[group], counts[0] + counts[1]);
  first = __shfl_sync(kAllLanes, first, 0);
  SkipEntry* entries = cta.entries + group * skip_entries(cta.args.full.shape) + first;
  const uint32_t below = (1u << lane) - 1u;
  if (wanted[0] != 0) entries[__popc(votes[0] & below)] = {token, wanted[0]};
  if (wanted[1] != 0) entries[counts[0] + __popc(votes[1] & below)] = {token + 1, wanted[1]};
}

/* Scores of up to kRows entries of a group for all its requests. */
template <typename T, typename W>
__device__ __forceinline__ void read_rows(const SkipCta<T, W>& cta,
                                          int32_t step,
                                          int32_t group,
                                          const SkipEntry* entries,
                                          int32_t count) {
  using Latent = typename LowRank<W>::Latent;
  const FullArgs<T, W>& full = cta.args.full;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = full.in.markov_rank;
  const SkipEntry none = {0, 0};
  const SkipEntry own[2] = {lane / 4 < count ? entries[lane / 4] : none,
                            lane / 4 + 8 < count ? entries[lane / 4 + 8] : none};
  fetch_rows(cta, lane < count ? entries[lane].token : 0, count);
  float bases[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t of_group = lane % 4 * 2 + i;
      const bool wanted = (own[half].requests >> of_group & 1u) != 0;
      bases[half][i] =
          wanted ? cta.base_of(group * kGroupReqs + of_group, step, own[half].token) : 0.f;
    }
  }
  const int32_t latent_q = group * kGroupReqs + lane / 4;
  const Latent* latent = cta.takes_part(latent_q, step) ? cta.latent_of(latent_q) : nullptr;
  float dots[4];
  wait_for_rows();
  const auto row_of = [&](int half) {
    const int row = lane / 4 + 8 * half;
    return row < count ? reinterpret_cast<const W*>(cta.rows + row * full.shape.weight_row_bytes)
                       : nullptr;
  };
  low_rank_dots<W>(row_of(0), row_of(1), latent, rank, dots);
  __syncwarp(); /* the place is free again */
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t of_group = lane % 4 * 2 + i;
      if ((own[half].requests >> of_group & 1u) == 0) continue;
      const int32_t q = group * kGroupReqs + of_group;
      const int32_t token = own[half].token;
      atomicAdd_block(&cta.state.rows_read[q], 1u);
      Indexed best = empty_race();
      race_step(best, cta.score_of(q, step, token, bases[half][i], dots[half * 2 + i]), token);
      if (best.index == kNoRunner || best.value < cta.reached(q)) continue;
      atomicMax_block(&cta.state.reached[q], score_order(best.value));
      atomicMax(cta.key_of(q, step), race_key(best));
    }
  }
}

/* All entries, kRows at a time. */
template <typename T, typename W>
__device__ __forceinline__ void read_entries(const SkipCta<T, W>& cta,
                                             int32_t step,
                                             int32_t num_groups) {
  int32_t turn = threadIdx.x / kWarpSize;
  for (int32_t group = 0; group < num_groups; ++group) {
    const int32_t count = cta.state.counts[group];
    const SkipEntry* entries = cta.entries + group * skip_entries(cta.args.full.shape);
    const int32_t turns = (count + SkipPolicy::kRows - 1) / SkipPolicy::kRows;
    for (; turn < turns; turn += SkipPolicy::kNumWarps) {
      const int32_t first = turn * SkipPolicy::kRows;
      read_rows(cta, step, group, entries + first, min(count - first, SkipPolicy::kRows));
    }
    turn -= turns;
  }
}

/* Grid: shares of the vocabulary, all resident. */
template <typename T, typename W>
__global__ void __launch_bounds__(SkipPolicy::kNumThreads, 1)
    skip_kernel(const __grid_constant__ SkipArgs<T, W> args) {
  extern __shared__ float4 shared_skip[];
  __shared__ SkipState state;
  const FullArgs<T, W>& full = args.full;
  auto* latents = reinterpret_cast<unsigned char*>(shared_skip);
  const int32_t warp = threadIdx.x / kWarpSize;
  SkipCta<T, W> cta = {
      args, state, latents,
      latents + skip_rows_at(full.shape) + warp * SkipPolicy::kRows * full.shape.weight_row_bytes,
      reinterpret_cast<SkipEntry*>(latents + skip_entries_at(full.shape))};
  cta.num_spans = (full.shape.num_spans - static_cast<int32_t>(blockIdx.x) +
                   static_cast<int32_t>(gridDim.x) - 1) /
                  static_cast<int32_t>(gridDim.x);
  set_up_runners(full, state.runners, SkipPolicy::kMaxReqs);
  for (int q = threadIdx.x; q < SkipPolicy::kMaxReqs; q += blockDim.x) state.rows_read[q] = 0;
  __syncthreads();

  const int32_t num_groups = (full.shape.num_reqs + kGroupReqs - 1) / kGroupReqs;
  SkipSeed seed = fetch_seeds(cta, full.first_step);
  for (int32_t step = full.first_step; step < full.first_step + full.num_steps; ++step) {
    if (!full.vanilla) {
      make_latents<2>(full, state.runners, cta.latents, step, SkipPolicy::kNumWarps,
                      [] { __syncthreads(); });
    }
    set_up_step(cta, step);
    __syncthreads();
    run_seeds(cta, step, seed);
    __syncthreads();
    for (int32_t i = warp; i < cta.num_spans * num_groups; i += SkipPolicy::kNumWarps) {
      screen_span(cta, step, cta.span_at(i % cta.num_spans), i / cta.num_spans);
    }
    __syncthreads();
    read_entries(cta, step, num_groups);
    if (step + 1 < full.first_step + full.num_steps) seed = fetch_seeds(cta, step + 1);
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
