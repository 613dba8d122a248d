/*
 * What acceptance reads: the arrays of a call, and logits as the target law sees them.
 *
 * A row is read by zones of kZone tokens, a warp per zone, or by strips of kStrip, four to a zone, where
 * it is known which one matters. A lane has kGroup neighbours of a strip, in order of the lanes: 16 bytes
 * of 16-bit logits, two accesses of f32. Tokens past the vocabulary are -inf, so that loops need no tail.
 *
 * Shaping (penalties, biases, mask) happens on the values just read. The edits of a request are a
 * list in ascending order, and few fall into a zone, so that a warp finds its part by one binary
 * search and hands each edit to the lane that holds the token. Drafts before the row count as output
 * without being listed. Every step is one rounded f32 operation (the intrinsics keep the compiler
 * from fusing two), which is what makes ties the same everywhere.
 */
#pragma once

#include <cfloat>
#include <type_traits>

#include "common/philox.cuh"
#include "common/vec.cuh"
#include "dspark.h"

namespace dspark {

constexpr int kGroup = 8;
constexpr int kStrip = kWarpSize * kGroup;
constexpr int kZone = 1024; /* tokens that the read of the logits takes together */
constexpr int kStripsPerZone = kZone / kStrip;
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

/* What turns base logits into the logits of a low-rank draft law; w2 nullptr: they are the law's. */
struct LowRankInputs {
  const void* w2; /* [vocab_size, rank] */
  const float* scales;
  const void* latents; /* [num_reqs * draft_len, rank] */
  dspark_dtype w2_dtype;
  int32_t rank;
};

/* The arrays of dspark_accept. Draft rows follow the target rows wherever rows are counted. */
struct VerifyInputs {
  LogitMatrix target; /* [num_rows, vocab_size] */
  LogitMatrix draft;  /* [num_reqs * draft_len, vocab_size]; data nullptr: no dense law */
  const float* draft_log_normalizers;
  LowRankInputs low_rank;
  const int32_t* draft_mask; /* of draft rows; may be nullptr */
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
  bool has_filters;
  bool wants_logprobs;
};

/* Asks for all lines of a kernel's parameters at once, a warp for each. They lie in memory: every line that a
 * launch uses for the first time is a trip of its own, about a microsecond, unless it was asked for. */
template <typename Params>
__device__ __forceinline__ void fetch_params(const Params& params) {
  constexpr int kWordsPerLine = 16;
  constexpr auto kNumWords = static_cast<uint32_t>(sizeof(Params) / sizeof(uint32_t));
  const auto* words = reinterpret_cast<const uint32_t*>(&params);
  const uint32_t stride = blockDim.x / kWarpSize * kWordsPerLine;
  for (uint32_t word = threadIdx.x / kWarpSize * kWordsPerLine; word < kNumWords; word += stride) {
#ifdef __CUDA_ARCH__
    asm volatile("" ::"r"(words[word]));
#endif
  }
}

/* A row of target logits: row `local` of request `req`. */
struct TargetRow {
  int64_t index;
  int32_t req;
  int32_t local;
};

/* The randomness of one draw. */
struct DrawKey {
  uint64_t seed;
  int32_t position;
  uint32_t purpose;
};

/* w = exp2((l - max) * scale) is exp((l - max) / T); finite, so that 0 * scale stays 0. */
__device__ __forceinline__ float weight_scale(float temperature) {
  return fminf(kLog2E / temperature, FLT_MAX);
}

/* 2^x to 2 ulp; below 2^-126 it is 0. */
__device__ __forceinline__ float exp2_flushed(float x) {
  float result = 0.f;
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
#endif
  return result;
}

__device__ __forceinline__ float logit_weight(float logit, float max, float scale) {
  return exp2_flushed((logit - max) * scale);
}

/* The scale of target rows at `temperature`; 0 where no law is needed (greedy). */
__device__ __forceinline__ float scale_of_temperature(const VerifyInputs& in, float temperature) {
  if (temperature > 0.f) return weight_scale(temperature);
  return in.wants_logprobs ? kLog2E : 0.f;
}

/* The same of a request. */
__device__ __forceinline__ float target_scale(const VerifyInputs& in, int32_t req) {
  return scale_of_temperature(in, in.temperature[req]);
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

/* find_request by a warp for one row: 32 places are looked at together, so that a read is enough for 31
 * requests and two for a thousand. */
__device__ __forceinline__ int32_t find_request_by_warp(const VerifyInputs& in, int32_t row) {
  int32_t low = 0, high = in.num_reqs + 1; /* those below `low` start at or before `row` */
#pragma unroll 1
  while (low < high) {
    const int32_t step = (high - low + kWarpSize - 1) / kWarpSize;
    const int32_t at = low + (static_cast<int32_t>(threadIdx.x % kWarpSize) + 1) * step - 1;
    const bool starts = at < high && in.qo_indptr[at] <= row;
    low += __popc(__ballot_sync(kAllLanes, starts)) * step;
    high = min(high, low + step - 1);
  }
  return low > in.num_reqs ? -1 : low - 1;
}

/* The row (of the same request) that `row` > 0 follows. */
__device__ __forceinline__ int32_t parent_row(const VerifyInputs& in, int32_t req, int32_t row) {
  if (in.parents == nullptr) return row - 1;
  const int32_t parent = in.parents[static_cast<int64_t>(req) * in.draft_len + row - 1];
  return max(0, min(parent, row - 1));
}

/* Drafts on the way to `row`. */
__device__ __forceinline__ int32_t row_depth(const VerifyInputs& in, int32_t req, int32_t row) {
  if (in.parents == nullptr) return row;
  int32_t depth = 0;
#pragma unroll 1
  for (int32_t at = row; at > 0; at = parent_row(in, req, at)) ++depth;
  return depth;
}

__device__ __forceinline__ int32_t draft_token(const VerifyInputs& in, int32_t req, int32_t row) {
  return in.draft_tokens[static_cast<int64_t>(req) * in.draft_len + row - 1];
}

/* Times that `token` was drafted on the way to `row`. */
__device__ __forceinline__ int32_t count_drafted(const VerifyInputs& in,
                                                 const TargetRow& row,
                                                 int32_t token) {
  int32_t count = 0;
#pragma unroll 1
  for (int32_t at = row.local; at > 0; at = parent_row(in, row.req, at)) {
    count += draft_token(in, row.req, at) == token;
  }
  return count;
}

/* First edit of the request at or after `token`. */
__device__ __forceinline__ int32_t find_edit(const ShapeInputs& shape, int32_t req, int32_t token) {
  int32_t low = shape.edit_indptr[req], high = shape.edit_indptr[req + 1];
#pragma unroll 1
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

/* Whether a mask, which may be nullptr, allows a token of a row. */
__device__ __forceinline__ bool mask_bit(const int32_t* mask,
                                         int32_t vocab_size,
                                         int64_t row,
                                         int32_t token) {
  if (mask == nullptr) return true;
  const int64_t num_words = (vocab_size + 31) / 32;
  return (static_cast<uint32_t>(mask[row * num_words + token / 32]) >> (token % 32) & 1u) != 0;
}

/* f(row) with the row of a matrix in its type. */
template <typename F>
__device__ __forceinline__ void with_row(const LogitMatrix& matrix, int64_t row, F&& f) {
  const int64_t at = row * matrix.stride_row;
  switch (matrix.dtype) {
    case DSPARK_DTYPE_BF16:
      return f(static_cast<const __nv_bfloat16*>(matrix.data) + at);
    case DSPARK_DTYPE_F16:
      return f(static_cast<const __half*>(matrix.data) + at);
    default:
      return f(static_cast<const float*>(matrix.data) + at);
  }
}

__device__ __forceinline__ float load_logit(const LogitMatrix& matrix, int64_t row, int32_t token) {
  float logit = 0.f;
  with_row(matrix, row, [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    logit = Element<T>::to_float(data[token]);
  });
  return logit;
}

/* One token's logit as penalties, biases and mask make it. */
__device__ __noinline__ float shape_logit(const VerifyInputs& in,
                                          const TargetRow row,
                                          int32_t token,
                                          float logit) {
  const int32_t drafted = has_penalties(in.shape) ? count_drafted(in, row, token) : 0;
  int32_t listed = -1;
  float bias = 0.f;
  if (has_edit(in.shape, row.req, token)) {
    const int32_t at = find_edit(in.shape, row.req, token);
    listed = in.shape.edit_counts[at];
    bias = in.shape.edit_biases[at];
  }
  logit = edit_logit(in.shape, row.req, logit, total_count(listed, drafted), bias);
  return mask_bit(in.shape.mask, in.vocab_size, row.index, token) ? logit : -INFINITY;
}

/* The shaped logit of one token. */
__device__ __forceinline__ float shaped_logit(const VerifyInputs& in,
                                              const TargetRow& row,
                                              int32_t token) {
  const float logit = load_logit(in.target, row.index, token);
  return in.shape.any ? shape_logit(in, row, token, logit) : logit;
}

/* First token of a strip that is this lane's. */
__device__ __forceinline__ int32_t strip_token(int32_t strip) {
  return strip * kStrip + static_cast<int32_t>(threadIdx.x % kWarpSize) * kGroup;
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

/* Shapes what the warp's lanes have just loaded of a strip. */
__device__ __forceinline__ void shape_group(const VerifyInputs& in,
                                            const TargetRow& row,
                                            int32_t strip,
                                            float (&values)[kGroup]) {
  const ShapeInputs& shape = in.shape;
  if (!shape.any) return;
  const int32_t first = strip_token(strip);
  const bool penalties = has_penalties(shape);
  if (shape.edit_indptr != nullptr) {
    const int32_t end = shape.edit_indptr[row.req + 1];
#pragma unroll 1
    for (int32_t at = find_edit(shape, row.req, strip * kStrip); at < end; ++at) {
      const int32_t token = shape.edit_tokens[at];
      if (token - strip * kStrip >= kStrip) break;
      const int32_t drafted = penalties ? count_drafted(in, row, token) : 0;
      const int32_t count = total_count(shape.edit_counts[at], drafted);
      update_token(values, first, token, [&](float logit) {
        return edit_logit(shape, row.req, logit, count, shape.edit_biases[at]);
      });
    }
  }
  if (penalties) {
#pragma unroll 1
    for (int32_t local = row.local; local > 0; local = parent_row(in, row.req, local)) {
      const int32_t token = draft_token(in, row.req, local);
      const TargetRow before = {row.index, row.req, parent_row(in, row.req, local)};
      const bool done = count_drafted(in, before, token) > 0 || has_edit(shape, row.req, token);
      if (done || token / kStrip != strip) continue;
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

/* This lane's part of a strip of a matrix; -inf past the end. */
__device__ __forceinline__ void load_strip(const LogitMatrix& matrix,
                                           int64_t row,
                                           int32_t strip,
                                           int32_t vocab_size,
                                           float (&values)[kGroup]) {
  with_row(matrix, row, [&](const auto* data) {
    load_group_as(data, strip_token(strip), vocab_size, matrix.aligned, values);
  });
}

/* This lane's part of a strip, as it is handed back by functions that are not inlined. */
struct Group {
  float of[kGroup];
};

/* The same of a target row, shaped: any dtype, alignment and shaping. */
__device__ __noinline__ Group load_any_strip(const VerifyInputs& in,
                                             const TargetRow row,
                                             int32_t strip) {
  Group group;
  load_strip(in.target, row.index, strip, in.vocab_size, group.of);
  shape_group(in, row, strip, group.of);
  return group;
}

/* Whether every lane's part of a strip is 16 bytes of memory, or past the end: nearly always. */
__device__ __forceinline__ bool has_raw_strips(const VerifyInputs& in) {
  return in.target.aligned && in.target.dtype != DSPARK_DTYPE_F32 && !in.shape.any &&
         in.vocab_size % kGroup == 0;
}

/* This lane's part of such a strip. */
__device__ __forceinline__ uint4 load_raw_strip(const VerifyInputs& in,
                                                int64_t row,
                                                int32_t strip) {
  const auto* data = static_cast<const uint16_t*>(in.target.data) + row * in.target.stride_row;
  const int32_t first = strip_token(strip);
  if (first < in.vocab_size) return *reinterpret_cast<const uint4*>(data + first);
  const uint32_t low = in.target.dtype == DSPARK_DTYPE_BF16 ? 0xff80ff80u : 0xfc00fc00u; /* -inf */
  return make_uint4(low, low, low, low);
}

__device__ __forceinline__ void unpack_strip(const VerifyInputs& in,
                                             const uint4& raw,
                                             float (&values)[kGroup]) {
  if (in.target.dtype == DSPARK_DTYPE_BF16) {
    unpack_vec<__nv_bfloat16>(raw, values);
  } else {
    unpack_vec<__half>(raw, values);
  }
}

/* This lane's part of a strip of a target row, shaped. What is not usual is out of line: kernels that fit into the
 * instruction cache are worth more than a call. */
__device__ __forceinline__ void load_target_strip(const VerifyInputs& in,
                                                  const TargetRow& row,
                                                  int32_t strip,
                                                  float (&values)[kGroup]) {
  if (has_raw_strips(in)) {
    unpack_strip(in, load_raw_strip(in, row.index, strip), values);
    return;
  }
  const Group group = load_any_strip(in, row, strip);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) values[j] = group.of[j];
}

}  // namespace dspark
