/* Launchers of the norm family: RMSNorm, row gather, SwiGLU product. */
#include "common/host.cuh"
#include "kernels/norm/rms_norm.cuh"
#include "kernels/norm/rows.cuh"

namespace dspark {
namespace {

/* Rows of 16-byte vectors: how RMSNorm and SwiGLU see their operands. */
dspark_status check_vector_rows(const char* name,
                                const char* stride_name,
                                const void* pointer,
                                int64_t stride) {
  DSPARK_TRY(check_pointer(name, pointer, 16));
  return check_multiple(stride_name, stride, 8);
}

dspark_status check_vector_width(const char* name, int32_t width) {
  DSPARK_CHECK_ARG(width > 0 && width % 8 == 0, DSPARK_ERROR_INVALID_ARGUMENT,
                   "%s: expected a positive multiple of 8, got %d", name, width);
  return DSPARK_OK;
}

/* The CTAs of a kernel that gives every row `ctas_per_row` of them. */
dspark_status row_grid(int32_t num_rows, int64_t ctas_per_row, dim3* grid) {
  const int64_t num_ctas = num_rows * ctas_per_row;
  DSPARK_CHECK_ARG(num_ctas <= INT32_MAX, DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "num_rows: expected a grid of at most %d CTAs, got %lld", INT32_MAX,
                   static_cast<long long>(num_ctas));
  *grid = dim3(static_cast<uint32_t>(num_ctas));
  return DSPARK_OK;
}

template <typename T, typename Policy>
dspark_status launch_rms_norm(const dspark_rms_norm_params& p, dspark_stream stream) {
  RmsNormArgs<T> args;
  args.x = static_cast<T*>(p.x);
  args.delta = static_cast<const T*>(p.delta);
  args.tap = static_cast<T*>(p.tap);
  args.weight = static_cast<const T*>(p.weight);
  args.out = static_cast<T*>(p.out);
  args.stride_x_row = p.stride_x_row;
  args.stride_delta_row = p.stride_delta_row;
  args.stride_tap_row = p.stride_tap_row;
  args.stride_out_row = p.stride_out_row;
  args.hidden_size = p.hidden_size;
  args.eps = p.eps;
  return launch("rms_norm_kernel", rms_norm_kernel<T, Policy>, dim3(p.num_rows),
                dim3(Policy::kNumThreads), 0, stream, args);
}

template <typename Unit>
dspark_status launch_gather(const dspark_gather_rows_params& p,
                            int64_t element_bytes,
                            dspark_stream stream) {
  constexpr int64_t kUnitBytes = sizeof(Unit);
  GatherRowsArgs<Unit> args;
  args.src = static_cast<const Unit*>(p.src);
  args.index = p.index;
  args.out = static_cast<Unit*>(p.out);
  args.stride_src_row = p.stride_src_row * element_bytes / kUnitBytes;
  args.stride_out_row = p.stride_out_row * element_bytes / kUnitBytes;
  args.num_src_rows = p.num_src_rows;
  args.units_per_row = static_cast<int32_t>(p.num_cols * element_bytes / kUnitBytes);
  args.ctas_per_row = ceil_div(static_cast<int64_t>(args.units_per_row),
                               static_cast<int64_t>(RowsPolicy::kUnitsPerCta));
  dim3 grid;
  DSPARK_TRY(row_grid(p.num_rows, args.ctas_per_row, &grid));
  return launch("gather_rows_kernel", gather_rows_kernel<Unit>, grid, dim3(RowsPolicy::kNumThreads),
                0, stream, args);
}

bool gather_in_vectors(const dspark_gather_rows_params& p, int64_t element_bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(p.src) | reinterpret_cast<uintptr_t>(p.out) |
                        static_cast<uint64_t>(p.stride_src_row * element_bytes) |
                        static_cast<uint64_t>(p.stride_out_row * element_bytes) |
                        static_cast<uint64_t>(p.num_cols * element_bytes);
  return bits % 16 == 0;
}

}  // namespace
}  // namespace dspark

using namespace dspark;

extern "C" dspark_status DSPARK_FN(dspark_rms_norm)(const dspark_rms_norm_params* params,
                                                    dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, stride_tap_row);
  const dspark_rms_norm_params& p = *params;
  DSPARK_TRY(check_half_dtype(p.dtype));
  DSPARK_TRY(check_range("num_rows", p.num_rows, 0));
  DSPARK_TRY(check_vector_width("hidden_size", p.hidden_size));
  if (p.num_rows == 0) return DSPARK_OK;
  DSPARK_CHECK_ARG(p.tap == nullptr || p.delta != nullptr, DSPARK_ERROR_INVALID_ARGUMENT,
                   "tap: expected NULL without delta");
  DSPARK_TRY(check_vector_rows("x", "stride_x_row", p.x, p.stride_x_row));
  DSPARK_TRY(check_vector_rows("out", "stride_out_row", p.out, p.stride_out_row));
  DSPARK_TRY(check_pointer("weight", p.weight, 16));
  if (p.delta != nullptr) {
    DSPARK_TRY(check_vector_rows("delta", "stride_delta_row", p.delta, p.stride_delta_row));
    DSPARK_CHECK_ARG(p.x != p.out && p.x != p.delta && p.delta != p.out,
                     DSPARK_ERROR_INVALID_ARGUMENT,
                     "x, delta, out: expected distinct buffers when delta is given");
  }
  if (p.tap != nullptr) {
    DSPARK_TRY(check_vector_rows("tap", "stride_tap_row", p.tap, p.stride_tap_row));
    DSPARK_CHECK_ARG(p.tap != p.x && p.tap != p.delta && p.tap != p.out,
                     DSPARK_ERROR_INVALID_ARGUMENT, "tap: expected a buffer of its own");
  }
  return dispatch_half_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int32_t num_vecs = p.hidden_size / 8;
    if (num_vecs <= RmsNormPolicy<32>::kMaxCachedVecs) {
      return launch_rms_norm<T, RmsNormPolicy<32>>(p, stream);
    }
    if (num_vecs <= RmsNormPolicy<128>::kMaxCachedVecs) {
      return launch_rms_norm<T, RmsNormPolicy<128>>(p, stream);
    }
    return launch_rms_norm<T, RmsNormPolicy<512>>(p, stream);
  });
}

extern "C" dspark_status DSPARK_FN(dspark_gather_rows)(const dspark_gather_rows_params* params,
                                                       dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, stride_out_row);
  const dspark_gather_rows_params& p = *params;
  DSPARK_TRY(check_range("num_rows", p.num_rows, 0));
  DSPARK_TRY(check_range("num_src_rows", p.num_src_rows, 0));
  DSPARK_TRY(check_range("num_cols", p.num_cols, 1));
  return dispatch_dtype(p.dtype, [&](auto tag) -> dspark_status {
    constexpr size_t kElementBytes = sizeof(typename decltype(tag)::type);
    using Unit = std::conditional_t<kElementBytes == 4, uint32_t, uint16_t>;
    if (p.num_rows == 0) return DSPARK_OK;
    DSPARK_TRY(check_pointer("src", p.src, kElementBytes));
    DSPARK_TRY(check_aligned("index", p.index, sizeof(int32_t)));
    DSPARK_TRY(check_pointer("out", p.out, kElementBytes));
    return gather_in_vectors(p, kElementBytes) ? launch_gather<uint4>(p, kElementBytes, stream)
                                               : launch_gather<Unit>(p, kElementBytes, stream);
  });
}

extern "C" dspark_status DSPARK_FN(dspark_silu_mul)(const dspark_silu_mul_params* params,
                                                    dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, stride_out_row);
  const dspark_silu_mul_params& p = *params;
  DSPARK_TRY(check_half_dtype(p.dtype));
  DSPARK_TRY(check_range("num_rows", p.num_rows, 0));
  DSPARK_TRY(check_vector_width("ffn_size", p.ffn_size));
  if (p.num_rows == 0) return DSPARK_OK;
  DSPARK_TRY(check_vector_rows("gate_up", "stride_gate_up_row", p.gate_up, p.stride_gate_up_row));
  DSPARK_TRY(check_vector_rows("out", "stride_out_row", p.out, p.stride_out_row));
  return dispatch_half_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    SiluMulArgs<T> args;
    args.gate_up = static_cast<const T*>(p.gate_up);
    args.out = static_cast<T*>(p.out);
    args.stride_gate_up_row = p.stride_gate_up_row;
    args.stride_out_row = p.stride_out_row;
    args.ffn_size = p.ffn_size;
    args.ctas_per_row = ceil_div(p.ffn_size / 8, RowsPolicy::kUnitsPerCta);
    dim3 grid;
    DSPARK_TRY(row_grid(p.num_rows, args.ctas_per_row, &grid));
    return launch("silu_mul_kernel", silu_mul_kernel<T>, grid, dim3(RowsPolicy::kNumThreads), 0,
                  stream, args);
  });
}
