// How Hopper's copy engine is told of a tensor.
#pragma once

#include <string>

#include "cuda_launch.h"
#include "hopper.h"

namespace sv3d::hopper {

/// The driver's function that describes a tensor to the copy engine; fetched at run time, so nothing is linked.
inline decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status{};
    TVM_FFI_CHECK_CUDA_ERROR(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status));
    if (status != cudaDriverEntryPointSuccess) TVM_FFI_THROW(RuntimeError) << "the driver has no bulk tensor copies";
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

/// Matrices of `rows` rows of `k` halves, all in one piece; boxes of `height` rows of one chunk.
inline CUtensorMap map_of(const void* data, int64_t matrices, int64_t rows, int64_t k, int height) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(matrices)};
  const cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};
  const cuuint32_t box[] = {CHUNK, static_cast<cuuint32_t>(height), 1}, steps[] = {1, 1, 1};
  const CUresult result = encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<void*>(data), sizes, strides,
                                    box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) TVM_FFI_THROW(RuntimeError) << "cuTensorMapEncodeTiled: error " << int{result};
  return map;
}

}  // namespace sv3d::hopper
