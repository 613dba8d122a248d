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
  int seen_begin
      [2]; /* the row sees keys [seen_begin, seen_end), and of a tree those its mask names */
  int seen_end[2];

  /* Loads the rows of q and empties the sums. Rows past the last one are zero and see what the last
   * sees; they are never written. */
  __device__ __forceinline__ void init(
      const AttentionArgs<T>& args, const TileNote& note, int kv_head, int warp_m, int lane) {
    const int m_end = note.m_end(args.group_size);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = note.m_begin + warp_m * 16 + lane / 4 + half * 8;
      const bool valid = m < m_end;
      const int row = (valid ? m : m_end - 1) / args.group_size;
      const int head = kv_head * args.group_size + (valid ? m : 0) % args.group_size;
      const T* source = args.q + (note.row_begin + row) * args.stride_q_row +
                        static_cast<int64_t>(head) * Policy::kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kDimSteps; ++d) {
        const T* at = source + d * 16;
        q[d][half] = valid ? *reinterpret_cast<const uint32_t*>(at) : 0u;
        q[d][2 + half] = valid ? *reinterpret_cast<const uint32_t*>(at + 8) : 0u;
      }
      row_max[half] = -INFINITY;
      row_sum[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < 2 * kDimSteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
  }

  /* Takes in keys [first_row, first_row + kKeysPerWarp) of a tile (K, then V). */
  __device__ __forceinline__ void step(const AttentionArgs<T>& args,
                                       const TileNote& note,
                                       const T* tile,
                                       int first_row,
                                       int warp_m,
                                       int lane) {
    const uint64_t mask = note.key_mask >> first_row & kAllKeys;
    const bool has_rows = note.m_begin + warp_m * 16 < note.m_end(args.group_size);
    if (!has_rows || mask == 0) return;
    float scores[2 * kKeySteps][4];
    multiply_keys(scores, tile, first_row, lane);
    scale_scores(scores, args);
    mask_scores(scores, mask, args, note, note.first_key + first_row, warp_m, lane);
    rescale(scores);
    multiply_values(scores, tile + Policy::kTileElements, first_row, lane);
  }

  /* Completes row_sum over the four lanes of a row; after the last step. */
  __device__ __forceinline__ void sum_quads() {
#pragma unroll
    for (int half = 0; half < 2; ++half) row_sum[half] = warp_reduce<4>(row_sum[half], SumOp{});
  }

 private:
  static constexpr uint64_t kAllKeys = ~uint64_t{0} >> (64 - Policy::kKeysPerWarp);

  /* Bit j: the row sees row j of its request; itself always. */
  static __device__ __forceinline__ uint64_t tree_mask(const AttentionArgs<T>& args,
                                                       const TileNote& note,
                                                       int row) {
    const uint32_t* words = args.tree_mask + 2 * (int64_t{note.row_begin} + row);
    return (uint64_t{words[1]} << 32 | words[0]) | uint64_t{1} << (row & 63);
  }

  /* Bit k: `row` sees key first_key + k, if it is there. */
  static __device__ __forceinline__ uint64_t seen_keys(const AttentionArgs<T>& args,
                                                       const TileNote& note,
                                                       int row,
                                                       int first_key) {
    if (args.k_block != nullptr) {
      /* Block keys come after all cache keys. */
      const int begin = min(window_begin(note.seq_len, row, args.window), note.seq_len);
      return ~bits_up_to(begin - first_key);
    }
    if (args.tree_mask == nullptr) {
      return bits_up_to(note.seq_len + row + 1 - first_key) &
             ~bits_up_to(window_begin(note.seq_len, row, args.window) - first_key);
    }
    const uint64_t tree = tree_mask(args, note, row);
    const int num_ancestors = __popcll(tree) - 1;
    return shifted(tree, note.seq_len - first_key) |
           (bits_up_to(note.seq_len - first_key) &
            ~bits_up_to(window_begin(note.seq_len, num_ancestors, args.window) - first_key));
  }

  /* Bits [0, n); none for n <= 0, all from 64 on. */
  static __device__ __forceinline__ uint64_t bits_up_to(int n) {
    return n <= 0 ? 0 : (n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1);
  }

  /* bits * 2^n, of which the lowest 64 bits are kept; n of any sign and size. */
  static __device__ __forceinline__ uint64_t shifted(uint64_t bits, int n) {
    if (n >= 64 || n <= -64) return 0;
    return n >= 0 ? bits << n : bits >> -n;
  }

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

  /* To base 2, capped where a cap is given. */
  __device__ __forceinline__ void scale_scores(float (&scores)[2 * kKeySteps][4],
                                               const AttentionArgs<T>& args) const {
    if (args.softcap_log2 == 0.0f) {
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= args.scale_log2;
      }
      return;
    }
#pragma unroll
    for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        /* cap * tanh(x) = cap - 2 cap / (1 + e^2x); e^2x may be 0 or inf. */
        const float e = exp2_approx(scores[n][i] * args.softcap_scale);
        scores[n][i] = args.softcap_log2 - __fdividef(2.0f * args.softcap_log2, 1.0f + e);
      }
    }
  }

  /* Puts -inf where the row must not look: by selection, so that whatever a masked product holds is
   * dropped. `mask` has a bit per key that is there; the first is key `first_key` of the request. */
  __device__ __forceinline__ void mask_scores(float (&scores)[2 * kKeySteps][4],
                                              uint64_t mask,
                                              const AttentionArgs<T>& args,
                                              const TileNote& note,
                                              int first_key,
                                              int warp_m,
                                              int lane) const {
    if (mask == kAllKeys && note.whole_begin <= first_key &&
        note.whole_end - Policy::kKeysPerWarp >= first_key) {
      return;
    }
    const int column = lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = note.m_begin + warp_m * 16 + lane / 4 + half * 8;
      const int row = min(m, note.m_end(args.group_size) - 1) / args.group_size;
      const uint64_t seen = (mask & seen_keys(args, note, row, first_key)) >> column;
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if ((seen >> (n * 8 + i) & 1) == 0) scores[n][2 * half + i] = -INFINITY;
        }
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
