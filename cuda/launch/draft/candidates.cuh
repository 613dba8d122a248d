/* Host side of the candidate form of the draft head. */
#pragma once

#include <algorithm>

#include "kernels/draft/cluster_walk.cuh"
#include "launch/draft/projections.cuh"

namespace dspark {

/* Offsets in bytes; what a head does not need has no size. */
struct CandidatesLayout {
  size_t zone_tops; /* uint32 [rows, zones] */
  size_t keys;      /* RaceKey [rows, num_top] */
  size_t latent;    /* f32 [num_reqs, markov_rank]: gated, rnn */
  size_t states[2]; /* the same: rnn */
  size_t bytes;
};

constexpr int32_t kMaxBigrams = 256;

inline int32_t num_top_zones(const dspark_draft_candidates_params& p) {
  return ceil_div(p.vocab_size, TopPolicy::kZoneTokens);
}

inline int32_t num_top_parts(const dspark_draft_candidates_params& p) {
  return ceil_div(p.vocab_size, TopPolicy::kCtaTokens);
}

inline CandidatesLayout candidates_layout(const dspark_draft_candidates_params& p) {
  constexpr size_t kWorkspaceAlignment = 256;
  CandidatesLayout layout = {};
  const auto carve = [&layout](size_t bytes) {
    const size_t offset = layout.bytes;
    layout.bytes += round_up(bytes, kWorkspaceAlignment);
    return offset;
  };
  const size_t num_rows = static_cast<size_t>(p.num_reqs) * p.draft_len;
  const size_t latent_bytes =
      has_latent_kernel(p.head) ? sizeof(float) * p.num_reqs * p.markov_rank : 0;
  const size_t state_bytes = p.head == DSPARK_HEAD_RNN ? latent_bytes : 0;
  layout.zone_tops = carve(num_rows * num_top_zones(p) * sizeof(uint32_t));
  layout.keys = carve(num_rows * p.num_top * sizeof(RaceKey));
  layout.latent = carve(latent_bytes);
  layout.states[0] = carve(state_bytes);
  layout.states[1] = carve(state_bytes);
  return layout;
}

inline dspark_status check_candidates_sizes(const dspark_draft_candidates_params& p) {
  DSPARK_TRY(check_head_sizes(p));
  DSPARK_TRY(check_range("num_top", p.num_top, 1, TopPolicy::kMaxTop));
  DSPARK_TRY(check_range("num_bigram", p.num_bigram, 0, kMaxBigrams));
  DSPARK_CHECK_ARG(p.vocab_size <= TopPolicy::kMaxVocab, DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "vocab_size: expected at most %d, got %d", TopPolicy::kMaxVocab, p.vocab_size);
  const int64_t num_rows = static_cast<int64_t>(p.num_reqs) * p.draft_len;
  DSPARK_CHECK_ARG(num_rows <= INT32_MAX / num_top_parts(p), DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "num_reqs * draft_len: expected at most %d rows of %d tokens, got %lld",
                   INT32_MAX / num_top_parts(p), p.vocab_size, static_cast<long long>(num_rows));
  return DSPARK_OK;
}

inline dspark_status check_candidates_pointers(const dspark_draft_candidates_params& p) {
  const size_t logit_size = p.logits_dtype == DSPARK_DTYPE_F32 ? sizeof(float) : 2;
  DSPARK_TRY(check_pointer("logits", p.logits, logit_size));
  DSPARK_TRY(check_head_pointers(p));
  DSPARK_TRY(check_pointer("candidate_tokens", p.candidate_tokens, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("candidate_logits", p.candidate_logits, sizeof(float)));
  if (p.num_bigram == 0) return DSPARK_OK;
  DSPARK_CHECK_ARG(p.head != DSPARK_HEAD_NONE, DSPARK_ERROR_INVALID_ARGUMENT,
                   "num_bigram: expected 0 with DSPARK_HEAD_NONE, got %d", p.num_bigram);
  return check_pointer("bigram_tokens", p.bigram_tokens, sizeof(int32_t));
}

/* The launches of one call: weights of type T, base logits of type U. */
template <typename T, typename U>
class DraftCandidates {
 public:
  DraftCandidates(const dspark_draft_candidates_params& params, dspark_stream stream)
      : p_(params), stream_(stream), layout_(candidates_layout(params)) {}

  dspark_status run() const {
    bool in_clusters = false;
    DSPARK_TRY(walks_in_clusters(&in_clusters));
    if (in_clusters) {
      DSPARK_TRY(walk_in_clusters());
      return compute_confidence<T>(p_, stream_);
    }
    DSPARK_TRY(find_top());
    if (has_latent_kernel(p_.head)) {
      const LatentBuffers buffers = {at<float>(layout_.latent),
                                     {at<float>(layout_.states[0]), at<float>(layout_.states[1])}};
      for (int32_t step = 0; step < p_.draft_len; ++step) {
        DSPARK_TRY(compute_latent<T>(p_, buffers, step, stream_));
        DSPARK_TRY(walk(step, 1, buffers.latent));
      }
    } else {
      DSPARK_TRY(walk(0, p_.draft_len, nullptr));
    }
    return compute_confidence<T>(p_, stream_);
  }

 private:
  template <typename V>
  V* at(size_t offset) const {
    return reinterpret_cast<V*>(static_cast<char*>(p_.workspace) + offset);
  }

  bool aligned_rows() const {
    return aligned_16({p_.logits}) && p_.stride_logits_row * sizeof(U) % 16 == 0;
  }

  TopArgs<U> top_args() const {
    TopArgs<U> args = {};
    args.logits = static_cast<const U*>(p_.logits);
    args.zone_tops = at<uint32_t>(layout_.zone_tops);
    args.keys = at<RaceKey>(layout_.keys);
    args.mask = grammar_mask(p_);
    if (p_.head != DSPARK_HEAD_NONE) {
      args.ahead[0].weights = p_.markov_w1;
      args.ahead[1].weights = p_.markov_w2;
      for (CandidateRows& rows : args.ahead) {
        rows.row_bytes = p_.markov_rank * static_cast<int32_t>(sizeof(T));
      }
    }
    args.stride_row = p_.stride_logits_row;
    args.vocab_size = p_.vocab_size;
    args.num_zones = num_top_zones(p_);
    args.num_parts = num_top_parts(p_);
    args.num_top = p_.num_top;
    args.aligned_rows = aligned_rows();
    return args;
  }

  uint32_t num_rows() const { return static_cast<uint32_t>(p_.num_reqs) * p_.draft_len; }

  dspark_status find_zone_tops(const TopArgs<U>& args) const {
    return launch("zone_top_kernel", zone_top_kernel<U>, dim3(num_rows() * args.num_parts),
                  dim3(TopPolicy::kNumThreads), 0, stream_, args);
  }

  dspark_status find_top() const {
    const TopArgs<U> args = top_args();
    DSPARK_TRY(find_zone_tops(args));
    return launch_dependent("select_top_kernel", select_top_kernel<U>, dim3(num_rows()),
                            dim3(TopPolicy::kNumThreads), stream_, args);
  }

  /* Whether cluster_walk_kernel is for this call, which does not depend on the number of requests. */
  dspark_status walks_in_clusters(bool* in_clusters) const {
    constexpr int kFirstBinaryWithClusters = 90;
    const bool biased = p_.head != DSPARK_HEAD_NONE;
    *in_clusters = !has_latent_kernel(p_.head) && p_.num_bigram == 0 &&
                   (!biased || (p_.markov_rank % ClusterPolicy::kPairColumns == 0 &&
                                p_.markov_rank <= ClusterPolicy::kMaxRank &&
                                aligned_16({p_.markov_w1, p_.markov_w2})));
    if (!*in_clusters) return DSPARK_OK;
    int shared_bytes = 0;
    cudaFuncAttributes loaded;
    const auto* kernel = reinterpret_cast<const void*>(cluster_walk_kernel<T, U, false>);
    DSPARK_TRY(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes));
    DSPARK_TRY(check_cuda("cluster_walk_kernel", cudaFuncGetAttributes(&loaded, kernel)));
    *in_clusters = loaded.binaryVersion >= kFirstBinaryWithClusters &&
                   cluster_shared_bytes(p_.num_top, p_.draft_len, false) + loaded.sharedSizeBytes <=
                       static_cast<size_t>(shared_bytes);
    return DSPARK_OK;
  }

  /* Where each SM has a row or several, their CTAs read them while others judge and walk. Very few rows are
   * better spread over all SMs first (1 request: 21 us against 23), and so are rows that some SMs would have two
   * of (16 requests: 38 against 40; but 8: 30 against 26, 32: 56 against 50, 128: 167 against 141), and many of
   * f32 (64: 135 against 144). */
  dspark_status walk_in_clusters() const {
    constexpr int32_t kFewReqs = 16; /* whose candidates' W1 rows are worth asking for */
    const int64_t num_rows = static_cast<int64_t>(p_.num_reqs) * p_.draft_len;
    const bool zoned =
        num_rows <= 14 || (num_rows > 64 && (num_rows <= 128 || sizeof(U) == sizeof(float)));
    WalkArgs<T, U> args = walk_args(0, p_.draft_len, nullptr);
    args.num_ctas = std::min(p_.draft_len, ClusterPolicy::kMaxCtas);
    args.aligned_rows = aligned_rows();
    args.ask_for_w1 = p_.num_reqs <= kFewReqs;
    args.zone_tops = at<uint32_t>(layout_.zone_tops);
    args.num_zones = num_top_zones(p_);
    if (zoned) DSPARK_TRY(find_zone_tops(top_args()));
    LaunchShape shape;
    shape.grid = dim3(static_cast<uint32_t>(p_.num_reqs) * args.num_ctas);
    shape.cta = dim3(RowPolicy::kNumThreads);
    shape.shared_bytes = cluster_shared_bytes(p_.num_top, p_.draft_len, zoned);
    shape.cluster_ctas = static_cast<uint32_t>(args.num_ctas);
    shape.dependent = zoned;
    return launch("cluster_walk_kernel",
                  zoned ? cluster_walk_kernel<T, U, true> : cluster_walk_kernel<T, U, false>, shape,
                  stream_, args);
  }

  WalkArgs<T, U> walk_args(int32_t first_step, int32_t num_steps, const float* latent) const {
    WalkArgs<T, U> args = {};
    args.in = head_inputs<T>(p_);
    args.markov_w2 = p_.head == DSPARK_HEAD_NONE ? nullptr : static_cast<const T*>(p_.markov_w2);
    args.latent = latent;
    args.logits = static_cast<const U*>(p_.logits);
    args.top = at<RaceKey>(layout_.keys);
    args.bigrams = p_.bigram_tokens;
    args.anchor_positions = p_.anchor_positions;
    args.temperature = p_.temperature;
    args.seeds = p_.seeds;
    args.rules = p_.rules;
    args.top_k = p_.top_k;
    args.top_p = p_.top_p;
    args.min_p = p_.min_p;
    args.draft_tokens = p_.draft_tokens;
    args.candidate_tokens = p_.candidate_tokens;
    args.candidate_logits = p_.candidate_logits;
    args.mask = grammar_mask(p_);
    args.stride_logits_row = p_.stride_logits_row;
    args.num_top = p_.num_top;
    args.num_bigram = p_.num_bigram;
    args.first_step = first_step;
    args.num_steps = num_steps;
    return args;
  }

  dspark_status walk(int32_t first_step, int32_t num_steps, const float* latent) const {
    const WalkArgs<T, U> args = walk_args(first_step, num_steps, latent);
    LaunchShape shape;
    shape.grid = dim3(p_.num_reqs);
    shape.cta = dim3(WalkPolicy::kNumThreads);
    shape.shared_bytes = walk_shared_bytes(p_.markov_rank, p_.num_top + p_.num_bigram, num_steps);
    shape.dependent = latent == nullptr;
    const bool vec = p_.markov_rank % 8 == 0 && aligned_16({p_.markov_w2});
    const bool ahead = vec && args.markov_w2 != nullptr && p_.markov_rank <= WalkPolicy::kAheadRank;
    return launch("walk_kernel",
                  ahead ? walk_kernel<T, U, true, true>
                        : (vec ? walk_kernel<T, U, true, false> : walk_kernel<T, U, false, false>),
                  shape, stream_, args);
  }

  const dspark_draft_candidates_params& p_;
  dspark_stream stream_;
  CandidatesLayout layout_;
};

}  // namespace dspark
