/*
 * Merges the partial results of a request's splits.
 *
 * Maths     M = max_s m_s;  out = sum_s 2^(m_s - M) O_s / sum_s 2^(m_s - M) l_s, in the order of s.
 * Mapping   head_dim / 4 lanes own one (row, q head), 4 values (16 bytes) each; requests that used
 *           one split were written by the attention kernel and are passed over.
 * Traffic   splits * rows * q heads * (head_dim + 2) * 4 bytes in: a tenth of the keys read.
 * Limit     launch latency.
 * Source    flash-decoding (Dao et al. 2023).
 */
#pragma once

#include "common/paged_kv.cuh"
#include "common/vec.cuh"
#include "kernels/attention/tile.cuh"

namespace dspark {

template <int kHeadDim>
struct MergePolicy {
  static constexpr int kThreads = 128;
  static constexpr int kLanesPerHead = kHeadDim / 4;
  static constexpr int kHeadsPerCta = kThreads / kLanesPerHead;
};

/* Grid (num_rows, ceil(num_q_heads / kHeadsPerCta)). */
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(MergePolicy<kHeadDim>::kThreads)
    merge_splits_kernel(const AttentionArgs<T> args, int num_reqs) {
  using Policy = MergePolicy<kHeadDim>;
  const int row = blockIdx.x;
  const int head = blockIdx.y * Policy::kHeadsPerCta + threadIdx.x / Policy::kLanesPerHead;
  const int column = threadIdx.x % Policy::kLanesPerHead * 4;
  const int req = find_request(args.qo_indptr, num_reqs, row);
  if (req < 0 || head >= args.num_q_heads) return;

  const RequestKeys keys =
      RequestKeys::load(args.qo_indptr, args.seq_lens, req, args.num_rows, args.k_block == nullptr);
  const int num_splits = args.split.splits_of(keys.num_tiles());
  if (num_splits == 1) return;

  const int64_t split_stride = int64_t{args.num_rows} * args.num_q_heads;
  const int64_t first_entry = int64_t{row} * args.num_q_heads + head;
  float total_max = -INFINITY;
  for (int s = 0; s < num_splits; ++s) {
    total_max = fmaxf(total_max, args.partials.max_sum[first_entry + s * split_stride].x);
  }
  const float reference = finite_max(total_max);
  float o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  float sum = 0.0f;
  for (int s = 0; s < num_splits; ++s) {
    const int64_t entry = first_entry + s * split_stride;
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
  const uint2 packed = make_uint2(Element<T>::pack(o[0], o[1]), Element<T>::pack(o[2], o[3]));
  *reinterpret_cast<uint2*>(args.out + row * args.stride_out_row +
                            static_cast<int64_t>(head) * kHeadDim + column) = packed;
}

}  // namespace dspark
