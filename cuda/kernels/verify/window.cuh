/*
 * A request on the chip: the laws of its rows, and p and q of every draft token.
 *
 * What does not wait for the zones comes first, while they are still read (prepare_window): the drafts,
 * their laws, the target logits of the draft tokens, the uniforms. Then a warp per row merges the row's
 * zones (or takes the filtered law), finds what a greedy or coupled row says, and a thread per draft
 * turns its logit into p (finish_window). What decides about the request reads shared memory alone
 * after that. Limited by latency: two dependent reads from L2.
 */
#pragma once

#include "kernels/verify/race.cuh"

namespace dspark {

struct AcceptPolicy {
  static constexpr int kNumThreads = DrawPolicy::kNumThreads;
  static constexpr int kNumWarps = DrawPolicy::kNumWarps;
  static constexpr int kMaxCtasPerReq = 8; /* when a rule may need them ... */
  static constexpr int kTargetCtas =
      264; /* ... and while those of all requests are about so many */
};

/* A committed token and the row whose law decided it; row -1: none. */
struct CommittedToken {
  int32_t row;
  int32_t token;
};

struct AcceptWork {
  RowZones zones;            /* [num_rows, num_zones] */
  RowZones draft_zones;      /* [num_reqs * draft_len, num_zones] */
  const ZoneRace* races;     /* [num_rows, num_zones] of coupled rows without filters */
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
  double
      uniforms[kMaxRows]; /* of the decision on the draft, when all siblings before were refused */
  float token_logits[kMaxRows]; /* of the draft's token in its parent's row */
  float target_probs[kMaxRows]; /* p of the draft's token under its parent's law */
  float draft_probs[kMaxRows];
  int32_t targets[kMaxRows]; /* what each row says: greedy and coupled */
  float masses[kMaxRows];    /* S_i of the block rule */
  float ratios[kMaxRows];    /* joint, of the block rule */
  WeightSource source;       /* of the row where the request stands, or of a sweep */
};

struct RequestView {
  int32_t req;
  int32_t first_row;  /* in target_logits */
  int32_t num_drafts; /* rows 1 .. num_drafts */
  int32_t rule;       /* -1: greedy */
  float temperature;
};

__device__ __forceinline__ bool in_vocab(const VerifyInputs& in, int32_t token) {
  return token >= 0 && token < in.vocab_size;
}

__device__ __forceinline__ TargetRow target_row(const RequestView& view, int32_t row) {
  return {static_cast<int64_t>(view.first_row) + row, view.req, row};
}

/* The zones of row `row` among those of many. */
__device__ __forceinline__ RowZones zones_of(const VerifyInputs& in,
                                             const RowZones& all,
                                             int64_t row) {
  return {all.maxima + row * in.num_zones, all.sums + row * in.num_zones};
}

/* Draft laws come from zones, too. */
__device__ __forceinline__ bool merges_draft_rows(const VerifyInputs& in) {
  return in.draft.data != nullptr && in.draft_log_normalizers == nullptr;
}

/* The law of sparse pairs, the first of which are held; bad: the draft counts as a point mass. By a warp. */
__device__ __forceinline__ void sparse_law(const VerifyInputs& in,
                                           int64_t index,
                                           const HeldPair& held,
                                           RowLaw& law) {
  const int32_t* tokens = in.candidate_tokens + index * in.num_candidates;
  const float* logits = in.candidate_logits + index * in.num_candidates;
  const int32_t second = static_cast<int32_t>(threadIdx.x % kWarpSize) + kWarpSize;
  float max = held.token >= 0 ? held.logit : -INFINITY; /* NaN if a logit is */
#pragma unroll 1
  for (int32_t i = second; i < in.num_candidates; i += kWarpSize) {
    const float logit = logits[i];
    if (tokens[i] >= 0) max = max_nan(max, logit);
  }
  max = from_ordered(__reduce_max_sync(kAllLanes, ordered(max)));
  law.bad = !(fabsf(max) < INFINITY);
  float sum = 0.f;
  if (law.bad == 0) {
    if (held.token >= 0) sum = logit_weight(held.logit, max, law.scale);
#pragma unroll 1
    for (int32_t i = second; i < in.num_candidates; i += kWarpSize) {
      if (tokens[i] >= 0) sum += logit_weight(logits[i], max, law.scale);
    }
  }
  law.max = max;
  law.inv_sum = 1.f / warp_reduce(sum, SumOp{});
}

/* The law of the draft of `row`, by a warp; bad: the draft counts as a point mass. */
__device__ __forceinline__ RowLaw draft_law(const VerifyInputs& in,
                                            const AcceptWork& work,
                                            const RequestView& view,
                                            const HeldPair& held,
                                            int32_t row) {
  const int64_t index = static_cast<int64_t>(view.req) * in.draft_len + row - 1;
  RowLaw law = {};
  law.bad = 1;
  law.scale = weight_scale(view.temperature);
  law.threshold = -INFINITY;
  if (in.draft.data != nullptr && in.draft_log_normalizers != nullptr) {
    law.max = in.draft_log_normalizers[index] * view.temperature;
    law.inv_sum = 1.f;
    law.bad = !(fabsf(law.max) < INFINITY);
  } else if (in.draft.data != nullptr) {
    law = merge_zones(zones_of(in, work.draft_zones, index), in.num_zones, law.scale);
  } else if (in.candidate_tokens != nullptr) {
    sparse_law(in, index, held, law);
  }
  return law;
}

__device__ __forceinline__ DrawKey draw_key(const VerifyInputs& in,
                                            const RequestView& view,
                                            const Window& window,
                                            int32_t row,
                                            uint32_t purpose) {
  return {in.seeds[view.req], in.anchor_positions[view.req] + 1 + window.depths[row], purpose};
}

/* The uniform of the decision on a draft with `depth` drafts up to it and `ordinal` siblings before. */
__device__ __forceinline__ double accept_uniform(const VerifyInputs& in,
                                                 const RequestView& view,
                                                 int32_t depth,
                                                 int32_t ordinal) {
  const uint4 words = philox_quad(in.seeds[view.req], static_cast<uint32_t>(ordinal),
                                  in.anchor_positions[view.req] + depth, DSPARK_PURPOSE_ACCEPT);
  return uniform_from_word(words.x);
}

__device__ __forceinline__ bool compares_laws(const RequestView& view) {
  return view.rule == DSPARK_RULE_TOKEN || view.rule == DSPARK_RULE_BLOCK;
}

/* Pairs of drafts whose target logits and q are found early: the block rule asks for all of them. */
struct EarlyPairs {
  static constexpr int kMax = 1024;
  float2 pairs[kMax]; /* of candidate i of row r: [(r - 1) * num_candidates + i] */
};

__device__ __forceinline__ bool has_early_pairs(const VerifyInputs& in, const RequestView& view) {
  return view.rule == DSPARK_RULE_BLOCK && in.draft.data == nullptr &&
         in.candidate_tokens != nullptr && in.num_candidates <= kWarpSize &&
         in.draft_len * in.num_candidates <= EarlyPairs::kMax;
}

/* Laws and q of the first `num_drafts` drafts, by the first warps. */
__device__ __forceinline__ void load_draft_laws(const VerifyInputs& in,
                                                const AcceptWork& work,
                                                const RequestView& view,
                                                int32_t num_drafts,
                                                int num_warps,
                                                Window& window,
                                                EarlyPairs* early) {
  const int warp = threadIdx.x / kWarpSize;
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpSize);
#pragma unroll 1
  for (int32_t row = 1 + warp; row <= num_drafts; row += num_warps) {
    const HeldPair held = hold_pair(in, view.req, row);
    const int32_t token = draft_token(in, view.req, row);
    if (!compares_laws(view)) continue;
    float logit = -INFINITY; /* of the pair's token in the target's row */
    if (early != nullptr && row <= view.num_drafts && in_vocab(in, held.token)) {
      logit = shaped_logit(in, target_row(view, row - 1), held.token);
    }
    const RowLaw law = draft_law(in, work, view, held, row);
    const float prob =
        in_vocab(in, token) ? draft_probability(in, view.req, row, law, held, token) : 1.f;
    if (early != nullptr && lane < in.num_candidates) {
      const float draft = law.bad == 0 ? probability(law, held.logit) : 0.f;
      early->pairs[(row - 1) * in.num_candidates + lane] = make_float2(logit, draft);
    }
    if (lane != 0) continue;
    window.draft_laws[row] = law;
    window.draft_probs[row] = prob;
  }
}

/* What is asked of each row, by a warp: its draft, and for rules that compare laws the draft's target
 * logit and the uniform. */
__device__ __forceinline__ void load_rows(const VerifyInputs& in,
                                          const RequestView& view,
                                          Window& window) {
  const bool compares = compares_laws(view);
#pragma unroll 1
  for (auto row = static_cast<int32_t>(threadIdx.x % kWarpSize); row <= view.num_drafts;
       row += kWarpSize) {
    const int32_t parent = row > 0 ? parent_row(in, view.req, row) : -1;
    const int32_t token = row > 0 ? draft_token(in, view.req, row) : -1;
    const int32_t depth = row_depth(in, view.req, row);
    window.depths[row] = depth;
    window.tokens[row] = token;
    window.parents[row] = parent;
    if (!compares || row == 0) continue;
    window.token_logits[row] =
        in_vocab(in, token) ? shaped_logit(in, target_row(view, parent), token) : -INFINITY;
    int32_t ordinal = 0; /* siblings before it */
    if (in.parents != nullptr) {
#pragma unroll 1
      for (int32_t other = parent + 1; other < row; ++other) {
        ordinal += parent_row(in, view.req, other) == parent;
      }
    }
    window.uniforms[row] = accept_uniform(in, view, depth, ordinal);
  }
}

/* What needs no zones: one warp on the rows, the others on the draft laws (those that are merged from
 * zones come with finish_window). All threads take part. */
__device__ __forceinline__ void prepare_window(const VerifyInputs& in,
                                               const AcceptWork& work,
                                               const RequestView& view,
                                               Window& window,
                                               EarlyPairs& early) {
  constexpr int kLawWarps = AcceptPolicy::kNumWarps - 1;
  if (threadIdx.x / kWarpSize == kLawWarps) {
    load_rows(in, view, window);
  } else if (!merges_draft_rows(in)) {
    /* All drafts, verified or not: no load waits for the number of rows. */
    load_draft_laws(in, work, view, in.draft_len, kLawWarps, window,
                    has_early_pairs(in, view) ? &early : nullptr);
  }
}

/* The lowest token of the row's largest logit (or 0), and in `law` whether there is one, by a warp. */
__device__ __forceinline__ int32_t row_argmax(const VerifyInputs& in,
                                              const TargetRow& row,
                                              const Strips* maxima,
                                              RowLaw& law) {
  float max = -INFINITY; /* of this lane's zones, and its first strip; NaN stays */
  int32_t strip = INT32_MAX;
#pragma unroll 5
  for (int32_t zone = threadIdx.x % kWarpSize; zone < in.num_zones; zone += kWarpSize) {
    const Strips own = maxima[zone];
#pragma unroll
    for (int i = 0; i < kStripsPerZone; ++i) {
      if (!(own.of[i] <= max) && !(max != max)) {
        max = own.of[i];
        strip = zone * kStripsPerZone + i;
      }
    }
  }
  const float most = from_ordered(__reduce_max_sync(kAllLanes, ordered(max)));
  strip = __reduce_min_sync(kAllLanes, max == most ? strip : INT32_MAX);
  law = {most, 0.f, 0.f, -INFINITY, 0.f, !(fabsf(most) < INFINITY)};
  if (law.bad != 0) return 0; /* the same for the whole warp */
  float values[kGroup];
  load_target_strip(in, row, strip, values);
  int32_t token = INT32_MAX;
#pragma unroll
  for (int j = kGroup - 1; j >= 0; --j) {
    if (values[j] == most) token = strip_token(strip) + j;
  }
  return __reduce_min_sync(kAllLanes, token);
}

/* The winner of a row that has raced zone by zone, by a warp. */
__device__ __forceinline__ int32_t row_race(const VerifyInputs& in, const ZoneRace* races) {
  constexpr int kAtOnce = 5;
  Indexed best = empty_race();
#pragma unroll 1
  for (int32_t first = threadIdx.x % kWarpSize; first < in.num_zones;
       first += kAtOnce * kWarpSize) {
    ZoneRace held[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t zone = first + i * kWarpSize;
      held[i] = zone < in.num_zones ? races[zone] : ZoneRace{-INFINITY, kNoRunner};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      best = ArgmaxOp{}(best, Indexed{held[i].score, held[i].token});
    }
  }
  const int32_t most = __reduce_max_sync(kAllLanes, ordered(best.value));
  return __reduce_min_sync(kAllLanes, ordered(best.value) == most ? best.index : kNoRunner);
}

/* Draft laws that come from zones: out of line, where it costs the other laws no registers. */
__device__ __noinline__ void merge_draft_laws(const VerifyInputs& in,
                                              const AcceptWork& work,
                                              const RequestView& view,
                                              Window& window) {
  load_draft_laws(in, work, view, view.num_drafts, AcceptPolicy::kNumWarps, window, nullptr);
}

/* Bits of the rows 1 .. num_drafts that pass(row), in every lane. By a warp. */
template <typename F>
__device__ __forceinline__ uint64_t ballot_rows(int32_t num_drafts, F&& pass) {
  uint64_t bits = 0;
#pragma unroll 1
  for (int32_t first = 1; first <= num_drafts; first += kWarpSize) {
    const int32_t row = first + static_cast<int32_t>(threadIdx.x % kWarpSize);
    const uint64_t own = __ballot_sync(kAllLanes, row <= num_drafts && pass(row));
    bits |= own << (first - 1);
  }
  return bits;
}

/* p of the draft of `row` under its parent's law. */
__device__ __forceinline__ float target_prob(const Window& window, int32_t row) {
  return probability(window.target_laws[window.parents[row]], window.token_logits[row]);
}

/* Whether a draft passes when no sibling was refused before it: token, greedy and coupled. */
__device__ __forceinline__ bool row_passes(const RequestView& view,
                                           const Window& window,
                                           int32_t row) {
  if (!compares_laws(view)) {
    const int32_t says = window.targets[window.parents[row]];
    return says >= 0 && window.tokens[row] == says;
  }
  const double bar = window.uniforms[row] * static_cast<double>(window.draft_probs[row]);
  return bar < static_cast<double>(target_prob(window, row));
}

/* The laws, from the zones. All threads take part. */
__device__ __forceinline__ void finish_window(const VerifyInputs& in,
                                              const AcceptWork& work,
                                              const RequestView& view,
                                              float scale,
                                              Window& window) {
  const int warp = threadIdx.x / kWarpSize;
  const bool leads = threadIdx.x % kWarpSize == 0;
#pragma unroll 1
  for (int32_t row = warp; row <= view.num_drafts; row += AcceptPolicy::kNumWarps) {
    const TargetRow target = target_row(view, row);
    const RowZones zones = zones_of(in, work.zones, target.index);
    RowLaw law;
    int32_t says = -1;
    if (view.rule < 0) {
      says = row_argmax(in, target, zones.maxima, law);
    } else if (work.laws != nullptr) {
      law = work.laws[target.index];
    } else {
      law = merge_zones(zones, in.num_zones, scale);
      if (view.rule == DSPARK_RULE_COUPLED) {
        says = row_race(in, work.races + target.index * in.num_zones);
      }
    }
    if (!leads) continue;
    window.target_laws[row] = law;
    window.targets[row] = law.bad == 0 ? says : -1;
  }
  if (compares_laws(view) && merges_draft_rows(in)) merge_draft_laws(in, work, view, window);
  __syncthreads();
}

/* The request comes to `row`: window.source is p there, times `share`, less the draft of `rejected` if
 * that is not 0. All threads take part. */
__device__ __forceinline__ void stand_at(const VerifyInputs& in,
                                         const AcceptWork& work,
                                         const RequestView& view,
                                         int32_t row,
                                         float share,
                                         int32_t rejected,
                                         Window& window) {
  if (threadIdx.x == 0) {
    WeightSource& source = window.source;
    source.row = target_row(view, row);
    source.law = window.target_laws[row];
    source.zones = zones_of(in, work.zones, source.row.index);
    source.share = share;
    source.num_rejections = rejected > 0;
    if (rejected > 0) source.rejections[0] = {rejected, window.draft_laws[rejected], 1.f};
  }
  __syncthreads();
}

/* The next child of `row` after row `after`; 0 when there is none. */
__device__ __forceinline__ int32_t next_child(const RequestView& view,
                                              const Window& window,
                                              int32_t row,
                                              int32_t after) {
#pragma unroll 1
  for (int32_t child = max(row, after) + 1; child <= view.num_drafts; ++child) {
    if (window.parents[child] == row) return child;
  }
  return 0;
}

}  // namespace dspark
