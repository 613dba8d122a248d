/*
 * The two products and the online softmax of one warp, in registers. See paged_attention.cuh.
 */
#pragma once

#include <type_traits>

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/vec.cuh"
#include "kernels/attention/tile.cuh"

namespace dspark {

/* The running softmax of one warp: 16 rows (g and g + 8 per lane) by its share of head_dim.
 *
 * 16-bit keys go to the tensor cores as they are. Keys of 8 bits (e4m3) become f16, which holds them
 * exactly, and so do q and p. Two neighbours of a fragment are then two bytes of a 16-bit unit of
 * ldmatrix, which settles which head dimension stands where: lane c of a quad has, of 16 neighbouring
 * dimensions, 4c .. 4c+3 instead of 2c, 2c+1, 2c+8, 2c+9. Both factors of q K^T are permuted alike;
 * `column` says where the results of p V belong. */
template <typename T, typename Policy>
struct WarpSoftmax {
  static constexpr bool kBytes = Policy::kKeyBytes == 1;
  static constexpr int kOutDims = Policy::kHeadDim / Policy::kWarpsD;
  /* Many dimensions leave registers for the scores of 16 keys at a time. */
  static constexpr bool kIsShort = kOutDims == 256; /* of registers, and of code */
  static constexpr int kKeysPerStep = kIsShort ? 16 : Policy::kKeysPerWarp;
  static constexpr int kKeySteps = kKeysPerStep / 16;
  static constexpr int kDimSteps = Policy::kHeadDim / 16;
  static constexpr int kOutSteps = kOutDims / 16;
  using Factor = std::conditional_t<kBytes, __half, T>; /* of the products */

  uint32_t q[kDimSteps][4];
  float out[2 * kOutSteps][4];
  float row_max[2];
  float row_sum[2]; /* of this lane's columns; the quad is summed at the end */
  float key_scale;  /* of e4m3 keys */

  /* Loads the rows of q. Rows past the last one are zero and see what the last
   * sees; they are never written. */
  __device__ __forceinline__ void load_rows(
      const AttentionArgs<T>& args, const SegmentNote& note, int kv_head, int warp_m, int lane) {
    const int m_end = note.m_end(args.group_size);
    if constexpr (kBytes) key_scale = args.k_scale == nullptr ? 1.0f : args.k_scale[kv_head];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = note.m_begin + warp_m * 16 + lane / 4 + half * 8;
      const bool valid = m < m_end;
      const int row = args.by_group_size.quotient(valid ? m : m_end - 1);
      const int head = kv_head * args.group_size + (valid ? m - row * args.group_size : 0);
      const T* source = args.q + (note.row_begin + row) * args.stride_q_row +
                        static_cast<int64_t>(head) * Policy::kHeadDim;
#pragma unroll
      for (int d = 0; d < kDimSteps; ++d) {
        const uint2 words = valid ? load_q(source + d * 16, lane % 4) : make_uint2(0u, 0u);
        q[d][half] = words.x;
        q[d][2 + half] = words.y;
      }
    }
  }

  /* Empties the sums. */
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_max[half] = -INFINITY;
      row_sum[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < 2 * kOutSteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
  }

  /* The results of a row stand in pairs: value i of pair n belongs to dimension column(n) + i of
   * the warp's share. */
  static __device__ __forceinline__ int column(int n, int lane) {
    return kBytes ? n / 2 * 16 + lane % 4 * 4 + n % 2 * 2 : n * 8 + lane % 4 * 2;
  }
  __device__ __forceinline__ float& value(int n, int half, int i) {
    return kBytes ? out[n - n % 2 + i][2 * half + n % 2] : out[n][2 * half + i];
  }

  /* Both pairs of 16 dimensions of a row. */
  __device__ __forceinline__ float4 values(int step, int half) {
    return make_float4(value(2 * step, half, 0), value(2 * step, half, 1),
                       value(2 * step + 1, half, 0), value(2 * step + 1, half, 1));
  }
  __device__ __forceinline__ void set_values(int step, int half, const float4& values) {
    value(2 * step, half, 0) = values.x;
    value(2 * step, half, 1) = values.y;
    value(2 * step + 1, half, 0) = values.z;
    value(2 * step + 1, half, 1) = values.w;
  }

  /* Takes in keys [first_row, first_row + kKeysPerWarp) of a tile (K, then V); share warp_d of the
   * dimensions is the warp's. */
  __device__ __forceinline__ void step(const AttentionArgs<T>& args,
                                       const SegmentNote& note,
                                       const TileNote& keys,
                                       const unsigned char* tile,
                                       int first_row,
                                       int warp_m,
                                       int warp_d,
                                       int lane) {
    if (note.m_begin + warp_m * 16 >= note.m_end(args.group_size)) return;
#pragma unroll 1
    for (int first = first_row; first < first_row + Policy::kKeysPerWarp; first += kKeysPerStep) {
      const uint64_t mask = keys.key_mask >> first & kAllKeys;
      if (mask == 0) continue;
      float scores[2 * kKeySteps][4];
      multiply_keys(scores, tile, first, lane);
      scale_scores(scores, args);
      mask_scores(scores, mask, args, note, keys.first_key + first, warp_m, lane);
      rescale(scores);
      if (!kIsShort && mask == kAllKeys) {
        multiply_values<false>(scores, mask, tile + Policy::kTileBytes, first, warp_d, lane);
      } else {
        multiply_values<true>(scores, mask, tile + Policy::kTileBytes, first, warp_d, lane);
      }
    }
  }

  /* Completes row_sum over the four lanes of a row, and out; after the last step. */
  __device__ __forceinline__ void complete(const AttentionArgs<T>& args, int kv_head) {
#pragma unroll
    for (int half = 0; half < 2; ++half) row_sum[half] = warp_reduce<4>(row_sum[half], SumOp{});
    if constexpr (kBytes) {
      const float scale = e4m3_unit() * (args.v_scale == nullptr ? 1.0f : args.v_scale[kv_head]);
#pragma unroll
      for (int n = 0; n < 2 * kOutSteps; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= scale;
      }
    }
  }

 private:
  static constexpr uint64_t kAllKeys = ~uint64_t{0} >> (64 - kKeysPerStep);

  /* Bit j: the row sees row j of its request; itself always. */
  static __device__ __forceinline__ uint64_t tree_mask(const AttentionArgs<T>& args,
                                                       const SegmentNote& note,
                                                       int row) {
    const uint32_t* words = args.tree_mask + 2 * (int64_t{note.row_begin} + row);
    return (uint64_t{words[1]} << 32 | words[0]) | uint64_t{1} << (row & 63);
  }

  /* Bit k: `row` sees key first_key + k, if it is there. */
  static __device__ __forceinline__ uint64_t seen_keys(const AttentionArgs<T>& args,
                                                       const SegmentNote& note,
                                                       int row,
                                                       int first_key) {
    if (args.k_block != nullptr) {
      /* Block keys come after all cache keys. */
      const int begin = min(window_begin(note.seq_len, row, args.window), note.seq_len);
      return ~bits_up_to(begin - first_key);
    }
    if (args.tree_mask == nullptr) {
      return bits_up_to(note.seq_len + row + 1 - first_key) &
             ~bits_up_to(window_begin(note.seq_len, row, args.window) - first_key);
    }
    const uint64_t tree = tree_mask(args, note, row);
    const int num_ancestors = __popcll(tree) - 1;
    return shifted(tree, note.seq_len - first_key) |
           (bits_up_to(note.seq_len - first_key) &
            ~bits_up_to(window_begin(note.seq_len, num_ancestors, args.window) - first_key));
  }

  /* Bits [0, n); none for n <= 0, all from 64 on. */
  static __device__ __forceinline__ uint64_t bits_up_to(int n) {
    return n <= 0 ? 0 : (n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1);
  }

  /* bits * 2^n, of which the lowest 64 bits are kept; n of any sign and size. */
  static __device__ __forceinline__ uint64_t shifted(uint64_t bits, int n) {
    if (n >= 64 || n <= -64) return 0;
    return n >= 0 ? bits << n : bits >> -n;
  }

  /* Two words of q for a k = 16 step. */
  static __device__ __forceinline__ uint2 load_q(const T* source, int c) {
    if constexpr (kBytes) {
      const uint2 raw = *reinterpret_cast<const uint2*>(source + c * 4);
      return make_uint2(to_half(raw.x), to_half(raw.y));
    } else {
      return make_uint2(*reinterpret_cast<const uint32_t*>(source + c * 2),
                        *reinterpret_cast<const uint32_t*>(source + c * 2 + 8));
    }
  }

  /* Two values as f16, no larger than f16 holds. */
  static __device__ __forceinline__ uint32_t to_half(uint32_t word) {
    constexpr float kMaxHalf = 65504.0f;
    const float2 pair = Element<T>::unpack(word);
    return Element<__half>::pack(fminf(fmaxf(pair.x, -kMaxHalf), kMaxHalf),
                                 fminf(fmaxf(pair.y, -kMaxHalf), kMaxHalf));
  }

  /* scores = q K^T. B (k = dim, column = key) of K rows is a plain ldmatrix: matrices are (keys
   * 0-7, first 16 bytes), (keys 0-7, next 16), (keys 8-15, first), (keys 8-15, next). */
  __device__ __forceinline__ void multiply_keys(float (&scores)[2 * kKeySteps][4],
                                                const unsigned char* k_stage,
                                                int first_row,
                                                int lane) const {
#pragma unroll
    for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
    const int row = first_row + lane / 16 * 8 + lane % 8;
    const int half = lane / 8 % 2;
#pragma unroll
    for (int d = 0; d < Policy::kRowBytes / 32; ++d) {
#pragma unroll
      for (int j = 0; j < kKeySteps; ++j) {
        uint32_t b[4];
        load_matrix_x4(b, shared_address(k_stage + tile_offset<Policy::kRowBytes>(row + j * 16,
                                                                                  2 * d + half)));
        if constexpr (kBytes) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            mma_m16n8k16<Factor>(scores[2 * j + i / 2], q[2 * d + i % 2], halves_of_e4m3(b[i]),
                                 halves_of_e4m3(b[i] >> 16));
          }
        } else {
          mma_m16n8k16<Factor>(scores[2 * j], q[d], b[0], b[1]);
          mma_m16n8k16<Factor>(scores[2 * j + 1], q[d], b[2], b[3]);
        }
      }
    }
  }

  /* To base 2, capped where a cap is given. */
  __device__ __forceinline__ void scale_scores(float (&scores)[2 * kKeySteps][4],
                                               const AttentionArgs<T>& args) const {
    const float unit = kBytes ? key_scale * e4m3_unit() : 1.0f;
    if (args.softcap_log2 == 0.0f) {
      const float scale = args.scale_log2 * unit;
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= scale;
      }
      return;
    }
    const float scale = args.softcap_scale * unit;
#pragma unroll
    for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        /* cap * tanh(x) = cap - 2 cap / (1 + e^2x); e^2x may be 0 or inf. */
        const float e = exp2_approx(scores[n][i] * scale);
        scores[n][i] = args.softcap_log2 - __fdividef(2.0f * args.softcap_log2, 1.0f + e);
      }
    }
  }

  /* Puts -inf where the row must not look: by selection, so that whatever a masked product holds is
   * dropped. `mask` has a bit per key that is there; the first is key `first_key` of the request. */
  __device__ __forceinline__ void mask_scores(float (&scores)[2 * kKeySteps][4],
                                              uint64_t mask,
                                              const AttentionArgs<T>& args,
                                              const SegmentNote& note,
                                              int first_key,
                                              int warp_m,
                                              int lane) const {
    if (mask == kAllKeys && note.whole_begin <= first_key &&
        note.whole_end - kKeysPerStep >= first_key) {
      return;
    }
    const int column = lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = note.m_begin + warp_m * 16 + lane / 4 + half * 8;
      const int row = args.by_group_size.quotient(min(m, note.m_end(args.group_size) - 1));
      const uint64_t seen = (mask & seen_keys(args, note, row, first_key)) >> column;
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if ((seen >> (n * 8 + i) & 1) == 0) scores[n][2 * half + i] = -INFINITY;
        }
      }
    }
  }

  /* Turns scores into p and brings sums and output to the new maximum. */
  __device__ __forceinline__ void rescale(float (&scores)[2 * kKeySteps][4]) {
    float decay[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
        tile_max = fmaxf(tile_max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      }
      tile_max = warp_reduce<4>(tile_max, MaxOp{});
      const float new_max = fmaxf(row_max[half], tile_max);
      const float reference = finite_max(new_max);
      decay[half] = exp2_approx(row_max[half] - reference);
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 2 * kKeySteps; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2_approx(scores[n][i] - reference);
          sum += scores[n][i];
        }
      }
      row_sum[half] = row_sum[half] * decay[half] + sum;
      row_max[half] = new_max;
    }
    /* Maxima settle soon: most steps change none, and to multiply by one changes nothing. */
    if (__all_sync(kAllLanes, decay[0] == 1.0f && decay[1] == 1.0f)) return;
#pragma unroll
    for (int n = 0; n < 2 * kOutSteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= decay[i / 2];
    }
  }

  /* out += p V. B (k = key, column = dim) of V rows is a transposed ldmatrix: matrices are (keys
   * 0-7, first 16 bytes), (keys 8-15, first), (keys 0-7, next 16), (keys 8-15, next). Values of keys
   * that are not there are cleared, whatever stands in their place: 0 * NaN is not 0. */
  template <bool kSomeAreMissing>
  __device__ __forceinline__ void multiply_values(const float (&p)[2 * kKeySteps][4],
                                                  uint64_t mask,
                                                  const unsigned char* v_stage,
                                                  int first_row,
                                                  int warp_d,
                                                  int lane) {
    const int row = first_row + lane / 8 % 2 * 8 + lane % 8;
    constexpr int kChunks = Policy::kRowBytes / 16 / Policy::kWarpsD; /* of the warp's share */
    const int first_chunk = (Policy::kWarpsD > 1 ? warp_d * kChunks : 0) + lane / 16;
#pragma unroll
    for (int j = 0; j < kKeySteps; ++j) {
      const uint32_t a[4] = {Element<Factor>::pack(p[2 * j][0], p[2 * j][1]),
                             Element<Factor>::pack(p[2 * j][2], p[2 * j][3]),
                             Element<Factor>::pack(p[2 * j + 1][0], p[2 * j + 1][1]),
                             Element<Factor>::pack(p[2 * j + 1][2], p[2 * j + 1][3])};
      const auto present = static_cast<uint32_t>(mask >> (j * 16)) >> (lane % 4 * 2);
      const uint32_t keep[2] = {pair_mask(present), pair_mask(present >> 8)};
#pragma unroll
      for (int d = 0; d < kChunks / 2; ++d) {
        uint32_t b[4];
        load_matrix_x4_transposed(
            b, shared_address(v_stage +
                              tile_offset<Policy::kRowBytes>(row + j * 16, 2 * d + first_chunk)));
        if constexpr (kSomeAreMissing) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i] &= keep[i % 2];
        }
        if constexpr (kBytes) {
          multiply_bytes(out[4 * d], out[4 * d + 1], a, b[0], b[1]);
          multiply_bytes(out[4 * d + 2], out[4 * d + 3], a, b[2], b[3]);
        } else {
          mma_m16n8k16<Factor>(out[2 * d], a, b[0], b[1]);
          mma_m16n8k16<Factor>(out[2 * d + 1], a, b[2], b[3]);
        }
      }
    }
  }

  /* 16 dimensions of V: a word holds, of two keys, an even dimension and the odd one after it. */
  static __device__ __forceinline__ void multiply_bytes(
      float (&even)[4], float (&odd)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    constexpr uint32_t kEvenThenOdd = 0x3120;
    b0 = __byte_perm(b0, 0, kEvenThenOdd);
    b1 = __byte_perm(b1, 0, kEvenThenOdd);
    mma_m16n8k16<Factor>(even, a, halves_of_e4m3(b0), halves_of_e4m3(b1));
    mma_m16n8k16<Factor>(odd, a, halves_of_e4m3(b0 >> 16), halves_of_e4m3(b1 >> 16));
  }

  /* All bits of the halves whose keys, bits 0 and 1, are there. */
  static __device__ __forceinline__ uint32_t pair_mask(uint32_t present) {
    return (present & 1 ? 0x0000ffffu : 0u) | (present & 2 ? 0xffff0000u : 0u);
  }
};

}  // namespace dspark
