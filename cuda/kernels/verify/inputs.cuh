/*
 * What acceptance reads: the arrays of a call, and logits as the target law sees them.
 *
 * A row is read by zones of kZone tokens, a warp per zone: kGroupsPerLane groups of kGroup
 * neighbouring tokens per lane. Token j of group i of a lane is zone * kZone + (i * 32 + lane) *
 * kGroup + j: 16 bytes per access of 16-bit logits, two accesses of f32. Groups past the vocabulary
 * are -inf, so that loops need no tail.
 *
 * Shaping (penalties, biases, mask) happens on the values just read. The edits of a request are a
 * list in ascending order, and few fall into a zone, so that a warp finds its part by one binary
 * search and hands each edit to the lane that holds the token. Drafts before the row count as output
 * without being listed. Every step is one rounded f32 operation (the intrinsics keep the compiler
 * from fusing two), which is what makes ties the same everywhere.
 */
#pragma once

#include <cfloat>

#include "common/philox.cuh"
#include "common/vec.cuh"
#include "dspark.h"

namespace dspark {

constexpr int kGroup = 8;
constexpr int kGroupsPerLane = kZone / (kWarpSize * kGroup);
constexpr int kMaxDraftLen = 64;
constexpr int kMaxRows = kMaxDraftLen + 1; /* rows of a request */
constexpr int kMaxZones = 2048;
constexpr int kMaxCandidates = 256;
constexpr int kMaxTopLogprobs = 20;
constexpr float kLog2E = 1.4426950408889634f;

/* A matrix of logits of any dtype. */
struct LogitMatrix {
  const void* data;
  int64_t stride_row;
  dspark_dtype dtype;
  bool aligned; /* every row starts at a multiple of 16 bytes */
};

/* Penalties, biases and mask; `any` is false when all are off for the whole call. */
struct ShapeInputs {
  const float* repetition_penalty;
  const float* presence_penalty;
  const float* frequency_penalty;
  const int32_t* edit_indptr;
  const int32_t* edit_tokens;
  const int32_t* edit_counts;
  const float* edit_biases;
  const int32_t* mask;
  bool any;
};

/* The arrays of dspark_accept. Draft rows follow the target rows wherever rows are counted. */
struct VerifyInputs {
  LogitMatrix target; /* [num_rows, vocab_size] */
  LogitMatrix draft;  /* [num_reqs * draft_len, vocab_size]; data nullptr: no dense law */
  const float* draft_log_normalizers;
  const int32_t* candidate_tokens;
  const float* candidate_logits;
  const int32_t* draft_tokens;
  const int32_t* parents;
  const int32_t* qo_indptr;
  const int32_t* anchor_positions;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const int32_t* rules;
  const uint64_t* seeds;
  ShapeInputs shape;
  const int32_t* stop_indptr;
  const int32_t* stop_tokens;
  int32_t num_rows;
  int32_t num_reqs;
  int32_t draft_len;
  int32_t vocab_size;
  int32_t num_candidates;
  int32_t num_zones; /* of a row */
  bool wants_logprobs;
};

/* A row of target logits: row `local` of request `req`. */
struct TargetRow {
  int64_t index;
  int32_t req;
  int32_t local;
};

/* w = exp2((l - max) * scale) is exp((l - max) / T); finite, so that 0 * scale stays 0. */
__device__ __forceinline__ float weight_scale(float temperature) {
  return fminf(kLog2E / temperature, FLT_MAX);
}

__device__ __forceinline__ float logit_weight(float logit, float max, float scale) {
  return exp2f((logit - max) * scale);
}

/* The scale of a request's target rows; 0 where no law is needed (greedy). */
__device__ __forceinline__ float target_scale(const VerifyInputs& in, int32_t req) {
  const float temperature = in.temperature[req];
  if (temperature > 0.f) return weight_scale(temperature);
  return in.wants_logprobs ? kLog2E : 0.f;
}

/* Drafts of `req` that go to verification; -1 when it has no rows. */
__device__ __forceinline__ int32_t verify_len(const VerifyInputs& in, int32_t req) {
  return min(in.qo_indptr[req + 1] - in.qo_indptr[req] - 1, in.draft_len);
}

/* The request whose rows include `row`, or -1: the last r with qo_indptr[r] <= row. */
__device__ __forceinline__ int32_t find_request(const VerifyInputs& in, int32_t row) {
  if (row < in.qo_indptr[0] || row >= in.qo_indptr[in.num_reqs]) return -1;
  int32_t low = 0, high = in.num_reqs; /* qo_indptr[low] <= row < qo_indptr[high] */
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (in.qo_indptr[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/* The row (of the same request) that `row` > 0 follows. */
__device__ __forceinline__ int32_t parent_row(const VerifyInputs& in, int32_t req, int32_t row) {
  if (in.parents == nullptr) return row - 1;
  const int32_t parent = in.parents[static_cast<int64_t>(req) * in.draft_len + row - 1];
  return max(0, min(parent, row - 1));
}

__device__ __forceinline__ int32_t draft_token(const VerifyInputs& in, int32_t req, int32_t row) {
  return in.draft_tokens[static_cast<int64_t>(req) * in.draft_len + row - 1];
}

/* Times that `token` was drafted on the way to `row`. */
__device__ __forceinline__ int32_t count_drafted(const VerifyInputs& in,
                                                 const TargetRow& row,
                                                 int32_t token) {
  int32_t count = 0;
  for (int32_t at = row.local; at > 0; at = parent_row(in, row.req, at)) {
    count += draft_token(in, row.req, at) == token;
  }
  return count;
}

/* First edit of the request at or after `token`. */
__device__ __forceinline__ int32_t find_edit(const ShapeInputs& shape, int32_t req, int32_t token) {
  int32_t low = shape.edit_indptr[req], high = shape.edit_indptr[req + 1];
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (shape.edit_tokens[middle] < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ bool has_edit(const ShapeInputs& shape, int32_t req, int32_t token) {
  if (shape.edit_indptr == nullptr) return false;
  const int32_t at = find_edit(shape, req, token);
  return at < shape.edit_indptr[req + 1] && shape.edit_tokens[at] == token;
}

/* One token's logit after penalties and bias; `count` -1: it is not in the context. */
__device__ __forceinline__ float edit_logit(
    const ShapeInputs& shape, int32_t req, float logit, int32_t count, float bias) {
  if (count >= 0 && shape.repetition_penalty != nullptr) {
    const float penalty = shape.repetition_penalty[req];
    logit = logit > 0.f ? __fdiv_rn(logit, penalty) : __fmul_rn(logit, penalty);
  }
  if (count > 0) {
    if (shape.frequency_penalty != nullptr) {
      const float penalty = __fmul_rn(shape.frequency_penalty[req], static_cast<float>(count));
      logit = __fsub_rn(logit, penalty);
    }
    if (shape.presence_penalty != nullptr) logit = __fsub_rn(logit, shape.presence_penalty[req]);
  }
  return __fadd_rn(logit, bias);
}

/* Count of a token: of the list's entry, which drafts on the way add to. */
__device__ __forceinline__ int32_t total_count(int32_t listed, int32_t drafted) {
  return drafted > 0 ? max(listed, 0) + drafted : listed;
}

__device__ __forceinline__ bool has_penalties(const ShapeInputs& shape) {
  return shape.repetition_penalty != nullptr || shape.presence_penalty != nullptr ||
         shape.frequency_penalty != nullptr;
}

/* Whether the mask allows a token of a row. */
__device__ __forceinline__ bool mask_allows(const VerifyInputs& in, int64_t row, int32_t token) {
  if (in.shape.mask == nullptr) return true;
  const int64_t num_words = (in.vocab_size + 31) / 32;
  const auto word = static_cast<uint32_t>(in.shape.mask[row * num_words + token / 32]);
  return (word >> (token % 32) & 1u) != 0;
}

__device__ __forceinline__ float load_logit(const LogitMatrix& matrix, int64_t row, int32_t token) {
  const int64_t at = row * matrix.stride_row + token;
  switch (matrix.dtype) {
    case DSPARK_DTYPE_BF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(matrix.data)[at]);
    case DSPARK_DTYPE_F16:
      return __half2float(static_cast<const __half*>(matrix.data)[at]);
    default:
      return static_cast<const float*>(matrix.data)[at];
  }
}

/* The shaped logit of one token. */
__device__ __forceinline__ float shaped_logit(const VerifyInputs& in,
                                              const TargetRow& row,
                                              int32_t token) {
  float logit = load_logit(in.target, row.index, token);
  if (!in.shape.any) return logit;
  const int32_t drafted = has_penalties(in.shape) ? count_drafted(in, row, token) : 0;
  int32_t listed = -1;
  float bias = 0.f;
  if (has_edit(in.shape, row.req, token)) {
    const int32_t at = find_edit(in.shape, row.req, token);
    listed = in.shape.edit_counts[at];
    bias = in.shape.edit_biases[at];
  }
  logit = edit_logit(in.shape, row.req, logit, total_count(listed, drafted), bias);
  return mask_allows(in, row.index, token) ? logit : -INFINITY;
}

/* First token of group `group` of this lane. */
__device__ __forceinline__ int32_t group_token(int32_t zone, int group) {
  const int lane = threadIdx.x % kWarpSize;
  return zone * kZone + (group * kWarpSize + lane) * kGroup;
}

template <typename T>
__device__ __forceinline__ void load_group_as(
    const T* row, int32_t first, int32_t vocab_size, bool aligned, float (&values)[kGroup]) {
  if (aligned && first <= vocab_size - kGroup) {
#pragma unroll
    for (int part = 0; part < kGroup / kVecSize<T>; ++part) {
      float loaded[kVecSize<T>];
      load_vec(row + first + part * kVecSize<T>, loaded);
#pragma unroll
      for (int j = 0; j < kVecSize<T>; ++j) values[part * kVecSize<T> + j] = loaded[j];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    values[j] = first + j < vocab_size ? Element<T>::to_float(row[first + j]) : -INFINITY;
  }
}

/* Logits first .. first + kGroup - 1 of a row, as they are. */
__device__ __forceinline__ void load_group(const LogitMatrix& matrix,
                                           int64_t row,
                                           int32_t first,
                                           int32_t vocab_size,
                                           float (&values)[kGroup]) {
  const int64_t at = row * matrix.stride_row;
  switch (matrix.dtype) {
    case DSPARK_DTYPE_BF16:
      return load_group_as(static_cast<const __nv_bfloat16*>(matrix.data) + at, first, vocab_size,
                           matrix.aligned, values);
    case DSPARK_DTYPE_F16:
      return load_group_as(static_cast<const __half*>(matrix.data) + at, first, vocab_size,
                           matrix.aligned, values);
    default:
      return load_group_as(static_cast<const float*>(matrix.data) + at, first, vocab_size,
                           matrix.aligned, values);
  }
}

/* Starts the loads of a zone, an access per lane and group, so that reading it group by group (few
 * registers) waits for memory once. */
__device__ __forceinline__ void touch_zone(const LogitMatrix& matrix,
                                           int64_t row,
                                           int32_t zone,
                                           int32_t vocab_size) {
#ifdef __CUDA_ARCH__
  const int element_bytes = matrix.dtype == DSPARK_DTYPE_F32 ? 4 : 2;
  const char* data = static_cast<const char*>(matrix.data);
#pragma unroll
  for (int group = 0; group < kGroupsPerLane; ++group) {
    const int32_t first = group_token(zone, group);
    if (first >= vocab_size) break;
    const char* address = data + (row * matrix.stride_row + first) * element_bytes;
    asm volatile("prefetch.global.L1 [%0];" : : "l"(address));
  }
#endif
}

/* values[token - first] = f(values[token - first]) if this lane's group has the token. */
template <typename F>
__device__ __forceinline__ void update_token(float (&values)[kGroup],
                                             int32_t first,
                                             int32_t token,
                                             F&& f) {
  if (token < first || token >= first + kGroup) return;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (first + j == token) values[j] = f(values[j]);
  }
}

/* Shapes a group just loaded. All lanes of a warp are in the same zone. */
__device__ __forceinline__ void shape_group(const VerifyInputs& in,
                                            const TargetRow& row,
                                            int32_t zone,
                                            int32_t first,
                                            float (&values)[kGroup]) {
  const ShapeInputs& shape = in.shape;
  if (!shape.any) return;
  const bool penalties = has_penalties(shape);
  if (shape.edit_indptr != nullptr) {
    const int32_t end = shape.edit_indptr[row.req + 1];
    for (int32_t at = find_edit(shape, row.req, zone * kZone); at < end; ++at) {
      const int32_t token = shape.edit_tokens[at];
      if (token - zone * kZone >= kZone) break;
      const int32_t drafted = penalties ? count_drafted(in, row, token) : 0;
      const int32_t count = total_count(shape.edit_counts[at], drafted);
      update_token(values, first, token, [&](float logit) {
        return edit_logit(shape, row.req, logit, count, shape.edit_biases[at]);
      });
    }
  }
  if (penalties) {
    for (int32_t local = row.local; local > 0; local = parent_row(in, row.req, local)) {
      const int32_t token = draft_token(in, row.req, local);
      const TargetRow before = {row.index, row.req, parent_row(in, row.req, local)};
      const bool done = count_drafted(in, before, token) > 0 || has_edit(shape, row.req, token);
      if (done || token / kZone != zone) continue;
      const int32_t count = count_drafted(in, row, token);
      update_token(values, first, token,
                   [&](float logit) { return edit_logit(shape, row.req, logit, count, 0.f); });
    }
  }
  if (shape.mask != nullptr && first < in.vocab_size) {
    const int64_t num_words = (in.vocab_size + 31) / 32;
    const auto word = static_cast<uint32_t>(shape.mask[row.index * num_words + first / 32]);
    const uint32_t bits = word >> (first % 32);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if ((bits >> j & 1u) == 0) values[j] = -INFINITY;
    }
  }
}

/* A group of a target row, shaped. */
__device__ __forceinline__ void load_target_group(const VerifyInputs& in,
                                                  const TargetRow& row,
                                                  int32_t zone,
                                                  int group,
                                                  float (&values)[kGroup]) {
  const int32_t first = group_token(zone, group);
  load_group(in.target, row.index, first, in.vocab_size, values);
  shape_group(in, row, zone, first, values);
}

}  // namespace dspark
