// Launches the matrix product with one way of cutting it.
#pragma once

#include <algorithm>
#include <string>

#include "cuda_launch.h"
#include "gemm_kernel.h"
#include "hopper_map.h"

namespace sv3d::gemm {

/// A weight (n, k) whose columns of the product are dealt out; boxes of `columns` of them and one chunk.
template <bool Gated>
CUtensorMap weight_map(const void* data, int64_t n, int64_t k, int columns) {
  using D = Deal<Gated>;
  const cuuint64_t row = 2 * k;
  return map_of<5>(
      data, {static_cast<cuuint64_t>(k), D::SIZES[0], D::SIZES[1], D::SIZES[2], static_cast<cuuint64_t>(n / D::BLOCK)},
      {D::STRIDES[0] * row, D::STRIDES[1] * row, D::STRIDES[2] * row, D::BLOCK * row},
      {CHUNK, D::SIZES[0], D::SIZES[1], D::SIZES[2], static_cast<cuuint32_t>(columns / D::BLOCK)});
}

/// x: (orbits, length, k), weight: (n, taps * k). Raises ValueError where the resident weight doesn't fit.
template <int Columns, int Rows, int Stages, int Resident, Form F>
void launch(const void* x, const void* weight, Product p, int multiprocessors, cudaStream_t stream) {
  p.lag = std::min(p.lag, Stages - 1);  // further ahead than its ring, the first group would wait for ever
  using C = Cut<Columns, Rows, Stages, Resident>;
  const int64_t across = groups(p.n, Columns), down = p.orbits * groups(p.length, C::HEIGHT);
  int64_t blocks = std::min<int64_t>(across * down, multiprocessors);
  if (Resident) {
    if (p.taps * groups(p.k, CHUNK) > Resident || across > multiprocessors)
      fail("weight: expected at most " + std::to_string(Resident * CHUNK) + " channels and " +
           std::to_string(multiprocessors * Columns) + " rows to stay in shared memory");
    blocks = across * std::min<int64_t>(groups(down, 2), multiprocessors / across);
  }
  const auto run = kernel<Columns, Rows, Stages, Resident, F>;
  TVM_FFI_CHECK_CUDA_ERROR(cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, C::SHARED_BYTES));
  const CUtensorMap rows = F == Form::UPSAMPLED
                               ? pixels_of(x, p.length / (p.tall * p.wide), p.tall, p.wide, p.k, C::HEIGHT)
                               : map_of(x, p.orbits, p.length, p.k, C::HEIGHT);
  const CUtensorMap columns = weight_map<F == Form::GATED>(weight, p.n, int64_t{p.taps} * p.k, Columns);
  run<<<static_cast<unsigned>(blocks), THREADS, C::SHARED_BYTES, stream>>>(rows, columns, p);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

}  // namespace sv3d::gemm
