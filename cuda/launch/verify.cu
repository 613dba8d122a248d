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
  size_t zones;       /* Strips [num_rows, num_zones] of maxima, then of sums */
  size_t draft_zones; /* Strips [num_reqs * draft_len, num_zones] of maxima, then of sums */
  size_t races;       /* ZoneRace [num_rows, num_zones] */
  size_t laws;        /* RowLaw [num_rows] */
  size_t tickets;     /* uint32 [num_reqs] */
  size_t row_results; /* uint32 [num_reqs, draft_len + 1] */
  size_t committed;   /* CommittedToken [num_reqs, draft_len + 1] */
  size_t bytes;
};

int64_t num_vocab_zones(const dspark_accept_params& p) {
  return ceil_div<int64_t>(p.vocab_size, kZone);
}

int64_t num_draft_rows(const dspark_accept_params& p) {
  return static_cast<int64_t>(p.num_reqs) * p.draft_len;
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
  layout.zones = carve(num_vocab_zones(p) * p.num_rows * 2 * sizeof(Strips));
  layout.draft_zones = carve(num_vocab_zones(p) * num_draft_rows(p) * 2 * sizeof(Strips));
  layout.races = carve(p.num_rows * num_vocab_zones(p) * sizeof(ZoneRace));
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
  const int64_t num_law_rows = p.num_rows + num_draft_rows(p);
  DSPARK_CHECK_ARG(num_law_rows <= max_rows && p.num_reqs <= INT32_MAX / kMaxRows,
                   DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "num_rows + num_reqs * draft_len: expected at most %lld rows of %d tokens, got "
                   "%lld (num_reqs %d)",
                   static_cast<long long>(max_rows), p.vocab_size,
                   static_cast<long long>(num_law_rows), p.num_reqs);
  return DSPARK_OK;
}

size_t dtype_bytes(dspark_dtype dtype) { return dtype == DSPARK_DTYPE_F32 ? 4 : 2; }

dspark_status check_logits(const char* name, const void* logits, dspark_dtype dtype) {
  DSPARK_TRY(dispatch_dtype(dtype, [](auto) -> dspark_status { return DSPARK_OK; }));
  return check_pointer(name, logits, dtype_bytes(dtype));
}

/* W2 and latents of a law whose draft_logits are base logits. */
dspark_status check_low_rank_law(const dspark_accept_params& p) {
  constexpr int kMaxRank = 256;
  DSPARK_TRY(check_pointer("draft_markov_w2", p.draft_markov_w2, 16));
  DSPARK_TRY(check_pointer("draft_latents", p.draft_latents, 16));
  DSPARK_TRY(check_range("draft_markov_rank", p.draft_markov_rank, kLowRankStep, kMaxRank));
  DSPARK_TRY(check_multiple("draft_markov_rank", p.draft_markov_rank, kLowRankStep));
  if (p.draft_w2_dtype != DSPARK_DTYPE_E4M3) return check_half_dtype(p.draft_w2_dtype);
  return check_pointer("draft_w2_scales", p.draft_w2_scales, sizeof(float));
}

dspark_status check_draft_law(const dspark_accept_params& p) {
  if (p.draft_logits != nullptr) {
    DSPARK_TRY(check_logits("draft_logits", p.draft_logits, p.draft_dtype));
    DSPARK_TRY(check_aligned("draft_log_normalizers", p.draft_log_normalizers, sizeof(float)));
    DSPARK_TRY(check_aligned("draft_mask", p.draft_mask, sizeof(int32_t)));
    if (p.draft_markov_w2 != nullptr) DSPARK_TRY(check_low_rank_law(p));
    if (p.draft_markov_w2 == nullptr && p.draft_mask == nullptr) return DSPARK_OK;
    return check_pointer("draft_log_normalizers", p.draft_log_normalizers, sizeof(float));
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

bool has_filters(const dspark_accept_params& p) {
  return p.top_k != nullptr || p.top_p != nullptr || p.min_p != nullptr;
}

VerifyInputs verify_inputs(const dspark_accept_params& p) {
  const bool dense = p.draft_len > 0 && p.draft_logits != nullptr;
  VerifyInputs in;
  in.target = logit_matrix(p.target_logits, p.stride_target_row, p.target_dtype);
  in.draft = logit_matrix(dense ? p.draft_logits : nullptr, p.stride_draft_row, p.draft_dtype);
  in.draft_log_normalizers = p.draft_log_normalizers;
  in.low_rank = {dense ? p.draft_markov_w2 : nullptr, p.draft_w2_scales, p.draft_latents,
                 p.draft_w2_dtype, p.draft_markov_rank};
  in.draft_mask = p.draft_mask;
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
  in.has_filters = has_filters(p);
  in.wants_logprobs = p.logprobs != nullptr;
  return in;
}

/* As many CTAs as run at once, or fewer where a warp would find no zone. */
template <typename T, ZonesKind kKind>
dspark_status launch_zones_as(const VerifyInputs& in, const ZonesWork& work, dspark_stream stream) {
  constexpr const char* kName = "zones_kernel";
  const auto kernel = zones_kernel<T, kKind>;
  int resident = 0;
  DSPARK_TRY(resident_ctas(kName, kernel, ZonesPolicy::kNumThreads, 0, &resident));
  const int64_t wanted = ceil_div<int64_t>(work.num_rows * in.num_zones, ZonesPolicy::kWarpsPerCta);
  const auto num_ctas = static_cast<uint32_t>(std::min<int64_t>(wanted, resident));
  return launch_dependent(kName, kernel, dim3(num_ctas), dim3(ZonesPolicy::kNumThreads), stream, in,
                          work);
}

template <ZonesKind kKind>
dspark_status launch_zones(const VerifyInputs& in, const ZonesWork& work, dspark_stream stream) {
  return dispatch_dtype(work.matrix.dtype, [&](auto tag) {
    return launch_zones_as<typename decltype(tag)::type, kKind>(in, work, stream);
  });
}

/* What the first kernels leave in the workspace. */
struct AcceptParts {
  Strips* maxima;
  Strips* sums;
  Strips* draft_maxima;
  Strips* draft_sums;
  ZoneRace* races;
  RowLaw* laws;
  uint32_t* tickets;
};

/* The read of all logits. */
dspark_status launch_all_zones(const dspark_accept_params& p,
                               const VerifyInputs& in,
                               const AcceptParts& parts,
                               dspark_stream stream) {
  const bool reads_draft = in.draft.data != nullptr && p.draft_log_normalizers == nullptr;
  if (reads_draft) {
    const ZonesWork draft = {in.draft,         num_draft_rows(p), parts.draft_maxima,
                             parts.draft_sums, nullptr,           nullptr};
    DSPARK_TRY(launch_zones<ZonesKind::kDraft>(in, draft, stream));
  }
  const ZonesWork target = {in.target,  p.num_rows,  parts.maxima,
                            parts.sums, parts.races, parts.tickets};
  if (in.shape.any) return launch_zones<ZonesKind::kShaped>(in, target, stream);
  if (p.rules != nullptr) return launch_zones<ZonesKind::kRaces>(in, target, stream);
  return launch_zones<ZonesKind::kTarget>(in, target, stream);
}

AcceptParts accept_parts(const dspark_accept_params& p, const AcceptLayout& layout) {
  char* workspace = static_cast<char*>(p.workspace);
  const int64_t num_zones = p.num_rows * num_vocab_zones(p);
  const int64_t num_draft_zones = num_draft_rows(p) * num_vocab_zones(p);
  auto* zones = reinterpret_cast<Strips*>(workspace + layout.zones);
  auto* draft_zones = reinterpret_cast<Strips*>(workspace + layout.draft_zones);
  return {zones,
          zones + num_zones,
          draft_zones,
          draft_zones + num_draft_zones,
          reinterpret_cast<ZoneRace*>(workspace + layout.races),
          reinterpret_cast<RowLaw*>(workspace + layout.laws),
          reinterpret_cast<uint32_t*>(workspace + layout.tickets)};
}

AcceptWork accept_work(const dspark_accept_params& p,
                       const AcceptLayout& layout,
                       const AcceptParts& parts) {
  char* workspace = static_cast<char*>(p.workspace);
  AcceptWork work;
  work.zones = {parts.maxima, parts.sums};
  work.draft_zones = {parts.draft_maxima, parts.draft_sums};
  work.races = parts.races;
  work.laws = has_filters(p) ? parts.laws : nullptr;
  work.tickets = parts.tickets;
  work.row_results = reinterpret_cast<uint32_t*>(workspace + layout.row_results);
  work.committed = nullptr;
  if (p.logprobs != nullptr) {
    work.committed = reinterpret_cast<CommittedToken*>(workspace + layout.committed);
  }
  work.ctas_per_req = 1;
  if (p.rules != nullptr && (has_filters(p) || p.draft_logits != nullptr)) {
    work.ctas_per_req =
        std::clamp(AcceptPolicy::kTargetCtas / p.num_reqs, 1, AcceptPolicy::kMaxCtasPerReq);
  }
  return work;
}

/* A CTA for each row, or a few where the device holds more than that. */
dspark_status launch_filters(const VerifyInputs& in,
                             const AcceptParts& parts,
                             dspark_stream stream) {
  constexpr const char* kName = "filter_kernel";
  LaunchShape shape{dim3(in.num_rows), dim3(FilterPolicy::kNumThreads)};
  shape.dependent = true;
  bool has_clusters = false;
  DSPARK_TRY(knows_sm_90(kName, filter_kernel, &has_clusters));
  int resident = 0;
  DSPARK_TRY(resident_ctas(kName, filter_kernel, FilterPolicy::kNumThreads, 0, &resident));
  while (has_clusters && shape.cluster_ctas < FilterPolicy::kMaxTeam &&
         2 * shape.grid.x <= static_cast<uint32_t>(resident)) {
    shape.cluster_ctas *= 2;
    shape.grid.x *= 2;
  }
  return launch(kName, filter_kernel, shape, stream, in, parts.maxima, parts.sums, parts.laws);
}

/* The kernels of one call, in order. */
dspark_status launch_accept(const dspark_accept_params& p, dspark_stream stream) {
  const AcceptLayout layout = accept_layout(p);
  const VerifyInputs in = verify_inputs(p);
  const AcceptParts parts = accept_parts(p, layout);
  const AcceptWork work = accept_work(p, layout, parts);
  const AcceptOutputs out = {p.num_accepted, p.next_tokens, p.status, p.accept_flags};
  const dim3 accept_ctas(p.num_reqs * work.ctas_per_req);
  const dim3 accept_threads(AcceptPolicy::kNumThreads);
  if (p.num_rows == 0) { /* no kernel of this call is before it */
    DSPARK_TRY(launch("accept_kernel", accept_kernel, accept_ctas, accept_threads, 0, stream, in,
                      work, out));
  } else {
    DSPARK_TRY(launch_all_zones(p, in, parts, stream));
    if (in.has_filters) {
      DSPARK_TRY(launch_filters(in, parts, stream));
    }
    DSPARK_TRY(launch_dependent("accept_kernel", accept_kernel, accept_ctas, accept_threads, stream,
                                in, work, out));
  }
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
  const dspark_accept_params p = complete(params);
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
