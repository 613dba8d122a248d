/*
 * Attention over the paged KV cache as a stream (sm_90): verification, and the drafter's blocks, where
 * a page holds whole boxes of 16 keys. The maths, the packing of heads and the cut of the work are
 * those of paged_attention.cuh; here the keys come by the tensor memory accelerator.
 *
 * Mapping   One CTA for each SM and chunk of the line of tiles (plan.h), or, for a few requests of about
 *           one length, a cluster of CTAs for each of them and KV head. The kBoxes warps that bring keys
 *           look for the chunk (chunk_finder.cuh) and then ask for a box of 16 keys of K and of V each, as
 *           soon as a stage of shared memory is free, across the borders of segments; in a cluster for
 *           the first tile before they know more than where it lies. The others compute, kWarpsM x kWarpsN of
 *           them over 16 kWarpsM rows and the keys of a tile, by mma.sync. Stages pass between the two
 *           kinds by barriers in shared memory; no barrier of the CTA stands in the loop. kGroups groups
 *           of the computing warps take turns with the tiles: a warp then has 32 keys in hand and twice
 *           the time. Where a tile is small (head_dim 64, e4m3) it has all 64 and four times the time,
 *           since the chain of a step is a thousand cycles long. With head_dim 256 the warps that share
 *           rows divide the dimensions of O among them, not the keys: each finds all scores, has sixteen
 *           accumulators of them in flight instead of four, and no warp waits for another at the end.
 * Segments  At the end of a segment the warps leave O in shared memory, merge it row by row and write
 *           whole results to `out`, partial ones to the workspace; meanwhile the copies of the next
 *           segment go on, whose lists, pages and q were asked for while this one's tiles were
 *           brought. merge_splits.cuh waits on the same SMs for the end: registers are given back for
 *           it. The CTAs of a cluster merge by themselves (cluster_merge.cuh). The kernel may start
 *           before the one ahead of it has ended; it reads nothing until then.
 * Traffic   as paged_attention.cuh; up to 200 KB are on their way to each SM.
 * Limit     memory bandwidth: 128 x 4096 (8 KV heads x 128, 8 rows) reads 3.0 TB/s on an H100, .98 of
 *           the copy's rate. 1 x 1024 takes 8.0 us, by the clock from the end of the kernel before: .6
 *           until a CTA knows its keys, 1.2 until its first copy is asked for, 2.6 until that tile is
 *           there, 4.1 until it is multiplied, 6.5 until the warps and 6.9 until the cluster have
 *           exchanged, 7.5 until all is written, .6 to the next kernel. All of that is code that runs
 *           once and waits for itself; where keys of all CTAs are on their way, code that is not in
 *           the SM's cache yet takes 2 to 3 us more. From 32 requests on the chunks, equal as they are,
 *           end 20 % apart at worst (171 to 197 us at 128 x 1024): SMs do not get equal shares of the
 *           bandwidth, and the last ones cannot use all of it. ncu: 128 x 1024 reads the 552 MB that
 *           there are, its DRAM is busy for 82 % of 203 us; e4m3 at 128 x 4096 for 80 %, the issue
 *           slots for 51 %, of 64 dimensions 63 % and 55 %: there the chain of conversions limits.
 * Dropped   One warp for all boxes: to name a box takes a hundred cycles, 1900 a tile. Clusters of 16: an
 *           H100 holds seven such at once, not eight. All warps searching, each for itself: 6 us at 256
 *           requests. A fifth stage in the place of half the exchange, and whole tiles for two warps at
 *           128 dimensions of 16 bits: no faster. Three stages there: 1 x 32768 slower, the rest alike.
 *           The dimensions of O, not the keys, divided among warps at 128 dimensions: 2 to 5 % slower.
 *           The first copies before all else in passes of many requests: what is left to do for the
 *           start then waits for them. A rehearsal of products and end on nobody's keys, to have their
 *           code at hand: 5 to 10 % slower below 32 requests. Products of e4m3: mma.sync turns both factors into f16 by the same
 *           conversions.
 * Source    the producer and consumer warps of CUTLASS and FlashAttention-3; see paged_attention.cuh.
 *
 * Invariants that the code below leans on:
 *   - A stage is written only after all computing warps have released its last tile, and read only
 *     after all kBoxes warps and all bytes have arrived. Every computing warp waits for every tile,
 *     its own or not: the phases of the barriers stay in step.
 *   - A segment is noted before the last tile of the one before it is handed over, and its note
 *     rewritten kSegments segments later, when every warp has left its end.
 *   - Boxes that hold no key to be seen are not copied: their place holds what it held, and their keys
 *     are cleared from the tile's mask. Keys of a copied box that must not be seen are masked, too, and
 *     their values cleared: whatever stands in a page past the end never reaches a result.
 *   - All that is exchanged between warps of a segment is read between two barriers of theirs.
 *   - Whether clusters are formed depends on the lists alone: all CTAs of both kernels find the same. A
 *     CTA of a cluster has one segment or none, writes to others only after all have begun, and ends
 *     after all have what was sent to them.
 */
#pragma once

#include "common/dependent_launch.cuh"
#include "kernels/attention/stream_epilogue.cuh"
#include "kernels/attention/tile_producer.cuh"

namespace dspark {

/* Reads the page table, where it is small, into L1, while the CTA looks for its chunk: the producers
 * wait for memory once less. */
template <typename T>
__device__ __forceinline__ void touch_pages(const AttentionArgs<T>& args, int thread, int threads) {
  constexpr int kSector = 8; /* int32 in 32 bytes */
  constexpr int kMostPages = 4096;
  const int64_t entries = int64_t{args.num_reqs} * args.cache.max_pages_per_req;
  if (entries > kMostPages) return;
  for (int i = thread * kSector; i < static_cast<int>(entries); i += threads * kSector) {
    int32_t ignored;
    asm volatile("ld.global.b32 %0, [%1];\n" : "=r"(ignored) : "l"(args.cache.page_table + i));
  }
}

constexpr int kFindersBarrier = 2;

/* Grid: items * num_kv_heads, KV heads first. */
template <typename T, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads) __maxnreg__(Policy::kRegisters)
    stream_attention_kernel(const __grid_constant__ StreamArgs<T> stream_args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char bytes[];
  using Shared = StreamShared<Policy>;
  static_assert(sizeof(Shared) <= Policy::kSharedBytes, "the plan of shared memory fits");
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const AttentionArgs<T>& args = stream_args.attention;

  /* From one lane, so that the compiler knows it to be the warp's. */
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarpSize, 0);
  const int lane = threadIdx.x % kWarpSize;

  if (threadIdx.x == 0) {
    for (int s = 0; s < Policy::kStages; ++s) {
      barrier_init(&shared.full[s], Policy::kBoxes);
      barrier_init(&shared.empty[s], Policy::kWarps);
    }
    barrier_init(&shared.started, 1);
    barrier_init(&shared.gathered, 1);
    fence_barrier_init();
  }
  if (threadIdx.x == Policy::kWorkers) {
    prefetch_map(&stream_args.maps.k_cache);
    prefetch_map(&stream_args.maps.v_cache);
  }
  __syncthreads(); /* the barriers are made */
  if (args.plan.cluster_ctas > 1) cluster_arrive();
  if (warp >= Policy::kWarps) {
    if constexpr (Policy::kMovesRegisters) release_registers<Policy::kProducerRegisters>();
    wait_for_prerequisites();
    release_dependents(); /* a merge waits for the end of this grid before it reads */
    constexpr int kFinders = Policy::kThreads - Policy::kWorkers;
    touch_pages(args, threadIdx.x - Policy::kWorkers, kFinders);
    const int box = warp - Policy::kWarps;
    const GridPlace grid = grid_place(args, blockIdx.x);
    const ClusterPlace place = cluster_place(args, blockIdx.x);
    const bool in_cluster = forms_clusters(args, Policy::kTileM);
    FoundChunk found;
    if (in_cluster) {
      found = find_cluster_chunk(args, place, Policy::kTileM);
    } else {
      const ChunkFinder<T, kFinders, kFindersBarrier> finder{args, shared.finder, Policy::kTileM};
      found = finder.find(grid.item);
    }
    const int item = in_cluster ? place.rank : grid.item;
    const int kv_head = in_cluster ? place.kv_head : grid.kv_head;
    WorkCursor<T, Policy> cursor(args, &shared.cursors[box], item);
    TileProducer<T, Policy> producer(stream_args, shared, cursor, kv_head, box);
    if (box == 0 && lane == 0) {
      shared.kv_head = kv_head;
      shared.rank = place.rank;
      shared.senders = in_cluster ? found.chunks.count() : 0;
    }
    if (in_cluster) producer.bring_first(found);
    if (cursor.start_chunk(found)) {
      producer.run();
    } else if (box == 0 && lane == 0) {
      cursor.describe_rows(in_cluster ? place.req : 0, &shared.segments[0]);
      shared.has_keys = false;
      barrier_arrive(&shared.started);
    }
    return;
  }

  if constexpr (Policy::kMovesRegisters) take_registers<Policy::kWorkerRegisters>();
  const int warp_m = warp % Policy::kWarpsM;
  const int warp_n = warp / Policy::kWarpsM % Policy::kWarpsN;
  const int warp_d = warp / (Policy::kWarpsM * Policy::kWarpsN);
  const int group = warp_n % Policy::kGroups;
  const int first_row = Policy::kGroups == Policy::kWarpsN
                            ? 0 /* known to the compiler */
                            : warp_n / Policy::kGroups * Policy::kKeysPerWarp;
  StreamEpilogue<T, Policy> epilogue{args, shared, {args, shared}, warp, lane};
  barrier_wait(&shared.started, 0);
  if (shared.has_keys) {
    WarpSoftmax<T, Policy> state;
    state.load_rows(args, shared.segments[0], shared.kv_head, warp_m, lane);
    state.reset();
    int stage = 0;
    uint32_t parity = 0;
    int segment = 0;
    int turn = 0; /* the group whose tile is next */
    while (true) {
      barrier_wait(&shared.full[stage], parity);
      const SegmentNote& note = shared.segments[segment];
      if (turn == group) {
        state.step(args, note, shared.tiles[stage], shared.stages[stage], first_row, warp_m, warp_d,
                   lane);
      }
      const bool ends_segment = shared.tiles[stage].ends_segment;
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.empty[stage]);
      if (++stage == Policy::kStages) {
        stage = 0;
        parity ^= 1;
      }
      turn = turn + 1 == Policy::kGroups ? 0 : turn + 1;
      if (!ends_segment) continue;
      turn = 0; /* by the place in the segment alone */
      if (++segment == Policy::kSegments) segment = 0;
      const bool ends_work = note.ends_work;
      const SegmentNote& next = shared.segments[segment]; /* came with the last tile */
      /* The products with q are done: the next rows come while this segment ends. */
      if (!ends_work && (next.row_begin != note.row_begin || next.m_begin != note.m_begin)) {
        state.load_rows(args, next, shared.kv_head, warp_m, lane);
      }
      if (shared.senders > 1) cluster_wait(); /* all of it have begun; there is one segment */
      epilogue.finish(state, note);
      if (ends_work) break;
      state.reset();
    }
  } else if (shared.senders > 1) {
    cluster_wait();
  }
  if (shared.senders > 1) epilogue.finish_cluster(shared.segments[0], shared.senders);
#endif
}

}  // namespace dspark
