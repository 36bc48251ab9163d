// The arguments of depth fusion, checked, as the plain pointers its two paths work on.
#pragma once

#include "checks.h"
#include "tsdf.h"

namespace sv3d::tsdf {

struct Fusion {
  const float *depths, *weights;  // (views, height, width)
  const float *viewmats, *Ks;     // (views, 4, 4) and (views, 3, 3)
  float *tsdf, *weight;           // (resolution, resolution, resolution)
  int64_t views, resolution;
  int height, width;
  float cell, corner, truncation;  // corner: each coordinate of the first voxel's centre

  SV3D_HD View view(int64_t c) const {
    const int64_t start = c * height * width;
    const float* K = Ks + 9 * c;
    return {depths + start, weights + start, K[0], K[4], K[2], K[5], height, width};
  }

  /// Camera coordinates of voxel (x, y, 0) in view c, and what they change by from one z to the next.
  SV3D_HD void row(int64_t c, float x, float y, float start[3], float step[3]) const {
    const float* m = viewmats + 16 * c;
    for (int i = 0; i < 3; ++i) {
      start[i] =
          m[4 * i] * (corner + cell * x) + m[4 * i + 1] * (corner + cell * y) + m[4 * i + 2] * corner + m[4 * i + 3];
      step[i] = m[4 * i + 2] * cell;
    }
  }
};

inline Fusion fusion_of(DLDeviceType device, const TensorView& depths, const TensorView& weights,
                        const TensorView& viewmats, const TensorView& Ks, double half_extent, double truncation,
                        const TensorView& tsdf, const TensorView& weight) {
  Fusion f{};
  f.depths = data<float>(depths, "depths", {ANY, ANY, ANY}, device);
  const int64_t views = depths.size(0), height = depths.size(1), width = depths.size(2);
  f.weights = data<float>(weights, "weights", {views, height, width}, device);
  f.viewmats = data<float>(viewmats, "viewmats", {views, 4, 4}, device);
  f.Ks = data<float>(Ks, "Ks", {views, 3, 3}, device);
  data<float>(tsdf, "tsdf", {ANY, ANY, ANY}, device);
  f.views = views, f.resolution = tsdf.size(0);
  f.tsdf = data<float>(tsdf, "tsdf", {f.resolution, f.resolution, f.resolution}, device);
  f.weight = data<float>(weight, "weight", {f.resolution, f.resolution, f.resolution}, device);
  if (views && (height < 1 || width < 1 || height > MAX_SIDE || width > MAX_SIDE))
    fail("depths: expected maps of 1 to 32768 pixels a side");
  if (!(half_extent > 0) || !(truncation > 0)) fail("half_extent, truncation: expected positive lengths");
  f.height = static_cast<int>(height), f.width = static_cast<int>(width);
  f.cell = static_cast<float>(2 * half_extent / static_cast<double>(f.resolution < 1 ? 1 : f.resolution));
  f.corner = static_cast<float>(-half_extent) + 0.5f * f.cell, f.truncation = static_cast<float>(truncation);
  return f;
}

}  // namespace sv3d::tsdf
