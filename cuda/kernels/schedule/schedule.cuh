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

/* Calibrated confidences, then keys in the order of requests and positions, then fillers. */
template <int kThreads, int kItems>
__device__ __forceinline__ void make_keys(const ScheduleArgs& args,
                                          int32_t num_live,
                                          uint32_t magic,
                                          uint32_t* keys) {
  constexpr int kUnroll = kItems < 4 ? kItems : 4;
  const int32_t num_drafts = args.num_reqs * args.draft_len;
#pragma unroll kUnroll
  for (int j = 0; j < kItems; ++j) {
    const int32_t i = threadIdx.x + j * kThreads;
    uint32_t word = SchedulePolicy::kOne << SchedulePolicy::kIndexBits;
    if (i < num_drafts) {
      const int32_t position = i - divide(i, magic) * args.draft_len;
      const float temperature = args.temperature == nullptr ? 1.f : args.temperature[position];
      word = __float_as_uint(calibrate(args.confidence[i], temperature));
    }
    keys[padded(i)] = word;
  }
  __syncthreads();
  for (int32_t r = threadIdx.x; r < args.num_reqs; r += kThreads) {
    const int32_t limit = r >= num_live            ? 0
                          : args.limits == nullptr ? args.draft_len
                                                   : min(args.limits[r], args.draft_len);
    float survival = 1.f;
#pragma unroll 4
    for (int32_t k = 0; k < args.draft_len; ++k) {
      const int32_t index = r * args.draft_len + k;
      survival = __fmul_rn(survival, __uint_as_float(keys[padded(index)]));
      const uint32_t units =
          __float2uint_rn(__fmul_rn(survival, static_cast<float>(SchedulePolicy::kOne)));
      const uint32_t loss = SchedulePolicy::kOne - (k < limit ? units : 0);
      keys[padded(index)] = loss << SchedulePolicy::kIndexBits | index;
    }
  }
  __syncthreads();
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

template <int kThreads, int kItems, bool kHoldsTicks>
__global__ void __launch_bounds__(kThreads, 1) schedule_kernel(ScheduleArgs args) {
  using Sort = RadixSort<kThreads, kItems>;
  constexpr int kNumWarps = Sort::kNumWarps;
  extern __shared__ uint32_t keys[];
  uint32_t* counts = keys + Sort::kKeyWords;
  uint32_t* held_ticks = counts + Sort::kCountWords;
  __shared__ uint32_t warp_sums[kNumWarps];
  __shared__ Candidate warp_bests[kNumWarps];
  __shared__ int32_t num_ranked, first_fall, filled;
  const int thread = threadIdx.x;
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int32_t num_drafts = args.num_reqs * args.draft_len;
  const uint32_t magic = reciprocal(args.draft_len);
  if constexpr (kHoldsTicks) {
    for (int32_t i = thread; i <= num_drafts; i += kThreads) {
      copy_async_4(shared_address(&held_ticks[padded(i)]), args.ticks + i);
    }
    copy_async_commit();
  }
  const auto ticks = [&](int32_t n) { return kHoldsTicks ? held_ticks[padded(n)] : args.ticks[n]; };
  const int32_t num_live =
      args.num_live == nullptr ? args.num_reqs : min(max(*args.num_live, 0), args.num_reqs);
  int64_t capacity = 0;
  int32_t capacity_reqs = 1;
  if (args.rule == DSPARK_SCHEDULE_CAPACITY) {
    capacity = max(args.capacity[0], 0);
    capacity_reqs = max(args.capacity[1], 1);
  }
  if (thread == 0) {
    num_ranked = 0;
    first_fall = INT32_MAX;
    filled = INT32_MAX;
  }
  make_keys<kThreads, kItems>(args, num_live, magic, keys);
#pragma unroll 1
  for (int digit = 0; digit < 4; ++digit) {
    Sort::pass(SchedulePolicy::kIndexBits + 4 * digit, keys, counts, warp_sums);
  }

  /* The survivals of this thread's ranks. The lengths take the place of the counters. */
  for (int32_t r = thread; r < (args.num_reqs + 1) / 2; r += kThreads) counts[r] = 0;
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
  const uint32_t base = static_cast<uint32_t>(num_live) * SchedulePolicy::kOne;
  const uint32_t share = SchedulePolicy::kGuard * static_cast<uint32_t>(max(num_live, 1));
  uint32_t tau = base + before_warp + inclusive - sum;
  const uint32_t most_guard = (tau + sum) / share;
  const uint32_t plain = ticks(0);
  Candidate mine{base, plain, 0};
  uint32_t before = ticks(min(first, num_drafts));
  const bool falls = args.rule == DSPARK_SCHEDULE_FIRST_FALL;
  const bool wants_best = args.rule == DSPARK_SCHEDULE_BEST || args.best != nullptr;
  int32_t fall = INT32_MAX;
#pragma unroll 2
  for (int i = 0; i < kItems; ++i) {
    const int32_t rank = first + i;
    if (rank >= len) break;
    const uint32_t after = ticks(rank + 1);
    const uint32_t next = tau + gain_of(keys[padded(rank)]);
    if (falls && fall == INT32_MAX) {
      /* most_guard is no less than tau / share, which is slow to make and seldom decides. */
      const uint64_t raised = static_cast<uint64_t>(next) * before;
      if (raised <= (static_cast<uint64_t>(tau) + most_guard) * after &&
          raised <= (static_cast<uint64_t>(tau) + tau / share) * after) {
        fall = rank;
      }
    }
    if (wants_best) mine = better(mine, Candidate{next, after, rank + 1});
    tau = next;
    before = after;
  }
  if (falls) {
    fall = __reduce_min_sync(kAllLanes, fall);
    if (lane == 0 && fall != INT32_MAX) atomicMin(&first_fall, fall);
  }
  if (wants_best) {
    mine = warp_best(mine);
    if (lane == 0) warp_bests[warp] = mine;
  }
  __syncthreads();
  int32_t best = 0;
  if (wants_best) {
    /* Every warp reduces all bests, so that every thread knows the outcome without a barrier more. */
    const Candidate top = warp_best(warp_bests[min(lane, kNumWarps - 1)]);
    const uint64_t guarded = static_cast<uint64_t>(base) + base / SchedulePolicy::kGuard;
    const bool pays = static_cast<uint64_t>(top.tau) * plain > guarded * top.ticks;
    best = pays ? top.num_drafts : 0;
  }

  int32_t admitted = best;
  if (falls) {
    admitted = min(first_fall, len);
  } else if (args.rule == DSPARK_SCHEDULE_CAPACITY) {
    const int64_t scaled = (capacity * num_live + capacity_reqs / 2) / capacity_reqs;
    admitted = capacity == 0 ? 0 : static_cast<int32_t>(min(scaled, static_cast<int64_t>(len)));
  }
  if (args.rule != DSPARK_SCHEDULE_BEST) {
    /* The first count that costs more ends the bucket. Ticks do not fall. */
    const bool fills = admitted > 0 || (capacity > 0 && len > 0);
    const uint32_t price = ticks(admitted);
    for (int32_t n = admitted + 1 + thread; n <= len; n += kThreads) {
      if (ticks(n) != price) {
        atomicMin(&filled, n - 1);
        break;
      }
    }
    __syncthreads();
    admitted = fills ? min(filled, len) : 0;
  }
  write_lens<kThreads>(args, admitted, magic, keys, counts);
  /* best may be capacity: all have read it */
  if (thread == 0 && args.best != nullptr) {
    args.best[0] = best;
    args.best[1] = num_live;
  }
}

}  // namespace dspark
