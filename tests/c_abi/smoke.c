/*
 * The C ABI as a C program sees it: host-only functions, refusals of bad arguments, layouts. Needs no
 * GPU; built as C11 and as C++17 by tests/c_abi.rs.
 *
 * smoke            runs the checks and prints "ok"
 * smoke --layout   prints "struct field offset" lines ("struct size" for the whole)
 */
#include <stdio.h>
#include <string.h>

#include "dspark.h"

static int failures = 0;

#define CHECK(condition)                                                                  \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      fprintf(stderr, "%s:%d: %s (last error: \"%s\")\n", __FILE__, __LINE__, #condition, \
              dspark_last_error());                                                       \
      ++failures;                                                                         \
    }                                                                                     \
  } while (0)

/* The call is refused with `status`, and the message names `parameter`. */
#define CHECK_REFUSED(call, status, parameter)               \
  do {                                                       \
    CHECK((call) == (status));                               \
    CHECK(strstr(dspark_last_error(), (parameter)) != NULL); \
  } while (0)

static void check_host_functions(void) {
  char version[32];
  snprintf(version, sizeof version, "%d.%d.%d", DSPARK_VERSION_MAJOR, DSPARK_VERSION_MINOR,
           DSPARK_VERSION_PATCH);
  CHECK(strcmp(dspark_last_error(), "") == 0);
  CHECK(strcmp(dspark_version(), version) == 0);
  CHECK(strcmp(dspark_status_name(DSPARK_OK), "DSPARK_OK") == 0);
  CHECK(strcmp(dspark_status_name(DSPARK_ERROR_NULL_POINTER), "DSPARK_ERROR_NULL_POINTER") == 0);
  CHECK(strcmp(dspark_status_name(DSPARK_ERROR_CUDA), "DSPARK_ERROR_CUDA") == 0);
  CHECK(dspark_status_name(-7) != NULL);
}

static void check_null_params(void) {
  size_t bytes = 0;
  CHECK_REFUSED(dspark_rms_norm(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_gather_rows(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_silu_mul(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_qk_norm_rope_append(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_attention_workspace_size(NULL, &bytes), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_verify_attention(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_draft_attention(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_draft_full_workspace_size(NULL, &bytes), DSPARK_ERROR_NULL_POINTER,
                "params");
  CHECK_REFUSED(dspark_draft_full(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_draft_candidates_workspace_size(NULL, &bytes), DSPARK_ERROR_NULL_POINTER,
                "params");
  CHECK_REFUSED(dspark_draft_candidates(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_survival(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_schedule(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_accept_workspace_size(NULL, &bytes), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_accept(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
  CHECK_REFUSED(dspark_commit(NULL, NULL), DSPARK_ERROR_NULL_POINTER, "params");
}

static dspark_attention_params attention_params(void) {
  dspark_attention_params params;
  memset(&params, 0, sizeof params);
  params.struct_size = sizeof params;
  params.dtype = DSPARK_DTYPE_BF16;
  params.num_rows = 8;
  params.num_reqs = 2;
  params.max_rows_per_req = 8;
  params.max_seq_len = 4096;
  params.num_q_heads = 8;
  params.num_kv_heads = 2;
  params.head_dim = 64;
  params.page_size = 16;
  params.max_pages_per_req = 256;
  params.scale = 0.125f;
  return params;
}

static void check_attention(void) {
  dspark_attention_params params = attention_params();
  size_t bytes = 1;
  CHECK(dspark_attention_workspace_size(&params, &bytes) == DSPARK_OK);
  CHECK_REFUSED(dspark_attention_workspace_size(&params, NULL), DSPARK_ERROR_NULL_POINTER, "bytes");
  CHECK_REFUSED(dspark_verify_attention(&params, NULL), DSPARK_ERROR_NULL_POINTER, "q");

  params.head_dim = 96;
  CHECK_REFUSED(dspark_attention_workspace_size(&params, &bytes), DSPARK_ERROR_UNSUPPORTED_SHAPE,
                "head_dim");
  params = attention_params();
  params.page_size = 0;
  CHECK_REFUSED(dspark_attention_workspace_size(&params, &bytes), DSPARK_ERROR_INVALID_ARGUMENT,
                "page_size");
  params = attention_params();
  params.num_q_heads = 7;
  CHECK_REFUSED(dspark_verify_attention(&params, NULL), DSPARK_ERROR_UNSUPPORTED_SHAPE,
                "num_q_heads");
  params = attention_params();
  params.dtype = DSPARK_DTYPE_F32;
  CHECK_REFUSED(dspark_verify_attention(&params, NULL), DSPARK_ERROR_UNSUPPORTED_DTYPE, "dtype");
  params = attention_params();
  params.window = -1;
  CHECK_REFUSED(dspark_verify_attention(&params, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "window");
  params = attention_params();
  params.softcap = -1.0f;
  CHECK_REFUSED(dspark_verify_attention(&params, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "softcap");
  params.struct_size = offsetof(dspark_attention_params, tree_mask); /* what follows is not read */
  CHECK_REFUSED(dspark_verify_attention(&params, NULL), DSPARK_ERROR_NULL_POINTER, "q");
  params = attention_params();
  params.struct_size = 4;
  CHECK_REFUSED(dspark_draft_attention(&params, NULL), DSPARK_ERROR_STRUCT_SIZE, "struct_size");
}

static void check_layers(void) {
  static int32_t memory[64]; /* never read: the refusals come before any launch */
  dspark_rms_norm_params norm = DSPARK_RMS_NORM_PARAMS_INIT;
  dspark_gather_rows_params gather = DSPARK_GATHER_ROWS_PARAMS_INIT;
  dspark_silu_mul_params silu = DSPARK_SILU_MUL_PARAMS_INIT;
  dspark_qk_norm_rope_append_params rope = DSPARK_QK_NORM_ROPE_APPEND_PARAMS_INIT;

  norm.dtype = DSPARK_DTYPE_BF16;
  norm.num_rows = 1;
  norm.hidden_size = 12;
  CHECK_REFUSED(dspark_rms_norm(&norm, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "hidden_size");
  norm.hidden_size = 16;
  CHECK_REFUSED(dspark_rms_norm(&norm, NULL), DSPARK_ERROR_NULL_POINTER, "x");
  norm.tap = memory;
  CHECK_REFUSED(dspark_rms_norm(&norm, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "tap");
  norm.tap = NULL;
  norm.x = (char*)memory + 2;
  norm.weight = memory;
  norm.out = memory;
  norm.stride_x_row = norm.stride_out_row = 16;
  CHECK_REFUSED(dspark_rms_norm(&norm, NULL), DSPARK_ERROR_MISALIGNED, "x");
  norm.num_rows = -1;
  CHECK_REFUSED(dspark_rms_norm(&norm, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "num_rows");

  gather.num_rows = 1;
  gather.num_src_rows = 1;
  CHECK_REFUSED(dspark_gather_rows(&gather, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "num_cols");
  silu.dtype = DSPARK_DTYPE_BF16;
  silu.num_rows = 1;
  CHECK_REFUSED(dspark_silu_mul(&silu, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "ffn_size");

  rope.dtype = DSPARK_DTYPE_BF16;
  rope.num_rows = rope.num_reqs = rope.num_q_heads = rope.num_kv_heads = 1;
  rope.page_size = 1;
  rope.head_dim = 80;
  CHECK_REFUSED(dspark_qk_norm_rope_append(&rope, NULL), DSPARK_ERROR_UNSUPPORTED_SHAPE,
                "head_dim");
}

static void check_laws(void) {
  dspark_draft_full_params full = DSPARK_DRAFT_FULL_PARAMS_INIT;
  dspark_draft_bounds_params bounds = DSPARK_DRAFT_BOUNDS_PARAMS_INIT;
  dspark_draft_candidates_params candidates = DSPARK_DRAFT_CANDIDATES_PARAMS_INIT;
  dspark_survival_params survival = DSPARK_SURVIVAL_PARAMS_INIT;
  dspark_schedule_params schedule = DSPARK_SCHEDULE_PARAMS_INIT;
  dspark_accept_params accept = DSPARK_ACCEPT_PARAMS_INIT;
  dspark_commit_params commit = DSPARK_COMMIT_PARAMS_INIT;
  size_t bytes = 0;

  full.dtype = DSPARK_DTYPE_BF16;
  full.logits_dtype = DSPARK_DTYPE_BF16;
  full.w2_dtype = DSPARK_DTYPE_F16;
  full.head = 9;
  CHECK_REFUSED(dspark_draft_full_workspace_size(&full, &bytes), DSPARK_ERROR_INVALID_ARGUMENT,
                "head");
  full.head = DSPARK_HEAD_VANILLA;
  full.num_reqs = 2;
  full.draft_len = 17;
  full.vocab_size = 1000;
  full.markov_rank = 72;
  CHECK_REFUSED(dspark_draft_full_workspace_size(&full, &bytes), DSPARK_ERROR_INVALID_ARGUMENT,
                "draft_len");
  full.draft_len = 16;
  CHECK_REFUSED(dspark_draft_full_workspace_size(&full, &bytes), DSPARK_ERROR_UNSUPPORTED_SHAPE,
                "markov_rank");
  full.markov_rank = 64;
  CHECK(dspark_draft_full_workspace_size(&full, &bytes) == DSPARK_OK && bytes > 0);
  CHECK_REFUSED(dspark_draft_full(&full, NULL), DSPARK_ERROR_UNSUPPORTED_DTYPE, "w2_dtype");
  full.w2_dtype = DSPARK_DTYPE_BF16;
  CHECK_REFUSED(dspark_draft_full(&full, NULL), DSPARK_ERROR_NULL_POINTER, "logits");

  bounds.w2_dtype = DSPARK_DTYPE_F32;
  CHECK_REFUSED(dspark_draft_bounds(&bounds, NULL), DSPARK_ERROR_UNSUPPORTED_DTYPE, "dtype");
  bounds.w2_dtype = DSPARK_DTYPE_BF16;
  bounds.vocab_size = 1000;
  bounds.markov_rank = 72;
  CHECK_REFUSED(dspark_draft_bounds(&bounds, NULL), DSPARK_ERROR_UNSUPPORTED_SHAPE, "markov_rank");
  bounds.markov_rank = 64;
  CHECK_REFUSED(dspark_draft_bounds(&bounds, NULL), DSPARK_ERROR_NULL_POINTER, "markov_w2");

  candidates.vocab_size = 151936;
  candidates.markov_rank = 64;
  candidates.head = DSPARK_HEAD_VANILLA;
  candidates.num_top = 257;
  CHECK_REFUSED(dspark_draft_candidates_workspace_size(&candidates, &bytes),
                DSPARK_ERROR_INVALID_ARGUMENT, "num_top");
  candidates.num_top = 64;
  candidates.dtype = DSPARK_DTYPE_BF16;
  candidates.logits_dtype = DSPARK_DTYPE_F16;
  CHECK_REFUSED(dspark_draft_candidates(&candidates, NULL), DSPARK_ERROR_UNSUPPORTED_DTYPE,
                "logits_dtype");

  survival.num_reqs = 1;
  survival.draft_len = 1;
  CHECK_REFUSED(dspark_survival(&survival, NULL), DSPARK_ERROR_NULL_POINTER, "confidence");

  schedule.num_reqs = 1024;
  schedule.draft_len = 17;
  CHECK_REFUSED(dspark_schedule(&schedule, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "draft_len");
  schedule.draft_len = 16;
  schedule.rule = 3;
  CHECK_REFUSED(dspark_schedule(&schedule, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "rule");
  schedule.rule = DSPARK_SCHEDULE_CAPACITY;
  CHECK_REFUSED(dspark_schedule(&schedule, NULL), DSPARK_ERROR_NULL_POINTER, "confidence");

  accept.num_rows = 1;
  accept.num_reqs = 1;
  CHECK_REFUSED(dspark_accept_workspace_size(&accept, &bytes), DSPARK_ERROR_INVALID_ARGUMENT,
                "vocab_size");
  accept.vocab_size = 32000;
  CHECK(dspark_accept_workspace_size(&accept, &bytes) == DSPARK_OK);
  CHECK_REFUSED(dspark_accept(&accept, NULL), DSPARK_ERROR_NULL_POINTER, "target_logits");
  accept.target_dtype = 7;
  CHECK_REFUSED(dspark_accept(&accept, NULL), DSPARK_ERROR_UNSUPPORTED_DTYPE, "dtype");
  accept.draft_len = 65;
  CHECK_REFUSED(dspark_accept(&accept, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "draft_len");
  accept.draft_len = 0;
  accept.vocab_size = (1 << 21) + 1;
  CHECK_REFUSED(dspark_accept(&accept, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "vocab_size");

  commit.num_reqs = 1;
  CHECK_REFUSED(dspark_commit(&commit, NULL), DSPARK_ERROR_NULL_POINTER, "num_accepted");
  commit.num_reqs = -1;
  CHECK_REFUSED(dspark_commit(&commit, NULL), DSPARK_ERROR_INVALID_ARGUMENT, "num_reqs");
}

/* Enough memory on the host's side of the checks, a workspace one byte short. */
static void check_small_workspace(void) {
  static union {
    char bytes[512];
    uint64_t align;
  } memory;
  dspark_attention_params params = attention_params();
  char* aligned = memory.bytes + (256 - (uintptr_t)memory.bytes % 256) % 256;
  size_t bytes = 0;
  CHECK(dspark_attention_workspace_size(&params, &bytes) == DSPARK_OK);
  CHECK(bytes > 0); /* 4096 keys of two requests are worth splitting */
  params.q = params.k_cache = params.v_cache = aligned;
  params.out = aligned;
  params.qo_indptr = params.seq_lens = params.page_table = (const int32_t*)(const void*)aligned;
  params.workspace = aligned;
  params.workspace_bytes = bytes - 1;
  CHECK_REFUSED(dspark_verify_attention(&params, NULL), DSPARK_ERROR_WORKSPACE_TOO_SMALL,
                "workspace_bytes");
}

#define STRUCT(type) printf(#type " %zu\n", sizeof(type))
#define FIELD(type, field) printf(#type " " #field " %zu\n", offsetof(type, field))

static void print_layout(void) {
#include "layout.inc" /* written by tests/c_abi.rs */
}

int main(int argc, char** argv) {
  if (argc > 1 && strcmp(argv[1], "--layout") == 0) {
    print_layout();
    return 0;
  }
  check_host_functions();
  check_null_params();
  check_attention();
  check_layers();
  check_laws();
  check_small_workspace();
  if (failures == 0) printf("ok\n");
  return failures != 0;
}
