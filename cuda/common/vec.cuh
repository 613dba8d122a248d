/*
 * Element types and 16-byte vectors: conversion between storage (f32, bf16, f16) and f32, and
 * loads and stores of 16 bytes per thread.
 */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dspark {

/* How a storage type turns into f32 and back (round to nearest even). */
template <typename T>
struct Element;

template <>
struct Element<float> {
  static __device__ __forceinline__ float to_float(float x) { return x; }
  static __device__ __forceinline__ float from_float(float x) { return x; }
};

template <>
struct Element<__nv_bfloat16> {
  static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float x) {
    return __float2bfloat16_rn(x);
  }
  /* Two values in one 32-bit word, the first in the low half. */
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    /* bf16 is the upper half of an f32. */
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
};

template <>
struct Element<__half> {
  static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
};

/* Elements of T in 16 bytes: 4 for f32, 8 for bf16 and f16. */
template <typename T>
constexpr int kVecSize = 16 / static_cast<int>(sizeof(T));

/* 16 bytes of T as f32 values, and back. */
__device__ __forceinline__ void unpack_vec(const uint4& raw, float (&out)[4]) {
  out[0] = __uint_as_float(raw.x);
  out[1] = __uint_as_float(raw.y);
  out[2] = __uint_as_float(raw.z);
  out[3] = __uint_as_float(raw.w);
}

template <typename T>
__device__ __forceinline__ void unpack_vec(const uint4& raw, float (&out)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Element<T>::unpack(words[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

/* Reads kVecSize<T> elements from a 16-byte aligned address. */
template <typename T>
__device__ __forceinline__ void load_vec(const T* address, float (&out)[kVecSize<T>]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(address);
  if constexpr (sizeof(T) == 4) {
    unpack_vec(raw, out);
  } else {
    unpack_vec<T>(raw, out);
  }
}

/* kVecSize<T> f32 values as 16 bytes of T, rounding once. */
template <typename T>
__device__ __forceinline__ uint4 pack_vec(const float (&values)[kVecSize<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i] = Element<T>::pack(values[2 * i], values[2 * i + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

/* Writes 16 bytes to a 16-byte aligned address. */
template <typename T>
__device__ __forceinline__ void store_raw(T* address, const uint4& raw) {
  *reinterpret_cast<uint4*>(address) = raw;
}

/* Writes kVecSize<T> elements to a 16-byte aligned address, rounding once. */
template <typename T>
__device__ __forceinline__ void store_vec(T* address, const float (&values)[kVecSize<T>]) {
  store_raw(address, pack_vec<T>(values));
}

}  // namespace dspark
