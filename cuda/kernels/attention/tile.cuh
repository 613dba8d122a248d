/*
 * What the parts of the attention kernels share: tuning constants, arguments, notes on a tile.
 */
#pragma once

#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "kernels/attention/policy.h"
#include "kernels/attention/work.cuh"

namespace dspark {

/* Typed view of dspark_attention_params. */
template <typename T>
struct AttentionArgs {
  int32_t num_rows;
  int32_t num_reqs;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t window;      /* 0: none */
  float scale_log2;    /* scale * log2(e) */
  float softcap_scale; /* 2 * log2(e) * scale / cap */
  float softcap_log2;  /* cap * log2(e); 0: no cap */
  WorkPlan plan;
  const T* q;
  const T* k_cache;
  const T* v_cache;
  const T* k_block; /* NULL: the verify form */
  const T* v_block;
  const int32_t* qo_indptr;
  const int32_t* seq_lens;
  const uint32_t* tree_mask; /* [num_rows, 2]; NULL: chains */
  PagedLayout cache;
  T* out;
  PartialResults partials; /* unused when the plan has no splits */
  int64_t stride_q_row;
  int64_t stride_out_row;
  int64_t stride_block_row;

  /* Rows at or beyond num_rows (of the whole pass) are left out. */
  __device__ __forceinline__ RequestKeys keys_of(int req) const {
    RequestKeys keys;
    keys.req = req;
    keys.row_begin = qo_indptr[req];
    keys.num_rows = max(min(qo_indptr[req + 1], num_rows) - keys.row_begin, 0);
    keys.seq_len = max(seq_lens[req], 0);
    keys.window = window;
    keys.form = k_block != nullptr     ? RowForm::kBlock
                : tree_mask != nullptr ? RowForm::kTree
                                       : RowForm::kChain;
    return keys;
  }
};

/* 2^x; 2^-inf = 0, NaN stays NaN. */
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* -inf marks "no key seen yet"; as the reference point of an exponent it must be finite. */
__device__ __forceinline__ float finite_max(float m) { return m == -INFINITY ? 0.0f : m; }

/* A run of key tiles of one M tile of one request: what the loader needs from tile to tile. */
struct Segment {
  static constexpr int kWhole = -1;

  int req;
  int row_begin;
  int num_rows; /* of the request */
  int seq_len;
  int m_tile;
  int last_tile;   /* exclusive */
  int first_key;   /* cache slots [first_key, last_key) are seen by some row of the M tile */
  int last_key;    /* exclusive */
  int whole_begin; /* keys [whole_begin, whole_end) are seen by all rows of the M tile */
  int whole_end;
  int cache_tiles; /* tiles from here on hold block rows */
  int slot;        /* of the partial result, or kWhole: written to `out` */
};

/* Stands beside a tile in shared memory: the warps that read a stage need nothing else to know what
 * they read. */
struct alignas(16) TileNote {
  uint64_t key_mask;   /* bit k: key k of the tile is there */
  int32_t first_key;   /* of the tile, in the order of the request's keys */
  int32_t whole_begin; /* as Segment's */
  int32_t whole_end;
  int32_t seq_len;
  int32_t row_begin; /* of the request */
  int32_t num_rows;
  int32_t m_begin;
  int32_t slot; /* as Segment's */
  int32_t ends_segment;
  int32_t ends_work;

  __device__ __forceinline__ int m_end(int group_size) const { return num_rows * group_size; }
};

/* Place of a 16-byte chunk in a key's row of shared memory: the eight rows of an 8x8 matrix, read at
 * one chunk index, fall into different banks. */
__device__ __forceinline__ int swizzle(int row, int chunk) { return chunk ^ (row & 7); }

}  // namespace dspark
