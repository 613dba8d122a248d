/*
 * Launchers of the attention family: dspark_verify_attention, dspark_draft_attention and their
 * workspace.
 */
#include <cfloat>

#include "common/host.cuh"
#include "kernels/attention/config.h"
#include "kernels/attention/merge_splits.cuh"
#include "kernels/attention/paged_attention.cuh"
#include "launch/attention/commit_tree.cuh"
#include "launch/attention/stream.cuh"

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

/* A tree's masks are 64 bits; the window has to reach over the whole tree. */
constexpr int kMaxTreeRows = 64;

bool has_e4m3_keys(const AttentionParams* p) { return p->kv_dtype == DSPARK_DTYPE_E4M3; }

/* Of an element of the cache. */
int key_bytes(const AttentionParams* p) { return has_e4m3_keys(p) ? 1 : 2; }

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
  DSPARK_CHECK_ARG(p->head_dim == 64 || p->head_dim == 128 || p->head_dim == 256,
                   DSPARK_ERROR_UNSUPPORTED_SHAPE, "head_dim: expected 64, 128 or 256, got %d",
                   p->head_dim);
  DSPARK_CHECK_ARG(p->kv_dtype == 0 || p->kv_dtype == p->dtype || has_e4m3_keys(p),
                   DSPARK_ERROR_UNSUPPORTED_DTYPE,
                   "kv_dtype: expected 0, dtype = %d or DSPARK_DTYPE_E4M3 (3), got %d", p->dtype,
                   p->kv_dtype);
  DSPARK_CHECK_ARG(
      p->num_q_heads % p->num_kv_heads == 0 && p->num_q_heads / p->num_kv_heads <= kMaxGroupSize,
      DSPARK_ERROR_UNSUPPORTED_SHAPE,
      "num_q_heads: expected 1 to %d times num_kv_heads = %d, got %d", kMaxGroupSize,
      p->num_kv_heads, p->num_q_heads);
  DSPARK_TRY(check_range("window", p->window, 0));
  DSPARK_TRY(check_range("batch_invariant", p->batch_invariant, 0, 1));
  DSPARK_CHECK_ARG(p->softcap >= 0.0f && p->softcap <= FLT_MAX, DSPARK_ERROR_INVALID_ARGUMENT,
                   "softcap: expected a finite value >= 0, got %g", p->softcap);
  return DSPARK_OK;
}

dspark_status check_tree(const AttentionParams* p, AttentionForm form) {
  if (p->tree_mask == nullptr) return DSPARK_OK;
  DSPARK_CHECK_ARG(form == AttentionForm::kVerify, DSPARK_ERROR_INVALID_ARGUMENT,
                   "tree_mask: expected NULL for dspark_draft_attention, got %p",
                   static_cast<const void*>(p->tree_mask));
  DSPARK_TRY(check_pointer("tree_mask", p->tree_mask, alignof(uint32_t)));
  DSPARK_CHECK_ARG(p->max_rows_per_req <= kMaxTreeRows, DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "max_rows_per_req: expected at most %d with a tree_mask, got %d", kMaxTreeRows,
                   p->max_rows_per_req);
  DSPARK_CHECK_ARG(p->window == 0 || p->window >= kMaxTreeRows, DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "window: expected 0 or at least %d with a tree_mask, got %d", kMaxTreeRows,
                   p->window);
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
  const int64_t cache_elements = 16 / key_bytes(p);
  DSPARK_TRY(check_multiple("stride_cache_page", p->stride_cache_page, cache_elements));
  DSPARK_TRY(check_multiple("stride_cache_slot", p->stride_cache_slot, cache_elements));
  DSPARK_TRY(check_multiple("stride_cache_head", p->stride_cache_head, cache_elements));
  DSPARK_TRY(check_aligned("k_scale", p->k_scale, alignof(float)));
  DSPARK_TRY(check_aligned("v_scale", p->v_scale, alignof(float)));
  if (form == AttentionForm::kVerify) {
    DSPARK_CHECK_ARG(p->k_block == nullptr && p->v_block == nullptr, DSPARK_ERROR_INVALID_ARGUMENT,
                     "k_block, v_block: expected NULL for dspark_verify_attention, got %p, %p",
                     p->k_block, p->v_block);
    return DSPARK_OK;
  }
  DSPARK_CHECK_ARG(!has_e4m3_keys(p), DSPARK_ERROR_UNSUPPORTED_DTYPE,
                   "kv_dtype: expected 0 or dtype = %d for dspark_draft_attention, got %d",
                   p->dtype, p->kv_dtype);
  DSPARK_TRY(check_pointer("k_block", p->k_block, 16));
  DSPARK_TRY(check_pointer("v_block", p->v_block, 16));
  return check_multiple("stride_block_row", p->stride_block_row, kVectorElements);
}

bool has_no_work(const AttentionParams* p) {
  return p->num_rows == 0 || p->num_reqs == 0 || p->max_rows_per_req == 0;
}

int group_size(const AttentionParams* p) { return p->num_q_heads / p->num_kv_heads; }

AttentionDesc describe(const AttentionParams* p) {
  AttentionDesc desc = {};
  desc.num_reqs = p->num_reqs;
  desc.max_rows_per_req = p->max_rows_per_req;
  desc.max_seq_len = p->max_seq_len;
  desc.group_size = group_size(p);
  desc.num_kv_heads = p->num_kv_heads;
  desc.head_dim = p->head_dim;
  desc.page_size = p->page_size;
  desc.key_bytes = key_bytes(p);
  /* The size function does not know the form, and must ask for enough. */
  desc.is_draft = true;
  desc.batch_invariant = p->batch_invariant != 0;
  return desc;
}

/* Whether the code that is loaded for the current device has the streaming kernel: below sm_90, and
 * where PTX of less was all there was, it is empty. */
bool has_stream() {
  constexpr int kFirstPtxWithStream = 90;
  const auto kernel = stream_attention_kernel<__nv_bfloat16, StreamPolicy<64, 1>>;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
         attributes.ptxVersion >= kFirstPtxWithStream;
}

/* Of the current device; without one, of an H100, so that sizes can be asked for anywhere. */
AttentionDevice current_device() {
  AttentionDevice device = {132, 228 * 1024, true};
  int ordinal = 0;
  int num_sms = 0;
  int shared_bytes = 0;
  int major = 0;
  if (cudaGetDevice(&ordinal) == cudaSuccess &&
      cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, ordinal) == cudaSuccess &&
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, ordinal) ==
          cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) == cudaSuccess) {
    device = {num_sms, shared_bytes, major == 9 && has_stream()};
  }
  cudaGetLastError(); /* no device is no error here: the launch will say so */
  return device;
}

AttentionConfig configure(const AttentionParams* p) {
  return configure_attention(describe(p), current_device());
}

size_t workspace_bytes(const AttentionParams* p, const AttentionConfig& config) {
  return config.workspace_bytes(describe(p));
}

template <typename T>
AttentionArgs<T> typed_args(const AttentionParams* p,
                            const AttentionConfig& config,
                            AttentionForm form) {
  const bool is_draft = form == AttentionForm::kDraft;
  AttentionArgs<T> args = {};
  args.num_rows = p->num_rows;
  args.num_reqs = p->num_reqs;
  args.num_q_heads = p->num_q_heads;
  args.num_kv_heads = p->num_kv_heads;
  args.group_size = group_size(p);
  args.by_group_size = Divider::by(args.group_size);
  args.by_page_size = Divider::by(p->page_size);
  args.by_num_kv_heads = Divider::by(p->num_kv_heads);
  args.window = p->window;
  args.scale_log2 = p->scale * kLog2E;
  if (p->softcap > 0.0f) {
    args.softcap_scale = 2.0f * kLog2E * p->scale / p->softcap;
    args.softcap_log2 = p->softcap * kLog2E;
  }
  args.plan = config.plan;
  args.q = static_cast<const T*>(p->q);
  args.k_cache = p->k_cache;
  args.v_cache = p->v_cache;
  args.k_block = is_draft ? p->k_block : nullptr;
  args.v_block = is_draft ? p->v_block : nullptr;
  args.k_scale = p->k_scale;
  args.v_scale = p->v_scale;
  args.qo_indptr = p->qo_indptr;
  args.seq_lens = p->seq_lens;
  args.tree_mask = p->tree_mask;
  args.cache = {p->page_table,        p->page_size,         p->max_pages_per_req,
                p->stride_cache_page, p->stride_cache_slot, p->stride_cache_head};
  args.out = static_cast<T*>(p->out);
  if (config.num_slots > 0) {
    const auto entries = static_cast<size_t>(config.num_partials(describe(p)));
    args.partials.out = static_cast<float*>(p->workspace);
    args.partials.max_sum =
        reinterpret_cast<float2*>(args.partials.out + entries * static_cast<size_t>(p->head_dim));
  }
  args.stride_q_row = p->stride_q_row;
  args.stride_out_row = p->stride_out_row;
  args.stride_block_row = p->stride_block_row;
  return args;
}

template <typename T, int kHeadDim, int kWarpsM, int kKeyBytes>
dspark_status launch_items(const AttentionConfig& config,
                           const AttentionArgs<T>& args,
                           dspark_stream stream) {
  using Policy = AttentionPolicy<kHeadDim, kWarpsM, kKeyBytes>;
  const dim3 grid(static_cast<unsigned>(config.num_items * args.num_kv_heads));
  return launch("paged_attention_kernel", paged_attention_kernel<T, Policy>, grid,
                dim3(Policy::kThreads), Policy::kSharedBytes, stream, args);
}

template <typename T, int kHeadDim, int kKeyBytes>
dspark_status launch_keys(const AttentionParams* p,
                          const AttentionConfig& config,
                          const AttentionArgs<T>& args,
                          dspark_stream stream) {
  if (config.streams) {
    StreamArgs<T> stream_args = {};
    stream_args.attention = args;
    DSPARK_CHECK_ARG(encode_maps(p, kKeyBytes, args.k_block != nullptr, &stream_args.maps),
                     DSPARK_ERROR_CUDA, "cuTensorMapEncodeTiled failed");
    return launch_stream<T, kHeadDim, kKeyBytes>(config, stream_args, stream);
  }
  if (config.warps_m == 2) return launch_items<T, kHeadDim, 2, kKeyBytes>(config, args, stream);
  return launch_items<T, kHeadDim, 4, kKeyBytes>(config, args, stream);
}

template <typename T, int kHeadDim>
dspark_status launch_head_dim(const AttentionParams* p,
                              const AttentionConfig& config,
                              const AttentionArgs<T>& args,
                              dspark_stream stream) {
  if (has_e4m3_keys(p)) {
    DSPARK_TRY((launch_keys<T, kHeadDim, 1>(p, config, args, stream)));
  } else {
    DSPARK_TRY((launch_keys<T, kHeadDim, 2>(p, config, args, stream)));
  }
  if (config.num_slots == 0) return DSPARK_OK;
  using Policy = MergePolicy<kHeadDim>;
  const dim3 grid(static_cast<unsigned>(config.num_items), args.num_kv_heads);
  return launch_dependent("merge_splits_kernel", merge_splits_kernel<T, kHeadDim>, grid,
                          dim3(Policy::kThreads), stream, args, config.tile_m);
}

dspark_status run_attention(const AttentionParams* params,
                            AttentionForm form,
                            dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, stride_block_row);
  const AttentionParams whole = complete(params);
  const AttentionParams* p = &whole;
  DSPARK_TRY(check_sizes(p));
  if (has_no_work(p)) return DSPARK_OK;
  DSPARK_TRY(check_pointers(p, form));
  DSPARK_TRY(check_tree(p, form));
  const AttentionConfig config = configure(p);
  DSPARK_CHECK_ARG(config.num_items * p->num_kv_heads <= INT32_MAX, DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "max_rows_per_req: %d rows of %d requests and %d heads need too many CTAs",
                   p->max_rows_per_req, p->num_reqs, p->num_kv_heads);
  DSPARK_TRY(check_workspace(p->workspace, p->workspace_bytes, workspace_bytes(p, config)));
  return dispatch_half_dtype(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const AttentionArgs<T> args = typed_args<T>(p, config, form);
    switch (p->head_dim) {
      case 64:
        return launch_head_dim<T, 64>(p, config, args, stream);
      case 128:
        return launch_head_dim<T, 128>(p, config, args, stream);
      default:
        return launch_head_dim<T, 256>(p, config, args, stream);
    }
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
  const dspark_attention_params whole = complete(params);
  DSPARK_TRY(check_sizes(&whole));
  *bytes = has_no_work(&whole) ? 0 : workspace_bytes(&whole, configure(&whole));
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

dspark_status DSPARK_FN(dspark_commit_tree)(const dspark_commit_tree_params* params,
                                            dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, stride_cache_head);
  return dspark::commit_tree(params, stream);
}

}  // extern "C"
