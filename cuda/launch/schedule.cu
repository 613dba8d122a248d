/* Launchers of the schedule family: survival probabilities. */
#include "common/host.cuh"
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
