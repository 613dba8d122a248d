/*
 * Row movement and the elementwise half of SwiGLU.
 *
 * gather_rows: out[i, :] = src[index[i], :]; an index outside the source writes zeros.
 * silu_mul:    out = silu(gate) * up over [gate | up], silu(x) = x / (1 + exp(-x)).
 *
 * Mapping: a CTA moves kUnitsPerCta neighbouring units of one row, a unit being 16 bytes where
 * pointers, strides and row width allow it, else one element (gather only). Nothing is reused:
 * 2 * row bytes (gather) or 3 * ffn_size * 2 bytes (silu_mul) per row, limited by memory bandwidth.
 */
#pragma once

#include "common/vec.cuh"

namespace dspark {

struct RowsPolicy {
  static constexpr int kNumThreads = 256;
  static constexpr int kUnitsPerThread = 2;
  static constexpr int kUnitsPerCta = kNumThreads * kUnitsPerThread;
};

/* `Unit` is what one thread moves; widths and strides are in units. */
template <typename Unit>
struct GatherRowsArgs {
  const Unit* src;
  const int32_t* index; /* nullptr: row i comes from row i */
  Unit* out;
  int64_t stride_src_row;
  int64_t stride_out_row;
  int32_t num_src_rows;
  int32_t units_per_row;
  int32_t ctas_per_row;
};

template <typename Unit>
__global__ void __launch_bounds__(RowsPolicy::kNumThreads)
    gather_rows_kernel(GatherRowsArgs<Unit> args) {
  const int32_t row = blockIdx.x / args.ctas_per_row;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x % args.ctas_per_row) * RowsPolicy::kUnitsPerCta;
  const int32_t src_row = args.index == nullptr ? row : args.index[row];
  const bool inside = src_row >= 0 && src_row < args.num_src_rows;
  const Unit* src = args.src + (inside ? src_row : 0) * args.stride_src_row;
  Unit* out = args.out + row * args.stride_out_row;

  Unit units[RowsPolicy::kUnitsPerThread];
#pragma unroll
  for (int i = 0; i < RowsPolicy::kUnitsPerThread; ++i) {
    const int64_t unit = first + i * RowsPolicy::kNumThreads + threadIdx.x;
    units[i] = inside && unit < args.units_per_row ? src[unit] : Unit{};
  }
#pragma unroll
  for (int i = 0; i < RowsPolicy::kUnitsPerThread; ++i) {
    const int64_t unit = first + i * RowsPolicy::kNumThreads + threadIdx.x;
    if (unit < args.units_per_row) out[unit] = units[i];
  }
}

template <typename T>
struct SiluMulArgs {
  const T* gate_up;
  T* out;
  int64_t stride_gate_up_row;
  int64_t stride_out_row;
  int32_t ffn_size;
  int32_t ctas_per_row;
};

template <typename T>
__global__ void __launch_bounds__(RowsPolicy::kNumThreads) silu_mul_kernel(SiluMulArgs<T> args) {
  const int64_t row = blockIdx.x / args.ctas_per_row;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x % args.ctas_per_row) * RowsPolicy::kUnitsPerCta;
  const T* gate_row = args.gate_up + row * args.stride_gate_up_row;
  const T* up_row = gate_row + args.ffn_size;
  T* out = args.out + row * args.stride_out_row;
#pragma unroll
  for (int i = 0; i < RowsPolicy::kUnitsPerThread; ++i) {
    const int64_t column = (first + i * RowsPolicy::kNumThreads + threadIdx.x) * 8;
    if (column >= args.ffn_size) return;
    float gate[8], up[8];
    load_vec(gate_row + column, gate);
    load_vec(up_row + column, up);
#pragma unroll
    for (int j = 0; j < 8; ++j) gate[j] = gate[j] / (1.f + expf(-gate[j])) * up[j];
    store_vec(out + column, gate);
  }
}

}  // namespace dspark
