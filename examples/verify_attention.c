/*
 * Verification attention of two requests through the C ABI: fill the params, ask for the workspace,
 * launch. Without device memory at hand it stops at the first pointer that is missing, which shows
 * what an error looks like; it needs no GPU as it stands.
 *
 *   cc -Icuda/include examples/verify_attention.c target/release/libdspark.a -lstdc++ -ldl -lpthread -lrt -lm
 */
#include <stdio.h>

#include "dspark.h"

int main(void) {
  dspark_attention_params params = DSPARK_ATTENTION_PARAMS_INIT;
  params.dtype = DSPARK_DTYPE_BF16;
  params.num_reqs = 2;
  params.num_rows = 2 * 8; /* bounds: at most 8 rows (anchor and 7 drafts) of each request */
  params.max_rows_per_req = 8;
  params.max_seq_len = 4096;
  params.num_q_heads = 32;
  params.num_kv_heads = 8;
  params.head_dim = 128;
  params.page_size = 16;
  params.max_pages_per_req = 4096 / 16;
  params.scale = 0.08838835f; /* 1 / sqrt(128) */
  params.stride_q_row = params.stride_out_row = 32 * 128;
  params.stride_cache_head = 128; /* cache [num_pages, page_size, num_kv_heads, head_dim] */
  params.stride_cache_slot = 8 * 128;
  params.stride_cache_page = 16 * 8 * 128;

  /* Sizes alone decide the workspace: allocate it once, 256-byte aligned. */
  size_t bytes = 0;
  if (dspark_attention_workspace_size(&params, &bytes) != DSPARK_OK) {
    fprintf(stderr, "%s\n", dspark_last_error());
    return 1;
  }
  printf("dspark %s: workspace of %zu bytes\n", dspark_version(), bytes);

  /* With device pointers in q, k_cache, v_cache, out, qo_indptr, seq_lens, page_table and
   * workspace (and workspace_bytes = bytes), this enqueues the work on a stream; lengths and pages
   * are read there, so a captured launch can be replayed as they change. */
  dspark_status status = dspark_verify_attention(&params, NULL);
  printf("%s: %s\n", dspark_status_name(status), dspark_last_error());
  return status == DSPARK_ERROR_NULL_POINTER ? 0 : 1;
}
