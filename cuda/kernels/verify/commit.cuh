/*
 * Commit: committed[r] = [x_1 .. x_n, next, -1 ...], num_committed[r] = n + 1, seq_lens[r] += n + 1,
 * anchors[r] = next, for n = num_accepted[r]. A request whose next token is -1 commits nothing: its
 * row of committed is -1, num_committed 0, the rest as it was.
 *
 * Mapping: a thread per element of committed; the thread of column 0 writes the request's scalars.
 * 8 bytes per element; limited by the launch itself.
 */
#pragma once

#include <cstdint>

namespace dspark {

struct CommitPolicy {
  static constexpr int kNumThreads = 256;
};

struct CommitArgs {
  const int32_t* draft_tokens; /* [num_reqs, draft_len] */
  const int32_t* num_accepted;
  const int32_t* next_tokens;
  int32_t* committed; /* [num_reqs, draft_len + 1] */
  int32_t* num_committed;
  int32_t* seq_lens;
  int32_t* anchors;
  int64_t num_elements; /* of committed */
  int32_t draft_len;
};

__global__ void __launch_bounds__(CommitPolicy::kNumThreads) commit_kernel(CommitArgs args) {
  const int64_t element =
      static_cast<int64_t>(blockIdx.x) * CommitPolicy::kNumThreads + threadIdx.x;
  if (element >= args.num_elements) return;
  const int64_t num_columns = static_cast<int64_t>(args.draft_len) + 1;
  const int64_t req = element / num_columns;
  const int32_t column = static_cast<int32_t>(element % num_columns);
  const int32_t next = args.next_tokens[req];
  const bool commits = next != -1;
  const int32_t num_accepted = min(max(args.num_accepted[req], 0), args.draft_len);

  int32_t token = -1;
  if (commits && column < num_accepted) token = args.draft_tokens[req * args.draft_len + column];
  if (commits && column == num_accepted) token = next;
  args.committed[element] = token;
  if (column != 0) return;
  args.num_committed[req] = commits ? num_accepted + 1 : 0;
  if (commits) {
    args.seq_lens[req] += num_accepted + 1;
    args.anchors[req] = next;
  }
}

}  // namespace dspark
