/*
 * How many drafts of each request are verified: calibration, survival, ranking, search and lengths
 * in one launch of one CTA. The contract stands in dspark.h; src/schedule/rank.rs is the same rule.
 *
 * Mapping: a draft is a 32-bit key, (2^17 - survival in units of 2^-17) << 14 | request * draft_len
 * + position, so that ascending keys are the ranking and no two are equal. A bitonic network sorts
 * 1024 << kStages keys in shared memory; a thread takes kStages stages of it at a time on 2^kStages
 * keys in registers, which divides the passes over shared memory by kStages. A word of padding in
 * 16 keeps the short strides free of bank conflicts. Thread t then owns the 2^kStages ranks from
 * t << kStages on: a block-wide prefix sum gives every rank its tau, and each rule is a minimum or
 * a maximum over ranks. Everything after calibration is integer arithmetic: exact in any order.
 *
 * Bytes: 4 per draft in, 4 per request out. Limited by the passes over shared memory and their
 * barriers: 66 stages in 66 passes for 256 x 7, 105 in 32 for 1024 x 16.
 */
#pragma once

#include <cstdint>

#include "common/reduce.cuh"
#include "dspark.h"
#include "kernels/schedule/calibrate.cuh"

namespace dspark {

struct SchedulePolicy {
  static constexpr int kNumThreads = 1024;
  static constexpr int kMaxReqs = 8192;
  static constexpr int kMaxDrafts = 16384;
  static constexpr int kIndexBits = 14;
  static constexpr uint32_t kOne = 1u << 17;
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

constexpr uint32_t kNoKey = 0xffffffffu;

template <int kStages>
struct ScheduleSort {
  static constexpr int kKeysPerThread = 1 << kStages;
  static constexpr int kNumKeys = SchedulePolicy::kNumThreads << kStages;
  static constexpr int kSharedWords = kNumKeys + kNumKeys / 16;
};

__device__ __forceinline__ int32_t padded(int32_t i) { return i + (i >> 4); }

/* kStages stages of the network with strides lowest << (kStages - 1), ..., lowest of the merge of
 * `run` keys, on the keys of this thread's groups. */
template <int kStages>
__device__ __forceinline__ void bitonic_pass(uint32_t* keys,
                                             int32_t num_keys,
                                             int32_t run,
                                             int32_t lowest) {
  constexpr int kGroup = 1 << kStages;
  for (int32_t g = threadIdx.x; g < num_keys / kGroup; g += SchedulePolicy::kNumThreads) {
    const int32_t first = g / lowest * (lowest * kGroup) + g % lowest;
    uint32_t held[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) held[i] = keys[padded(first + i * lowest)];
    const bool ascending = (first & run) == 0;
#pragma unroll
    for (int stride = kGroup / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if ((i & stride) != 0) continue;
        const uint32_t low = min(held[i], held[i + stride]);
        const uint32_t high = max(held[i], held[i + stride]);
        held[i] = ascending ? low : high;
        held[i + stride] = ascending ? high : low;
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) keys[padded(first + i * lowest)] = held[i];
  }
  __syncthreads();
}

template <int kStages>
__device__ __forceinline__ void bitonic_sort(uint32_t* keys, int32_t num_keys) {
  for (int32_t run = 2; run <= num_keys; run *= 2) {
    int32_t stride = run / 2;
    /* The odd stages first, one at a time; then whole groups. */
    int32_t stages = 31 - __clz(run);
    for (; stages % kStages != 0; --stages, stride /= 2) {
      bitonic_pass<1>(keys, num_keys, run, stride);
    }
    for (; stages > 0; stages -= kStages, stride >>= kStages) {
      bitonic_pass<kStages>(keys, num_keys, run, stride >> (kStages - 1));
    }
  }
}

/* Calibrated confidences, then keys; those of no draft are kNoKey. */
template <int kStages>
__device__ __forceinline__ void make_keys(const ScheduleArgs& args,
                                          int32_t num_live,
                                          uint32_t* keys) {
  const int32_t num_drafts = args.num_reqs * args.draft_len;
  for (int32_t i = threadIdx.x; i < ScheduleSort<kStages>::kNumKeys;
       i += SchedulePolicy::kNumThreads) {
    uint32_t word = kNoKey;
    if (i < num_drafts) {
      const float temperature =
          args.temperature == nullptr ? 1.f : args.temperature[i % args.draft_len];
      word = __float_as_uint(calibrate(args.confidence[i], temperature));
    }
    keys[padded(i)] = word;
  }
  __syncthreads();
  for (int32_t r = threadIdx.x; r < args.num_reqs; r += SchedulePolicy::kNumThreads) {
    const int32_t limit = r >= num_live            ? 0
                          : args.limits == nullptr ? args.draft_len
                                                   : min(args.limits[r], args.draft_len);
    float survival = 1.f;
    for (int32_t k = 0; k < args.draft_len; ++k) {
      const int32_t index = r * args.draft_len + k;
      survival = __fmul_rn(survival, __uint_as_float(keys[padded(index)]));
      const uint32_t units =
          __float2uint_rn(__fmul_rn(survival, static_cast<float>(SchedulePolicy::kOne)));
      const bool ranked = k < limit && units > 0;
      keys[padded(index)] =
          ranked ? (SchedulePolicy::kOne - units) << SchedulePolicy::kIndexBits | index : kNoKey;
    }
    args.verify_lens[r] = 0;
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

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += left;
  }
  return value;
}

template <int kStages>
__global__ void __launch_bounds__(SchedulePolicy::kNumThreads) schedule_kernel(ScheduleArgs args) {
  constexpr int kKeys = ScheduleSort<kStages>::kKeysPerThread;
  constexpr int kNumWarps = SchedulePolicy::kNumThreads / kWarpSize;
  extern __shared__ uint32_t keys[];
  __shared__ uint32_t warp_sums[kNumWarps];
  __shared__ Candidate warp_bests[kNumWarps];
  __shared__ int32_t num_ranked, first_fall, filled;
  const int thread = threadIdx.x;
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int32_t num_live =
      args.num_live == nullptr ? args.num_reqs : min(max(*args.num_live, 0), args.num_reqs);
  if (thread == 0) num_ranked = 0;
  make_keys<kStages>(args, num_live, keys);
  /* The smallest network that holds all drafts. */
  int32_t num_keys = 2;
  while (num_keys < args.num_reqs * args.draft_len) num_keys *= 2;
  num_keys = max(num_keys, kKeys);
  bitonic_sort<kStages>(keys, num_keys);

  /* Survivals of this thread's ranks, and their sum. */
  const int32_t first = thread * kKeys;
  uint32_t gains[kKeys];
  uint32_t sum = 0;
  int32_t ranked = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const uint32_t key = first + i < num_keys ? keys[padded(first + i)] : kNoKey;
    gains[i] = key == kNoKey ? 0 : SchedulePolicy::kOne - (key >> SchedulePolicy::kIndexBits);
    sum += gains[i];
    ranked += key != kNoKey;
  }
  if (ranked > 0) atomicMax(&num_ranked, first + ranked);
  const uint32_t inclusive = warp_inclusive_sum(sum, lane);
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  const int32_t len = num_ranked;
  if (thread == 0) {
    first_fall = len;
    filled = len;
  }
  if (warp == 0) {
    const uint32_t total = warp_sums[lane];
    warp_sums[lane] = warp_inclusive_sum(total, lane) - total;
  }
  __syncthreads();

  const uint32_t base = static_cast<uint32_t>(num_live) * SchedulePolicy::kOne;
  const uint32_t share = SchedulePolicy::kGuard * static_cast<uint32_t>(max(num_live, 1));
  uint32_t tau = base + warp_sums[warp] + inclusive - sum;
  Candidate mine{base, args.ticks[0], 0};
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int32_t rank = first + i;
    if (rank >= len) break;
    const uint32_t before = args.ticks[rank];
    const uint32_t after = args.ticks[rank + 1];
    const uint32_t next = tau + gains[i];
    const uint64_t guarded = static_cast<uint64_t>(tau) + tau / share;
    if (static_cast<uint64_t>(next) * before <= guarded * after) atomicMin(&first_fall, rank);
    mine = better(mine, Candidate{next, after, rank + 1});
    tau = next;
  }
  mine = warp_best(mine);
  if (lane == 0) warp_bests[warp] = mine;
  __syncthreads();
  /* Every warp reduces all bests, so that every thread knows the outcome without a barrier more. */
  const Candidate top = warp_best(warp_bests[lane]);
  const uint64_t guarded = static_cast<uint64_t>(base) + base / SchedulePolicy::kGuard;
  const bool pays = static_cast<uint64_t>(top.tau) * args.ticks[0] > guarded * top.ticks;
  const int32_t best = pays ? top.num_drafts : 0;

  int32_t admitted = best;
  if (args.rule == DSPARK_SCHEDULE_FIRST_FALL) {
    admitted = first_fall;
  } else if (args.rule == DSPARK_SCHEDULE_CAPACITY) {
    const int64_t held = max(args.capacity[0], 0);
    const int64_t reqs = max(args.capacity[1], 1);
    const int64_t scaled = (held * num_live + reqs / 2) / reqs;
    admitted = held == 0 ? 0 : static_cast<int32_t>(min(scaled, static_cast<int64_t>(len)));
  }
  if (args.rule != DSPARK_SCHEDULE_BEST) {
    /* The first count that costs more ends the bucket. Ticks do not fall. */
    const bool fills =
        admitted > 0 || (args.rule == DSPARK_SCHEDULE_CAPACITY && len > 0 && args.capacity[0] > 0);
    const uint32_t price = args.ticks[admitted];
    for (int32_t n = admitted + 1 + thread; n <= len; n += SchedulePolicy::kNumThreads) {
      if (args.ticks[n] != price) {
        atomicMin(&filled, n - 1);
        break;
      }
    }
    __syncthreads();
    admitted = fills ? filled : 0;
  }
  for (int32_t rank = thread; rank < admitted; rank += SchedulePolicy::kNumThreads) {
    const int32_t index = keys[padded(rank)] & ((1 << SchedulePolicy::kIndexBits) - 1);
    atomicAdd(&args.verify_lens[index / args.draft_len], 1);
  }
  __syncthreads(); /* best may be capacity: all have read it */
  if (thread == 0 && args.best != nullptr) {
    args.best[0] = best;
    args.best[1] = num_live;
  }
}

}  // namespace dspark
