/*
 * Reductions over lanes of a warp and over a CTA. Butterfly order: every lane gets the result, and
 * the order of the operations is fixed, so sums are bitwise reproducible.
 */
#pragma once

#include <cstdint>

namespace dspark {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct SumOp {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

/* NaN is ignored unless both are NaN (the IEEE maximumNumber of fmaxf). */
struct MaxOp {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct MinOp {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
};

/* A value and where it was found. */
struct Indexed {
  float value;
  int32_t index;
};

/* The larger value; the lowest index wins a tie. */
struct ArgmaxOp {
  __device__ __forceinline__ Indexed operator()(Indexed a, Indexed b) const {
    const bool take_b = b.value > a.value || (b.value == a.value && b.index < a.index);
    return take_b ? b : a;
  }
};

/* The smaller value; the lowest index wins a tie. */
struct ArgminOp {
  __device__ __forceinline__ Indexed operator()(Indexed a, Indexed b) const {
    const bool take_b = b.value < a.value || (b.value == a.value && b.index < a.index);
    return take_b ? b : a;
  }
};

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, value, lane_mask);
}

__device__ __forceinline__ Indexed shuffle_xor(Indexed value, int lane_mask) {
  return {__shfl_xor_sync(kAllLanes, value.value, lane_mask),
          __shfl_xor_sync(kAllLanes, value.index, lane_mask)};
}

/* Reduces over aligned groups of kWidth lanes; every lane of the group gets the result. All 32
 * lanes must take part. */
template <int kWidth = kWarpSize, typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  static_assert(kWidth >= 1 && kWidth <= kWarpSize && (kWidth & (kWidth - 1)) == 0);
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask /= 2) value = op(value, shuffle_xor(value, mask));
  return value;
}

/* Sum over the lanes up to and with this one. All 32 lanes must take part. */
template <typename T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

/* Reduces over the CTA of kNumThreads (a multiple of 32) threads; every thread gets the result.
 * `scratch` holds one T per warp in shared memory and may be reused by the next call. All threads
 * must take part. `identity` is neutral for `op`. */
template <int kNumThreads, typename T, typename Op>
__device__ __forceinline__ T cta_reduce(T value, Op op, T identity, T* scratch) {
  static_assert(kNumThreads % kWarpSize == 0 && kNumThreads <= 1024);
  constexpr int kNumWarps = kNumThreads / kWarpSize;
  value = warp_reduce(value, op);
  if constexpr (kNumWarps == 1) return value;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  __syncthreads(); /* readers of an earlier call are done with scratch */
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_reduce(lane < kNumWarps ? scratch[lane] : identity, op);
}

}  // namespace dspark
