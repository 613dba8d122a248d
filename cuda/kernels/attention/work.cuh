/*
 * The keys and rows of a request, as the attention kernels see them. How their work is cut stands in
 * plan.h.
 */
#pragma once

#include <cstdint>

#include "kernels/attention/plan.h"

namespace dspark {

/* Partial results in the workspace; entry = (slot * num_kv_heads + kv_head) * kTileM + m, m counted
 * in the M tile. */
struct PartialResults {
  float* out;      /* [entries, head_dim], not normalised */
  float2* max_sum; /* [entries] the maximum of the scores in base 2, and the sum of p */
};

/* Which keys a row sees besides the committed ones. */
enum class RowForm {
  kChain, /* its own request's rows up to itself, from the cache */
  kTree,  /* those of its own request's rows that its mask names, from the cache */
  kBlock  /* all of its own request's rows, from the block */
};

/* The rows and keys of one request. */
struct RequestKeys {
  int req;
  int row_begin;
  int num_rows;
  int seq_len;
  int window; /* 0: none */
  RowForm form;
  Divider by_group_size;

  /* Cache slots [0, n) that hold the keys of rows up to `row`. */
  __device__ __forceinline__ int cache_keys(int row) const {
    switch (form) {
      case RowForm::kChain:
        return seq_len + row + 1;
      case RowForm::kTree:
        return seq_len + num_rows;
      default:
        return seq_len;
    }
  }
  __device__ __forceinline__ int cache_tiles() const {
    return num_key_tiles(cache_keys(num_rows - 1));
  }
  __device__ __forceinline__ int block_tiles() const {
    return form == RowForm::kBlock ? num_key_tiles(num_rows) : 0;
  }
  /* The first cache slot that rows from first_row on see. In a tree any row may be a root, and a
   * block is seen whole, so that its keys count as close. */
  __device__ __forceinline__ int first_key(int first_row) const {
    const int first = window_begin(seq_len, form == RowForm::kTree ? 0 : first_row, window);
    return form == RowForm::kBlock ? min(first, seq_len) : first;
  }
  /* Keys [whole_begin, whole_end) are seen by all rows first_row .. last_row. */
  __device__ __forceinline__ int whole_begin(int last_row) const {
    const int begin =
        window_begin(seq_len, form == RowForm::kTree ? num_rows - 1 : last_row, window);
    return form == RowForm::kBlock ? min(begin, seq_len) : begin;
  }
  __device__ __forceinline__ int whole_end(int first_row) const {
    switch (form) {
      case RowForm::kChain:
        return seq_len + first_row + 1;
      case RowForm::kTree:
        return seq_len;
      default:
        return INT32_MAX;
    }
  }
  /* Tiles [first, last) are seen by rows first_row .. last_row: those of the cache, then those of
   * the block, which begin at tile cache_tiles(). */
  __device__ __forceinline__ int first_tile(int first_row) const {
    return first_key(first_row) / kTileKeys;
  }
  __device__ __forceinline__ int last_tile(int last_row) const {
    return form == RowForm::kBlock ? cache_tiles() + block_tiles()
                                   : num_key_tiles(cache_keys(last_row));
  }
  /* Of the whole request. */
  __device__ __forceinline__ int num_tiles() const {
    return last_tile(num_rows - 1) - first_tile(0);
  }
  __device__ __forceinline__ int num_m_tiles(int group_size, int tile_m) const {
    return (num_rows * group_size + tile_m - 1) / tile_m;
  }
  __device__ __forceinline__ int first_row(int m_tile, int tile_m) const {
    return by_group_size.quotient(m_tile * tile_m);
  }
  __device__ __forceinline__ int last_row(int m_tile, int tile_m) const {
    return min(by_group_size.quotient(m_tile * tile_m + tile_m - 1), num_rows - 1);
  }
};

/* 1 / sum of a row; 0 where no key was seen, so that its result is zeros. */
__device__ __forceinline__ float inverse_of(float sum) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(sum));
  return sum == 0.0f ? 0.0f : inverse;
}

/* o / sum. */
template <int kSize>
__device__ __forceinline__ void normalise(float (&o)[kSize], float sum) {
  const float inverse = inverse_of(sum);
#pragma unroll
  for (int i = 0; i < kSize; ++i) o[i] *= inverse;
}

}  // namespace dspark
