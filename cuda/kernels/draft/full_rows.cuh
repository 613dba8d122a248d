/*
 * Requests and rows of the head over the whole vocabulary, before the first step and after the last.
 * See full.cuh.
 */
#pragma once

#include "kernels/draft/full_products.cuh"

namespace dspark {

/* How the launch's requests draw, with room for max_reqs; a barrier of the CTA follows. */
template <typename T, typename W>
__device__ __forceinline__ void set_up_runners(const FullArgs<T, W>& args,
                                               SpanRunner* runners,
                                               int max_reqs) {
  for (int q = threadIdx.x; q < max_reqs; q += blockDim.x) {
    SpanRunner runner = {};
    if (q < args.shape.num_reqs) {
      const int32_t req = args.first_req + q;
      const float temperature = args.temperature[req];
      const uint32_t purpose = draft_purpose(args.rules, req);
      const bool hot = temperature > 0.f;
      runner.runner = {args.seeds[req], temperature, hot ? kLog2e / temperature : kLog2e,
                       args.anchor_positions[req] + 1, purpose};
      runner.mode = !hot                              ? DrawMode::kGreedy
                    : purpose == DSPARK_PURPOSE_BONUS ? DrawMode::kCoupled
                                                      : DrawMode::kSampled;
      runner.draft_len = args.draft_lens == nullptr ? args.in.draft_len
                                                    : min(args.draft_lens[req], args.in.draft_len);
    }
    runners[q] = runner;
  }
}

/* Tokens, normalisers and confidences of the launch's rows, a warp each, after the last race.
 * normalizer_of(race): by the whole warp. */
template <typename T, typename W, typename Normalizer>
__device__ __forceinline__ void finish_rows(const FullArgs<T, W>& args,
                                            const SpanRunner* runners,
                                            int32_t num_warps,
                                            Normalizer normalizer_of) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t num_rows = args.shape.num_reqs * args.num_steps;
  for (int32_t i = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x; i < num_rows;
       i += num_warps * gridDim.x) {
    const int32_t q = i / args.num_steps;
    const int32_t step = args.first_step + i % args.num_steps;
    if (step >= runners[q].draft_len) continue; /* whole warps */
    const int64_t req = args.first_req + q;
    const int64_t row = req * args.in.draft_len + step;
    const int64_t race = static_cast<int64_t>(step) * args.in.num_reqs + req;
    const float normalizer = normalizer_of(race);
    const int32_t token = race_token(leader_of(args, q, step));
    if (lane == 0) {
      args.draft_tokens[row] = token;
      args.log_normalizers[row] = normalizer;
    }
    if (args.confidence_weight == nullptr) continue;
    const T* markov = args.confidence_with_markov ? led_markov_row(args, q, step) : nullptr;
    const T* hidden = hidden_row(args.in, static_cast<int32_t>(req), step);
    const float z = args.confidence_bias +
                    (args.confidence_vec
                         ? confidence_dot<true>(args.confidence_weight, hidden, args.in.hidden_size,
                                                markov, args.in.markov_rank)
                         : confidence_dot<false>(args.confidence_weight, hidden,
                                                 args.in.hidden_size, markov, args.in.markov_rank));
    if (lane != 0) continue;
    args.confidence[row] = sigmoid(z);
    if (args.confidence_logits != nullptr) args.confidence_logits[row] = z;
  }
}

}  // namespace dspark
