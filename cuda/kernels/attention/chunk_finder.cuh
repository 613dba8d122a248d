/*
 * Where the chunks of the line of tiles begin and end: the search that every CTA makes first. See
 * plan.h for the rules.
 */
#pragma once

#include "kernels/attention/tile.cuh"

namespace dspark {

/* A place on the line: tiles of a request before it. */
struct LinePlace {
  int32_t req;
  int32_t offset; /* among the tiles of all M tiles of the request */
};

/* In shared memory, for CTAs of up to 1024 threads. */
struct FinderScratch {
  int32_t warp_sums[32];
  LinePlace found[2];
};

/* All threads of a CTA look together, a request each, so that the lists are read in one go. */
template <typename T, int kThreads>
struct ChunkFinder {
  const AttentionArgs<T>& args;
  FinderScratch& scratch;
  int tile_m;

  __device__ __forceinline__ int tiles_of(int req) const {
    const RequestKeys keys = args.keys_of(min(req, args.num_reqs - 1));
    const int m_tiles = keys.num_m_tiles(args.group_size, tile_m);
    return req < args.num_reqs && m_tiles > 0 ? m_tiles * keys.num_tiles() : 0;
  }

  /* The line's chunks. Finds the beginning of chunk `item` in found[0] and its end in found[1], where
   * they are places of tiles (the end of the line is none). All threads call. */
  __device__ __forceinline__ Chunks find(int item) const {
    const int thread = threadIdx.x;
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
    __syncthreads();
    return chunks;
  }

 private:
  static constexpr int kWarps = kThreads / kWarpSize;

  /* Sums over the CTA what the last lane of every warp gives; `before`: over the warps below. */
  __device__ __forceinline__ int exchange(int value, int* before) const {
    const int lane = threadIdx.x % kWarpSize;
    __syncthreads(); /* the sums before are read */
    if (lane == kWarpSize - 1) scratch.warp_sums[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    const int sum = lane < kWarps ? scratch.warp_sums[lane] : 0;
    const int inclusive = warp_inclusive_sum(sum);
    *before = __shfl_sync(kAllLanes, inclusive - sum, threadIdx.x / kWarpSize);
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
      const int own = tiles_of(base + threadIdx.x);
      const int inclusive = warp_inclusive_sum(own);
      int before;
      const int round = exchange(inclusive, &before);
      const int first = passed + before + inclusive - own;
      settle(begin, first, own, base + threadIdx.x, &scratch.found[0]);
      settle(end, first, own, base + threadIdx.x, &scratch.found[1]);
      passed += round;
    }
  }
};

}  // namespace dspark
