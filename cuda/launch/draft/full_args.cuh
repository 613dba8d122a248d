/* Host side of what every launch over the whole vocabulary is given. */
#pragma once

#include <algorithm>

#include "kernels/draft/full_latents.cuh"
#include "kernels/draft/skip_bound.cuh"
#include "launch/draft/projections.cuh"

namespace dspark {

/* A grid has at most as many CTAs: sizes the workspace without a look at the device. */
constexpr int32_t kMaxShares = 256;
constexpr int32_t kMaxFullDraftLen = 16;

/* Offsets in bytes; what a head does not need has no size. */
struct FullLayout {
  size_t keys;      /* RaceKey [draft_len, num_reqs] */
  size_t arrivals;  /* uint32 [2, batches, draft_len]: of steps, of their latents */
  size_t races_end; /* of both, which start at zero */
  size_t shares;    /* SpanWeight [draft_len, num_reqs, shares]: without skipping */
  size_t seeds;     /* RaceKey [num_reqs, draft_len, kSkipSeeds]: with it */
  size_t projected; /* f32 [num_reqs, draft_len, outputs]: gated and rnn */
  size_t states[2]; /* f32 [num_reqs, markov_rank]: rnn */
  size_t bytes;
};

inline int32_t num_full_spans(const dspark_draft_full_params& p) {
  return ceil_div(p.vocab_size, kSpan);
}

/* Whether rows of W2 that cannot win are passed over. */
inline bool skips_rows(const dspark_draft_full_params& p) {
  return p.w2_bounds != nullptr && p.head != DSPARK_HEAD_NONE;
}

/* What P has for a row: none, gates, or gates, cells and outputs. */
inline int32_t num_projected(const dspark_draft_full_params& p) {
  return !has_latent_kernel(p.head)  ? 0
         : p.head == DSPARK_HEAD_RNN ? 3 * p.markov_rank
                                     : p.markov_rank;
}

/* Counters of steps for all launches: each has the requests of some groups. */
inline size_t num_arrivals(const dspark_draft_full_params& p) {
  return ceil_div<size_t>(p.num_reqs, kGroupReqs) * p.draft_len;
}

inline FullLayout full_layout(const dspark_draft_full_params& p) {
  constexpr size_t kWorkspaceAlignment = 256;
  FullLayout layout = {};
  const auto carve = [&layout](size_t bytes) {
    const size_t offset = layout.bytes;
    layout.bytes += round_up(bytes, kWorkspaceAlignment);
    return offset;
  };
  const size_t num_rows = static_cast<size_t>(p.num_reqs) * p.draft_len;
  const size_t num_shares = std::min(num_full_spans(p), kMaxShares);
  layout.keys = carve(num_rows * sizeof(RaceKey));
  layout.arrivals = carve(2 * num_arrivals(p) * sizeof(uint32_t));
  layout.races_end = layout.bytes;
  layout.shares = carve(skips_rows(p) ? 0 : num_rows * num_shares * sizeof(SpanWeight));
  layout.seeds = carve(skips_rows(p) ? num_rows * kSkipSeeds * sizeof(RaceKey) : 0);
  const size_t state_bytes =
      p.head == DSPARK_HEAD_RNN ? sizeof(float) * p.num_reqs * p.markov_rank : 0;
  layout.projected = carve(num_rows * num_projected(p) * sizeof(float));
  layout.states[0] = carve(state_bytes);
  layout.states[1] = carve(state_bytes);
  return layout;
}

inline dspark_status check_full_rank(int32_t markov_rank) {
  DSPARK_CHECK_ARG(markov_rank <= FullPolicy::kMaxRank && markov_rank % kLowRankStep == 0,
                   DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "markov_rank: expected a multiple of %d up to %d, got %d", kLowRankStep,
                   FullPolicy::kMaxRank, markov_rank);
  return DSPARK_OK;
}

inline dspark_status check_full_sizes(const dspark_draft_full_params& p) {
  DSPARK_TRY(check_head_sizes(p));
  DSPARK_TRY(check_range("draft_len", p.draft_len, 0, kMaxFullDraftLen));
  return p.head == DSPARK_HEAD_NONE ? DSPARK_OK : check_full_rank(p.markov_rank);
}

inline dspark_status check_full_pointers(const dspark_draft_full_params& p) {
  constexpr size_t kRowAlignment = 16;
  DSPARK_TRY(check_pointer("logits", p.logits, p.logits_dtype == DSPARK_DTYPE_F32 ? 4 : 2));
  DSPARK_TRY(check_head_pointers(p));
  DSPARK_TRY(check_pointer("log_normalizers", p.log_normalizers, sizeof(float)));
  DSPARK_TRY(check_aligned("draft_lens", p.draft_lens, sizeof(int32_t)));
  DSPARK_TRY(check_aligned("confidence_logits", p.confidence_logits, sizeof(float)));
  if (p.head == DSPARK_HEAD_NONE) return DSPARK_OK;
  DSPARK_TRY(check_aligned("markov_w1", p.markov_w1, kRowAlignment));
  DSPARK_TRY(check_aligned("markov_w2", p.markov_w2, kRowAlignment));
  DSPARK_TRY(check_pointer("latents", p.latents, kRowAlignment));
  if (skips_rows(p)) {
    DSPARK_TRY(check_aligned("w2_bounds", p.w2_bounds, kRowAlignment));
    DSPARK_TRY(check_pointer("w2_basis", p.w2_basis, kRowAlignment));
    DSPARK_TRY(check_aligned("rows_read", p.rows_read, sizeof(uint64_t)));
  }
  return p.w2_dtype == DSPARK_DTYPE_E4M3 ? check_pointer("w2_scales", p.w2_scales, sizeof(float))
                                         : DSPARK_OK;
}

/* One call: weights of type T, W2 of type W. */
template <typename T, typename W>
class FullCall {
 public:
  FullCall(const dspark_draft_full_params& params, dspark_stream stream)
      : p_(params), stream_(stream), layout_(full_layout(params)) {}

 protected:
  template <typename V>
  V* at(size_t offset) const {
    return reinterpret_cast<V*>(static_cast<char*>(p_.workspace) + offset);
  }

  /* A CTA for each share. */
  template <typename Args>
  dspark_status run_cooperative(const char* name,
                                void (*kernel)(Args),
                                int num_threads,
                                size_t shared_bytes,
                                const FullShape& work,
                                const Args& args) const {
    LaunchShape shape;
    shape.grid = dim3(ceil_div(work.num_spans, work.spans_per_share));
    shape.cta = dim3(num_threads);
    shape.shared_bytes = shared_bytes;
    shape.cooperative = true;
    int max_ctas = 0;
    DSPARK_TRY(resident_ctas(name, kernel, num_threads, shared_bytes, &max_ctas));
    DSPARK_CHECK_ARG(static_cast<int>(shape.grid.x) <= max_ctas, DSPARK_ERROR_UNSUPPORTED_DEVICE,
                     "dspark_draft_full: expected room for %u CTAs at once, found %d", shape.grid.x,
                     max_ctas);
    return launch(name, kernel, shape, stream_, args);
  }

  /* What the hidden states add to gates, for all rows. */
  dspark_status project_hidden() const {
    if (!has_latent_kernel(p_.head)) return DSPARK_OK;
    const bool rnn = p_.head == DSPARK_HEAD_RNN;
    ProjectArgs<T> args = {};
    args.hidden = static_cast<const T*>(p_.hidden);
    args.weight = static_cast<const T*>(p_.proj_weight) + (rnn ? 2 * p_.markov_rank : 0);
    args.bias = static_cast<const T*>(p_.proj_bias);
    args.out = at<float>(layout_.projected);
    args.num_rows = p_.num_reqs * p_.draft_len;
    args.num_outputs = num_projected(p_);
    args.hidden_size = p_.hidden_size;
    args.num_columns = proj_columns();
    args.vec = p_.hidden_size % 8 == 0 && aligned_16({p_.hidden, p_.proj_weight});
    const dim3 grid(ceil_div(args.num_outputs, ProjectPolicy::kOutputs),
                    ceil_div(args.num_rows, ProjectPolicy::kRows));
    return launch("project_kernel", project_kernel<T>, grid, dim3(ProjectPolicy::kNumThreads), 0,
                  stream_, args);
  }

  int32_t proj_columns() const {
    return p_.hidden_size + (p_.head == DSPARK_HEAD_RNN ? 2 : 1) * p_.markov_rank;
  }

  FullArgs<T, W> full_args(int32_t first_req) const {
    FullArgs<T, W> args = {};
    args.in = head_inputs<T>(p_);
    if (p_.head != DSPARK_HEAD_NONE) args.markov_w2 = static_cast<const W*>(p_.markov_w2);
    args.w2_scales = p_.w2_scales;
    args.logits = p_.logits;
    args.f32_logits = p_.logits_dtype == DSPARK_DTYPE_F32;
    args.stride_logits_row = p_.stride_logits_row;
    args.aligned_logits =
        aligned_16({p_.logits}) && p_.stride_logits_row % (args.f32_logits ? 4 : 8) == 0;
    args.draft_lens = p_.draft_lens;
    args.anchor_positions = p_.anchor_positions;
    args.temperature = p_.temperature;
    args.seeds = p_.seeds;
    args.rules = p_.rules;
    args.mask = grammar_mask(p_);
    args.draft_tokens = p_.draft_tokens;
    args.log_normalizers = p_.log_normalizers;
    args.latents = static_cast<typename LowRank<W>::Latent*>(p_.latents);
    if (p_.head == DSPARK_HEAD_NONE) args.in.markov_rank = 0;
    args.vanilla = p_.head == DSPARK_HEAD_VANILLA;
    args.rnn = p_.head == DSPARK_HEAD_RNN;
    if (has_latent_kernel(p_.head)) {
      args.proj_weight = static_cast<const T*>(p_.proj_weight);
      args.proj_columns = proj_columns();
      args.proj_markov = args.rnn ? p_.markov_rank : p_.hidden_size;
      args.proj_vec = p_.hidden_size % 8 == 0 && aligned_16({p_.proj_weight});
      args.projected = at<float>(layout_.projected);
      for (int i = 0; i < 2; ++i) args.states[i] = at<float>(layout_.states[i]);
    }
    args.confidence_weight = static_cast<const T*>(p_.confidence_weight);
    args.confidence = p_.confidence;
    args.confidence_logits = p_.confidence_logits;
    args.confidence_bias = p_.confidence_bias;
    args.confidence_with_markov = p_.confidence_with_markov != 0;
    args.confidence_vec = p_.hidden_size % 8 == 0 && aligned_16({p_.hidden, p_.confidence_weight});
    args.keys = at<RaceKey>(layout_.keys);
    args.arrivals = at<uint32_t>(layout_.arrivals) + first_req / kGroupReqs * p_.draft_len;
    args.latent_arrivals = args.arrivals + num_arrivals(p_);
    args.num_steps = p_.draft_len;
    args.shares = at<SpanWeight>(layout_.shares);
    args.first_req = first_req;
    return args;
  }

  const dspark_draft_full_params& p_;
  dspark_stream stream_;
  FullLayout layout_;
};

}  // namespace dspark
