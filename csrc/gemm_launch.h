// Launches the matrix product with one way of cutting it.
#pragma once

#include <algorithm>
#include <string>

#include "cuda_launch.h"
#include "gemm_kernel.h"

namespace sv3d::gemm {

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

/// x: (orbits, length, k), weight: (n, taps * k). Raises ValueError where the resident weight doesn't fit.
template <int Columns, int Rows, int Stages, int Resident, int Cluster, bool Geglu>
void launch(const void* x, const void* weight, Product p, int multiprocessors, cudaStream_t stream) {
  p.lag = std::min(p.lag, Stages - 1);  // further ahead than its ring, the first group would wait for ever
  using C = Cut<Columns, Rows, Stages, Resident, Cluster, Geglu>;
  const int64_t across = groups(p.n, Columns), down = p.orbits * groups(p.length, C::HEIGHT * Cluster);
  int64_t blocks = std::min<int64_t>(across * down, multiprocessors / Cluster) * Cluster;
  if (Resident) {
    if (p.taps * groups(p.k, CHUNK) > Resident || across > multiprocessors)
      fail("weight: expected at most " + std::to_string(Resident * CHUNK) + " channels and " +
           std::to_string(multiprocessors * Columns) + " rows to stay in shared memory");
    blocks = across * std::min<int64_t>(groups(down, 2), multiprocessors / across);
  }
  const auto run = kernel<Columns, Rows, Stages, Resident, Cluster, Geglu>;
  TVM_FFI_CHECK_CUDA_ERROR(cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, C::SHARED_BYTES));
  const CUtensorMap x_map = map_of(x, p.orbits, p.length, p.k, C::HEIGHT);
  const CUtensorMap weight_map = map_of(weight, 1, p.n, int64_t{p.taps} * p.k, Columns / Cluster);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = C::SHARED_BYTES, config.stream = stream;
  config.attrs = &cluster, config.numAttrs = Cluster > 1 ? 1 : 0;
  TVM_FFI_CHECK_CUDA_ERROR(cudaLaunchKernelEx(&config, run, x_map, weight_map, p));
}

}  // namespace sv3d::gemm
