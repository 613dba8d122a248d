/* Launchers of the verify family: acceptance and commit. */
#include "common/host.cuh"
#include "kernels/verify/accept.cuh"
#include "kernels/verify/commit.cuh"
#include "kernels/verify/laws.cuh"

namespace dspark {
namespace {

constexpr size_t kWorkspaceAlignment = 256;

/* Offsets in bytes. Rows are target rows, then draft rows, whether or not there is a draft law: the
 * size depends on sizes alone. */
struct AcceptLayout {
  size_t stats;     /* ChunkStats [rows, num_chunks] */
  size_t laws;      /* RowLaw [rows] */
  size_t decisions; /* Decision [num_reqs] */
  size_t winners;   /* ChunkWinners [num_reqs, num_chunks] */
  size_t bytes;
};

int64_t num_vocab_chunks(const dspark_accept_params& p) {
  return ceil_div<int64_t>(p.vocab_size, StatsPolicy::kChunk);
}

int64_t num_law_rows(const dspark_accept_params& p) {
  return p.num_rows + static_cast<int64_t>(p.num_reqs) * p.draft_len;
}

AcceptLayout accept_layout(const dspark_accept_params& p) {
  AcceptLayout layout = {};
  size_t at = 0;
  const auto carve = [&at](size_t bytes) {
    const size_t offset = at;
    at += round_up(bytes, kWorkspaceAlignment);
    return offset;
  };
  const size_t num_rows = num_law_rows(p);
  const size_t num_reqs = p.num_reqs;
  const size_t num_chunks = num_vocab_chunks(p);
  layout.stats = carve(num_rows * num_chunks * sizeof(ChunkStats));
  layout.laws = carve(num_rows * sizeof(RowLaw));
  layout.decisions = carve(num_reqs * sizeof(Decision));
  layout.winners = carve(num_reqs * num_chunks * sizeof(ChunkWinners));
  layout.bytes = at;
  return layout;
}

dspark_status check_accept_sizes(const dspark_accept_params& p) {
  DSPARK_TRY(check_range("num_rows", p.num_rows, 0));
  DSPARK_TRY(check_range("num_reqs", p.num_reqs, 0));
  DSPARK_TRY(check_range("draft_len", p.draft_len, 0));
  DSPARK_TRY(check_range("vocab_size", p.vocab_size, 1));
  const int64_t max_rows = INT32_MAX / num_vocab_chunks(p);
  DSPARK_CHECK_ARG(num_law_rows(p) <= max_rows && p.num_reqs <= max_rows,
                   DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "num_rows + num_reqs * draft_len: expected at most %lld rows of %d tokens, got "
                   "%lld (num_reqs %d)",
                   static_cast<long long>(max_rows), p.vocab_size,
                   static_cast<long long>(num_law_rows(p)), p.num_reqs);
  return DSPARK_OK;
}

dspark_status check_accept_pointers(const dspark_accept_params& p) {
  if (p.num_rows > 0) DSPARK_TRY(check_pointer("target_logits", p.target_logits, sizeof(float)));
  DSPARK_TRY(check_aligned("draft_logits", p.draft_logits, sizeof(float)));
  if (p.draft_len > 0) {
    DSPARK_TRY(check_pointer("draft_tokens", p.draft_tokens, sizeof(int32_t)));
  }
  DSPARK_TRY(check_pointer("qo_indptr", p.qo_indptr, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("anchor_positions", p.anchor_positions, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("temperature", p.temperature, sizeof(float)));
  DSPARK_TRY(check_pointer("top_k", p.top_k, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("top_p", p.top_p, sizeof(float)));
  DSPARK_TRY(check_pointer("min_p", p.min_p, sizeof(float)));
  DSPARK_TRY(check_pointer("seeds", p.seeds, sizeof(uint64_t)));
  DSPARK_TRY(check_pointer("num_accepted", p.num_accepted, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("next_tokens", p.next_tokens, sizeof(int32_t)));
  return check_pointer("status", p.status, sizeof(int32_t));
}

bool rows_are_aligned(const float* logits, int64_t stride) {
  return reinterpret_cast<uintptr_t>(logits) % 16 == 0 && stride % kQuad == 0;
}

VerifyInputs verify_inputs(const dspark_accept_params& p) {
  VerifyInputs in;
  in.target_logits = p.target_logits;
  in.draft_logits = p.draft_logits;
  in.draft_tokens = p.draft_tokens;
  in.qo_indptr = p.qo_indptr;
  in.anchor_positions = p.anchor_positions;
  in.temperature = p.temperature;
  in.top_k = p.top_k;
  in.top_p = p.top_p;
  in.min_p = p.min_p;
  in.seeds = p.seeds;
  in.stride_target_row = p.stride_target_row;
  in.stride_draft_row = p.stride_draft_row;
  in.num_rows = p.num_rows;
  in.num_reqs = p.num_reqs;
  in.draft_len = p.draft_len;
  in.vocab_size = p.vocab_size;
  in.num_chunks = static_cast<int32_t>(num_vocab_chunks(p));
  in.aligned_target = rows_are_aligned(p.target_logits, p.stride_target_row);
  in.aligned_draft = rows_are_aligned(p.draft_logits, p.stride_draft_row);
  return in;
}

/* The kernels of one call, in order. */
dspark_status launch_accept(const dspark_accept_params& p, dspark_stream stream) {
  const AcceptLayout layout = accept_layout(p);
  char* workspace = static_cast<char*>(p.workspace);
  auto* stats = reinterpret_cast<ChunkStats*>(workspace + layout.stats);
  auto* laws = reinterpret_cast<RowLaw*>(workspace + layout.laws);
  auto* decisions = reinterpret_cast<Decision*>(workspace + layout.decisions);
  auto* winners = reinterpret_cast<ChunkWinners*>(workspace + layout.winners);
  const VerifyInputs in = verify_inputs(p);
  const AcceptOutputs out = {p.num_accepted, p.next_tokens, p.status};

  const int64_t num_rows = p.draft_logits == nullptr ? p.num_rows : num_law_rows(p);
  const auto num_law_ctas = static_cast<uint32_t>(num_rows);
  if (num_law_ctas > 0) {
    DSPARK_TRY(launch("stats_kernel", stats_kernel, dim3(num_law_ctas * in.num_chunks),
                      dim3(StatsPolicy::kNumThreads), 0, stream, in, stats));
    DSPARK_TRY(launch("laws_kernel", laws_kernel, dim3(num_law_ctas), dim3(LawsPolicy::kNumThreads),
                      0, stream, in, stats, laws));
  }
  const dim3 warp_grid(ceil_div(p.num_reqs, AcceptPolicy::kWarpsPerCta));
  DSPARK_TRY(launch("decide_kernel", decide_kernel, warp_grid, dim3(AcceptPolicy::kNumThreads), 0,
                    stream, in, laws, decisions, out));
  DSPARK_TRY(launch("draw_kernel", draw_kernel, dim3(p.num_reqs * in.num_chunks),
                    dim3(DrawPolicy::kNumThreads), 0, stream, in, laws, decisions, winners));
  return launch("finish_draw_kernel", finish_draw_kernel, warp_grid,
                dim3(AcceptPolicy::kNumThreads), 0, stream, p.num_reqs, in.num_chunks, decisions,
                winners, p.next_tokens);
}

}  // namespace
}  // namespace dspark

using namespace dspark;

extern "C" dspark_status DSPARK_FN(dspark_accept_workspace_size)(const dspark_accept_params* params,
                                                                 size_t* bytes) {
  DSPARK_CHECK_PARAMS(params, stride_draft_row);
  DSPARK_TRY(check_accept_sizes(*params));
  DSPARK_CHECK_ARG(bytes != nullptr, DSPARK_ERROR_NULL_POINTER,
                   "bytes: expected a host pointer, got NULL");
  *bytes = accept_layout(*params).bytes;
  return DSPARK_OK;
}

extern "C" dspark_status DSPARK_FN(dspark_accept)(const dspark_accept_params* params,
                                                  dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, stride_draft_row);
  const dspark_accept_params& p = *params;
  DSPARK_TRY(check_accept_sizes(p));
  if (p.num_reqs == 0) return DSPARK_OK;
  DSPARK_TRY(check_accept_pointers(p));
  DSPARK_TRY(check_workspace(p.workspace, p.workspace_bytes, accept_layout(p).bytes));
  return launch_accept(p, stream);
}

extern "C" dspark_status DSPARK_FN(dspark_commit)(const dspark_commit_params* params,
                                                  dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, anchors);
  const dspark_commit_params& p = *params;
  DSPARK_TRY(check_range("num_reqs", p.num_reqs, 0));
  DSPARK_TRY(check_range("draft_len", p.draft_len, 0));
  if (p.num_reqs == 0) return DSPARK_OK;
  if (p.draft_len > 0) {
    DSPARK_TRY(check_pointer("draft_tokens", p.draft_tokens, sizeof(int32_t)));
  }
  DSPARK_TRY(check_pointer("num_accepted", p.num_accepted, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("next_tokens", p.next_tokens, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("committed", p.committed, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("num_committed", p.num_committed, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("seq_lens", p.seq_lens, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("anchors", p.anchors, sizeof(int32_t)));
  CommitArgs args;
  args.draft_tokens = p.draft_tokens;
  args.num_accepted = p.num_accepted;
  args.next_tokens = p.next_tokens;
  args.committed = p.committed;
  args.num_committed = p.num_committed;
  args.seq_lens = p.seq_lens;
  args.anchors = p.anchors;
  args.num_elements = static_cast<int64_t>(p.num_reqs) * (static_cast<int64_t>(p.draft_len) + 1);
  args.draft_len = p.draft_len;
  const auto num_ctas =
      static_cast<uint32_t>(ceil_div<int64_t>(args.num_elements, CommitPolicy::kNumThreads));
  return launch("commit_kernel", commit_kernel, dim3(num_ctas), dim3(CommitPolicy::kNumThreads), 0,
                stream, args);
}
