/*
 * What the parts of the attention kernels share: tuning constants, arguments, the work of one CTA.
 */
#pragma once

#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "kernels/attention/split.cuh"

namespace dspark {

template <int kHeadDim_, int kWarpsM_>
struct AttentionPolicy {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kTileM = 16 * kWarpsM;
  static constexpr int kStages = kHeadDim == 64 ? 3 : 2;
  /* Resident CTAs hide each other's page lookups and barriers: three where few rows leave the
   * registers for it (sm_90 has the shared memory), two for a prefill tile of head_dim 128. */
  static constexpr int kMinCtasPerSm = kHeadDim == 128 && kWarpsM == 4 ? 2 : 3;

  static constexpr int kKeysPerWarp = kTileKeys / kWarpsN; /* of the products */
  static constexpr int kKeysCopied = kTileKeys / kWarps;   /* by one warp */
  static constexpr int kChunks = kHeadDim / 8;             /* of 16 bytes in a key */
  static constexpr int kTileElements = kTileKeys * kHeadDim;

  /* Epilogue: O of kWarps x 16 rows in f32, rows padded so that fragment stores are free of bank
   * conflicts, then m and l. It takes the place of the K and V stages. */
  static constexpr int kOutStride = kHeadDim + 8;
  static constexpr size_t kStageBytes = size_t{2} * kStages * kTileElements * 2;
  static constexpr size_t kEpilogueBytes = size_t{4} * kWarps * 16 * (kOutStride + 2);
  static constexpr size_t kSharedBytes =
      kStageBytes > kEpilogueBytes ? kStageBytes : kEpilogueBytes;

  static_assert(kWarpsM * kWarpsN == kWarps && kKeysPerWarp % 16 == 0);
  static_assert(kKeysCopied == 16, "the key mask of a tile is four 16-bit words");
  static_assert(kHeadDim % 64 == 0, "the swizzle spreads eight rows over eight chunks");
};

/* Typed view of dspark_attention_params. */
template <typename T>
struct AttentionArgs {
  int32_t num_rows;
  int32_t num_q_heads;
  int32_t group_size;
  float scale_log2; /* scale * log2(e) */
  SplitPlan split;
  const T* q;
  const T* k_cache;
  const T* v_cache;
  const T* k_block; /* NULL: the causal form */
  const T* v_block;
  const int32_t* qo_indptr;
  const int32_t* seq_lens;
  PagedLayout cache;
  T* out;
  SplitPartials partials; /* unused when the plan has one split */
  int64_t stride_q_row;
  int64_t stride_out_row;
  int64_t stride_block_row;
};

/* 2^x; 2^-inf = 0, NaN stays NaN. */
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* -inf marks "no key seen yet"; as the reference point of an exponent it must be finite. */
__device__ __forceinline__ float finite_max(float m) { return m == -INFINITY ? 0.0f : m; }

/* The work of one CTA: rows of a request as an M tile, and its keys as a list of tiles, those of
 * the cache first, then those of the block. */
struct AttentionTile {
  RequestKeys keys;
  int kv_head;
  int m_begin;    /* first m of this tile */
  int m_end;      /* rows * group_size of the request */
  int cache_keys; /* cache slots that some row of this tile sees */
  int cache_tiles;
  int first_tile; /* of this split */
  int last_tile;  /* exclusive */
};

/* Place of a 16-byte chunk in a key's row of shared memory: the eight rows of an 8x8 matrix, read at
 * one chunk index, fall into different banks. */
__device__ __forceinline__ int swizzle(int row, int chunk) { return chunk ^ (row & 7); }

}  // namespace dspark
