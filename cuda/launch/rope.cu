/*
 * Launcher of the rope family: dspark_qk_norm_rope_append.
 */
#include "common/host.cuh"
#include "kernels/rope/qk_norm_rope_append.cuh"

namespace dspark {
namespace {

using RopeParams = dspark_qk_norm_rope_append_params;

/* 16 bytes of a 16-bit type. */
constexpr int64_t kVectorElements = 8;

bool has_e4m3_keys(const RopeParams* p) { return p->kv_dtype == DSPARK_DTYPE_E4M3; }

dspark_status check_sizes(const RopeParams* p) {
  DSPARK_TRY(check_half_dtype(p->dtype));
  DSPARK_TRY(check_range("num_rows", p->num_rows, 0));
  DSPARK_TRY(check_range("num_reqs", p->num_reqs, 0));
  DSPARK_TRY(check_range("num_q_heads", p->num_q_heads, 0, UINT16_MAX));
  DSPARK_TRY(check_range("num_kv_heads", p->num_kv_heads, 0, UINT16_MAX));
  DSPARK_CHECK_ARG(p->head_dim == 64 || p->head_dim == 128 || p->head_dim == 256,
                   DSPARK_ERROR_UNSUPPORTED_SHAPE, "head_dim: expected 64, 128 or 256, got %d",
                   p->head_dim);
  DSPARK_TRY(check_range("max_pages_per_req", p->max_pages_per_req, 0));
  if (p->k_cache != nullptr) DSPARK_TRY(check_range("page_size", p->page_size, 1));
  DSPARK_CHECK_ARG(p->kv_dtype == 0 || p->kv_dtype == p->dtype || has_e4m3_keys(p),
                   DSPARK_ERROR_UNSUPPORTED_DTYPE,
                   "kv_dtype: expected 0, dtype = %d or DSPARK_DTYPE_E4M3 (3), got %d", p->dtype,
                   p->kv_dtype);
  return DSPARK_OK;
}

dspark_status check_inputs(const RopeParams* p) {
  DSPARK_TRY(check_pointer("qkv", p->qkv, 16));
  DSPARK_TRY(check_multiple("stride_qkv_row", p->stride_qkv_row, kVectorElements));
  DSPARK_TRY(check_aligned("q_norm", p->q_norm, 16));
  DSPARK_TRY(check_aligned("k_norm", p->k_norm, 16));
  DSPARK_TRY(check_pointer("inv_freq", p->inv_freq, alignof(float)));
  DSPARK_TRY(check_pointer("positions", p->positions, alignof(int32_t)));
  DSPARK_TRY(check_pointer("qo_indptr", p->qo_indptr, alignof(int32_t)));
  return DSPARK_OK;
}

/* A factor that reader and writer do not share would pass unseen: both must be there, or none. */
dspark_status check_scale(const char* name, const float* scale, bool is_e4m3) {
  if (is_e4m3) return check_pointer(name, scale, alignof(float));
  DSPARK_CHECK_ARG(scale == nullptr, DSPARK_ERROR_INVALID_ARGUMENT,
                   "%s: expected NULL without kv_dtype E4M3, got %p", name,
                   static_cast<const void*>(scale));
  return DSPARK_OK;
}

dspark_status check_cache(const RopeParams* p) {
  const int64_t elements = has_e4m3_keys(p) ? 2 * kVectorElements : kVectorElements;
  DSPARK_TRY(check_pointer("k_cache", p->k_cache, 16));
  DSPARK_TRY(check_pointer("v_cache", p->v_cache, 16));
  DSPARK_TRY(check_pointer("seq_lens", p->seq_lens, alignof(int32_t)));
  DSPARK_TRY(check_pointer("page_table", p->page_table, alignof(int32_t)));
  DSPARK_TRY(check_multiple("stride_cache_page", p->stride_cache_page, elements));
  DSPARK_TRY(check_multiple("stride_cache_slot", p->stride_cache_slot, elements));
  DSPARK_TRY(check_multiple("stride_cache_head", p->stride_cache_head, elements));
  DSPARK_TRY(check_scale("k_scale", p->k_scale, has_e4m3_keys(p)));
  return check_scale("v_scale", p->v_scale, has_e4m3_keys(p));
}

dspark_status check_outputs(const RopeParams* p) {
  if (p->num_q_heads > 0) {
    DSPARK_TRY(check_pointer("q_out", p->q_out, 16));
    DSPARK_TRY(check_multiple("stride_q_out_row", p->stride_q_out_row, kVectorElements));
  }
  if (p->k_out != nullptr || p->v_out != nullptr) {
    DSPARK_TRY(check_pointer("k_out", p->k_out, 16));
    DSPARK_TRY(check_pointer("v_out", p->v_out, 16));
    DSPARK_TRY(check_multiple("stride_kv_out_row", p->stride_kv_out_row, kVectorElements));
  }
  if (p->k_cache != nullptr || p->v_cache != nullptr) DSPARK_TRY(check_cache(p));
  return DSPARK_OK;
}

template <typename T, typename Key>
RopeArgs<T, Key> typed_args(const RopeParams* p) {
  RopeArgs<T, Key> args = {};
  args.num_reqs = p->num_reqs;
  args.num_q_heads = p->num_q_heads;
  args.num_kv_heads = p->num_kv_heads;
  args.eps = p->eps;
  args.rope_scale = p->rope_scale;
  args.qkv = static_cast<const T*>(p->qkv);
  args.q_norm = static_cast<const T*>(p->q_norm);
  args.k_norm = static_cast<const T*>(p->k_norm);
  args.inv_freq = p->inv_freq;
  args.positions = p->positions;
  args.qo_indptr = p->qo_indptr;
  args.seq_lens = p->seq_lens;
  args.cache = {p->page_table,        p->page_size,         p->max_pages_per_req,
                p->stride_cache_page, p->stride_cache_slot, p->stride_cache_head};
  args.q_out = static_cast<T*>(p->q_out);
  args.k_cache = static_cast<Key*>(p->k_cache);
  args.v_cache = static_cast<Key*>(p->v_cache);
  args.k_scale = p->k_scale;
  args.v_scale = p->v_scale;
  args.k_out = static_cast<T*>(p->k_out);
  args.v_out = static_cast<T*>(p->v_out);
  args.stride_qkv_row = p->stride_qkv_row;
  args.stride_q_out_row = p->stride_q_out_row;
  args.stride_kv_out_row = p->stride_kv_out_row;
  return args;
}

template <typename T, typename Key, int kHeadDim>
dspark_status launch_keys(const RopeParams* p, dspark_stream stream) {
  using Policy = RopePolicy<kHeadDim>;
  const int num_heads = p->num_q_heads + 2 * p->num_kv_heads;
  const dim3 grid(p->num_rows, ceil_div(num_heads, Policy::kHeadsPerCta));
  return launch("qk_norm_rope_append_kernel", qk_norm_rope_append_kernel<T, Key, kHeadDim>, grid,
                dim3(Policy::kThreads), 0, stream, typed_args<T, Key>(p));
}

template <typename T, int kHeadDim>
dspark_status launch_head_dim(const RopeParams* p, dspark_stream stream) {
  if (has_e4m3_keys(p)) return launch_keys<T, __nv_fp8_e4m3, kHeadDim>(p, stream);
  return launch_keys<T, T, kHeadDim>(p, stream);
}

}  // namespace
}  // namespace dspark

extern "C" dspark_status DSPARK_FN(dspark_qk_norm_rope_append)(
    const dspark_qk_norm_rope_append_params* given, dspark_stream stream) {
  using namespace dspark;
  DSPARK_CHECK_PARAMS(given, stride_cache_head);
  const RopeParams whole = complete(given);
  const RopeParams* params = &whole;
  DSPARK_TRY(check_sizes(params));
  const bool no_heads = params->num_q_heads == 0 && params->num_kv_heads == 0;
  if (params->num_rows == 0 || params->num_reqs == 0 || no_heads) return DSPARK_OK;
  DSPARK_TRY(check_inputs(params));
  DSPARK_TRY(check_outputs(params));
  return dispatch_half_dtype(params->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (params->head_dim) {
      case 64:
        return launch_head_dim<T, 64>(params, stream);
      case 128:
        return launch_head_dim<T, 128>(params, stream);
      default:
        return launch_head_dim<T, 256>(params, stream);
    }
  });
}
