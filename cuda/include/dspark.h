/*
 * dspark.h - the C ABI of dspark: stateless launchers for every kernel of the DSpark decode step.
 *
 * Rules that hold for every function here:
 *   - A launcher validates its arguments, enqueues work on `stream` and returns. It never
 * allocates, synchronises, reads the environment or keeps a pointer, and is safe inside stream
 * capture.
 *   - It returns a dspark_status. On failure nothing is launched, and dspark_last_error() gives a
 *     message for this thread naming the parameter, what was expected and what came.
 *   - Pointers are device pointers unless a comment says "host". NULL is an error unless a comment
 *     says "may be NULL".
 *   - Params structs begin with struct_size and are made by their DSPARK_*_INIT macro; fields are
 *     only ever appended.
 *   - Strides are in elements, int64. Prefix sums are int32 with a leading 0.
 *   - `row` means one flattened token of the pass: rows of request r are
 *     qo_indptr[r] .. qo_indptr[r+1]-1, in order of position.
 *   - Values that change per step (lengths, page tables, positions, sampling parameters) are device
 *     arrays; sizes given by value are bounds fixed at capture time.
 */
#ifndef DSPARK_H_
#define DSPARK_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DSPARK_VERSION_MAJOR 0
#define DSPARK_VERSION_MINOR 1
#define DSPARK_VERSION_PATCH 0

/* The crate builds the launchers under a suffixed name and re-exports the public one. */
#ifndef DSPARK_FN
#define DSPARK_FN(name) name
#endif

/* All fields zero but struct_size; clean under -Wextra in C and C++. */
#ifdef __cplusplus
#define DSPARK_PARAMS_INIT(type)       \
  [] {                                 \
    type params = {};                  \
    params.struct_size = sizeof(type); \
    return params;                     \
  }()
#else
#define DSPARK_PARAMS_INIT(type) {.struct_size = sizeof(type)}
#endif

/* 0 = success. 1-99 the caller's arguments, 100-199 unsupported, 200-299 CUDA, 300-399 model and
 * I/O, 900+ internal. Numbers are never reused. */
typedef int32_t dspark_status;
#define DSPARK_OK 0
#define DSPARK_ERROR_NULL_POINTER 1
#define DSPARK_ERROR_INVALID_ARGUMENT 2
#define DSPARK_ERROR_STRUCT_SIZE 3
#define DSPARK_ERROR_MISALIGNED 4
#define DSPARK_ERROR_WORKSPACE_TOO_SMALL 5
#define DSPARK_ERROR_UNSUPPORTED_DTYPE 100
#define DSPARK_ERROR_UNSUPPORTED_SHAPE 101
#define DSPARK_ERROR_UNSUPPORTED_DEVICE 102
#define DSPARK_ERROR_CUDA 200
#define DSPARK_ERROR_INTERNAL 900

typedef int32_t dspark_dtype;
#define DSPARK_DTYPE_F32 0
#define DSPARK_DTYPE_BF16 1
#define DSPARK_DTYPE_F16 2
#define DSPARK_DTYPE_E4M3 3 /* OCP e4m3fn: KV caches and the draft head's markov_w2 alone */

/* A CUDA stream (CUstream / cudaStream_t); 0 is the legacy default stream. */
typedef struct CUstream_st* dspark_stream;

/* Host functions, callable without a GPU. */

/* "0.1.0"; static storage. */
const char* DSPARK_FN(dspark_version)(void);
/* The short name of a status, "DSPARK_ERROR_NULL_POINTER" for 1; static storage; never NULL. */
const char* DSPARK_FN(dspark_status_name)(dspark_status status);
/* Message of the last failed call of this thread; "" if there was none; valid until the next call.
 */
const char* DSPARK_FN(dspark_last_error)(void);

/* ------------------------------------------------------------------------------------------------
 * norm
 * --------------------------------------------------------------------------------------------- */

/*
 * Computes      residual += delta (if delta is given); tap = residual (if tap is given); out =
 *               residual * rsqrt(mean(residual^2) + eps) * weight.
 * Shapes        x, delta, tap, out [num_rows, hidden_size]; weight [hidden_size].
 * Dtypes        x, delta, tap, weight, out: `dtype` (BF16, F16). Sums in f32. The rounded sum is
 *               what is normed and tapped.
 * Layout        rows contiguous, row strides given.
 * Alignment     pointers 16 bytes, strides and hidden_size multiples of 8.
 * Aliasing      out may be x only when delta is NULL; else x, delta, tap and out are distinct.
 * Workspace     none.
 * Determinism   bitwise, independent of num_rows.
 * Stream/graph  capture-safe; nothing is read on the host.
 * Errors        null or misaligned pointers, sizes < 0, hidden_size = 0 or not a multiple of 8, a
 *               tap without delta.
 */
typedef struct dspark_rms_norm_params {
  uint32_t struct_size;
  dspark_dtype dtype;
  int32_t num_rows;
  int32_t hidden_size;
  float eps;
  void* x; /* [num_rows, hidden_size]; the residual, updated in place when delta is given */
  const void* delta; /* [num_rows, hidden_size]; may be NULL */
  const void* weight;
  void* out;
  int64_t stride_x_row;
  int64_t stride_delta_row;
  int64_t stride_out_row;
  void* tap; /* [num_rows, hidden_size]; may be NULL; the updated residual once more */
  int64_t stride_tap_row;
} dspark_rms_norm_params;
#define DSPARK_RMS_NORM_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_rms_norm_params)
dspark_status DSPARK_FN(dspark_rms_norm)(const dspark_rms_norm_params* params,
                                         dspark_stream stream);

/* ------------------------------------------------------------------------------------------------
 * gather and elementwise (family norm)
 * --------------------------------------------------------------------------------------------- */

/*
 * Computes      out[i, :] = src[index[i], :] (index NULL: out[i, :] = src[i, :], a strided copy).
 * Shapes        src [num_src_rows, num_cols]; index [num_rows] int32; out [num_rows, num_cols].
 * Dtypes        src, out: `dtype` (F32, BF16, F16).
 * Layout        rows contiguous, row strides given (a column window of a wider matrix is fine).
 * Alignment     16 bytes gives the fast path; element alignment is enough.
 * Aliasing      src and out must not overlap.
 * Workspace     none.
 * Determinism   exact copy. An index outside [0, num_src_rows) writes a row of zeros (padding
 *               rows use -1).
 * Stream/graph  capture-safe.
 * Errors        null or misaligned pointers, sizes < 0, num_cols = 0.
 */
typedef struct dspark_gather_rows_params {
  uint32_t struct_size;
  dspark_dtype dtype;
  int32_t num_rows;
  int32_t num_cols;
  int32_t num_src_rows;
  const void* src;
  const int32_t* index; /* may be NULL */
  void* out;
  int64_t stride_src_row;
  int64_t stride_out_row;
} dspark_gather_rows_params;
#define DSPARK_GATHER_ROWS_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_gather_rows_params)
dspark_status DSPARK_FN(dspark_gather_rows)(const dspark_gather_rows_params* params,
                                            dspark_stream stream);

/*
 * Computes      out = silu(gate) * up, with gate_up = [gate | up] along the columns.
 * Shapes        gate_up [num_rows, 2 * ffn_size]; out [num_rows, ffn_size].
 * Dtypes        `dtype` (BF16, F16); f32 inside.
 * Layout        rows contiguous, row strides given.
 * Alignment     pointers 16 bytes, strides and ffn_size multiples of 8.
 * Aliasing      none allowed.
 * Workspace     none.
 * Determinism   bitwise.
 * Stream/graph  capture-safe.
 * Errors        null or misaligned pointers, sizes < 0, ffn_size = 0 or not a multiple of 8.
 */
typedef struct dspark_silu_mul_params {
  uint32_t struct_size;
  dspark_dtype dtype;
  int32_t num_rows;
  int32_t ffn_size;
  const void* gate_up;
  void* out;
  int64_t stride_gate_up_row;
  int64_t stride_out_row;
} dspark_silu_mul_params;
#define DSPARK_SILU_MUL_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_silu_mul_params)
dspark_status DSPARK_FN(dspark_silu_mul)(const dspark_silu_mul_params* params,
                                         dspark_stream stream);

/* ------------------------------------------------------------------------------------------------
 * rope
 * --------------------------------------------------------------------------------------------- */

/*
 * Computes      per head of q and k: optional RMSNorm over head_dim, then rotate-half RoPE at
 *               positions[row]: angle = positions[row] * inv_freq[i] in f32, pairs (i, i +
 *               head_dim/2), scaled by rope_scale. q goes to q_out; k (rotated) and v (as they
 *               are) go to the paged cache at slot seq_lens[r] + (row - qo_indptr[r]) of request
 *               r, or to k_out/v_out, or both. Into an E4M3 cache goes the number nearest to x /
 *               scale (of two the even one, at most 448 in size), x as k_out/v_out hold it.
 * Shapes        qkv [num_rows, (num_q_heads + 2 * num_kv_heads) * head_dim] = [q | k | v];
 *               q_norm, k_norm [head_dim]; q_out [num_rows, num_q_heads * head_dim]; k_out, v_out
 *               [num_rows, num_kv_heads * head_dim]; k_cache, v_cache [num_pages, page_size,
 *               num_kv_heads, head_dim]; page_table [num_reqs, max_pages_per_req].
 * Dtypes        activations: `dtype` (BF16, F16); the cache the same, or E4M3 (kv_dtype) with a
 *               factor per KV head: k_scale, v_scale f32 [num_kv_heads], finite and above 0
 *               (they lie on the device and are not looked at); inv_freq f32 [head_dim/2]; ints
 *               int32.
 * Layout        qkv, q_out, k_out, v_out by row stride; cache by stride_cache_{page,slot,head}.
 * Alignment     pointers and strides 16 bytes; head_dim in {64, 128, 256}.
 * Aliasing      none allowed between inputs and outputs.
 * Workspace     none.
 * Determinism   bitwise, independent of the batch.
 * Stream/graph  capture-safe. Rows at or beyond qo_indptr[num_reqs] (padding) are skipped. A slot
 *               whose page id is negative, or past max_pages_per_req, is not written.
 * Errors        null or misaligned pointers, unsupported head_dim, page_size = 0, sizes < 0, an
 *               unknown kv_dtype, E4M3 without both scales, scales without E4M3.
 */
typedef struct dspark_qk_norm_rope_append_params {
  uint32_t struct_size;
  dspark_dtype dtype;
  int32_t num_rows; /* bound on the rows of this pass */
  int32_t num_reqs;
  int32_t num_q_heads; /* 0: qkv holds [k | v] only and q_out is not written */
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t page_size;
  int32_t max_pages_per_req;
  float eps;        /* of the norms */
  float rope_scale; /* multiplies cos and sin; 1 unless the rope type scales attention */
  const void* qkv;
  const void* q_norm; /* may be NULL: no norm on q */
  const void* k_norm; /* may be NULL: no norm on k */
  const float* inv_freq;
  const int32_t* positions;  /* [num_rows] */
  const int32_t* qo_indptr;  /* [num_reqs + 1] */
  const int32_t* seq_lens;   /* [num_reqs]; entries of this cache before the pass; may be NULL when
                               k_cache is NULL */
  const int32_t* page_table; /* may be NULL when k_cache is NULL; then page_size is not read */
  void* q_out;               /* may be NULL when num_q_heads is 0 */
  void* k_cache;             /* may be NULL (with v_cache): nothing is appended */
  void* v_cache;
  void* k_out; /* may be NULL (with v_out) */
  void* v_out;
  int64_t stride_qkv_row;
  int64_t stride_q_out_row;
  int64_t stride_kv_out_row; /* of k_out and v_out */
  int64_t stride_cache_page;
  int64_t stride_cache_slot;
  int64_t stride_cache_head;
  /* 0 and NULL in the struct of a caller that ends before them */
  dspark_dtype kv_dtype; /* of k_cache, v_cache: 0 (as `dtype`), `dtype` or E4M3 */
  int32_t reserved;      /* 0 */
  const float* k_scale;  /* [num_kv_heads], E4M3 only: k_cache = K / k_scale */
  const float* v_scale;
} dspark_qk_norm_rope_append_params;
#define DSPARK_QK_NORM_ROPE_APPEND_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_qk_norm_rope_append_params)
dspark_status DSPARK_FN(dspark_qk_norm_rope_append)(const dspark_qk_norm_rope_append_params* params,
                                                    dspark_stream stream);

/* ------------------------------------------------------------------------------------------------
 * attention
 * --------------------------------------------------------------------------------------------- */

/*
 * dspark_verify_attention:  causal attention of the rows of every request over its paged KV
 *                           cache.
 * dspark_draft_attention:   the drafter's block form: every row sees the committed cache and the
 *                           whole block of its own request (k_block, v_block), in both
 *                           directions.
 *
 * Computes      out[row, h] = softmax(cap(scale * q[row, h] . K)) V over the visible keys of request
 *               r; cap(s) = softcap * tanh(s / softcap), or s when softcap is 0. Row i of r is row
 *               qo_indptr[r] + i. verify: cache slots 0 .. seq_lens[r] + i, the pass's own rows
 *               already appended. verify with tree_mask: slots 0 .. seq_lens[r]-1, and seq_lens[r] +
 *               j for every row j whose bit is set in the row's 64-bit mask (word 0 is the low one)
 *               and for the row itself. draft: slots 0 .. seq_lens[r]-1 and all block rows of r.
 *               window > 0: of the cache, only slots > seq_lens[r] + n - window, with n = i, or the
 *               number of ancestors in a tree; block rows are seen whole.
 * Shapes        q, out [num_rows, num_q_heads, head_dim]; k_cache, v_cache [num_pages, page_size,
 *               num_kv_heads, head_dim]; k_block, v_block [num_rows, num_kv_heads, head_dim];
 *               page_table [num_reqs, max_pages_per_req] int32; tree_mask [num_rows, 2].
 * Dtypes        `dtype` (BF16, F16); the cache of dspark_verify_attention also E4M3 (kv_dtype), with
 *               a factor per KV head: q and the probabilities then meet it in f16, q cut at +-65504;
 *               scores, softmax and accumulation f32; tree_mask uint32.
 * Layout        NHD: head_dim contiguous; q and out heads contiguous (head stride head_dim), row
 *               strides given; cache by stride_cache_{page,slot,head}; k_block/v_block heads
 *               contiguous, row stride given.
 * Alignment     pointers and strides 16 bytes; head_dim in {64, 128, 256}; num_q_heads a multiple of
 *               num_kv_heads, group size 1..16; any page_size >= 1 (multiples of 16 are read fastest
 *               on sm_90). With tree_mask at most 64 rows a request, and a window of 0 or at least
 *               64.
 * Aliasing      none allowed.
 * Workspace     dspark_attention_workspace_size bytes, 256-byte aligned; contents do not matter. It
 *               depends on the current device; for decode steps not on the context.
 * Determinism   bitwise from run to run for the same params and lengths; on sm_90, with pages of a
 *               multiple of 16, also for other bounds max_seq_len. With batch_invariant = 1 a
 *               request's result is bitwise independent of the other requests and of the bounds in
 *               the params; otherwise the work is cut evenly over the batch, which is faster.
 * Stream/graph  capture-safe; replays for any lengths up to max_seq_len. Requests without rows cost
 *               nothing; rows past qo_indptr[num_reqs] are not written. May be two launches, the
 *               second overlapping the first's end; work enqueued later waits for both.
 * Errors        null or misaligned pointers, unsupported head_dim or group size, page_size = 0,
 *               workspace too small, sizes < 0, softcap < 0 or not finite, tree_mask in the draft
 *               form, too many rows or too small a window for a tree.
 */
typedef struct dspark_attention_params {
  uint32_t struct_size;
  dspark_dtype dtype;
  int32_t num_rows; /* bound on the rows of this pass */
  int32_t num_reqs;
  int32_t max_rows_per_req; /* bound on qo_indptr[r+1] - qo_indptr[r] */
  int32_t max_seq_len;      /* bound on the keys of any request, the pass's own rows included */
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t page_size;
  int32_t max_pages_per_req;
  float scale;
  const void* q;
  const void* k_cache;
  const void* v_cache;
  const void* k_block; /* draft only; NULL for verify */
  const void* v_block;
  const int32_t* qo_indptr;
  const int32_t* seq_lens;
  const int32_t* page_table;
  void* out;
  void* workspace; /* may be NULL when workspace_bytes is 0 and the size function says 0 */
  size_t workspace_bytes;
  int64_t stride_q_row;
  int64_t stride_out_row;
  int64_t stride_cache_page;
  int64_t stride_cache_slot;
  int64_t stride_cache_head;
  int64_t stride_block_row;
  /* 0 and NULL in the struct of a caller that ends before them */
  const uint32_t* tree_mask; /* [num_rows, 2]; may be NULL: chains. Verify only */
  int32_t window;            /* 0: none */
  float softcap;             /* 0: none */
  int32_t batch_invariant;   /* 0 or 1 */
  dspark_dtype kv_dtype;     /* of k_cache, v_cache: 0 (as `dtype`) or E4M3 */
  const float* k_scale;      /* [num_kv_heads], E4M3 only: K = k_scale * k_cache; may be NULL: 1 */
  const float* v_scale;
} dspark_attention_params;
#define DSPARK_ATTENTION_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_attention_params)
/* Host. Bytes of workspace that the launch with these params needs; reads only sizes, no pointer.
 */
dspark_status DSPARK_FN(dspark_attention_workspace_size)(const dspark_attention_params* params,
                                                         size_t* bytes);
dspark_status DSPARK_FN(dspark_verify_attention)(const dspark_attention_params* params,
                                                 dspark_stream stream);
dspark_status DSPARK_FN(dspark_draft_attention)(const dspark_attention_params* params,
                                                dspark_stream stream);

/*
 * Computes      after a tree was accepted: the cache slots of the accepted rows move together. With
 *               row_1 < row_2 < .. the rows 1 + j whose accept_flags[r, j] is not 0: slot seq_lens[r]
 *               + i = slot seq_lens[r] + row_i, K and V, in every layer; i = 1, 2 .. Slot seq_lens[r],
 *               the anchor's, stays. seq_lens as in the attention, before the commit.
 * Shapes        accept_flags [num_reqs, draft_len]; seq_lens [num_reqs]; page_table [num_reqs,
 *               max_pages_per_req]; k_cache, v_cache [num_layers, num_pages, page_size, num_kv_heads,
 *               head_dim].
 * Dtypes        cache kv_dtype (BF16, F16, E4M3); ints int32.
 * Layout        cache by stride_cache_{layer,page,slot,head}, head_dim contiguous.
 * Alignment     cache pointers and strides 16 bytes; head_dim in {64, 128, 256}; draft_len <= 63.
 * Aliasing      in place.
 * Workspace     none.
 * Determinism   bitwise.
 * Stream/graph  capture-safe. Slots whose page id is negative, or past max_pages_per_req, are
 *               neither read nor written.
 * Errors        null or misaligned pointers, unknown kv_dtype, unsupported head_dim, page_size = 0,
 *               sizes < 0, draft_len > 63.
 */
typedef struct dspark_commit_tree_params {
  uint32_t struct_size;
  dspark_dtype kv_dtype;
  int32_t num_reqs;
  int32_t num_layers;
  int32_t draft_len;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t page_size;
  int32_t max_pages_per_req;
  int32_t reserved; /* 0 */
  const int32_t* accept_flags;
  const int32_t* seq_lens;
  const int32_t* page_table;
  void* k_cache;
  void* v_cache;
  int64_t stride_cache_layer;
  int64_t stride_cache_page;
  int64_t stride_cache_slot;
  int64_t stride_cache_head;
} dspark_commit_tree_params;
#define DSPARK_COMMIT_TREE_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_commit_tree_params)
dspark_status DSPARK_FN(dspark_commit_tree)(const dspark_commit_tree_params* params,
                                            dspark_stream stream);

/* ------------------------------------------------------------------------------------------------
 * draft: the semi-autoregressive head
 * --------------------------------------------------------------------------------------------- */

/* How drafts are accepted at temperature > 0: see dspark_accept. */
typedef int32_t dspark_rule;
#define DSPARK_RULE_TOKEN 0
#define DSPARK_RULE_BLOCK 1
#define DSPARK_RULE_COUPLED 2

/* Purposes keep the uses of randomness apart: no two draws of a request share a Philox counter, but
 * for the coupled rule, whose drafts share the noise of the target's token on purpose. */
#define DSPARK_PURPOSE_DRAFT 1
#define DSPARK_PURPOSE_ACCEPT 2
#define DSPARK_PURPOSE_RESIDUAL 3
#define DSPARK_PURPOSE_BONUS 4

/*
 * Words W(a, b) of a draw are those of Philox4x32-10 with key = seeds[r] and counter = (a, position,
 * purpose, b). Tokens are cut into zones of 64.
 *
 * The noise of drafts and of the coupled rule: u = (word + 0.5) * 2^-32, E(word) = -log1p(-u). The
 * zone z of v has the minimum m = E(W(z / 4, 1)[z % 4]) / 64 at its token W(z, 3).x % 64; that one
 * has E_v = m, all others E_v = m + E(W(v / 4, 0)[v % 4]). These are independent exponentials of rate
 * 1, and the token drawn is the argmin of E_v / weight(v).
 *
 * Draws that share their noise with nobody (bonus and recovered tokens of the other rules) invert the
 * distribution function: draw n takes U(W(n, 2).x, W(n, 2).y) for a strip of 256 tokens and U(W(n,
 * 2).z, W(n, 2).w) for the token among the strip's, U(a, b) = (a * 2^20 + floor(b / 2^12) + 0.5) *
 * 2^-52: the first at which the running sum of weights passes U times their whole.
 */

typedef int32_t dspark_head_kind;
#define DSPARK_HEAD_NONE 0 /* no bias: DFlash; the draft is sampled from the base logits */
#define DSPARK_HEAD_VANILLA 1
#define DSPARK_HEAD_GATED 2
#define DSPARK_HEAD_RNN 3

/*
 * Computes      the head over the whole vocabulary, the base logits left as they are. For k = 1 ..
 *               draft_lens[r], left to right, x_0 = anchor: the Markov bias B_k of the head (gated
 *               and rnn use h_k), l_k(v) = U_k(v) + B_k(v), -inf where mask forbids v; x_k from
 *               softmax(l_k / temperature), or argmax l_k (lowest index wins) at temperature 0;
 *               confidence_k = sigmoid(w . [h_k ; W1[x_{k-1}]] + b), or of h_k alone.
 *               The draft law handed on: q_k(v) = exp(l_k(v) / temperature - log_normalizers[k]),
 *               log_normalizer = ln sum_v exp(l_k(v) / temperature) (of exp(l_k) at temperature 0),
 *               l_k(v) = U_k(v) + W2[v] . latents[k] (fp8: U + dot * w2_scales[v]) by
 *               cuda/common/low_rank_logit.cuh, bit for bit what was drawn from.
 * Shapes        logits [num_reqs * draft_len, vocab_size] = U; hidden [num_reqs * draft_len,
 *               hidden_size]; markov_w1, markov_w2 [vocab_size, markov_rank]; w2_scales
 *               [vocab_size]; gated: proj_weight [markov_rank, hidden_size + markov_rank] over [h ;
 *               w1], proj_bias [markov_rank]; rnn: proj_weight [3 * markov_rank, 2 * markov_rank +
 *               hidden_size] over [s ; w1 ; h], proj_bias [3 * markov_rank] = [g ; c ; o];
 *               confidence_weight [hidden_size (+ markov_rank)]; latents [num_reqs * draft_len,
 *               markov_rank]; log_normalizers, draft_tokens, confidence, confidence_logits
 *               [num_reqs, draft_len]; mask [num_reqs * draft_len, ceil(vocab_size / 32)], bit
 *               v % 32 of word v / 32 set where token v is allowed.
 * Dtypes        logits `logits_dtype` (F32, BF16); hidden, weights and biases `dtype` (BF16, F16);
 *               markov_w2 `w2_dtype`: `dtype`, or E4M3 with f32 w2_scales. latents `dtype`, with
 *               fp8 F16: vanilla W1[x_{k-1}] (fp8: as F16, limited to its range), gated and rnn
 *               their latent rounded once. Products exact, sums f32; normalisers to 1e-6.
 * Skipping      with w2_bounds (dspark_draft_bounds; not for HEAD_NONE) every request must be greedy
 *               or coupled: its drafts are the same, bit for bit, and rows of W2 that cannot win are
 *               not read. No law is handed on (log_normalizers NaN); a request that is neither gets
 *               token 0. rows_read[r]: how many rows of W2 were read for r in all steps, the one
 *               figure that may differ from run to run.
 * Layout        logits row stride given; everything else contiguous. Columns from draft_lens[r] on
 *               are not written.
 * Alignment     markov_w1, markov_w2, latents, w2_bounds, w2_basis 16 bytes; markov_rank a multiple of
 *               16, at most 256 (fill up with zeros). logits at 16 bytes with rows of a multiple of 16 bytes are read fastest.
 * Aliasing      none allowed.
 * Workspace     dspark_draft_full_workspace_size bytes, 256-byte aligned; contents do not matter.
 * Determinism   bitwise per device, independent of the batch. Draws of a row with temperature > 0
 *               and without the coupled rule, purpose DRAFT: the vocabulary is cut into spans of 64
 *               tokens; span j has the weight w_j = sum exp(l / temperature) and arrives at
 *               E(W(j, 2).x) / w_j; in the one that arrives first the token is the first whose
 *               running sum of weights exceeds u w_j, u from W(j, 2).y. COUPLED: the race over
 *               tokens above with purpose BONUS. Position anchor_positions[r] + k.
 * Stream/graph  capture-safe; a cooperative launch for each 128 requests, one more before it for
 *               gated and rnn and one for skipping. A row of NaN or all -inf (also: all
 *               forbidden) yields token 0; its normaliser is NaN or -inf.
 * Errors        null pointers, unknown head, sizes < 0, draft_len > 16, markov_rank out of range or
 *               not a multiple of 16, workspace too small; UNSUPPORTED_DEVICE where a CTA of the
 *               launch does not fit (about 100 KB of shared memory) or cannot be cooperative.
 */
typedef struct dspark_draft_full_params {
  uint32_t struct_size;
  dspark_dtype dtype;
  dspark_dtype logits_dtype;
  dspark_dtype w2_dtype;
  dspark_head_kind head;
  int32_t num_reqs;
  int32_t draft_len;
  int32_t vocab_size;
  int32_t hidden_size;
  int32_t markov_rank;
  int32_t confidence_with_markov; /* 0 or 1 */
  float confidence_bias;
  const void* logits;
  const void* hidden;            /* may be NULL for HEAD_NONE and HEAD_VANILLA without confidence */
  const void* markov_w1;         /* NULL for HEAD_NONE */
  const void* markov_w2;         /* NULL for HEAD_NONE */
  const float* w2_scales;        /* fp8 */
  const void* proj_weight;       /* gated, rnn */
  const void* proj_bias;         /* gated, rnn */
  const void* confidence_weight; /* may be NULL: no confidence is computed */
  const int32_t* anchors;        /* [num_reqs]; may be NULL for HEAD_NONE */
  const int32_t* anchor_positions; /* [num_reqs] */
  const int32_t* draft_lens;       /* [num_reqs] 0 .. draft_len; may be NULL: all draft_len */
  const float* temperature;        /* [num_reqs] */
  const uint64_t* seeds;           /* [num_reqs] */
  const int32_t* rules;            /* [num_reqs] DSPARK_RULE_*; may be NULL: none is coupled */
  const int32_t* mask;             /* may be NULL: everything is allowed */
  int32_t* draft_tokens;
  float* log_normalizers;
  void* latents;            /* NULL for HEAD_NONE */
  float* confidence;        /* may be NULL when confidence_weight is NULL */
  float* confidence_logits; /* ln(c / (1 - c)); may be NULL */
  void* workspace;
  size_t workspace_bytes;
  int64_t stride_logits_row;
  const float* w2_bounds; /* [vocab_size, 4]: rows that cannot win are not read; NULL: all are */
  const float* w2_basis;  /* [3, markov_rank], with w2_bounds */
  uint64_t* rows_read;    /* [num_reqs], with w2_bounds; may be NULL */
} dspark_draft_full_params;
#define DSPARK_DRAFT_FULL_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_draft_full_params)
/* Host. Reads only sizes (of the current device, too). */
dspark_status DSPARK_FN(dspark_draft_full_workspace_size)(const dspark_draft_full_params* params,
                                                          size_t* bytes);
dspark_status DSPARK_FN(dspark_draft_full)(const dspark_draft_full_params* params,
                                           dspark_stream stream);

/*
 * Computes      bounds[v] of each row w of W2 (fp8: its scale included): w . e_i for the directions
 *               e_0 .. e_2 of basis, and the length of the rest, rounded up generously. For any
 *               latent x the bias of token v is at most the sum over i of (w . e_i)(e_i . x) plus
 *               the lengths of both rests (kernels/draft/skip_bound.cuh). Once, when weights are loaded.
 * Shapes        markov_w2 [vocab_size, markov_rank]; w2_scales [vocab_size]; basis [3,
 *               markov_rank], orthonormal to 1e-5 (zeros for directions that are not there): the
 *               closer the rows are to their span, the more is skipped; bounds [vocab_size, 4].
 * Dtypes        markov_w2 `w2_dtype` (BF16, F16, E4M3 with f32 w2_scales); basis, bounds f32.
 * Layout        contiguous.
 * Alignment     16 bytes; markov_rank a multiple of 16, at most 256.
 * Aliasing      none allowed.
 * Workspace     none.
 * Determinism   bitwise per device.
 * Stream/graph  capture-safe.
 * Errors        null or misaligned pointers, sizes < 1, markov_rank out of range, unknown dtype.
 */
typedef struct dspark_draft_bounds_params {
  uint32_t struct_size;
  dspark_dtype w2_dtype;
  int32_t vocab_size;
  int32_t markov_rank;
  const void* markov_w2;
  const float* w2_scales; /* fp8 */
  const float* basis;
  float* bounds;
} dspark_draft_bounds_params;
#define DSPARK_DRAFT_BOUNDS_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_draft_bounds_params)
dspark_status DSPARK_FN(dspark_draft_bounds)(const dspark_draft_bounds_params* params,
                                             dspark_stream stream);

/*
 * Computes      the head over a candidate set, with q truncated to it (lossless: the pairs are the
 *               law sampled from). For k = 1..draft_len, left to right, x_0 = anchor: C_k = the
 *               num_top largest of U_k (ties: lowest index), joined with the tokens of
 *               bigram_tokens[x_{k-1}]; l_k(v) = U_k(v) + B_k(v) on C_k; x_k sampled from
 *               softmax(l_k / temperature) over C_k by the race over tokens above, position
 *               anchor_positions[r] + k, purpose DRAFT, or BONUS where rules[r] is COUPLED, or argmax
 *               l_k (lowest index wins) at temperature 0; confidence_k as in dspark_draft_full. A
 *               row of NaN or all -inf is a step without candidates. Above temperature 0 the law on C_k is first cut down by the request's top_k, top_p and min_p, as the
 *               target's is in dspark_accept: what is cut has the logit -inf.
 * Shapes        as dspark_draft_full; bigram_tokens [vocab_size, num_bigram], each token at most
 *               once per row, negative: none; candidate_tokens, candidate_logits [num_reqs *
 *               draft_len, num_top + num_bigram]: first the top, by falling U, then the bigrams.
 *               A pair that is missing (a logit of U that is NaN or -inf, a token that mask
 *               forbids or that is already among the top) is (-1, -inf). The top is found among
 *               what is allowed.
 * Dtypes        logits `logits_dtype` (F32, BF16); hidden, weights and biases `dtype` (BF16, F16);
 *               candidate_logits f32; tokens int32. Latents, products and sums f32.
 * Layout        logits row stride given; everything else contiguous.
 * Alignment     element alignment of pointers; 16 bytes, stride_logits_row a multiple of 4 and
 *               markov_rank of 8 give the fast path. num_top 1 .. 256; num_bigram 0 .. 256;
 *               markov_rank <= 1024; vocab_size <= 2^18.
 * Aliasing      none allowed. The logits are not written.
 * Workspace     dspark_draft_candidates_workspace_size bytes, 256-byte aligned; contents do not
 *               matter.
 * Determinism   bitwise, independent of the batch.
 * Stream/graph  capture-safe. A step without candidates yields token 0 and no pair.
 * Errors        null pointers, unknown head, sizes < 0 or out of range, num_bigram with
 *               DSPARK_HEAD_NONE, workspace too small.
 */
typedef struct dspark_draft_candidates_params {
  uint32_t struct_size;
  dspark_dtype dtype;
  dspark_dtype logits_dtype;
  dspark_head_kind head;
  int32_t num_reqs;
  int32_t draft_len;
  int32_t vocab_size;
  int32_t hidden_size;
  int32_t markov_rank;
  int32_t num_top;
  int32_t num_bigram;
  int32_t confidence_with_markov; /* 0 or 1 */
  float confidence_bias;
  const void* logits;
  const void* hidden;            /* may be NULL for HEAD_NONE and HEAD_VANILLA without confidence */
  const void* markov_w1;         /* NULL for HEAD_NONE */
  const void* markov_w2;         /* NULL for HEAD_NONE */
  const void* proj_weight;       /* gated, rnn */
  const void* proj_bias;         /* gated, rnn */
  const void* confidence_weight; /* may be NULL: no confidence is computed */
  const int32_t* bigram_tokens;  /* may be NULL when num_bigram is 0 */
  const int32_t* anchors;        /* [num_reqs]; may be NULL for HEAD_NONE */
  const int32_t* anchor_positions; /* [num_reqs] */
  const float* temperature;        /* [num_reqs] */
  const uint64_t* seeds;           /* [num_reqs] */
  int32_t* draft_tokens;
  float* confidence; /* may be NULL when confidence_weight is NULL */
  int32_t* candidate_tokens;
  float* candidate_logits;
  void* workspace;
  size_t workspace_bytes;
  int64_t stride_logits_row;
  const int32_t* rules; /* [num_reqs] DSPARK_RULE_*; may be NULL: none is coupled */
  const int32_t* mask;  /* may be NULL: everything is allowed */
  /* NULL in the struct of a caller that ends before them; [num_reqs] each, NULL: off */
  const int32_t* top_k; /* 0 = off */
  const float* top_p;   /* 1 = off */
  const float* min_p;   /* 0 = off */
} dspark_draft_candidates_params;
#define DSPARK_DRAFT_CANDIDATES_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_draft_candidates_params)
/* Host. Reads only sizes. */
dspark_status DSPARK_FN(dspark_draft_candidates_workspace_size)(
    const dspark_draft_candidates_params* params, size_t* bytes);
dspark_status DSPARK_FN(dspark_draft_candidates)(const dspark_draft_candidates_params* params,
                                                 dspark_stream stream);

/* ------------------------------------------------------------------------------------------------
 * schedule
 * --------------------------------------------------------------------------------------------- */

/*
 * Computes      survival[r, k] = prod over i <= k of sigmoid(logit(confidence[r, i]) /
 *               temperature[i]).
 * Shapes        confidence, survival [num_reqs, draft_len]; temperature [draft_len].
 * Dtypes        f32.
 * Layout        contiguous.
 * Alignment     4 bytes.
 * Aliasing      survival may be confidence.
 * Workspace     none.
 * Determinism   bitwise, independent of the batch. A confidence that is NaN counts as 0; others
 *               are clamped to [0, 1].
 * Stream/graph  capture-safe.
 * Errors        null pointers, sizes < 0.
 */
typedef struct dspark_survival_params {
  uint32_t struct_size;
  int32_t num_reqs;
  int32_t draft_len;
  const float* confidence;
  const float* temperature; /* may be NULL: all 1 (uncalibrated) */
  float* survival;
} dspark_survival_params;
#define DSPARK_SURVIVAL_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_survival_params)
dspark_status DSPARK_FN(dspark_survival)(const dspark_survival_params* params,
                                         dspark_stream stream);

/* Rules of dspark_schedule. */
#define DSPARK_SCHEDULE_FIRST_FALL 0 /* Algorithm 1: until throughput first falls */
#define DSPARK_SCHEDULE_CAPACITY 1   /* as many drafts as `capacity` says */
#define DSPARK_SCHEDULE_BEST 2       /* the best number by this step's confidences: peeks */

/*
 * Computes      verify_lens: how many drafts of each request are verified. Survivals are the running
 *               products, left to right, of the calibrated confidences, rounded to 1 / 65535.
 *               Drafts below limits with a survival above 0 are ranked by survival, largest first,
 *               ties by request, then position; the first n of the ranking are admitted. With n
 *               drafts the step commits tau(n) = requests + sum of survivals and costs ticks[n].
 *               FIRST_FALL: n grows while tau(n + 1) * ticks[n] > (tau(n) + tau(n) / (100 *
 *               requests)) * ticks[n + 1]. BEST: the smallest n of the largest tau(n) / ticks[n], 0
 *               unless tau(n) * ticks[0] > 1.01 * tau(0) * ticks[n]. CAPACITY: capacity[0] drafts
 *               made for capacity[1] requests, scaled to this step's. FIRST_FALL, where n > 0, and
 *               CAPACITY, where capacity[0] > 0, then take all drafts that ticks prices no higher
 *               than n (the rest of a graph bucket).
 *               best: the n of BEST whatever the rule, and the number of requests: the capacity of
 *               the step after the next.
 * Shapes        confidence [num_reqs, draft_len]; temperature [draft_len]; limits, verify_lens
 *               [num_reqs]; ticks [num_reqs * draft_len + 1]; capacity, best [2]; num_live [1].
 * Dtypes        f32; ticks uint32, 1 to 2^30, not falling; the rest int32.
 * Layout        contiguous.
 * Alignment     4 bytes.
 * Aliasing      none, but that best may be capacity.
 * Workspace     none.
 * Determinism   bitwise, and that of the host (dspark::schedule::Ranking): calibration is rounded
 *               operation by operation, all sums and comparisons are of integers.
 * Stream/graph  capture-safe. One launch: one CTA, or a cluster of eight where sm_90 has
 *               them and there is much to rank.
 * Errors        null pointers, sizes < 0, num_reqs > 8192, num_reqs * draft_len > 16384, a rule that
 *               is none, CAPACITY without capacity.
 */
typedef struct dspark_schedule_params {
  uint32_t struct_size;
  int32_t num_reqs; /* bound */
  int32_t draft_len;
  int32_t rule;
  const float* confidence;
  const float* temperature; /* may be NULL: all 1 */
  const int32_t* limits;    /* may be NULL: draft_len */
  const int32_t* num_live;  /* may be NULL: num_reqs; requests from it on are padding, 0 drafts */
  const uint32_t* ticks;
  const int32_t* capacity; /* may be NULL unless the rule is CAPACITY */
  int32_t* best;           /* may be NULL */
  int32_t* verify_lens;
} dspark_schedule_params;
#define DSPARK_SCHEDULE_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_schedule_params)
dspark_status DSPARK_FN(dspark_schedule)(const dspark_schedule_params* params,
                                         dspark_stream stream);

/* ------------------------------------------------------------------------------------------------
 * verify: target law and acceptance
 * --------------------------------------------------------------------------------------------- */

/*
 * Computes      for each request with 1 + verify_len rows of target logits: the target law p of
 *               each row, the accepted drafts, and the next token.
 * Target law    of the logits l of a row, each step off when its array is NULL or its value says
 *               so, in this order and in single f32 operations: tokens listed in edits with count
 *               >= 0: l = l > 0 ? l / repetition : l * repetition; with count c > 0:
 *               l -= frequency * c, l -= presence; all listed: l += bias; l = -inf where the mask
 *               has 0. A draft before the row counts once more for each time it came. Then
 *               softmax(l / temperature); top-k keeps every token whose l is at least the k-th
 *               largest; top-p keeps the smallest set {v : p(v) >= t} whose mass (renormalised
 *               after top-k) is at least top_p; min-p keeps p(v) >= min_p * max p. Ties at a
 *               threshold are all kept.
 * Draft law     q of draft k of request r, row r * draft_len + k: softmax(draft_logits /
 *               temperature) when draft_logits is given, each with W2[v] . latent added when
 *               draft_markov_w2 is (dspark_draft_full: a low-rank law, one row of W2 for each token
 *               looked at; all of W2 for each row under BLOCK or behind 1024 tries), -inf where
 *               draft_mask has 0; both need draft_log_normalizers; else softmax(candidate_logits /
 *               temperature) over num_candidates tokens when candidate_tokens is given; else the
 *               point mass on the draft. Draft rows without a law (NaN, +inf, nothing) count as
 *               point masses.
 * Rules         temperature 0: accept x iff x = argmax (lowest index wins), next is the argmax of
 *               the last row reached. Above 0 by rules[r]. TOKEN: accept x if u * q(x) < p(x),
 *               else p becomes normalise(max(p - q, 0)) for the next sibling and, in the end, the
 *               law of the next token. BLOCK (chains): Sun et al. 2024: ratio_i = min(1,
 *               ratio_{i-1} p(x_i) / q(x_i)); prefix i passes if u_i < S_i / (S_i + 1 - ratio_i),
 *               S_i = sum of max(ratio_i p - q, 0) after it (i = verify_len: u_i < ratio_i); the
 *               longest that passes is kept, next is drawn from max(ratio_i p - q, 0), or p after
 *               all drafts. COUPLED: the token behind a row is the draw from p with the noise of
 *               purpose BONUS; accept x iff it is x. A draft that is a stop token of its request
 *               ends the run: it is the next token then.
 * Shapes        target_logits [num_rows, vocab_size]; draft_logits [num_reqs * draft_len,
 *               vocab_size]; draft_mask as mask by draft row; candidates [num_reqs * draft_len,
 *               num_candidates]; draft_tokens,
 *               parents, accept_flags [num_reqs, draft_len]; mask [num_rows, ceil(vocab_size /
 *               32)], bit v % 32 of word v / 32; edits of request r at edit_indptr[r] ..
 *               edit_indptr[r+1]-1, ascending by token, each once; logprobs [num_reqs, draft_len +
 *               1], top_tokens, top_logprobs [num_reqs, draft_len + 1, num_top_logprobs]; the rest
 *               [num_reqs].
 * Log-probs     entry i: ln p of committed token i (accepted drafts, then next) under its row's
 *               law, of temperature 1 where the temperature is 0; the likeliest tokens descending,
 *               equals by index; -1 and -inf where there are none.
 * Dtypes        target_logits, draft_logits F32, BF16 or F16; W2 BF16, F16 or E4M3, latents of
 *               its type, F16 with E4M3; the rest f32 and int32. Laws in f32, sums by trees.
 * Layout        logits row strides given; the rest contiguous.
 * Alignment     element alignment; rows at multiples of 16 bytes are read with 16-byte accesses; W2
 *               and latents 16 bytes, draft_markov_rank a multiple of 16, at most 256.
 * Aliasing      none allowed. target_logits are not changed.
 * Workspace     dspark_accept_workspace_size bytes, 256-byte aligned; contents do not matter.
 * Determinism   bitwise, independent of the batch. Row k of request r decides position
 *               anchor_positions[r] + 1 + (depth of the row). u of the j-th sibling (0 in chains)
 *               = (x + 0.5) * 2^-32, x = W(j, 0).x with purpose ACCEPT at the draft's position.
 *               Without a rejection the next token is draw 0 of purpose BONUS. Behind one it is the
 *               first of the draws n = 0 .. N - 1 from p of purpose RESIDUAL that is kept: u * ratio
 *               p(v) < ratio p(v) - q(v) with the u of W(n, 0).x; when none is, or behind several, it
 *               is draw N from the residual itself, or from p where rounding has left nothing of it.
 *               N = 64, 1024 with a low-rank law.
 * Stream/graph  capture-safe; two launches, one more if any of top_k, top_p, min_p is given, one
 *               more for log-probs. Requests without rows get num_accepted 0, next_tokens -1,
 *               status 0. status[r] = 1 when a needed row holds NaN, +inf or only -inf (block: any
 *               row): then num_accepted 0 and next_tokens -1; other requests are not touched.
 * Errors        null pointers, sizes < 0, vocab_size 0 or > 2^21, draft_len > 64, num_candidates >
 *               256, num_top_logprobs > 20, unknown dtypes, workspace too small.
 */
typedef struct dspark_accept_params {
  uint32_t struct_size;
  dspark_dtype target_dtype;
  dspark_dtype draft_dtype; /* of draft_logits */
  int32_t num_rows;         /* bound */
  int32_t num_reqs;
  int32_t draft_len; /* columns of draft_tokens; >= every verify_len */
  int32_t vocab_size;
  int32_t num_candidates;   /* pairs of a sparse draft law; 0 without one */
  int32_t num_top_logprobs; /* read when logprobs is given */
  const void* target_logits;
  const void* draft_logits;           /* may be NULL */
  const float* draft_log_normalizers; /* ln sum exp(l / temperature) of each row of draft_logits;
                                         may be NULL: they are computed, which reads all rows */
  const int32_t* candidate_tokens;    /* each once per draft; negative: no pair; may be NULL */
  const float* candidate_logits;      /* may be NULL with candidate_tokens */
  const int32_t* draft_tokens;        /* may be NULL when draft_len is 0 */
  const int32_t* parents;   /* row that each draft follows: 0 the anchor's, else 1 + a lower
                                         draft; siblings are tried in order; may be NULL: chains */
  const int32_t* qo_indptr; /* [num_reqs + 1] rows of each request: 0 or 1 + verify_len */
  const int32_t* anchor_positions;
  const float* temperature;
  const int32_t* top_k; /* 0 = off; may be NULL */
  const float* top_p;   /* 1 = off; may be NULL */
  const float* min_p;   /* 0 = off; may be NULL */
  const int32_t* rules; /* may be NULL: TOKEN */
  const uint64_t* seeds;
  const float* repetition_penalty; /* 1 = off; may be NULL */
  const float* presence_penalty;   /* 0 = off; may be NULL */
  const float* frequency_penalty;  /* 0 = off; may be NULL */
  const int32_t* edit_indptr;      /* [num_reqs + 1]; may be NULL: nothing is listed */
  const int32_t* edit_tokens;
  const int32_t* edit_counts; /* times in the output; 0: in the prompt alone; -1: in neither */
  const float* edit_biases;
  const int32_t* mask;        /* may be NULL */
  const int32_t* stop_indptr; /* [num_reqs + 1]; may be NULL */
  const int32_t* stop_tokens;
  int32_t* num_accepted;
  int32_t* next_tokens; /* the recovered or bonus token, or the stop token */
  int32_t* status;
  int32_t* accept_flags; /* may be NULL */
  float* logprobs;       /* may be NULL: no log-probs */
  int32_t* top_tokens;   /* may be NULL when num_top_logprobs is 0 */
  float* top_logprobs;
  void* workspace;
  size_t workspace_bytes;
  int64_t stride_target_row;
  int64_t stride_draft_row;
  const void* draft_markov_w2;  /* [vocab_size, draft_markov_rank]; may be NULL: no low-rank law */
  const float* draft_w2_scales; /* [vocab_size]; E4M3 */
  const void* draft_latents;    /* [num_reqs * draft_len, draft_markov_rank] */
  const int32_t* draft_mask;    /* of draft rows; may be NULL: everything is allowed */
  dspark_dtype draft_w2_dtype;
  int32_t draft_markov_rank;
} dspark_accept_params;
#define DSPARK_ACCEPT_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_accept_params)
/* Host. Reads only sizes. */
dspark_status DSPARK_FN(dspark_accept_workspace_size)(const dspark_accept_params* params,
                                                      size_t* bytes);
dspark_status DSPARK_FN(dspark_accept)(const dspark_accept_params* params, dspark_stream stream);

/*
 * Computes      committed[r] = [x_1 .. x_n, next] with n = num_accepted[r], the rest -1;
 *               num_committed[r] = n + 1; seq_lens[r] += n + 1; anchors[r] = next. A request
 *               whose next token is -1 is left as it is (num_committed 0).
 * Shapes        draft_tokens [num_reqs, draft_len]; committed [num_reqs, draft_len + 1]; the rest
 *               [num_reqs].
 * Dtypes        int32.
 * Layout        contiguous.
 * Alignment     4 bytes.
 * Aliasing      none allowed.
 * Workspace     none.
 * Determinism   exact.
 * Stream/graph  capture-safe.
 * Errors        null pointers, sizes < 0.
 */
typedef struct dspark_commit_params {
  uint32_t struct_size;
  int32_t num_reqs;
  int32_t draft_len;
  const int32_t* draft_tokens; /* may be NULL when draft_len is 0 */
  const int32_t* num_accepted;
  const int32_t* next_tokens;
  int32_t* committed;
  int32_t* num_committed;
  int32_t* seq_lens;
  int32_t* anchors;
} dspark_commit_params;
#define DSPARK_COMMIT_PARAMS_INIT DSPARK_PARAMS_INIT(dspark_commit_params)
dspark_status DSPARK_FN(dspark_commit)(const dspark_commit_params* params, dspark_stream stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* DSPARK_H_ */
