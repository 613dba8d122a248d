/*
 * A span of 64 tokens in the registers of four warps, for 64 requests: what span.cuh does for a warp,
 * in the same order of sums. See full_wide.cuh.
 */
#pragma once

#include "kernels/draft/full_wide_rows.cuh"

namespace dspark {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A lane's logits: products, then logits. */
using WideTile = float[32];

__device__ __forceinline__ float& wide_element(WideTile& tile, int half, int i) {
  return tile[i / 2 * 4 + half * 2 + i % 2];
}

/* draw_row() of a lane's eight logits, out of line as well; `top`: the largest logit, scaled unless
 * greedy. */
__device__ __noinline__ int32_t
draw_of_span(float4 low, float4 high, bool greedy, float top, float scale, float uniform) {
  const float logits[kLaneTokens] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  float weights[kLaneTokens];
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    weights[i] = greedy ? (logits[i] == top ? 1.f : 0.f) : fast_exp2(fmaf(logits[i], scale, -top));
  }
  return draw_token(weights, uniform);
}

/* race_column() of a lane's eight logits, out of line: rare, and needs registers. */
__device__ __noinline__ Indexed race_zone(float4 low,
                                          float4 high,
                                          const Runner* runner,
                                          int32_t step,
                                          int32_t zone,
                                          float least,
                                          float bound) {
  const float logits[kLaneTokens] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const ZoneNoise noise = {
      least, zone_least_at(runner->seed, zone, runner->position + step, runner->purpose)};
  return race_column(
      logits, *runner, step, noise, bound,
      zone * kSpan + static_cast<int32_t>(threadIdx.x) % kWarpSize / 4 * kLaneTokens);
}

/* What a group knows of the span it works on. */
template <typename T, typename W>
struct WideSpan {
  FullCta<T, W>& cta;
  int32_t step;
  int32_t span;      /* of the share */
  int32_t first_req; /* of the warp, among the launch's; lane g, half h: first_req + g + 8 h */

  __device__ __forceinline__ int32_t req(int half) const {
    return first_req + threadIdx.x % kWarpSize / 4 + 8 * half;
  }
  __device__ __forceinline__ int32_t first_token() const {
    return (cta.first_span + span) * kSpan +
           static_cast<int32_t>(threadIdx.x) % 4 * WidePolicy::kTokens;
  }

  /* Base logits, 16 bits, of whole spans. */
  __device__ __forceinline__ void read_base(uint4 (&base)[2][2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t q = req(half);
      if (!cta.takes_part(q, step)) continue;
      const auto* row =
          reinterpret_cast<const uint4*>(cta.logit_row(q, step) + int64_t{first_token()} * 2);
      base[half][0] = __ldcs(row);
      base[half][1] = __ldcs(row + 1);
    }
  }

  __device__ __forceinline__ void add_base(const uint4 (&base)[2][2], WideTile& tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float values[8];
        unpack_vec<__nv_bfloat16>(base[half][part], values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& l = wide_element(tile, half, part * 8 + i);
          l = __fadd_rn(values[i], l);
        }
      }
    }
  }

  /* The same, element by element, of either type; tokens past the vocabulary get -inf. */
  template <typename U>
  __device__ __forceinline__ void add_direct(WideTile& tile) const {
    const int32_t token = first_token();
    const int32_t left = cta.args.in.vocab_size - token;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t q = req(half);
      const bool active = cta.takes_part(q, step);
      const U* row = reinterpret_cast<const U*>(cta.logit_row(active ? q : 0, step)) + token;
#pragma unroll
      for (int i = 0; i < WidePolicy::kTokens; ++i) {
        float& l = wide_element(tile, half, i);
        l = active && i < left ? __fadd_rn(Element<U>::to_float(row[i]), l) : -INFINITY;
      }
    }
  }

  /* `scales`: of the span, in shared memory. */
  __device__ __forceinline__ void scale_dots(const float* scales, WideTile& tile) const {
    const auto* own =
        reinterpret_cast<const float4*>(scales + threadIdx.x % 4 * WidePolicy::kTokens);
#pragma unroll
    for (int part = 0; part < WidePolicy::kTokens / 4; ++part) {
      const float4 four = own[part];
      const float scale[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& dot = wide_element(tile, half, part * 4 + i);
          dot = low_rank_bias<W>(dot, scale[i]);
        }
      }
    }
  }

  __device__ __forceinline__ void forbid(WideTile& tile) const {
    const GrammarMask& mask = cta.args.mask;
    const int32_t token = first_token();
    if (token >= cta.args.in.vocab_size) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t q = req(half);
      if (!cta.takes_part(q, step)) continue;
      const int64_t row =
          static_cast<int64_t>(cta.args.first_req + q) * cta.args.in.draft_len + step;
      const uint32_t allowed =
          static_cast<uint32_t>(mask.words[row * mask.words_per_row + token / 32]) >> token % 32;
#pragma unroll
      for (int i = 0; i < WidePolicy::kTokens; ++i) {
        if ((allowed >> i & 1u) == 0) wide_element(tile, half, i) = -INFINITY;
      }
    }
  }

  /* As weigh_span(), in the same order of sums. */
  __device__ __forceinline__ void weigh(WideTile& tile, SpanOwner& owner) const {
    const int column = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = wide_element(tile, half, 0);
#pragma unroll
      for (int i = 1; i < WidePolicy::kTokens; ++i) {
        top = fmaxf(top, wide_element(tile, half, i));
      }
      top = warp_reduce<4>(top, MaxOp{});
      const float scale = cta.state.runners[req(half)].runner.log2e_per_temperature;
      const float scaled_top = top == -INFINITY ? 0.f : top * scale;
      float sums[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < WidePolicy::kTokens; ++i) {
        sums[i / 8] += fast_exp2(fmaf(wide_element(tile, half, i), scale, -scaled_top));
      }
      float sum = sums[0] + sums[1];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (column == half) {
        owner.top = top;
        owner.weight = {scaled_top, sum};
      }
    }
  }

  /* Eight tokens of the request that lane `from` owns, as span.cuh has them: those from 8 (lane / 4)
   * on. */
  __device__ __forceinline__ void gather(WideTile& tile,
                                         int from,
                                         float (&logits)[kLaneTokens]) const {
    const int lane = threadIdx.x % kWarpSize;
    const int holder = from / 4 * 4 + lane / 8;
    const bool odd = lane / 4 % 2 != 0;
    const bool lower = from % 4 != 0;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const float a = __shfl_sync(kAllLanes, wide_element(tile, 0, i), holder);
      const float b = __shfl_sync(kAllLanes, wide_element(tile, 0, i + 8), holder);
      const float c = __shfl_sync(kAllLanes, wide_element(tile, 1, i), holder);
      const float d = __shfl_sync(kAllLanes, wide_element(tile, 1, i + 8), holder);
      logits[i] = lower ? (odd ? d : c) : (odd ? b : a);
    }
  }

  /* Lets the span run: up to four claims at a time, a column each. */
  __device__ __forceinline__ void race(WideTile& tile,
                                       SpanOwner& owner,
                                       const SpanNoise& noise,
                                       RaceKey* keys) const {
    const int lane = threadIdx.x % kWarpSize;
    const SpanClaim claim = claim_span(owner, noise);
    uint32_t claims = __ballot_sync(kAllLanes, claim.may_lead);
    if (claims == 0) return;
    Indexed best = empty_race();
    const int rank = __popc(claims & ((1u << lane) - 1u)); /* of the owner's claim */
#pragma unroll 1
    for (int turn = 0; claims != 0; ++turn) {
      uint32_t mine = claims;
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        if (column < lane % 4) mine &= mine - 1;
        claims &= claims - 1;
      }
      /* With no claim left the column runs for the first one in vain. */
      const int first = __shfl_sync(kAllLanes, __ffs(static_cast<int>(mine)) - 1, 0);
      const int from = mine == 0 ? first : __ffs(static_cast<int>(mine)) - 1;
      const Indexed raced = race_columns(tile, owner, noise, claim.score, from);
      const float value = __shfl_sync(kAllLanes, raced.value, rank % 4);
      const int32_t index = __shfl_sync(kAllLanes, raced.index, rank % 4);
      if (rank / 4 == turn) best = {value, index};
    }
    if (!claim.may_lead) return;
    const RaceKey key = race_key(best);
    if (key <= owner.seen) return;
    owner.seen = key;
    atomicMax(keys, key);
  }

  /* Leaders of four requests, those that lanes `from` own, a column each. */
  __device__ __forceinline__ Indexed race_columns(WideTile& tile,
                                                  const SpanOwner& owner,
                                                  const SpanNoise& noise,
                                                  float claimed,
                                                  int from) const {
    const int32_t zone = cta.first_span + span;
    float own[kLaneTokens];
    gather(tile, from, own);
    const SpanRunner& runner = cta.state.runners[first_req + from / 4 + from % 4 * 8];
    const bool coupled = runner.mode == DrawMode::kCoupled;
    const float score = __shfl_sync(kAllLanes, claimed, from);
    Indexed raced = {score, 0};
    const float4 low = {own[0], own[1], own[2], own[3]};
    const float4 high = {own[4], own[5], own[6], own[7]};
    if (__any_sync(kAllLanes, !coupled)) {
      const float top = __shfl_sync(kAllLanes, owner.top, from);
      const float scaled_top = __shfl_sync(kAllLanes, owner.weight.scaled_top, from);
      const bool greedy = runner.mode == DrawMode::kGreedy;
      raced.index = zone * kSpan + draw_of_span(low, high, greedy, greedy ? top : scaled_top,
                                                runner.runner.log2e_per_temperature,
                                                __shfl_sync(kAllLanes, noise.second, from));
    }
    if (__any_sync(kAllLanes, coupled)) {
      const Indexed best = race_zone(low, high, &runner.runner, step, zone,
                                     __shfl_sync(kAllLanes, noise.first, from), score);
      if (coupled) raced = best;
    }
    return raced;
  }
};

#endif

}  // namespace dspark
