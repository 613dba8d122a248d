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

#include "kernels/attention/epilogue.cuh"
#include "kernels/attention/key_loader.cuh"
#include "kernels/attention/warp_softmax.cuh"

namespace dspark {

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
