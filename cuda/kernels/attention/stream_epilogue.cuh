/*
 * How the streaming attention kernel ends a segment: the warps that share rows merge; whole results
 * are written out, partial ones left for merge_splits.cuh. See
 * stream_attention.cuh.
 */
#pragma once

#include "common/vec.cuh"
#include "kernels/attention/stream_tile.cuh"
#include "kernels/attention/sum_up.cuh"
#include "kernels/attention/warp_softmax.cuh"

namespace dspark {

constexpr int kWorkersBarrier = 1;

/* The lanes of a warp on rows of O: kLanesPerRow lanes a row, 4 values each, kPieces times. */
template <typename T, typename Policy>
struct StreamEpilogue {
  const AttentionArgs<T>& args;
  StreamShared<Policy>& shared;
  int kv_head;
  int warp;
  int lane;

  static __device__ __forceinline__ int column_of(int lane, int piece) {
    return (piece * Policy::kLanesPerRow + lane % Policy::kLanesPerRow) * 4;
  }

  /* Ends the segment whose last tile `note` describes. All working threads call. */
  __device__ __forceinline__ void finish(WarpSoftmax<T, Policy>& state, const SegmentNote& note) {
    state.complete(args, kv_head);
    const int warp_n = warp / Policy::kWarpsM;
    sync_workers(); /* what was exchanged before is read */
    if constexpr (Policy::kFolded > 0) {
      if (warp_n >= Policy::kParts) put(state, warp_n - Policy::kParts);
      sync_workers();
      if (warp_n < Policy::kFolded) fold(state, warp_n);
      sync_workers();
    }
    if (warp_n < Policy::kParts) put(state, warp_n);
    sync_workers();
    constexpr int kStep = Policy::kWarps * Policy::kRowsPerWarp;
    const int rows = min(note.m_end(args.group_size) - note.m_begin, Policy::kTileM);
#pragma unroll 4
    for (int base = warp * Policy::kRowsPerWarp; base < rows; base += kStep) {
      const int row = base + lane / Policy::kLanesPerRow;
      pass_on(note, row, row < rows);
    }
  }

 private:
  static __device__ __forceinline__ void sync_workers() {
    sync_threads<Policy::kWorkers>(kWorkersBarrier);
  }

  /* Merges a row, if it is one, and writes, leaves or keeps it. All lanes call. */
  __device__ __forceinline__ void pass_on(const SegmentNote& note, int row, bool valid) const {
#pragma unroll
    for (int piece = 0; piece < Policy::kPieces; ++piece) {
      RowSum sum = valid ? merge_row(row, piece) : RowSum::empty();
      if (note.sums != kAlone) sum_up(note.sums, row, piece, valid, &sum);
      if (!valid || (note.sums & kGoesOn)) continue;
      if (note.slot == Segment::kWhole) {
        write(note, row, piece, sum);
      } else {
        leave(note, row, piece, sum);
      }
    }
  }

  /* Adds the parts before, and keeps the sum where it goes on. A lane finds what it left itself. */
  __device__ __forceinline__ void sum_up(
      int sums, int row, int piece, bool valid, RowSum* part) const {
    const int place = (row * Policy::kHeadDim + column_of(lane, piece)) / 4;
    if (valid && (sums & kAddsUp)) {
      RowSum total = {shared.sum_out[place], shared.sum_max_sum[row]};
      total.add(*part);
      *part = total;
    }
    __syncwarp(); /* all lanes of the row have read (m, l) */
    if (!valid || !(sums & kGoesOn)) return;
    shared.sum_out[place] = part->out;
    if (piece == Policy::kPieces - 1) shared.sum_max_sum[row] = part->max_sum;
  }

  /* Writes values of a row of the result. */
  __device__ __forceinline__ void write(const SegmentNote& note,
                                        int m_in_tile,
                                        int piece,
                                        const RowSum& sum) const {
    float o[4] = {sum.out.x, sum.out.y, sum.out.z, sum.out.w};
    normalise(o, sum.max_sum.y);
    const int m = note.m_begin + m_in_tile;
    const int row_in_req = args.by_group_size.quotient(m);
    const int64_t row = note.row_begin + row_in_req;
    const int head = kv_head * args.group_size + m - row_in_req * args.group_size;
    T* target = args.out + row * args.stride_out_row +
                static_cast<int64_t>(head) * Policy::kHeadDim + column_of(lane, piece);
    *reinterpret_cast<uint2*>(target) =
        make_uint2(Element<T>::pack(o[0], o[1]), Element<T>::pack(o[2], o[3]));
  }

  /* Leaves values of a row of a partial result. */
  __device__ __forceinline__ void leave(const SegmentNote& note,
                                        int m_in_tile,
                                        int piece,
                                        const RowSum& sum) const {
    const int64_t entry =
        (note.slot * int64_t{args.num_kv_heads} + kv_head) * Policy::kTileM + m_in_tile;
    float* row = args.partials.out + entry * Policy::kHeadDim;
    *reinterpret_cast<float4*>(row + column_of(lane, piece)) = sum.out;
    if (lane % Policy::kLanesPerRow == 0 && piece == 0) args.partials.max_sum[entry] = sum.max_sum;
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

  /* Adds to the warp's rows what another left as `part`. */
  __device__ __forceinline__ void fold(WarpSoftmax<T, Policy>& state, int part) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = entry_of(part, own_row(half));
      const float2 other = shared.exchanged_max_sum[e];
      const float total_max = fmaxf(state.row_max[half], other.x);
      const float reference = finite_max(total_max);
      const float own_weight = exp2_approx(state.row_max[half] - reference);
      const float weight = exp2_approx(other.x - reference);
      state.row_max[half] = total_max;
      state.row_sum[half] = own_weight * state.row_sum[half] + weight * other.y;
      const float* row = shared.exchanged_out + e * Policy::kOutStride;
#pragma unroll
      for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
        const float2 part = *reinterpret_cast<const float2*>(row + state.column(n, lane));
        float& first = state.value(n, half, 0);
        float& second = state.value(n, half, 1);
        first = own_weight * first + weight * part.x;
        second = own_weight * second + weight * part.y;
      }
    }
  }

  /* Merges what the warps left of a row, in the order of the warps. */
  __device__ __forceinline__ RowSum merge_row(int row, int piece) const {
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
      add_weighted(sum.out, weight,
                   *reinterpret_cast<const float4*>(from + column_of(lane, piece)));
    }
    return sum;
  }

  static __device__ __forceinline__ void add_weighted(float4& o, float weight, float4 part) {
    o.x += weight * part.x;
    o.y += weight * part.y;
    o.z += weight * part.z;
    o.w += weight * part.w;
  }
};

}  // namespace dspark
