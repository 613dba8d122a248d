/*
 * The two products and the online softmax of one warp, in registers. See paged_attention.cuh.
 */
#pragma once

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/vec.cuh"
#include "kernels/attention/tile.cuh"

namespace dspark {

/* The running softmax of one warp: 16 rows (g and g + 8 per lane) by head_dim. */
template <typename T, typename Policy>
struct WarpSoftmax {
  static constexpr int kKeySteps = Policy::kKeysPerWarp / 16;
  static constexpr int kDimSteps = Policy::kHeadDim / 16;

  uint32_t q[kDimSteps][4];
  float out[2 * kDimSteps][4];
  float row_max[2];
  float row_sum[2]; /* of this lane's columns; the quad is summed at the end */
  int visible[2];   /* keys [0, visible) of the cache are seen by the row */

  /* Loads the rows of q and empties the sums. Rows past m_end are zero and see what the last row
   * sees; they are never written. */
  __device__ __forceinline__ void init(const AttentionArgs<T>& args,
                                       const AttentionTile& tile,
                                       int warp_m,
                                       int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = tile.m_begin + warp_m * 16 + lane / 4 + half * 8;
      const bool valid = m < tile.m_end;
      const int row = (valid ? m : tile.m_end - 1) / args.group_size;
      const int head = tile.kv_head * args.group_size + (valid ? m : 0) % args.group_size;
      const T* source = args.q + (tile.keys.row_begin + row) * args.stride_q_row +
                        static_cast<int64_t>(head) * Policy::kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kDimSteps; ++d) {
        const T* at = source + d * 16;
        q[d][half] = valid ? *reinterpret_cast<const uint32_t*>(at) : 0u;
        q[d][2 + half] = valid ? *reinterpret_cast<const uint32_t*>(at + 8) : 0u;
      }
      row_max[half] = -INFINITY;
      row_sum[half] = 0.0f;
      visible[half] = tile.keys.is_causal ? tile.keys.seq_len + row + 1 : INT32_MAX;
    }
#pragma unroll
    for (int n = 0; n < 2 * kDimSteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
  }

  /* Takes in the warp's keys [first_row, first_row + kKeysPerWarp) of a stage. `mask` has a bit per
   * key that is there; the first of them is key `first_key` of the request. */
  __device__ __forceinline__ void step(const T* k_stage,
                                       const T* v_stage,
                                       int first_row,
                                       uint64_t mask,
                                       int first_key,
                                       float scale_log2,
                                       int lane) {
    float scores[2 * kKeySteps][4];
    multiply_keys(scores, k_stage, first_row, lane);
    mask_scores(scores, mask, first_key, scale_log2, lane);
    rescale(scores);
    multiply_values(scores, v_stage, first_row, lane);
  }

 private:
  /* scores = q K^T. B (k = dim, column = key) of K rows is a plain ldmatrix: matrices are (keys
   * 0-7, dims 0-7), (keys 0-7, dims 8-15), (keys 8-15, dims 0-7), (keys 8-15, dims 8-15). */
  __device__ __forceinline__ void multiply_keys(float (&scores)[2 * kKeySteps][4],
                                                const T* k_stage,
                                                int first_row,
                                                int lane) const {
#pragma unroll
    for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
    const int row = first_row + lane / 16 * 8 + lane % 8;
    const int half = lane / 8 % 2;
#pragma unroll
    for (int d = 0; d < kDimSteps; ++d) {
      const int chunk = swizzle(row, 2 * d + half);
#pragma unroll
      for (int j = 0; j < kKeySteps; ++j) {
        uint32_t b[4];
        load_matrix_x4(b, shared_address(k_stage + (row + j * 16) * Policy::kHeadDim + chunk * 8));
        mma_m16n8k16<T>(scores[2 * j], q[d], b[0], b[1]);
        mma_m16n8k16<T>(scores[2 * j + 1], q[d], b[2], b[3]);
      }
    }
  }

  /* Scales, and puts -inf where the row must not look: by selection, so that whatever a masked
   * product holds is dropped. */
  __device__ __forceinline__ void mask_scores(float (&scores)[2 * kKeySteps][4],
                                              uint64_t mask,
                                              int first_key,
                                              float scale_log2,
                                              int lane) const {
    constexpr uint64_t kAllKeys = ~uint64_t{0} >> (64 - Policy::kKeysPerWarp);
    /* visible[0] <= visible[1] in every lane, and lane 0 has the smallest: ask all the same. */
    const bool whole = mask == kAllKeys && visible[0] >= first_key + Policy::kKeysPerWarp;
    if (__all_sync(kAllLanes, whole)) {
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= scale_log2;
      }
      return;
    }
    const int column = lane % 4 * 2;
    const uint64_t lane_mask = mask >> column;
#pragma unroll
    for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = n * 8 + i % 2; /* relative to column */
        const bool seen = (lane_mask >> key & 1) != 0 && first_key + column + key < visible[i / 2];
        scores[n][i] = seen ? scores[n][i] * scale_log2 : -INFINITY;
      }
    }
  }

  /* Turns scores into p and brings sums and output to the new maximum. */
  __device__ __forceinline__ void rescale(float (&scores)[2 * kKeySteps][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
        tile_max = fmaxf(tile_max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      }
      tile_max = warp_reduce<4>(tile_max, MaxOp{});
      const float new_max = fmaxf(row_max[half], tile_max);
      const float reference = finite_max(new_max);
      const float decay = exp2_approx(row_max[half] - reference);
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2_approx(scores[n][i] - reference);
          sum += scores[n][i];
        }
      }
      row_sum[half] = row_sum[half] * decay + sum;
      row_max[half] = new_max;
#pragma unroll
      for (int n = 0; n < 2 * kDimSteps; ++n) {
        out[n][2 * half] *= decay;
        out[n][2 * half + 1] *= decay;
      }
    }
  }

  /* out += p V. B (k = key, column = dim) of V rows is a transposed ldmatrix: matrices are (keys
   * 0-7, dims 0-7), (keys 8-15, dims 0-7), (keys 0-7, dims 8-15), (keys 8-15, dims 8-15). */
  __device__ __forceinline__ void multiply_values(const float (&p)[2 * kKeySteps][4],
                                                  const T* v_stage,
                                                  int first_row,
                                                  int lane) {
    const int row = first_row + lane / 8 % 2 * 8 + lane % 8;
    const int half = lane / 16;
#pragma unroll
    for (int j = 0; j < kKeySteps; ++j) {
      const uint32_t a[4] = {Element<T>::pack(p[2 * j][0], p[2 * j][1]),
                             Element<T>::pack(p[2 * j][2], p[2 * j][3]),
                             Element<T>::pack(p[2 * j + 1][0], p[2 * j + 1][1]),
                             Element<T>::pack(p[2 * j + 1][2], p[2 * j + 1][3])};
#pragma unroll
      for (int d = 0; d < kDimSteps; ++d) {
        const int chunk = swizzle(row, 2 * d + half);
        uint32_t b[4];
        load_matrix_x4_transposed(
            b, shared_address(v_stage + (row + j * 16) * Policy::kHeadDim + chunk * 8));
        mma_m16n8k16<T>(out[2 * d], a, b[0], b[1]);
        mma_m16n8k16<T>(out[2 * d + 1], a, b[2], b[3]);
      }
    }
  }
};

}  // namespace dspark
