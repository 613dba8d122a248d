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
  Divider by_group_size;
  Divider by_page_size;
  Divider by_num_kv_heads;
  int32_t window;      /* 0: none */
  float scale_log2;    /* scale * log2(e) */
  float softcap_scale; /* 2 * log2(e) * scale / cap */
  float softcap_log2;  /* cap * log2(e); 0: no cap */
  WorkPlan plan;
  const T* q;
  const void* k_cache; /* of Policy::kKeyBytes an element, as the block */
  const void* v_cache;
  const void* k_block; /* NULL: the verify form */
  const void* v_block;
  const float* k_scale; /* [num_kv_heads], of e4m3 keys; else NULL */
  const float* v_scale;
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
    keys.by_group_size = by_group_size;
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

/* What becomes of a segment's result where parts are summed up one by one. */
enum Sums {
  kAlone = 0,
  kAddsUp = 1, /* it is added to the sum that the CTA holds of the parts before */
  kGoesOn = 2  /* the sum stays with the CTA: the next segment is added to it */
};

/* A run of key tiles of one M tile of one request: what the loader needs from tile to tile. */
struct Segment {
  static constexpr int kWhole = -1;
  static constexpr int kNothing = -2;

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
  int remaining;   /* balanced: tiles of the chunk after the segment; fixed: 0 */
  int m_first;     /* balanced: tiles of the M tile up to the end of the segment */
  int sums;        /* of Sums */
};

/* What the warps that compute need to know of a segment, in shared memory. */
struct SegmentNote {
  int32_t whole_begin; /* as Segment's */
  int32_t whole_end;
  int32_t seq_len;
  int32_t row_begin; /* of the request */
  int32_t num_rows;
  int32_t m_begin;
  int32_t slot; /* as Segment's */
  int32_t sums;
  int32_t ends_work;

  __device__ __forceinline__ int m_end(int group_size) const { return num_rows * group_size; }
};

/* And of a tile. */
struct alignas(16) TileNote {
  uint64_t key_mask; /* bit k: key k of the tile is there */
  int32_t first_key; /* of the tile, in the order of the request's keys */
  int32_t ends_segment;
};

/* Where 16-byte chunk `chunk` of key `row` stands in a tile, in bytes. Sixteen keys form a box, up to
 * 128 bytes of each of them the rows of a panel, and the chunks of a row are permuted by its number:
 * the eight rows of an 8x8 matrix, read at one chunk index, fall into different banks. The tensor
 * memory accelerator writes a panel so by itself. */
template <int kRowBytes>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  constexpr int kPanelBytes = kRowBytes < 128 ? kRowBytes : 128;
  constexpr int kChunks = kPanelBytes / 16;
  static_assert(kChunks == 4 || kChunks == 8, "64 or 128 bytes");
  const int turn = kChunks == 8 ? row % 8 : row / 2 % 4;
  return row / kBoxKeys * (kBoxKeys * kRowBytes) + chunk / kChunks * (kBoxKeys * kPanelBytes) +
         row % kBoxKeys * kPanelBytes + ((chunk % kChunks) ^ turn) * 16;
}

}  // namespace dspark
