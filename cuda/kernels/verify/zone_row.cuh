/*
 * The rows that the read of all logits goes through, and what it leaves of their zones.
 */
#pragma once

#include "kernels/verify/logit_words.cuh"

namespace dspark {

struct ZonesPolicy {
  static constexpr int kWarpsPerCta = 8;
  static constexpr int kNumThreads = kWarpsPerCta * kWarpSize;
  static constexpr int kCtasPerSm = 4;       /* plain 16-bit rows: 64 registers */
  static constexpr int kCtasPerSmWide = 2;   /* f32 or shaped rows */
  static constexpr int kCtasPerSmWidest = 1; /* f32 rows that are shaped or race */
  static constexpr int kCtasPerSmRaces = 2;
  static constexpr int kBestSlots = 16;   /* rows that a CTA works on at once, at least */
  static constexpr float kMargin = 1e-4f; /* on bounds of scores, for rounding */
  static constexpr float kMaxRaceScale = 0x1p96f;
};

/* One number for each strip of a zone. */
struct alignas(16) Strips {
  float of[kStripsPerZone];
};

/* NaN if one is. */
__device__ __forceinline__ float zone_max(const Strips& maxima) {
  return max_nan(max_nan(maxima.of[0], maxima.of[1]), max_nan(maxima.of[2], maxima.of[3]));
}

__device__ __forceinline__ float zone_sum(const Strips& sums) {
  return (sums.of[0] + sums.of[1]) + (sums.of[2] + sums.of[3]);
}

/* A zone's candidate for the coupled token of its row; kNoRunner: it has none. */
struct alignas(8) ZoneRace {
  float score;
  int32_t token;
};

enum class ZonesKind { kTarget, kRaces, kShaped, kDraft };

/* Coupled rows race here unless filters are still to come. */
__device__ __forceinline__ bool races_in_zones(const VerifyInputs& in, int32_t req) {
  return in.rules != nullptr && in.rules[req] == DSPARK_RULE_COUPLED && !in.has_filters &&
         in.temperature[req] > 0.f;
}

/* What a warp knows about the row of its zone. */
struct ZoneRow {
  TargetRow row;
  bool skipped;
  bool races;
  float scale; /* 0: no law is needed */
  float race_scale;
  DrawKey key;
};

/* What a row's request asks, in every lane; req -1: padding. */
struct RowOwner {
  int32_t req;
  int32_t local; /* the row within it */
  float temperature;
  bool races;
  DrawKey key; /* of rows that race; its position is the anchor's */
};

/* The owner of a row, by a warp. Of few requests each lane reads one's numbers before it is known whose
 * they are, so that no read waits for another. */
template <ZonesKind kKind>
__device__ __forceinline__ RowOwner owner_of(const VerifyInputs& in, int32_t row) {
  constexpr bool kAsksRule = kKind != ZonesKind::kTarget;
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarpSize);
  const bool few = in.num_reqs < kWarpSize;
  RowOwner owner = {};
  int32_t from = lane; /* lane of the owner's numbers */
  if (!few) {
    owner.req = find_request_by_warp(in, row);
    from = 0;
  }
  const int32_t asked = few ? lane : max(owner.req, 0);
  const bool exists = asked < in.num_reqs;
  const int32_t start = asked <= in.num_reqs ? in.qo_indptr[asked] : INT32_MAX;
  const float temperature = exists ? in.temperature[asked] : 0.f;
  bool races = false;
  uint64_t seed = 0;
  int32_t anchor = 0;
  if constexpr (kAsksRule) {
    if (in.rules != nullptr && exists) {
      races = races_in_zones(in, asked);
      seed = in.seeds[asked];
      anchor = in.anchor_positions[asked];
    }
  }
  if (few) {
    const int32_t num_starts = __popc(__ballot_sync(kAllLanes, start <= row));
    owner.req = num_starts > in.num_reqs ? -1 : num_starts - 1;
    from = max(owner.req, 0);
  }
  owner.local = row - __shfl_sync(kAllLanes, start, from);
  owner.temperature = __shfl_sync(kAllLanes, temperature, from);
  if constexpr (kAsksRule) {
    owner.races = __shfl_sync(kAllLanes, races ? 1 : 0, from) != 0;
    owner.key.seed = __shfl_sync(kAllLanes, seed, from);
    owner.key.position = __shfl_sync(kAllLanes, anchor, from);
    owner.key.purpose = DSPARK_PURPOSE_BONUS;
  }
  return owner;
}

template <ZonesKind kKind>
__device__ __forceinline__ ZoneRow open_row(const VerifyInputs& in, int64_t row_index) {
  ZoneRow open = {};
  open.row.index = row_index;
  if constexpr (kKind == ZonesKind::kDraft) {
    const auto req = static_cast<int32_t>(row_index / in.draft_len);
    const auto k = static_cast<int32_t>(row_index % in.draft_len);
    const float temperature = in.temperature[req];
    open.scale = temperature > 0.f ? weight_scale(temperature) : 0.f;
    const bool compares = in.rules == nullptr || in.rules[req] != DSPARK_RULE_COUPLED;
    open.skipped = k >= verify_len(in, req) || !(temperature > 0.f) || !compares;
  } else {
    const RowOwner owner = owner_of<kKind>(in, static_cast<int32_t>(row_index));
    open.skipped = owner.req < 0;
    if (open.skipped) return open;
    open.row.req = owner.req;
    open.row.local = owner.local;
    open.scale = scale_of_temperature(in, owner.temperature);
    if constexpr (kKind != ZonesKind::kTarget) {
      open.races = owner.races;
      if (open.races) {
        open.race_scale = fminf(kLog2E / owner.temperature, ZonesPolicy::kMaxRaceScale);
        if (!in.wants_logprobs) open.scale = 0.f;
        open.key = owner.key;
        open.key.position += 1 + row_depth(in, owner.req, owner.local);
      }
    }
  }
  return open;
}

}  // namespace dspark
