/*
 * What the parts of the streaming attention kernel share: arguments and the plan of its shared
 * memory. See stream_attention.cuh.
 */
#pragma once

#include "common/bulk_copy.cuh"
#include "kernels/attention/stream_policy.h"
#include "kernels/attention/work_cursor.cuh"

namespace dspark {

/* The keys as the tensor memory accelerator finds them: (64 elements, KV head, slot or row, group of
 * 64 elements, page). */
struct KeyMaps {
  CUtensorMap k_cache;
  CUtensorMap v_cache;
  CUtensorMap k_block; /* draft form only */
  CUtensorMap v_block;
};

template <typename T>
struct StreamArgs {
  KeyMaps maps;
  AttentionArgs<T> attention;
};

/* A CTA's shared memory. */
template <typename Policy>
struct StreamShared {
  alignas(1024) unsigned char stages[Policy::kStages][Policy::kStageBytes];
  float exchanged_out[Policy::kExchangeRows * Policy::kOutStride];
  float2 exchanged_max_sum[Policy::kExchangeRows];
  /* Of the parts so far, where results must not depend on the batch; in a cluster, what its CTAs sent
   * of this one's rows. */
  float4 sum_out[Policy::kSumRows * Policy::kHeadDim / 4];
  float2 sum_max_sum[Policy::kWarpsD * Policy::kSumRows];
  TileNote tiles[Policy::kStages];
  SegmentNote segments[Policy::kSegments];
  CursorState cursors[Policy::kBoxes];
  FinderScratch finder;
  uint64_t full[Policy::kStages];
  uint64_t empty[Policy::kStages];
  int32_t kv_head;   /* of the CTA */
  int32_t rank;      /* in its cluster, where clusters are formed */
  int32_t senders;   /* CTAs of the cluster that have keys; 0: no clusters */
  int32_t has_keys;  /* whether the CTA has */
  uint64_t started;  /* the rows of the first segment are noted, and all of the above */
  uint64_t gathered; /* all that its CTAs send is there */
};

}  // namespace dspark
