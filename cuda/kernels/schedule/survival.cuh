/*
 * Survival: survival[r, k] = prod over i <= k of sigmoid(logit(confidence[r, i]) / temperature[i]).
 *
 * Mapping: one warp per request, one lane per position, an inclusive product scan by shuffles in
 * steps of 32 positions. 8 bytes per element; limited by the launch itself.
 */
#pragma once

#include <cstdint>

#include "common/reduce.cuh"
#include "kernels/schedule/calibrate.cuh"

namespace dspark {

struct SurvivalPolicy {
  static constexpr int kWarpsPerCta = 4;
  static constexpr int kNumThreads = kWarpsPerCta * kWarpSize;
};

__device__ __forceinline__ float warp_inclusive_product(float value, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const float left = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value *= left;
  }
  return value;
}

/* `survival` may be `confidence`: a lane reads an element before it writes the same one. */
__global__ void __launch_bounds__(SurvivalPolicy::kNumThreads)
    survival_kernel(const float* confidence,
                    const float* temperature, /* may be nullptr: all 1 */
                    float* survival,
                    int32_t num_reqs,
                    int32_t draft_len) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t req =
      static_cast<int64_t>(blockIdx.x) * SurvivalPolicy::kWarpsPerCta + threadIdx.x / kWarpSize;
  if (req >= num_reqs) return; /* whole warps */
  const int64_t row = req * draft_len;
  float survived = 1.f;
  for (int32_t first = 0; first < draft_len; first += kWarpSize) {
    const int32_t k = first + lane;
    float value = 1.f;
    if (k < draft_len) {
      value = calibrate(confidence[row + k], temperature == nullptr ? 1.f : temperature[k]);
    }
    value = survived * warp_inclusive_product(value, lane);
    if (k < draft_len) survival[row + k] = value;
    survived = __shfl_sync(kAllLanes, value, kWarpSize - 1);
  }
}

}  // namespace dspark
