/*
 * Merges the warps of a CTA and writes its rows. See paged_attention.cuh.
 */
#pragma once

#include "common/vec.cuh"
#include "kernels/attention/warp_softmax.cuh"

namespace dspark {

/* Shared memory of the epilogue: entry e = warp_n * kTileM + m of the tile. */
template <typename Policy>
struct EpilogueBuffer {
  float* out;     /* [kWarpsN * kTileM, kOutStride], not normalised */
  float* row_max; /* [kWarpsN * kTileM] */
  float* row_sum;

  __device__ __forceinline__ explicit EpilogueBuffer(void* shared) {
    constexpr int kEntries = Policy::kWarpsN * Policy::kTileM;
    out = static_cast<float*>(shared);
    row_max = out + kEntries * Policy::kOutStride;
    row_sum = row_max + kEntries;
  }

  template <typename T>
  __device__ __forceinline__ void put(const WarpSoftmax<T, Policy>& state,
                                      int warp_m,
                                      int warp_n,
                                      int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int entry = warp_n * Policy::kTileM + warp_m * 16 + lane / 4 + half * 8;
      const float sum = warp_reduce<4>(state.row_sum[half], SumOp{});
      if (lane % 4 == 0) {
        row_max[entry] = state.row_max[half];
        row_sum[entry] = sum;
      }
      float* row = out + entry * Policy::kOutStride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(row + n * 8) =
            make_float2(state.out[n][2 * half], state.out[n][2 * half + 1]);
      }
    }
  }

  /* Row m over all warps along N, dims [column, column + 8), in the order of the warps. */
  __device__ __forceinline__ void merge(
      int m, int column, float (&o)[8], float& m_out, float& l_out) const {
    float total_max = -INFINITY;
#pragma unroll
    for (int w = 0; w < Policy::kWarpsN; ++w) {
      total_max = fmaxf(total_max, row_max[w * Policy::kTileM + m]);
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < Policy::kWarpsN; ++w) {
      const int entry = w * Policy::kTileM + m;
      const float weight = exp2_approx(row_max[entry] - finite_max(total_max));
      total += weight * row_sum[entry];
      float part[8];
      const float* source = out + entry * Policy::kOutStride + column;
      *reinterpret_cast<float4*>(part) = *reinterpret_cast<const float4*>(source);
      *reinterpret_cast<float4*>(part + 4) = *reinterpret_cast<const float4*>(source + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) o[i] += weight * part[i];
    }
    m_out = total_max;
    l_out = total;
  }
};

/* Merges the warps of the CTA and writes rows to `out`, or to the partials of `split`. */
template <typename T, typename Policy>
__device__ __forceinline__ void write_tile(const AttentionArgs<T>& args,
                                           const AttentionTile& tile,
                                           const EpilogueBuffer<Policy>& buffer,
                                           int split,
                                           bool is_only_split) {
  for (int i = threadIdx.x; i < Policy::kTileM * Policy::kChunks; i += Policy::kThreads) {
    const int m_in_tile = i / Policy::kChunks;
    const int column = i % Policy::kChunks * 8;
    const int m = tile.m_begin + m_in_tile;
    if (m >= tile.m_end) return;
    const int64_t row = tile.keys.row_begin + m / args.group_size;
    const int head = tile.kv_head * args.group_size + m % args.group_size;
    float o[8], row_max, row_sum;
    buffer.merge(m_in_tile, column, o, row_max, row_sum);
    if (is_only_split) {
      normalise(o, row_sum);
      store_vec(args.out + row * args.stride_out_row +
                    static_cast<int64_t>(head) * Policy::kHeadDim + column,
                o);
      continue;
    }
    const int64_t entry = (split * int64_t{args.num_rows} + row) * args.num_q_heads + head;
    float* target = args.partials.out + entry * Policy::kHeadDim + column;
    *reinterpret_cast<float4*>(target) = make_float4(o[0], o[1], o[2], o[3]);
    *reinterpret_cast<float4*>(target + 4) = make_float4(o[4], o[5], o[6], o[7]);
    if (column == 0) args.partials.max_sum[entry] = make_float2(row_max, row_sum);
  }
}

}  // namespace dspark
