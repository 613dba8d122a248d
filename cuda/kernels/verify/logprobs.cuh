/*
 * Log-probabilities of committed tokens, and of the likeliest n, under the law of their row.
 *
 *   ln p(v) = (l(v) - max) / T + ln(1 / Z)    over the kept tokens
 *
 * A CTA per committed token. The n-th largest of the zones' maxima is a floor below which none of the
 * n likeliest lies, so that n of the zones are read, from L2 or L1, once for each of the n: the largest
 * logit behind the last one in the order (descending logit, ascending token). That order is exact.
 *
 * Bytes: about n zones of 2 KiB, n times over. Asked for rarely; limited by latency.
 */
#pragma once

#include "kernels/verify/accept.cuh"

namespace dspark {

struct LogprobsPolicy {
  static constexpr int kNumThreads = 512;
  static constexpr int kNumWarps = kNumThreads / kWarpSize;
};

struct LogprobsOutputs {
  float* logprobs;     /* [num_reqs, draft_len + 1] */
  int32_t* top_tokens; /* [num_reqs, draft_len + 1, num_top] */
  float* top_logprobs;
  int32_t num_top;
};

__device__ __forceinline__ float log_probability(const RowLaw& law, float logit) {
  if (!(probability(law, logit) > 0.f)) return -INFINITY;
  return (logit - law.max) * (law.scale / kLog2E) + logf(law.inv_sum);
}

/* The first token behind `last` in the order of likelihood, by a warp over its zones. */
__device__ __forceinline__ Indexed next_likeliest(
    const VerifyInputs& in, const TargetRow& row, const Strips* maxima, float floor, Indexed last) {
  Indexed best = {-INFINITY, INT32_MAX};
  for (int32_t zone = threadIdx.x / kWarpSize; zone < in.num_zones;
       zone += LogprobsPolicy::kNumWarps) {
    if (zone_max(maxima[zone]) < floor) continue; /* the same for the whole warp */
#pragma unroll 1
    for (int i = 0; i < kStripsPerZone; ++i) {
      const int32_t strip = zone * kStripsPerZone + i;
      float values[kGroup];
      load_target_strip(in, row, strip, values);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const Indexed own = {values[j], strip_token(strip) + j};
        const bool behind =
            own.value < last.value || (own.value == last.value && own.index > last.index);
        if (behind) best = ArgmaxOp{}(best, own);
      }
    }
  }
  return best;
}

/* Grid: num_reqs * (draft_len + 1), flat. */
__global__ void __launch_bounds__(LogprobsPolicy::kNumThreads, 1)
    logprobs_kernel(VerifyInputs in, AcceptWork work, LogprobsOutputs out) {
  __shared__ RowLaw shared_law;
  __shared__ float shared_floor;
  __shared__ Indexed scratch[LogprobsPolicy::kNumWarps];
  const int64_t index = blockIdx.x;
  const auto req = static_cast<int32_t>(index / (in.draft_len + 1));
  const CommittedToken committed = work.committed[index];
  int32_t* top_tokens = out.top_tokens + index * out.num_top;
  float* top_logprobs = out.top_logprobs + index * out.num_top;
  if (committed.row < 0) { /* whole CTA */
    if (threadIdx.x == 0) out.logprobs[index] = -INFINITY;
    for (int32_t i = threadIdx.x; i < out.num_top; i += LogprobsPolicy::kNumThreads) {
      top_tokens[i] = -1;
      top_logprobs[i] = -INFINITY;
    }
    return;
  }
  const TargetRow row = {static_cast<int64_t>(in.qo_indptr[req]) + committed.row, req,
                         committed.row};
  const RowZones zones = zones_of(in, work.zones, row.index);
  if (threadIdx.x < kWarpSize) {
    const RowLaw merged = merge_zones(zones, in.num_zones, target_scale(in, req));
    if (threadIdx.x == 0) {
      shared_law = work.laws != nullptr ? work.laws[row.index] : merged;
      shared_floor = -INFINITY;
    }
  }
  __syncthreads();
  const RowLaw law = shared_law;
  if (threadIdx.x == 0) {
    out.logprobs[index] = log_probability(law, shaped_logit(in, row, committed.token));
  }
  for (int32_t zone = threadIdx.x; zone < in.num_zones; zone += LogprobsPolicy::kNumThreads) {
    const float own = zone_max(zones.maxima[zone]);
    int32_t before = 0;
    for (int32_t other = 0; other < in.num_zones; ++other) {
      const float value = zone_max(zones.maxima[other]);
      before += value > own || (value == own && other < zone);
    }
    if (before == out.num_top - 1) shared_floor = own;
  }
  __syncthreads();
  Indexed last = {INFINITY, -1};
  for (int32_t i = 0; i < out.num_top; ++i) {
    const Indexed own = next_likeliest(in, row, zones.maxima, shared_floor, last);
    last = cta_reduce<LogprobsPolicy::kNumThreads>(own, ArgmaxOp{}, Indexed{-INFINITY, INT32_MAX},
                                                   scratch);
    const float logprob = log_probability(law, last.value);
    if (threadIdx.x != 0) continue;
    top_tokens[i] = logprob > -INFINITY ? last.index : -1;
    top_logprobs[i] = logprob;
  }
}

}  // namespace dspark
