/*
 * A request on the chip: the laws of its rows, and p and q of every draft token.
 *
 * A warp per row merges the row's zones (or takes the filtered law), then a thread per draft gathers
 * its token's two probabilities. What decides about the request reads shared memory alone after that.
 * Limited by latency: three dependent reads from L2.
 */
#pragma once

#include "kernels/verify/race.cuh"

namespace dspark {

struct AcceptPolicy {
  static constexpr int kNumThreads = RacePolicy::kNumThreads;
  static constexpr int kNumWarps = RacePolicy::kNumWarps;
  static constexpr int kMaxCtasPerReq = 8; /* when a rule may need them ... */
  static constexpr int kTargetCtas = 132;  /* ... and as long as they all run at once */
};

/* A committed token and the row whose law decided it; row -1: none. */
struct CommittedToken {
  int32_t row;
  int32_t token;
};

struct AcceptWork {
  const ZoneStats* zones;    /* [all rows, num_zones] */
  const RowLaw* laws;        /* [num_rows] filtered; nullptr: no filters in this call */
  uint32_t* tickets;         /* [num_reqs], 0 */
  uint32_t* row_results;     /* [num_reqs, draft_len + 1] tokens or masses of shared rows */
  CommittedToken* committed; /* [num_reqs, draft_len + 1]; nullptr: no log-probs */
  int32_t ctas_per_req;
};

/* A request on the chip. Index 0 of draft arrays is unused: they go by row. */
struct Window {
  RowLaw target_laws[kMaxRows];
  RowLaw draft_laws[kMaxRows]; /* bad: a point mass */
  int32_t tokens[kMaxRows];
  int32_t parents[kMaxRows];
  int32_t depths[kMaxRows];
  float target_probs[kMaxRows]; /* p of the draft's token under its parent's law */
  float draft_probs[kMaxRows];
  int32_t targets[kMaxRows]; /* what each row says: greedy and coupled */
  float masses[kMaxRows];    /* S_i of the block rule */
  Rejection rejections[kMaxRows];
};

struct RequestView {
  int32_t req;
  int32_t first_row;  /* in target_logits */
  int32_t num_drafts; /* rows 1 .. num_drafts */
  int32_t rule;       /* -1: greedy */
};

__device__ __forceinline__ bool in_vocab(const VerifyInputs& in, int32_t token) {
  return token >= 0 && token < in.vocab_size;
}

__device__ __forceinline__ TargetRow target_row(const RequestView& view, int32_t row) {
  return {static_cast<int64_t>(view.first_row) + row, view.req, row};
}

__device__ __forceinline__ const ZoneStats* zones_of(const VerifyInputs& in,
                                                     const AcceptWork& work,
                                                     int64_t row) {
  return work.zones + row * in.num_zones;
}

/* The law of draft row `index`, by a warp; bad: the draft counts as a point mass. */
__device__ __forceinline__ RowLaw draft_law(const VerifyInputs& in,
                                            const AcceptWork& work,
                                            int64_t index,
                                            float temperature) {
  RowLaw law = {};
  law.bad = 1;
  law.scale = weight_scale(temperature);
  law.threshold = -INFINITY;
  if (in.draft.data != nullptr && in.draft_log_normalizers != nullptr) {
    law.max = in.draft_log_normalizers[index] * temperature;
    law.inv_sum = 1.f;
    law.bad = !(fabsf(law.max) < INFINITY);
  } else if (in.draft.data != nullptr) {
    law = merge_zones(zones_of(in, work, in.num_rows + index), in.num_zones, law.scale);
  } else if (in.candidate_tokens != nullptr) {
    const int32_t* tokens = in.candidate_tokens + index * in.num_candidates;
    const float* logits = in.candidate_logits + index * in.num_candidates;
    float max = -INFINITY;
    bool bad = false;
    for (int32_t i = threadIdx.x % kWarpSize; i < in.num_candidates; i += kWarpSize) {
      if (tokens[i] < 0) continue;
      max = fmaxf(max, logits[i]);
      bad |= !(logits[i] < INFINITY);
    }
    max = warp_reduce(max, MaxOp{});
    law.bad = __ballot_sync(kAllLanes, bad) != 0 || !(max > -INFINITY);
    float sum = 0.f;
    for (int32_t i = threadIdx.x % kWarpSize; i < in.num_candidates; i += kWarpSize) {
      if (tokens[i] >= 0 && law.bad == 0) sum += logit_weight(logits[i], max, law.scale);
    }
    law.max = max;
    law.inv_sum = 1.f / warp_reduce(sum, SumOp{});
  }
  return law;
}

/* Phase 1. All threads take part. */
__device__ __forceinline__ void load_window(const VerifyInputs& in,
                                            const AcceptWork& work,
                                            const RequestView& view,
                                            Window& window) {
  const int warp = threadIdx.x / kWarpSize;
  const bool leads = threadIdx.x % kWarpSize == 0;
  const float scale = target_scale(in, view.req);
  const int64_t first_draft = static_cast<int64_t>(view.req) * in.draft_len;
  for (int32_t row = warp; row <= view.num_drafts; row += AcceptPolicy::kNumWarps) {
    const int64_t index = static_cast<int64_t>(view.first_row) + row;
    RowLaw law = {};
    if (work.laws != nullptr) {
      law = work.laws[index];
    } else {
      law = merge_zones(zones_of(in, work, index), in.num_zones, scale);
    }
    if (leads) window.target_laws[row] = law;
  }
  if (view.rule == DSPARK_RULE_TOKEN || view.rule == DSPARK_RULE_BLOCK) {
    const float temperature = in.temperature[view.req];
    for (int32_t row = 1 + warp; row <= view.num_drafts; row += AcceptPolicy::kNumWarps) {
      const RowLaw law = draft_law(in, work, first_draft + row - 1, temperature);
      if (leads) window.draft_laws[row] = law;
    }
  }
  for (int32_t row = threadIdx.x; row <= view.num_drafts; row += AcceptPolicy::kNumThreads) {
    int32_t depth = 0;
    for (int32_t at = row; at > 0; at = parent_row(in, view.req, at)) ++depth;
    window.depths[row] = depth;
    window.tokens[row] = row > 0 ? draft_token(in, view.req, row) : -1;
    window.parents[row] = row > 0 ? parent_row(in, view.req, row) : -1;
  }
  __syncthreads();
  for (int32_t row = threadIdx.x; row <= view.num_drafts; row += AcceptPolicy::kNumThreads) {
    window.targets[row] = window.target_laws[row].argmax;
    const int32_t token = window.tokens[row];
    float target_prob = 0.f, draft_prob = 1.f;
    if (row > 0 && view.rule >= 0 && view.rule != DSPARK_RULE_COUPLED && in_vocab(in, token)) {
      const int32_t parent = window.parents[row];
      const float logit = shaped_logit(in, target_row(view, parent), token);
      target_prob = probability(window.target_laws[parent], logit);
      draft_prob = draft_probability(in, view.req, row, window.draft_laws[row], token);
    }
    window.target_probs[row] = target_prob;
    window.draft_probs[row] = draft_prob;
  }
  __syncthreads();
}

/* The weights that the next token of `row` is drawn from. */
__device__ __forceinline__ WeightSource weight_source(const VerifyInputs& in,
                                                      const AcceptWork& work,
                                                      const RequestView& view,
                                                      const Window& window,
                                                      int32_t row,
                                                      int32_t num_rejections,
                                                      float share) {
  const TargetRow target = target_row(view, row);
  return {target, window.target_laws[row], zones_of(in, work, target.index),
          share,  window.rejections,       num_rejections};
}

__device__ __forceinline__ DrawKey draw_key(const VerifyInputs& in,
                                            const RequestView& view,
                                            const Window& window,
                                            int32_t row,
                                            uint32_t purpose) {
  return {in.seeds[view.req], in.anchor_positions[view.req] + 1 + window.depths[row], purpose};
}

/* The uniform of the `ordinal`-th decision on a draft behind `row`. */
__device__ __forceinline__ double accept_uniform(const VerifyInputs& in,
                                                 const RequestView& view,
                                                 const Window& window,
                                                 int32_t row,
                                                 int32_t ordinal) {
  const DrawKey key = draw_key(in, view, window, row, DSPARK_PURPOSE_ACCEPT);
  const uint4 words =
      philox_quad(key.seed, static_cast<uint32_t>(ordinal), key.position, key.purpose);
  return uniform_from_word(words.x);
}

/* The next child of `row` after row `after`; 0 when there is none. */
__device__ __forceinline__ int32_t next_child(const RequestView& view,
                                              const Window& window,
                                              int32_t row,
                                              int32_t after) {
  for (int32_t child = max(row, after) + 1; child <= view.num_drafts; ++child) {
    if (window.parents[child] == row) return child;
  }
  return 0;
}

}  // namespace dspark
