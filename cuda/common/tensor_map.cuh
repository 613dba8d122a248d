/*
 * Descriptions of tensors for the tensor memory accelerator, made on the host. The driver's function
 * is asked for at run time: nothing links to the driver.
 */
#pragma once

#include <cuda.h>

#include "common/host.cuh"

namespace dspark {

/* Five dimensions, innermost first; strides in bytes, multiples of 16, of all but the innermost. */
struct TensorBox {
  const void* base;
  int element_bytes; /* 1 or 2 */
  cuuint64_t sizes[5];
  cuuint64_t strides[4];
  cuuint32_t box[5];
};

/* Describes boxes whose rows, 64 or 128 bytes, are permuted against bank conflicts; where a box
 * reaches past the tensor it is filled with zeros. False where there is no such driver or tensor. */
inline bool encode_tensor_map(const TensorBox& tensor, CUtensorMap* map) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kSinceCuda = 12000;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kSinceCuda,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return false;
  }
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto type =
      tensor.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const auto swizzle = tensor.box[0] * tensor.element_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                  : CU_TENSOR_MAP_SWIZZLE_128B;
  return reinterpret_cast<Encode>(entry)(
             map, type, 5, const_cast<void*>(tensor.base), tensor.sizes, tensor.strides, tensor.box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace dspark
