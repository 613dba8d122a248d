/*
 * Attention of the rows of every request over its paged KV cache: causal for verification and
 * prefill, block form (cache, then the block's own rows in both directions) for the drafter.
 *
 * Maths     out = softmax(scale * q K^T) V per row and head, by online softmax in base 2: for every
 *           key tile  s = q K^T * scale * log2(e);  m' = max(m, max s);  a = 2^(m - m');
 *           p = 2^(s - m');  l = a l + sum p;  O = a O + p V. Scores, m, l, O in f32; p is rounded
 *           to the input type for the second product.
 * Mapping   The rows of a request and the query heads that share a KV head are packed into one M
 *           dimension (m = row * group_size + head): all of them need the same keys, so K and V
 *           are read once for all. A CTA of four warps takes one (request, KV head, M tile, split
 *           of the keys). The warps stand kWarpsM x kWarpsN over 16 kWarpsM rows and kTileKeys
 *           keys: a decode step with few rows spreads the keys of a tile over the warps, prefill
 *           spreads the rows. Warps along N keep their own (m, l, O), merged once at the end.
 *           K and V tiles are gathered by cp.async, 16 bytes a lane, one page lookup per key, into
 *           kStages buffers; masked keys are written as zeros and never read.
 * Split     A CTA handles tiles_per_split tiles; a request that needs one split is written out
 *           directly, otherwise partial (m, l, O) go to the workspace for merge_splits.cuh. The
 *           boundaries depend on max_seq_len and the model's shape only, so a request's sum order
 *           does not depend on its neighbours.
 * Traffic   2 * keys * head_dim * 2 bytes per request and KV head (times M tiles, mostly L2), and
 *           4 * rows * group_size * keys * head_dim flops; with M = 32 that is 32 flops a byte.
 * Limit     memory bandwidth for decode steps; tensor core issue and softmax for prefill.
 * Source    flash-decoding (Dao et al. 2023) and FlashAttention-2's register softmax; head packing
 *           as in PackGQA.
 *
 * Invariants that the code below leans on:
 *   - Every barrier is reached by all threads of the CTA: the early exits and the loop bounds
 *     depend on blockIdx and device arrays alone; skipping a tile is a choice inside a warp.
 *   - One copy group is committed per loop turn, empty or not: turn i waits until at most
 *     kStages - 2 groups are pending, so that the tile of turn i is complete.
 *   - A stage (data and key mask) is rewritten only after the barrier that follows the last turn
 *     that read it.
 *   - Shared memory is never read unwritten: a tile's copies cover all kTileKeys rows, zeros
 *     included, and every (m, l, O) entry of the epilogue is written by its warp.
 */
#pragma once

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/paged_kv.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
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

/* Copies K and V tiles to shared memory. A lane looks after one key (lane % 16) of its warp's 16:
 * it finds the key's offset one tile ahead, so that the page lookup hides behind the products, and
 * hands it to the lanes that copy. */
template <typename T, typename Policy>
struct KeyLoader {
  const AttentionArgs<T>& args;
  const AttentionTile& tile;
  int warp;
  int lane;
  int64_t offset; /* of this lane's key in the tile to copy next, or kUnmappedSlot */

  /* Finds this lane's key of tile `t`; tiles at or past last_tile have none. */
  __device__ __forceinline__ void locate(int t) {
    offset = kUnmappedSlot;
    if (t >= tile.last_tile) return;
    const int key_in_tile = warp * Policy::kKeysCopied + lane % Policy::kKeysCopied;
    if (t < tile.cache_tiles) {
      const int slot = t * kTileKeys + key_in_tile;
      if (slot < tile.cache_keys) {
        offset = slot_offset(args.cache, tile.keys.req, slot, tile.kv_head);
      }
    } else {
      const int block_row = (t - tile.cache_tiles) * kTileKeys + key_in_tile;
      if (block_row < tile.keys.num_rows) {
        offset = (tile.keys.row_begin + block_row) * args.stride_block_row +
                 static_cast<int64_t>(tile.kv_head) * Policy::kHeadDim;
      }
    }
  }

  /* Starts the copy of tile `t`, the one located last, into k_stage and v_stage, and notes which
   * keys are there. All lanes call; key k of the tile is bit k of the mask. */
  __device__ __forceinline__ void copy(int t, T* k_stage, T* v_stage, uint16_t* key_mask) const {
    const uint32_t present = __ballot_sync(kAllLanes, offset != kUnmappedSlot);
    if (lane == 0) key_mask[warp] = static_cast<uint16_t>(present);

    const bool in_cache = t < tile.cache_tiles;
    const T* k_base = in_cache ? args.k_cache : args.k_block;
    const T* v_base = in_cache ? args.v_cache : args.v_block;
    constexpr int kKeysAtOnce = kWarpSize / Policy::kChunks;
    const int chunk = lane % Policy::kChunks;
#pragma unroll
    for (int i = 0; i < Policy::kKeysCopied / kKeysAtOnce; ++i) {
      const int key = i * kKeysAtOnce + lane / Policy::kChunks;
      const int64_t key_offset = __shfl_sync(kAllLanes, offset, key);
      const bool valid = key_offset != kUnmappedSlot;
      const int64_t source = valid ? key_offset + chunk * 8 : 0;
      const int row = warp * Policy::kKeysCopied + key;
      const int target = row * Policy::kHeadDim + swizzle(row, chunk) * 8;
      copy_async_16(shared_address(k_stage + target), k_base + source, valid);
      copy_async_16(shared_address(v_stage + target), v_base + source, valid);
    }
  }

  /* Place of a 16-byte chunk in its row: the eight rows of an 8x8 matrix, read at one chunk index,
   * fall into different banks. */
  static __device__ __forceinline__ int swizzle(int row, int chunk) { return chunk ^ (row & 7); }
};

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
      const int chunk = KeyLoader<T, Policy>::swizzle(row, 2 * d + half);
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
        const int chunk = KeyLoader<T, Policy>::swizzle(row, 2 * d + half);
        uint32_t b[4];
        load_matrix_x4_transposed(
            b, shared_address(v_stage + (row + j * 16) * Policy::kHeadDim + chunk * 8));
        mma_m16n8k16<T>(out[2 * d], a, b[0], b[1]);
        mma_m16n8k16<T>(out[2 * d + 1], a, b[2], b[3]);
      }
    }
  }
};

/* Shared memory of the epilogue: entry e = warp_n * kTileM + m of the tile. */
template <typename Policy>
struct EpilogueBuffer {
  float* out;     /* [kWarpsN * kTileM, kOutStride], not normalised */
  float* row_max; /* [kWarpsN * kTileM] */
  float* row_sum;

  __device__ __forceinline__ explicit EpilogueBuffer(void* shared) {
    constexpr int kEntries = Policy::kWarpsN * Policy::kTileM;
    out = static_cast<float*>(shared);
    row_max = out + kEntries * Policy::kOutStride;
    row_sum = row_max + kEntries;
  }

  template <typename T>
  __device__ __forceinline__ void put(const WarpSoftmax<T, Policy>& state,
                                      int warp_m,
                                      int warp_n,
                                      int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int entry = warp_n * Policy::kTileM + warp_m * 16 + lane / 4 + half * 8;
      const float sum = warp_reduce<4>(state.row_sum[half], SumOp{});
      if (lane % 4 == 0) {
        row_max[entry] = state.row_max[half];
        row_sum[entry] = sum;
      }
      float* row = out + entry * Policy::kOutStride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Policy::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(row + n * 8) =
            make_float2(state.out[n][2 * half], state.out[n][2 * half + 1]);
      }
    }
  }

  /* Row m over all warps along N, dims [column, column + 8), in the order of the warps. */
  __device__ __forceinline__ void merge(
      int m, int column, float (&o)[8], float& m_out, float& l_out) const {
    float total_max = -INFINITY;
#pragma unroll
    for (int w = 0; w < Policy::kWarpsN; ++w) {
      total_max = fmaxf(total_max, row_max[w * Policy::kTileM + m]);
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < Policy::kWarpsN; ++w) {
      const int entry = w * Policy::kTileM + m;
      const float weight = exp2_approx(row_max[entry] - finite_max(total_max));
      total += weight * row_sum[entry];
      float part[8];
      const float* source = out + entry * Policy::kOutStride + column;
      *reinterpret_cast<float4*>(part) = *reinterpret_cast<const float4*>(source);
      *reinterpret_cast<float4*>(part + 4) = *reinterpret_cast<const float4*>(source + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) o[i] += weight * part[i];
    }
    m_out = total_max;
    l_out = total;
  }
};

/* Merges the warps of the CTA and writes rows to `out`, or to the partials of `split`. */
template <typename T, typename Policy>
__device__ __forceinline__ void write_tile(const AttentionArgs<T>& args,
                                           const AttentionTile& tile,
                                           const EpilogueBuffer<Policy>& buffer,
                                           int split,
                                           bool is_only_split) {
  for (int i = threadIdx.x; i < Policy::kTileM * Policy::kChunks; i += Policy::kThreads) {
    const int m_in_tile = i / Policy::kChunks;
    const int column = i % Policy::kChunks * 8;
    const int m = tile.m_begin + m_in_tile;
    if (m >= tile.m_end) return;
    const int64_t row = tile.keys.row_begin + m / args.group_size;
    const int head = tile.kv_head * args.group_size + m % args.group_size;
    float o[8], row_max, row_sum;
    buffer.merge(m_in_tile, column, o, row_max, row_sum);
    if (is_only_split) {
      normalise(o, row_sum);
      store_vec(args.out + row * args.stride_out_row +
                    static_cast<int64_t>(head) * Policy::kHeadDim + column,
                o);
      continue;
    }
    const int64_t entry = (split * int64_t{args.num_rows} + row) * args.num_q_heads + head;
    float* target = args.partials.out + entry * Policy::kHeadDim + column;
    *reinterpret_cast<float4*>(target) = make_float4(o[0], o[1], o[2], o[3]);
    *reinterpret_cast<float4*>(target + 4) = make_float4(o[4], o[5], o[6], o[7]);
    if (column == 0) args.partials.max_sum[entry] = make_float2(row_max, row_sum);
  }
}

/* Grid (m_tiles * num_splits, num_kv_heads, num_reqs), m tile major. */
template <typename T, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kMinCtasPerSm)
    paged_attention_kernel(const AttentionArgs<T> args) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) uint16_t key_masks[Policy::kStages][Policy::kWarps];

  const int split = blockIdx.x % args.split.num_splits;
  AttentionTile tile;
  tile.keys = RequestKeys::load(args.qo_indptr, args.seq_lens, blockIdx.z, args.num_rows,
                                args.k_block == nullptr);
  tile.kv_head = blockIdx.y;
  tile.m_begin = blockIdx.x / args.split.num_splits * Policy::kTileM;
  tile.m_end = tile.keys.num_rows * args.group_size;
  const int num_splits = args.split.splits_of(tile.keys.num_tiles());
  if (tile.m_begin >= tile.m_end || split >= num_splits) return;

  const int last_row = (min(tile.m_begin + Policy::kTileM, tile.m_end) - 1) / args.group_size;
  tile.cache_keys = tile.keys.cache_keys(last_row);
  tile.cache_tiles = tile.keys.cache_tiles(last_row);
  args.split.range(split, tile.cache_tiles + tile.keys.block_tiles(), tile.first_tile,
                   tile.last_tile);

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int warp_m = warp % Policy::kWarpsM;
  const int warp_n = warp / Policy::kWarpsM;
  T* k_stages = reinterpret_cast<T*>(shared);
  T* v_stages = k_stages + Policy::kStages * Policy::kTileElements;

  KeyLoader<T, Policy> loader{args, tile, warp, lane, kUnmappedSlot};
  loader.locate(tile.first_tile);
  /* Starts the copy of tile t (if there is one) and closes a group either way. */
  auto start_copy = [&](int t, int stage) {
    if (t < tile.last_tile) {
      loader.copy(t, k_stages + stage * Policy::kTileElements,
                  v_stages + stage * Policy::kTileElements, key_masks[stage]);
    }
    copy_async_commit();
    loader.locate(t + 1);
  };
#pragma unroll
  for (int s = 0; s < Policy::kStages - 1; ++s) start_copy(tile.first_tile + s, s);

  WarpSoftmax<T, Policy> state;
  state.init(args, tile, warp_m, lane);
  const bool has_rows = tile.m_begin + warp_m * 16 < tile.m_end;
  const int first_row = warp_n * Policy::kKeysPerWarp;
  constexpr uint64_t kAllKeys = ~uint64_t{0} >> (64 - Policy::kKeysPerWarp);

  int stage = 0;
  for (int t = tile.first_tile; t < tile.last_tile; ++t) {
    copy_async_wait<Policy::kStages - 2>();
    __syncthreads(); /* tile t is here for all, and all are done with tile t - 1 */
    const int free_stage = stage == 0 ? Policy::kStages - 1 : stage - 1; /* of tile t - 1 */
    start_copy(t + Policy::kStages - 1, free_stage);

    const uint64_t tile_mask = *reinterpret_cast<const uint64_t*>(key_masks[stage]);
    const uint64_t mask = tile_mask >> first_row & kAllKeys;
    if (has_rows && mask != 0) {
      /* Block keys come after all cache keys; without causal mask their number does not matter. */
      state.step(k_stages + stage * Policy::kTileElements, v_stages + stage * Policy::kTileElements,
                 first_row, mask, t * kTileKeys + first_row, args.scale_log2, lane);
    }
    stage = stage + 1 == Policy::kStages ? 0 : stage + 1;
  }

  copy_async_wait<0>();
  __syncthreads(); /* the stages become the epilogue's buffer */
  const EpilogueBuffer<Policy> buffer(shared);
  buffer.put(state, warp_m, warp_n, lane);
  __syncthreads();
  write_tile(args, tile, buffer, split, num_splits == 1);
}

}  // namespace dspark
