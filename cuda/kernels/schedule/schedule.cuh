/*
 * How many drafts of each request are verified: calibration, survival, ranking, search and lengths
 * in one launch of one CTA. The contract stands in dspark.h; src/schedule/rank.rs is the same rule.
 *
 * Mapping: a draft is a 32-bit key, (65535 - survival in units of 1 / 65535) << 14 | request *
 * draft_len + position, so that ascending keys are the ranking. The keys are made in the order of
 * their low bits and sorted by the 16 above in four stable passes (radix.cuh). Thread t then owns
 * the kItems ranks from t * kItems on: a CTA-wide prefix sum gives every rank its tau, and each rule
 * is a minimum or a maximum over ranks. Prices are fetched into shared memory meanwhile. Everything
 * after calibration is integer arithmetic: exact in any order.
 *
 * Bytes: 4 per draft in, 4 per price in, 4 per request out. Limited by the instructions of one
 * multiprocessor: some 70 per draft for calibration, some 25 per draft and pass for sorting.
 */
#pragma once

#include <cstdint>

#include "common/async_copy.cuh"
#include "common/reduce.cuh"
#include "dspark.h"
#include "kernels/schedule/calibrate.cuh"
#include "kernels/schedule/radix.cuh"

namespace dspark {

struct SchedulePolicy {
  static constexpr int kMaxReqs = 8192;
  static constexpr int kMaxDrafts = 16384;
  static constexpr int kIndexBits = 14;
  static constexpr uint32_t kOne = 65535;
  static constexpr uint32_t kGuard = 100; /* a gain below one part in this many is none */
};

struct ScheduleArgs {
  int32_t num_reqs;
  int32_t draft_len;
  int32_t rule;
  const float* confidence;
  const float* temperature;
  const int32_t* limits;
  const int32_t* num_live;
  const uint32_t* ticks;
  const int32_t* capacity;
  int32_t* best;
  int32_t* verify_lens;
};

/* Shared memory in words: the keys; the counters of the sort, in whose place the lengths are summed
 * up in the end; and, where they fit, the prices. */
template <int kThreads, int kItems, bool kHoldsTicks>
struct ScheduleShared {
  using Sort = RadixSort<kThreads, kItems>;
  static constexpr int kTickWords = kHoldsTicks ? Sort::kKeyWords + 1 : 0;
  static constexpr size_t kBytes =
      sizeof(uint32_t) * (Sort::kKeyWords + Sort::kCountWords + kTickWords);
  static_assert(Sort::kCountWords >= Sort::kNumKeys / 2, "two lengths to a word");
};

/* i / divisor for i and divisor below 2^14, by the `magic` of reciprocal(divisor). */
__device__ __forceinline__ int32_t divide(uint32_t i, uint32_t magic) {
  return magic == 0 ? i : __umulhi(i, magic);
}

__device__ __forceinline__ uint32_t reciprocal(uint32_t divisor) {
  return divisor > 1 ? 0xffffffffu / divisor + 1 : 0;
}

/* The gain of a key in survival units; 0 of a draft that is not ranked. */
__device__ __forceinline__ uint32_t gain_of(uint32_t key) {
  return SchedulePolicy::kOne - (key >> SchedulePolicy::kIndexBits);
}

/* What all CTAs know about the step. */
struct ScheduleScope {
  int32_t num_live;
  uint32_t magic; /* of draft_len */
};

__device__ __forceinline__ ScheduleScope scope_of(const ScheduleArgs& args) {
  const int32_t num_live =
      args.num_live == nullptr ? args.num_reqs : min(max(*args.num_live, 0), args.num_reqs);
  return {num_live, reciprocal(args.draft_len)};
}

/* Calibrated confidences of `num_reqs` requests from `first_req` on, then their keys in the order of
 * requests and positions, then fillers. */
template <int kThreads, int kItems>
__device__ __forceinline__ void make_keys(const ScheduleArgs& args,
                                          const ScheduleScope& scope,
                                          int32_t first_req,
                                          int32_t num_reqs,
                                          uint32_t filler,
                                          uint32_t* keys) {
  constexpr int kUnroll = kItems < 4 ? kItems : 4;
  const int32_t num_drafts = num_reqs * args.draft_len;
  const int32_t first = first_req * args.draft_len;
#pragma unroll kUnroll
  for (int j = 0; j < kItems; ++j) {
    const int32_t i = threadIdx.x + j * kThreads;
    uint32_t word = filler;
    if (i < num_drafts) {
      const int32_t position = i - divide(i, scope.magic) * args.draft_len;
      const float temperature = args.temperature == nullptr ? 1.f : args.temperature[position];
      word = __float_as_uint(calibrate(args.confidence[first + i], temperature));
    }
    keys[padded(i)] = word;
  }
  __syncthreads();
  for (int32_t r = threadIdx.x; r < num_reqs; r += kThreads) {
    const int32_t request = first_req + r;
    const int32_t limit = request >= scope.num_live ? 0
                          : args.limits == nullptr  ? args.draft_len
                                                    : min(args.limits[request], args.draft_len);
    float survival = 1.f;
#pragma unroll 4
    for (int32_t k = 0; k < args.draft_len; ++k) {
      const int32_t index = r * args.draft_len + k;
      survival = __fmul_rn(survival, __uint_as_float(keys[padded(index)]));
      const uint32_t units =
          __float2uint_rn(__fmul_rn(survival, static_cast<float>(SchedulePolicy::kOne)));
      const uint32_t loss = SchedulePolicy::kOne - (k < limit ? units : 0);
      keys[padded(index)] = loss << SchedulePolicy::kIndexBits | (first + index);
    }
  }
  __syncthreads();
}

/* Fetches the prices of 0 .. num_drafts drafts into shared memory, behind the computation. */
template <int kThreads>
__device__ __forceinline__ void fetch_ticks(const ScheduleArgs& args, uint32_t* held_ticks) {
  for (int32_t i = threadIdx.x; i <= args.num_reqs * args.draft_len; i += kThreads) {
    copy_async_4(shared_address(&held_ticks[padded(i)]), args.ticks + i);
  }
  copy_async_commit();
}

/* A number of drafts with its throughput tau / ticks. */
struct Candidate {
  uint32_t tau;
  uint32_t ticks;
  int32_t num_drafts;
};

/* The higher throughput; of equals the fewer drafts. */
__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
  const uint64_t left = static_cast<uint64_t>(a.tau) * b.ticks;
  const uint64_t right = static_cast<uint64_t>(b.tau) * a.ticks;
  const bool first = left > right || (left == right && a.num_drafts <= b.num_drafts);
  return first ? a : b;
}

__device__ __forceinline__ Candidate warp_best(Candidate mine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    Candidate other;
    other.tau = __shfl_xor_sync(kAllLanes, mine.tau, offset);
    other.ticks = __shfl_xor_sync(kAllLanes, mine.ticks, offset);
    other.num_drafts = __shfl_xor_sync(kAllLanes, mine.num_drafts, offset);
    mine = better(mine, other);
  }
  return mine;
}

/* What a rule needs besides the ranking. */
struct ScheduleGoal {
  uint32_t base;  /* tau of no drafts */
  uint32_t share; /* tau over this is the least gain that counts */
  int64_t capacity;
  int32_t capacity_reqs;
};

__device__ __forceinline__ ScheduleGoal goal_of(const ScheduleArgs& args,
                                                const ScheduleScope& scope) {
  ScheduleGoal goal{};
  goal.base = static_cast<uint32_t>(scope.num_live) * SchedulePolicy::kOne;
  goal.share = SchedulePolicy::kGuard * static_cast<uint32_t>(max(scope.num_live, 1));
  goal.capacity_reqs = 1;
  if (args.rule == DSPARK_SCHEDULE_CAPACITY) {
    goal.capacity = max(args.capacity[0], 0);
    goal.capacity_reqs = max(args.capacity[1], 1);
  }
  return goal;
}

__device__ __forceinline__ bool wants_best(const ScheduleArgs& args) {
  return args.rule == DSPARK_SCHEDULE_BEST || args.best != nullptr;
}

/* Whether one draft more, from tau to next and from `before` to `after` ticks, does not raise the
 * throughput by the guard. most_guard is no less than tau / share, which is slow to make and seldom
 * decides. */
__device__ __forceinline__ bool falls_at(uint32_t tau,
                                         uint32_t next,
                                         uint32_t before,
                                         uint32_t after,
                                         uint32_t most_guard,
                                         uint32_t share) {
  const uint64_t raised = static_cast<uint64_t>(next) * before;
  return raised <= (static_cast<uint64_t>(tau) + most_guard) * after &&
         raised <= (static_cast<uint64_t>(tau) + tau / share) * after;
}

/* The number of drafts of the highest throughput where it is worth it, else 0. */
__device__ __forceinline__ int32_t paying(const Candidate& top, uint32_t base, uint32_t plain) {
  const uint64_t guarded = static_cast<uint64_t>(base) + base / SchedulePolicy::kGuard;
  const bool pays = static_cast<uint64_t>(top.tau) * plain > guarded * top.ticks;
  return pays ? top.num_drafts : 0;
}

/* How many of the `len` ranked drafts are admitted. `filled` is shared and INT32_MAX; a CTA's work. */
template <int kThreads, typename Ticks>
__device__ __forceinline__ int32_t admit(const ScheduleArgs& args,
                                         const ScheduleGoal& goal,
                                         int32_t num_live,
                                         int32_t best,
                                         int32_t first_fall,
                                         int32_t len,
                                         const Ticks& ticks,
                                         int32_t* filled) {
  if (args.rule == DSPARK_SCHEDULE_BEST) return best;
  int32_t admitted = min(first_fall, len);
  if (args.rule == DSPARK_SCHEDULE_CAPACITY) {
    const int64_t scaled = (goal.capacity * num_live + goal.capacity_reqs / 2) / goal.capacity_reqs;
    admitted =
        goal.capacity == 0 ? 0 : static_cast<int32_t>(min(scaled, static_cast<int64_t>(len)));
  }
  /* The first count that costs more ends the bucket. Ticks do not fall. */
  const bool fills = admitted > 0 || (goal.capacity > 0 && len > 0);
  const uint32_t price = ticks(admitted);
  for (int32_t n = admitted + 1 + static_cast<int32_t>(threadIdx.x); n <= len; n += kThreads) {
    if (ticks(n) != price) {
      atomicMin(filled, n - 1);
      break;
    }
  }
  __syncthreads();
  return fills ? min(*filled, len) : 0;
}

/* Adds one to the length of every request that an admitted rank belongs to; two lengths to a word. */
template <int kThreads>
__device__ __forceinline__ void write_lens(const ScheduleArgs& args,
                                           int32_t admitted,
                                           uint32_t magic,
                                           const uint32_t* keys,
                                           uint32_t* lens) {
  constexpr uint32_t kIndexMask = (1u << SchedulePolicy::kIndexBits) - 1;
  for (int32_t rank = threadIdx.x; rank < admitted; rank += kThreads) {
    const int32_t request = divide(keys[padded(rank)] & kIndexMask, magic);
    atomicAdd(&lens[request / 2], request % 2 == 0 ? 1u : 1u << 16);
  }
  __syncthreads();
  for (int32_t r = threadIdx.x; r < args.num_reqs; r += kThreads) {
    args.verify_lens[r] = lens[r / 2] >> 16 * (r % 2) & 0xffff;
  }
}

/* Searches the ranking `keys` and writes what comes of it. A CTA's work; thread t owns the kItems
 * ranks from t * kItems on. `lens` has (num_reqs + 1) / 2 words that nobody reads any more. */
template <int kThreads, int kItems, bool kHoldsTicks>
__device__ __forceinline__ void search(const ScheduleArgs& args,
                                       const ScheduleScope& scope,
                                       const uint32_t* keys,
                                       const uint32_t* held_ticks,
                                       uint32_t* lens) {
  constexpr int kNumWarps = kThreads / kWarpSize;
  __shared__ uint32_t warp_sums[kNumWarps];
  __shared__ Candidate warp_bests[kNumWarps];
  __shared__ int32_t num_ranked, first_fall, filled;
  const int thread = threadIdx.x;
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int32_t num_drafts = args.num_reqs * args.draft_len;
  const int32_t num_live = scope.num_live;
  const auto ticks = [&](int32_t n) { return kHoldsTicks ? held_ticks[padded(n)] : args.ticks[n]; };
  const ScheduleGoal goal = goal_of(args, scope);
  if (thread == 0) {
    num_ranked = 0;
    first_fall = INT32_MAX;
    filled = INT32_MAX;
  }
  for (int32_t r = thread; r < (args.num_reqs + 1) / 2; r += kThreads) lens[r] = 0;
  __syncthreads();

  /* The survivals of this thread's ranks. */
  const int32_t first = thread * kItems;
  uint32_t sum = 0;
  uint32_t ranked = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t gain = gain_of(keys[padded(first + i)]);
    sum += gain;
    ranked += gain != 0;
  }
  const uint32_t inclusive = warp_inclusive_sum(sum);
  const int32_t warp_ranked = __reduce_add_sync(kAllLanes, ranked);
  if (lane == kWarpSize - 1) {
    warp_sums[warp] = inclusive;
    if (warp_ranked > 0) atomicMax(&num_ranked, warp * kWarpSize * kItems + warp_ranked);
  }
  if constexpr (kHoldsTicks) copy_async_wait<0>();
  __syncthreads();
  const int32_t len = num_ranked;
  const uint32_t total = lane < kNumWarps ? warp_sums[lane] : 0;
  const uint32_t before_warp = __shfl_sync(kAllLanes, warp_inclusive_sum(total) - total, warp);
  uint32_t tau = goal.base + before_warp + inclusive - sum;
  const uint32_t most_guard = (tau + sum) / goal.share;
  const uint32_t plain = ticks(0);
  Candidate mine{goal.base, plain, 0};
  uint32_t before = ticks(min(first, num_drafts));
  const bool falls = args.rule == DSPARK_SCHEDULE_FIRST_FALL;
  const bool looks_for_best = wants_best(args);
  int32_t fall = INT32_MAX;
#pragma unroll 2
  for (int i = 0; i < kItems; ++i) {
    const int32_t rank = first + i;
    if (rank >= len) break;
    const uint32_t after = ticks(rank + 1);
    const uint32_t next = tau + gain_of(keys[padded(rank)]);
    if (falls && fall == INT32_MAX && falls_at(tau, next, before, after, most_guard, goal.share)) {
      fall = rank;
    }
    if (looks_for_best) mine = better(mine, Candidate{next, after, rank + 1});
    tau = next;
    before = after;
  }
  if (falls) {
    fall = __reduce_min_sync(kAllLanes, fall);
    if (lane == 0 && fall != INT32_MAX) atomicMin(&first_fall, fall);
  }
  if (looks_for_best) {
    mine = warp_best(mine);
    if (lane == 0) warp_bests[warp] = mine;
  }
  __syncthreads();
  int32_t best = 0;
  if (looks_for_best) {
    /* Every warp reduces all bests, so that every thread knows the outcome without a barrier more. */
    const Candidate top = warp_best(warp_bests[min(lane, kNumWarps - 1)]);
    best = paying(top, goal.base, plain);
  }
  const int32_t admitted =
      admit<kThreads>(args, goal, num_live, best, first_fall, len, ticks, &filled);
  write_lens<kThreads>(args, admitted, scope.magic, keys, lens);
  /* best may be capacity: all have read it */
  if (thread == 0 && args.best != nullptr) {
    args.best[0] = best;
    args.best[1] = num_live;
  }
}

template <int kThreads, int kItems, bool kHoldsTicks>
__global__ void __launch_bounds__(kThreads, 1) schedule_kernel(ScheduleArgs args) {
  using Sort = RadixSort<kThreads, kItems>;
  extern __shared__ uint32_t keys[];
  uint32_t* counts = keys + Sort::kKeyWords;
  uint32_t* held_ticks = counts + Sort::kCountWords;
  __shared__ uint32_t warp_totals[Sort::kNumWarps];
  if constexpr (kHoldsTicks) fetch_ticks<kThreads>(args, held_ticks);
  const ScheduleScope scope = scope_of(args);
  constexpr uint32_t kFiller = SchedulePolicy::kOne << SchedulePolicy::kIndexBits;
  make_keys<kThreads, kItems>(args, scope, 0, args.num_reqs, kFiller, keys);
#pragma unroll 1
  for (int digit = 0; digit < 4; ++digit) {
    Sort::pass(SchedulePolicy::kIndexBits + 4 * digit, keys, counts, warp_totals);
  }
  search<kThreads, kItems, kHoldsTicks>(args, scope, keys, held_ticks, counts);
}

}  // namespace dspark
