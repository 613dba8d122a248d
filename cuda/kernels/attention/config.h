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
#include "kernels/attention/stream_policy.h"

namespace dspark {

/* The sizes of a pass that decide; as in dspark_attention_params, checked. */
struct AttentionDesc {
  int num_reqs;
  int max_rows_per_req;
  int max_seq_len;
  int group_size;
  int num_kv_heads;
  int head_dim;
  int page_size;
  int key_bytes; /* of an element of the cache */
  bool is_draft;
  bool batch_invariant;
};

struct AttentionDevice {
  int num_sms;
  int shared_bytes_per_sm;
  bool has_bulk_copies; /* and clusters: sm_90 */
};

struct AttentionConfig {
  bool streams; /* stream_attention.cuh, else paged_attention.cuh */
  int warps_m;  /* of AttentionPolicy */
  int tile_m;   /* rows of an M tile */
  WorkPlan plan;
  int64_t num_items; /* the grid is num_items * num_kv_heads */
  int64_t num_slots; /* of partial results per KV head; 0: nothing to merge */

  int64_t num_partials(const AttentionDesc& desc) const {
    return num_slots * desc.num_kv_heads * tile_m;
  }
  /* O and (m, l) of every partial result. */
  size_t workspace_bytes(const AttentionDesc& desc) const {
    return static_cast<size_t>(num_partials(desc)) * (desc.head_dim + 2) * sizeof(float);
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

template <int kHeadDim, int kWarpsM>
int resident_ctas_of(int key_bytes, const AttentionDevice& device) {
  return key_bytes == 1 ? resident_ctas_of<AttentionPolicy<kHeadDim, kWarpsM, 1>>(device)
                        : resident_ctas_of<AttentionPolicy<kHeadDim, kWarpsM, 2>>(device);
}

template <int kHeadDim>
int resident_ctas_of(int warps_m, int key_bytes, const AttentionDevice& device) {
  return warps_m == 2 ? resident_ctas_of<kHeadDim, 2>(key_bytes, device)
                      : resident_ctas_of<kHeadDim, 4>(key_bytes, device);
}

/* CTAs of the paged kernel that the device holds at once. */
inline int resident_ctas(const AttentionDesc& desc, int warps_m, const AttentionDevice& device) {
  switch (desc.head_dim) {
    case 64:
      return resident_ctas_of<64>(warps_m, desc.key_bytes, device);
    case 128:
      return resident_ctas_of<128>(warps_m, desc.key_bytes, device);
    default:
      return resident_ctas_of<256>(warps_m, desc.key_bytes, device);
  }
}

/* Warps along M, 16 rows each; the other warps of the CTA share the keys, so that the number decides
 * the order of sums: batch-invariant passes must not take it from their longest request. */
inline int warps_m_of(const AttentionDesc& desc) {
  if (desc.batch_invariant) return 2;
  return desc.max_rows_per_req * desc.group_size <= 32 ? 2 : 4;
}

/* CTAs of a cluster that the device surely runs at once, one on each SM: clusters do not straddle the
 * parts that an SM count is made of, and parts differ. */
inline int cluster_room(const AttentionDevice& device, int cluster_ctas) {
  switch (cluster_ctas) {
    case 8:
      return device.num_sms * 7 / 8;
    case 4:
      return device.num_sms * 9 / 10;
    default:
      return device.num_sms;
  }
}

/* The longest request whose clusters may leave SMs idle. A cluster saves the merge (2 to 4 us); what its
 * fewer CTAs cost grows with the length: less than that up to here, of times on an H100 at 4096 and
 * 32768 keys, with a line through each pair. */
inline int max_cluster_keys(const AttentionDesc& desc) {
  if (desc.key_bytes == 1) return 8192; /* limited by latency, so by the number of CTAs */
  return desc.head_dim == 64 ? 16384 : 32768;
}

/* CTAs of the cluster that a request gets for each KV head, where their number is small and each is one
 * M tile; they merge by themselves. All clusters run at once. Where that would leave too much of the
 * device idle, chunks are no clusters. */
inline int cluster_ctas_of(const AttentionDesc& desc, const AttentionDevice& device, int tile_m) {
  const int64_t max_m = int64_t{desc.max_rows_per_req} * desc.group_size;
  if (max_m > tile_m || tile_m > kMaxClusterTileM || desc.batch_invariant) return 1;
  if (desc.num_reqs > kMaxClusterReqs) return 1;
  const int64_t clusters = int64_t{desc.num_reqs} * desc.num_kv_heads;
  int ctas = kMaxClusterCtas;
  while (ctas > 1 && ctas * clusters > cluster_room(device, ctas)) ctas /= 2;
  const bool is_long = desc.max_seq_len > max_cluster_keys(desc);
  return ctas * clusters < device.num_sms * (is_long ? 7 : 3) / 8 ? 1 : ctas;
}

/* The streaming kernel: one CTA for each SM. Where results must not depend on the batch, nothing that
 * decides the order of sums may depend on its bounds: neither the kernel nor the M tile. */
inline bool configure_stream(const AttentionDesc& desc,
                             const AttentionDevice& device,
                             AttentionConfig* config) {
  const int64_t max_m = int64_t{desc.max_rows_per_req} * desc.group_size;
  if (!device.has_bulk_copies || desc.page_size % kBoxKeys != 0) return false;
  const int largest = desc.head_dim == 256 ? 32 : 64;
  if (!desc.batch_invariant && max_m > int64_t{largest} * kMaxBalancedMTiles) return false;
  config->streams = true;
  config->tile_m = max_m <= 16 ? 16 : (max_m <= 32 ? 32 : largest);
  if (desc.batch_invariant) config->tile_m = 32;
  WorkPlan& plan = config->plan;
  plan.num_chunks = std::max(device.num_sms / desc.num_kv_heads, 1);
  plan.cluster_ctas = cluster_ctas_of(desc, device, config->tile_m);
  if (plan.cluster_ctas > 1) plan.num_chunks = plan.cluster_ctas * desc.num_reqs;
  plan.by_num_chunks = Divider::by(plan.num_chunks);
  plan.min_tiles_per_chunk = kMinTilesPerStreamChunk;
  plan.has_parts = desc.batch_invariant;
  config->num_items = plan.num_chunks;
  const bool is_cluster = plan.cluster_ctas > 1 && desc.num_reqs == 1; /* however long */
  config->num_slots = is_cluster ? 0 : config->num_items * plan.slots_per_chunk();
  return true;
}

inline AttentionConfig configure_attention(const AttentionDesc& desc,
                                           const AttentionDevice& device) {
  AttentionConfig config = {};
  if (configure_stream(desc, device, &config)) return config;
  config.warps_m = warps_m_of(desc);
  config.tile_m = 16 * config.warps_m;
  config.plan.min_tiles_per_chunk = kMinTilesPerChunk;
  const int64_t max_m = int64_t{desc.max_rows_per_req} * desc.group_size;
  const int64_t m_tiles = (max_m + config.tile_m - 1) / config.tile_m;
  /* The draft form rounds cache and block up to tiles each: one tile more at most. */
  const int64_t max_tiles = num_key_tiles(desc.max_seq_len) + (desc.is_draft ? 1 : 0);

  if (!desc.batch_invariant && m_tiles <= kMaxBalancedMTiles && max_tiles > 1) {
    const int64_t resident = resident_ctas(desc, config.warps_m, device);
    const int64_t line = desc.num_reqs * m_tiles * max_tiles;
    const int64_t chunks = std::max<int64_t>(resident / desc.num_kv_heads, 1);
    config.plan.num_chunks = static_cast<int32_t>(std::min(chunks, line));
    config.plan.by_num_chunks = Divider::by(config.plan.num_chunks);
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
