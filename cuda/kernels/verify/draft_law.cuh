/*
 * q: draft laws in the forms that a drafter hands on, one token or one strip at a time, by a warp.
 *
 * Dense logits are read; sparse pairs are looked up; of a low-rank law (base logits U, latents, W2) the
 * logit is recomputed by the draft head's own function, so that acceptance sees the numbers that the
 * draft was drawn from, bit for bit. One token of it costs a row of W2, a strip 256 of them: 128 KiB of
 * bf16 at rank 256.
 */
#pragma once

#include "common/low_rank_logit.cuh"
#include "kernels/verify/row_law.cuh"

namespace dspark {

/* f(W2 in its type). */
template <typename F>
__device__ __forceinline__ void with_w2(const VerifyInputs& in, F&& f) {
  switch (in.low_rank.w2_dtype) {
    case DSPARK_DTYPE_BF16:
      return f(static_cast<const __nv_bfloat16*>(in.low_rank.w2));
    case DSPARK_DTYPE_F16:
      return f(static_cast<const __half*>(in.low_rank.w2));
    default:
      return f(static_cast<const __nv_fp8_e4m3*>(in.low_rank.w2));
  }
}

/* The low-rank logit of `token` from its base logit. */
__device__ __noinline__ float add_low_rank(const VerifyInputs& in,
                                           int64_t index,
                                           int32_t token,
                                           float base) {
  const int32_t rank = in.low_rank.rank;
  with_w2(in, [&](const auto* w2) {
    using W = std::remove_cv_t<std::remove_pointer_t<decltype(w2)>>;
    using Latent = typename LowRank<W>::Latent;
    const bool brings = threadIdx.x % kWarpSize < 4; /* one pair of a warp's eight */
    const W* row = brings ? w2 + static_cast<int64_t>(token) * rank : nullptr;
    const Latent* latent =
        brings ? static_cast<const Latent*>(in.low_rank.latents) + index * rank : nullptr;
    const float dot = __shfl_sync(kAllLanes, low_rank_pair_dot<W>(row, latent, rank), 0);
    const float scale = LowRank<W>::kScaled ? in.low_rank.scales[token] : 1.f;
    base = low_rank_logit<W>(base, dot, scale);
  });
  return base;
}

/* The same for this lane's part of a strip. */
__device__ __forceinline__ void add_low_rank_strip(const VerifyInputs& in,
                                                   int64_t index,
                                                   int32_t strip,
                                                   float (&logits)[kGroup]) {
  constexpr int kRows = 16; /* of W2 in a product: the tokens of two lanes */
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = in.low_rank.rank;
  with_w2(in, [&](const auto* w2) {
    using W = std::remove_cv_t<std::remove_pointer_t<decltype(w2)>>;
    using Latent = typename LowRank<W>::Latent;
    const Latent* latent =
        lane < 4 ? static_cast<const Latent*>(in.low_rank.latents) + index * rank : nullptr;
#pragma unroll 1
    for (int tile = 0; tile < kStrip / kRows; ++tile) {
      const int32_t token = strip * kStrip + tile * kRows + lane / 4;
      const auto row_of = [&](int32_t v) {
        return v < in.vocab_size ? w2 + static_cast<int64_t>(v) * rank : nullptr;
      };
      float dots[4]; /* of latent 0 in the lanes 4 g: token g, -, token g + 8, - */
      low_rank_dots<W>(row_of(token), row_of(token + kRows / 2), latent, rank, dots);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float low = __shfl_sync(kAllLanes, dots[0], 4 * j);
        const float high = __shfl_sync(kAllLanes, dots[2], 4 * j);
        if (lane / 2 != tile) continue;
        const int32_t own = strip_token(strip) + j;
        const float scale =
            LowRank<W>::kScaled && own < in.vocab_size ? in.low_rank.scales[own] : 1.f;
        logits[j] = low_rank_logit<W>(logits[j], lane % 2 == 0 ? low : high, scale);
      }
    }
  });
}

__device__ __forceinline__ bool draft_allows(const VerifyInputs& in, int64_t index, int32_t token) {
  return mask_bit(in.draft_mask, in.vocab_size, index, token);
}

/* The draft logit of one token. */
__device__ __forceinline__ float draft_logit(const VerifyInputs& in, int64_t index, int32_t token) {
  float logit = load_logit(in.draft, index, token);
  if (in.low_rank.w2 != nullptr) logit = add_low_rank(in, index, token, logit);
  return draft_allows(in, index, token) ? logit : -INFINITY;
}

/* This lane's part of a strip of draft logits. */
__device__ __noinline__ Group load_draft_strip(const VerifyInputs& in,
                                               int64_t index,
                                               int32_t strip) {
  Group group;
  load_strip(in.draft, index, strip, in.vocab_size, group.of);
  if (in.low_rank.w2 != nullptr) add_low_rank_strip(in, index, strip, group.of);
  if (in.draft_mask == nullptr) return group;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const int32_t token = strip_token(strip) + j;
    if (token < in.vocab_size && !draft_allows(in, index, token)) group.of[j] = -INFINITY;
  }
  return group;
}

/* The pair of a sparse law that is this lane's, of the first kWarpSize; token -1: none. */
struct HeldPair {
  int32_t token;
  float logit;
};

/* Read early, since it does not depend on what is asked. */
__device__ __forceinline__ HeldPair hold_pair(const VerifyInputs& in, int32_t req, int32_t row) {
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpSize);
  if (row == 0 || in.candidate_tokens == nullptr || lane >= in.num_candidates)
    return {-1, -INFINITY};
  const int64_t index = static_cast<int64_t>(req) * in.draft_len + row - 1;
  const int64_t at = index * in.num_candidates + lane;
  return {in.candidate_tokens[at], in.candidate_logits[at]};
}

/* q of one token under the law of draft `row` of `req`, whose held pair is `held`. */
__device__ __forceinline__ float draft_probability(const VerifyInputs& in,
                                                   int32_t req,
                                                   int32_t row,
                                                   const RowLaw& law,
                                                   const HeldPair& held,
                                                   int32_t token) {
  if (law.bad != 0) return token == draft_token(in, req, row) ? 1.f : 0.f;
  const int64_t index = static_cast<int64_t>(req) * in.draft_len + row - 1;
  if (in.draft.data != nullptr) return probability(law, draft_logit(in, index, token));
  const int32_t* tokens = in.candidate_tokens + index * in.num_candidates;
  const float* logits = in.candidate_logits + index * in.num_candidates;
  float prob = held.token == token ? probability(law, held.logit) : 0.f;
#pragma unroll 1
  for (int32_t i = threadIdx.x % kWarpSize + kWarpSize; i < in.num_candidates; i += kWarpSize) {
    const float logit = logits[i];
    if (tokens[i] == token) prob = probability(law, logit);
  }
  return __int_as_float(__reduce_max_sync(kAllLanes, __float_as_int(prob))); /* none is below 0 */
}

}  // namespace dspark
