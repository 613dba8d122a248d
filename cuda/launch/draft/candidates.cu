/* The launcher of the head in its candidate form: a top-K of the base logits, and a bigram table. */
#include "launch/draft/candidates.cuh"

using namespace dspark;

extern "C" dspark_status DSPARK_FN(dspark_draft_candidates_workspace_size)(
    const dspark_draft_candidates_params* params, size_t* bytes) {
  DSPARK_CHECK_PARAMS(params, mask);
  DSPARK_TRY(check_candidates_sizes(*params));
  DSPARK_CHECK_ARG(bytes != nullptr, DSPARK_ERROR_NULL_POINTER,
                   "bytes: expected a host pointer, got NULL");
  *bytes = candidates_layout(*params).bytes;
  return DSPARK_OK;
}

extern "C" dspark_status DSPARK_FN(dspark_draft_candidates)(
    const dspark_draft_candidates_params* params, dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, mask);
  const dspark_draft_candidates_params p = complete(params);
  DSPARK_TRY(check_half_dtype(p.dtype));
  DSPARK_TRY(check_logits_dtype(p.logits_dtype));
  DSPARK_TRY(check_candidates_sizes(p));
  if (p.num_reqs == 0 || p.draft_len == 0) return DSPARK_OK;
  DSPARK_TRY(check_candidates_pointers(p));
  DSPARK_TRY(check_workspace(p.workspace, p.workspace_bytes, candidates_layout(p).bytes));
  return dispatch_half_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return p.logits_dtype == DSPARK_DTYPE_F32 ? DraftCandidates<T, float>(p, stream).run()
                                              : DraftCandidates<T, __nv_bfloat16>(p, stream).run();
  });
}
