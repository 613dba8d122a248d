/*
 * Products of the head over the whole vocabulary: latents and spans of W2 rows in shared memory.
 * See full.cuh.
 */
#pragma once

#include <type_traits>

#include "common/grid_sync.cuh"
#include "kernels/draft/full_cta.cuh"

namespace dspark {

/* The best of a race's places on the board, once all CTAs have theirs there; by a warp. */
__device__ __forceinline__ RaceKey best_on_board(const RaceKey* board) {
  constexpr int kAtOnce = 5;
  const auto num_ctas = static_cast<int32_t>(gridDim.x);
  RaceKey best = kEmptyRaceKey;
  for (int32_t first = threadIdx.x % kWarpSize; first < num_ctas; first += kAtOnce * kWarpSize) {
    RaceKey keys[kAtOnce];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t cta = first + i * kWarpSize;
        keys[i] = cta < num_ctas ? load_relaxed(board + cta) : kNoLeader;
        all = all && keys[i] != kEmptyRaceKey;
      }
    } while (!all);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) best = max(best, keys[i]);
  }
  __syncwarp();
  best = warp_leader(best);
  return best == kNoLeader ? kEmptyRaceKey : best;
}

/* The leader of local request q at a step, by a warp: where the race left it after all CTAs have
 * arrived, or on the board. */
template <typename T, typename W>
__device__ __forceinline__ RaceKey leader_of(const FullArgs<T, W>& args, int32_t q, int32_t step) {
  const int64_t race = static_cast<int64_t>(step) * args.in.num_reqs + args.first_req + q;
  return LowRank<W>::kScaled && args.board != nullptr ? best_on_board(args.board + race * gridDim.x)
                                                      : __ldcg(args.keys + race);
}

/* x_{k-1} of local request q, by a warp. */
template <typename T, typename W>
__device__ __forceinline__ int32_t led_token(const FullArgs<T, W>& args, int32_t q, int32_t step) {
  return step == 0 ? args.in.anchors[args.first_req + q] : race_token(leader_of(args, q, step - 1));
}

/* W1[x_{k-1}], by a warp; nullptr when the token is outside the vocabulary. */
template <typename T, typename W>
__device__ __forceinline__ const T* led_markov_row(const FullArgs<T, W>& args,
                                                   int32_t q,
                                                   int32_t step) {
  const int32_t token = led_token(args, q, step);
  if (token < 0 || token >= args.in.vocab_size) return nullptr;
  return args.in.markov_w1 + static_cast<int64_t>(token) * args.in.markov_rank;
}

/* Eight neighbours of W1 as latents. */
template <typename Latent, typename T>
__device__ __forceinline__ uint4 to_latents(const uint4& raw) {
  if constexpr (std::is_same_v<Latent, T>) {
    return raw;
  } else {
    constexpr float kLargest = 65504.f; /* of f16 */
    float values[8];
    unpack_vec<T>(raw, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = fminf(fmaxf(values[i], -kLargest), kLargest);
    return pack_vec<Latent>(values);
  }
}

/* Puts piece `piece` of 8 latents where ldmatrix finds the words of a B fragment: as they are, or,
 * for rows of bytes, word w of 8 at w / 2 + w % 2 * 4 (low_rank_logit.cuh). */
template <typename W>
__device__ __forceinline__ void store_latents(unsigned char* row, int piece, const uint4& words) {
  if constexpr (LowRank<W>::kScaled) {
    auto* step = reinterpret_cast<uint2*>(row + piece / 2 * 32);
    step[piece % 2] = make_uint2(words.x, words.z);
    step[2 + piece % 2] = make_uint2(words.y, words.w);
  } else {
    reinterpret_cast<uint4*>(row)[piece] = words;
  }
}

/* The step's latents into shared memory, a row for each padded request, zeros where there is none:
 * store(request, piece, eight latents), by warps 0 .. num_warps - 1, kRowsAtOnce rows each at a
 * time; their barrier follows. Those of a vanilla head are written out, each by one CTA. */
template <int kRowsAtOnce, typename T, typename W, typename Store>
__device__ __forceinline__ void stage_latents(const FullCta<T, W>& cta,
                                              int32_t step,
                                              int32_t num_warps,
                                              Store store) {
  using Latent = typename LowRank<W>::Latent;
  const FullArgs<T, W>& args = cta.args;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t warp = threadIdx.x / kWarpSize;
  const int32_t rank = args.in.markov_rank;
  const bool has_piece = lane < rank / 8;
  for (int32_t base = warp; base < args.shape.padded_reqs; base += kRowsAtOnce * num_warps) {
    uint4 words[kRowsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int32_t q = base + i * num_warps;
      if (!cta.takes_part(q, step)) continue;
      if (args.vanilla) {
        const T* row = led_markov_row(args, q, step);
        if (row != nullptr && has_piece) {
          words[i] = __ldg(reinterpret_cast<const uint4*>(row) + lane);
        }
      } else if (has_piece) {
        const int64_t row = static_cast<int64_t>(args.first_req + q) * args.in.draft_len + step;
        words[i] = __ldcg(reinterpret_cast<const uint4*>(args.latents + row * rank) + lane);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int32_t q = base + i * num_warps;
      if (q >= args.shape.padded_reqs || !has_piece) continue;
      const uint4 latents = args.vanilla ? to_latents<Latent, T>(words[i]) : words[i];
      store(q, lane, latents);
      if (!args.vanilla || q % gridDim.x != blockIdx.x || !cta.takes_part(q, step)) continue;
      const int64_t row = static_cast<int64_t>(args.first_req + q) * args.in.draft_len + step;
      reinterpret_cast<uint4*>(args.latents + row * rank)[lane] = latents;
    }
  }
}

/* B fragments of two steps (columns) for kNTiles groups of 8 requests. */
template <int kNTiles>
using LatentWords = uint32_t[kNTiles][4];

/* dots += W2 rows of a span . latents. `rows`, `latents`: shared addresses of this lane's rows.
 * kWhole: the rank is kMaxRank, and the loop has no branches. */
template <int kNTiles, typename W, bool kWhole>
__device__ __forceinline__ void multiply_steps(
    uint32_t rows, uint32_t latents, int32_t rank, int32_t row_bytes, SpanTile<kNTiles>& dots) {
  using Latent = typename LowRank<W>::Latent;
  constexpr bool kBytes = LowRank<W>::kScaled;
  if (kWhole) {
    rank = FullPolicy::kMaxRank;
    row_bytes = FullPolicy::kMaxRank * static_cast<int>(sizeof(W)) + FullPolicy::kPadBytes;
  }
  const int32_t group_bytes = kGroupReqs * (rank * 2 + FullPolicy::kPadBytes);
#pragma unroll
  for (int s = 0; s < FullPolicy::kMaxSteps; s += 2) {
    if (!kWhole && s * kLowRankStep >= rank) break;
    LatentWords<kNTiles> b;
#pragma unroll
    for (int group = 0; group < kNTiles; ++group) {
      load_matrix_x4(b[group], latents + group * group_bytes + s * kLowRankStep * 2);
    }
#pragma unroll
    for (int m = 0; m < kSpanTiles; ++m) {
      const uint32_t lane_row =
          rows + m * 16 * row_bytes + s * kLowRankStep * static_cast<int>(sizeof(W));
      uint32_t words[4];
      if (kBytes) load_matrix_x4(words, lane_row);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        if (!kWhole && (s + part) * kLowRankStep >= rank) break;
        if constexpr (kBytes) {
          const uint2 low = LowRank<W>::widen(words[2 * part]);
          const uint2 high = LowRank<W>::widen(words[2 * part + 1]);
          const uint32_t a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
          for (int group = 0; group < kNTiles; ++group) {
            mma_m16n8k16<Latent>(dots[m][group], a, b[group][2 * part], b[group][2 * part + 1]);
          }
        } else {
          load_matrix_x4(words, lane_row + part * kLowRankStep * 2);
#pragma unroll
          for (int group = 0; group < kNTiles; ++group) {
            mma_m16n8k16<Latent>(dots[m][group], words, b[group][2 * part], b[group][2 * part + 1]);
          }
        }
      }
    }
  }
}

/* dots = W2 rows of a span . latents; `rows`, `latents`: shared addresses of the first ones. */
template <int kNTiles, typename W>
__device__ __forceinline__ void multiply_span(
    uint32_t rows, uint32_t latents, int32_t rank, int32_t row_bytes, SpanTile<kNTiles>& dots) {
#pragma unroll
  for (int m = 0; m < kSpanTiles; ++m) {
#pragma unroll
    for (int group = 0; group < kNTiles; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[m][group][i] = 0.f;
    }
  }
  /* W2, 16 bits: matrices rows 0-7, rows 8-15, then the same 16 bytes on; 8 bits: the same, and 16
   * bytes are a step. Latents: 16 bytes after the other, two steps. */
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t lane_row = rows + lane % 16 * row_bytes + lane / 16 * 16;
  const uint32_t lane_latent =
      latents + lane % 8 * (rank * 2 + FullPolicy::kPadBytes) + lane / 8 * 16;
  if (rank == FullPolicy::kMaxRank) {
    multiply_steps<kNTiles, W, true>(lane_row, lane_latent, rank, row_bytes, dots);
  } else if (rank > 0) {
    multiply_steps<kNTiles, W, false>(lane_row, lane_latent, rank, row_bytes, dots);
  }
}

}  // namespace dspark
