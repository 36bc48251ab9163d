// Fusion of depth maps on CUDA. A thread keeps a short run of voxels along z in registers over all views, so nothing
// but the result is written. The threads of a warp lie side by side in x and y, which the cameras of an orbit see in
// few rows of pixels.
#include "cuda_launch.h"
#include "tsdf_arguments.h"

namespace sv3d::tsdf {
namespace {

constexpr int RUN = 8;                  // voxels: one 32-byte sector of each output
constexpr int SIDE_Y = 8, SIDE_X = 16;  // threads of a block

__device__ void write_run(float* out, const float values[RUN], int64_t count) {
  if (count >= RUN && reinterpret_cast<uintptr_t>(out) % sizeof(float4) == 0) {
    for (int k = 0; k < RUN; k += 4)
      *reinterpret_cast<float4*>(out + k) = make_float4(values[k], values[k + 1], values[k + 2], values[k + 3]);
    return;
  }
#pragma unroll
  for (int k = 0; k < RUN; ++k)
    if (k < count) out[k] = values[k];
}

__global__ void __launch_bounds__(SIDE_X* SIDE_Y) fuse_runs(Fusion f) {
  const int64_t R = f.resolution, first = int64_t{blockIdx.x} * RUN;
  const int64_t y = int64_t{blockIdx.y} * SIDE_Y + threadIdx.x, x = int64_t{blockIdx.z} * SIDE_X + threadIdx.y;
  if (x >= R || y >= R) return;
  const float scale = 1 / f.truncation;
  float sum[RUN] = {}, total[RUN] = {};
  for (int64_t c = 0; c < f.views; ++c) {
    const View view = f.view(c);
    float start[3], step[3];
    f.row(c, static_cast<float>(x), static_cast<float>(y), start, step);
#pragma unroll
    for (int k = 0; k < RUN; ++k) {
      const float t = static_cast<float>(first + k);  // past the end too: observe() reads inside the maps
      observe(view, start[0] + t * step[0], start[1] + t * step[1], start[2] + t * step[2], f.truncation, scale, sum[k],
              total[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < RUN; ++k) sum[k] = total[k] > 0 ? sum[k] / total[k] : 0.0f;
  const int64_t at = (x * R + y) * R + first;
  write_run(f.tsdf + at, sum, R - first);
  write_run(f.weight + at, total, R - first);
}

}  // namespace

void fuse(TensorView depths, TensorView weights, TensorView viewmats, TensorView Ks, double half_extent,
          double truncation, TensorView tsdf, TensorView weight) {
  const Fusion f = fusion_of(kDLCUDA, depths, weights, viewmats, Ks, half_extent, truncation, tsdf, weight);
  if (f.resolution == 0) return;
  tvm::ffi::CUDADeviceGuard guard(tsdf.device().device_id);
  const dim3 grid(groups(f.resolution, RUN), groups(f.resolution, SIDE_Y), groups(f.resolution, SIDE_X));
  fuse_runs<<<grid, dim3(SIDE_Y, SIDE_X), 0, stream_of(tsdf)>>>(f);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

}  // namespace sv3d::tsdf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(tsdf_fuse, sv3d::tsdf::fuse);
