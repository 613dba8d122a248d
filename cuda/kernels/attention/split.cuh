/*
 * How the keys of a request are cut into tiles and splits. The attention kernel, the merge kernel
 * and the host read the same rules here.
 */
#pragma once

#include <cstdint>

namespace dspark {

/* Keys of one tile of the attention kernel. */
constexpr int kTileKeys = 64;

__host__ __device__ constexpr int num_key_tiles(int keys) {
  /* Not (keys + 63) / 64: keys may be close to INT32_MAX. */
  return keys / kTileKeys + (keys % kTileKeys != 0);
}

/* Fixed at launch by the sizes in the params. */
struct SplitPlan {
  int32_t num_splits; /* of the grid */
  int32_t tiles_per_split;

  /* Splits that a request of `num_tiles` tiles uses, at least 1. */
  __host__ __device__ int splits_of(int num_tiles) const {
    const int needed = (num_tiles + tiles_per_split - 1) / tiles_per_split;
    return needed < 1 ? 1 : (needed > num_splits ? num_splits : needed);
  }

  /* Tiles [first, last) of a split. The last split of the grid takes all that is left, so that a
   * request longer than max_seq_len is slow, not wrong. */
  __host__ __device__ void range(int split, int num_tiles, int& first, int& last) const {
    first = split * tiles_per_split;
    last = split + 1 == num_splits ? num_tiles : first + tiles_per_split;
    if (last > num_tiles) last = num_tiles;
  }
};

/* Partial results in the workspace; entry = (split * num_rows + row) * num_q_heads + head. */
struct SplitPartials {
  float* out;      /* [entries, head_dim], not normalised */
  float2* max_sum; /* [entries] the maximum of the scores in base 2, and the sum of p */
};

/* The rows and keys of one request. */
struct RequestKeys {
  int req;
  int row_begin;
  int num_rows;
  int seq_len;
  bool is_causal; /* verify: row i sees cache slots [0, seq_len + i]; draft: the cache [0, seq_len)
                     and all rows of the block */

  /* Rows at or beyond max_rows (of the whole pass) are left out. */
  static __device__ __forceinline__ RequestKeys
  load(const int32_t* qo_indptr, const int32_t* seq_lens, int req, int max_rows, bool is_causal) {
    RequestKeys keys;
    keys.req = req;
    keys.row_begin = qo_indptr[req];
    keys.num_rows = max(min(qo_indptr[req + 1], max_rows) - keys.row_begin, 0);
    keys.seq_len = max(seq_lens[req], 0);
    keys.is_causal = is_causal;
    return keys;
  }

  /* Cache slots that rows up to `row` of this request see. */
  __device__ __forceinline__ int cache_keys(int row) const {
    return is_causal ? seq_len + row + 1 : seq_len;
  }
  __device__ __forceinline__ int cache_tiles(int row) const {
    return num_key_tiles(cache_keys(row));
  }
  __device__ __forceinline__ int block_tiles() const {
    return is_causal ? 0 : num_key_tiles(num_rows);
  }
  /* Of the whole request: decides how many splits it uses. */
  __device__ __forceinline__ int num_tiles() const {
    return cache_tiles(num_rows - 1) + block_tiles();
  }
};

/* o / sum; zeros where no key was seen. */
template <int kSize>
__device__ __forceinline__ void normalise(float (&o)[kSize], float sum) {
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kSize; ++i) o[i] *= inverse;
}

}  // namespace dspark
