/*
 * Which kernel an attention pass gets and how its work is cut: a pure function of the sizes in the
 * params and of the device. Plain C++, tested without a GPU (tests/attention_config.cpp).
 */
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/attention/plan.h"
#include "kernels/attention/policy.h"

namespace dspark {

/* The sizes of a pass that decide; as in dspark_attention_params, checked. */
struct AttentionDesc {
  int num_reqs;
  int max_rows_per_req;
  int max_seq_len;
  int group_size;
  int num_kv_heads;
  int head_dim;
  bool is_draft;
  bool batch_invariant;
};

struct AttentionDevice {
  int num_sms;
  int shared_bytes_per_sm;
};

struct AttentionConfig {
  int warps_m; /* of AttentionPolicy */
  WorkPlan plan;
  int64_t num_items; /* the grid is num_items * num_kv_heads */
  int64_t num_slots; /* of partial results per KV head; 0: nothing to merge */

  int tile_m() const { return 16 * warps_m; }
  int64_t num_partials(const AttentionDesc& desc) const {
    return num_slots * desc.num_kv_heads * tile_m();
  }
  /* O and (m, l) of every partial result, then a merge record per item. */
  size_t workspace_bytes(const AttentionDesc& desc) const {
    if (num_slots == 0) return 0;
    constexpr size_t kMergeRecordBytes = 16;
    return static_cast<size_t>(num_partials(desc)) * (desc.head_dim + 2) * sizeof(float) +
           static_cast<size_t>(num_items) * kMergeRecordBytes;
  }
};

/* Up to here M tiles share a line of tiles; a pass with more fills the GPU by itself. */
constexpr int kMaxBalancedMTiles = 8;
/* Notes on the stages, and what the driver takes of a CTA's shared memory. */
constexpr int kReservedSharedBytes = 2048;

template <typename Policy>
int resident_ctas_of(const AttentionDevice& device) {
  const int by_shared =
      device.shared_bytes_per_sm / (static_cast<int>(Policy::kSharedBytes) + kReservedSharedBytes);
  return device.num_sms * std::max(std::min(Policy::kMinCtasPerSm, by_shared), 1);
}

/* CTAs of the attention kernel that the device holds at once. */
inline int resident_ctas(int head_dim, int warps_m, const AttentionDevice& device) {
  if (head_dim == 64) {
    return warps_m == 1   ? resident_ctas_of<AttentionPolicy<64, 1>>(device)
           : warps_m == 2 ? resident_ctas_of<AttentionPolicy<64, 2>>(device)
                          : resident_ctas_of<AttentionPolicy<64, 4>>(device);
  }
  return warps_m == 1   ? resident_ctas_of<AttentionPolicy<128, 1>>(device)
         : warps_m == 2 ? resident_ctas_of<AttentionPolicy<128, 2>>(device)
                        : resident_ctas_of<AttentionPolicy<128, 4>>(device);
}

/* Warps along M, 16 rows each; the other warps of the CTA share the keys, so that the number decides
 * the order of sums: batch-invariant passes must not take it from their longest request. */
inline int warps_m_of(const AttentionDesc& desc) {
  if (desc.batch_invariant) return 2;
  const int m = desc.max_rows_per_req * desc.group_size;
  return m <= 16 ? 1 : (m <= 32 ? 2 : 4);
}

inline AttentionConfig configure_attention(const AttentionDesc& desc,
                                           const AttentionDevice& device) {
  AttentionConfig config = {};
  config.warps_m = warps_m_of(desc);
  const int64_t max_m = int64_t{desc.max_rows_per_req} * desc.group_size;
  const int64_t m_tiles = (max_m + config.tile_m() - 1) / config.tile_m();
  /* The draft form rounds cache and block up to tiles each: one tile more at most. */
  const int64_t max_tiles = num_key_tiles(desc.max_seq_len) + (desc.is_draft ? 1 : 0);

  if (!desc.batch_invariant && m_tiles <= kMaxBalancedMTiles && max_tiles > 1) {
    const int64_t resident = resident_ctas(desc.head_dim, config.warps_m, device);
    const int64_t line = desc.num_reqs * m_tiles * max_tiles;
    const int64_t chunks = std::max<int64_t>(resident / desc.num_kv_heads, 1);
    config.plan.num_chunks = static_cast<int32_t>(std::min(chunks, line));
    config.num_items = config.plan.num_chunks;
    config.num_slots = 2 * config.num_items;
    return config;
  }
  /* Bounds what splits_of takes from a request's own sizes, and never cuts it short. */
  const int64_t most_splits = max_tiles / kMinTilesPerSplit;
  const bool may_split = desc.batch_invariant && most_splits > 1;
  config.plan.max_splits = may_split ? kMaxSplits : 1;
  const int64_t for_splits = may_split ? std::min<int64_t>(kMaxSplits, m_tiles * most_splits) : 1;
  config.plan.ctas_per_req = static_cast<int32_t>(std::max(m_tiles, for_splits));
  config.num_items = int64_t{desc.num_reqs} * config.plan.ctas_per_req;
  config.num_slots = may_split ? config.num_items : 0;
  return config;
}

}  // namespace dspark
