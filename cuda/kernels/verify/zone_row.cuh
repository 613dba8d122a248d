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
    const auto index = static_cast<int32_t>(row_index);
    const int32_t req = find_request_by_warp(in, index);
    open.skipped = req < 0; /* padding */
    if (open.skipped) return open;
    open.row.req = req;
    open.row.local = index - in.qo_indptr[req];
    open.scale = target_scale(in, req);
    if constexpr (kKind != ZonesKind::kTarget) {
      open.races = races_in_zones(in, req);
      if (open.races) {
        open.race_scale = fminf(kLog2E / in.temperature[req], ZonesPolicy::kMaxRaceScale);
        if (!in.wants_logprobs) open.scale = 0.f;
        open.key.seed = in.seeds[req];
        open.key.position = in.anchor_positions[req] + 1 + row_depth(in, req, open.row.local);
        open.key.purpose = DSPARK_PURPOSE_BONUS;
      }
    }
  }
  return open;
}

}  // namespace dspark
