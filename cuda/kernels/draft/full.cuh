/*
 * The draft head over the whole vocabulary, all steps in one launch, base logits only read.
 *
 *   l_k(v) = U_k(v) + W2[v] . latent;   x_k ~ softmax(l_k / T);   ln sum exp(l_k / T) handed on
 *
 * Mapping: one CTA of 8 warps per SM, each with its own share of the vocabulary: consecutive spans
 * of 64 tokens (span.cuh), the same at every step and in every batch. The last spans of a share
 * stay *resident* in shared memory, as many as fit; the others stream through a ring, forwards on
 * even steps and backwards on odd ones, so that the end of one pass is found in L2 by the next. The
 * ring knows nothing of steps: while a step's winner travels, the next step's rows are on their
 * way. A warp takes a span for up to 32 requests, whose latents it keeps in registers as B
 * fragments (W2 is A); with more requests the warps form 2 or 4 sets, and whoever is last to finish
 * a span refills its place. There is no barrier of the CTA within a step.
 *
 * Between steps: leaders are 64-bit atomic maxima (race.cuh), which also screen later spans; then a
 * count of arrivals that all CTAs wait for, which needs a cooperative launch. The normaliser is
 * summed in the order of spans within a share and of shares over the row, in f64 there, once at the
 * end, together with the confidences.
 *
 * Per step: W2 once for 128 requests (2 or 1 bytes a weight; what is resident or still in L2 does
 * not come from memory), 2 or 4 bytes of base logits per token and request. Limited by memory up to
 * some 64 requests (bf16 W2) and by the products beyond.
 *
 * Dropped: tiles of 16 requests as A and tokens as B with logits written back (memory traffic of 8
 * bytes a logit); one exponential per token (20 instructions for each element).
 */
#pragma once

#include "common/fill.cuh"
#include "common/grid_sync.cuh"
#include "kernels/draft/latent.cuh"
#include "kernels/draft/span.cuh"

namespace dspark {

struct FullPolicy {
  static constexpr int kNumWarps = 8;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMaxReqs = 128;
  static constexpr int kMaxRank = 256;
  static constexpr int kMaxSteps = kMaxRank / kLowRankStep;
  static constexpr int kPadBytes = 16; /* between rows in shared memory: no bank conflicts */
  static constexpr int kMaxSlots = 16; /* of either ring */
};

/* Sizes that host and device agree on; see FullPlan in launch/draft/full.cuh. */
struct FullShape {
  int32_t num_reqs;        /* of this launch, at most kMaxReqs */
  int32_t num_sets;        /* of warps that share a span: 1, 2, 4 */
  int32_t padded_reqs;     /* rows of logits in shared memory */
  int32_t num_spans;       /* of the vocabulary */
  int32_t spans_per_share;
  int32_t num_resident;    /* spans of a share in shared memory throughout */
  int32_t weight_slots;    /* spans in the rings */
  int32_t logit_slots;
  int32_t weight_row_bytes; /* in shared memory, padded */
  int32_t logit_row_bytes;
};

template <typename T, typename W>
struct FullArgs {
  using Latent = typename LowRank<W>::Latent;
  HeadInputs<T> in; /* num_reqs: of the whole batch */
  FullShape shape;
  const W* markov_w2; /* nullptr: no bias */
  const float* w2_scales;
  const void* logits;
  bool f32_logits;
  bool aligned_logits; /* rows start at multiples of 16 bytes */
  int64_t stride_logits_row;
  const int32_t* draft_lens;
  const int32_t* anchor_positions;
  const float* temperature;
  const uint64_t* seeds;
  const int32_t* rules;
  GrammarMask mask;
  int32_t* draft_tokens;
  float* log_normalizers;
  Latent* latents; /* vanilla: written; else read */
  bool vanilla;
  const T* confidence_weight; /* nullptr: none */
  float* confidence;
  float* confidence_logits;
  float confidence_bias;
  bool confidence_with_markov;
  bool confidence_vec;
  RaceKey* keys;      /* [draft_len, in.num_reqs], 0 before the first step */
  uint32_t* arrivals; /* [draft_len] of this launch's requests, 0 before */
  SpanWeight* shares; /* [draft_len, in.num_reqs, num_ctas] */
  int32_t first_req;
  int32_t first_step;
  int32_t num_steps; /* of this launch */
};

/* Shared memory of a CTA. */
struct FullShared {
  uint32_t resident; /* shared addresses */
  uint32_t weights;
  uint32_t logits;
  SpanWeight* spans; /* [spans_per_share, padded_reqs] of this step */
  const unsigned char* base;
};

__host__ __device__ constexpr size_t full_shared_bytes(const FullShape& s) {
  const size_t weight_span = static_cast<size_t>(kSpan) * s.weight_row_bytes;
  const size_t logit_span = static_cast<size_t>(s.padded_reqs) * s.logit_row_bytes;
  return (s.num_resident + s.weight_slots) * weight_span + s.logit_slots * logit_span +
         static_cast<size_t>(s.spans_per_share) * s.padded_reqs * sizeof(SpanWeight);
}

/* Static shared memory. */
struct FullState {
  Fill resident;
  Fill weights[FullPolicy::kMaxSlots];
  Fill logits[FullPolicy::kMaxSlots];
  SpanRunner runners[FullPolicy::kMaxReqs];
};

/* What a CTA works on, and its rings. */
template <typename T, typename W>
struct FullCta {
  const FullArgs<T, W>& args;
  FullState& state;
  FullShared shared;
  int32_t first_span;
  int32_t num_spans;  /* of the share */
  int32_t num_stream; /* of these, through the ring: the first ones */

  __device__ __forceinline__ FullCta(const FullArgs<T, W>& args,
                                     FullState& state,
                                     const float4* dynamic)
      : args(args), state(state) {
    const FullShape& s = args.shape;
    const uint32_t weight_span = kSpan * s.weight_row_bytes;
    shared.base = reinterpret_cast<const unsigned char*>(dynamic);
    shared.resident = shared_address(dynamic);
    shared.weights = shared.resident + s.num_resident * weight_span;
    shared.logits = shared.weights + s.weight_slots * weight_span;
    const uint32_t spans = shared.logits + s.logit_slots * s.padded_reqs * s.logit_row_bytes;
    shared.spans = reinterpret_cast<SpanWeight*>(const_cast<unsigned char*>(shared.base) +
                                                 (spans - shared.resident));
    first_span = static_cast<int32_t>(blockIdx.x) * s.spans_per_share;
    num_spans = min(s.spans_per_share, s.num_spans - first_span);
    num_stream = args.markov_w2 == nullptr ? 0 : max(num_spans - s.num_resident, 0);
  }

  /* The i-th span of a step, relative to the share. */
  __device__ __forceinline__ int32_t span_at(int32_t step, int32_t i) const {
    return i < num_stream && step % 2 != 0 ? num_stream - 1 - i : i;
  }

  __device__ __forceinline__ bool takes_part(int32_t q, int32_t step) const {
    return q < args.shape.num_reqs && step < state.runners[q].draft_len;
  }

  __device__ __forceinline__ int32_t tokens_of(int32_t span) const {
    return min(kSpan, args.in.vocab_size - (first_span + span) * kSpan);
  }

  __device__ __forceinline__ const unsigned char* logit_row(int32_t q, int32_t step) const {
    const int64_t row = static_cast<int64_t>(args.first_req + q) * args.in.draft_len + step;
    return static_cast<const unsigned char*>(args.logits) +
           row * args.stride_logits_row * (args.f32_logits ? 4 : 2);
  }

  /* Whether a span's base logits come by way of shared memory. */
  __device__ __forceinline__ bool staged(int32_t span) const {
    return args.aligned_logits && tokens_of(span) == kSpan;
  }

  /* W2 rows of a span into shared memory, by a warp. Token t becomes row t % 8 * 8 + t / 8: rows
   * that ldmatrix reads together are neighbours. */
  __device__ __forceinline__ void copy_weights(uint32_t to, int32_t span) {
    const int lane = threadIdx.x % kWarpSize;
    const int32_t row_bytes = args.in.markov_rank * static_cast<int32_t>(sizeof(W));
    const auto* from = reinterpret_cast<const unsigned char*>(args.markov_w2) +
                       static_cast<int64_t>(first_span + span) * kSpan * row_bytes;
    const int32_t valid = tokens_of(span);
    /* A row is 1 to 32 pieces of 16 bytes: lanes take one or several rows at a time. */
    const int32_t pieces = row_bytes / 16;
    for (int32_t first = 0; first < pieces; first += kWarpSize) {
      const int32_t width = min(pieces - first, kWarpSize);
      const int32_t rows_at_once = kWarpSize / width;
      const int32_t piece = first + lane % width;
      if (lane / width >= rows_at_once) continue;
#pragma unroll 8
      for (int32_t t = lane / width; t < kSpan; t += rows_at_once) {
        copy_async_16(to + (t % 8 * 8 + t / 8) * args.shape.weight_row_bytes + piece * 16,
                      from + (t < valid ? t * row_bytes + piece * 16 : 0), t < valid);
      }
    }
  }

  /* The number-th span of this launch into the ring of weights, if there is one. */
  __device__ __forceinline__ void fill_weight_slot(int32_t number) {
    const int32_t step = args.first_step + (num_stream == 0 ? 0 : number / num_stream);
    if (num_stream == 0 || step >= args.first_step + args.num_steps) return;
    const int32_t slot = number % args.shape.weight_slots;
    begin_fill(state.weights + slot, number / args.shape.weight_slots);
    copy_weights(shared.weights + slot * kSpan * args.shape.weight_row_bytes,
                 span_at(step, number % num_stream));
    end_fill(state.weights + slot);
  }

  __device__ __forceinline__ void fill_logit_slot(int32_t number) {
    const int32_t step = args.first_step + number / num_spans;
    if (step >= args.first_step + args.num_steps) return;
    const int32_t span = span_at(step, number % num_spans);
    const int32_t slot = number % args.shape.logit_slots;
    begin_fill(state.logits + slot, number / args.shape.logit_slots);
    if (staged(span)) {
      const int lane = threadIdx.x % kWarpSize;
      const uint32_t to =
          shared.logits + slot * args.shape.padded_reqs * args.shape.logit_row_bytes;
      const int32_t element = args.f32_logits ? 4 : 2;
      const int32_t pieces = kSpan / 16 * element; /* 8 or 16 */
      const int64_t offset = static_cast<int64_t>(first_span + span) * kSpan * element;
#pragma unroll 4
      for (int32_t q = lane / pieces; q < args.shape.num_reqs; q += kWarpSize / pieces) {
        if (!takes_part(q, step)) continue;
        const int32_t piece = lane % pieces * 16;
        copy_async_16(to + q * args.shape.logit_row_bytes + piece,
                      logit_row(q, step) + offset + piece, true);
      }
    }
    end_fill(state.logits + slot);
  }

  /* This warp has used a fill; the last of the sets starts the next into the same place. */
  template <typename Refill>
  __device__ __forceinline__ void release(Fill* fill, Refill refill) {
    bool is_last = true;
    if (args.shape.num_sets > 1) {
      int32_t before = 0;
      if (threadIdx.x % kWarpSize == 0) {
        __threadfence_block();
        before = atomicAdd_block(&fill->done, 1);
        if (before + 1 == args.shape.num_sets) fill->done = 0;
        __threadfence_block();
      }
      is_last = __shfl_sync(kAllLanes, before, 0) + 1 == args.shape.num_sets;
    }
    __syncwarp();
    if (is_last) refill();
  }
};

/* W1[x_{k-1}] of local request q; the winner of an earlier step is read where the race left it. */
template <typename T, typename W>
__device__ __forceinline__ const T* led_markov_row(const FullArgs<T, W>& args,
                                                   int32_t q,
                                                   int32_t step) {
  const HeadInputs<T>& in = args.in;
  const int32_t req = args.first_req + q;
  const int32_t token =
      step == 0
          ? in.anchors[req]
          : race_token(__ldcg(args.keys + static_cast<int64_t>(step - 1) * in.num_reqs + req));
  if (token < 0 || token >= in.vocab_size) return nullptr;
  return in.markov_w1 + static_cast<int64_t>(token) * in.markov_rank;
}

/* Two neighbours of W1 as a word of latents. */
template <typename Latent, typename T>
__device__ __forceinline__ uint32_t latent_pair(const T* pair) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(pair);
  if constexpr (std::is_same_v<Latent, T>) {
    return word;
  } else {
    constexpr float kLargest = 65504.f; /* of f16 */
    const float2 values = Element<T>::unpack(word);
    return Element<Latent>::pack(fminf(fmaxf(values.x, -kLargest), kLargest),
                                 fminf(fmaxf(values.y, -kLargest), kLargest));
  }
}

/* B fragments of kNTiles groups of 8 requests, whole rank. */
template <int kNTiles>
using SpanLatents = uint32_t[kNTiles][FullPolicy::kMaxSteps][2];

/* The words of one row of latents, zeros for nullptr; all reads are on their way before the first
 * is used. `some` is any row that can be read. */
template <typename W, typename Source>
__device__ __forceinline__ void load_latent_words(const Source* row,
                                                  const Source* some,
                                                  int32_t rank,
                                                  uint32_t (&words)[FullPolicy::kMaxSteps][2]) {
  using Latent = typename LowRank<W>::Latent;
  const int lane = threadIdx.x % kWarpSize;
  const Source* from = (row == nullptr ? some : row) + LowRank<W>::first_column(lane);
#pragma unroll
  for (int s = 0; s < FullPolicy::kMaxSteps; ++s) {
    words[s][0] = words[s][1] = 0u;
    if (s * kLowRankStep >= rank) continue;
    words[s][0] = latent_pair<Latent>(from + s * kLowRankStep);
    words[s][1] = latent_pair<Latent>(from + s * kLowRankStep + LowRank<W>::kSecondPair);
  }
  if (row != nullptr) return;
#pragma unroll
  for (int s = 0; s < FullPolicy::kMaxSteps; ++s) words[s][0] = words[s][1] = 0u;
}

template <int kNTiles, typename T, typename W>
__device__ __forceinline__ void load_span_latents(const FullArgs<T, W>& args,
                                                  int32_t step,
                                                  int32_t first_q,
                                                  SpanLatents<kNTiles>& latents) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t rank = args.in.markov_rank;
#pragma unroll
  for (int group = 0; group < kNTiles; ++group) {
    const int32_t q = first_q + group * kGroupReqs + lane / 4;
    const bool active = q < args.shape.num_reqs;
    const int64_t row = static_cast<int64_t>(args.first_req + q) * args.in.draft_len + step;
    if (args.vanilla) {
      load_latent_words<W>(active ? led_markov_row(args, q, step) : nullptr, args.in.markov_w1,
                           rank, latents[group]);
    } else {
      load_latent_words<W>(active && args.latents != nullptr ? args.latents + row * rank : nullptr,
                           args.latents, rank, latents[group]);
    }
  }
}

/* dots = W2 rows of a span (at shared address `rows`) . latents. */
template <int kNTiles, typename W>
__device__ __forceinline__ void multiply_span(const SpanLatents<kNTiles>& latents,
                                              uint32_t rows,
                                              int32_t rank,
                                              int32_t row_bytes,
                                              SpanTile<kNTiles>& dots) {
  using Latent = typename LowRank<W>::Latent;
  constexpr bool kBytes = LowRank<W>::kScaled;
  constexpr int kStepsPerLoad = kBytes ? 2 : 1;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < kSpanTiles; ++m) {
#pragma unroll
    for (int group = 0; group < kNTiles; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[m][group][i] = 0.f;
    }
  }
  /* 16 bits: matrices rows 0-7, rows 8-15, then the same 16 bytes on. Either way 16 bytes are a
   * matrix' width. */
  const uint32_t lane_row = rows + lane % 16 * row_bytes + lane / 16 * 16;
#pragma unroll
  for (int s = 0; s < FullPolicy::kMaxSteps; s += kStepsPerLoad) {
    if (s * kLowRankStep >= rank) break;
#pragma unroll
    for (int m = 0; m < kSpanTiles; ++m) {
      uint32_t words[4];
      load_matrix_x4(words, lane_row + m * 16 * row_bytes +
                                s * kLowRankStep * static_cast<int>(sizeof(W)));
      if constexpr (!kBytes) {
#pragma unroll
        for (int group = 0; group < kNTiles; ++group) {
          mma_m16n8k16<Latent>(dots[m][group], words, latents[group][s][0], latents[group][s][1]);
        }
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if ((s + half) * kLowRankStep >= rank) break;
          const uint2 low = LowRank<W>::widen(words[2 * half]);
          const uint2 high = LowRank<W>::widen(words[2 * half + 1]);
          const uint32_t a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
          for (int group = 0; group < kNTiles; ++group) {
            mma_m16n8k16<Latent>(dots[m][group], a, latents[group][s + half][0],
                                 latents[group][s + half][1]);
          }
        }
      }
    }
  }
}

/* A lane's eight base logits of a request: from `staged` in shared memory or from the row. */
__device__ __forceinline__ void load_base(const unsigned char* staged,
                                          const unsigned char* row, /* from the lane's tokens on */
                                          int32_t left,             /* tokens to the row's end */
                                          bool is_f32,
                                          float (&base)[kLaneTokens]) {
  if (staged != nullptr) {
    if (is_f32) {
      unpack_vec(reinterpret_cast<const uint4*>(staged)[0],
                 *reinterpret_cast<float(*)[4]>(&base[0]));
      unpack_vec(reinterpret_cast<const uint4*>(staged)[1],
                 *reinterpret_cast<float(*)[4]>(&base[4]));
    } else {
      unpack_vec<__nv_bfloat16>(*reinterpret_cast<const uint4*>(staged), base);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    base[i] = -INFINITY;
    if (row == nullptr || i >= left) continue;
    base[i] = is_f32 ? reinterpret_cast<const float*>(row)[i]
                     : Element<__nv_bfloat16>::to_float(
                           reinterpret_cast<const __nv_bfloat16*>(row)[i]);
  }
}

/* Bit i: whether the lane's token i may be drawn: a token of the vocabulary that the grammar allows. */
__device__ __forceinline__ uint32_t allowed_tokens(const GrammarMask& mask,
                                                   int64_t row,
                                                   int32_t first_token,
                                                   int32_t left) {
  if (left <= 0) return 0u;
  const uint32_t in_row = left >= kLaneTokens ? 0xffu : (1u << left) - 1u;
  if (mask.words == nullptr) return in_row;
  const auto word = static_cast<uint32_t>(mask.words[row * mask.words_per_row + first_token / 32]);
  return word >> first_token % 32 & in_row;
}

/* Products become logits. `slot`: base logits in shared memory, from the warp's first request on, or
 * nullptr. */
template <int kNTiles, typename T, typename W>
__device__ __forceinline__ void add_base(const FullCta<T, W>& cta,
                                         const unsigned char* slot,
                                         int32_t first_q,
                                         int32_t step,
                                         int32_t span,
                                         SpanTile<kNTiles>& tile) {
  const FullArgs<T, W>& args = cta.args;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t token = (cta.first_span + span) * kSpan + lane / 4 * kLaneTokens;
  const int32_t left = args.in.vocab_size - token;
  const int32_t element = args.f32_logits ? 4 : 2;
  if constexpr (LowRank<W>::kScaled) {
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const float scale = i < left && args.markov_w2 != nullptr ? args.w2_scales[token + i] : 0.f;
#pragma unroll
      for (int j = 0; j < 2 * kNTiles; ++j) {
        float& dot = span_element<kNTiles>(tile, j / 2, j % 2, i);
        dot = low_rank_bias<W>(dot, scale);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2 * kNTiles; ++j) {
    const int32_t q = first_q + j / 2 * kGroupReqs + lane % 4 * 2 + j % 2;
    const bool active = cta.takes_part(q, step);
    const int64_t row = static_cast<int64_t>(args.first_req + q) * args.in.draft_len + step;
    float base[kLaneTokens];
    load_base(slot == nullptr ? nullptr
                              : slot + (q - first_q) * args.shape.logit_row_bytes +
                                    lane / 4 * kLaneTokens * element,
              active ? cta.logit_row(q, step) + static_cast<int64_t>(token) * element : nullptr,
              left, args.f32_logits, base);
    const uint32_t allowed = active ? allowed_tokens(args.mask, row, token, left) : 0u;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      float& l = span_element<kNTiles>(tile, j / 2, j % 2, i);
      l = __fadd_rn(base[i], l);
      if ((allowed >> i & 1u) == 0) l = -INFINITY;
    }
  }
}

/* One span for this warp. */
template <int kNTiles, typename T, typename W>
__device__ __forceinline__ void run_span(FullCta<T, W>& cta,
                                         const SpanLatents<kNTiles>& latents,
                                         SpanOwner& owner,
                                         int32_t step,
                                         int32_t i, /* of the step */
                                         int32_t first_q) {
  const FullArgs<T, W>& args = cta.args;
  const FullShape& shape = args.shape;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t steps_done = step - args.first_step;
  const int32_t span = cta.span_at(step, i);
  const int32_t span_bytes = kSpan * shape.weight_row_bytes;
  RaceKey* keys = args.keys + static_cast<int64_t>(step) * args.in.num_reqs + args.first_req +
                  first_q;
  /* Asked for now, used after the products. */
  const RaceKey latest = owner.runner == nullptr ? kEmptyRaceKey : __ldcg(keys + owned_request(lane));

  SpanTile<kNTiles> tile;
  const bool streams = i < cta.num_stream;
  const int32_t weight_fill = steps_done * cta.num_stream + i;
  const int32_t weight_slot = weight_fill % max(shape.weight_slots, 1);
  if (args.markov_w2 != nullptr) {
    if (streams) {
      wait_for_fill(cta.state.weights + weight_slot, weight_fill / shape.weight_slots);
    } else {
      wait_for_fill(&cta.state.resident, 0);
    }
    const uint32_t rows = streams ? cta.shared.weights + weight_slot * span_bytes
                                  : cta.shared.resident + (span - cta.num_stream) * span_bytes;
    multiply_span<kNTiles, W>(latents, rows, args.in.markov_rank, shape.weight_row_bytes, tile);
    if (streams) {
      cta.release(cta.state.weights + weight_slot,
                  [&] { cta.fill_weight_slot(weight_fill + shape.weight_slots); });
    }
  } else {
    multiply_span<kNTiles, W>(latents, 0, 0, 0, tile);
  }

  const int32_t logit_fill = steps_done * cta.num_spans + i;
  const int32_t logit_slot = logit_fill % shape.logit_slots;
  wait_for_fill(cta.state.logits + logit_slot, logit_fill / shape.logit_slots);
  const uint32_t slot = cta.shared.logits +
                        (logit_slot * shape.padded_reqs + first_q) * shape.logit_row_bytes;
  add_base<kNTiles>(cta,
                    cta.staged(span) ? cta.shared.base + (slot - cta.shared.resident) : nullptr,
                    first_q, step, span, tile);
  cta.release(cta.state.logits + logit_slot,
              [&] { cta.fill_logit_slot(logit_fill + shape.logit_slots); });

  const SpanRunner* runners = cta.state.runners + first_q;
  weigh_span<kNTiles>(tile, runners, owner);
  owner.seen = max(owner.seen, latest);
  if (owner.runner != nullptr) {
    cta.shared.spans[span * shape.padded_reqs + first_q + owned_request(lane)] = owner.weight;
  }
  race_span<kNTiles>(tile, runners, owner, step, cta.first_span + span, keys);
}

/* Adds weights, the empty ones aside. */
__device__ __forceinline__ SpanWeight larger_top(SpanWeight a, SpanWeight b) {
  if (b.sum == 0.f) return a;
  return {a.sum == 0.f ? b.scaled_top : fmaxf(a.scaled_top, b.scaled_top), a.sum + b.sum};
}

/* The weights of this CTA's share at a step, spans in order. */
template <typename T, typename W>
__device__ __forceinline__ void publish_share(const FullCta<T, W>& cta, int32_t step) {
  const FullArgs<T, W>& args = cta.args;
  for (int32_t q = threadIdx.x; q < args.shape.num_reqs; q += FullPolicy::kNumThreads) {
    if (!cta.takes_part(q, step)) continue;
    const SpanWeight* spans = cta.shared.spans + q;
    SpanWeight share = {0.f, 0.f};
    for (int32_t i = 0; i < cta.num_spans; ++i) {
      share = larger_top(share, spans[i * args.shape.padded_reqs]);
    }
    float sum = 0.f;
    for (int32_t i = 0; i < cta.num_spans; ++i) {
      const SpanWeight span = spans[i * args.shape.padded_reqs];
      sum += span.sum * fast_exp2(span.scaled_top - share.scaled_top);
    }
    const int64_t row = static_cast<int64_t>(step) * args.in.num_reqs + args.first_req + q;
    args.shares[row * gridDim.x + blockIdx.x] = {share.scaled_top, sum};
  }
}

/* ln of the sum over all shares, by a warp. */
__device__ __forceinline__ float log_normalizer(const SpanWeight* shares, int32_t num_shares) {
  const int lane = threadIdx.x % kWarpSize;
  float top = -INFINITY;
  for (int32_t i = lane; i < num_shares; i += kWarpSize) {
    const float2 share = __ldcg(reinterpret_cast<const float2*>(shares) + i);
    if (share.y != 0.f) top = fmaxf(top, share.x);
  }
  top = warp_reduce(top, MaxOp{});
  double sum = 0.0;
  for (int32_t i = lane; i < num_shares; i += kWarpSize) {
    const float2 share = __ldcg(reinterpret_cast<const float2*>(shares) + i);
    if (share.y != 0.f) {
      sum += static_cast<double>(share.y) * exp2(static_cast<double>(share.x) - top);
    }
  }
  sum = warp_reduce(sum, SumOp{});
  if (sum == 0.0) return -INFINITY;
  return static_cast<float>((top + log2(sum)) * 0.6931471805599453);
}

/* Tokens, normalisers and confidences of the launch's rows, a warp each, after the last race. */
template <typename T, typename W>
__device__ __forceinline__ void finish_rows(const FullCta<T, W>& cta) {
  const FullArgs<T, W>& args = cta.args;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t num_rows = args.shape.num_reqs * args.num_steps;
  for (int32_t i = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x; i < num_rows;
       i += FullPolicy::kNumWarps * gridDim.x) {
    const int32_t q = i / args.num_steps;
    const int32_t step = args.first_step + i % args.num_steps;
    if (!cta.takes_part(q, step)) continue; /* whole warps */
    const int64_t req = args.first_req + q;
    const int64_t row = req * args.in.draft_len + step;
    const int64_t race = static_cast<int64_t>(step) * args.in.num_reqs + req;
    const float normalizer = log_normalizer(args.shares + race * gridDim.x, gridDim.x);
    if (lane == 0) {
      args.draft_tokens[row] = race_token(__ldcg(args.keys + race));
      args.log_normalizers[row] = normalizer;
    }
    if (args.confidence_weight == nullptr) continue;
    const T* markov =
        args.confidence_with_markov ? led_markov_row(args, q, step) : nullptr;
    const T* hidden = hidden_row(args.in, static_cast<int32_t>(req), step);
    const float z = args.confidence_bias +
                    (args.confidence_vec
                         ? confidence_dot<true>(args.confidence_weight, hidden, args.in.hidden_size,
                                                markov, args.in.markov_rank)
                         : confidence_dot<false>(args.confidence_weight, hidden,
                                                 args.in.hidden_size, markov, args.in.markov_rank));
    if (lane != 0) continue;
    args.confidence[row] = sigmoid(z);
    if (args.confidence_logits != nullptr) args.confidence_logits[row] = z;
  }
}

/* Latents of a vanilla head for the law, each by one CTA. */
template <typename T, typename W>
__device__ __forceinline__ void write_latents(const FullCta<T, W>& cta, int32_t step) {
  using Latent = typename FullArgs<T, W>::Latent;
  const FullArgs<T, W>& args = cta.args;
  const int32_t rank = args.in.markov_rank;
  for (int32_t q = blockIdx.x; q < args.shape.num_reqs; q += gridDim.x) {
    if (!cta.takes_part(q, step)) continue;
    const T* markov = led_markov_row(args, q, step);
    const int64_t row = static_cast<int64_t>(args.first_req + q) * args.in.draft_len + step;
    for (int32_t pair = threadIdx.x; pair < rank / 2; pair += FullPolicy::kNumThreads) {
      reinterpret_cast<uint32_t*>(args.latents + row * rank)[pair] =
          markov == nullptr ? 0u : latent_pair<Latent>(markov + 2 * pair);
    }
  }
}

template <typename T, typename W>
__device__ __forceinline__ void set_up(FullCta<T, W>& cta) {
  const FullArgs<T, W>& args = cta.args;
  FullState& state = cta.state;
  for (int q = threadIdx.x; q < FullPolicy::kMaxReqs; q += FullPolicy::kNumThreads) {
    SpanRunner runner = {};
    if (q < args.shape.num_reqs) {
      const int32_t req = args.first_req + q;
      const float temperature = args.temperature[req];
      const uint32_t purpose = draft_purpose(args.rules, req);
      const bool hot = temperature > 0.f;
      runner.runner = {args.seeds[req], temperature, hot ? kLog2e / temperature : kLog2e,
                       args.anchor_positions[req] + 1, purpose};
      runner.mode = !hot                              ? DrawMode::kGreedy
                    : purpose == DSPARK_PURPOSE_BONUS ? DrawMode::kCoupled
                                                      : DrawMode::kSampled;
      runner.draft_len = args.draft_lens == nullptr ? args.in.draft_len
                                                    : min(args.draft_lens[req], args.in.draft_len);
    }
    state.runners[q] = runner;
  }
  if (threadIdx.x == 0) {
    fill_init(&state.resident);
    for (int i = 0; i < args.shape.weight_slots; ++i) fill_init(state.weights + i);
    for (int i = 0; i < args.shape.logit_slots; ++i) fill_init(state.logits + i);
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarpSize;
  for (int i = warp; i < args.shape.weight_slots; i += FullPolicy::kNumWarps) {
    cta.fill_weight_slot(i);
  }
  for (int i = warp; i < args.shape.logit_slots; i += FullPolicy::kNumWarps) {
    cta.fill_logit_slot(i);
  }
  if (warp == FullPolicy::kNumWarps - 1 && args.markov_w2 != nullptr) {
    begin_fill(&state.resident, 0);
    for (int i = cta.num_stream; i < cta.num_spans; ++i) {
      cta.copy_weights(
          cta.shared.resident + (i - cta.num_stream) * kSpan * args.shape.weight_row_bytes, i);
    }
    end_fill(&state.resident);
  }
}

/* Grid: shares of the vocabulary, all resident. */
template <typename T, typename W, int kNTiles>
__global__ void __launch_bounds__(FullPolicy::kNumThreads, 1)
    full_kernel(const __grid_constant__ FullArgs<T, W> args) {
  extern __shared__ float4 shared_full[];
  __shared__ FullState state;
  FullCta<T, W> cta(args, state, shared_full);
  set_up(cta);

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int32_t num_turns = FullPolicy::kNumWarps / args.shape.num_sets;
  const int32_t first_q = warp % args.shape.num_sets * kNTiles * kGroupReqs;
  for (int32_t step = args.first_step; step < args.first_step + args.num_steps; ++step) {
    SpanLatents<kNTiles> latents;
    load_span_latents<kNTiles>(args, step, first_q, latents);
    if (args.vanilla) write_latents(cta, step);
    SpanOwner owner = {};
    const int32_t owned = first_q + owned_request(lane);
    if (lane / 4 < 2 * kNTiles && cta.takes_part(owned, step)) {
      owner.runner = state.runners + owned;
    }
    for (int32_t i = warp / args.shape.num_sets; i < cta.num_spans; i += num_turns) {
      run_span<kNTiles>(cta, latents, owner, step, i, first_q);
    }
    __syncthreads(); /* all leaders are pushed and all weights are there */
    publish_share(cta, step);
    __syncthreads();
    if (threadIdx.x == 0) {
      arrive(args.arrivals + step);
      wait_for_arrivals(args.arrivals + step, gridDim.x);
    }
    __syncthreads();
  }
  finish_rows(cta);
}

}  // namespace dspark
