// How Hopper's copy engine is told of a tensor.
#pragma once

#include <algorithm>
#include <string>

#include "cuda_launch.h"
#include "hopper.h"

namespace sv3d::hopper {

/// One of the driver's functions that describe a tensor to the copy engine; fetched at run time, so nothing is linked.
inline void* encoder(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status{};
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &status));
  if (status != cudaDriverEntryPointSuccess) TVM_FFI_THROW(RuntimeError) << "the driver has no bulk tensor copies";
  return function;
}

inline void check(CUresult result) {
  if (result != CUDA_SUCCESS) TVM_FFI_THROW(RuntimeError) << "describing a tensor to the driver: error " << int{result};
}

/// Halves in `Rank` dimensions, the fastest first; strides in bytes, from the second on; boxes of one chunk.
template <int Rank>
CUtensorMap map_of(const void* data, const cuuint64_t (&sizes)[Rank], const cuuint64_t (&strides)[Rank - 1],
                   const cuuint32_t (&box)[Rank]) {
  CUtensorMap map;
  cuuint32_t steps[Rank];
  std::fill_n(steps, Rank, 1);
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encoder("cuTensorMapEncodeTiled"));
  check(encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, Rank, const_cast<void*>(data), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

/// Matrices of `rows` rows of `k` halves, all in one piece; boxes of `height` rows of one chunk.
inline CUtensorMap map_of(const void* data, int64_t matrices, int64_t rows, int64_t k, int height) {
  const cuuint64_t width = k, count = rows;
  return map_of<3>(data, {width, count, static_cast<cuuint64_t>(matrices)}, {2 * width, 2 * width * count},
                   {CHUNK, static_cast<cuuint32_t>(height), 1});
}

/// Images (images, tall, wide, k) for convolutions of 3x3 that keep their size; `count` successive pixels of one chunk.
inline CUtensorMap pixels_of(const void* data, int64_t images, int64_t tall, int64_t wide, int64_t k, int count) {
  CUtensorMap map;
  const cuuint64_t pixel = 2 * k, sizes[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(wide),
                                             static_cast<cuuint64_t>(tall), static_cast<cuuint64_t>(images)};
  const cuuint64_t strides[] = {pixel, pixel * wide, pixel * wide * tall};
  const int first[] = {-1, -1}, last[] = {-1, -1};  // of the corner that a kernel reads, from an image's own corners
  const cuuint32_t steps[] = {1, 1, 1, 1};
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(encoder("cuTensorMapEncodeIm2col"));
  check(encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(data), sizes, strides, first, last, CHUNK,
               count, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

}  // namespace sv3d::hopper
