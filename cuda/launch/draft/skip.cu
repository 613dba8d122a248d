/* The launchers of the full form that skips rows of W2, and of what it needs to know of them. */
#include "kernels/draft/skip.cuh"

#include "launch/draft/full_args.cuh"
#include "launch/draft/skip.cuh"

namespace dspark {

namespace {

/* Seeds of a row that are looked at: what the warps of a CTA do at once. */
constexpr int32_t seeds_of(int32_t num_reqs) {
  int32_t seeds = kSkipSeeds;
  while (seeds > 1 && seeds * num_reqs > SkipPolicy::kMaxPairs) seeds /= 2;
  return seeds;
}

template <typename T, typename W>
class DraftSkip : FullCall<T, W> {
  using FullCall<T, W>::p_;
  using FullCall<T, W>::stream_;
  using FullCall<T, W>::layout_;

 public:
  using FullCall<T, W>::FullCall;

  dspark_status run() const {
    int num_sms = 0;
    int cooperative = 0;
    int shared_bytes = 0;
    DSPARK_TRY(device_attribute(cudaDevAttrMultiProcessorCount, &num_sms));
    DSPARK_TRY(device_attribute(cudaDevAttrCooperativeLaunch, &cooperative));
    DSPARK_TRY(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes));
    DSPARK_TRY(find_seeds());
    DSPARK_TRY(this->project_hidden());
    const int32_t batch = most_reqs(num_sms, shared_bytes);
    DSPARK_CHECK_ARG(cooperative != 0 && batch > 0, DSPARK_ERROR_UNSUPPORTED_DEVICE,
                     "dspark_draft_full: expected cooperative launches and more than %d bytes of "
                     "shared memory per CTA for w2_bounds",
                     shared_bytes);
    for (int32_t first = 0; first < p_.num_reqs; first += batch) {
      SkipArgs<T, W> args = skip_args(first);
      args.full.shape = shape_of(std::min(p_.num_reqs - first, batch), num_sms);
      args.num_seeds = seeds_of(args.full.shape.num_reqs);
      DSPARK_TRY(this->run_cooperative("skip_kernel", skip_kernel<T, W>, SkipPolicy::kNumThreads,
                                       skip_shared_bytes(args.full.shape), args.full.shape, args));
    }
    return DSPARK_OK;
  }

 private:
  FullShape shape_of(int32_t num_reqs, int32_t num_sms) const {
    FullShape shape = {};
    shape.num_reqs = num_reqs;
    shape.num_spans = num_full_spans(p_);
    shape.spans_per_share = ceil_div(shape.num_spans, std::min(num_sms, kMaxShares));
    shape.latent_row_bytes = p_.markov_rank * 2 + FullPolicy::kPadBytes;
    shape.weight_row_bytes =
        p_.markov_rank * static_cast<int32_t>(sizeof(W)) + FullPolicy::kPadBytes;
    return shape;
  }

  /* Of a launch; 0: not even one group of requests fits. */
  int32_t most_reqs(int32_t num_sms, int32_t shared_bytes) const {
    int32_t reqs = SkipPolicy::kMaxReqs;
    while (reqs > 0 && skip_shared_bytes(shape_of(reqs, num_sms)) + sizeof(SkipState) >
                           static_cast<size_t>(shared_bytes)) {
      reqs -= kGroupReqs;
    }
    return reqs;
  }

  dspark_status find_seeds() const {
    const FullArgs<T, W> full = this->full_args(0);
    SeedArgs args = {};
    args.logits = p_.logits;
    args.f32_logits = full.f32_logits;
    args.aligned_logits = full.aligned_logits;
    args.stride_logits_row = p_.stride_logits_row;
    args.mask = full.mask;
    args.draft_lens = p_.draft_lens;
    args.num_reqs = p_.num_reqs;
    args.draft_len = p_.draft_len;
    args.vocab_size = p_.vocab_size;
    args.seeds = this->template at<RaceKey>(layout_.seeds);
    args.keys = full.keys;
    args.arrivals = full.arrivals;
    args.num_arrivals = static_cast<int32_t>(2 * num_arrivals(p_));
    args.rows_read = p_.rows_read;
    return launch("seed_kernel", seed_kernel, dim3(p_.num_reqs * p_.draft_len, kSkipSeeds),
                  dim3(SeedPolicy::kNumThreads), 0, stream_, args);
  }

  SkipArgs<T, W> skip_args(int32_t first) const {
    SkipArgs<T, W> args = {};
    args.full = this->full_args(first);
    args.bounds = reinterpret_cast<const float4*>(p_.w2_bounds);
    args.basis = p_.w2_basis;
    args.seeds = this->template at<RaceKey>(layout_.seeds);
    args.rows_read = p_.rows_read;
    args.paired_logits =
        aligned_to(args.full.f32_logits ? 8 : 4, {p_.logits}) && p_.stride_logits_row % 2 == 0;
    return args;
  }
};

template <typename W>
dspark_status find_bounds(const dspark_draft_bounds_params& p, dspark_stream stream) {
  BoundArgs<W> args;
  args.markov_w2 = static_cast<const W*>(p.markov_w2);
  args.w2_scales = p.w2_scales;
  args.basis = p.basis;
  args.bounds = reinterpret_cast<float4*>(p.bounds);
  args.vocab_size = p.vocab_size;
  args.rank = p.markov_rank;
  return launch("bound_kernel", bound_kernel<W>,
                dim3(ceil_div(p.vocab_size, BoundPolicy::kWarpsPerCta)),
                dim3(BoundPolicy::kNumThreads), 0, stream, args);
}

}  // namespace

dspark_status draft_skip(const dspark_draft_full_params& params, dspark_stream stream) {
  return dispatch_half_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return params.w2_dtype == DSPARK_DTYPE_E4M3 ? DraftSkip<T, __nv_fp8_e4m3>(params, stream).run()
                                                : DraftSkip<T, T>(params, stream).run();
  });
}

}  // namespace dspark

using namespace dspark;

extern "C" dspark_status DSPARK_FN(dspark_draft_bounds)(const dspark_draft_bounds_params* params,
                                                        dspark_stream stream) {
  constexpr size_t kAlignment = 16;
  DSPARK_CHECK_PARAMS(params, bounds);
  const dspark_draft_bounds_params& p = *params;
  const bool fp8 = p.w2_dtype == DSPARK_DTYPE_E4M3;
  if (!fp8) DSPARK_TRY(check_half_dtype(p.w2_dtype));
  DSPARK_TRY(check_range("vocab_size", p.vocab_size, 1));
  DSPARK_TRY(check_range("markov_rank", p.markov_rank, 1));
  DSPARK_TRY(check_full_rank(p.markov_rank));
  DSPARK_TRY(check_pointer("markov_w2", p.markov_w2, kAlignment));
  DSPARK_TRY(check_pointer("basis", p.basis, kAlignment));
  DSPARK_TRY(check_pointer("bounds", p.bounds, kAlignment));
  if (fp8) {
    DSPARK_TRY(check_pointer("w2_scales", p.w2_scales, sizeof(float)));
    return find_bounds<__nv_fp8_e4m3>(p, stream);
  }
  return dispatch_half_dtype(
      p.w2_dtype, [&](auto tag) { return find_bounds<typename decltype(tag)::type>(p, stream); });
}
