/*
 * Tree commit: the keys and values of the accepted rows of a token tree move together, so that they
 * follow the committed ones as if the accepted path had been a chain.
 *
 * Maths     slot seq_lens[r] + i  =  slot seq_lens[r] + row_i, for the accepted rows row_0 = 0 < row_1 <
 *           row_2 .. of request r (row 0 is the anchor's, 1 + j draft j's). In place: row_i >= i, so
 *           that a slot is written only after all reads of it, in the order of i.
 * Mapping   A CTA per request, layer and kThreads pieces of 16 bytes of the heads of a slot; a thread
 *           moves its piece of every accepted row, one row after the other, of K and of V.
 * Traffic   2 * 2 * accepted rows that move * num_kv_heads * head_dim * bytes per layer.
 * Limit     launch latency and one chain of page lookups: 36 layers of Qwen3-8B move 2 MB for four
 *           accepted drafts of 8 requests.
 */
#pragma once

#include "common/paged_kv.cuh"

namespace dspark {

struct CommitTreePolicy {
  static constexpr int kThreads = 128;
};

/* Typed view of dspark_commit_tree_params; strides in bytes. */
struct CommitTreeArgs {
  int32_t draft_len;
  int32_t pieces_per_head; /* of 16 bytes */
  int32_t pieces_per_slot;
  const int32_t* accept_flags;
  const int32_t* seq_lens;
  PagedLayout cache;
  unsigned char* k_cache;
  unsigned char* v_cache;
  int64_t stride_layer;
};

/* Grid (num_reqs, num_layers, ceil(pieces_per_slot / kThreads)). */
__global__ void __launch_bounds__(CommitTreePolicy::kThreads)
    commit_tree_kernel(const CommitTreeArgs args) {
  const int req = blockIdx.x;
  const int piece = blockIdx.z * CommitTreePolicy::kThreads + threadIdx.x;
  if (piece >= args.pieces_per_slot) return;
  const int head = piece / args.pieces_per_head;
  const int64_t place =
      blockIdx.y * args.stride_layer + int64_t{piece - head * args.pieces_per_head} * 16;
  const int32_t* flags = args.accept_flags + int64_t{req} * args.draft_len;
  const int seq_len = args.seq_lens[req];
  int target = 1; /* the anchor's row stays */
  for (int draft = 0; draft < args.draft_len; ++draft) {
    if (flags[draft] == 0) continue;
    if (target != 1 + draft) {
      const int64_t from = slot_offset(args.cache, req, seq_len + 1 + draft, head);
      const int64_t to = slot_offset(args.cache, req, seq_len + target, head);
      if (from != kUnmappedSlot && to != kUnmappedSlot) {
        const uint4 k = *reinterpret_cast<const uint4*>(args.k_cache + place + from);
        const uint4 v = *reinterpret_cast<const uint4*>(args.v_cache + place + from);
        *reinterpret_cast<uint4*>(args.k_cache + place + to) = k;
        *reinterpret_cast<uint4*>(args.v_cache + place + to) = v;
      }
    }
    ++target;
  }
}

}  // namespace dspark
