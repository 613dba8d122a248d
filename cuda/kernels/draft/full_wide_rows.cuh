/*
 * W2 for the head over the whole vocabulary with many requests: the group of warps that brings its
 * rows into slabs in shared memory. See full_wide.cuh.
 */
#pragma once

#include "common/bulk_copy.cuh"
#include "common/wgmma.cuh"
#include "kernels/draft/full.cuh"

namespace dspark {

struct WidePolicy {
  static constexpr int kGroupThreads = 128;
  static constexpr int kNumGroups = 4; /* that weigh; one more brings W2 */
  static constexpr int kNumWarps = kNumGroups * 4;
  static constexpr int kNumThreads = (kNumGroups + 1) * kGroupThreads;
  static constexpr int kReqs = 64;   /* of a group */
  static constexpr int kTokens = 16; /* of a lane and request */
  static constexpr int kMaxPlaces = 6;
  static constexpr int kAlignment = 1024;
  static constexpr int kByteStages = 2;      /* spans of e4m3 rows on their way */
  static constexpr int kBringRegisters = 32; /* of a thread; the others share what is left */
  static constexpr int kWeighRegisters = 112;
};

/* Rows and scales of a place are handed over by its two barriers, where whoever read scales arrives by
 * himself. */
struct WideState : FullState {
  float stage_scales[WidePolicy::kByteStages][kSpan]; /* e4m3 */
  float scales[WidePolicy::kMaxPlaces][kSpan];
  uint64_t filled[WidePolicy::kMaxPlaces];
  uint64_t emptied[WidePolicy::kMaxPlaces];
};

/* Row of B that holds a token of the span. */
__host__ __device__ constexpr int wide_row(int token) {
  return token % 16 / 2 * 8 + token / 16 * 2 + token % 2;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* How W2 comes, by the last warps of the CTA. kWhole: the rank is kMaxRank. */
template <bool kWhole, typename T, typename W>
struct WideRows {
  static constexpr int kPieceColumns = 16 / static_cast<int>(sizeof(W));
  static constexpr int kMaxPieces =
      kSpan * FullPolicy::kMaxRank / kPieceColumns / WidePolicy::kGroupThreads; /* of a thread */

  const FullCta<T, W>& cta;

  __device__ __forceinline__ int32_t pieces_of_row() const {
    return (kWhole ? FullPolicy::kMaxRank : cta.args.in.markov_rank) / kPieceColumns;
  }
  static __device__ __forceinline__ int32_t piece(int k) {
    return k * WidePolicy::kGroupThreads + threadIdx.x % WidePolicy::kGroupThreads;
  }
  __device__ __forceinline__ const uint4* from(int32_t span) const {
    return reinterpret_cast<const uint4*>(cta.args.markov_w2) +
           static_cast<int64_t>(cta.first_span + span) * kSpan * pieces_of_row();
  }

  /* 16-bit rows of one span into slabs. */
  __device__ __forceinline__ void copy(int32_t span, uint32_t to) const {
    const int32_t pieces = pieces_of_row();
    const int32_t valid = cta.tokens_of(span) * pieces;
    const uint4* rows = from(span);
#pragma unroll 4
    for (int k = 0; k < kMaxPieces; ++k) {
      const int32_t i = piece(k);
      if (!kWhole && i >= kSpan * pieces) break;
      const int32_t column = i % pieces;
      copy_async_16(to + column / 8 * kSlabBytes + slab_offset(wide_row(i / pieces), column % 8),
                    rows + (i < valid ? i : 0), i < valid);
    }
  }

  /* e4m3 rows of one span as they are; a thread comes back for the pieces that it brought. */
  __device__ __forceinline__ void fetch(int32_t span, uint32_t to) const {
    const int32_t pieces = pieces_of_row();
    const int32_t valid = cta.tokens_of(span) * pieces;
    const uint4* rows = from(span);
#pragma unroll 4
    for (int k = 0; k < kMaxPieces; ++k) {
      const int32_t i = piece(k);
      if (!kWhole && i >= kSpan * pieces) break;
      const int32_t source = kWhole ? own_piece() + k * WidePolicy::kGroupThreads : i;
      copy_async_16(to + i * 16, rows + (source < valid ? source : 0), source < valid);
    }
  }

  /* Of whole rows a thread brings this piece of eight rows, and of the next eight: of eight
   * neighbours four have an even row and four the odd one after it, so that what they store into
   * slabs at once lies in different banks. */
  static __device__ __forceinline__ int32_t own_piece() {
    const int32_t thread = piece(0);
    const int32_t row = thread / 32 * 2 + thread / 4 % 2;
    return row * (FullPolicy::kMaxRank / 16) + thread / 8 % 4 * 4 + thread % 4;
  }

  /* 16 e4m3 numbers as f16, in the order of store_latents(), where the pieces of a slab are. */
  static __device__ __forceinline__ void store_halves(const uint4& bytes,
                                                      unsigned char* first,
                                                      unsigned char* second) {
    const uint2 a = LowRank<__nv_fp8_e4m3>::widen(bytes.x);
    const uint2 b = LowRank<__nv_fp8_e4m3>::widen(bytes.y);
    const uint2 c = LowRank<__nv_fp8_e4m3>::widen(bytes.z);
    const uint2 d = LowRank<__nv_fp8_e4m3>::widen(bytes.w);
    *reinterpret_cast<uint4*>(first) = make_uint4(a.x, b.x, c.x, d.x);
    *reinterpret_cast<uint4*>(second) = make_uint4(a.y, b.y, c.y, d.y);
  }

  /* And from there into slabs as f16. */
  __device__ __forceinline__ void widen(const unsigned char* bytes, unsigned char* to) const {
    if constexpr (kWhole) {
      widen_whole(bytes, to);
      return;
    }
    const int32_t pieces = pieces_of_row();
#pragma unroll 1
    for (int32_t i = piece(0); i < kSpan * pieces; i += WidePolicy::kGroupThreads) {
      const int32_t row = wide_row(i / pieces);
      const int32_t column = i % pieces * 2;
      unsigned char* slab = to + column / 8 * kSlabBytes;
      store_halves(reinterpret_cast<const uint4*>(bytes)[i], slab + slab_offset(row, column % 8),
                   slab + slab_offset(row, column % 8 + 1));
    }
  }

  /* The same of whole rows, eight at a time: a thread keeps its columns, and the row of B of token
   * 8 k + t is that of t and the constant wide_row(8 k), without a carry. */
  __device__ __forceinline__ void widen_whole(const unsigned char* bytes, unsigned char* to) const {
    constexpr int kPieces = FullPolicy::kMaxRank / 16;
    static_assert(WidePolicy::kGroupThreads / kPieces == 8);
    const int row = wide_row(own_piece() / kPieces);
    const int column = own_piece() % kPieces * 2;
    const auto* from = reinterpret_cast<const uint4*>(bytes) + piece(0);
    unsigned char* slab = to + column / 8 * kSlabBytes;
    const uint32_t at = slab_offset(row, column % 8);
#pragma unroll
    for (int k = 0; k < kSpan / 8; ++k) {
      const int more = wide_row(8 * k);
      const uint32_t first = (at ^ (more % 8 * 16)) + more * 128;
      store_halves(from[k * WidePolicy::kGroupThreads], slab + first, slab + (first ^ 16));
    }
  }
};

/* Brings all spans of all steps, in order. */
template <bool kWhole, typename T, typename W>
__device__ __forceinline__ void bring_weights(const FullCta<T, W>& cta, WideState& state) {
  constexpr int kStages = WidePolicy::kByteStages;
  const FullShape& shape = cta.args.shape;
  const WideRows<kWhole, T, W> rows{cta};
  const uint32_t span_bytes = kSpan * shape.weight_row_bytes;
  const uint32_t stage_bytes = shape.padded_reqs * shape.logit_row_bytes;
  const int32_t count = cta.args.num_steps * cta.num_spans;
  const int thread = threadIdx.x % WidePolicy::kGroupThreads;
  const auto span_of = [&](int32_t n) {
    return cta.span_at(cta.args.first_step + n / cta.num_spans, n % cta.num_spans);
  };
  /* Not by those that wait: a fence there would have them wait for their base logits, too. */
  const auto announce = [&](int32_t n) {
    fence_for_wgmma();
    barrier_arrive(state.filled + n % shape.weight_slots);
  };
  auto* places = const_cast<unsigned char*>(cta.shared.base);
  const auto fetch = [&](int32_t n) {
    if (n < count) {
      const int32_t token = (cta.first_span + span_of(n)) * kSpan + thread;
      if (thread < kSpan && token < cta.args.in.vocab_size) {
        copy_async_4(shared_address(&state.stage_scales[n % kStages][thread % kSpan]),
                     cta.args.w2_scales + token);
      }
      rows.fetch(span_of(n), cta.shared.logits + n % kStages * stage_bytes);
    }
    copy_async_commit();
  };
  if constexpr (LowRank<W>::kScaled) {
    for (int32_t n = 0; n < kStages; ++n) fetch(n);
  }
#pragma unroll 1
  for (int32_t n = 0; n < count; ++n) {
    const int32_t place = n % shape.weight_slots;
    barrier_wait(state.emptied + place, (n / shape.weight_slots & 1) ^ 1);
    if constexpr (LowRank<W>::kScaled) {
      copy_async_wait<kStages - 1>(); /* the n-th */
      rows.widen(places + (cta.shared.logits - cta.shared.resident) + n % kStages * stage_bytes,
                 places + (cta.shared.weights - cta.shared.resident) + place * span_bytes);
      if (thread < kSpan) {
        state.scales[place][thread % kSpan] = state.stage_scales[n % kStages][thread % kSpan];
      }
      announce(n);
      fetch(n + kStages);
    } else {
      rows.copy(span_of(n), cta.shared.weights + place * span_bytes);
      copy_async_commit();
      copy_async_wait<1>(); /* the one before */
      if (n > 0) announce(n - 1);
    }
  }
  if constexpr (!LowRank<W>::kScaled) {
    copy_async_wait<0>();
    announce(count - 1);
  }
}

#endif

}  // namespace dspark
