/*
 * Attention of the rows of every request over its paged KV cache: causal (a chain, or a tree given
 * by masks) for verification and prefill, block form (cache, then the block's own rows in both
 * directions) for the drafter.
 *
 * Maths     out = softmax(cap(scale * q K^T)) V per row and head, by online softmax in base 2: for
 *           every key tile  s = cap(q K^T * scale) * log2(e);  m' = max(m, max s);
 *           a = 2^(m - m');  p = 2^(s - m');  l = a l + sum p;  O = a O + p V. Scores, m, l, O in
 *           f32; p is rounded to the input type for the second product.
 * Mapping   The rows of a request and the query heads that share a KV head are packed into one M
 *           dimension (m = row * group_size + head): all of them need the same keys, so K and V
 *           are read once for all. A CTA of four warps works for one KV head; neighbouring CTAs take
 *           the other heads of the same keys, which lie side by side in memory. The warps stand
 *           kWarpsM x kWarpsN over 16 kWarpsM rows and kTileKeys keys: a decode step with few rows
 *           spreads the keys of a tile over the warps, prefill spreads the rows. Warps along N keep
 *           their own (m, l, O) and merge once per segment. K and V tiles are gathered by cp.async,
 *           16 bytes a lane, one page lookup per key, into kStages buffers; masked keys are written
 *           as zeros and never read.
 * Work      A CTA walks segments: runs of key tiles of one M tile (plan.h). The loader runs
 *           kStages - 1 tiles ahead, across the borders of segments, so that the keys of the next
 *           request are on their way while this one's result is written. A segment that holds all
 *           keys of its rows is written out; partial (m, l, O) go to the workspace for
 *           merge_splits.cuh. On a decode step the grid is one wave of CTAs with equal shares of
 *           the pass's tiles: a cut by the longest request's length left 13 partials for every
 *           request of 128 x 4096, a fifth of all traffic.
 * Traffic   2 * keys * head_dim * 2 bytes per request and KV head (times M tiles, mostly L2), and
 *           4 * rows * group_size * keys * head_dim flops; with M = 32 that is 32 flops a byte.
 *           At most two partials per CTA.
 * Limit     memory bandwidth for decode steps; tensor core issue and softmax for prefill; for a
 *           request or two the chain of dependent reads: lengths, page, keys, partials.
 * Source    flash-decoding (Dao et al. 2023) and FlashAttention-2's register softmax; head packing
 *           as in PackGQA; one line of tiles cut evenly as in Stream-K (Osama et al. 2023).
 *
 * Invariants that the code below leans on:
 *   - Every barrier is reached by all threads of the CTA: exits, segments and loop bounds depend on
 *     blockIdx and device arrays alone; skipping a tile is a choice inside a warp.
 *   - One copy group is committed per turn, empty or not: turn i waits until at most kStages - 2
 *     groups are pending, so that the tile of turn i is complete.
 *   - A stage (data and note) is rewritten only after the barrier that follows the last turn that
 *     read it; the exchange of a segment's end happens in the stage just read, inside that turn.
 *   - A note is read only after a barrier that follows its writing: that of its own turn, or, for
 *     the rows of the next segment, the exchange's.
 *   - Shared memory is never read unwritten: a tile's copies cover all kTileKeys rows, zeros
 *     included, and every exchanged (m, l, O) entry is written by its warp.
 */
#pragma once

#include "common/dependent_launch.cuh"
#include "kernels/attention/epilogue.cuh"
#include "kernels/attention/key_loader.cuh"
#include "kernels/attention/warp_softmax.cuh"

namespace dspark {

/* Grid: items * num_kv_heads, KV heads first. */
template <typename T, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kMinCtasPerSm)
    paged_attention_kernel(const AttentionArgs<T> args) {
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ StageNote notes[Policy::kStages];
  __shared__ CursorState cursor_states[Policy::kWarps];
  __shared__ FinderScratch scratch;

  release_dependents(); /* the merge waits for the end of this grid before it reads */
  const int kv_head = blockIdx.x % args.num_kv_heads;
  const int item = blockIdx.x / args.num_kv_heads;
  WorkCursor<T, Policy> cursor(args, &cursor_states[threadIdx.x / kWarpSize], item);
  if (args.plan.is_balanced()) {
    const ChunkFinder<T, Policy::kThreads> finder{args, scratch, Policy::kTileM};
    if (!cursor.start_chunk(finder.find(item))) return;
  } else if (!cursor.start_fixed()) {
    return;
  }

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int warp_m = warp % Policy::kWarpsM;
  const int warp_n = warp / Policy::kWarpsM;
  KeyLoader<T, Policy> loader(args, cursor, kv_head);
#pragma unroll
  for (int s = 0; s < Policy::kStages - 1; ++s) {
    loader.copy_next(stages + s * Policy::kStageBytes, &notes[s]);
  }
  __syncthreads(); /* the first note */

  WarpSoftmax<T, Policy> state;
  state.load_rows(args, notes[0].segment, kv_head, warp_m, lane);
  state.reset();
  const int first_row = warp_n * Policy::kKeysPerWarp;

  int stage = 0;
  while (true) {
    copy_async_wait<Policy::kStages - 2>();
    __syncthreads(); /* this turn's tile is here for all, and all are done with the last turn's */
    const int free_stage = stage == 0 ? Policy::kStages - 1 : stage - 1;
    loader.copy_next(stages + free_stage * Policy::kStageBytes, &notes[free_stage]);

    unsigned char* tile = stages + stage * Policy::kStageBytes;
    const SegmentNote& note = notes[stage].segment;
    const TileNote& keys = notes[stage].tile;
    state.step(args, note, keys, tile, first_row, warp_m, 0, lane);
    stage = stage + 1 == Policy::kStages ? 0 : stage + 1;
    if (!keys.ends_segment) continue;

    state.complete(args, kv_head);
    const WarpExchange<Policy> exchange(tile);
    __syncthreads(); /* all are done with the tile, whose place the exchange takes */
    if (warp_n > 0) exchange.put(state, warp_m, warp_n, lane);
    __syncthreads();
    if (warp_n == 0) {
      if constexpr (Policy::kWarpsN > 1) exchange.collect(state, warp_m, lane);
      write_rows(args, note, state, kv_head, warp_m, lane);
    }
    if (note.ends_work) return;
    state.load_rows(args, notes[stage].segment, kv_head, warp_m, lane);
    state.reset();
  }
}

}  // namespace dspark
