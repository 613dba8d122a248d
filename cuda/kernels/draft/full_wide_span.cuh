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

/* draw_row() of a request whose logits four lanes hold, 16 each, in the order of draw_token(): the four
 * get the token. Out of line: rare, and needs registers. `top`: the largest logit, scaled unless
 * greedy. */
__device__ __noinline__ int32_t draw_of_four(
    float4 a, float4 b, float4 c, float4 d, bool greedy, float top, float scale, float uniform) {
  constexpr int kParts = 2; /* of a lane: shares of span.cuh, numbered 2 * column + part */
  const int column = threadIdx.x % 4;
  float weights[kParts][kLaneTokens] = {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w},
                                        {c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w}};
  float sums[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    sums[part] = 0.f;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      float& w = weights[part][i];
      w = greedy ? (w == top ? 1.f : 0.f) : fast_exp2(fmaf(w, scale, -top));
      sums[part] += w;
    }
  }
  /* Running sums over the eight shares: distances 1, 2 and 4. */
  const auto from_left = [&](float value, int distance) {
    const float left = __shfl_up_sync(kAllLanes, value, distance, 4);
    return column >= distance ? left : 0.f;
  };
  float even = sums[0] + from_left(sums[1], 1);
  float odd = sums[1] + sums[0];
  even += from_left(even, 1);
  odd += from_left(odd, 1);
  even += from_left(even, 2);
  odd += from_left(odd, 2);
  const float target = uniform * __shfl_sync(kAllLanes, odd, 3, 4);
  const float before[kParts] = {from_left(odd, 1), even};
  const float running[kParts] = {even, odd};

  uint32_t live = 0; /* bit: number of a share */
  uint32_t past = 0;
  int32_t tokens[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const bool positive = sums[part] > 0.f;
    live |= static_cast<uint32_t>(positive) << (2 * column + part);
    past |= static_cast<uint32_t>(positive && running[part] > target) << (2 * column + part);
    float sum = before[part];
    int drawn = -1;
    int last = 0;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      sum += weights[part][i];
      if (weights[part][i] > 0.f) last = i;
      if (weights[part][i] > 0.f && sum > target && drawn < 0) drawn = i;
    }
    tokens[part] = (2 * column + part) * kLaneTokens + (drawn < 0 ? last : drawn);
  }
  live |= shuffle_xor(live, 1);
  past |= shuffle_xor(past, 1);
  live |= shuffle_xor(live, 2);
  past |= shuffle_xor(past, 2);
  /* Past rounding: the last that has any weight. */
  const int share =
      (past != 0 ? __ffs(static_cast<int>(past)) - 1 : 31 - __clz(static_cast<int>(live))) & 7;
  const int32_t even_token = __shfl_sync(kAllLanes, tokens[0], share / 2, 4);
  const int32_t odd_token = __shfl_sync(kAllLanes, tokens[1], share / 2, 4);
  return share % 2 == 0 ? even_token : odd_token;
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

  /* Base logits, 16 bits, of whole spans; the first two as in WideGroup. */
  __device__ __forceinline__ void read_base(const unsigned char* first_row,
                                            uint32_t taking_part,
                                            uint4 (&base)[2][2]) const {
    const int64_t half_bytes = int64_t{16} * cta.args.in.draft_len * cta.args.stride_logits_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if ((taking_part >> half & 1u) == 0) continue;
      const auto* row =
          reinterpret_cast<const uint4*>(first_row + span * kSpan * 2 + half * half_bytes);
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

  /* Lets the span run for every request. */
  __device__ __forceinline__ void race(WideTile& tile,
                                       SpanOwner& owner,
                                       const SpanNoise& noise,
                                       RaceKey* keys) const {
    const SpanClaim claim = claim_span(owner, noise);
    const uint32_t claims = __ballot_sync(kAllLanes, claim.may_lead);
    if (claims == 0) return;
    const bool owns_coupled = claim.may_lead && owner.runner->mode == DrawMode::kCoupled;
    const uint32_t coupled = __ballot_sync(kAllLanes, owns_coupled);
    Indexed best = empty_race();
    if (claims != coupled) {
      best = {claim.score,
              (cta.first_span + span) * kSpan + draw(tile, owner, noise, claims & ~coupled)};
    }
    if (coupled != 0) {
      const Indexed raced = race_coupled(tile, noise, claim.score, coupled);
      if (owns_coupled) best = raced;
    }
    if (!claim.may_lead) return;
    const RaceKey key = race_key(best);
    if (key <= owner.seen) return;
    owner.seen = key;
    atomicMax(keys, key);
  }

  /* Tokens of the span drawn for the greedy and sampled requests that `claims` names by their owners,
   * each for its owner. */
  __device__ __forceinline__ int32_t draw(WideTile& tile,
                                          const SpanOwner& owner,
                                          const SpanNoise& noise,
                                          uint32_t claims) const {
    int32_t drawn = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if ((claims & 0x11111111u << half) == 0) continue;
      const SpanRunner& runner = cta.state.runners[req(half)];
      const bool greedy = runner.mode == DrawMode::kGreedy;
      const float top = __shfl_sync(kAllLanes, owner.top, half, 4);
      const float scaled_top = __shfl_sync(kAllLanes, owner.weight.scaled_top, half, 4);
      const auto four = [&](int i) {
        return make_float4(wide_element(tile, half, i), wide_element(tile, half, i + 1),
                           wide_element(tile, half, i + 2), wide_element(tile, half, i + 3));
      };
      const int32_t token = draw_of_four(
          four(0), four(4), four(8), four(12), greedy, greedy ? top : scaled_top,
          runner.runner.log2e_per_temperature, __shfl_sync(kAllLanes, noise.second, half, 4));
      if (threadIdx.x % 4 == half) drawn = token;
    }
    return drawn;
  }

  /* Leaders of the coupled requests that `claims` names by their owners, each for its owner: four at
   * a time, a column of span.cuh each. `score`: the owner's. */
  __device__ __forceinline__ Indexed race_coupled(WideTile& tile,
                                                  const SpanNoise& noise,
                                                  float score,
                                                  uint32_t claims) const {
    const int lane = threadIdx.x % kWarpSize;
    const int32_t zone = cta.first_span + span;
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
      float own[kLaneTokens];
      gather(tile, from, own);
      const SpanRunner& runner = cta.state.runners[first_req + from / 4 + from % 4 * 8];
      const float4 low = {own[0], own[1], own[2], own[3]};
      const float4 high = {own[4], own[5], own[6], own[7]};
      const Indexed raced =
          race_zone(low, high, &runner.runner, step, zone,
                    __shfl_sync(kAllLanes, noise.first, from), __shfl_sync(kAllLanes, score, from));
      const float value = __shfl_sync(kAllLanes, raced.value, rank % 4);
      const int32_t index = __shfl_sync(kAllLanes, raced.index, rank % 4);
      if (rank / 4 == turn) best = {value, index};
    }
    return best;
  }
};

#endif

}  // namespace dspark
