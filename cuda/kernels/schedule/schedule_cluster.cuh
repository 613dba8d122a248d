/*
 * The decision of schedule.cuh by a cluster of eight CTAs, where sm_90 has them. Each has an eighth
 * of the requests.
 *
 * Mapping: a CTA makes the keys of its requests, sorts them (radix.cuh) and sums up their gains, then
 * writes keys and sums to all eight. Keys are distinct, so that the rank of a key is the number of
 * keys below it, eight binary searches, and the gains below it are the eight sums that stand there.
 * With rank and tau every key is judged on its own: the first fall is a minimum and the best number a
 * maximum over keys, and a key that is admitted adds one to the length of its request. Nothing is
 * moved to its rank: single words written at random into another CTA's memory come too slowly.
 *
 * Three barriers of the cluster: all have begun, all lists are there, all minima and maxima are.
 */
#pragma once

#include <cstdint>

#include "common/cluster.cuh"
#include "kernels/schedule/schedule.cuh"

namespace dspark {

struct ClusterPolicy {
  static constexpr int kNumCtas = 8;
  static constexpr uint32_t kFiller = 0xffffffffu; /* above all keys, and of the last digits */
};

/* Shared memory in words: the lists of all, keys and then the gains before each key and in all; this
 * CTA's sort, in whose place the lengths are summed up in the end. */
template <int kThreads, int kItems>
struct ClusterShared {
  using Sort = RadixSort<kThreads, kItems>;
  static constexpr int kOwnKeys = Sort::kNumKeys;
  static constexpr int kSums = kOwnKeys + 1;
  static constexpr int kListWords = ClusterPolicy::kNumCtas * (kOwnKeys + kSums);
  static constexpr size_t kBytes =
      sizeof(uint32_t) * (kListWords + Sort::kKeyWords + Sort::kCountWords);
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* Where a key stands among all. */
struct Standing {
  int32_t rank;
  uint32_t gains; /* of the keys below */
};

template <int kOwnKeys>
__device__ __forceinline__ Standing standing_of(uint32_t key,
                                                const uint32_t* lists,
                                                const uint32_t* sums) {
  constexpr int kNumCtas = ClusterPolicy::kNumCtas;
  int32_t below[kNumCtas] = {};
#pragma unroll
  for (int half = kOwnKeys / 2; half > 0; half /= 2) {
#pragma unroll
    for (int cta = 0; cta < kNumCtas; ++cta) {
      if (lists[cta * kOwnKeys + below[cta] + half - 1] < key) below[cta] += half;
    }
  }
  Standing standing{0, 0};
#pragma unroll
  for (int cta = 0; cta < kNumCtas; ++cta) {
    const int32_t n = below[cta] + (lists[cta * kOwnKeys + below[cta]] < key);
    standing.rank += n;
    standing.gains += sums[cta * (kOwnKeys + 1) + n];
  }
  return standing;
}

/* What a CTA tells the others besides its list. */
struct ClusterNote {
  int32_t num_ranked;
  int32_t first_fall;
  Candidate best;
};

/* Writes the words of `value` to the same place of every CTA. One thread. */
template <typename T>
__device__ __forceinline__ void tell_all(T* place, const T& value) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "whole words");
  const auto* words = reinterpret_cast<const uint32_t*>(&value);
  for (int cta = 0; cta < ClusterPolicy::kNumCtas; ++cta) {
    for (int word = 0; word < static_cast<int>(sizeof(T) / sizeof(uint32_t)); ++word) {
      store_remote(shared_address(reinterpret_cast<uint32_t*>(place) + word), cta, words[word]);
    }
  }
}

/* Sums up the gains of the sorted `keys` into `sums`, [kNumKeys + 1], and counts those that are not 0
 * in `num_ranked`, which is 0 before. Ends with a barrier. */
template <int kThreads, int kItems>
__device__ __forceinline__ void sum_gains(const uint32_t* keys,
                                          uint32_t* sums,
                                          int32_t* num_ranked) {
  constexpr int kNumWarps = kThreads / kWarpSize;
  __shared__ uint32_t warp_sums[kNumWarps];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int32_t first = threadIdx.x * kItems;
  uint32_t gains[kItems];
  uint32_t sum = 0;
  uint32_t ranked = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t key = keys[padded(first + i)];
    gains[i] = key == ClusterPolicy::kFiller ? 0 : gain_of(key);
    sum += gains[i];
    ranked += gains[i] != 0;
  }
  const uint32_t inclusive = warp_inclusive_sum(sum);
  ranked = __reduce_add_sync(kAllLanes, ranked);
  if (lane == kWarpSize - 1) {
    warp_sums[warp] = inclusive;
    if (ranked > 0) atomicAdd(num_ranked, static_cast<int32_t>(ranked));
  }
  __syncthreads();
  const uint32_t total = lane < kNumWarps ? warp_sums[lane] : 0;
  const uint32_t before_warp = __shfl_sync(kAllLanes, warp_inclusive_sum(total) - total, warp);
  uint32_t before = before_warp + inclusive - sum;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    sums[first + i] = before;
    before += gains[i];
  }
  if (threadIdx.x == kThreads - 1) sums[kThreads * kItems] = before;
  __syncthreads();
}

/* The eighth of the requests that this CTA has. */
struct ClusterShare {
  int32_t first_req;
  int32_t num_reqs;
};

__device__ __forceinline__ ClusterShare share_of(int32_t num_reqs) {
  const int32_t share = (num_reqs + ClusterPolicy::kNumCtas - 1) / ClusterPolicy::kNumCtas;
  const int32_t first = min(static_cast<int32_t>(blockIdx.x) * share, num_reqs);
  return {first, min(share, num_reqs - first)};
}

/* Sorts this CTA's drafts and gives every CTA the list. Behind the second barrier of the cluster. */
template <int kThreads, int kItems>
__device__ __forceinline__ void exchange_lists(const ScheduleArgs& args,
                                               const ScheduleScope& scope,
                                               const ClusterShare& share,
                                               uint32_t* lists,
                                               uint32_t* sums,
                                               uint32_t* keys,
                                               int32_t* num_ranked) {
  using Shared = ClusterShared<kThreads, kItems>;
  using Sort = typename Shared::Sort;
  __shared__ uint32_t warp_totals[Sort::kNumWarps];
  uint32_t* counts = keys + Sort::kKeyWords;
  uint32_t* own_sums = sums + blockIdx.x * Shared::kSums;
  cluster_arrive();
  make_keys<kThreads, kItems>(args, scope, share.first_req, share.num_reqs, ClusterPolicy::kFiller,
                              keys);
#pragma unroll 1
  for (int digit = 0; digit < 4; ++digit) {
    Sort::pass(SchedulePolicy::kIndexBits + 4 * digit, keys, counts, warp_totals);
  }
  sum_gains<kThreads, kItems>(keys, own_sums, num_ranked);
  cluster_wait();
  for (int32_t i = threadIdx.x; i < Shared::kSums; i += kThreads) {
    const uint32_t key = i < Shared::kOwnKeys ? keys[padded(i)] : 0;
    const uint32_t sum = own_sums[i];
#pragma unroll
    for (int cta = 0; cta < ClusterPolicy::kNumCtas; ++cta) {
      if (i < Shared::kOwnKeys) {
        store_remote(shared_address(&lists[blockIdx.x * Shared::kOwnKeys + i]), cta, key);
      }
      if (cta != static_cast<int>(blockIdx.x)) store_remote(shared_address(&own_sums[i]), cta, sum);
    }
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}

#endif

template <int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1) DSPARK_CLUSTER(ClusterPolicy::kNumCtas)
    schedule_cluster_kernel(ScheduleArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Shared = ClusterShared<kThreads, kItems>;
  constexpr int kNumCtas = ClusterPolicy::kNumCtas;
  constexpr int kNumWarps = kThreads / kWarpSize;
  extern __shared__ uint32_t lists[];
  uint32_t* sums = lists + kNumCtas * Shared::kOwnKeys;
  uint32_t* keys = lists + Shared::kListWords;
  uint32_t* lens = keys; /* of this CTA's requests, once the keys are in the lists */
  __shared__ ClusterNote notes[kNumCtas];
  __shared__ Candidate warp_bests[kNumWarps];
  __shared__ int32_t num_ranked, first_fall, filled;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const ScheduleScope scope = scope_of(args);
  const ScheduleGoal goal = goal_of(args, scope);
  const ClusterShare share = share_of(args.num_reqs);
  const bool falls = args.rule == DSPARK_SCHEDULE_FIRST_FALL;
  const bool looks_for_best = wants_best(args);
  const auto ticks = [&](int32_t n) { return args.ticks[n]; };
  const uint32_t plain = ticks(0);
  if (threadIdx.x == 0) {
    num_ranked = 0;
    first_fall = INT32_MAX;
    filled = INT32_MAX;
  }
  exchange_lists<kThreads, kItems>(args, scope, share, lists, sums, keys, &num_ranked);

  for (int32_t r = threadIdx.x; r < share.num_reqs; r += kThreads) lens[r] = 0;
  Candidate mine{goal.base, plain, 0};
  int32_t fall = INT32_MAX;
  uint32_t own[kItems];
  int32_t ranks[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    own[j] = lists[blockIdx.x * Shared::kOwnKeys + threadIdx.x + j * kThreads];
    ranks[j] = INT32_MAX;
    if (own[j] == ClusterPolicy::kFiller || gain_of(own[j]) == 0) continue;
    const Standing standing = standing_of<Shared::kOwnKeys>(own[j], lists, sums);
    const uint32_t before = ticks(standing.rank);
    const uint32_t after = ticks(standing.rank + 1);
    const uint32_t tau = goal.base + standing.gains;
    const uint32_t next = tau + gain_of(own[j]);
    ranks[j] = standing.rank;
    if (falls && falls_at(tau, next, before, after, tau / goal.share, goal.share)) {
      fall = min(fall, standing.rank);
    }
    if (looks_for_best) mine = better(mine, Candidate{next, after, standing.rank + 1});
  }
  fall = __reduce_min_sync(kAllLanes, fall);
  if (lane == 0 && fall != INT32_MAX) atomicMin(&first_fall, fall);
  if (looks_for_best) {
    mine = warp_best(mine);
    if (lane == 0) warp_bests[warp] = mine;
  }
  __syncthreads();
  if (warp == 0) {
    if (looks_for_best) mine = warp_best(warp_bests[min(lane, kNumWarps - 1)]);
    if (lane == 0) tell_all(&notes[blockIdx.x], ClusterNote{num_ranked, first_fall, mine});
    __syncwarp();
  }
  cluster_arrive();
  cluster_wait();

  ClusterNote all = notes[0];
#pragma unroll
  for (int cta = 1; cta < kNumCtas; ++cta) {
    all.num_ranked += notes[cta].num_ranked;
    all.first_fall = min(all.first_fall, notes[cta].first_fall);
    all.best = better(all.best, notes[cta].best);
  }
  const int32_t best = looks_for_best ? paying(all.best, goal.base, plain) : 0;
  const int32_t admitted = admit<kThreads>(args, goal, scope.num_live, best, all.first_fall,
                                           all.num_ranked, ticks, &filled);
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (ranks[j] < admitted) {
      constexpr uint32_t kIndexMask = (1u << SchedulePolicy::kIndexBits) - 1;
      const uint32_t index = (own[j] & kIndexMask) - share.first_req * args.draft_len;
      atomicAdd(&lens[divide(index, scope.magic)], 1u);
    }
  }
  __syncthreads();
  for (int32_t r = threadIdx.x; r < share.num_reqs; r += kThreads) {
    args.verify_lens[share.first_req + r] = lens[r];
  }
  /* best may be capacity: all have read it */
  if (blockIdx.x == 0 && threadIdx.x == 0 && args.best != nullptr) {
    args.best[0] = best;
    args.best[1] = scope.num_live;
  }
#endif
}

}  // namespace dspark
