/*
 * Host side of a launcher: argument checks that leave a message, dispatch on dtype, kernel launch.
 *
 * A launcher is a list of DSPARK_TRY / DSPARK_CHECK_ARG lines followed by one launch; the first
 * failing line returns its status. Nothing here throws, allocates, synchronises or prints.
 */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dspark.h"

namespace dspark {

/* Keeps the formatted message for dspark_last_error() of this thread and returns `status`.
 * Defined in launch/status.cu. */
dspark_status fail(dspark_status status, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

/* Returns the status of `expr` from the calling launcher unless it is DSPARK_OK. */
#define DSPARK_TRY(expr)                                          \
  do {                                                            \
    const dspark_status dspark_try_status = (expr);               \
    if (dspark_try_status != DSPARK_OK) return dspark_try_status; \
  } while (0)

/* DSPARK_CHECK_ARG(cond, status, fmt, ...): fails the calling launcher unless `cond` holds. */
#define DSPARK_CHECK_ARG(cond, ...)                  \
  do {                                               \
    if (!(cond)) return ::dspark::fail(__VA_ARGS__); \
  } while (0)

/* Checks a params struct: not NULL, and struct_size reaching at least to the end of `last_field`,
 * the last field that version 0.1 of the struct had. A larger struct of a newer caller is taken. */
#define DSPARK_CHECK_PARAMS(params, last_field)                                              \
  DSPARK_TRY(::dspark::check_struct(                                                         \
      (params),                                                                              \
      offsetof(std::remove_cv_t<std::remove_reference_t<decltype(*(params))>>, last_field) + \
          sizeof((params)->last_field)))

template <typename Params>
dspark_status check_struct(const Params* params, size_t min_size) {
  DSPARK_CHECK_ARG(params != nullptr, DSPARK_ERROR_NULL_POINTER,
                   "params: expected a pointer, got NULL");
  DSPARK_CHECK_ARG(params->struct_size >= min_size, DSPARK_ERROR_STRUCT_SIZE,
                   "params.struct_size: expected at least %zu, got %u (set by DSPARK_*_INIT)",
                   min_size, params->struct_size);
  return DSPARK_OK;
}

/* The caller's struct with the fields that its version lacked as zeros: read only this. */
template <typename Params>
Params complete(const Params* params) {
  Params whole = {};
  const size_t given = params->struct_size;
  memcpy(&whole, params, given < sizeof(Params) ? given : sizeof(Params));
  return whole;
}

/* A pointer that may be NULL but must be aligned to `alignment` bytes. */
inline dspark_status check_aligned(const char* name, const void* pointer, size_t alignment) {
  DSPARK_CHECK_ARG(reinterpret_cast<uintptr_t>(pointer) % alignment == 0, DSPARK_ERROR_MISALIGNED,
                   "%s: expected an address aligned to %zu bytes, got %p", name, alignment,
                   pointer);
  return DSPARK_OK;
}

/* A pointer that must be given and aligned to `alignment` bytes. */
inline dspark_status check_pointer(const char* name, const void* pointer, size_t alignment) {
  DSPARK_CHECK_ARG(pointer != nullptr, DSPARK_ERROR_NULL_POINTER,
                   "%s: expected a device pointer, got NULL", name);
  return check_aligned(name, pointer, alignment);
}

/* An integer parameter within [min, max]. */
inline dspark_status check_range(const char* name,
                                 int64_t value,
                                 int64_t min,
                                 int64_t max = INT32_MAX) {
  DSPARK_CHECK_ARG(value >= min && value <= max, DSPARK_ERROR_INVALID_ARGUMENT,
                   "%s: expected a value in [%lld, %lld], got %lld", name,
                   static_cast<long long>(min), static_cast<long long>(max),
                   static_cast<long long>(value));
  return DSPARK_OK;
}

/* A size or stride that 16-byte accesses need to be a multiple of `multiple` elements. */
inline dspark_status check_multiple(const char* name, int64_t value, int64_t multiple) {
  DSPARK_CHECK_ARG(value % multiple == 0, DSPARK_ERROR_MISALIGNED,
                   "%s: expected a multiple of %lld elements, got %lld", name,
                   static_cast<long long>(multiple), static_cast<long long>(value));
  return DSPARK_OK;
}

/* Workspace of the caller against the bytes that the size function asks for; 256-byte aligned.
 * NULL is fine when nothing is needed. */
inline dspark_status check_workspace(const void* workspace, size_t given, size_t needed) {
  if (needed == 0) return DSPARK_OK;
  DSPARK_CHECK_ARG(given >= needed, DSPARK_ERROR_WORKSPACE_TOO_SMALL,
                   "workspace_bytes: expected at least %zu, got %zu", needed, given);
  return check_pointer("workspace", workspace, 256);
}

/* A type as a value, for generic lambdas: using T = typename decltype(tag)::type. */
template <typename T>
struct TypeTag {
  using type = T;
};

inline dspark_status fail_dtype(dspark_dtype dtype, const char* expected) {
  return fail(DSPARK_ERROR_UNSUPPORTED_DTYPE, "dtype: expected %s, got %d", expected,
              static_cast<int>(dtype));
}

/* Checks alone, for launchers that return early before they dispatch. */
inline dspark_status check_half_dtype(dspark_dtype dtype) {
  if (dtype == DSPARK_DTYPE_BF16 || dtype == DSPARK_DTYPE_F16) return DSPARK_OK;
  return fail_dtype(dtype, "DSPARK_DTYPE_BF16 (1) or DSPARK_DTYPE_F16 (2)");
}

/* f(TypeTag<T>) for the 16-bit activation types. */
template <typename F>
dspark_status dispatch_half_dtype(dspark_dtype dtype, F&& f) {
  switch (dtype) {
    case DSPARK_DTYPE_BF16:
      return f(TypeTag<__nv_bfloat16>{});
    case DSPARK_DTYPE_F16:
      return f(TypeTag<__half>{});
    default:
      return check_half_dtype(dtype);
  }
}

/* f(TypeTag<T>) for every dtype of the ABI. */
template <typename F>
dspark_status dispatch_dtype(dspark_dtype dtype, F&& f) {
  switch (dtype) {
    case DSPARK_DTYPE_F32:
      return f(TypeTag<float>{});
    case DSPARK_DTYPE_BF16:
      return f(TypeTag<__nv_bfloat16>{});
    case DSPARK_DTYPE_F16:
      return f(TypeTag<__half>{});
    default:
      return fail_dtype(dtype, "DSPARK_DTYPE_F32 (0), DSPARK_DTYPE_BF16 (1) or _F16 (2)");
  }
}

/* CUDA's answer as a status; `what` names the call or kernel in the message. */
inline dspark_status check_cuda(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return DSPARK_OK;
  cudaGetLastError(); /* the error is reported here; do not leave it for an innocent caller */
  const bool no_image = error == cudaErrorNoKernelImageForDevice ||
                        error == cudaErrorInvalidDeviceFunction ||
                        error == cudaErrorUnsupportedPtxVersion;
  return fail(no_image ? DSPARK_ERROR_UNSUPPORTED_DEVICE : DSPARK_ERROR_CUDA, "%s: %s (%s)", what,
              cudaGetErrorString(error), cudaGetErrorName(error));
}

/* An attribute of the current device. */
inline dspark_status device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  DSPARK_TRY(check_cuda("cudaGetDevice", cudaGetDevice(&device)));
  return check_cuda("cudaDeviceGetAttribute", cudaDeviceGetAttribute(value, attribute, device));
}

/* Lets `kernel` take `shared_bytes` of dynamic shared memory (static shared memory counts against the
 * 48 KB that need no opting in too). The limit belongs to the process: it goes straight to the most
 * that the device has and is never lowered, or a smaller launch of one thread would take from under a
 * larger one of another what that has just asked for. */
template <typename... Params>
dspark_status opt_in_shared(const char* name, void (*kernel)(Params...), size_t shared_bytes) {
  if (shared_bytes == 0) return DSPARK_OK;
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes now;
  DSPARK_TRY(check_cuda(name, cudaFuncGetAttributes(&now, function)));
  const auto wanted = static_cast<int>(shared_bytes);
  if (now.maxDynamicSharedSizeBytes >= wanted) return DSPARK_OK;
  int most = 0;
  DSPARK_TRY(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most));
  most -= static_cast<int>(now.sharedSizeBytes);
  return check_cuda(name,
                    cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         std::max(wanted, most)));
}

/* Where and how a kernel runs. */
struct LaunchShape {
  dim3 grid; /* not empty */
  dim3 cta;
  size_t shared_bytes = 0;
  bool cooperative = false; /* all CTAs resident at once, or the launch fails */
  /* Overlaps the end of the kernel before it: says wait_for_prerequisites() (dependent_launch.cuh)
   * first of all. Where the loaded code has no such instruction the launch is a plain one. */
  bool dependent = false;
  /* CTAs of a cluster, along x; divides the grid; above 1 only where the loaded code knows_sm_90().
   * A kernel compiled for clusters of one size keeps them. */
  uint32_t cluster_ctas = 1;
};

/* Whether the code of `kernel` that was loaded has what sm_90 brought: clusters, dependent launches. */
template <typename... Params>
dspark_status knows_sm_90(const char* name, void (*kernel)(Params...), bool* knows) {
  constexpr int kFirstPtx = 90;
  cudaFuncAttributes loaded;
  DSPARK_TRY(
      check_cuda(name, cudaFuncGetAttributes(&loaded, reinterpret_cast<const void*>(kernel))));
  *knows = loaded.ptxVersion >= kFirstPtx;
  return DSPARK_OK;
}

/* Enqueues `kernel` on `stream`. */
template <typename... Params, typename... Args>
dspark_status launch(const char* name,
                     void (*kernel)(Params...),
                     const LaunchShape& shape,
                     dspark_stream stream,
                     Args&&... args) {
  DSPARK_TRY(opt_in_shared(name, kernel, shape.shared_bytes));
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.cta;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (shape.cluster_ctas > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster_ctas, 1, 1};
  }
  if (shape.dependent) {
    bool knows = false;
    DSPARK_TRY(knows_sm_90(name, kernel, &knows));
    if (knows) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  return check_cuda(name, cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

/* The plain form. */
template <typename... Params, typename... Args>
dspark_status launch(const char* name,
                     void (*kernel)(Params...),
                     dim3 grid,
                     dim3 cta,
                     size_t shared_bytes,
                     dspark_stream stream,
                     Args&&... args) {
  return launch(name, kernel, LaunchShape{grid, cta, shared_bytes}, stream,
                std::forward<Args>(args)...);
}

/* The plain form of a dependent launch. */
template <typename... Params, typename... Args>
dspark_status launch_dependent(const char* name,
                               void (*kernel)(Params...),
                               dim3 grid,
                               dim3 cta,
                               dspark_stream stream,
                               Args&&... args) {
  LaunchShape shape{grid, cta};
  shape.dependent = true;
  return launch(name, kernel, shape, stream, std::forward<Args>(args)...);
}

/* CTAs of `kernel` that the current device runs at once, whatever else it does. */
template <typename... Params>
dspark_status resident_ctas(
    const char* name, void (*kernel)(Params...), int threads, size_t shared_bytes, int* count) {
  DSPARK_TRY(opt_in_shared(name, kernel, shared_bytes));
  int per_sm = 0;
  int num_sms = 0;
  DSPARK_TRY(check_cuda(
      name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_bytes)));
  DSPARK_TRY(device_attribute(cudaDevAttrMultiProcessorCount, &num_sms));
  *count = per_sm * num_sms;
  return DSPARK_OK;
}

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
constexpr T round_up(T a, T multiple) {
  return ceil_div(a, multiple) * multiple;
}

}  // namespace dspark
