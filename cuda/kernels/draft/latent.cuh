/*
 * What the semi-autoregressive head computes once per request and step: the latent vector that W2
 * turns into a bias over the vocabulary, and the confidence.
 *
 *   w1 = W1[x_{k-1}]  (zeros when x_{k-1} is outside the vocabulary)
 *   vanilla   latent = w1                                            (read by the bias kernel itself)
 *   gated     latent = sigmoid(P [h_k ; w1] + b) * w1                P [r, d + r]
 *   rnn       [g ; c ; o] = P [s_{k-1} ; w1 ; h_k] + b               P [3r, 2r + d]
 *             s_k = sigmoid(g) s_{k-1} + (1 - sigmoid(g)) tanh(c);   latent = tanh(o)
 *   confidence_k = sigmoid(w . [h_k ; w1] + b), or of h_k alone
 *
 * Mapping: a warp owns one element j of the latent (one row of P, or rows j, r + j, 2r + j) for up
 * to kReqsPerCta requests, so that P is read once for them; lanes stride over the columns in chunks
 * of 16 bytes. The inputs are a few KB per request, shared by all warps through L1 and L2. States
 * are double-buffered over steps, because every warp reads all of s_{k-1}. Confidence needs no
 * more than the tokens, so one launch after the last step does all positions, a warp each.
 *
 * Per step: P once per kReqsPerCta requests (1.4 MB gated, 4.7 MB rnn at d = 2560, r = 256), 2 flops
 * per weight and request; limited by the latency of that read at small batch. A request's sums run
 * in an order that depends on d, r and pointer alignment only.
 */
#pragma once

#include <cmath>

#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace dspark {

struct LatentPolicy {
  static constexpr int kWarpsPerCta = 4;
  static constexpr int kNumThreads = kWarpsPerCta * kWarpSize;
  static constexpr int kReqsPerCta = 4;
};

/* The head's inputs at one step, the same for all kernels of the step. */
template <typename T>
struct HeadInputs {
  const T* hidden;    /* [num_reqs * draft_len, hidden_size] */
  const T* markov_w1; /* [vocab_size, markov_rank] */
  const int32_t* anchors;
  const int32_t* draft_tokens; /* [num_reqs, draft_len]; columns before the step are written */
  int32_t num_reqs;
  int32_t draft_len;
  int32_t vocab_size;
  int32_t hidden_size;
  int32_t markov_rank;
};

/* x_{k-1} for the 0-based step k. */
template <typename T>
__device__ __forceinline__ int32_t previous_token(const HeadInputs<T>& in,
                                                  int32_t req,
                                                  int32_t step) {
  return step == 0 ? in.anchors[req]
                   : in.draft_tokens[static_cast<int64_t>(req) * in.draft_len + step - 1];
}

/* W1[x_{k-1}], or nullptr when the token is outside the vocabulary. */
template <typename T>
__device__ __forceinline__ const T* markov_row(const HeadInputs<T>& in, int32_t req, int32_t step) {
  const int32_t token = previous_token(in, req, step);
  if (token < 0 || token >= in.vocab_size) return nullptr;
  return in.markov_w1 + static_cast<int64_t>(token) * in.markov_rank;
}

template <typename T>
__device__ __forceinline__ const T* hidden_row(const HeadInputs<T>& in, int32_t req, int32_t step) {
  return in.hidden + (static_cast<int64_t>(req) * in.draft_len + step) * in.hidden_size;
}

/* Columns that a lane takes at once: 8 with 16-byte accesses (kVec), else 1. */
template <bool kVec>
constexpr int kChunkSize = kVec ? 8 : 1;

/* kChunkSize<kVec> columns as f32; T is a 16-bit type or f32. */
template <bool kVec, typename T>
__device__ __forceinline__ void load_chunk(const T* from, float (&out)[kChunkSize<kVec>]) {
  if constexpr (!kVec) {
    out[0] = Element<T>::to_float(*from);
  } else if constexpr (sizeof(T) == 2) {
    load_vec(from, out);
  } else {
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  }
}

/* sums[i][q] += weights[i] . inputs[q] over `size` columns, this lane's share. A nullptr input
 * counts as zeros. kVec: size is a multiple of 8 and all rows start at multiples of 16 bytes. */
template <bool kVec, int kNumRows, int kNumReqs, typename T, typename Input>
__device__ __forceinline__ void accumulate_dots(const T* const (&weights)[kNumRows],
                                                const Input* const (&inputs)[kNumReqs],
                                                int32_t size,
                                                float (&sums)[kNumRows][kNumReqs]) {
  constexpr int kChunk = kChunkSize<kVec>;
  for (int32_t column = (threadIdx.x % kWarpSize) * kChunk; column < size;
       column += kWarpSize * kChunk) {
    float weight[kNumRows][kChunk];
#pragma unroll
    for (int i = 0; i < kNumRows; ++i) load_chunk<kVec>(weights[i] + column, weight[i]);
#pragma unroll
    for (int q = 0; q < kNumReqs; ++q) {
      if (inputs[q] == nullptr) continue;
      float input[kChunk];
      load_chunk<kVec>(inputs[q] + column, input);
#pragma unroll
      for (int i = 0; i < kNumRows; ++i) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          sums[i][q] = fmaf(weight[i][j], input[j], sums[i][q]);
        }
      }
    }
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

/* Latents as 16-bit numbers; base nullptr: f32 instead. */
struct LatentRows {
  void* base = nullptr; /* [num_reqs, draft_len, markov_rank] */
  bool is_f16 = false;  /* else bf16 */
  int64_t stride = 0;   /* between requests */
};

template <typename T>
struct LatentArgs {
  HeadInputs<T> in;
  const T* proj_weight;
  const T* proj_bias;
  const float* state_before; /* rnn: [num_reqs, markov_rank]; nullptr: zeros */
  float* state_after;        /* rnn */
  float* latent;             /* [num_reqs, markov_rank] */
  LatentRows rows;           /* instead, where it has a base */
  int32_t step;
};

template <typename T>
__device__ __forceinline__ void store_latent(const LatentArgs<T>& args,
                                             int32_t req,
                                             int32_t j,
                                             float value) {
  const int32_t rank = args.in.markov_rank;
  if (args.rows.base == nullptr) {
    args.latent[static_cast<int64_t>(req) * rank + j] = value;
    return;
  }
  const int64_t at = req * args.rows.stride + static_cast<int64_t>(args.step) * rank + j;
  if (args.rows.is_f16) {
    static_cast<__half*>(args.rows.base)[at] = Element<__half>::from_float(value);
  } else {
    static_cast<__nv_bfloat16*>(args.rows.base)[at] = Element<__nv_bfloat16>::from_float(value);
  }
}

/* kRnn: the rnn head, else gated. Grid: (latent elements / kWarpsPerCta, requests / kReqsPerCta). */
template <typename T, bool kRnn, bool kVec>
__global__ void __launch_bounds__(LatentPolicy::kNumThreads) latent_kernel(LatentArgs<T> args) {
  constexpr int kNumReqs = LatentPolicy::kReqsPerCta;
  constexpr int kNumRows = kRnn ? 3 : 1;
  const HeadInputs<T>& in = args.in;
  const int32_t rank = in.markov_rank;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t j = blockIdx.x * LatentPolicy::kWarpsPerCta + threadIdx.x / kWarpSize;
  if (j >= rank) return; /* whole warps */
  const int32_t first_req = blockIdx.y * kNumReqs;

  const T* hidden[kNumReqs];
  const T* markov[kNumReqs];
  const float* state[kNumReqs];
#pragma unroll
  for (int q = 0; q < kNumReqs; ++q) {
    const int32_t req = first_req + q;
    const bool active = req < in.num_reqs;
    hidden[q] = active ? hidden_row(in, req, args.step) : nullptr;
    markov[q] = active ? markov_row(in, req, args.step) : nullptr;
    state[q] = kRnn && active && args.state_before != nullptr
                   ? args.state_before + static_cast<int64_t>(req) * rank
                   : nullptr;
  }

  const int64_t num_columns = static_cast<int64_t>(in.hidden_size) + (kRnn ? 2 : 1) * rank;
  const int32_t markov_column = kRnn ? rank : in.hidden_size;
  const int32_t hidden_column = kRnn ? 2 * rank : 0;
  const T* state_weights[kNumRows];
  const T* markov_weights[kNumRows];
  const T* hidden_weights[kNumRows];
#pragma unroll
  for (int i = 0; i < kNumRows; ++i) {
    state_weights[i] = args.proj_weight + (static_cast<int64_t>(i) * rank + j) * num_columns;
    markov_weights[i] = state_weights[i] + markov_column;
    hidden_weights[i] = state_weights[i] + hidden_column;
  }
  float sums[kNumRows][kNumReqs] = {};
  if constexpr (kRnn) {
    if (args.state_before != nullptr) {
      accumulate_dots<kVec>(state_weights, state, rank, sums);
    }
  }
  accumulate_dots<kVec>(markov_weights, markov, rank, sums);
  accumulate_dots<kVec>(hidden_weights, hidden, in.hidden_size, sums);

#pragma unroll
  for (int q = 0; q < kNumReqs; ++q) {
    float z[kNumRows];
#pragma unroll
    for (int i = 0; i < kNumRows; ++i) {
      z[i] = warp_reduce(sums[i][q], SumOp{}) + Element<T>::to_float(args.proj_bias[i * rank + j]);
    }
    if (lane != 0 || first_req + q >= in.num_reqs) continue;
    if constexpr (kRnn) {
      const int64_t at = static_cast<int64_t>(first_req + q) * rank + j;
      const float keep = sigmoid(z[0]);
      const float before = state[q] == nullptr ? 0.f : state[q][j];
      args.state_after[at] = keep * before + (1.f - keep) * tanhf(z[1]);
      store_latent(args, first_req + q, j, tanhf(z[2]));
    } else {
      const float w1 = markov[q] == nullptr ? 0.f : Element<T>::to_float(markov[q][j]);
      store_latent(args, first_req + q, j, sigmoid(z[0]) * w1);
    }
  }
}

/* w . [h ; w1] by a warp; `markov` nullptr: without the second part. kVec: sizes are multiples of 8
 * and rows start at multiples of 16 bytes. */
template <bool kVec, typename T>
__device__ __forceinline__ float confidence_dot(
    const T* weight, const T* hidden, int32_t hidden_size, const T* markov, int32_t markov_rank) {
  float sums[1][1] = {};
  const T* const hidden_weight[1] = {weight};
  const T* const hidden_rows[1] = {hidden};
  accumulate_dots<kVec>(hidden_weight, hidden_rows, hidden_size, sums);
  if (markov != nullptr) {
    const T* const markov_weight[1] = {weight + hidden_size};
    const T* const markov_rows[1] = {markov};
    accumulate_dots<kVec>(markov_weight, markov_rows, markov_rank, sums);
  }
  return warp_reduce(sums[0][0], SumOp{});
}

template <typename T>
struct ConfidenceArgs {
  HeadInputs<T> in;
  const T* weight;   /* [hidden_size (+ markov_rank)] */
  float* confidence; /* [num_reqs, draft_len] */
  float bias;
  bool with_markov;
};

/* A warp per (request, step), after all draft tokens are known. */
template <typename T, bool kVec>
__global__ void __launch_bounds__(LatentPolicy::kNumThreads)
    confidence_kernel(ConfidenceArgs<T> args) {
  const HeadInputs<T>& in = args.in;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * LatentPolicy::kWarpsPerCta + threadIdx.x / kWarpSize;
  if (row >= static_cast<int64_t>(in.num_reqs) * in.draft_len) return; /* whole warps */
  const int32_t req = static_cast<int32_t>(row / in.draft_len);
  const int32_t step = static_cast<int32_t>(row % in.draft_len);

  const T* markov = args.with_markov ? markov_row(in, req, step) : nullptr;
  const float z = args.bias + confidence_dot<kVec>(args.weight, hidden_row(in, req, step),
                                                   in.hidden_size, markov, in.markov_rank);
  if (threadIdx.x % kWarpSize == 0) args.confidence[row] = sigmoid(z);
}

}  // namespace dspark
