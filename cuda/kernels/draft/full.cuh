/*
 * The draft head over the whole vocabulary, all steps in one launch, base logits only read.
 *
 *   l_k(v) = U_k(v) + W2[v] . latent;   x_k ~ softmax(l_k / T);   ln sum exp(l_k / T) handed on
 *
 * Mapping: one CTA of 16 or 20 warps per SM, each with its own share of the vocabulary: consecutive spans
 * of 64 tokens (span.cuh), the same at every step and in every batch. The last spans of a share
 * stay *resident* in shared memory, as many as fit; the others stream through a ring, forwards on
 * even steps and backwards on odd ones, so that the end of one pass is found in L2 by the next. The
 * ring knows nothing of steps: while a step's winner travels, the next step's rows are on their
 * way. A warp takes a span for up to 32 requests (W2 is A, their latents B); with more requests the
 * warps form 2 or 4 sets, and whoever is last to finish a span refills its place. There is no barrier of
 * the CTA within a step.
 *
 * Between steps: leaders are 64-bit atomic maxima (race.cuh), which also screen later spans; then a
 * count of arrivals that all CTAs wait for, which needs a cooperative launch. With up to 8 requests and
 * fp8 W2 each CTA leaves its leader in its own place on a board instead, one word that is a message by itself:
 * who needs the winner reads all places until they are filled. The normaliser is
 * summed in the order of spans within a share and of shares over the row, in f64 there, once at the
 * end, together with the confidences.
 *
 * Per step: W2 once for 128 requests (2 or 1 bytes a weight; what is resident or still in L2 does
 * not come from memory), 2 or 4 bytes of base logits per token and request. bf16 W2 with few
 * requests is limited by that traffic; fp8 W2 by the latency of a span in its warp and of the
 * exchange (3 of 14 us a step); many requests by latency, with 2 spans of W2 in the ring: on sm_90
 * full_wide.cuh takes more than 8 requests, with fp8 W2 more than 16.
 *
 * Dropped: tiles of 16 requests as A and tokens as B with logits written back (8 bytes of traffic a
 * logit); one exponential per token (20 instructions for each element); latents in registers, which
 * leaves room for 8 warps (708 us for 128 requests against 470); a board for 16 and 32 requests, which then
 * know nothing of the others' leaders within a step (218 us against 207, 296 against 271).
 */
#pragma once

#include "kernels/draft/full_latents.cuh"
#include "kernels/draft/full_rows.cuh"

namespace dspark {

/* Base logits of a span that came by way of shared memory; `slot`: of the warp's first request.
 * Rows of requests that take no part hold anything. */
template <int kNTiles, typename U>
__device__ __forceinline__ void add_staged(const unsigned char* slot, SpanTile<kNTiles>& tile) {
  constexpr int kRowBytes = kSpan * static_cast<int>(sizeof(U)) + FullPolicy::kPadBytes;
  const int lane = threadIdx.x % kWarpSize;
  const unsigned char* lane_row =
      slot + lane % 4 * 2 * kRowBytes + lane / 4 * kLaneTokens * static_cast<int>(sizeof(U));
#pragma unroll
  for (int j = 0; j < 2 * kNTiles; ++j) {
    const auto* from =
        reinterpret_cast<const U*>(lane_row + (j / 2 * kGroupReqs + j % 2) * kRowBytes);
    float base[kLaneTokens];
    if constexpr (sizeof(U) == 4) {
      load_vec(from, *reinterpret_cast<float (*)[4]>(&base[0]));
      load_vec(from + 4, *reinterpret_cast<float (*)[4]>(&base[4]));
    } else {
      load_vec(from, base);
    }
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      float& l = span_element<kNTiles>(tile, j / 2, j % 2, i);
      l = __fadd_rn(base[i], l);
    }
  }
}

/* The same from memory, element by element; tokens past the vocabulary get -inf. `left`: tokens from
 * the lane's first to the row's end. */
template <int kNTiles, typename U, typename T, typename W>
__device__ __forceinline__ void add_direct(const FullCta<T, W>& cta,
                                           int32_t first_q,
                                           int32_t step,
                                           int32_t token,
                                           SpanTile<kNTiles>& tile) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t left = cta.args.in.vocab_size - token;
#pragma unroll
  for (int j = 0; j < 2 * kNTiles; ++j) {
    const int32_t q = first_q + j / 2 * kGroupReqs + lane % 4 * 2 + j % 2;
    const bool active = cta.takes_part(q, step);
    const U* row = reinterpret_cast<const U*>(cta.logit_row(active ? q : 0, step)) + token;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      float& l = span_element<kNTiles>(tile, j / 2, j % 2, i);
      l = active && i < left ? __fadd_rn(Element<U>::to_float(row[i]), l) : -INFINITY;
    }
  }
}

/* -inf for tokens that the grammar forbids. */
template <int kNTiles, typename T, typename W>
__device__ __forceinline__ void forbid_tokens(const FullCta<T, W>& cta,
                                              int32_t first_q,
                                              int32_t step,
                                              int32_t token,
                                              SpanTile<kNTiles>& tile) {
  const GrammarMask& mask = cta.args.mask;
  const int lane = threadIdx.x % kWarpSize;
  if (token >= cta.args.in.vocab_size) return;
#pragma unroll
  for (int j = 0; j < 2 * kNTiles; ++j) {
    const int32_t q = first_q + j / 2 * kGroupReqs + lane % 4 * 2 + j % 2;
    if (!cta.takes_part(q, step)) continue;
    const int64_t row = static_cast<int64_t>(cta.args.first_req + q) * cta.args.in.draft_len + step;
    const uint32_t allowed =
        static_cast<uint32_t>(mask.words[row * mask.words_per_row + token / 32]) >> token % 32;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      if ((allowed >> i & 1u) == 0) span_element<kNTiles>(tile, j / 2, j % 2, i) = -INFINITY;
    }
  }
}

/* One group of requests and fp8 W2: latency is what limits. Noise of a warp's first span at a step is made
 * while leaders travel, and these travel by a board. (16-bit W2 gains 2 % and has no registers for it.) */
template <int kNTiles, typename W>
constexpr bool kHurries = kNTiles == 1 && LowRank<W>::kScaled;

/* Whether leaders of a launch are left on a board. */
template <int kNTiles, typename T, typename W>
__device__ __forceinline__ bool has_board(const FullArgs<T, W>& args) {
  return kHurries<kNTiles, W> && args.board != nullptr;
}

/* Scales of a lane's tokens. */
using LaneScales = float[kLaneTokens];

template <typename T, typename W>
__device__ __forceinline__ void read_scales(const FullCta<T, W>& cta,
                                            int32_t span,
                                            LaneScales& scales) {
  const FullArgs<T, W>& args = cta.args;
  const int32_t token = (cta.first_span + span) * kSpan +
                        static_cast<int32_t>(threadIdx.x) % kWarpSize / 4 * kLaneTokens;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const bool read = args.markov_w2 != nullptr && token + i < args.in.vocab_size;
    scales[i] = read ? __ldg(args.w2_scales + token + i) : 0.f;
  }
}

/* Products become logits. `slot`: base logits in shared memory, from the warp's first request on, or
 * nullptr. */
template <int kNTiles, typename T, typename W>
__device__ __forceinline__ void add_base(const FullCta<T, W>& cta,
                                         const unsigned char* slot,
                                         int32_t first_q,
                                         int32_t step,
                                         int32_t span,
                                         const LaneScales& scales,
                                         SpanTile<kNTiles>& tile) {
  const FullArgs<T, W>& args = cta.args;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t token = (cta.first_span + span) * kSpan + lane / 4 * kLaneTokens;
  if (LowRank<W>::kScaled && args.markov_w2 != nullptr) {
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kNTiles; ++j) {
        float& dot = span_element<kNTiles>(tile, j / 2, j % 2, i);
        dot = low_rank_bias<W>(dot, scales[i]);
      }
    }
  }
  if (slot != nullptr) {
    if (args.f32_logits) {
      add_staged<kNTiles, float>(slot, tile);
    } else {
      add_staged<kNTiles, __nv_bfloat16>(slot, tile);
    }
  } else if (args.f32_logits) {
    add_direct<kNTiles, float>(cta, first_q, step, token, tile);
  } else {
    add_direct<kNTiles, __nv_bfloat16>(cta, first_q, step, token, tile);
  }
  if (args.mask.words != nullptr) forbid_tokens<kNTiles>(cta, first_q, step, token, tile);
}

/* One span for this warp. */
template <int kNTiles, typename T, typename W>
__device__ __forceinline__ void run_span(FullCta<T, W>& cta,
                                         SpanOwner& owner,
                                         const SpanNoise& made, /* kHurries: its noise */
                                         int32_t step,
                                         int32_t i, /* of the step */
                                         int32_t first_q) {
  const FullArgs<T, W>& args = cta.args;
  const FullShape& shape = args.shape;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t steps_done = step - args.first_step;
  const int32_t span = cta.span_at(step, i);
  const int32_t span_bytes = kSpan * shape.weight_row_bytes;
  RaceKey* keys =
      args.keys + static_cast<int64_t>(step) * args.in.num_reqs + args.first_req + first_q;
  /* With registers to spare: noise while the span is on its way. */
  constexpr bool kEarly = kNTiles == 1;
  SpanNoise noise;
  if (kHurries<kNTiles, W>) {
    noise = made;
  } else if (kEarly) {
    noise = span_noise(owner, step, cta.first_span + span);
  }
  LaneScales scales;
  if constexpr (kHurries<kNTiles, W>) read_scales(cta, span, scales);

  SpanTile<kNTiles> tile;
  const bool streams = i < cta.num_stream;
  const int32_t weight_fill = steps_done * cta.num_stream + i;
  const int32_t weight_slot = weight_fill % max(shape.weight_slots, 1);
  if (args.markov_w2 != nullptr) {
    if (streams) {
      wait_for_fill(cta.state.weights + weight_slot, weight_fill / shape.weight_slots);
    } else {
      wait_for_fill(&cta.state.resident, 0);
    }
    const uint32_t rows = streams ? cta.shared.weights + weight_slot * span_bytes
                                  : cta.shared.resident + (span - cta.num_stream) * span_bytes;
    multiply_span<kNTiles, W>(rows,
                              shared_address(cta.shared.latents) + first_q * shape.latent_row_bytes,
                              args.in.markov_rank, shape.weight_row_bytes, tile);
    if (streams) {
      cta.release(cta.state.weights + weight_slot, [&] {
        cta.fill_weight_slot(weight_slot, weight_fill / shape.weight_slots + 1, step,
                             i + shape.weight_slots);
      });
    }
  } else {
    multiply_span<kNTiles, W>(0, 0, 0, 0, tile);
  }

  const int32_t logit_fill = steps_done * cta.num_spans + i;
  const int32_t logit_slot = logit_fill % shape.logit_slots;
  wait_for_fill(cta.state.logits + logit_slot, logit_fill / shape.logit_slots);
  const uint32_t slot =
      cta.shared.logits + (logit_slot * shape.padded_reqs + first_q) * shape.logit_row_bytes;
  if constexpr (LowRank<W>::kScaled && !kHurries<kNTiles, W>) read_scales(cta, span, scales);
  add_base<kNTiles>(cta,
                    cta.staged(span) ? cta.shared.base + (slot - cta.shared.resident) : nullptr,
                    first_q, step, span, scales, tile);
  const auto refill_logits = [&] {
    cta.release(cta.state.logits + logit_slot, [&] {
      cta.fill_logit_slot(logit_slot, logit_fill / shape.logit_slots + 1, step,
                          i + shape.logit_slots);
    });
  };
  if (kNTiles > 1) refill_logits();

  /* Asked for now, used after the weights. */
  const RaceKey latest = owner.runner == nullptr || has_board<kNTiles>(args)
                             ? kEmptyRaceKey
                             : __ldcg(keys + owned_request(lane));
  const SpanRunner* runners = cta.state.runners + first_q;
  weigh_span<kNTiles>(tile, runners, owner);
  if (!kEarly) noise = span_noise(owner, step, cta.first_span + span);
  owner.seen = max(owner.seen, latest);
  if (owner.runner != nullptr) {
    cta.shared.spans[span * shape.padded_reqs + first_q + owned_request(lane)] = owner.weight;
  }
  race_span<kNTiles>(tile, runners, owner, noise, step, cta.first_span + span, keys,
                     !has_board<kNTiles>(args));
  if (kNTiles == 1) refill_logits(); /* a ring for nearly all spans: no hurry */
}

/* Adds weights, the empty ones aside. */
__device__ __forceinline__ SpanWeight larger_top(SpanWeight a, SpanWeight b) {
  if (b.sum == 0.f) return a;
  return {a.sum == 0.f ? b.scaled_top : fmaxf(a.scaled_top, b.scaled_top), a.sum + b.sum};
}

/* The weights of this CTA's share at a step, spans in order; `thread`: this one's number. */
template <typename T, typename W>
__device__ __forceinline__ void publish_share(const FullCta<T, W>& cta,
                                              int32_t step,
                                              int32_t thread) {
  const FullArgs<T, W>& args = cta.args;
  for (int32_t q = thread; q < args.shape.num_reqs; q += blockDim.x) {
    if (!cta.takes_part(q, step)) continue;
    const SpanWeight* spans = cta.shared.spans + q;
    SpanWeight share = {0.f, 0.f};
    for (int32_t i = 0; i < cta.num_spans; ++i) {
      share = larger_top(share, spans[i * args.shape.padded_reqs]);
    }
    float sum = 0.f;
    for (int32_t i = 0; i < cta.num_spans; ++i) {
      const SpanWeight span = spans[i * args.shape.padded_reqs];
      sum += span.sum * fast_exp2(span.scaled_top - share.scaled_top);
    }
    const int64_t row = static_cast<int64_t>(step) * args.in.num_reqs + args.first_req + q;
    args.shares[row * gridDim.x + blockIdx.x] = {share.scaled_top, sum};
  }
}

/* ln of the sum over all shares, by a warp. */
__device__ __forceinline__ float log_normalizer(const SpanWeight* shares, int32_t num_shares) {
  const int lane = threadIdx.x % kWarpSize;
  float top = -INFINITY;
  for (int32_t i = lane; i < num_shares; i += kWarpSize) {
    const float2 share = __ldcg(reinterpret_cast<const float2*>(shares) + i);
    if (share.y != 0.f) top = fmaxf(top, share.x);
  }
  top = warp_reduce(top, MaxOp{});
  double sum = 0.0;
  for (int32_t i = lane; i < num_shares; i += kWarpSize) {
    const float2 share = __ldcg(reinterpret_cast<const float2*>(shares) + i);
    if (share.y != 0.f) {
      sum += static_cast<double>(share.y) * exp2(static_cast<double>(share.x) - top);
    }
  }
  sum = warp_reduce(sum, SumOp{});
  if (sum == 0.0) return -INFINITY;
  return static_cast<float>((top + log2(sum)) * 0.6931471805599453);
}

template <typename T, typename W>
__device__ __forceinline__ void finish_rows(const FullCta<T, W>& cta, int32_t num_warps) {
  finish_rows(cta.args, cta.state.runners, num_warps, [&](int64_t race) {
    return log_normalizer(cta.args.shares + race * gridDim.x, gridDim.x);
  });
}

template <typename T, typename W>
__device__ __forceinline__ void set_up_runners(FullCta<T, W>& cta) {
  set_up_runners(cta.args, cta.state.runners, FullPolicy::kMaxReqs);
}

template <typename T, typename W>
__device__ __forceinline__ void set_up(FullCta<T, W>& cta) {
  const FullArgs<T, W>& args = cta.args;
  FullState& state = cta.state;
  set_up_runners(cta);
  if (threadIdx.x == 0) {
    fill_init(&state.resident);
    for (int i = 0; i < args.shape.weight_slots; ++i) fill_init(state.weights + i);
    for (int i = 0; i < args.shape.logit_slots; ++i) fill_init(state.logits + i);
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  for (int i = warp; i < args.shape.weight_slots; i += num_warps) {
    cta.fill_weight_slot(i, 0, args.first_step, i);
  }
  for (int i = warp; i < args.shape.logit_slots; i += num_warps) {
    cta.fill_logit_slot(i, 0, args.first_step, i);
  }
  if (warp == num_warps - 1 && args.markov_w2 != nullptr) {
    begin_fill(&state.resident, 0);
    for (int i = cta.num_stream; i < cta.num_spans; ++i) {
      cta.copy_weights(
          cta.shared.resident + (i - cta.num_stream) * kSpan * args.shape.weight_row_bytes, i);
    }
    end_fill(&state.resident);
  }
}

/* Leaders of each warp's requests at a step, where there is a board; in shared memory. */
struct WarpLeaders {
  static constexpr int kMaxReqs = kGroupReqs;
  RaceKey keys[full_warps(1) * kMaxReqs];
};

/* The CTA's leaders at a step onto the board, of those that its warps have; a warp each. */
template <typename T, typename W>
__device__ __forceinline__ void post_leaders(const FullCta<T, W>& cta,
                                             int32_t step,
                                             const WarpLeaders& leaders) {
  constexpr int kNumWarps = full_warps(1);
  const FullArgs<T, W>& args = cta.args;
  const int lane = threadIdx.x % kWarpSize;
  for (int32_t q = threadIdx.x / kWarpSize; q < args.shape.num_reqs; q += kNumWarps) {
    if (!cta.takes_part(q, step)) continue; /* whole warps */
    const RaceKey best = warp_leader(
        lane < kNumWarps ? leaders.keys[lane * WarpLeaders::kMaxReqs + q] : kEmptyRaceKey);
    const int64_t race = static_cast<int64_t>(step) * args.in.num_reqs + args.first_req + q;
    if (lane == 0) store_relaxed(args.board + race * gridDim.x + blockIdx.x, max(best, kNoLeader));
  }
}

/* What the lane owns at a step. */
template <int kNTiles, typename T, typename W>
__device__ __forceinline__ SpanOwner owner_at(const FullCta<T, W>& cta,
                                              int32_t first_q,
                                              int32_t step) {
  SpanOwner owner = {};
  const int lane = threadIdx.x % kWarpSize;
  const int32_t owned = first_q + owned_request(lane);
  if (lane / 4 < 2 * kNTiles && cta.takes_part(owned, step)) {
    owner.runner = cta.state.runners + owned;
  }
  return owner;
}

/* kHurries: the noise of the i-th span of a step. */
template <int kNTiles, typename T, typename W>
__device__ __forceinline__ SpanNoise noise_ahead(const FullCta<T, W>& cta,
                                                 int32_t step,
                                                 int32_t i) {
  if (!kHurries<kNTiles, W> || i >= cta.num_spans) return {0.f, 0.f};
  return span_noise(owner_at<kNTiles>(cta, 0, step), step, cta.first_span + cta.span_at(step, i));
}

/* Grid: shares of the vocabulary, all resident. */
template <typename T, typename W, int kNTiles>
__global__ void __launch_bounds__(full_warps(kNTiles) * kWarpSize, 1)
    full_kernel(const __grid_constant__ FullArgs<T, W> args) {
  extern __shared__ float4 shared_full[];
  __shared__ FullState state;
  __shared__ WarpLeaders leaders;
  FullCta<T, W> cta(args, state, shared_full);
  set_up(cta);

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int32_t num_turns = full_warps(kNTiles) / args.shape.num_sets;
  const int32_t first_q = warp % args.shape.num_sets * kNTiles * kGroupReqs;
  SpanNoise noise = noise_ahead<kNTiles>(cta, args.first_step, warp);
  for (int32_t step = args.first_step; step < args.first_step + args.num_steps; ++step) {
    if (args.markov_w2 != nullptr) {
      if (!args.vanilla) {
        make_latents<4>(args, state.runners, cta.shared.latents, step, full_warps(kNTiles),
                        [] { __syncthreads(); });
      }
      stage_latents<4>(
          cta, step, full_warps(kNTiles), [&](int32_t q, int piece, const uint4& words) {
            store_latents<W>(cta.shared.latents + q * cta.latent_row_bytes(), piece, words);
          });
      __syncthreads();
    }
    SpanOwner owner = owner_at<kNTiles>(cta, first_q, step);
    for (int32_t i = warp / args.shape.num_sets; i < cta.num_spans; i += num_turns) {
      if (kHurries<kNTiles, W> && i != warp) noise = noise_ahead<kNTiles>(cta, step, i);
      run_span<kNTiles>(cta, owner, noise, step, i, first_q);
    }
    /* The share of the last step is read after the wait; others have until the next one. */
    const bool is_last = step + 1 == args.first_step + args.num_steps;
    if (has_board<kNTiles>(args) && lane / 4 < 2) {
      leaders.keys[warp * WarpLeaders::kMaxReqs + owned_request(lane)] = owner.seen;
    }
    __syncthreads(); /* all leaders are pushed and all weights are there */
    if (has_board<kNTiles>(args)) post_leaders(cta, step, leaders);
    if (has_board<kNTiles>(args) && !is_last) {
      /* Whoever needs a leader waits for it: the first warps, before the latents' barrier. */
      publish_share(cta, step, static_cast<int32_t>(blockDim.x - 1 - threadIdx.x));
      noise = noise_ahead<kNTiles>(cta, step + 1, warp);
      continue;
    }
    if (is_last) {
      publish_share(cta, step, threadIdx.x);
      __syncthreads();
    }
    if (threadIdx.x == 0) signal_arrival(args.arrivals + step);
    if (!is_last) {
      publish_share(cta, step, threadIdx.x);
      noise = noise_ahead<kNTiles>(cta, step + 1, warp);
    }
    if (threadIdx.x == 0) wait_for_arrivals(args.arrivals + step, gridDim.x);
    __syncthreads();
  }
  finish_rows(cta, full_warps(kNTiles));
}

}  // namespace dspark
