/* Host side of the draft head over the whole vocabulary. */
#pragma once

#include <algorithm>

#include "kernels/draft/full_wide.cuh"
#include "launch/draft/projections.cuh"

namespace dspark {

/* A grid has at most as many CTAs: sizes the workspace without a look at the device. */
constexpr int32_t kMaxShares = 256;
constexpr int32_t kMaxFullDraftLen = 16;
/* Up to so many requests the CTAs leave their leaders on a board (more of them gain by what is known of
 * the others' leaders within a step: 16 requests take 207 us against 216). */
constexpr int32_t kBoardReqs = kGroupReqs;
static_assert(kBoardReqs <= WarpLeaders::kMaxReqs);

/* Offsets in bytes; what a head does not need has no size. */
struct FullLayout {
  size_t keys;      /* RaceKey [draft_len, num_reqs] */
  size_t arrivals;  /* uint32 [batches, draft_len] */
  size_t board;     /* RaceKey [draft_len, num_reqs, shares], with few requests */
  size_t races_end; /* of these three, which start at zero */
  size_t shares;    /* SpanWeight [draft_len, num_reqs, shares] */
  size_t states[2]; /* f32 [num_reqs, markov_rank]: rnn */
  size_t bytes;
};

inline int32_t num_full_spans(const dspark_draft_full_params& p) {
  return ceil_div(p.vocab_size, kSpan);
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
  const size_t num_batches = ceil_div<size_t>(p.num_reqs, kGroupReqs); /* at most */
  const size_t num_shares = std::min(num_full_spans(p), kMaxShares);
  layout.keys = carve(num_rows * sizeof(RaceKey));
  layout.arrivals = carve(num_batches * p.draft_len * sizeof(uint32_t));
  layout.board = carve(p.num_reqs <= kBoardReqs ? num_rows * num_shares * sizeof(RaceKey) : 0);
  layout.races_end = layout.bytes;
  layout.shares = carve(num_rows * num_shares * sizeof(SpanWeight));
  const size_t state_bytes =
      p.head == DSPARK_HEAD_RNN ? sizeof(float) * p.num_reqs * p.markov_rank : 0;
  layout.states[0] = carve(state_bytes);
  layout.states[1] = carve(state_bytes);
  return layout;
}

inline dspark_status check_full_sizes(const dspark_draft_full_params& p) {
  DSPARK_TRY(check_head_sizes(p));
  DSPARK_TRY(check_range("draft_len", p.draft_len, 0, kMaxFullDraftLen));
  if (p.head == DSPARK_HEAD_NONE) return DSPARK_OK;
  DSPARK_CHECK_ARG(p.markov_rank <= FullPolicy::kMaxRank && p.markov_rank % kLowRankStep == 0,
                   DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "markov_rank: expected a multiple of %d up to %d, got %d", kLowRankStep,
                   FullPolicy::kMaxRank, p.markov_rank);
  return DSPARK_OK;
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
  return p.w2_dtype == DSPARK_DTYPE_E4M3 ? check_pointer("w2_scales", p.w2_scales, sizeof(float))
                                         : DSPARK_OK;
}

/* How warps share a launch of num_reqs requests. */
struct FullTeams {
  int32_t groups_per_warp; /* of 8 requests: 1, 2, 4 */
  int32_t num_sets;
};

constexpr FullTeams full_teams(int32_t num_reqs) {
  if (num_reqs <= 8) return {1, 1};
  if (num_reqs <= 16) return {2, 1};
  if (num_reqs <= 32) return {4, 1};
  return {4, num_reqs <= 64 ? 2 : 4};
}

/* What a launch keeps in shared memory, given what a CTA may have and how many CTAs run at once.
 * num_resident < 0: it does not fit. A share does not depend on the requests. */
constexpr FullShape full_shape(int32_t vocab_size,
                               int32_t rank,
                               int32_t weight_size,
                               int32_t logit_size,
                               int32_t num_reqs,
                               int32_t max_ctas,
                               size_t shared_bytes) {
  constexpr int32_t kMinWeightSlots = 2;
  constexpr int32_t kMinLogitSlots = 2;
  constexpr int32_t kMaxLogitBytes = 56 * 1024;
  const FullTeams teams = full_teams(num_reqs);
  FullShape s = {};
  s.num_reqs = num_reqs;
  s.num_sets = teams.num_sets;
  s.padded_reqs = teams.num_sets * teams.groups_per_warp * kGroupReqs;
  s.num_spans = ceil_div(vocab_size, kSpan);
  s.spans_per_share = ceil_div(s.num_spans, std::min(max_ctas, kMaxShares));
  s.weight_row_bytes = rank == 0 ? 0 : rank * weight_size + FullPolicy::kPadBytes;
  s.logit_row_bytes = kSpan * logit_size + FullPolicy::kPadBytes;
  s.latent_row_bytes = rank == 0 ? 0 : rank * 2 + FullPolicy::kPadBytes;
  const int32_t turns = full_warps(teams.groups_per_warp) / teams.num_sets;
  const int32_t fitting = kMaxLogitBytes / (s.padded_reqs * s.logit_row_bytes);
  s.logit_slots = std::max(std::min({turns + 2, fitting, FullPolicy::kMaxSlots}), kMinLogitSlots);
  const int64_t left =
      static_cast<int64_t>(shared_bytes) - static_cast<int64_t>(full_shared_bytes(s));
  if (rank == 0) {
    s.num_resident = left < 0 ? -1 : 0;
    return s;
  }
  const int64_t span_bytes = static_cast<int64_t>(kSpan) * s.weight_row_bytes;
  const int64_t num_places = left < 0 ? 0 : left / span_bytes;
  if (num_places >= s.spans_per_share) {
    s.num_resident = s.spans_per_share; /* without a ring */
  } else if (num_places < kMinWeightSlots) {
    s.num_resident = -1;
  } else {
    /* Few requests: what does not fit at once fits at the second go. */
    const int32_t missing = s.spans_per_share - static_cast<int32_t>(num_places);
    const int32_t wanted = weight_size > 1 ? FullPolicy::kHalfSlots
                           : num_reqs > kGroupReqs
                               ? FullPolicy::kByteSlots
                               : std::max(FullPolicy::kByteSlots, missing);
    s.weight_slots = static_cast<int32_t>(std::min<int64_t>(wanted, num_places));
    s.num_resident = static_cast<int32_t>(num_places) - s.weight_slots;
  }
  return s;
}

/* From so many requests on the wide kernel runs where it can. */
constexpr int32_t wide_reqs(int32_t weight_size) { return weight_size == 1 ? 17 : 9; }

/* The same of full_wide_kernel; num_resident < 0: it does not fit, or is not for such a head. */
constexpr FullShape wide_shape(int32_t vocab_size,
                               int32_t rank,
                               int32_t weight_size,
                               int32_t num_reqs,
                               int32_t max_ctas,
                               size_t shared_bytes) {
  FullShape s = {};
  s.num_resident = -1;
  if (rank == 0 || rank % kSlabColumns != 0 || num_reqs < wide_reqs(weight_size)) {
    return s;
  }
  s.num_reqs = num_reqs;
  s.num_sets = ceil_div(num_reqs, WidePolicy::kReqs);
  s.padded_reqs = s.num_sets * WidePolicy::kReqs;
  s.num_spans = ceil_div(vocab_size, kSpan);
  s.spans_per_share = ceil_div(s.num_spans, std::min(max_ctas, kMaxShares));
  s.weight_row_bytes = s.latent_row_bytes = rank * 2;
  s.num_resident = 0;
  if (weight_size == 1) {
    s.logit_slots = WidePolicy::kByteStages; /* of e4m3 rows: there are no base logits here */
    s.logit_row_bytes = kSpan * rank / s.padded_reqs;
  }
  const int64_t left = static_cast<int64_t>(shared_bytes) - WidePolicy::kAlignment -
                       static_cast<int64_t>(full_shared_bytes(s));
  const int64_t num_places = left / (kSpan * s.weight_row_bytes);
  s.weight_slots = static_cast<int32_t>(std::min<int64_t>(num_places, WidePolicy::kMaxPlaces));
  /* A place is never a whole turn of its ring behind: a parity would not tell its fills apart. */
  if (left < 0 || num_places < WidePolicy::kNumGroups / s.num_sets) s.num_resident = -1;
  return s;
}

/* The launches of one call: weights of type T, W2 of type W. */
template <typename T, typename W>
class DraftFull {
 public:
  DraftFull(const dspark_draft_full_params& params, dspark_stream stream)
      : p_(params), stream_(stream), layout_(full_layout(params)) {}

  dspark_status run() const {
    int shared_bytes = 0;
    int num_sms = 0;
    int cooperative = 0;
    DSPARK_TRY(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes));
    DSPARK_TRY(device_attribute(cudaDevAttrMultiProcessorCount, &num_sms));
    DSPARK_TRY(device_attribute(cudaDevAttrCooperativeLaunch, &cooperative));
    cudaFuncAttributes wide_code;
    DSPARK_TRY(check_cuda(
        "cudaFuncGetAttributes",
        cudaFuncGetAttributes(&wide_code, reinterpret_cast<const void*>(full_wide_kernel<T, W>))));
    /* Code for other devices than sm_90a has no body and no such state. */
    const bool has_wide = wide_code.sharedSizeBytes >= sizeof(WideState);
    const auto wide_shape_of = [&](int32_t num_reqs) {
      return wide_shape(p_.vocab_size, has_wide && p_.head != DSPARK_HEAD_NONE ? p_.markov_rank : 0,
                        sizeof(W), num_reqs, num_sms, shared_bytes - sizeof(WideState));
    };
    const auto shape_of = [&](int32_t num_reqs) {
      const int32_t rank = p_.head == DSPARK_HEAD_NONE ? 0 : p_.markov_rank;
      return full_shape(p_.vocab_size, rank, sizeof(W), p_.logits_dtype == DSPARK_DTYPE_F32 ? 4 : 2,
                        num_reqs, num_sms,
                        shared_bytes - sizeof(FullState) - sizeof(WarpLeaders));
    };
    int32_t batch = FullPolicy::kMaxReqs;
    while (batch > kGroupReqs && shape_of(batch).num_resident < 0) batch /= 2;
    DSPARK_CHECK_ARG(shape_of(batch).num_resident >= 0 && cooperative != 0,
                     DSPARK_ERROR_UNSUPPORTED_DEVICE,
                     "dspark_draft_full: expected cooperative launches and more than %d bytes of "
                     "shared memory per CTA",
                     shared_bytes);
    DSPARK_TRY(check_cuda(
        "cudaMemsetAsync",
        cudaMemsetAsync(at<char>(layout_.keys), 0, layout_.races_end - layout_.keys, stream_)));
    const int32_t num_steps = has_latent_kernel(p_.head) ? 1 : p_.draft_len;
    for (int32_t step = 0; step < p_.draft_len; step += num_steps) {
      if (has_latent_kernel(p_.head)) DSPARK_TRY(latents_of_step(step));
      for (int32_t first = 0; first < p_.num_reqs; first += batch) {
        FullArgs<T, W> args = full_args(first);
        args.shape = shape_of(std::min(p_.num_reqs - first, batch));
        args.first_step = step;
        args.num_steps = num_steps;
        const FullShape wide = wide_shape_of(args.shape.num_reqs);
        if (wide.num_resident >= 0) {
          args.shape = wide;
          args.board = nullptr;
          DSPARK_TRY(run_cooperative("full_wide_kernel", full_wide_kernel<T, W>,
                                     WidePolicy::kNumThreads,
                                     full_shared_bytes(wide) + WidePolicy::kAlignment, args));
          continue;
        }
        switch (full_teams(args.shape.num_reqs).groups_per_warp) {
          case 1:
            DSPARK_TRY(run_batch<1>(args));
            break;
          case 2:
            DSPARK_TRY(run_batch<2>(args));
            break;
          default:
            DSPARK_TRY(run_batch<4>(args));
        }
      }
    }
    return DSPARK_OK;
  }

 private:
  template <typename V>
  V* at(size_t offset) const {
    return reinterpret_cast<V*>(static_cast<char*>(p_.workspace) + offset);
  }

  template <int kNTiles>
  dspark_status run_batch(const FullArgs<T, W>& args) const {
    return run_cooperative("full_kernel", full_kernel<T, W, kNTiles>,
                           full_warps(kNTiles) * kWarpSize, full_shared_bytes(args.shape), args);
  }

  dspark_status run_cooperative(const char* name,
                                void (*kernel)(FullArgs<T, W>),
                                int num_threads,
                                size_t shared_bytes,
                                const FullArgs<T, W>& args) const {
    LaunchShape shape;
    shape.grid = dim3(ceil_div(args.shape.num_spans, args.shape.spans_per_share));
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

  dspark_status latents_of_step(int32_t step) const {
    const LatentBuffers buffers = {nullptr,
                                   {at<float>(layout_.states[0]), at<float>(layout_.states[1])}};
    LatentRows rows;
    rows.base = p_.latents;
    rows.is_f16 = std::is_same_v<typename LowRank<W>::Latent, __half>;
    rows.stride = static_cast<int64_t>(p_.draft_len) * p_.markov_rank;
    return compute_latent<T>(p_, buffers, step, stream_, rows);
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
    args.confidence_weight = static_cast<const T*>(p_.confidence_weight);
    args.confidence = p_.confidence;
    args.confidence_logits = p_.confidence_logits;
    args.confidence_bias = p_.confidence_bias;
    args.confidence_with_markov = p_.confidence_with_markov != 0;
    args.confidence_vec = p_.hidden_size % 8 == 0 && aligned_16({p_.hidden, p_.confidence_weight});
    if (p_.num_reqs <= kBoardReqs) args.board = at<RaceKey>(layout_.board);
    args.keys = at<RaceKey>(layout_.keys);
    args.arrivals = at<uint32_t>(layout_.arrivals) + first_req / kGroupReqs * p_.draft_len;
    args.shares = at<SpanWeight>(layout_.shares);
    args.first_req = first_req;
    return args;
  }

  const dspark_draft_full_params& p_;
  dspark_stream stream_;
  FullLayout layout_;
};

}  // namespace dspark
