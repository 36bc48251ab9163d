// Launches the matrix product with one way of cutting it.
#pragma once

#include <algorithm>
#include <string>

#include "cuda_launch.h"
#include "gemm_kernel.h"
#include "hopper_map.h"

namespace sv3d::gemm {

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
