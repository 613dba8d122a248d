/*
 * The one read of the logits: per row and zone of kZone tokens, what every later step needs.
 *
 *   max, argmax (lowest index), sum of exp((l - max) / T), whether a logit is NaN or +inf
 *
 * A law is merged from these in a few microseconds of one warp: max of the row, Z = sum of
 * zone.sum * exp((zone.max - max) / T). And they are an index into the row: a race, a search for a
 * threshold or for the likeliest tokens reads the zones whose max says that they matter.
 *
 * A warp takes a zone, so that there is no barrier and no shared memory: 4 accesses of 16 bytes per
 * lane in flight (2 KiB of 16-bit logits per warp), then max, one scan for the argmax, sum. Zones are
 * cut by the vocabulary alone, so a law is the same bits in every batch.
 *
 * Bytes: 2 or 4 * vocab_size per row. About 9 instructions per logit (unpack, max, compare, fma, ex2,
 * add): two thirds of what would keep up with the memory of an H100; greedy rows skip the last four.
 */
#pragma once

#include "kernels/verify/inputs.cuh"

namespace dspark {

struct ZonesPolicy {
  static constexpr int kWarpsPerCta = 8;
  static constexpr int kNumThreads = kWarpsPerCta * kWarpSize;
};

struct alignas(16) ZoneStats {
  float max;
  float sum; /* of exp((l - max) / T); 0 for greedy rows and when max is -inf */
  int32_t argmax;
  int32_t bad; /* holds NaN or +inf */
};

/* The dense draft row at `index` of all draft rows is needed: its temperature's scale, else 0. */
__device__ __forceinline__ float draft_row_scale(const VerifyInputs& in, int64_t index) {
  if (in.draft_log_normalizers != nullptr) return 0.f;
  const int32_t req = static_cast<int32_t>(index / in.draft_len);
  const int32_t k = static_cast<int32_t>(index % in.draft_len);
  const float temperature = in.temperature[req];
  return k < verify_len(in, req) && temperature > 0.f ? weight_scale(temperature) : 0.f;
}

/* Stats of the warp's zone from this lane's values. */
__device__ __forceinline__ ZoneStats reduce_zone(const float (&values)[kGroupsPerLane][kGroup],
                                                 int32_t zone,
                                                 float scale) {
  float lane_max = -INFINITY;
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kGroupsPerLane; ++i) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      lane_max = fmaxf(lane_max, values[i][j]);
      bad |= !(values[i][j] < INFINITY);
    }
  }
  const float max = warp_reduce(lane_max, MaxOp{});
  bad = __ballot_sync(kAllLanes, bad) != 0;
  int32_t argmax = INT32_MAX;
  if (lane_max == max) {
#pragma unroll
    for (int i = kGroupsPerLane - 1; i >= 0; --i) {
#pragma unroll
      for (int j = kGroup - 1; j >= 0; --j) {
        if (values[i][j] == max) argmax = group_token(zone, i) + j;
      }
    }
  }
  argmax = warp_reduce(argmax, [](int32_t a, int32_t b) { return min(a, b); });
  float sum = 0.f;
  if (scale > 0.f && max > -INFINITY) { /* the same for the whole warp */
#pragma unroll
    for (int i = 0; i < kGroupsPerLane; ++i) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum += logit_weight(values[i][j], max, scale);
    }
    sum = warp_reduce(sum, SumOp{});
  }
  return {max, sum, argmax, bad ? 1 : 0};
}

/* Grid: a warp per zone of all rows (target, then draft), flat. Also clears `tickets` [num_reqs] for
 * the kernels behind it. kShaped: there may be penalties, biases or a mask. */
template <bool kShaped>
__global__ void __launch_bounds__(ZonesPolicy::kNumThreads, 2)
    zones_kernel(VerifyInputs in, int64_t num_warps, ZoneStats* stats, uint32_t* tickets) {
  if (blockIdx.x == 0) {
    for (int32_t r = threadIdx.x; r < in.num_reqs; r += ZonesPolicy::kNumThreads) tickets[r] = 0;
  }
  const int64_t warp =
      static_cast<int64_t>(blockIdx.x) * ZonesPolicy::kWarpsPerCta + threadIdx.x / kWarpSize;
  if (warp >= num_warps) return; /* whole warps */
  const int64_t row_index = warp / in.num_zones;
  const int32_t zone = static_cast<int32_t>(warp % in.num_zones);
  float values[kGroupsPerLane][kGroup];
  float scale;
  if (row_index < in.num_rows) {
    const int32_t index = static_cast<int32_t>(row_index);
    if (index < in.qo_indptr[0] || index >= in.qo_indptr[in.num_reqs]) return; /* padding */
    /* In flight before the request is known. */
#pragma unroll
    for (int i = 0; i < kGroupsPerLane; ++i) {
      load_group(in.target, row_index, group_token(zone, i), in.vocab_size, values[i]);
    }
    const int32_t req = find_request(in, index);
    const TargetRow row = {row_index, req, index - in.qo_indptr[req]};
    scale = target_scale(in, req);
    if constexpr (kShaped) {
#pragma unroll
      for (int i = 0; i < kGroupsPerLane; ++i) {
        shape_group(in, row, zone, group_token(zone, i), values[i]);
      }
    }
  } else {
    const int64_t draft_row = row_index - in.num_rows;
    scale = draft_row_scale(in, draft_row);
    if (scale == 0.f) return; /* whole warp */
#pragma unroll
    for (int i = 0; i < kGroupsPerLane; ++i) {
      load_group(in.draft, draft_row, group_token(zone, i), in.vocab_size, values[i]);
    }
  }
  const ZoneStats own = reduce_zone(values, zone, scale);
  if (threadIdx.x % kWarpSize == 0) stats[warp] = own;
}

/* The law of a row: p(v) = kept(v) ? w(v) * inv_sum : 0, kept(v) = l >= threshold and w >=
 * min_weight, w(v) = exp2((l - max) * scale). */
struct RowLaw {
  float max;
  float scale;
  float inv_sum;    /* 0 for greedy rows */
  float threshold;  /* a logit; -inf: top-k and top-p keep all */
  float min_weight; /* 0: min-p keeps all */
  int32_t argmax;
  int32_t bad; /* NaN, +inf or nothing but -inf: no law */
};

__device__ __forceinline__ float probability(const RowLaw& law, float logit) {
  const float weight = logit_weight(logit, law.max, law.scale);
  return logit >= law.threshold && weight >= law.min_weight ? weight * law.inv_sum : 0.f;
}

/* A warp merges the zones of a row into a law without filters, in a fixed order. */
__device__ __forceinline__ RowLaw merge_zones(const ZoneStats* zones,
                                              int32_t num_zones,
                                              float scale) {
  const int lane = threadIdx.x % kWarpSize;
  Indexed best = {-INFINITY, INT32_MAX};
  int bad = 0;
  for (int32_t zone = lane; zone < num_zones; zone += kWarpSize) {
    best = ArgmaxOp{}(best, Indexed{zones[zone].max, zones[zone].argmax});
    bad |= zones[zone].bad;
  }
  best = warp_reduce(best, ArgmaxOp{});
  bad = __ballot_sync(kAllLanes, bad != 0) != 0;
  float sum = 0.f;
  if (scale > 0.f) {
    for (int32_t zone = lane; zone < num_zones; zone += kWarpSize) {
      if (zones[zone].max > -INFINITY) {
        sum += zones[zone].sum * logit_weight(zones[zone].max, best.value, scale);
      }
    }
    sum = warp_reduce(sum, SumOp{});
  }
  const bool is_bad = bad != 0 || !(best.value > -INFINITY);
  return {best.value, scale, scale > 0.f ? 1.f / sum : 0.f, -INFINITY, 0.f, best.index, is_bad};
}

}  // namespace dspark
