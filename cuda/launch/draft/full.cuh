/* Host side of the draft head over the whole vocabulary. */
#pragma once

#include "kernels/draft/full_wide.cuh"
#include "launch/draft/full_args.cuh"

namespace dspark {

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
    const int32_t wanted = weight_size == 1 ? FullPolicy::kByteSlots : FullPolicy::kHalfSlots;
    s.weight_slots = static_cast<int32_t>(std::min<int64_t>(wanted, num_places));
    s.num_resident = static_cast<int32_t>(num_places) - s.weight_slots;
  }
  return s;
}

/* From so many requests on the wide kernel runs where it can. */
constexpr int32_t kWideReqs = 33;

/* The same of full_wide_kernel; num_resident < 0: it does not fit, or is not for such a head. */
constexpr FullShape wide_shape(int32_t vocab_size,
                               int32_t rank,
                               int32_t weight_size,
                               int32_t num_reqs,
                               int32_t max_ctas,
                               size_t shared_bytes) {
  FullShape s = {};
  s.num_resident = -1;
  if (rank == 0 || rank % kSlabColumns != 0 || num_reqs < kWideReqs) return s;
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
  if (left < 0 || num_places < 2) s.num_resident = -1;
  return s;
}

/* The launches of one call: weights of type T, W2 of type W. */
template <typename T, typename W>
class DraftFull : FullCall<T, W> {
  using FullCall<T, W>::p_;
  using FullCall<T, W>::stream_;
  using FullCall<T, W>::layout_;

 public:
  using FullCall<T, W>::FullCall;

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
                        num_reqs, num_sms, shared_bytes - sizeof(FullState));
    };
    int32_t batch = FullPolicy::kMaxReqs;
    while (batch > kGroupReqs && shape_of(batch).num_resident < 0) batch /= 2;
    DSPARK_CHECK_ARG(shape_of(batch).num_resident >= 0 && cooperative != 0,
                     DSPARK_ERROR_UNSUPPORTED_DEVICE,
                     "dspark_draft_full: expected cooperative launches and more than %d bytes of "
                     "shared memory per CTA",
                     shared_bytes);
    DSPARK_TRY(
        check_cuda("cudaMemsetAsync", cudaMemsetAsync(this->template at<char>(layout_.keys), 0,
                                                      layout_.races_end - layout_.keys, stream_)));
    DSPARK_TRY(this->project_hidden());
    for (int32_t first = 0; first < p_.num_reqs; first += batch) {
      FullArgs<T, W> args = this->full_args(first);
      args.shape = shape_of(std::min(p_.num_reqs - first, batch));
      const FullShape wide = wide_shape_of(args.shape.num_reqs);
      if (wide.num_resident >= 0) {
        args.shape = wide;
        DSPARK_TRY(this->run_cooperative(
            "full_wide_kernel", full_wide_kernel<T, W>, WidePolicy::kNumThreads,
            full_shared_bytes(wide) + WidePolicy::kAlignment, args.shape, args));
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
    return DSPARK_OK;
  }

 private:
  template <int kNTiles>
  dspark_status run_batch(const FullArgs<T, W>& args) const {
    return this->run_cooperative("full_kernel", full_kernel<T, W, kNTiles>,
                                 full_warps(kNTiles) * kWarpSize, full_shared_bytes(args.shape),
                                 args.shape, args);
  }
};

}  // namespace dspark
