/*
 * The head over the whole vocabulary for many requests (sm_90a): the law, the shares and the exchange
 * between steps of full.cuh, bit for bit, with products of four warps (wgmma) and other hands.
 *
 * Mapping: latents are A (64 requests), the rows of a span are B, both in slabs in shared memory. A
 * group of four warps takes a span for 64 requests; of four groups two work for each half of 128
 * requests, so that one group's products run while another weighs its span. A fifth group does
 * nothing but bring W2: 16-bit rows by cp.async, e4m3 rows by a stage where they become f16.
 * It knows nothing of steps and is always as many spans ahead as there are places.
 *
 * Row n = 8 j + 2 c + e of B is token 16 c + 2 j + e: lane (g, c) gets 16 neighbouring tokens of
 * requests g and g + 8 of its warp, two of the lanes' shares of span.cuh, and a row's base logits are
 * one line that four lanes read straight into registers. Two shuffles reduce what
 * takes three there, for twice the tokens. Lanes c = 0, 1 own requests g, g + 8; 2, 3 make the same
 * requests' noise for the group's next span. Claims are rare after a step's first spans. Greedy
 * and sampled ones draw for all requests of a warp at once, four lanes each; coupled ones gather four
 * requests' logits into the columns of span.cuh.
 *
 * Per step: W2 and the base logits, once each. Limited by latency and instructions more than by memory
 * (ncu, 128 requests: 54 % of memory bandwidth, 0.42 of all issue slots, 1,080 instructions a warp and
 * span, a third of the stalls for base logits).
 *
 * Dropped: asking L2 for base logits some spans ahead (cp.async.bulk.prefetch: 390 us against 370);
 * the proxy fence by those that wait for rows, which made them wait for their base logits (468 us); base
 * logits a span ahead in registers and W1 rows of the leaders asked for before the exchange (379 us), or in
 * shared memory by cp.async, which takes a place of W2 (407 us against 348).
 */
#pragma once

#include "kernels/draft/full_wide_span.cuh"

namespace dspark {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* tile = latents of the group's requests . rows of the span. kWhole: the rank is kMaxRank. */
template <bool kWhole, typename Latent>
__device__ __forceinline__ void multiply_slabs(uint32_t latents,
                                               uint32_t rows,
                                               int32_t rank,
                                               WideTile& tile) {
  constexpr int kStepsOfSlab = kSlabColumns / kLowRankStep;
  wgmma_begin();
#pragma unroll
  for (int s = 0; s < FullPolicy::kMaxSteps; ++s) {
    if (!kWhole && s * kLowRankStep >= rank) break;
    const uint32_t at = s / kStepsOfSlab * kSlabBytes + s % kStepsOfSlab * kLowRankStep * 2;
    wgmma_m64n64k16<Latent>(tile, slab_descriptor(latents + at), slab_descriptor(rows + at), s > 0);
  }
  wgmma_end();
}

/* What a group carries from span to span. Its numbers are the same for all lanes of a warp, and known
 * to be: the operands of products have to be. */
template <typename T, typename W>
struct WideGroup {
  FullCta<T, W>& cta;
  WideState& state;
  int32_t warp;  /* of the CTA */
  int32_t place; /* of the span's rows */
  uint32_t parity;
  SpanNoise noise; /* lanes 0, 1 of four: of this span; 2, 3: of the group's next */
  /* Of the step: base logits of the lane's first request at its first token of the share, and who takes part:
   * that one, the other one, the owned one. */
  const unsigned char* base_row;
  uint32_t taking_part;

  __device__ __forceinline__ WideGroup(FullCta<T, W>& cta, WideState& state)
      : cta(cta),
        state(state),
        warp(__shfl_sync(kAllLanes, static_cast<int32_t>(threadIdx.x) / kWarpSize, 0)) {}

  /* One or two sets of requests. */
  __device__ __forceinline__ int32_t set() const {
    return warp / 4 & (cta.args.shape.num_sets - 1);
  }
  __device__ __forceinline__ int32_t num_turns() const {
    return WidePolicy::kNumGroups >> (cta.args.shape.num_sets - 1);
  }
  __device__ __forceinline__ int32_t first_req() const {
    return set() * WidePolicy::kReqs + warp % 4 * 16;
  }
  /* The request that a lane owns, or whose noise it makes ahead. */
  __device__ __forceinline__ int32_t owned() const {
    const int lane = threadIdx.x % kWarpSize;
    return first_req() + lane / 4 + lane % 2 * 8;
  }
  __device__ __forceinline__ bool owns(int32_t step) const {
    return threadIdx.x % 4 < 2 && cta.takes_part(owned(), step);
  }
  __device__ __forceinline__ int32_t first_turn() const {
    return warp / 4 >> (cta.args.shape.num_sets - 1);
  }
  __device__ __forceinline__ WideSpan<T, W> work(int32_t step, int32_t i) const {
    return {cta, step, cta.span_at(step, i), first_req()};
  }
  __device__ __forceinline__ bool direct(int32_t span) const {
    return cta.args.f32_logits || !cta.staged(span);
  }

  __device__ __forceinline__ void begin_step(int32_t step) {
    const FullArgs<T, W>& args = cta.args;
    const WideSpan<T, W> first = work(step, 0);
    const int64_t token = int64_t{cta.first_span} * kSpan + WidePolicy::kTokens * (threadIdx.x % 4);
    base_row = cta.logit_row(first.req(0), step) + token * 2;
    taking_part = static_cast<uint32_t>(cta.takes_part(first.req(0), step)) |
                  static_cast<uint32_t>(cta.takes_part(first.req(1), step)) << 1 |
                  static_cast<uint32_t>(owns(step)) << 2;
    find_place(step, first_turn());
  }
  __device__ __forceinline__ void find_place(int32_t step, int32_t i) {
    const int32_t fill = (step - cta.args.first_step) * cta.num_spans + i;
    place = fill % cta.args.shape.weight_slots;
    parity = fill / cta.args.shape.weight_slots & 1;
  }
  __device__ __forceinline__ void next_place() {
    for (place += num_turns(); place >= cta.args.shape.weight_slots; parity ^= 1) {
      place -= cta.args.shape.weight_slots;
    }
  }

  /* Noise of this span: made now together with that of the group's next, or made before. */
  __device__ __forceinline__ SpanNoise find_noise(int32_t step, int32_t i) {
    if ((i & num_turns()) != 0) return {shuffle_xor(noise.first, 2), shuffle_xor(noise.second, 2)};
    const int32_t ahead = min(i + num_turns(), cta.num_spans - 1);
    SpanOwner of = {};
    if (cta.takes_part(owned(), step)) of.runner = state.runners + owned();
    const int32_t span = cta.span_at(step, threadIdx.x % 4 < 2 ? i : ahead);
    noise = span_noise(of, step, cta.first_span + span);
    return noise;
  }

  /* One span. */
  __device__ __forceinline__ void run(int32_t step, int32_t i) {
    using Latent = typename LowRank<W>::Latent;
    const FullArgs<T, W>& args = cta.args;
    const FullShape& shape = args.shape;
    const WideSpan<T, W> span = work(step, i);
    uint4 base[2][2] = {};
    if (!direct(span.span)) span.read_base(base_row, taking_part, base);
    const SpanNoise now = find_noise(step, i);
    SpanOwner owner = {};
    if ((taking_part & 4u) != 0) owner.runner = state.runners + owned();
    RaceKey* key =
        args.keys + static_cast<int64_t>(step) * args.in.num_reqs + args.first_req + owned();
    barrier_wait(state.filled + place, parity);
    WideTile tile = {};
    const uint32_t latents =
        shared_address(cta.shared.latents) + set() * WidePolicy::kReqs * shape.latent_row_bytes;
    const uint32_t rows = cta.shared.weights + place * kSpan * shape.weight_row_bytes;
    if (args.in.markov_rank == FullPolicy::kMaxRank) {
      multiply_slabs<true, Latent>(latents, rows, FullPolicy::kMaxRank, tile);
    } else {
      multiply_slabs<false, Latent>(latents, rows, args.in.markov_rank, tile);
    }
    const RaceKey latest = owner.runner == nullptr ? kEmptyRaceKey : __ldcg(key);
    if (LowRank<W>::kScaled) span.scale_dots(state.scales[place], tile);
    if (LowRank<W>::kScaled) {
      barrier_arrive(state.emptied + place);
    } else {
      __syncwarp();
      if (threadIdx.x % kWarpSize == 0) barrier_arrive(state.emptied + place);
    }
    next_place();
    if (!direct(span.span)) {
      span.add_base(base, tile);
    } else if (args.f32_logits) {
      span.template add_direct<float>(tile);
    } else {
      span.template add_direct<__nv_bfloat16>(tile);
    }
    if (args.mask.words != nullptr) span.forbid(tile);
    span.weigh(tile, owner);
    owner.seen = latest;
    if (owner.runner != nullptr) {
      cta.shared.spans[span.span * shape.padded_reqs + owned()] = owner.weight;
    }
    span.race(tile, owner, now, key);
  }
};

/* Latents of the step into slabs. */
template <typename T, typename W>
__device__ __forceinline__ void stage_wide_latents(const FullCta<T, W>& cta, int32_t step) {
  stage_latents<WidePolicy::kReqs * 2 / WidePolicy::kNumWarps>(
      cta, step, WidePolicy::kNumWarps, [&](int32_t q, int piece, const uint4& words) {
        unsigned char* set = cta.shared.latents + q / WidePolicy::kReqs * WidePolicy::kReqs *
                                                      cta.args.shape.latent_row_bytes;
        const int row = q % WidePolicy::kReqs;
        unsigned char* slab = set + piece / 8 * kSlabBytes;
        if constexpr (LowRank<W>::kScaled) {
          const auto put = [&](int to, uint32_t a, uint32_t b) {
            *reinterpret_cast<uint2*>(slab + slab_offset(row, to) + piece % 2 * 8) =
                make_uint2(a, b);
          };
          put(piece % 8 / 2 * 2, words.x, words.z);
          put(piece % 8 / 2 * 2 + 1, words.y, words.w);
        } else {
          *reinterpret_cast<uint4*>(slab + slab_offset(row, piece % 8)) = words;
        }
      });
  fence_for_wgmma();
}

/* The groups that weigh. */
template <typename T, typename W>
__device__ __forceinline__ void run_wide(FullCta<T, W>& cta, WideState& state) {
  constexpr int kThreads = WidePolicy::kNumGroups * WidePolicy::kGroupThreads;
  constexpr int kBarrier = 1;
  const FullArgs<T, W>& args = cta.args;
  WideGroup<T, W> group(cta, state);
  for (int32_t step = args.first_step; step < args.first_step + args.num_steps; ++step) {
    if (!args.vanilla) {
      make_latents<4>(args, cta.state.runners, cta.shared.latents, step, WidePolicy::kNumWarps,
                      [] { sync_threads<kThreads>(kBarrier); });
    }
    stage_wide_latents(cta, step);
    sync_threads<kThreads>(kBarrier);
    group.begin_step(step);
    for (int32_t i = group.first_turn(); i < cta.num_spans; i += group.num_turns()) {
      group.run(step, i);
    }
    sync_threads<kThreads>(kBarrier); /* all leaders are pushed and all weights are there */
    const bool is_last = step + 1 == args.first_step + args.num_steps;
    if (is_last) {
      publish_share(cta, step, threadIdx.x);
      sync_threads<kThreads>(kBarrier);
    }
    if (threadIdx.x == 0) signal_arrival(args.arrivals + step);
    if (!is_last) publish_share(cta, step, threadIdx.x);
    if (threadIdx.x == 0) wait_for_arrivals(args.arrivals + step, gridDim.x);
    sync_threads<kThreads>(kBarrier);
  }
  finish_rows(cta, WidePolicy::kNumWarps);
}

#endif

/* Grid: shares of the vocabulary, all resident. markov_rank is a multiple of kSlabColumns. */
template <typename T, typename W>
__global__ void __launch_bounds__(WidePolicy::kNumThreads, 1)
    full_wide_kernel(const __grid_constant__ FullArgs<T, W> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(WidePolicy::kAlignment) float4 shared_wide[];
  __shared__ WideState state;
  const uint32_t start = shared_address(shared_wide);
  const uint32_t skip =
      (WidePolicy::kAlignment - start % WidePolicy::kAlignment) % WidePolicy::kAlignment;
  FullCta<T, W> cta(args, state, shared_wide + skip / sizeof(float4));
  set_up_runners(cta);
  if (threadIdx.x == 0) {
    for (int i = 0; i < args.shape.weight_slots; ++i) {
      barrier_init(state.filled + i, WidePolicy::kGroupThreads);
      barrier_init(state.emptied + i,
                   args.shape.num_sets * (LowRank<W>::kScaled ? WidePolicy::kGroupThreads : 4));
    }
  }
  __syncthreads();
  const bool whole = args.in.markov_rank == FullPolicy::kMaxRank;
  if (threadIdx.x < WidePolicy::kNumWarps * kWarpSize) {
    take_registers<WidePolicy::kWeighRegisters>();
    run_wide(cta, state);
  } else {
    release_registers<WidePolicy::kBringRegisters>();
    if (whole) {
      bring_weights<true>(cta, state);
    } else {
      bring_weights<false>(cta, state);
    }
  }
#endif
}

}  // namespace dspark
