// Checks of what kernels for Hopper are given.
#pragma once

#include <string>

#include "cuda_launch.h"

namespace sv3d {

using Optional = tvm::ffi::Optional<TensorView>;

/// Pointer to a contiguous float16 tensor of this many values whose start is a multiple of `alignment` bytes.
inline void* halves(const TensorView& t, const char* name, int64_t count, uintptr_t alignment) {
  const DLDataType d = t.dtype();
  if (t.device().device_type != kDLCUDA || d.code != kDLFloat || d.bits != 16 || d.lanes != 1 || !t.IsContiguous())
    fail(std::string(name) + ": expected contiguous float16 on a CUDA device");
  int64_t values = 1;
  for (int i = 0; i < t.ndim(); ++i) values *= t.size(i);
  if (values != count)
    fail(std::string(name) + ": expected " + std::to_string(count) + " values, got " + std::to_string(values));
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) % alignment)
    fail(std::string(name) + ": expected a start at a multiple of " + std::to_string(alignment) + " bytes");
  return t.data_ptr();
}

inline const void* halves(const Optional& t, const char* name, int64_t count, uintptr_t alignment) {
  return t.has_value() ? halves(t.value(), name, count, alignment) : nullptr;
}

/// How many multiprocessors a GPU has. Raises ValueError for one that is no Hopper.
inline int hopper_multiprocessors(int device) {
  int major = 0, count = 0;
  TVM_FFI_CHECK_CUDA_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major != 9) fail("x: expected a GPU of compute capability 9.0");
  TVM_FFI_CHECK_CUDA_ERROR(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace sv3d
