/* Host side shared by the forms of the draft head: what is computed per request, not per token of
 * the vocabulary. Params is the struct of either form. */
#pragma once

#include <initializer_list>

#include "common/host.cuh"
#include "kernels/draft/grammar.cuh"
#include "kernels/draft/latent.cuh"

namespace dspark {

inline bool aligned_to(size_t alignment, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) return false;
  }
  return true;
}

inline bool aligned_16(std::initializer_list<const void*> pointers) {
  return aligned_to(16, pointers);
}

inline bool has_latent_kernel(dspark_head_kind head) {
  return head == DSPARK_HEAD_GATED || head == DSPARK_HEAD_RNN;
}

inline dspark_status check_logits_dtype(dspark_dtype dtype) {
  DSPARK_CHECK_ARG(
      dtype == DSPARK_DTYPE_F32 || dtype == DSPARK_DTYPE_BF16, DSPARK_ERROR_UNSUPPORTED_DTYPE,
      "logits_dtype: expected DSPARK_DTYPE_F32 (0) or DSPARK_DTYPE_BF16 (1), got %d", dtype);
  return DSPARK_OK;
}

/* The sizes that both forms have. */
template <typename Params>
dspark_status check_head_sizes(const Params& p) {
  constexpr int32_t kMaxMarkovRank = 1024;
  DSPARK_CHECK_ARG(p.head >= DSPARK_HEAD_NONE && p.head <= DSPARK_HEAD_RNN,
                   DSPARK_ERROR_INVALID_ARGUMENT,
                   "head: expected DSPARK_HEAD_NONE (0) .. DSPARK_HEAD_RNN (3), got %d", p.head);
  DSPARK_TRY(check_range("num_reqs", p.num_reqs, 0));
  DSPARK_TRY(check_range("draft_len", p.draft_len, 0));
  DSPARK_TRY(check_range("vocab_size", p.vocab_size, 1));
  DSPARK_TRY(check_range("hidden_size", p.hidden_size, 0));
  const int32_t min_rank = p.head == DSPARK_HEAD_NONE ? 0 : 1;
  DSPARK_TRY(check_range("markov_rank", p.markov_rank, min_rank, kMaxMarkovRank));
  return check_range("confidence_with_markov", p.confidence_with_markov, 0, 1);
}

/* The pointers that both forms have, but for the logits. */
template <typename Params>
dspark_status check_head_pointers(const Params& p) {
  constexpr size_t kWeightAlignment = sizeof(__nv_bfloat16);
  DSPARK_TRY(check_pointer("anchor_positions", p.anchor_positions, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("temperature", p.temperature, sizeof(float)));
  DSPARK_TRY(check_pointer("seeds", p.seeds, sizeof(uint64_t)));
  DSPARK_TRY(check_pointer("draft_tokens", p.draft_tokens, sizeof(int32_t)));
  if (p.head != DSPARK_HEAD_NONE) {
    DSPARK_TRY(check_pointer("anchors", p.anchors, sizeof(int32_t)));
    DSPARK_TRY(check_pointer("markov_w1", p.markov_w1, kWeightAlignment));
    DSPARK_TRY(check_pointer("markov_w2", p.markov_w2, kWeightAlignment));
  }
  if (has_latent_kernel(p.head)) {
    DSPARK_TRY(check_pointer("proj_weight", p.proj_weight, kWeightAlignment));
    DSPARK_TRY(check_pointer("proj_bias", p.proj_bias, kWeightAlignment));
  }
  DSPARK_TRY(check_aligned("mask", p.mask, sizeof(int32_t)));
  const bool has_confidence = p.confidence_weight != nullptr;
  if (has_confidence) {
    DSPARK_TRY(check_aligned("confidence_weight", p.confidence_weight, kWeightAlignment));
    DSPARK_TRY(check_pointer("confidence", p.confidence, sizeof(float)));
    DSPARK_CHECK_ARG(p.head != DSPARK_HEAD_NONE || p.confidence_with_markov == 0,
                     DSPARK_ERROR_INVALID_ARGUMENT,
                     "confidence_with_markov: expected 0 with DSPARK_HEAD_NONE, got 1");
  }
  if (has_confidence || has_latent_kernel(p.head)) {
    DSPARK_TRY(check_pointer("hidden", p.hidden, kWeightAlignment));
    DSPARK_TRY(check_range("hidden_size", p.hidden_size, 1));
  }
  return DSPARK_OK;
}

template <typename T, typename Params>
HeadInputs<T> head_inputs(const Params& p) {
  HeadInputs<T> in;
  in.hidden = static_cast<const T*>(p.hidden);
  in.markov_w1 = static_cast<const T*>(p.markov_w1);
  in.anchors = p.anchors;
  in.draft_tokens = p.draft_tokens;
  in.num_reqs = p.num_reqs;
  in.draft_len = p.draft_len;
  in.vocab_size = p.vocab_size;
  in.hidden_size = p.hidden_size;
  in.markov_rank = p.markov_rank;
  return in;
}

template <typename Params>
GrammarMask grammar_mask(const Params& p) {
  return {p.mask, ceil_div(p.vocab_size, 32)};
}

/* Where gated and rnn keep what they compute: f32 [num_reqs, markov_rank] each. */
struct LatentBuffers {
  float* latent;
  float* states[2]; /* rnn */
};

/* Latents of one step into buffers.latent, or into `rows`. */
template <typename T, typename Params>
dspark_status compute_latent(const Params& p,
                             const LatentBuffers& buffers,
                             int32_t step,
                             dspark_stream stream,
                             LatentRows rows = {}) {
  LatentArgs<T> args;
  args.in = head_inputs<T>(p);
  args.proj_weight = static_cast<const T*>(p.proj_weight);
  args.proj_bias = static_cast<const T*>(p.proj_bias);
  args.state_before = step == 0 ? nullptr : buffers.states[(step + 1) % 2];
  args.state_after = buffers.states[step % 2];
  args.latent = buffers.latent;
  args.rows = rows;
  args.step = step;
  const bool vec = p.markov_rank % 8 == 0 && p.hidden_size % 8 == 0 &&
                   aligned_16({p.hidden, p.markov_w1, p.proj_weight});
  const bool rnn = p.head == DSPARK_HEAD_RNN;
  const auto kernel = rnn ? (vec ? latent_kernel<T, true, true> : latent_kernel<T, true, false>)
                          : (vec ? latent_kernel<T, false, true> : latent_kernel<T, false, false>);
  const dim3 grid(ceil_div(p.markov_rank, LatentPolicy::kWarpsPerCta),
                  ceil_div(p.num_reqs, LatentPolicy::kReqsPerCta));
  return launch("latent_kernel", kernel, grid, dim3(LatentPolicy::kNumThreads), 0, stream, args);
}

/* Confidences of all steps, after the last token; nothing without a confidence head. */
template <typename T, typename Params>
dspark_status compute_confidence(const Params& p, dspark_stream stream) {
  if (p.confidence_weight == nullptr) return DSPARK_OK;
  ConfidenceArgs<T> args;
  args.in = head_inputs<T>(p);
  args.weight = static_cast<const T*>(p.confidence_weight);
  args.confidence = p.confidence;
  args.bias = p.confidence_bias;
  args.with_markov = p.confidence_with_markov != 0;
  const bool markov_vec =
      !args.with_markov || (p.markov_rank % 8 == 0 && aligned_16({p.markov_w1}));
  const bool vec =
      p.hidden_size % 8 == 0 && aligned_16({p.hidden, p.confidence_weight}) && markov_vec;
  const int64_t num_rows = static_cast<int64_t>(p.num_reqs) * p.draft_len;
  const auto num_ctas =
      static_cast<uint32_t>(ceil_div<int64_t>(num_rows, LatentPolicy::kWarpsPerCta));
  return launch("confidence_kernel", vec ? confidence_kernel<T, true> : confidence_kernel<T, false>,
                dim3(num_ctas), dim3(LatentPolicy::kNumThreads), 0, stream, args);
}

}  // namespace dspark
