// Depth fusion: what one view says of one voxel, shared by the CPU and the CUDA path. kernels/tsdf.py defines it.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace sv3d::tsdf {

constexpr float NEAR = 1e-6f;        // voxels at or behind the camera's plane are not seen
constexpr int64_t MAX_SIDE = 32768;  // pixels

struct View {
  const float *depth, *weight;  // (height, width)
  float fx, fy, cx, cy;
  int height, width;
};

SV3D_HD float smaller(float a, float b) { return a < b ? a : b; }
SV3D_HD float larger(float a, float b) { return a > b ? a : b; }

/// A coordinate as an index below `size`. Cameras whose products overflow give NaN, so integers are clamped.
SV3D_HD int index_of(float coordinate, int size) {
  const int index = static_cast<int>(coordinate);
  return index < 0 ? 0 : index < size ? index : size - 1;
}

/// Adds the voxel at (x, y, z) in the view's camera to the weighted sum of its distances and to its total weight.
SV3D_HD void observe(const View& view, float x, float y, float z, float truncation, float scale, float& sum,
                     float& total) {
  const float right = static_cast<float>(view.width), bottom = static_cast<float>(view.height);
  const float inverse = 1.0f / larger(z, NEAR);
  const float u = view.fx * x * inverse + view.cx, v = view.fy * y * inverse + view.cy;
  const bool seen = (z > NEAR) & (u >= 0) & (u < right) & (v >= 0) & (v < bottom);
  const float su = smaller(larger(u - 0.5f, 0.0f), right - 1), sv = smaller(larger(v - 0.5f, 0.0f), bottom - 1);
  const int u0 = index_of(su, view.width), v0 = index_of(sv, view.height);
  const int u1 = u0 + 1 < view.width ? u0 + 1 : u0, v1 = v0 + 1 < view.height ? v0 + 1 : v0;
  const int nu = index_of(su + 0.5f, view.width), nv = index_of(sv + 0.5f, view.height);  // of the four, the nearest
  const float au = su - static_cast<float>(u0), av = sv - static_cast<float>(v0);
  const float d00 = view.depth[v0 * view.width + u0], d01 = view.depth[v0 * view.width + u1];
  const float d10 = view.depth[v1 * view.width + u0], d11 = view.depth[v1 * view.width + u1];
  const float nearest = view.depth[nv * view.width + nu], given = view.weight[nv * view.width + nu];
  const float low = smaller(smaller(d00, d01), smaller(d10, d11)), high = larger(larger(d00, d01), larger(d10, d11));
  const float over = d00 + au * (d01 - d00), under = d10 + au * (d11 - d10);
  const bool smooth = high <= low + truncation;  // the four pixels see one surface
  const float depth = (smooth & (high < INFINITY)) ? over + av * (under - over) : nearest;
  const float distance = depth - z;
  const float w = (seen & (distance >= -truncation)) ? given : 0.0f;
  sum += w * larger(smaller(distance * scale, 1.0f), -1.0f);
  total += w;
}

}  // namespace sv3d::tsdf
