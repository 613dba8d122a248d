/* Launchers of the verify family: acceptance and commit. */
#include <algorithm>

#include "common/host.cuh"
#include "kernels/verify/accept.cuh"
#include "kernels/verify/commit.cuh"
#include "kernels/verify/filter.cuh"
#include "kernels/verify/logprobs.cuh"
#include "kernels/verify/zones.cuh"

namespace dspark {
namespace {

constexpr size_t kWorkspaceAlignment = 256;

/* Offsets in bytes. Every part is there whether or not this call uses it: the size depends on sizes
 * alone. */
struct AcceptLayout {
  size_t zones;       /* ZoneStats [target rows, then draft rows; num_zones] */
  size_t laws;        /* RowLaw [num_rows] */
  size_t tickets;     /* uint32 [num_reqs] */
  size_t row_results; /* uint32 [num_reqs, draft_len + 1] */
  size_t committed;   /* CommittedToken [num_reqs, draft_len + 1] */
  size_t bytes;
};

int64_t num_vocab_zones(const dspark_accept_params& p) {
  return ceil_div<int64_t>(p.vocab_size, kZone);
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
  const size_t num_reqs = p.num_reqs;
  const size_t num_committed = num_reqs * (static_cast<size_t>(p.draft_len) + 1);
  layout.zones = carve(num_law_rows(p) * num_vocab_zones(p) * sizeof(ZoneStats));
  layout.laws = carve(static_cast<size_t>(p.num_rows) * sizeof(RowLaw));
  layout.tickets = carve(num_reqs * sizeof(uint32_t));
  layout.row_results = carve(num_committed * sizeof(uint32_t));
  layout.committed = carve(num_committed * sizeof(CommittedToken));
  layout.bytes = at;
  return layout;
}

dspark_status check_accept_sizes(const dspark_accept_params& p) {
  DSPARK_TRY(check_range("num_rows", p.num_rows, 0));
  DSPARK_TRY(check_range("num_reqs", p.num_reqs, 0));
  DSPARK_TRY(check_range("draft_len", p.draft_len, 0, kMaxDraftLen));
  DSPARK_TRY(check_range("vocab_size", p.vocab_size, 1, kMaxZones * kZone));
  const int64_t max_rows = INT32_MAX / num_vocab_zones(p);
  DSPARK_CHECK_ARG(num_law_rows(p) <= max_rows && p.num_reqs <= INT32_MAX / kMaxRows,
                   DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "num_rows + num_reqs * draft_len: expected at most %lld rows of %d tokens, got "
                   "%lld (num_reqs %d)",
                   static_cast<long long>(max_rows), p.vocab_size,
                   static_cast<long long>(num_law_rows(p)), p.num_reqs);
  return DSPARK_OK;
}

size_t dtype_bytes(dspark_dtype dtype) { return dtype == DSPARK_DTYPE_F32 ? 4 : 2; }

dspark_status check_logits(const char* name, const void* logits, dspark_dtype dtype) {
  DSPARK_TRY(dispatch_dtype(dtype, [](auto) -> dspark_status { return DSPARK_OK; }));
  return check_pointer(name, logits, dtype_bytes(dtype));
}

dspark_status check_draft_law(const dspark_accept_params& p) {
  if (p.draft_logits != nullptr) {
    DSPARK_TRY(check_logits("draft_logits", p.draft_logits, p.draft_dtype));
    return check_aligned("draft_log_normalizers", p.draft_log_normalizers, sizeof(float));
  }
  if (p.candidate_tokens == nullptr) return DSPARK_OK;
  DSPARK_TRY(check_range("num_candidates", p.num_candidates, 1, kMaxCandidates));
  DSPARK_TRY(check_aligned("candidate_tokens", p.candidate_tokens, sizeof(int32_t)));
  return check_pointer("candidate_logits", p.candidate_logits, sizeof(float));
}

/* Arrays that may be NULL, and those that come with them. */
dspark_status check_optional_arrays(const dspark_accept_params& p) {
  DSPARK_TRY(check_aligned("parents", p.parents, sizeof(int32_t)));
  DSPARK_TRY(check_aligned("top_k", p.top_k, sizeof(int32_t)));
  DSPARK_TRY(check_aligned("top_p", p.top_p, sizeof(float)));
  DSPARK_TRY(check_aligned("min_p", p.min_p, sizeof(float)));
  DSPARK_TRY(check_aligned("rules", p.rules, sizeof(int32_t)));
  DSPARK_TRY(check_aligned("repetition_penalty", p.repetition_penalty, sizeof(float)));
  DSPARK_TRY(check_aligned("presence_penalty", p.presence_penalty, sizeof(float)));
  DSPARK_TRY(check_aligned("frequency_penalty", p.frequency_penalty, sizeof(float)));
  DSPARK_TRY(check_aligned("mask", p.mask, sizeof(int32_t)));
  DSPARK_TRY(check_aligned("accept_flags", p.accept_flags, sizeof(int32_t)));
  if (p.edit_indptr != nullptr) {
    DSPARK_TRY(check_pointer("edit_indptr", p.edit_indptr, sizeof(int32_t)));
    DSPARK_TRY(check_pointer("edit_tokens", p.edit_tokens, sizeof(int32_t)));
    DSPARK_TRY(check_pointer("edit_counts", p.edit_counts, sizeof(int32_t)));
    DSPARK_TRY(check_pointer("edit_biases", p.edit_biases, sizeof(float)));
  }
  if (p.stop_indptr != nullptr) {
    DSPARK_TRY(check_pointer("stop_indptr", p.stop_indptr, sizeof(int32_t)));
    DSPARK_TRY(check_pointer("stop_tokens", p.stop_tokens, sizeof(int32_t)));
  }
  if (p.logprobs == nullptr) return DSPARK_OK;
  DSPARK_TRY(check_aligned("logprobs", p.logprobs, sizeof(float)));
  DSPARK_TRY(check_range("num_top_logprobs", p.num_top_logprobs, 0, kMaxTopLogprobs));
  if (p.num_top_logprobs == 0) return DSPARK_OK;
  DSPARK_TRY(check_pointer("top_tokens", p.top_tokens, sizeof(int32_t)));
  return check_pointer("top_logprobs", p.top_logprobs, sizeof(float));
}

dspark_status check_accept_pointers(const dspark_accept_params& p) {
  if (p.num_rows > 0) DSPARK_TRY(check_logits("target_logits", p.target_logits, p.target_dtype));
  if (p.draft_len > 0) {
    DSPARK_TRY(check_pointer("draft_tokens", p.draft_tokens, sizeof(int32_t)));
    DSPARK_TRY(check_draft_law(p));
  }
  DSPARK_TRY(check_pointer("qo_indptr", p.qo_indptr, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("anchor_positions", p.anchor_positions, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("temperature", p.temperature, sizeof(float)));
  DSPARK_TRY(check_pointer("seeds", p.seeds, sizeof(uint64_t)));
  DSPARK_TRY(check_pointer("num_accepted", p.num_accepted, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("next_tokens", p.next_tokens, sizeof(int32_t)));
  DSPARK_TRY(check_pointer("status", p.status, sizeof(int32_t)));
  return check_optional_arrays(p);
}

LogitMatrix logit_matrix(const void* logits, int64_t stride, dspark_dtype dtype) {
  const auto row_bytes = stride * static_cast<int64_t>(dtype_bytes(dtype));
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0 && row_bytes % 16 == 0;
  return {logits, stride, dtype, aligned};
}

ShapeInputs shape_inputs(const dspark_accept_params& p) {
  ShapeInputs shape;
  shape.repetition_penalty = p.repetition_penalty;
  shape.presence_penalty = p.presence_penalty;
  shape.frequency_penalty = p.frequency_penalty;
  shape.edit_indptr = p.edit_indptr;
  shape.edit_tokens = p.edit_tokens;
  shape.edit_counts = p.edit_counts;
  shape.edit_biases = p.edit_biases;
  shape.mask = p.mask;
  shape.any = p.repetition_penalty != nullptr || p.presence_penalty != nullptr ||
              p.frequency_penalty != nullptr || p.edit_indptr != nullptr || p.mask != nullptr;
  return shape;
}

VerifyInputs verify_inputs(const dspark_accept_params& p) {
  const bool dense = p.draft_len > 0 && p.draft_logits != nullptr;
  VerifyInputs in;
  in.target = logit_matrix(p.target_logits, p.stride_target_row, p.target_dtype);
  in.draft = logit_matrix(dense ? p.draft_logits : nullptr, p.stride_draft_row, p.draft_dtype);
  in.draft_log_normalizers = p.draft_log_normalizers;
  in.candidate_tokens = p.candidate_tokens;
  in.candidate_logits = p.candidate_logits;
  in.draft_tokens = p.draft_tokens;
  in.parents = p.parents;
  in.qo_indptr = p.qo_indptr;
  in.anchor_positions = p.anchor_positions;
  in.temperature = p.temperature;
  in.top_k = p.top_k;
  in.top_p = p.top_p;
  in.min_p = p.min_p;
  in.rules = p.rules;
  in.seeds = p.seeds;
  in.shape = shape_inputs(p);
  in.stop_indptr = p.stop_indptr;
  in.stop_tokens = p.stop_tokens;
  in.num_rows = p.num_rows;
  in.num_reqs = p.num_reqs;
  in.draft_len = p.draft_len;
  in.vocab_size = p.vocab_size;
  in.num_candidates = p.num_candidates;
  in.num_zones = static_cast<int32_t>(num_vocab_zones(p));
  in.wants_logprobs = p.logprobs != nullptr;
  return in;
}

/* The kernels of one call, in order. */
dspark_status launch_accept(const dspark_accept_params& p, dspark_stream stream) {
  const AcceptLayout layout = accept_layout(p);
  char* workspace = static_cast<char*>(p.workspace);
  const VerifyInputs in = verify_inputs(p);
  auto* zones = reinterpret_cast<ZoneStats*>(workspace + layout.zones);
  auto* laws = reinterpret_cast<RowLaw*>(workspace + layout.laws);
  const bool filters = p.top_k != nullptr || p.top_p != nullptr || p.min_p != nullptr;
  AcceptWork work;
  work.zones = zones;
  work.laws = filters ? laws : nullptr;
  work.tickets = reinterpret_cast<uint32_t*>(workspace + layout.tickets);
  work.row_results = reinterpret_cast<uint32_t*>(workspace + layout.row_results);
  work.committed = nullptr;
  if (in.wants_logprobs) {
    work.committed = reinterpret_cast<CommittedToken*>(workspace + layout.committed);
  }
  work.ctas_per_req = 1;
  if (p.rules != nullptr) {
    work.ctas_per_req =
        std::clamp(AcceptPolicy::kTargetCtas / p.num_reqs, 1, AcceptPolicy::kMaxCtasPerReq);
  }

  const bool reads_draft = in.draft.data != nullptr && p.draft_log_normalizers == nullptr;
  const int64_t num_warps = (reads_draft ? num_law_rows(p) : p.num_rows) * in.num_zones;
  const int64_t num_ctas = ceil_div<int64_t>(num_warps, ZonesPolicy::kWarpsPerCta);
  if (num_ctas > 0) {
    const auto kernel = in.shape.any ? zones_kernel<true> : zones_kernel<false>;
    DSPARK_TRY(launch("zones_kernel", kernel, dim3(static_cast<uint32_t>(num_ctas)),
                      dim3(ZonesPolicy::kNumThreads), 0, stream, in, num_warps, zones,
                      work.tickets));
  }
  if (filters && p.num_rows > 0) {
    DSPARK_TRY(launch("filter_kernel", filter_kernel, dim3(p.num_rows),
                      dim3(FilterPolicy::kNumThreads), 0, stream, in, zones, laws));
  }
  const AcceptOutputs out = {p.num_accepted, p.next_tokens, p.status, p.accept_flags};
  DSPARK_TRY(launch("accept_kernel", accept_kernel, dim3(p.num_reqs * work.ctas_per_req),
                    dim3(AcceptPolicy::kNumThreads), 0, stream, in, work, out));
  if (!in.wants_logprobs) return DSPARK_OK;
  const LogprobsOutputs logprobs = {p.logprobs, p.top_tokens, p.top_logprobs, p.num_top_logprobs};
  return launch("logprobs_kernel", logprobs_kernel, dim3(p.num_reqs * (p.draft_len + 1)),
                dim3(LogprobsPolicy::kNumThreads), 0, stream, in, work, logprobs);
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
