/*
 * Acceptance: from the zones of all rows to the accepted drafts and the next token, one CTA per
 * request.
 *
 *   1. window   laws of the rows, p and q of every draft token (window.cuh). What needs no zones is read
 *               before the kernel waits for the one before it, which is of the same call and has waited
 *               for what came before the call.
 *   2. decide   every thread walks the same rows on what lies in shared memory. u q < p is compared in
 *               f64, where u q is exact to 2^-53: q = 0 accepts whenever p > 0, p = 0 never accepts,
 *               q = p always does.
 *   3. draw     the next token of the row where the request stopped (draw.cuh): a zone or two of it.
 *
 * A row behind the stop cannot matter, so that a bad row there is not reported. Two rules need more
 * than the window of one CTA: the coupled rule with filters a race for every row, the block rule with a
 * dense law a pass over every row (with point and sparse laws its residual mass follows from the
 * candidates: ratio * (1 - p of them) + what they leave). Such requests get up to kMaxCtasPerReq CTAs,
 * which deal the rows among them (a row is one CTA's, so their number does not show in the result); the
 * last to finish (a ticket, cleared by zones_kernel) goes on.
 *
 * A residual without mass. A rejection implies p(x) < q(x) for the draft token, and then p > q
 * somewhere else, since both sum to 1. In f32 that "somewhere else" may be lost only when p and q
 * agree to rounding everywhere and u came within rounding of 1 (or when the draft token is outside
 * the vocabulary, so that no q produced it). The draw then falls back to p; to rounding, the two laws
 * have no difference to correct.
 *
 * Bytes: 32 * num_zones per row of statistics and some strips of 256 logits per draw, all from L2. Limited by
 * latency: about three dependent reads.
 */
#pragma once

#include "kernels/verify/window.cuh"

namespace dspark {

struct AcceptOutputs {
  int32_t* num_accepted;
  int32_t* next_tokens;
  int32_t* status;
  int32_t* accept_flags; /* may be nullptr */
};

/* Where a request stopped. */
struct Stop {
  uint64_t kept; /* bit k: draft k was accepted */
  int32_t row;
  bool bad;
  int32_t next; /* -1: to be drawn */
  int32_t
      rejected; /* a draft behind `row` that was turned down; 0: none; kSeveral: Window::source */
  float share;  /* of p of the row in what is drawn from */
};

constexpr int32_t kSeveral = -1;

constexpr Stop kNowhere = {0, 0, false, -1, 0, 1.f};

/* Scratch of one step at a time. */
union AcceptShared {
  EarlyPairs early;
  DrawShared draw;
  RowRaceShared race;
};

__device__ __forceinline__ uint64_t low_bits(int32_t count) {
  return count == 64 ? ~0ull : (1ull << count) - 1;
}

/* Greedy and coupled on a tree. */
__device__ __noinline__ Stop follow_tree(const RequestView& view, const Window& window) {
  Stop stop = kNowhere;
#pragma unroll 1
  while (true) {
    stop.bad = window.target_laws[stop.row].bad != 0;
    if (stop.bad) return stop;
    stop.next = window.targets[stop.row];
    int32_t child = next_child(view, window, stop.row, 0);
#pragma unroll 1
    while (child != 0 && !row_passes(view, window, child)) {
      child = next_child(view, window, stop.row, child);
    }
    if (child == 0) return stop;
    stop.kept |= 1ull << (child - 1);
    stop.row = child;
  }
}

/* A chain up to its first draft that does not pass: all rules but block. By every warp for itself. */
__device__ __forceinline__ Stop follow_chain(const RequestView& view, const Window& window) {
  Stop stop = kNowhere;
  const uint64_t passes =
      ballot_rows(view.num_drafts, [&](int32_t row) { return row_passes(view, window, row); });
  const int first_refused = __ffsll(static_cast<long long>(~passes)) - 1;
  stop.row = first_refused < 0 ? view.num_drafts : min(first_refused, view.num_drafts);
  stop.kept = low_bits(stop.row);
  stop.bad = window.target_laws[stop.row].bad != 0;
  if (view.rule == DSPARK_RULE_TOKEN) {
    stop.rejected = stop.row < view.num_drafts ? stop.row + 1 : 0;
  } else {
    stop.next = window.targets[stop.row];
  }
  return stop;
}

/* What the drafts turned down before leave of `rest` = p of a token, normalised. */
__device__ __noinline__ float rest_of_token(const VerifyInputs& in,
                                            const WeightSource& source,
                                            int32_t num_rejections,
                                            int32_t token,
                                            float rest) {
#pragma unroll 1
  for (int32_t i = 0; i < num_rejections && in_vocab(in, token); ++i) {
    const Rejection& rejection = source.rejections[i];
    const HeldPair held = hold_pair(in, source.row.req, rejection.row);
    const float prob =
        draft_probability(in, source.row.req, rejection.row, rejection.law, held, token);
    rest = fmaxf(rest - prob, 0.f) * rejection.inv_mass;
  }
  return rest;
}

/* The token rule with siblings one after another. All threads take part. */
__device__ __noinline__ void decide_token_tree(const VerifyInputs& in,
                                               const AcceptWork& work,
                                               const RequestView& view,
                                               Window& window,
                                               DrawShared& shared,
                                               Stop& stop) {
  WeightSource& source = window.source;
#pragma unroll 1
  for (int32_t row = 1 + threadIdx.x; row <= view.num_drafts; row += AcceptPolicy::kNumThreads) {
    window.target_probs[row] = target_prob(window, row);
  }
  stand_at(in, work, view, 0, 1.f, 0, window);
  int32_t child = 0;
#pragma unroll 1
  while (true) {
    stop.bad = window.target_laws[stop.row].bad != 0;
    if (stop.bad) return;
    child = next_child(view, window, stop.row, child);
    if (child == 0) return;
    int32_t num_rejections = source.num_rejections;
    float rest = 0.f;
    if (num_rejections == 0) {
      rest = window.target_probs[child];
    } else {
      const auto mass = static_cast<float>(sweep_row(in, source, shared));
      if (mass > 0.f) {
        if (threadIdx.x == 0) source.rejections[num_rejections - 1].inv_mass = 1.f / mass;
      } else {
        --num_rejections; /* rounding has left nothing: the law stays as it was before */
      }
      __syncthreads();
      rest = rest_of_token(in, source, num_rejections, window.tokens[child],
                           window.target_probs[child]);
    }
    const double bar = window.uniforms[child] * static_cast<double>(window.draft_probs[child]);
    __syncthreads(); /* all have read the list of rejections */
    if (bar < static_cast<double>(rest)) {
      stop.kept |= 1ull << (child - 1);
      stop.row = child;
      stand_at(in, work, view, child, 1.f, 0, window);
      child = 0;
    } else if (threadIdx.x == 0) {
      source.rejections[num_rejections] = {child, window.draft_laws[child], 1.f};
      source.num_rejections = num_rejections + 1;
    }
    stop.rejected = child == 0 ? 0 : num_rejections > 0 ? kSeveral : child;
    __syncthreads();
  }
}

/* window.ratios of the block rule (1 for row 0), by the first warp. All threads take part. */
__device__ __forceinline__ void load_ratios(const RequestView& view, Window& window) {
  if (threadIdx.x < kWarpSize) {
    const auto lane = static_cast<int32_t>(threadIdx.x);
    float ratio = 1.f;
    if (lane == 0) window.ratios[0] = ratio;
#pragma unroll 1
    for (int32_t first = 1; first <= view.num_drafts; first += kWarpSize) {
      const int32_t row = first + lane;
      const bool exists = row <= view.num_drafts;
      const float prob = exists ? target_prob(window, row) : 0.f;
      const float draft = exists ? window.draft_probs[row] : 0.f;
#pragma unroll 1
      for (int32_t i = 0; i < min(view.num_drafts + 1 - first, kWarpSize); ++i) {
        const float joint = ratio * __shfl_sync(kAllLanes, prob, i);
        const float least = __shfl_sync(kAllLanes, draft, i);
        ratio = joint >= least ? (joint > 0.f ? 1.f : 0.f) : joint / least;
        if (lane == i) window.ratios[row] = ratio;
      }
    }
  }
  __syncthreads();
}

/* S_i of row i < num_drafts from its few candidates, by a warp. */
__device__ __forceinline__ float candidate_mass(const VerifyInputs& in,
                                                const RequestView& view,
                                                const Window& window,
                                                const EarlyPairs* early,
                                                int32_t row,
                                                float ratio) {
  const RowLaw& target_law = window.target_laws[row];
  const RowLaw& law = window.draft_laws[row + 1];
  const int64_t index = static_cast<int64_t>(view.req) * in.draft_len + row;
  const int32_t num_candidates = law.bad != 0 ? 1 : in.num_candidates;
  float outside = 0.f, left = 0.f; /* p of the candidates, what they leave of ratio * p */
#pragma unroll 1
  for (int32_t i = threadIdx.x % kWarpSize; i < num_candidates; i += kWarpSize) {
    float logit = window.token_logits[row + 1];
    float draft_prob = 1.f;
    if (law.bad == 0 && early != nullptr) {
      const float2 pair = early->pairs[row * in.num_candidates + i];
      logit = pair.x;
      draft_prob = pair.y;
    } else if (law.bad == 0) {
      const int32_t token = in.candidate_tokens[index * in.num_candidates + i];
      draft_prob = probability(law, in.candidate_logits[index * in.num_candidates + i]);
      logit = in_vocab(in, token) ? shaped_logit(in, target_row(view, row), token) : -INFINITY;
    }
    const float prob = probability(target_law, logit);
    outside += prob;
    left += fmaxf(ratio * prob - draft_prob, 0.f);
  }
  outside = 1.f - warp_reduce(outside, SumOp{});
  return ratio * fmaxf(outside, 0.f) + warp_reduce(left, SumOp{});
}

/* window.masses of a law that is not dense. All threads take part. */
__device__ __forceinline__ void load_masses(const VerifyInputs& in,
                                            const RequestView& view,
                                            const EarlyPairs* early,
                                            Window& window) {
#pragma unroll 1
  for (int32_t row = 1 + threadIdx.x / kWarpSize; row < view.num_drafts;
       row += AcceptPolicy::kNumWarps) {
    const float mass = candidate_mass(in, view, window, early, row, window.ratios[row]);
    if (threadIdx.x % kWarpSize == 0) window.masses[row] = mass;
  }
  __syncthreads();
}

/* The block rule on a chain; its ratios and masses are there. By every warp for itself. */
__device__ __forceinline__ Stop decide_block_rule(const RequestView& view, const Window& window) {
  Stop stop = kNowhere;
  stop.bad = window.target_laws[0].bad != 0;
  stop.bad |= ballot_rows(view.num_drafts,
                          [&](int32_t row) { return window.target_laws[row].bad != 0; }) != 0;
  if (stop.bad) return stop;
  const uint64_t passes =
      ballot_rows(view.num_drafts, [&](int32_t row) { /* of prefixes */
                                                      const double ratio = window.ratios[row];
                                                      double accept = ratio;
                                                      if (row < view.num_drafts && ratio < 1.0) {
                                                        const double mass = window.masses[row];
                                                        accept = mass / (mass + (1.0 - ratio));
                                                      }
                                                      return window.uniforms[row] < accept;
      });
  stop.row = 64 - __clzll(static_cast<long long>(passes)); /* the longest that passes */
  stop.kept = low_bits(stop.row);
  stop.rejected = stop.row < view.num_drafts ? stop.row + 1 : 0;
  stop.share = stop.rejected > 0 ? window.ratios[stop.row] : 1.f;
  return stop;
}

/* The rows that this CTA works out for its request; true for the CTA that has them all then. */
__device__ __noinline__ bool share_rows(const VerifyInputs& in,
                                        const AcceptWork& work,
                                        const RequestView& view,
                                        Window& window,
                                        AcceptShared& shared) {
  __shared__ bool is_last;
  uint32_t* results = work.row_results + static_cast<int64_t>(view.req) * (in.draft_len + 1);
  const bool coupled = view.rule == DSPARK_RULE_COUPLED;
  const int32_t num_rows = coupled ? view.num_drafts + 1 : view.num_drafts;
  const int32_t member = static_cast<int32_t>(blockIdx.x) % work.ctas_per_req;
#pragma unroll 1
  for (int32_t row = coupled ? member : member + 1; row < num_rows; row += work.ctas_per_req) {
    uint32_t result;
    if (coupled) {
      const DrawKey key = draw_key(in, view, window, row, DSPARK_PURPOSE_BONUS);
      const TargetRow target = target_row(view, row);
      const Strips* maxima = zones_of(in, work.zones, target.index).maxima;
      result = static_cast<uint32_t>(
          race_row(in, target, window.target_laws[row], maxima, key, shared.race));
    } else {
      stand_at(in, work, view, row, window.ratios[row], row + 1, window);
      result = __float_as_uint(static_cast<float>(sweep_row(in, window.source, shared.draw)));
      __syncthreads(); /* all are done with the source */
    }
    if (threadIdx.x == 0) results[row] = result;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto num_ctas = static_cast<uint32_t>(work.ctas_per_req);
    is_last = atomicAdd(&work.tickets[view.req], 1u) + 1 == num_ctas;
  }
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  /* From L2: other SMs wrote them. */
#pragma unroll 1
  for (int32_t row = threadIdx.x; row < num_rows; row += AcceptPolicy::kNumThreads) {
    if (coupled) {
      window.targets[row] = static_cast<int32_t>(__ldcg(results + row));
    } else {
      window.masses[row] = __uint_as_float(__ldcg(results + row));
    }
  }
  __syncthreads();
  return true;
}

/* Cuts the accepted run at its first stop token. */
__device__ __forceinline__ void cut_at_stop_token(const VerifyInputs& in,
                                                  const RequestView& view,
                                                  const Window& window,
                                                  Stop* stop) {
  if (in.stop_indptr == nullptr || stop->bad) return;
#pragma unroll 1
  for (int32_t row = 1; row <= view.num_drafts; ++row) {
    if ((stop->kept >> (row - 1) & 1) == 0) continue;
#pragma unroll 1
    for (int32_t i = in.stop_indptr[view.req]; i < in.stop_indptr[view.req + 1]; ++i) {
      if (in.stop_tokens[i] != window.tokens[row]) continue;
      stop->kept &= (1ull << (row - 1)) - 1;
      stop->row = window.parents[row];
      stop->next = window.tokens[row];
      return;
    }
  }
}

/* Step 3. All threads take part; the first warp gets it. */
__device__ __forceinline__ int32_t draw_next(const VerifyInputs& in,
                                             const AcceptWork& work,
                                             const RequestView& view,
                                             Window& window,
                                             const Stop& stop,
                                             DrawShared& shared) {
  const DrawKey key = draw_key(in, view, window, stop.row,
                               stop.rejected != 0 ? DSPARK_PURPOSE_RESIDUAL : DSPARK_PURPOSE_BONUS);
  if (stop.rejected == kSeveral) return sweep_and_draw(in, window.source, key, shared);
  const TargetRow row = target_row(view, stop.row);
  const DrawFrom from = {row,
                         &window.target_laws[stop.row],
                         zones_of(in, work.zones, row.index),
                         stop.share,
                         stop.rejected,
                         &window.draft_laws[stop.rejected]};
  const int32_t drawn = draw_by_tries(in, from, key, shared);
  if (drawn != kNoRunner || stop.rejected == 0) return drawn;
  stand_at(in, work, view, stop.row, stop.share, stop.rejected, window);
  return sweep_and_draw(in, window.source, key, shared);
}

__device__ __forceinline__ void write_outputs(const VerifyInputs& in,
                                              const AcceptWork& work,
                                              const RequestView& view,
                                              const Window& window,
                                              const Stop& stop,
                                              const AcceptOutputs& out) {
  const bool settled = view.num_drafts >= 0 && !stop.bad;
  const uint64_t kept = settled ? stop.kept : 0;
  if (out.accept_flags != nullptr) {
#pragma unroll 1
    for (int32_t k = threadIdx.x; k < in.draft_len; k += AcceptPolicy::kNumThreads) {
      out.accept_flags[static_cast<int64_t>(view.req) * in.draft_len + k] = kept >> k & 1;
    }
  }
  if (threadIdx.x != 0) return;
  out.num_accepted[view.req] = __popcll(kept);
  out.next_tokens[view.req] = settled ? stop.next : -1;
  out.status[view.req] = view.num_drafts >= 0 && stop.bad ? 1 : 0;
  if (work.committed == nullptr) return;
  CommittedToken* committed = work.committed + static_cast<int64_t>(view.req) * (in.draft_len + 1);
  int32_t count = 0;
#pragma unroll 1
  for (int32_t row = 1; row <= view.num_drafts; ++row) {
    if ((kept >> (row - 1) & 1) != 0)
      committed[count++] = {window.parents[row], window.tokens[row]};
  }
  if (settled) committed[count++] = {stop.row, stop.next};
#pragma unroll 1
  while (count <= in.draft_len) committed[count++] = {-1, -1};
}

/* Where a request stops, its window known. All threads take part and get it. */
__device__ __forceinline__ Stop decide(const VerifyInputs& in,
                                       const AcceptWork& work,
                                       const RequestView& view,
                                       Window& window,
                                       AcceptShared& shared) {
  Stop stop = kNowhere;
  if (view.rule == DSPARK_RULE_BLOCK) {
    if (in.draft.data == nullptr) {
      load_masses(in, view, has_early_pairs(in, view) ? &shared.early : nullptr, window);
    }
    stop = decide_block_rule(view, window);
  } else if (in.parents == nullptr) {
    stop = follow_chain(view, window);
  } else if (view.rule == DSPARK_RULE_TOKEN) {
    decide_token_tree(in, work, view, window, shared.draw, stop);
  } else {
    stop = follow_tree(view, window);
  }
  cut_at_stop_token(in, view, window, &stop);
  return stop;
}

/* Grid: requests x ctas_per_req, flat. */
__global__ void __launch_bounds__(AcceptPolicy::kNumThreads, 1)
    accept_kernel(const __grid_constant__ VerifyInputs in,
                  const __grid_constant__ AcceptWork work,
                  const __grid_constant__ AcceptOutputs out) {
  __shared__ Window window;
  __shared__ AcceptShared shared;
  fetch_params(in);
  fetch_params(work);
  fetch_params(out);
  RequestView view;
  view.req = static_cast<int32_t>(blockIdx.x) / work.ctas_per_req;
  view.first_row = in.qo_indptr[view.req];
  view.num_drafts = verify_len(in, view.req);
  view.temperature = in.temperature[view.req];
  const int32_t rule = in.rules == nullptr ? DSPARK_RULE_TOKEN : in.rules[view.req];
  view.rule = view.temperature > 0.f ? rule : -1;
  const float scale = scale_of_temperature(in, view.temperature);
  prepare_window(in, work, view, window, shared.early);
  wait_for_prerequisites();
  release_dependents(); /* what comes next waits for the end of this kernel, but may take its place */
  const bool needs_rows = (rule == DSPARK_RULE_BLOCK && in.draft.data != nullptr) ||
                          (rule == DSPARK_RULE_COUPLED && work.laws != nullptr);
  const bool shares = view.num_drafts >= 0 && view.rule >= 0 && needs_rows;
  if (!shares && blockIdx.x % work.ctas_per_req != 0) return; /* whole CTA, as all returns here */

  Stop stop = kNowhere;
  if (view.num_drafts >= 0) {
    finish_window(in, work, view, scale, window);
    if (view.rule == DSPARK_RULE_BLOCK) load_ratios(view, window);
    if (shares && !share_rows(in, work, view, window, shared)) return;
    stop = decide(in, work, view, window, shared);
    if (!stop.bad && stop.next < 0) {
      stop.next = draw_next(in, work, view, window, stop, shared.draw);
    }
  }
  write_outputs(in, work, view, window, stop, out);
}

}  // namespace dspark
