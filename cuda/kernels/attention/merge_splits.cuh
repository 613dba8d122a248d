/*
 * Merges the partial results of the M tiles that more than one CTA worked on.
 *
 * Maths     M = max_s m_s;  out = sum_s 2^(m_s - M) O_s / sum_s 2^(m_s - M) l_s, in the order of the
 *           keys.
 * Mapping   One CTA per (item of the attention grid, KV head, few rows of the M tile); head_dim / 4
 *           lanes own one row, 4 values (16 bytes) each. The attention kernel has noted for every
 *           item what it leaves to merge: most have nothing or two partials, and nobody searches.
 * Traffic   partials * rows of the M tile * (head_dim + 2) * 4 bytes in, from L2.
 * Limit     launch latency, hidden behind the attention kernel by programmatic dependent launch.
 * Source    flash-decoding (Dao et al. 2023).
 */
#pragma once

#include "common/dependent_launch.cuh"
#include "common/vec.cuh"
#include "kernels/attention/tile.cuh"

namespace dspark {

/* Grid (items, num_kv_heads, tile_m / kRowsPerCta); tile_m is that of the attention kernel. */
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(MergePolicy<kHeadDim>::kThreads)
    merge_splits_kernel(const AttentionArgs<T> args, int tile_m) {
  using Policy = MergePolicy<kHeadDim>;
  wait_for_prerequisites();
  const int item = blockIdx.x;
  const int kv_head = blockIdx.y;
  const int m_in_tile = blockIdx.z * Policy::kRowsPerCta + threadIdx.x / Policy::kLanesPerRow;
  const int column = threadIdx.x % Policy::kLanesPerRow * 4;
  const int4 record = args.partials.merges[item];
  const int row_begin = record.x;
  const int m = record.y + m_in_tile;
  const int num_partials = record.w;
  if (m >= record.z) return; /* also where there is nothing to merge */

  const int first_slot = args.plan.is_balanced() ? 2 * item + 1 : item;
  auto entry_of = [&](int i) {
    const int64_t slot = args.plan.slot(first_slot, i);
    return (slot * args.num_kv_heads + kv_head) * tile_m + m_in_tile;
  };
  float total_max = -INFINITY;
#pragma unroll 8
  for (int i = 0; i < num_partials; ++i) {
    total_max = fmaxf(total_max, args.partials.max_sum[entry_of(i)].x);
  }
  const float reference = finite_max(total_max);
  float o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < num_partials; ++i) {
    const int64_t entry = entry_of(i);
    const float2 max_sum = args.partials.max_sum[entry];
    const float4 part =
        *reinterpret_cast<const float4*>(args.partials.out + entry * kHeadDim + column);
    const float weight = exp2_approx(max_sum.x - reference);
    sum += weight * max_sum.y;
    o[0] += weight * part.x;
    o[1] += weight * part.y;
    o[2] += weight * part.z;
    o[3] += weight * part.w;
  }
  normalise(o, sum);
  const int64_t row = row_begin + m / args.group_size;
  const int head = kv_head * args.group_size + m % args.group_size;
  const uint2 packed = make_uint2(Element<T>::pack(o[0], o[1]), Element<T>::pack(o[2], o[3]));
  *reinterpret_cast<uint2*>(args.out + row * args.stride_out_row +
                            static_cast<int64_t>(head) * kHeadDim + column) = packed;
}

}  // namespace dspark
