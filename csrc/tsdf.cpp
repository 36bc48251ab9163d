// Fusion of depth maps into a truncated signed distance field. All views are accumulated per row of voxels, so each
// voxel is written once.
#include <algorithm>
#include <vector>

#include "tsdf_arguments.h"

namespace sv3d::tsdf {
namespace {

// Adds one view to a row of voxels whose camera coordinates are start + k * step.
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void add_view(
    const View& view, const float* start, const float* step, int n, float truncation, float* __restrict__ sum,
    float* __restrict__ total) {
  const float x0 = start[0], y0 = start[1], z0 = start[2], dx = step[0], dy = step[1], dz = step[2];
  const float scale = 1 / truncation;
  const View local = view;
  for (int k = 0; k < n; ++k) {
    const float t = static_cast<float>(k);
    observe(local, x0 + t * dx, y0 + t * dy, z0 + t * dz, truncation, scale, sum[k], total[k]);
  }
}

}  // namespace

void fuse(TensorView depths, TensorView weights, TensorView viewmats, TensorView Ks, double half_extent,
          double truncation, TensorView tsdf, TensorView weight) {
  const Fusion f = fusion_of(kDLCPU, depths, weights, viewmats, Ks, half_extent, truncation, tsdf, weight);
  const int64_t R = f.resolution;
#pragma omp parallel if (R * R * R * f.views > 1 << 16)
  {
    std::vector<float> sum(R), total(R);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < R * R; ++row) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t c = 0; c < f.views; ++c) {
        float start[3], step[3];
        f.row(c, static_cast<float>(row / R), static_cast<float>(row % R), start, step);
        add_view(f.view(c), start, step, static_cast<int>(R), f.truncation, sum.data(), total.data());
      }
      for (int64_t z = 0; z < R; ++z) {
        f.tsdf[row * R + z] = total[z] > 0 ? sum[z] / total[z] : 0.0f;
        f.weight[row * R + z] = total[z];
      }
    }
  }
}

}  // namespace sv3d::tsdf

TVM_FFI_DLL_EXPORT_TYPED_FUNC(tsdf_fuse, sv3d::tsdf::fuse);
