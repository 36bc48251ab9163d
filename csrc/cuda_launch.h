// What every kernel launch needs.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include "checks.h"

namespace sv3d {

/// The stream that torch works on, on the device of `t`.
inline cudaStream_t stream_of(const TensorView& t) {
  const DLDevice device = t.device();
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

/// Groups of `size` that hold `count` things.
constexpr int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace sv3d
