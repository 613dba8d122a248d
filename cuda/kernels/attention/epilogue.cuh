/*
 * Merges the warps that share rows and writes the rows. See paged_attention.cuh.
 */
#pragma once

#include "common/vec.cuh"
#include "kernels/attention/warp_softmax.cuh"

namespace dspark {

/* Exchange area in shared memory: entry e = (warp_n - 1) * kTileM + m of the tile. */
template <typename Policy>
struct WarpExchange {
  float* out;      /* [kExchangeRows, kOutStride], not normalised */
  float2* max_sum; /* [kExchangeRows] */

  __device__ __forceinline__ explicit WarpExchange(void* shared) {
    out = static_cast<float*>(shared);
    max_sum = reinterpret_cast<float2*>(out + Policy::kExchangeRows * Policy::kOutStride);
  }

  __device__ __forceinline__ int entry(int warp_m, int warp_n, int half, int lane) const {
    return (warp_n - 1) * Policy::kTileM + warp_m * 16 + half * 8 + lane / 4;
  }

  /* Leaves the rows of a warp with warp_n > 0. */
  template <typename T>
  __device__ __forceinline__ void put(WarpSoftmax<T, Policy>& state,
                                      int warp_m,
                                      int warp_n,
                                      int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = entry(warp_m, warp_n, half, lane);
      if (lane % 4 == 0) max_sum[e] = make_float2(state.row_max[half], state.row_sum[half]);
      float* row = out + e * Policy::kOutStride;
#pragma unroll
      for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(row + state.column(n, lane)) =
            make_float2(state.value(n, half, 0), state.value(n, half, 1));
      }
    }
  }

  /* Adds the rows that the other warps left to those of the warp with warp_n = 0, in the order of
   * the warps. */
  template <typename T>
  __device__ __forceinline__ void collect(WarpSoftmax<T, Policy>& state,
                                          int warp_m,
                                          int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total_max = state.row_max[half];
#pragma unroll
      for (int w = 1; w < Policy::kWarpsN; ++w) {
        total_max = fmaxf(total_max, max_sum[entry(warp_m, w, half, lane)].x);
      }
      const float reference = finite_max(total_max);
      const float own_weight = exp2_approx(state.row_max[half] - reference);
      state.row_max[half] = total_max;
      state.row_sum[half] *= own_weight;
#pragma unroll
      for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
        state.value(n, half, 0) *= own_weight;
        state.value(n, half, 1) *= own_weight;
      }
#pragma unroll
      for (int w = 1; w < Policy::kWarpsN; ++w) {
        const int e = entry(warp_m, w, half, lane);
        const float weight = exp2_approx(max_sum[e].x - reference);
        state.row_sum[half] += weight * max_sum[e].y;
        const float* row = out + e * Policy::kOutStride;
#pragma unroll
        for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
          const float2 part = *reinterpret_cast<const float2*>(row + state.column(n, lane));
          state.value(n, half, 0) += weight * part.x;
          state.value(n, half, 1) += weight * part.y;
        }
      }
    }
  }
};

/* Writes the warp's rows to `out`, or to the partial results of the segment's slot. */
template <typename T, typename Policy>
__device__ __forceinline__ void write_rows(const AttentionArgs<T>& args,
                                           const SegmentNote& note,
                                           WarpSoftmax<T, Policy>& state,
                                           int kv_head,
                                           int warp_m,
                                           int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m_in_tile = warp_m * 16 + half * 8 + lane / 4;
    const int m = note.m_begin + m_in_tile;
    if (m >= note.m_end(args.group_size)) continue;
    if (note.slot == Segment::kWhole) {
      const int row_in_req = args.by_group_size.quotient(m);
      const int64_t row = note.row_begin + row_in_req;
      const int head = kv_head * args.group_size + m - row_in_req * args.group_size;
      T* target =
          args.out + row * args.stride_out_row + static_cast<int64_t>(head) * Policy::kHeadDim;
      const float sum = state.row_sum[half];
#pragma unroll
      for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
        float o[2] = {state.value(n, half, 0), state.value(n, half, 1)};
        normalise(o, sum);
        *reinterpret_cast<uint32_t*>(target + state.column(n, lane)) = Element<T>::pack(o[0], o[1]);
      }
      continue;
    }
    const int64_t entry =
        (note.slot * int64_t{args.num_kv_heads} + kv_head) * Policy::kTileM + m_in_tile;
    float* target = args.partials.out + entry * Policy::kHeadDim;
#pragma unroll
    for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(target + state.column(n, lane)) =
          make_float2(state.value(n, half, 0), state.value(n, half, 1));
    }
    if (lane % 4 == 0) {
      args.partials.max_sum[entry] = make_float2(state.row_max[half], state.row_sum[half]);
    }
  }
}

}  // namespace dspark
