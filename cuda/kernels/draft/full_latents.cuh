/*
 * Latents of gated and rnn heads between the steps of a launch over the whole vocabulary (latent.cuh
 * has the maths).
 *
 * What h_k adds does not depend on drafts: project_kernel makes P_h h + b of all rows before the first
 * step, with tensor cores. What is left for a step, P [s ; w1], is 64 KB (gated, r = 256) or 400 KB
 * (rnn) of weights, too much for every CTA: each computes r / CTAs elements for all requests and writes
 * them, and one more exchange lets all have the latents. W1's rows and the weights of two or six
 * rows of P come from L2. On an H100 (d 2560, V 151,936) 220 / 256 / 326 / 482 us gated and 224 / 277 / 396 /
 * 637 us rnn at 1 / 16 / 64 / 128 requests, vanilla 185 / 210 / 262 / 371; with a launch for every step and
 * one for its latents 315 / 367 / 369 / 530 and 352 / 507 / 648 / 1071.
 *
 * A request's sums run in an order that depends on d, r, alignment and the number of CTAs only.
 */
#pragma once

#include "common/grid_sync.cuh"
#include "common/mma.cuh"
#include "kernels/draft/full_products.cuh"

namespace dspark {

struct ProjectPolicy {
  static constexpr int kWarps = 16; /* share the columns */
  static constexpr int kNumThreads = kWarps * kWarpSize;
  static constexpr int kOutputs = 16; /* of a CTA */
  static constexpr int kTiles = 4;
  static constexpr int kRows = kTiles * 8;
  static constexpr int kColumns = 32; /* of two products: a lane's 8 are neighbours */
};

template <typename T>
struct ProjectArgs {
  const T* hidden; /* [num_rows, hidden_size] */
  const T* weight; /* first column of h: rows of num_columns */
  const T* bias;   /* [num_outputs] */
  float* out;      /* [num_rows, num_outputs] */
  int32_t num_rows;
  int32_t num_outputs;
  int32_t hidden_size;
  int32_t num_columns;
  bool vec; /* all rows start at multiples of 16 bytes */
};

/* Eight elements of a row from `column` on, zeros past its end or without one. */
template <typename T>
__device__ __forceinline__ uint4 row_piece(const T* row, int32_t column, int32_t size, bool vec) {
  if (row == nullptr || column >= size) return make_uint4(0, 0, 0, 0);
  if (vec) return *reinterpret_cast<const uint4*>(row + column);
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = column + i < size ? Element<T>::to_float(row[column + i]) : 0.f;
  }
  return pack_vec<T>(values);
}

/* Grid: (outputs, rows), kOutputs x kRows a CTA. */
template <typename T>
__global__ void __launch_bounds__(ProjectPolicy::kNumThreads, 1)
    project_kernel(const __grid_constant__ ProjectArgs<T> args) {
  using Policy = ProjectPolicy;
  __shared__ float sums[Policy::kWarps][Policy::kOutputs][Policy::kRows];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int32_t first_output = static_cast<int32_t>(blockIdx.x) * Policy::kOutputs;
  const int32_t first_row = static_cast<int32_t>(blockIdx.y) * Policy::kRows;
  const auto weight_row = [&](int32_t output) {
    return output < args.num_outputs ? args.weight + static_cast<int64_t>(output) * args.num_columns
                                     : nullptr;
  };
  const T* weights[2] = {weight_row(first_output + lane / 4),
                         weight_row(first_output + lane / 4 + 8)};
  const T* rows[Policy::kTiles];
#pragma unroll
  for (int t = 0; t < Policy::kTiles; ++t) {
    const int32_t row = first_row + t * 8 + lane / 4;
    rows[t] =
        row < args.num_rows ? args.hidden + static_cast<int64_t>(row) * args.hidden_size : nullptr;
  }
  float dots[Policy::kTiles][4] = {};
#pragma unroll 2
  for (int32_t first = warp * Policy::kColumns; first < args.hidden_size;
       first += Policy::kWarps * Policy::kColumns) {
    const int32_t column = first + lane % 4 * 8;
    const uint4 low = row_piece(weights[0], column, args.hidden_size, args.vec);
    const uint4 high = row_piece(weights[1], column, args.hidden_size, args.vec);
    const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
    for (int t = 0; t < Policy::kTiles; ++t) {
      const uint4 b = row_piece(rows[t], column, args.hidden_size, args.vec);
      mma_m16n8k16<T>(dots[t], a[0], b.x, b.y);
      mma_m16n8k16<T>(dots[t], a[1], b.z, b.w);
    }
  }
#pragma unroll
  for (int t = 0; t < Policy::kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp][lane / 4 + i / 2 * 8][t * 8 + lane % 4 * 2 + i % 2] = dots[t][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Policy::kOutputs * Policy::kRows; i += Policy::kNumThreads) {
    const int32_t output = first_output + i % Policy::kOutputs;
    const int32_t row = first_row + i / Policy::kOutputs;
    if (output >= args.num_outputs || row >= args.num_rows) continue;
    float sum = Element<T>::to_float(args.bias[output]);
#pragma unroll
    for (int w = 0; w < Policy::kWarps; ++w) {
      sum += sums[w][i % Policy::kOutputs][i / Policy::kOutputs];
    }
    args.out[static_cast<int64_t>(row) * args.num_outputs + output] = sum;
  }
}

/* W1[x_{k-1}] of all requests into shared memory, rows of `rank`, kAtOnce of a warp on their way. */
template <typename T, typename W>
__device__ __forceinline__ void stage_markov_rows(const FullArgs<T, W>& args,
                                                  const SpanRunner* runners,
                                                  T* rows,
                                                  int32_t step,
                                                  int32_t num_warps) {
  constexpr int kAtOnce = 4;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = args.in.markov_rank;
  for (int32_t base = threadIdx.x / kWarpSize; base < args.shape.num_reqs;
       base += kAtOnce * num_warps) {
    uint4 words[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t q = base + i * num_warps;
      if (q >= args.shape.num_reqs || step >= runners[q].draft_len) continue; /* whole warps */
      const T* row = led_markov_row(args, q, step);
      if (row == nullptr || lane >= rank / 8) continue;
      words[i] = __ldg(reinterpret_cast<const uint4*>(row) + lane);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t q = base + i * num_warps;
      if (q >= args.shape.num_reqs || lane >= rank / 8) continue;
      reinterpret_cast<uint4*>(rows + q * rank)[lane] = words[i];
    }
  }
}

__device__ __forceinline__ float dot_8(const float (&a)[8], const float (&b)[8], float sum) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

/* Element j of the latents of requests first_q, + stride, ..., kReqs of them, by a warp; `rows`: W1's of
 * all requests. Lane i finishes the i-th. */
template <bool kRnn, int kReqs, typename T, typename W>
__device__ __forceinline__ void make_elements(const FullArgs<T, W>& args,
                                              const SpanRunner* runners,
                                              const T* rows,
                                              int32_t first_q,
                                              int32_t stride,
                                              int32_t j,
                                              int32_t step) {
  using Latent = typename LowRank<W>::Latent;
  constexpr int kParts = kRnn ? 3 : 1;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = args.in.markov_rank;
  const bool has_state = kRnn && step > 0;
  const bool has_columns = lane < rank / 8;
  const float* before = kRnn ? args.states[(step + 1) % 2] : nullptr;
  const auto takes_part = [&](int32_t q) {
    return q < args.shape.num_reqs && step < runners[q].draft_len;
  };
  /* What the lane's own request starts from, on its way with all else. */
  const int32_t own_q = first_q + lane * stride;
  const bool owns = lane < kReqs && takes_part(own_q);
  const int64_t own_req = args.first_req + own_q;
  const int64_t own_row = own_req * args.in.draft_len + step;
  float z[kParts] = {};
  float own_state = 0.f;
  if (owns) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      z[i] = __ldg(args.projected + own_row * kParts * rank + i * rank + j);
    }
    if (has_state) own_state = __ldcg(before + own_req * rank + j);
  }

  uint4 weights[kParts][kRnn ? 2 : 1] = {};
  if (has_columns) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const T* from =
          args.proj_weight + static_cast<int64_t>(i * rank + j) * args.proj_columns + lane * 8;
      weights[i][0] = row_piece(from, args.proj_markov, args.proj_markov + 8, args.proj_vec);
      if constexpr (kRnn) weights[i][1] = row_piece(from, 0, 8, args.proj_vec);
    }
  }
  float sums[kReqs][kParts] = {};
#pragma unroll
  for (int n = 0; n < kReqs; ++n) {
    const int32_t q = first_q + n * stride;
    if (!takes_part(q) || !has_columns) continue;
    float state[8] = {};
    if (has_state) {
      const auto* from =
          reinterpret_cast<const float4*>(before + (args.first_req + q) * rank) + lane * 2;
      const float4 low = __ldcg(from);
      const float4 high = __ldcg(from + 1);
      state[0] = low.x, state[1] = low.y, state[2] = low.z, state[3] = low.w;
      state[4] = high.x, state[5] = high.y, state[6] = high.z, state[7] = high.w;
    }
    float w1[8];
    load_vec(rows + q * rank + lane * 8, w1);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float weight[8];
      unpack_vec<T>(weights[i][0], weight);
      sums[n][i] = dot_8(weight, w1, 0.f);
      if constexpr (kRnn) {
        unpack_vec<T>(weights[i][1], weight);
        sums[n][i] = dot_8(weight, state, sums[n][i]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kReqs; ++n) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float sum = warp_reduce(sums[n][i], SumOp{});
      if (lane == n) z[i] += sum;
    }
  }
  if (!owns) return;
  float latent;
  if constexpr (kRnn) {
    const float keep = sigmoid(z[0]);
    args.states[step % 2][own_req * rank + j] = keep * own_state + (1.f - keep) * tanhf(z[1]);
    latent = tanhf(z[2]);
  } else {
    latent = sigmoid(z[0]) * Element<T>::to_float(rows[own_q * rank + j]);
  }
  args.latents[own_row * rank + j] = Element<Latent>::from_float(latent);
}

/* The step's latents of a gated or rnn head into args.latents, by all CTAs; `sync`: a barrier of warps
 * 0 .. num_warps - 1, who take part, a warp kReqs requests at once. `shared`: room for a row of W1 for
 * each request. */
template <int kReqs, typename T, typename W, typename Sync>
__device__ __forceinline__ void make_latents(const FullArgs<T, W>& args,
                                             const SpanRunner* runners,
                                             unsigned char* shared,
                                             int32_t step,
                                             int32_t num_warps,
                                             Sync sync) {
  T* rows = reinterpret_cast<T*>(shared);
  stage_markov_rows(args, runners, rows, step, num_warps);
  sync();
  const int32_t rank = args.in.markov_rank;
  const auto num_ctas = static_cast<int32_t>(gridDim.x);
  const int32_t share = (rank + num_ctas - 1) / num_ctas;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * share;
  const int32_t count = min(share, rank - first);
  const int32_t num_groups = (args.shape.num_reqs + kReqs - 1) / kReqs;
  for (int32_t i = threadIdx.x / kWarpSize; i < count * num_groups; i += num_warps) {
    const int32_t group = i / count; /* requests group, + num_groups, ... */
    const int32_t j = first + i % count;
    if (args.rnn) {
      make_elements<true, kReqs>(args, runners, rows, group, num_groups, j, step);
    } else {
      make_elements<false, kReqs>(args, runners, rows, group, num_groups, j, step);
    }
  }
  sync();
  if (threadIdx.x == 0) {
    signal_arrival(args.latent_arrivals + step);
    wait_for_arrivals(args.latent_arrivals + step, gridDim.x);
  }
  sync();
}

}  // namespace dspark
