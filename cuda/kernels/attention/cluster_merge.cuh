/*
 * How the CTAs of a cluster merge the partial results of one M tile: through each other's shared
 * memory, so that neither a second kernel nor the workspace is needed. See stream_attention.cuh.
 */
#pragma once

#include "common/cluster.cuh"
#include "common/vec.cuh"
#include "kernels/attention/stream_tile.cuh"
#include "kernels/attention/sum_up.cuh"

namespace dspark {

/* Where values of a row go: see ResultRow. */
struct RemoteRow {
  uint32_t target; /* in the owner's shared memory, as its barrier */
  uint32_t barrier;

  template <int kGap>
  __device__ __forceinline__ void put(int column, const float4& values) const {
    const uint32_t place = target + column * static_cast<uint32_t>(sizeof(float));
    if constexpr (kGap == 2) {
      store_remote(place, values, barrier);
    } else {
      store_remote(place, make_float2(values.x, values.y), barrier);
      store_remote(place + kGap * static_cast<uint32_t>(sizeof(float)),
                   make_float2(values.z, values.w), barrier);
    }
  }
};

/* Row r of the M tile belongs to CTA r % size of the cluster. Every CTA with keys sends its values of
 * the row there, to entry sender * rows_per_cta + r / size; the bytes are counted by the owner's
 * barrier `gathered`, and the owner adds them in the order of the senders, which is that of the
 * keys. */
template <typename T, typename Policy>
struct ClusterMerge {
  const AttentionArgs<T>& args;
  StreamShared<Policy>& shared;

  /* Where values of a row go. `leads`: this lane sends (m, l), too. After the first cluster_wait. */
  __device__ __forceinline__ RemoteRow remote_row(int row, float2 max_sum, bool leads) const {
    const int size = args.plan.cluster_ctas; /* a power of two */
    const int owner = row & (size - 1);
    const int entry = (shared.rank * Policy::kTileM + row) >> args.plan.cluster_shift();
    const uint32_t barrier = remote_address(shared_address(&shared.gathered), owner);
    if (leads) {
      store_remote(remote_address(shared_address(&shared.sum_max_sum[entry]), owner), max_sum,
                   barrier);
    }
    const float4* values = &shared.sum_out[entry * (Policy::kHeadDim / 4)];
    return {remote_address(shared_address(values), owner), barrier};
  }

  /* Waits for the values of a CTA's own rows among the first `rows`, of `senders` CTAs. All working
   * threads call. */
  __device__ __forceinline__ void gather(int rows, int senders) const {
    const int size = args.plan.cluster_ctas;
    const int own_rows = (rows - shared.rank + size - 1) >> args.plan.cluster_shift();
    if (own_rows <= 0) return;
    constexpr int kEntryBytes = Policy::kHeadDim * sizeof(float) + sizeof(float2);
    if (threadIdx.x == 0) {
      barrier_arrive_expect(&shared.gathered, senders * own_rows * kEntryBytes);
    }
    barrier_wait_cluster(&shared.gathered, 0);
  }

  /* The sum of values of the CTA's own row `place`, that is row place * size + rank. */
  __device__ __forceinline__ RowSum merge(int place, int column, int senders) const {
    const int stride = Policy::kTileM >> args.plan.cluster_shift();
    float2 max_sum[kMaxClusterCtas];
    float total_max = -INFINITY;
#pragma unroll
    for (int s = 0; s < kMaxClusterCtas; ++s) {
      max_sum[s] =
          s < senders ? shared.sum_max_sum[s * stride + place] : make_float2(-INFINITY, 0.0f);
      total_max = fmaxf(total_max, max_sum[s].x);
    }
    const float reference = finite_max(total_max);
    RowSum sum = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float2(total_max, 0.0f)};
#pragma unroll
    for (int s = 0; s < kMaxClusterCtas; ++s) {
      if (s >= senders) continue;
      const float weight = exp2_approx(max_sum[s].x - reference);
      sum.max_sum.y += weight * max_sum[s].y;
      const int entry = s * stride + place;
      add_weighted(sum.out, weight, shared.sum_out[(entry * Policy::kHeadDim + column) / 4]);
    }
    return sum;
  }
};

}  // namespace dspark
