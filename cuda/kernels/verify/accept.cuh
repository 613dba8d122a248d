/*
 * Acceptance by the token rule, given the laws of all rows, and the draw of the next token.
 *
 *   accept x_k      iff u q(x_k) < p(x_k)          T = 0: iff x_k = argmax
 *   recovered token  ~  normalise(max(p - q, 0))   at the first rejection
 *   bonus token      ~  p of the last row          when all drafts are kept
 *
 * decide_kernel: a warp per request, a lane per row: all rows are judged at once and a ballot finds
 * the first that stops (rejected, last, or no law). A row behind it cannot matter, so that a bad
 * row there is not reported. u q < p is compared in f64, where u q is exact to 2^-53: q = 0 accepts
 * whenever p > 0, p = 0 never accepts, q = p always does.
 *
 * draw_kernel: the race of common/philox.cuh over the one row where a request stopped, cut into
 * chunks by vocab_size alone. A bonus token races logits (l - T log E over the kept tokens: no
 * normaliser needed), a recovered token races weights (max(p - q, 0) / E).
 *
 * finish_kernel: a warp per request merges its chunks.
 *
 * A residual without mass. A rejection implies p(x) < q(x) for the draft token, and then p > q
 * somewhere else, since both sum to 1. In f32 that "somewhere else" may be lost only when p and q
 * agree to rounding everywhere and u came within rounding of 1 (or when the draft token is outside
 * the vocabulary, so that no q produced it). The draw then falls back to p, raced with the same
 * noise beside the residual; to rounding, the two laws have no difference to correct.
 *
 * Bytes: 4 * vocab_size per request for the draw (8 with a draft law), from L2. About 60 flops and
 * a quarter Philox call per token; limited by issue at large batch, by latency at small.
 */
#pragma once

#include "common/philox.cuh"
#include "dspark.h"
#include "kernels/verify/laws.cuh"

namespace dspark {

struct AcceptPolicy {
  static constexpr int kWarpsPerCta = 4; /* decide_kernel, finish_kernel: a warp per request */
  static constexpr int kNumThreads = kWarpsPerCta * kWarpSize;
};

struct DrawPolicy {
  static constexpr int kNumThreads = StatsPolicy::kNumThreads;
  static constexpr int kQuadsPerThread = StatsPolicy::kQuadsPerThread;
};

/* How the next token of a request comes about. */
enum class Draw : int32_t {
  kNone,     /* decided already (greedy, bad or no rows) */
  kResidual, /* from max(p - q, 0) of `step` */
  kBonus,    /* from p of `step` */
};

struct Decision {
  Draw draw;
  int32_t step; /* row of the request, 0-based */
};

/* The winners of one chunk; `fallback` races p beside a residual. */
struct ChunkWinners {
  Indexed winner;
  Indexed fallback;
};

struct AcceptOutputs {
  int32_t* num_accepted;
  int32_t* next_tokens;
  int32_t* status;
};

/* What row k of a request says about draft x_{k+1}. */
enum class Verdict { kAccept, kReject, kBad };

__device__ __forceinline__ bool in_vocab(const VerifyInputs& in, int32_t token) {
  return token >= 0 && token < in.vocab_size;
}

/* The token rule for temperature > 0. A token outside the vocabulary has p = 0. */
__device__ __forceinline__ Verdict judge_sampled(
    const VerifyInputs& in, const RowLaw* laws, int32_t req, int32_t k, float temperature) {
  const int64_t target_row = static_cast<int64_t>(in.qo_indptr[req]) + k;
  const int64_t draft_row = static_cast<int64_t>(req) * in.draft_len + k;
  const RowLaw target_law = laws[target_row];
  if (target_law.bad != 0) return Verdict::kBad;
  const bool point_mass = in.draft_logits == nullptr;
  RowLaw draft_law = {};
  if (!point_mass) {
    draft_law = laws[in.num_rows + draft_row];
    if (draft_law.bad != 0) return Verdict::kBad;
  }
  const int32_t token = in.draft_tokens[draft_row];
  if (!in_vocab(in, token)) return Verdict::kReject;

  const float inv_temperature = inverse_temperature(temperature);
  const float target_prob = probability(
      target_law, in.target_logits[target_row * in.stride_target_row + token], inv_temperature);
  const float draft_prob =
      point_mass ? 1.f
                 : probability(draft_law, in.draft_logits[draft_row * in.stride_draft_row + token],
                               inv_temperature);
  const uint4 noise =
      philox_quad(in.seeds[req], 0, in.anchor_positions[req] + 1 + k, DSPARK_PURPOSE_ACCEPT);
  const double threshold = uniform_from_word(noise.x) * static_cast<double>(draft_prob);
  return threshold < static_cast<double>(target_prob) ? Verdict::kAccept : Verdict::kReject;
}

__device__ __forceinline__ Verdict
judge(const VerifyInputs& in, const RowLaw* laws, int32_t req, int32_t k, float temperature) {
  if (temperature > 0.f) return judge_sampled(in, laws, req, k, temperature);
  const RowLaw& law = laws[in.qo_indptr[req] + k];
  if (law.bad != 0) return Verdict::kBad;
  const int32_t token = in.draft_tokens[static_cast<int64_t>(req) * in.draft_len + k];
  return token == law.argmax ? Verdict::kAccept : Verdict::kReject;
}

/* The first row that stops request `req`, found by a warp; `verdict` is what it said (kAccept for
 * the row behind the last draft). */
__device__ __forceinline__ int32_t find_stop(const VerifyInputs& in,
                                             const RowLaw* laws,
                                             int32_t req,
                                             int32_t num_drafts,
                                             float temperature,
                                             Verdict* verdict) {
  for (int32_t first = 0; first < num_drafts; first += kWarpSize) {
    const int32_t k = first + static_cast<int32_t>(threadIdx.x % kWarpSize);
    Verdict own = Verdict::kAccept;
    if (k < num_drafts) own = judge(in, laws, req, k, temperature);
    const uint32_t stops = __ballot_sync(kAllLanes, own != Verdict::kAccept);
    if (stops != 0) {
      const int lane = __ffs(static_cast<int>(stops)) - 1;
      *verdict = static_cast<Verdict>(__shfl_sync(kAllLanes, static_cast<int>(own), lane));
      return first + lane;
    }
  }
  const bool bad = laws[in.qo_indptr[req] + num_drafts].bad != 0;
  *verdict = bad ? Verdict::kBad : Verdict::kAccept;
  return num_drafts;
}

__global__ void __launch_bounds__(AcceptPolicy::kNumThreads)
    decide_kernel(VerifyInputs in, const RowLaw* laws, Decision* decisions, AcceptOutputs out) {
  const int32_t req = blockIdx.x * AcceptPolicy::kWarpsPerCta + threadIdx.x / kWarpSize;
  if (req >= in.num_reqs) return; /* whole warps */
  const int32_t num_drafts = verify_len(in, req);
  const float temperature = in.temperature[req];
  Verdict verdict = Verdict::kBad;
  int32_t stop = 0;
  if (num_drafts >= 0) stop = find_stop(in, laws, req, num_drafts, temperature, &verdict);
  if (threadIdx.x % kWarpSize != 0) return;

  const bool settled = num_drafts < 0 || verdict == Verdict::kBad;
  Decision decision = {Draw::kNone, stop};
  int32_t next = -1; /* replaced by finish_kernel when there is something to draw */
  if (!settled && temperature > 0.f) {
    decision.draw = verdict == Verdict::kReject ? Draw::kResidual : Draw::kBonus;
  } else if (!settled) {
    next = laws[in.qo_indptr[req] + stop].argmax;
  }
  decisions[req] = decision;
  out.num_accepted[req] = settled ? 0 : stop;
  out.next_tokens[req] = next;
  out.status[req] = num_drafts >= 0 && settled ? 1 : 0;
}

/* One request's draw, the same for all of its chunks. */
struct DrawRow {
  const float* target;
  const float* draft; /* residual against a draft law; else nullptr */
  RowLaw target_law;
  RowLaw draft_law;
  float temperature;
  uint64_t seed;
  int32_t position;
  int32_t point_token; /* residual against a point mass: its token; else -1 */
  Draw draw;
};

__device__ __forceinline__ DrawRow find_draw_row(const VerifyInputs& in,
                                                 const RowLaw* laws,
                                                 int32_t req,
                                                 Decision decision) {
  const int64_t target_row = static_cast<int64_t>(in.qo_indptr[req]) + decision.step;
  const int64_t draft_row = static_cast<int64_t>(req) * in.draft_len + decision.step;
  const bool residual = decision.draw == Draw::kResidual;
  DrawRow row = {};
  row.target = in.target_logits + target_row * in.stride_target_row;
  row.target_law = laws[target_row];
  row.temperature = in.temperature[req];
  row.seed = in.seeds[req];
  row.position = in.anchor_positions[req] + 1 + decision.step;
  row.point_token = -1;
  row.draw = decision.draw;
  if (residual && in.draft_logits != nullptr) {
    row.draft = in.draft_logits + draft_row * in.stride_draft_row;
    row.draft_law = laws[in.num_rows + draft_row];
  } else if (residual) {
    row.point_token = in.draft_tokens[draft_row];
  }
  return row;
}

/* Lets the four tokens of a quad run. */
__device__ __forceinline__ void draw_quad(
    const VerifyInputs& in, const DrawRow& row, int32_t quad, Indexed& best, Indexed& fallback) {
  const float4 target = load_quad(row.target, quad, in.vocab_size, in.aligned_target, -INFINITY);
  float4 draft = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
  if (row.draft != nullptr) {
    draft = load_quad(row.draft, quad, in.vocab_size, in.aligned_draft, -INFINITY);
  }
  const uint32_t purpose =
      row.draw == Draw::kResidual ? DSPARK_PURPOSE_RESIDUAL : DSPARK_PURPOSE_BONUS;
  const uint4 noise = philox_quad(row.seed, static_cast<uint32_t>(quad), row.position, purpose);
  const float target_logits[kQuad] = {target.x, target.y, target.z, target.w};
  const float draft_logits[kQuad] = {draft.x, draft.y, draft.z, draft.w};
  const uint32_t words[kQuad] = {noise.x, noise.y, noise.z, noise.w};
  const float inv_temperature = inverse_temperature(row.temperature);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const int32_t token = quad * kQuad + i; /* meaningless past the vocabulary, where p is 0 */
    const float target_prob = probability(row.target_law, target_logits[i], inv_temperature);
    if (!(target_prob > 0.f)) continue;
    const float exponential = exponential_from_word(words[i]);
    if (row.draw == Draw::kBonus) {
      race_step(best, race_score_logit(target_logits[i], row.temperature, exponential), token);
      continue;
    }
    float draft_prob = token == row.point_token ? 1.f : 0.f;
    if (row.draft != nullptr) {
      draft_prob = probability(row.draft_law, draft_logits[i], inv_temperature);
    }
    race_step(fallback, race_score_weight(target_prob, exponential), token);
    if (target_prob > draft_prob) {
      race_step(best, race_score_weight(target_prob - draft_prob, exponential), token);
    }
  }
}

/* Grid: requests x num_chunks, flat. Chunks of requests with nothing to draw are not written. */
__global__ void __launch_bounds__(DrawPolicy::kNumThreads) draw_kernel(VerifyInputs in,
                                                                       const RowLaw* laws,
                                                                       const Decision* decisions,
                                                                       ChunkWinners* winners) {
  __shared__ Indexed scratch[DrawPolicy::kNumThreads / kWarpSize];
  const int32_t req = blockIdx.x / in.num_chunks;
  const int32_t chunk = blockIdx.x % in.num_chunks;
  const Decision decision = decisions[req];
  if (decision.draw == Draw::kNone) return; /* whole CTA */
  const DrawRow row = find_draw_row(in, laws, req, decision);

  Indexed best = empty_race();
  Indexed fallback = empty_race();
#pragma unroll 1
  for (int i = 0; i < DrawPolicy::kQuadsPerThread; ++i) {
    const int32_t quad =
        chunk * StatsPolicy::kQuadsPerCta + i * DrawPolicy::kNumThreads + threadIdx.x;
    if (static_cast<int64_t>(quad) * kQuad >= in.vocab_size) break;
    draw_quad(in, row, quad, best, fallback);
  }
  best = cta_reduce<DrawPolicy::kNumThreads>(best, ArgmaxOp{}, empty_race(), scratch);
  fallback = cta_reduce<DrawPolicy::kNumThreads>(fallback, ArgmaxOp{}, empty_race(), scratch);
  if (threadIdx.x == 0) winners[blockIdx.x] = {best, fallback};
}

/* The token of each request that drew. */
__global__ void __launch_bounds__(AcceptPolicy::kNumThreads)
    finish_draw_kernel(int32_t num_reqs,
                       int32_t num_chunks,
                       const Decision* decisions,
                       const ChunkWinners* winners,
                       int32_t* next_tokens) {
  const int32_t req = blockIdx.x * AcceptPolicy::kWarpsPerCta + threadIdx.x / kWarpSize;
  if (req >= num_reqs || decisions[req].draw == Draw::kNone) return; /* whole warps */
  const int lane = threadIdx.x % kWarpSize;
  const ChunkWinners* row = winners + static_cast<int64_t>(req) * num_chunks;
  Indexed best = empty_race();
  Indexed fallback = empty_race();
  for (int32_t chunk = lane; chunk < num_chunks; chunk += kWarpSize) {
    best = ArgmaxOp{}(best, row[chunk].winner);
    fallback = ArgmaxOp{}(fallback, row[chunk].fallback);
  }
  best = warp_reduce(best, ArgmaxOp{});
  fallback = warp_reduce(fallback, ArgmaxOp{});
  if (lane == 0) next_tokens[req] = best.index != kNoRunner ? best.index : fallback.index;
}

}  // namespace dspark
