/*
 * Per-head RMSNorm of q and k, rotate-half RoPE, and the append of k and v to the paged cache, in
 * one pass over the output of the qkv projection.
 *
 * Maths     x' = x * rsqrt(mean(x^2) + eps) * w over head_dim (where w is given), then with
 *           angle_i = position * inv_freq[i]:
 *             y[i]           = (x'[i] cos - x'[i + D/2] sin) * rope_scale
 *             y[i + D/2]     = (x'[i + D/2] cos + x'[i] sin) * rope_scale
 *           all in f32 with one rounding at the end. v is copied bit for bit. An e4m3 cache takes
 *           these rounded numbers over the head's factor, rounded once more: what a 16-bit cache
 *           would hold, in fewer bits, so that both kinds of cache see the same keys.
 * Mapping   D/8 lanes own one head of one row, 8 elements (16 bytes) each, so the norm is a shuffle
 *           over the lanes and the rotation partner of a lane is the one D/16 lanes away. A CTA
 *           takes one row and kThreads / (D/8) of its heads: they share the sines and cosines,
 *           which are computed once per CTA.
 * Traffic   2 * rows * (Hq + 2 Hkv) * D * 2 bytes, once in and once out (e4m3 keys and values go out
 *           in half of that); about 10 flops a value.
 * Limit     launch latency for a decode step (512 rows of Qwen3-4B move 12 MB), memory bandwidth
 *           for prefill.
 * Angles    sincosf keeps a slow path with a local array for angles above 1e5, which position 1M
 *           reaches. Reducing angle / pi modulo 2 in f64 and taking sincospif needs none and is
 *           within 2 ulp of 1 at any position below 2^24.
 * Source    the fused "qk norm + rope + cache write" kernels of serving engines; the shape is ours.
 */
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace dspark {

template <int kHeadDim>
struct RopePolicy {
  static constexpr int kThreads = 256;
  static constexpr int kLanesPerHead = kHeadDim / 8;
  static constexpr int kHeadsPerCta = kThreads / kLanesPerHead;
  static_assert(kLanesPerHead >= 2 && kLanesPerHead <= kWarpSize);
  static_assert(kHeadDim / 2 <= kThreads);
};

/* Typed view of dspark_qk_norm_rope_append_params; Key is the cache's type. */
template <typename T, typename Key>
struct RopeArgs {
  int32_t num_reqs;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  float eps;
  float rope_scale;
  const T* qkv;
  const T* q_norm; /* NULL: no norm */
  const T* k_norm;
  const float* inv_freq;
  const int32_t* positions;
  const int32_t* qo_indptr;
  const int32_t* seq_lens; /* read only with a cache */
  PagedLayout cache;
  T* q_out;
  Key* k_cache; /* NULL: no append */
  Key* v_cache;
  const float* k_scale; /* of e4m3 keys and values; else NULL */
  const float* v_scale;
  T* k_out; /* NULL: not written */
  T* v_out;
  int64_t stride_qkv_row;
  int64_t stride_q_out_row;
  int64_t stride_kv_out_row;
};

/* cos and sin of position * inv_freq, the product rounded to f32. */
__device__ __forceinline__ float2 rope_cos_sin(int position, float inv_freq) {
  constexpr double kInvPi = 0.318309886183790671537767526745;
  const double turns = static_cast<double>(static_cast<float>(position) * inv_freq) * kInvPi;
  const float reduced = static_cast<float>(turns - 2.0 * rint(turns * 0.5)); /* in [-1, 1] */
  float sine, cosine;
  sincospif(reduced, &sine, &cosine);
  return make_float2(cosine, sine);
}

/* RMSNorm of the head held by an aligned group of kLanes lanes, 8 values each; `weight` NULL leaves
 * it as it is. All 32 lanes call. */
template <typename T, int kLanes>
__device__ __forceinline__ void norm_head(float (&x)[8],
                                          const T* weight,
                                          float eps,
                                          int lane_in_head) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += x[i] * x[i];
  squares =
      warp_reduce<kLanes>(squares, SumOp{}); /* before the branch: weight may differ by lane */
  if (weight == nullptr) return;
  const float inverse_rms = rsqrtf(squares / static_cast<float>(kLanes * 8) + eps);
  float w[8];
  load_vec(weight + lane_in_head * 8, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = x[i] * inverse_rms * w[i];
}

/* Rotates the head held by kLanes lanes. Lanes of the lower half hold x[i], those of the upper half
 * x[i + D/2]. cos_sin has D/2 entries. All 32 lanes call. */
template <int kLanes>
__device__ __forceinline__ void rotate_head(float (&x)[8],
                                            const float2* cos_sin,
                                            int lane_in_head) {
  const bool lower = lane_in_head < kLanes / 2;
  const float2* own = cos_sin + (lane_in_head % (kLanes / 2)) * 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float partner = shuffle_xor(x[i], kLanes / 2);
    const float2 cs = own[i];
    x[i] = x[i] * cs.x + (lower ? -partner : partner) * cs.y;
  }
}

/* 8 values of T as they are, or the e4m3 numbers nearest to them over the head's factor. */
template <typename T>
__device__ __forceinline__ void store_keys(T* address, const uint4& raw, float) {
  store_raw(address, raw);
}

template <typename T>
__device__ __forceinline__ void store_keys(__nv_fp8_e4m3* address, const uint4& raw, float unit) {
  float x[8];
  unpack_vec<T>(raw, x);
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float2 pair = make_float2(__fdiv_rn(x[i], unit), __fdiv_rn(x[i + 1], unit));
    const uint32_t bytes = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    words[i / 4] |= bytes << (8 * (i % 4));
  }
  *reinterpret_cast<uint2*>(address) = make_uint2(words[0], words[1]);
}

/* Grid (num_rows, ceil(heads / kHeadsPerCta)). */
template <typename T, typename Key, int kHeadDim>
__global__ void __launch_bounds__(RopePolicy<kHeadDim>::kThreads)
    qk_norm_rope_append_kernel(const RopeArgs<T, Key> args) {
  using Policy = RopePolicy<kHeadDim>;
  constexpr int kLanes = Policy::kLanesPerHead;
  __shared__ float2 cos_sin[kHeadDim / 2];

  const int row = blockIdx.x;
  const int lane_in_head = threadIdx.x % kLanes;
  const int head = blockIdx.y * Policy::kHeadsPerCta + threadIdx.x / kLanes;
  const int first_k_head = args.num_q_heads;
  const int first_v_head = first_k_head + args.num_kv_heads;
  const bool active = head < first_v_head + args.num_kv_heads;
  const bool is_q = head < first_k_head;
  const bool is_v = head >= first_v_head;
  const int kv_head = head - (is_v ? first_v_head : first_k_head);
  const int column = lane_in_head * 8;

  /* All that is read from afar is asked for before any of it is waited for. Heads of one warp may
   * differ in kind or lie past the end: all lanes take the shuffles below, and only then part. Lanes
   * past the end carry zeros. */
  uint4 raw = make_uint4(0, 0, 0, 0);
  if (active) {
    raw = *reinterpret_cast<const uint4*>(args.qkv + row * args.stride_qkv_row +
                                          static_cast<int64_t>(head) * kHeadDim + column);
  }
  const int req = find_request(args.qo_indptr, args.num_reqs, row);
  if (req < 0) return; /* the whole CTA: req depends on the row alone */
  Key* cache = is_v ? args.v_cache : args.k_cache;
  int64_t offset = kUnmappedSlot;
  float unit = 1.0f;
  if (active && !is_q && cache != nullptr) {
    const int slot = args.seq_lens[req] + (row - args.qo_indptr[req]);
    offset = slot_offset(args.cache, req, slot, kv_head);
    if constexpr (!std::is_same_v<T, Key>) unit = (is_v ? args.v_scale : args.k_scale)[kv_head];
  }

  if (threadIdx.x < kHeadDim / 2) {
    const float2 cs = rope_cos_sin(args.positions[row], args.inv_freq[threadIdx.x]);
    cos_sin[threadIdx.x] = make_float2(cs.x * args.rope_scale, cs.y * args.rope_scale);
  }
  __syncthreads();

  float x[8];
  unpack_vec<T>(raw, x);
  norm_head<T, kLanes>(x, is_q ? args.q_norm : (is_v ? nullptr : args.k_norm), args.eps,
                       lane_in_head);
  rotate_head<kLanes>(x, cos_sin, lane_in_head);
  if (!active) return;
  if (!is_v) raw = pack_vec<T>(x);

  if (is_q) {
    store_raw(
        args.q_out + row * args.stride_q_out_row + static_cast<int64_t>(head) * kHeadDim + column,
        raw);
    return;
  }
  T* out = is_v ? args.v_out : args.k_out;
  if (out != nullptr) {
    store_raw(
        out + row * args.stride_kv_out_row + static_cast<int64_t>(kv_head) * kHeadDim + column,
        raw);
  }
  if (offset != kUnmappedSlot) store_keys<T>(cache + offset + column, raw, unit);
}

}  // namespace dspark
