// Attention at 64 channels a head on Hopper GPUs, from Python.
#include <algorithm>
#include <cmath>

#include "attention_kernel.h"
#include "half_tensors.h"
#include "hopper_map.h"

namespace sv3d::attention {

/// qkv (batch, length, 3 * heads * 64): queries, keys, values. out (batch, length, heads * 64). Raises ValueError for
/// what it can't take.
void attend(TensorView qkv, TensorView out, int64_t heads) {
  if (qkv.ndim() != 3) fail("qkv: expected three dimensions");
  const int64_t batch = qkv.size(0), length = qkv.size(1), width = 3 * heads * HEAD;
  if (heads < 1 || qkv.size(2) != width) fail("qkv: expected 3 * heads * 64 channels");
  const void* data = halves(qkv, "qkv", batch * length * width, 16);
  Problem p{};
  p.out = halves(out, "out", batch * length * heads * HEAD, 4);
  if (batch * length == 0) return;
  const int64_t query_tiles = groups(length, QUERIES), tiles = batch * heads * query_tiles;
  if (length >= INT32_MAX - QUERIES || tiles >= INT32_MAX / 2 || width >= INT32_MAX) fail("qkv: too large");
  p.batch = static_cast<int>(batch), p.heads = static_cast<int>(heads), p.length = static_cast<int>(length);
  p.query_tiles = static_cast<int>(query_tiles), p.key_tiles = static_cast<int>(groups(length, KEYS));
  p.scale = 1.44269504f / std::sqrt(static_cast<float>(HEAD));
  tvm::ffi::CUDADeviceGuard guard(qkv.device().device_id);
  const int64_t blocks = std::min<int64_t>(tiles, hopper_multiprocessors(qkv.device().device_id));
  TVM_FFI_CHECK_CUDA_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
  const CUtensorMap queries = hopper::map_of(data, batch, length, width, QUERIES);
  const CUtensorMap others = hopper::map_of(data, batch, length, width, KEYS);
  kernel<<<static_cast<unsigned>(blocks), THREADS, SHARED_BYTES, stream_of(qkv)>>>(queries, others, p);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

}  // namespace sv3d::attention

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_attend, sv3d::attention::attend);
