/*
 * A zone in the registers of a warp, as it lies in memory: 32 logits per lane, packed in pairs where
 * they are 16-bit. Lane and token are related as everywhere (inputs.cuh): a lane has 8 neighbours of
 * each of the zone's strips, quad q is the half q % 2 of those of strip q / 2.
 */
#pragma once

#include "kernels/verify/inputs.cuh"

namespace dspark {

constexpr int kPairsPerLane = kStripsPerZone * kGroup / 2;
constexpr int kQuadsPerLane = kStripsPerZone * kGroup / 4;

/* Floats as integers of the same order; NaN (the positive one that max_nan yields) is the largest. */
__device__ __forceinline__ int32_t ordered(float value) {
  const int32_t bits = __float_as_int(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float from_ordered(int32_t key) {
  return __int_as_float(key ^ (key >> 31 & 0x7fffffff));
}

/* The larger; NaN if one is. */
__device__ __forceinline__ float max_nan(float a, float b) {
  float result = a > b ? a : b;
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
#endif
  return result;
}

/* 16 bytes that are read once. */
__device__ __forceinline__ uint4 load_streamed(const void* address) {
  uint4 raw = {};
#ifdef __CUDA_ARCH__
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(address));
#endif
  return raw;
}

/* Two logits of T in a word. */
template <typename T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  static constexpr uint32_t kFill = 0xff80ff80u; /* -inf */
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    const __nv_bfloat162 larger = __hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                              *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&larger);
  }
};

template <>
struct Pair<__half> {
  static constexpr uint32_t kFill = 0xfc00fc00u; /* -inf */
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    const __half2 larger =
        __hmax2_nan(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&larger);
  }
};

/* 16-bit logits. */
template <typename T>
struct ZoneWords {
  uint32_t words[kPairsPerLane];

  __device__ __forceinline__ void load(const LogitMatrix& matrix,
                                       int64_t row,
                                       int32_t zone,
                                       int32_t vocab_size) {
    const T* data = static_cast<const T*>(matrix.data) + row * matrix.stride_row;
#pragma unroll
    for (int strip = 0; strip < kStripsPerZone; ++strip) {
      const int32_t first = strip_token(zone * kStripsPerZone + strip);
      uint4 raw = {Pair<T>::kFill, Pair<T>::kFill, Pair<T>::kFill, Pair<T>::kFill};
      if (matrix.aligned && first <= vocab_size - kGroup) {
        raw = load_streamed(data + first);
      } else if (first < vocab_size) {
        raw = load_odd(data + first, vocab_size - first);
      }
      words[4 * strip] = raw.x;
      words[4 * strip + 1] = raw.y;
      words[4 * strip + 2] = raw.z;
      words[4 * strip + 3] = raw.w;
    }
  }

  /* `count` > 0 logits that lie anyhow. */
  static __device__ __noinline__ uint4 load_odd(const T* from, int32_t count) {
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto* bits = reinterpret_cast<const uint16_t*>(from) + 2 * i;
      const uint32_t low = 2 * i < count ? bits[0] : Pair<T>::kFill & 0xffffu;
      const uint32_t high = 2 * i + 1 < count ? bits[1] : Pair<T>::kFill & 0xffffu;
      out[i] = high << 16 | low;
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
  }

  __device__ __forceinline__ float2 pair(int i) const { return Element<T>::unpack(words[i]); }

  /* Of this lane's part of a strip; NaN if there is one. */
  __device__ __forceinline__ float strip_max(int strip) const {
    const uint32_t* four = words + 4 * strip;
    const float2 halves = Element<T>::unpack(
        Pair<T>::max(Pair<T>::max(four[0], four[1]), Pair<T>::max(four[2], four[3])));
    return max_nan(halves.x, halves.y);
  }

  /* Of this lane's part of a strip, number `at`, which need not be known when compiling. */
  __device__ __forceinline__ float pick_logit(int strip, int at) const {
    const uint32_t* four = words + 4 * strip;
    const uint32_t low = at < 2 ? four[0] : four[1];
    const uint32_t high = at < 6 ? four[2] : four[3];
    const float2 halves = Element<T>::unpack(at < 4 ? low : high);
    return at % 2 == 0 ? halves.x : halves.y;
  }

  __device__ __forceinline__ float quad_max(int quad) const {
    const float2 halves = Element<T>::unpack(Pair<T>::max(words[2 * quad], words[2 * quad + 1]));
    return fmaxf(halves.x, halves.y);
  }

  /* Quad `at`, which need not be known when compiling. */
  __device__ __forceinline__ void pick_quad(int at, float (&values)[4]) const {
    uint32_t low = words[0], high = words[1];
#pragma unroll
    for (int quad = 1; quad < kQuadsPerLane; ++quad) {
      low = at == quad ? words[2 * quad] : low;
      high = at == quad ? words[2 * quad + 1] : high;
    }
    const float2 first = Element<T>::unpack(low);
    const float2 second = Element<T>::unpack(high);
    values[0] = first.x;
    values[1] = first.y;
    values[2] = second.x;
    values[3] = second.y;
  }
};

template <>
struct ZoneWords<float> {
  float values[kStripsPerZone][kGroup];

  __device__ __forceinline__ void load(const LogitMatrix& matrix,
                                       int64_t row,
                                       int32_t zone,
                                       int32_t vocab_size) {
    const float* data = static_cast<const float*>(matrix.data) + row * matrix.stride_row;
#pragma unroll
    for (int strip = 0; strip < kStripsPerZone; ++strip) {
      load_group_as(data, strip_token(zone * kStripsPerZone + strip), vocab_size, matrix.aligned,
                    values[strip]);
    }
  }

  /* The zone of `words` as the target law sees it. */
  template <typename T>
  __device__ __forceinline__ void shape(const VerifyInputs& in,
                                        const TargetRow& row,
                                        int32_t zone,
                                        const ZoneWords<T>& words) {
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const float2 pair = words.pair(i);
      values[i / 4][i % 4 * 2] = pair.x;
      values[i / 4][i % 4 * 2 + 1] = pair.y;
    }
#pragma unroll
    for (int strip = 0; strip < kStripsPerZone; ++strip) {
      shape_group(in, row, zone * kStripsPerZone + strip, values[strip]);
    }
  }

  __device__ __forceinline__ float2 pair(int i) const {
    return make_float2(values[i / 4][i % 4 * 2], values[i / 4][i % 4 * 2 + 1]);
  }

  __device__ __forceinline__ float strip_max(int strip) const {
    float largest = values[strip][0];
#pragma unroll
    for (int j = 1; j < kGroup; ++j) largest = max_nan(largest, values[strip][j]);
    return largest;
  }

  __device__ __forceinline__ float pick_logit(int strip, int at) const {
    float picked = values[strip][0];
#pragma unroll
    for (int j = 1; j < kGroup; ++j) picked = at == j ? values[strip][j] : picked;
    return picked;
  }

  __device__ __forceinline__ float quad_max(int quad) const {
    const float* first = values[quad / 2] + quad % 2 * 4;
    return fmaxf(fmaxf(first[0], first[1]), fmaxf(first[2], first[3]));
  }

  __device__ __forceinline__ void pick_quad(int at, float (&picked)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      picked[j] = values[0][j];
#pragma unroll
      for (int quad = 1; quad < kQuadsPerLane; ++quad) {
        picked[j] = at == quad ? values[quad / 2][quad % 2 * 4 + j] : picked[j];
      }
    }
  }
};

}  // namespace dspark
