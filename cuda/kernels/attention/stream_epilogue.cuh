/*
 * How the streaming attention kernel ends a segment: the warps that share rows merge; whole results
 * are written out, partial ones left for merge_splits.cuh. See
 * stream_attention.cuh.
 */
#pragma once

#include "common/vec.cuh"
#include "kernels/attention/cluster_merge.cuh"
#include "kernels/attention/stream_tile.cuh"
#include "kernels/attention/sum_up.cuh"
#include "kernels/attention/warp_softmax.cuh"

namespace dspark {

constexpr int kWorkersBarrier = 1;

/* Where values of a row go; made once for a row. Pairs of values stand at `column` and kGap behind. */
template <typename T>
struct ResultRow {
  T* target;
  float inverse; /* of the sum */

  template <int kGap>
  __device__ __forceinline__ void put(int column, const float4& values) const {
    const uint32_t first = Element<T>::pack(values.x * inverse, values.y * inverse);
    const uint32_t second = Element<T>::pack(values.z * inverse, values.w * inverse);
    if constexpr (kGap == 2) {
      *reinterpret_cast<uint2*>(target + column) = make_uint2(first, second);
    } else {
      *reinterpret_cast<uint32_t*>(target + column) = first;
      *reinterpret_cast<uint32_t*>(target + column + kGap) = second;
    }
  }
};
struct PartialRow {
  float* target;

  template <int kGap>
  __device__ __forceinline__ void put(int column, const float4& values) const {
    if constexpr (kGap == 2) {
      *reinterpret_cast<float4*>(target + column) = values;
    } else {
      *reinterpret_cast<float2*>(target + column) = make_float2(values.x, values.y);
      *reinterpret_cast<float2*>(target + column + kGap) = make_float2(values.z, values.w);
    }
  }
};

/* Ends segments. Where warps share rows they exchange them, and then a lane has four neighbours of a
 * row, kLanesPerRow lanes a row. Where they do not, rows leave from registers. This code runs once
 * a segment, and its length is its time: what is the same for a row is found once. */
template <typename T, typename Policy>
struct StreamEpilogue {
  const AttentionArgs<T>& args;
  StreamShared<Policy>& shared;
  ClusterMerge<T, Policy> cluster;
  int warp;
  int lane;

  /* Ends the segment whose last tile `note` describes. All working threads call. */
  __device__ __forceinline__ void finish(WarpSoftmax<T, Policy>& state, const SegmentNote& note) {
    state.complete(args, shared.kv_head);
    const int rows = note.m_end(args.group_size) - note.m_begin;
    if constexpr (Policy::kLeavesAlone) {
      finish_registers(state, note, rows);
    } else {
      const int warp_n = warp / Policy::kWarpsM;
      sync_workers(); /* what was exchanged before is read */
      put(state, warp_n);
      sync_workers();
      finish_exchanged(note, rows);
    }
  }

  /* Writes this CTA's rows of an M tile that `senders` CTAs of its cluster worked on. All working
   * threads call. */
  __device__ __forceinline__ void finish_cluster(const SegmentNote& note, int senders) const {
    const int rows = note.m_end(args.group_size);
    cluster.gather(rows, senders);
    cluster_arrive_relaxed(); /* with what was sent to this CTA */
    constexpr int kStep = Policy::kWarps * Policy::kRowsPerWarp;
#pragma unroll 1
    for (int place = warp * Policy::kRowsPerWarp + lane / Policy::kLanesPerRow;; place += kStep) {
      const int row = (place << args.plan.cluster_shift()) + shared.rank;
      if (row >= rows) break;
#pragma unroll 1
      for (int column = lane % Policy::kLanesPerRow * 4; column < Policy::kHeadDim;
           column += Policy::kLanesPerRow * 4) {
        const RowSum sum = cluster.merge(place, column, senders);
        result_row(note, row, sum.max_sum).template put<2>(column, sum.out);
      }
    }
    __syncwarp();
    cluster_wait(); /* no CTA ends while what it sent is on its way */
  }

 private:
  static __device__ __forceinline__ void sync_workers() {
    sync_threads<Policy::kWorkers>(kWorkersBarrier);
  }

  __device__ __forceinline__ ResultRow<T> result_row(const SegmentNote& note,
                                                     int row,
                                                     float2 max_sum) const {
    const int m = note.m_begin + row;
    const int row_in_req = args.by_group_size.quotient(m);
    const int head = shared.kv_head * args.group_size + m - row_in_req * args.group_size;
    return {args.out + (note.row_begin + row_in_req) * args.stride_out_row +
                static_cast<int64_t>(head) * Policy::kHeadDim,
            inverse_of(max_sum.y)};
  }

  /* `leads`: this lane leaves (m, l), too. */
  __device__ __forceinline__ PartialRow partial_row(const SegmentNote& note,
                                                    int row,
                                                    float2 max_sum,
                                                    bool leads) const {
    const int64_t entry =
        (note.slot * int64_t{args.num_kv_heads} + shared.kv_head) * Policy::kTileM + row;
    if (leads) args.partials.max_sum[entry] = max_sum;
    return {args.partials.out + entry * Policy::kHeadDim};
  }

  /* put_rows(make_row) with what makes the rows that the segment's result goes to. */
  template <typename PutRows>
  __device__ __forceinline__ void pass_on(const SegmentNote& note, const PutRows& put_rows) const {
    if (note.slot == Segment::kWhole) {
      put_rows([&](int row, float2 max_sum, bool) { return result_row(note, row, max_sum); });
    } else if (shared.senders > 0) {
      put_rows([&](int row, float2 max_sum, bool leads) {
        return cluster.remote_row(row, max_sum, leads);
      });
    } else {
      put_rows([&](int row, float2 max_sum, bool leads) {
        return partial_row(note, row, max_sum, leads);
      });
    }
  }

  /* Merges the rows that the warps left, and passes them on. */
  __device__ __forceinline__ void finish_exchanged(const SegmentNote& note, int rows) const {
    constexpr int kStep = Policy::kWarps * Policy::kRowsPerWarp;
    constexpr int kOwnRows = Policy::kTileM / kStep;
    const int first = warp * Policy::kRowsPerWarp + lane / Policy::kLanesPerRow;
    const int column = lane % Policy::kLanesPerRow * 4;
    RowSum sums[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) sums[i] = merge_row(first + i * kStep, column);
    if (note.sums != kAlone) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const int row = first + i * kStep;
        sum_up(note.sums, row, &sums[i].max_sum, lane % Policy::kLanesPerRow == 0,
               [&](const RowWeights& weights) {
                 float4& kept = shared.sum_out[(row * Policy::kHeadDim + column) / 4];
                 if (note.sums & kAddsUp) weights.add(kept, &sums[i].out);
                 if (note.sums & kGoesOn) kept = sums[i].out;
               });
      }
      if (note.sums & kGoesOn) return;
    }
    pass_on(note, [&](const auto& make_row) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const int row = first + i * kStep;
        if (row >= rows) continue;
        make_row(row, sums[i].max_sum, column == 0).template put<2>(column, sums[i].out);
      }
    });
  }

  /* Passes on the rows of this warp, its share of the dimensions. */
  __device__ __forceinline__ void finish_registers(WarpSoftmax<T, Policy>& state,
                                                   const SegmentNote& note,
                                                   int rows) const {
    using State = WarpSoftmax<T, Policy>;
    constexpr int kGap = State::kBytes ? 2 : 8;
    const int warp_d = warp / Policy::kWarpsM;
    const int column = warp_d * State::kOutDims + State::column(0, lane);
    if (note.sums != kAlone) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 max_sum = make_float2(state.row_max[half], state.row_sum[half]);
        sum_up(note.sums, warp_d * Policy::kSumRows + own_row(half), &max_sum, lane % 4 == 0,
               [&](const RowWeights& weights) {
#pragma unroll
                 for (int n = 0; n < State::kOutSteps; ++n) {
                   const int place = half * State::kOutSteps + n;
                   float4& kept = shared.sum_out[place * Policy::kWorkers + threadIdx.x];
                   float4 values = state.values(n, half);
                   if (note.sums & kAddsUp) weights.add(kept, &values);
                   if (note.sums & kGoesOn) kept = values;
                   state.set_values(n, half, values);
                 }
               });
        state.row_max[half] = max_sum.x;
        state.row_sum[half] = max_sum.y;
      }
      if (note.sums & kGoesOn) return;
    }
    pass_on(note, [&](const auto& make_row) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = own_row(half);
        if (row >= rows) continue;
        const float2 max_sum = make_float2(state.row_max[half], state.row_sum[half]);
        const auto target = make_row(row, max_sum, column == 0);
#pragma unroll
        for (int n = 0; n < State::kOutSteps; ++n) {
          target.template put<kGap>(column + n * 16, state.values(n, half));
        }
      }
    });
  }

  /* Adds the parts before to a row, and keeps the sum where it goes on: add_values does so with a
   * lane's values, given the weights of both. A lane finds what it kept itself. All lanes call. */
  template <typename AddValues>
  __device__ __forceinline__ void sum_up(
      int sums, int row, float2* max_sum, bool leads, const AddValues& add_values) const {
    float2& kept = shared.sum_max_sum[row];
    const RowWeights weights(kept, *max_sum);
    add_values(weights);
    if (sums & kAddsUp) *max_sum = weights.max_sum;
    __syncwarp(); /* all lanes of the row have read (m, l) */
    if (leads && (sums & kGoesOn)) kept = *max_sum;
  }

  /* Entry of a row, `part` being the place of its warp among those that share rows. */
  static __device__ __forceinline__ int entry_of(int part, int row) {
    return part * Policy::kTileM + row;
  }
  /* The upper or lower row of this lane in the M tile. */
  __device__ __forceinline__ int own_row(int half) const {
    return warp % Policy::kWarpsM * 16 + half * 8 + lane / 4;
  }

  /* Leaves the warp's 16 rows. */
  __device__ __forceinline__ void put(WarpSoftmax<T, Policy>& state, int part) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = entry_of(part, own_row(half));
      if (lane % 4 == 0) {
        shared.exchanged_max_sum[e] = make_float2(state.row_max[half], state.row_sum[half]);
      }
      float* row = shared.exchanged_out + e * Policy::kOutStride;
#pragma unroll
      for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(row + state.column(n, lane)) =
            make_float2(state.value(n, half, 0), state.value(n, half, 1));
      }
    }
  }

  /* Merges what the warps left of a row, in the order of the warps. */
  __device__ __forceinline__ RowSum merge_row(int row, int column) const {
    float2 max_sum[Policy::kParts];
    float total_max = -INFINITY;
#pragma unroll
    for (int n = 0; n < Policy::kParts; ++n) {
      max_sum[n] = shared.exchanged_max_sum[entry_of(n, row)];
      total_max = fmaxf(total_max, max_sum[n].x);
    }
    const float reference = finite_max(total_max);
    RowSum sum = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float2(total_max, 0.0f)};
#pragma unroll
    for (int n = 0; n < Policy::kParts; ++n) {
      const float weight = exp2_approx(max_sum[n].x - reference);
      sum.max_sum.y += weight * max_sum[n].y;
      const float* from = shared.exchanged_out + entry_of(n, row) * Policy::kOutStride;
      add_weighted(sum.out, weight, *reinterpret_cast<const float4*>(from + column));
    }
    return sum;
  }
};

}  // namespace dspark
