/* The launcher of the head in its full form: the whole vocabulary, all steps. */
#include "launch/draft/full.cuh"
#include "launch/draft/skip.cuh"

using namespace dspark;

extern "C" dspark_status DSPARK_FN(dspark_draft_full_workspace_size)(
    const dspark_draft_full_params* params, size_t* bytes) {
  DSPARK_CHECK_PARAMS(params, stride_logits_row);
  const dspark_draft_full_params p = complete(params);
  DSPARK_TRY(check_full_sizes(p));
  DSPARK_CHECK_ARG(bytes != nullptr, DSPARK_ERROR_NULL_POINTER,
                   "bytes: expected a host pointer, got NULL");
  *bytes = full_layout(p).bytes;
  return DSPARK_OK;
}

extern "C" dspark_status DSPARK_FN(dspark_draft_full)(const dspark_draft_full_params* params,
                                                      dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, stride_logits_row);
  const dspark_draft_full_params p = complete(params);
  DSPARK_TRY(check_half_dtype(p.dtype));
  DSPARK_TRY(check_logits_dtype(p.logits_dtype));
  const bool fp8 = p.w2_dtype == DSPARK_DTYPE_E4M3;
  DSPARK_CHECK_ARG(
      fp8 || p.w2_dtype == p.dtype || p.head == DSPARK_HEAD_NONE, DSPARK_ERROR_UNSUPPORTED_DTYPE,
      "w2_dtype: expected dtype (%d) or DSPARK_DTYPE_E4M3 (3), got %d", p.dtype, p.w2_dtype);
  DSPARK_TRY(check_full_sizes(p));
  if (p.num_reqs == 0 || p.draft_len == 0) return DSPARK_OK;
  DSPARK_TRY(check_full_pointers(p));
  DSPARK_TRY(check_workspace(p.workspace, p.workspace_bytes, full_layout(p).bytes));
  if (skips_rows(p)) return draft_skip(p, stream);
  return dispatch_half_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return fp8 ? DraftFull<T, __nv_fp8_e4m3>(p, stream).run() : DraftFull<T, T>(p, stream).run();
  });
}
