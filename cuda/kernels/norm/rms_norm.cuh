/*
 * RMSNorm with an optional residual update.
 *
 *   residual += delta                      (rounded to the storage type, written back; where a
 *                                           drafter reads this layer, to its input as well)
 *   out = residual * rsqrt(mean(residual^2) + eps) * weight
 *
 * Mapping: one CTA per row, 16 bytes (8 elements) per thread and access. A row up to
 * kNumThreads * kCachedVecs * 8 elements stays in registers between the sum and the scaling; what
 * is wider is read again, by the thread that wrote it. The CTA size depends on hidden_size alone,
 * and so does the order of the sum.
 *
 * Per row: 2 * hidden_size * 2 bytes (4 with delta, 5 with a tap), the weight from L2; ~4 flops per
 * element.
 * Limited by memory bandwidth for many rows, by one round trip to memory for few.
 */
#pragma once

#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace dspark {

template <int kThreads>
struct RmsNormPolicy {
  static constexpr int kNumThreads = kThreads;
  /* 16-byte vectors that a thread keeps as f32, 8 registers each. */
  static constexpr int kCachedVecs = kThreads == 128 ? 4 : kThreads == 32 ? 1 : 2;
  static constexpr int kMaxCachedVecs = kNumThreads * kCachedVecs;
};

template <typename T>
struct RmsNormArgs {
  T* x;
  const T* delta; /* may be nullptr */
  T* tap;         /* may be nullptr */
  const T* weight;
  T* out;
  int64_t stride_x_row;
  int64_t stride_delta_row;
  int64_t stride_tap_row;
  int64_t stride_out_row;
  int32_t hidden_size;
  float eps;
};

/* x + delta rounded to T as f32 values; the sum is written back to x, and to tap. */
template <typename T>
__device__ __forceinline__ void update_residual(T* x, const T* delta, T* tap, float (&values)[8]) {
  load_vec(x, values);
  if (delta == nullptr) return;
  float step[8];
  load_vec(delta, step);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = Element<T>::to_float(Element<T>::from_float(values[i] + step[i]));
  }
  store_vec(x, values);
  if (tap != nullptr) store_vec(tap, values);
}

__device__ __forceinline__ float sum_of_squares(const float (&values)[8]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(values[i], values[i], sum);
  return sum;
}

template <typename T>
__device__ __forceinline__ void scale_and_store(const T* weight,
                                                float scale,
                                                float (&values)[8],
                                                T* out) {
  float gain[8];
  load_vec(weight, gain);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = values[i] * scale * gain[i];
  store_vec(out, values);
}

template <typename T, typename Policy>
__global__ void __launch_bounds__(Policy::kNumThreads) rms_norm_kernel(RmsNormArgs<T> args) {
  __shared__ float scratch[Policy::kNumThreads / kWarpSize];
  const int64_t row = blockIdx.x;
  T* x = args.x + row * args.stride_x_row;
  const T* delta = args.delta == nullptr ? nullptr : args.delta + row * args.stride_delta_row;
  T* tap = args.tap == nullptr ? nullptr : args.tap + row * args.stride_tap_row;
  T* out = args.out + row * args.stride_out_row;
  const int num_vecs = args.hidden_size / 8;

  float cached[Policy::kCachedVecs][8];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < Policy::kCachedVecs; ++i) {
    const int vec = threadIdx.x + i * Policy::kNumThreads;
    if (vec < num_vecs) {
      update_residual(x + vec * 8, delta == nullptr ? nullptr : delta + vec * 8,
                      tap == nullptr ? nullptr : tap + vec * 8, cached[i]);
      sum += sum_of_squares(cached[i]);
    }
  }
  for (int vec = threadIdx.x + Policy::kMaxCachedVecs; vec < num_vecs; vec += Policy::kNumThreads) {
    float values[8];
    update_residual(x + vec * 8, delta == nullptr ? nullptr : delta + vec * 8,
                    tap == nullptr ? nullptr : tap + vec * 8, values);
    sum += sum_of_squares(values);
  }

  sum = cta_reduce<Policy::kNumThreads>(sum, SumOp{}, 0.f, scratch);
  const float scale = rsqrtf(sum / static_cast<float>(args.hidden_size) + args.eps);

#pragma unroll
  for (int i = 0; i < Policy::kCachedVecs; ++i) {
    const int vec = threadIdx.x + i * Policy::kNumThreads;
    if (vec < num_vecs) scale_and_store(args.weight + vec * 8, scale, cached[i], out + vec * 8);
  }
  for (int vec = threadIdx.x + Policy::kMaxCachedVecs; vec < num_vecs; vec += Policy::kNumThreads) {
    float values[8];
    load_vec(x + vec * 8, values);
    scale_and_store(args.weight + vec * 8, scale, values, out + vec * 8);
  }
}

}  // namespace dspark
