/*
 * Where the chunks of the line of tiles begin and end: the search that every CTA makes first. See
 * plan.h for the rules. A warp looks alone where it has a lane for every request: no barrier then
 * stands between the lists and the first key.
 */
#pragma once

#include "common/bulk_copy.cuh"
#include "kernels/attention/tile.cuh"

namespace dspark {

/* A place on the line: tiles of a request before it. */
struct LinePlace {
  int32_t req;
  int32_t offset; /* among the tiles of all M tiles of the request */
};

/* The line's chunks, and where one of them begins and ends; the end of the line is no place. */
struct FoundChunk {
  Chunks chunks;
  LinePlace begin;
  LinePlace end;
};

/* A CTA of the grid, KV heads first. */
struct GridPlace {
  int kv_head;
  int item;
};

/* A CTA of the grid where clusters are formed: requests, then KV heads, then CTAs of a cluster. */
struct ClusterPlace {
  int req;
  int kv_head;
  int rank;
};

template <typename T>
__device__ __forceinline__ GridPlace grid_place(const AttentionArgs<T>& args, int cta) {
  const int item = args.by_num_kv_heads.quotient(cta);
  return {cta - item * args.num_kv_heads, item};
}
template <typename T>
__device__ __forceinline__ ClusterPlace cluster_place(const AttentionArgs<T>& args, int cta) {
  const int shift = args.plan.cluster_shift();
  const GridPlace cluster = grid_place(args, cta >> shift);
  return {cluster.item, cluster.kv_head, cta - (cta >> shift << shift)};
}

/* In shared memory, for up to 1024 threads. */
struct FinderScratch {
  int32_t warp_sums[32];
  LinePlace found[2];
};

/* Tiles of a request that is one. */
template <typename T>
__device__ __forceinline__ int tiles_of_request(const AttentionArgs<T>& args, int req, int tile_m) {
  const RequestKeys keys = args.keys_of(min(req, args.num_reqs - 1));
  const int m_tiles = keys.num_m_tiles(args.group_size, tile_m);
  return req < args.num_reqs && m_tiles > 0 ? m_tiles * keys.num_tiles() : 0;
}

template <typename T>
__device__ __forceinline__ bool warp_finds_chunks(const AttentionArgs<T>& args) {
  return args.num_reqs <= kWarpSize;
}

/* A warp finds chunk `item`, a lane for each request. All lanes call. */
template <typename T>
__device__ __forceinline__ FoundChunk find_chunk_in_warp(const AttentionArgs<T>& args,
                                                         int item,
                                                         int tile_m) {
  const int own = tiles_of_request(args, threadIdx.x % kWarpSize, tile_m);
  const int inclusive = warp_inclusive_sum(own);
  const auto place_of = [&](int position) -> LinePlace {
    const int offset = position - (inclusive - own);
    const uint32_t here = __ballot_sync(kAllLanes, offset >= 0 && offset < own);
    const int req = max(__ffs(static_cast<int>(here)) - 1, 0);
    return {req, __shfl_sync(kAllLanes, offset, req)};
  };
  const Chunks chunks = args.plan.cut(__shfl_sync(kAllLanes, inclusive, kWarpSize - 1));
  return {chunks, place_of(chunks.begin(item)), place_of(chunks.begin(item + 1))};
}

/* Whether clusters are formed: the same in every warp of the pass. All lanes call. */
template <typename T>
__device__ __forceinline__ bool forms_clusters(const AttentionArgs<T>& args, int tile_m) {
  if (args.plan.cluster_ctas <= 1) return false;
  if (args.num_reqs == 1) return true;
  const int own = tiles_of_request(args, threadIdx.x % kWarpSize, tile_m);
  const int longest = warp_reduce(own, [](int a, int b) { return max(a, b); });
  return args.plan.suits_clusters(args.num_reqs, longest, warp_reduce(own, SumOp{}));
}

/* The share of a CTA in the keys of its cluster's request; offsets are tiles of the request. */
template <typename T>
__device__ __forceinline__ FoundChunk find_cluster_chunk(const AttentionArgs<T>& args,
                                                         const ClusterPlace& place,
                                                         int tile_m) {
  const int tiles = tiles_of_request(args, place.req, tile_m);
  const Chunks chunks = args.plan.cut_into(tiles, ((tiles - 1) >> args.plan.cluster_shift()) + 1);
  return {chunks, {place.req, chunks.begin(place.rank)}, {place.req, chunks.begin(place.rank + 1)}};
}

/* kThreads threads that stand together in a CTA look together, a request each, so that the lists are
 * read in one go; they meet at a barrier of theirs. */
template <typename T, int kThreads, int kBarrier = 0>
struct ChunkFinder {
  const AttentionArgs<T>& args;
  FinderScratch& scratch;
  int tile_m;

  /* Finds chunk `item`. All threads call. */
  __device__ __forceinline__ FoundChunk find(int item) const {
    return warp_finds_chunks(args) ? find_chunk_in_warp(args, item, tile_m) : find_together(item);
  }

  /* The same for any number of requests. */
  __device__ __forceinline__ FoundChunk find_together(int item) const {
    const Chunks chunks = leave_places(item);
    return {chunks, scratch.found[0], scratch.found[1]};
  }

 private:
  static constexpr int kWarps = kThreads / kWarpSize;

  __device__ __forceinline__ int tiles_of(int req) const {
    return tiles_of_request(args, req, tile_m);
  }

  /* Leaves the places in scratch.found. */
  __device__ __forceinline__ Chunks leave_places(int item) const {
    const int thread = threadIdx.x % kThreads;
    const int own = tiles_of(thread);
    const int inclusive = warp_inclusive_sum(own);
    int later = 0;
#pragma unroll 2
    for (int base = kThreads; base < args.num_reqs; base += kThreads) {
      later += tiles_of(base + thread);
    }
    const bool in_rounds = args.num_reqs > kThreads;
    int before;
    const int first_round = exchange(inclusive, &before);
    int total = first_round;
    if (in_rounds) {
      int ignored;
      total += exchange(warp_reduce(later, SumOp{}), &ignored);
    }
    const Chunks chunks = args.plan.cut(total);
    const int begin = chunks.begin(item);
    const int end = chunks.begin(item + 1);
    settle(begin, before + inclusive - own, own, thread, &scratch.found[0]);
    settle(end, before + inclusive - own, own, thread, &scratch.found[1]);
    if (in_rounds && end >= first_round) find_later(begin, end, first_round);
    sync_threads<kThreads>(kBarrier);
    return chunks;
  }

  /* Sums over the CTA what the last lane of every warp gives; `before`: over the warps below. */
  __device__ __forceinline__ int exchange(int value, int* before) const {
    const int lane = threadIdx.x % kWarpSize;
    sync_threads<kThreads>(kBarrier); /* the sums before are read */
    if (lane == kWarpSize - 1) scratch.warp_sums[threadIdx.x % kThreads / kWarpSize] = value;
    sync_threads<kThreads>(kBarrier);
    const int sum = lane < kWarps ? scratch.warp_sums[lane] : 0;
    const int inclusive = warp_inclusive_sum(sum);
    *before = __shfl_sync(kAllLanes, inclusive - sum, threadIdx.x % kThreads / kWarpSize);
    return __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
  }

  /* Notes `position` if it is one of the tiles [first, first + own) of request `req`. */
  static __device__ __forceinline__ void settle(
      int position, int first, int own, int req, LinePlace* found) {
    if (position >= first && position - first < own) *found = {req, position - first};
  }

  /* The rounds after the first, which ended before tile `passed`. */
  __device__ __forceinline__ void find_later(int begin, int end, int passed) const {
    for (int base = kThreads; base < args.num_reqs && passed <= end; base += kThreads) {
      const int request = base + threadIdx.x % kThreads;
      const int own = tiles_of(request);
      const int inclusive = warp_inclusive_sum(own);
      int before;
      const int round = exchange(inclusive, &before);
      const int first = passed + before + inclusive - own;
      settle(begin, first, own, request, &scratch.found[0]);
      settle(end, first, own, request, &scratch.found[1]);
      passed += round;
    }
  }
};

}  // namespace dspark
