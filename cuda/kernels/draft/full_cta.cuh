/*
 * What a CTA of the head over the whole vocabulary works on: its share of the vocabulary and the
 * buffers in shared memory that W2 and the base logits come through. See full.cuh.
 */
#pragma once

#include "common/fill.cuh"
#include "kernels/draft/latent.cuh"
#include "kernels/draft/span.cuh"

namespace dspark {

struct FullPolicy {
  static constexpr int kMaxReqs = 128;
  static constexpr int kMaxRank = 256;
  static constexpr int kMaxSteps = kMaxRank / kLowRankStep;
  static constexpr int kPadBytes = 16; /* between rows in shared memory: no bank conflicts */
  static constexpr int kMaxSlots = 20; /* of either ring */
  static constexpr int kHalfSlots = 3; /* spans of W2 in the ring: 16 bits */
  static constexpr int kByteSlots = 6;
};

/* Warps of a CTA whose warps hold so many groups of 8 requests: what the registers allow. */
__host__ __device__ constexpr int full_warps(int groups_per_warp) {
  return groups_per_warp == 1 ? 20 : groups_per_warp == 2 ? 16 : 12;
}

/* Sizes that host and device agree on; see FullPlan in launch/draft/full.cuh. */
struct FullShape {
  int32_t num_reqs;    /* of this launch, at most kMaxReqs */
  int32_t num_sets;    /* of warps that share a span: 1, 2, 4 */
  int32_t padded_reqs; /* rows of logits in shared memory */
  int32_t num_spans;   /* of the vocabulary */
  int32_t spans_per_share;
  int32_t num_resident; /* spans of a share in shared memory throughout */
  int32_t weight_slots; /* spans in the rings */
  int32_t logit_slots;
  int32_t weight_row_bytes; /* in shared memory, padded */
  int32_t logit_row_bytes;
  int32_t latent_row_bytes; /* 0: no head */
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
  Latent* latents; /* written, each by one CTA */
  bool vanilla;
  bool rnn;
  const T* proj_weight; /* gated, rnn: rows of proj_columns; rnn: the state's columns are first */
  int32_t proj_columns;
  int32_t proj_markov;        /* first column of W1's row */
  bool proj_vec;              /* rows start at multiples of 16 bytes */
  const float* projected;     /* [rows, outputs]: what h adds, with the bias */
  float* states[2];           /* rnn: [in.num_reqs, markov_rank], of even and odd steps */
  uint32_t* latent_arrivals;  /* as arrivals */
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
  unsigned char* latents; /* [padded_reqs], rows of latent_row_bytes */
  SpanWeight* spans;      /* [spans_per_share, padded_reqs] of this step */
  const unsigned char* base;
};

__host__ __device__ constexpr size_t full_shared_bytes(const FullShape& s) {
  const size_t weight_span = static_cast<size_t>(kSpan) * s.weight_row_bytes;
  const size_t logit_span = static_cast<size_t>(s.padded_reqs) * s.logit_row_bytes;
  return (s.num_resident + s.weight_slots) * weight_span + s.logit_slots * logit_span +
         static_cast<size_t>(s.padded_reqs) *
             (s.latent_row_bytes + s.spans_per_share * sizeof(SpanWeight));
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

  __device__ __forceinline__ FullCta(const FullArgs<T, W>& args, FullState& state, float4* dynamic)
      : args(args), state(state) {
    const FullShape& s = args.shape;
    const uint32_t weight_span = kSpan * s.weight_row_bytes;
    shared.base = reinterpret_cast<const unsigned char*>(dynamic);
    shared.resident = shared_address(dynamic);
    shared.weights = shared.resident + s.num_resident * weight_span;
    shared.logits = shared.weights + s.weight_slots * weight_span;
    auto* rest = reinterpret_cast<unsigned char*>(dynamic) + (shared.logits - shared.resident) +
                 s.logit_slots * s.padded_reqs * s.logit_row_bytes;
    shared.latents = rest;
    shared.spans = reinterpret_cast<SpanWeight*>(rest + s.padded_reqs * s.latent_row_bytes);
    first_span = static_cast<int32_t>(blockIdx.x) * s.spans_per_share;
    num_spans = min(s.spans_per_share, s.num_spans - first_span);
    num_stream = args.markov_w2 == nullptr ? 0 : max(num_spans - s.num_resident, 0);
  }

  __device__ __forceinline__ int32_t latent_row_bytes() const {
    return args.shape.latent_row_bytes;
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
  __device__ __forceinline__ void copy_weights(uint32_t to, int32_t span) const {
    constexpr int32_t kWholeBytes = FullPolicy::kMaxRank * static_cast<int32_t>(sizeof(W));
    const auto* from = reinterpret_cast<const unsigned char*>(args.markov_w2);
    const int64_t first_token = static_cast<int64_t>(first_span + span) * kSpan;
    if (args.in.markov_rank == FullPolicy::kMaxRank && tokens_of(span) == kSpan) {
      copy_whole_rows<kWholeBytes>(to, from + first_token * kWholeBytes);
      return;
    }
    const int lane = threadIdx.x % kWarpSize;
    const int32_t row_bytes = args.in.markov_rank * static_cast<int32_t>(sizeof(W));
    const int32_t valid = tokens_of(span);
    from += first_token * row_bytes;
    for (int32_t i = lane; i < kSpan * (row_bytes / 16); i += kWarpSize) {
      const int32_t t = i / (row_bytes / 16);
      const int32_t piece = i % (row_bytes / 16) * 16;
      copy_async_16(to + (t % 8 * 8 + t / 8) * args.shape.weight_row_bytes + piece,
                    from + (t < valid ? t * row_bytes + piece : 0), t < valid);
    }
  }

  /* All rows of kBytes: addresses differ by constants. */
  template <int kBytes>
  __device__ __forceinline__ void copy_whole_rows(uint32_t to, const unsigned char* from) const {
    constexpr int kPieces = kBytes / 16;
    constexpr int kRowsAtOnce = kWarpSize / kPieces; /* 1 or 2, even rows first */
    static_assert(kRowsAtOnce == 1 || kRowsAtOnce == 2);
    constexpr int kPitch = kBytes + FullPolicy::kPadBytes;
    const int lane = threadIdx.x % kWarpSize;
    to += lane / kPieces * 8 * kPitch + lane % kPieces * 16;
    from += lane * 16;
#pragma unroll
    for (int t = 0; t < kSpan; t += kRowsAtOnce) {
      copy_async_16(to + (t % 8 * 8 + t / 8) * kPitch, from + t * kBytes, true);
    }
  }

  /* Starts a fill with the i-th span from the beginning of `step` on, if there is one. */
  __device__ __forceinline__ void fill_weight_slot(int32_t slot,
                                                   int32_t number,
                                                   int32_t step,
                                                   int32_t i) {
    if (num_stream == 0) return;
    for (; i >= num_stream; i -= num_stream) ++step;
    if (step >= args.first_step + args.num_steps) return;
    begin_fill(state.weights + slot, number);
    copy_weights(shared.weights + slot * kSpan * args.shape.weight_row_bytes, span_at(step, i));
    end_fill(state.weights + slot);
  }

  __device__ __forceinline__ void fill_logit_slot(int32_t slot,
                                                  int32_t number,
                                                  int32_t step,
                                                  int32_t i) {
    for (; i >= num_spans; i -= num_spans) ++step;
    if (step >= args.first_step + args.num_steps) return;
    begin_fill(state.logits + slot, number);
    const int32_t span = span_at(step, i);
    if (staged(span)) {
      const int lane = threadIdx.x % kWarpSize;
      const int32_t element = args.f32_logits ? 4 : 2;
      const int32_t pieces = kSpan / 16 * element; /* 8 or 16 */
      const int32_t rows_at_once = kWarpSize / pieces;
      const int32_t row_bytes = args.shape.logit_row_bytes;
      int32_t q = lane / pieces;
      uint32_t to =
          shared.logits + (slot * args.shape.padded_reqs + q) * row_bytes + lane % pieces * 16;
      const unsigned char* from = logit_row(q, step) +
                                  static_cast<int64_t>(first_span + span) * kSpan * element +
                                  lane % pieces * 16;
      const int64_t stride = rows_at_once * args.in.draft_len * args.stride_logits_row * element;
#pragma unroll 4
      for (; q < args.shape.num_reqs; q += rows_at_once) {
        if (takes_part(q, step)) copy_async_16(to, from, true);
        to += rows_at_once * row_bytes;
        from += stride;
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

}  // namespace dspark
