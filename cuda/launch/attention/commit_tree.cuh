/*
 * Checks and launches the tree commit. See kernels/attention/commit_tree.cuh.
 */
#pragma once

#include "common/host.cuh"
#include "kernels/attention/commit_tree.cuh"

namespace dspark {

inline dspark_status check_commit_tree(const dspark_commit_tree_params* p) {
  constexpr int kMaxDrafts = 63; /* a tree has 64 rows, the anchor's among them */
  constexpr int kMaxGridYz = 65535;
  DSPARK_CHECK_ARG(p->kv_dtype == DSPARK_DTYPE_BF16 || p->kv_dtype == DSPARK_DTYPE_F16 ||
                       p->kv_dtype == DSPARK_DTYPE_E4M3,
                   DSPARK_ERROR_UNSUPPORTED_DTYPE,
                   "kv_dtype: expected DSPARK_DTYPE_BF16 (1), _F16 (2) or _E4M3 (3), got %d",
                   p->kv_dtype);
  DSPARK_TRY(check_range("num_reqs", p->num_reqs, 0));
  DSPARK_TRY(check_range("num_layers", p->num_layers, 0, kMaxGridYz));
  DSPARK_TRY(check_range("draft_len", p->draft_len, 0, kMaxDrafts));
  DSPARK_TRY(check_range("num_kv_heads", p->num_kv_heads, 1, kMaxGridYz));
  DSPARK_CHECK_ARG(p->head_dim == 64 || p->head_dim == 128 || p->head_dim == 256,
                   DSPARK_ERROR_UNSUPPORTED_SHAPE, "head_dim: expected 64, 128 or 256, got %d",
                   p->head_dim);
  DSPARK_TRY(check_range("page_size", p->page_size, 1));
  return check_range("max_pages_per_req", p->max_pages_per_req, 0);
}

inline dspark_status commit_tree(const dspark_commit_tree_params* p, dspark_stream stream) {
  DSPARK_TRY(check_commit_tree(p));
  if (p->num_reqs == 0 || p->num_layers == 0 || p->draft_len == 0) return DSPARK_OK;
  const int bytes = p->kv_dtype == DSPARK_DTYPE_E4M3 ? 1 : 2;
  DSPARK_TRY(check_pointer("accept_flags", p->accept_flags, alignof(int32_t)));
  DSPARK_TRY(check_pointer("seq_lens", p->seq_lens, alignof(int32_t)));
  DSPARK_TRY(check_pointer("page_table", p->page_table, alignof(int32_t)));
  DSPARK_TRY(check_pointer("k_cache", p->k_cache, 16));
  DSPARK_TRY(check_pointer("v_cache", p->v_cache, 16));
  DSPARK_TRY(check_multiple("stride_cache_layer", p->stride_cache_layer, 16 / bytes));
  DSPARK_TRY(check_multiple("stride_cache_page", p->stride_cache_page, 16 / bytes));
  DSPARK_TRY(check_multiple("stride_cache_slot", p->stride_cache_slot, 16 / bytes));
  DSPARK_TRY(check_multiple("stride_cache_head", p->stride_cache_head, 16 / bytes));
  CommitTreeArgs args = {};
  args.draft_len = p->draft_len;
  args.pieces_per_head = p->head_dim * bytes / 16;
  args.pieces_per_slot = p->num_kv_heads * args.pieces_per_head;
  args.accept_flags = p->accept_flags;
  args.seq_lens = p->seq_lens;
  args.cache = {p->page_table,
                p->page_size,
                p->max_pages_per_req,
                p->stride_cache_page * bytes,
                p->stride_cache_slot * bytes,
                p->stride_cache_head * bytes};
  args.k_cache = static_cast<unsigned char*>(p->k_cache);
  args.v_cache = static_cast<unsigned char*>(p->v_cache);
  args.stride_layer = p->stride_cache_layer * bytes;
  const dim3 grid(p->num_reqs, p->num_layers,
                  ceil_div(args.pieces_per_slot, CommitTreePolicy::kThreads));
  return launch("commit_tree_kernel", commit_tree_kernel, grid, dim3(CommitTreePolicy::kThreads), 0,
                stream, args);
}

}  // namespace dspark
