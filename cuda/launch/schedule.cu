/* Launchers of the schedule family: survival probabilities and how many drafts are verified. */
#include "common/host.cuh"
#include "kernels/schedule/schedule.cuh"
#include "kernels/schedule/schedule_cluster.cuh"
#include "kernels/schedule/survival.cuh"

using namespace dspark;

extern "C" dspark_status DSPARK_FN(dspark_survival)(const dspark_survival_params* params,
                                                    dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, survival);
  const dspark_survival_params& p = *params;
  DSPARK_TRY(check_range("num_reqs", p.num_reqs, 0));
  DSPARK_TRY(check_range("draft_len", p.draft_len, 0));
  if (p.num_reqs == 0 || p.draft_len == 0) return DSPARK_OK;
  DSPARK_TRY(check_pointer("confidence", p.confidence, sizeof(float)));
  DSPARK_TRY(check_aligned("temperature", p.temperature, sizeof(float)));
  DSPARK_TRY(check_pointer("survival", p.survival, sizeof(float)));
  return launch("survival_kernel", survival_kernel,
                dim3(ceil_div(p.num_reqs, SurvivalPolicy::kWarpsPerCta)),
                dim3(SurvivalPolicy::kNumThreads), 0, stream, p.confidence, p.temperature,
                p.survival, p.num_reqs, p.draft_len);
}

namespace {

template <int kThreads, int kItems, bool kHoldsTicks = true>
dspark_status launch_schedule(const ScheduleArgs& args, dspark_stream stream) {
  return launch("schedule_kernel", schedule_kernel<kThreads, kItems, kHoldsTicks>, dim3(1),
                dim3(kThreads), ScheduleShared<kThreads, kItems, kHoldsTicks>::kBytes, stream,
                args);
}

/* The most drafts: prices stay in global memory where shared memory is too small for them. */
dspark_status launch_largest(const ScheduleArgs& args, dspark_stream stream) {
  int shared_bytes = 0;
  DSPARK_TRY(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes));
  constexpr int kStaticBytes = 1024; /* more than there is */
  const size_t needed = ScheduleShared<1024, 16, true>::kBytes + kStaticBytes;
  if (needed <= static_cast<size_t>(shared_bytes)) return launch_schedule<1024, 16>(args, stream);
  return launch_schedule<1024, 16, false>(args, stream);
}

template <int kThreads, int kItems>
dspark_status launch_cluster(const ScheduleArgs& args, dspark_stream stream) {
  return launch("schedule_cluster_kernel", schedule_cluster_kernel<kThreads, kItems>,
                dim3(ClusterPolicy::kNumCtas), dim3(kThreads),
                ClusterShared<kThreads, kItems>::kBytes, stream, args);
}

/* Whether the loaded code knows clusters. */
dspark_status has_clusters(bool* has) {
  constexpr int kFirstPtxWithClusters = 90;
  cudaFuncAttributes loaded;
  const auto* kernel = reinterpret_cast<const void*>(schedule_cluster_kernel<512, 4>);
  DSPARK_TRY(check_cuda("schedule_cluster_kernel", cudaFuncGetAttributes(&loaded, kernel)));
  *has = loaded.ptxVersion >= kFirstPtxWithClusters;
  return DSPARK_OK;
}

dspark_status launch_single(const ScheduleArgs& args, int32_t size, dspark_stream stream) {
  if (size <= 256) return launch_schedule<256, 1>(args, stream);
  if (size <= 512) return launch_schedule<512, 1>(args, stream);
  if (size <= 1024) return launch_schedule<512, 2>(args, stream);
  if (size <= 2048) return launch_schedule<512, 4>(args, stream);
  if (size <= 4096) return launch_schedule<512, 8>(args, stream);
  if (size <= 8192) return launch_schedule<1024, 8>(args, stream);
  return launch_largest(args, stream);
}

/* Below this many drafts a single CTA is as fast. */
constexpr int32_t kLeastOfCluster = 1024;

}  // namespace

extern "C" dspark_status DSPARK_FN(dspark_schedule)(const dspark_schedule_params* params,
                                                    dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, verify_lens);
  const dspark_schedule_params& p = *params;
  DSPARK_TRY(check_range("num_reqs", p.num_reqs, 0, SchedulePolicy::kMaxReqs));
  DSPARK_TRY(check_range("draft_len", p.draft_len, 0, SchedulePolicy::kMaxDrafts));
  DSPARK_TRY(check_range("num_reqs * draft_len", int64_t{p.num_reqs} * p.draft_len, 0,
                         SchedulePolicy::kMaxDrafts));
  DSPARK_TRY(check_range("rule", p.rule, DSPARK_SCHEDULE_FIRST_FALL, DSPARK_SCHEDULE_BEST));
  if (p.num_reqs == 0) return DSPARK_OK;
  const bool drafts = p.draft_len > 0;
  if (drafts) DSPARK_TRY(check_pointer("confidence", p.confidence, sizeof(float)));
  DSPARK_TRY(check_aligned("temperature", p.temperature, sizeof(float)));
  DSPARK_TRY(check_aligned("limits", p.limits, sizeof(int32_t)));
  DSPARK_TRY(check_aligned("num_live", p.num_live, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("ticks", p.ticks, sizeof(uint32_t)));
  if (p.rule == DSPARK_SCHEDULE_CAPACITY) {
    DSPARK_TRY(check_pointer("capacity", p.capacity, sizeof(int32_t)));
  }
  DSPARK_TRY(check_aligned("best", p.best, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("verify_lens", p.verify_lens, sizeof(int32_t)));
  const ScheduleArgs args{p.num_reqs,    p.draft_len, p.rule,       p.confidence,
                          p.temperature, p.limits,    p.num_live,   p.ticks,
                          p.capacity,    p.best,      p.verify_lens};
  /* Room for all keys and, where there is nothing to sort, for all lengths. */
  const int32_t size = p.num_reqs * (drafts ? p.draft_len : 1);
  /* The drafts of a CTA of a cluster, which has whole requests. */
  const int64_t share = int64_t{ceil_div(p.num_reqs, ClusterPolicy::kNumCtas)} * p.draft_len;
  bool clusters = false;
  if (drafts && size >= kLeastOfCluster && share <= 2048) DSPARK_TRY(has_clusters(&clusters));
  if (!clusters) return launch_single(args, size, stream);
  if (share <= 256) return launch_cluster<256, 1>(args, stream);
  if (share <= 512) return launch_cluster<512, 1>(args, stream);
  if (share <= 1024) return launch_cluster<512, 2>(args, stream);
  return launch_cluster<512, 4>(args, stream);
}
