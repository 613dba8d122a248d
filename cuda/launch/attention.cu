/*
 * Launchers of the attention family: dspark_verify_attention, dspark_draft_attention and their
 * workspace.
 */
#include "common/host.cuh"
#include "kernels/attention/merge_splits.cuh"
#include "kernels/attention/paged_attention.cuh"

namespace dspark {
namespace {

using AttentionParams = dspark_attention_params;

enum class AttentionForm { kVerify, kDraft };

/* 16 bytes of a 16-bit type. */
constexpr int64_t kVectorElements = 8;
constexpr int kMaxGroupSize = 16;
/* Keeps rows * group size, rounded up to tiles, within an int. */
constexpr int kMaxRowsPerReq = 1 << 24;
/* Of the grid's second and third dimension. */
constexpr int kMaxGridYz = 65535;
constexpr float kLog2E = 1.4426950408889634f;

/* Splits: enough CTAs for one long request to fill a GPU, few enough that partial results stay a
 * small part of the keys read. */
constexpr int kMaxSplits = 16;
constexpr int kMinTilesPerSplit = 4;

dspark_status check_sizes(const AttentionParams* p) {
  DSPARK_TRY(check_half_dtype(p->dtype));
  DSPARK_TRY(check_range("num_rows", p->num_rows, 0));
  DSPARK_TRY(check_range("num_reqs", p->num_reqs, 0, kMaxGridYz));
  DSPARK_TRY(check_range("max_rows_per_req", p->max_rows_per_req, 0, kMaxRowsPerReq));
  DSPARK_TRY(check_range("max_seq_len", p->max_seq_len, 0));
  DSPARK_TRY(check_range("num_q_heads", p->num_q_heads, 1, kMaxGridYz));
  DSPARK_TRY(check_range("num_kv_heads", p->num_kv_heads, 1, kMaxGridYz));
  DSPARK_TRY(check_range("page_size", p->page_size, 1));
  DSPARK_TRY(check_range("max_pages_per_req", p->max_pages_per_req, 0));
  DSPARK_CHECK_ARG(p->head_dim == 64 || p->head_dim == 128, DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "head_dim: expected 64 or 128, got %d", p->head_dim);
  DSPARK_CHECK_ARG(
      p->num_q_heads % p->num_kv_heads == 0 && p->num_q_heads / p->num_kv_heads <= kMaxGroupSize,
      DSPARK_ERROR_UNSUPPORTED_SHAPE,
      "num_q_heads: expected 1 to %d times num_kv_heads = %d, got %d", kMaxGroupSize,
      p->num_kv_heads, p->num_q_heads);
  return DSPARK_OK;
}

dspark_status check_pointers(const AttentionParams* p, AttentionForm form) {
  DSPARK_TRY(check_pointer("q", p->q, 16));
  DSPARK_TRY(check_pointer("k_cache", p->k_cache, 16));
  DSPARK_TRY(check_pointer("v_cache", p->v_cache, 16));
  DSPARK_TRY(check_pointer("qo_indptr", p->qo_indptr, alignof(int32_t)));
  DSPARK_TRY(check_pointer("seq_lens", p->seq_lens, alignof(int32_t)));
  DSPARK_TRY(check_pointer("page_table", p->page_table, alignof(int32_t)));
  DSPARK_TRY(check_pointer("out", p->out, 16));
  DSPARK_TRY(check_multiple("stride_q_row", p->stride_q_row, kVectorElements));
  DSPARK_TRY(check_multiple("stride_out_row", p->stride_out_row, kVectorElements));
  DSPARK_TRY(check_multiple("stride_cache_page", p->stride_cache_page, kVectorElements));
  DSPARK_TRY(check_multiple("stride_cache_slot", p->stride_cache_slot, kVectorElements));
  DSPARK_TRY(check_multiple("stride_cache_head", p->stride_cache_head, kVectorElements));
  if (form == AttentionForm::kVerify) {
    DSPARK_CHECK_ARG(p->k_block == nullptr && p->v_block == nullptr, DSPARK_ERROR_INVALID_ARGUMENT,
                     "k_block, v_block: expected NULL for dspark_verify_attention, got %p, %p",
                     p->k_block, p->v_block);
    return DSPARK_OK;
  }
  DSPARK_TRY(check_pointer("k_block", p->k_block, 16));
  DSPARK_TRY(check_pointer("v_block", p->v_block, 16));
  return check_multiple("stride_block_row", p->stride_block_row, kVectorElements);
}

bool has_no_work(const AttentionParams* p) {
  return p->num_rows == 0 || p->num_reqs == 0 || p->max_rows_per_req == 0;
}

int group_size(const AttentionParams* p) { return p->num_q_heads / p->num_kv_heads; }

/* Warps along M, 16 rows each; the other warps of the CTA share the keys. */
int warps_m(const AttentionParams* p) {
  const int m = p->max_rows_per_req * group_size(p);
  return m <= 16 ? 1 : (m <= 32 ? 2 : 4);
}

int num_m_tiles(const AttentionParams* p) {
  return ceil_div(p->max_rows_per_req * group_size(p), 16 * warps_m(p));
}

/* From the longest request and the model's shape alone, so that a request's split does not depend
 * on its neighbours. Many M tiles fill the GPU by themselves. */
SplitPlan plan_splits(const AttentionParams* p) {
  /* The draft form rounds cache and block up to tiles each: one tile more at most. */
  const int max_tiles = num_key_tiles(p->max_seq_len) + 1;
  const int max_splits = kMaxSplits / num_m_tiles(p);
  SplitPlan plan = {1, max_tiles};
  if (max_splits > 1 && max_tiles > 2 * kMinTilesPerSplit) {
    const int even = ceil_div(max_tiles, max_splits);
    plan.tiles_per_split = even > kMinTilesPerSplit ? even : kMinTilesPerSplit;
    plan.num_splits = ceil_div(max_tiles, plan.tiles_per_split);
  }
  return plan;
}

/* Entries of the partial results: (split, row, q head). */
size_t num_partials(const AttentionParams* p, const SplitPlan& plan) {
  return static_cast<size_t>(plan.num_splits) * p->num_rows * p->num_q_heads;
}

/* [entries, head_dim] f32, then [entries] float2. */
size_t workspace_bytes(const AttentionParams* p) {
  if (has_no_work(p)) return 0;
  const SplitPlan plan = plan_splits(p);
  if (plan.num_splits == 1) return 0;
  return num_partials(p, plan) * (p->head_dim * sizeof(float) + sizeof(float2));
}

template <typename T>
AttentionArgs<T> typed_args(const AttentionParams* p, AttentionForm form) {
  const bool is_draft = form == AttentionForm::kDraft;
  AttentionArgs<T> args = {};
  args.num_rows = p->num_rows;
  args.num_q_heads = p->num_q_heads;
  args.group_size = group_size(p);
  args.scale_log2 = p->scale * kLog2E;
  args.split = plan_splits(p);
  args.q = static_cast<const T*>(p->q);
  args.k_cache = static_cast<const T*>(p->k_cache);
  args.v_cache = static_cast<const T*>(p->v_cache);
  args.k_block = is_draft ? static_cast<const T*>(p->k_block) : nullptr;
  args.v_block = is_draft ? static_cast<const T*>(p->v_block) : nullptr;
  args.qo_indptr = p->qo_indptr;
  args.seq_lens = p->seq_lens;
  args.cache = {p->page_table,        p->page_size,         p->max_pages_per_req,
                p->stride_cache_page, p->stride_cache_slot, p->stride_cache_head};
  args.out = static_cast<T*>(p->out);
  if (args.split.num_splits > 1) {
    args.partials.out = static_cast<float*>(p->workspace);
    args.partials.max_sum = reinterpret_cast<float2*>(
        args.partials.out + num_partials(p, args.split) * static_cast<size_t>(p->head_dim));
  }
  args.stride_q_row = p->stride_q_row;
  args.stride_out_row = p->stride_out_row;
  args.stride_block_row = p->stride_block_row;
  return args;
}

template <typename T, int kHeadDim, int kWarpsM>
dspark_status launch_tiles(const AttentionParams* p,
                           const AttentionArgs<T>& args,
                           dspark_stream stream) {
  using Policy = AttentionPolicy<kHeadDim, kWarpsM>;
  const dim3 grid(num_m_tiles(p) * args.split.num_splits, p->num_kv_heads, p->num_reqs);
  return launch("paged_attention_kernel", paged_attention_kernel<T, Policy>, grid,
                dim3(Policy::kThreads), Policy::kSharedBytes, stream, args);
}

template <typename T, int kHeadDim>
dspark_status launch_head_dim(const AttentionParams* p, AttentionForm form, dspark_stream stream) {
  const AttentionArgs<T> args = typed_args<T>(p, form);
  switch (warps_m(p)) {
    case 1:
      DSPARK_TRY((launch_tiles<T, kHeadDim, 1>(p, args, stream)));
      break;
    case 2:
      DSPARK_TRY((launch_tiles<T, kHeadDim, 2>(p, args, stream)));
      break;
    default:
      DSPARK_TRY((launch_tiles<T, kHeadDim, 4>(p, args, stream)));
      break;
  }
  if (args.split.num_splits == 1) return DSPARK_OK;
  using Policy = MergePolicy<kHeadDim>;
  const dim3 grid(p->num_rows, ceil_div(p->num_q_heads, Policy::kHeadsPerCta));
  return launch("merge_splits_kernel", merge_splits_kernel<T, kHeadDim>, grid,
                dim3(Policy::kThreads), 0, stream, args, p->num_reqs);
}

dspark_status run_attention(const AttentionParams* p, AttentionForm form, dspark_stream stream) {
  DSPARK_CHECK_PARAMS(p, stride_block_row);
  DSPARK_TRY(check_sizes(p));
  if (has_no_work(p)) return DSPARK_OK;
  DSPARK_TRY(check_pointers(p, form));
  DSPARK_TRY(check_workspace(p->workspace, p->workspace_bytes, workspace_bytes(p)));
  return dispatch_half_dtype(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p->head_dim == 64) return launch_head_dim<T, 64>(p, form, stream);
    return launch_head_dim<T, 128>(p, form, stream);
  });
}

}  // namespace
}  // namespace dspark

extern "C" {

dspark_status DSPARK_FN(dspark_attention_workspace_size)(const dspark_attention_params* params,
                                                         size_t* bytes) {
  using namespace dspark;
  DSPARK_CHECK_PARAMS(params, stride_block_row);
  DSPARK_CHECK_ARG(bytes != nullptr, DSPARK_ERROR_NULL_POINTER,
                   "bytes: expected a host pointer, got NULL");
  DSPARK_TRY(check_sizes(params));
  *bytes = workspace_bytes(params);
  return DSPARK_OK;
}

dspark_status DSPARK_FN(dspark_verify_attention)(const dspark_attention_params* params,
                                                 dspark_stream stream) {
  return dspark::run_attention(params, dspark::AttentionForm::kVerify, stream);
}

dspark_status DSPARK_FN(dspark_draft_attention)(const dspark_attention_params* params,
                                                dspark_stream stream) {
  return dspark::run_attention(params, dspark::AttentionForm::kDraft, stream);
}

}  // extern "C"
