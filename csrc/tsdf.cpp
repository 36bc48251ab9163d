// Fusion of depth maps into a truncated signed distance field. All views are accumulated per row of voxels, so each
// voxel is written once. kernels/tsdf.py defines the result.
#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"

namespace sv3d {
namespace {

struct View {
  const float *depth, *weight;
  const float *w2c, *K;  // row-major 4x4 and 3x3
  int height, width;
};

constexpr float NEAR = 1e-6f;

inline int clamped(int index, int size) { return std::min(std::max(index, 0), size - 1); }

// Adds one view to a row of voxels whose camera coordinates are start + k * step.
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void add_view(
    const View& view, const float* start, const float* step, int n, float truncation, float* __restrict__ sum,
    float* __restrict__ total) {
  const float fx = view.K[0], cx = view.K[2], fy = view.K[4], cy = view.K[5];
  const float x0 = start[0], y0 = start[1], z0 = start[2], dx = step[0], dy = step[1], dz = step[2];
  const float scale = 1 / truncation;
  const int width = view.width, height = view.height;
  const float right = static_cast<float>(width), bottom = static_cast<float>(height);
  const float* __restrict__ depth = view.depth;
  const float* __restrict__ weight = view.weight;
  for (int k = 0; k < n; ++k) {
    const float t = static_cast<float>(k), z = z0 + t * dz;
    const float inverse = 1.0f / std::max(z, NEAR);
    const float u = fx * (x0 + t * dx) * inverse + cx, v = fy * (y0 + t * dy) * inverse + cy;
    const bool seen = (z > NEAR) & (u >= 0) & (u < right) & (v >= 0) & (v < bottom);
    const float cu = std::min(std::max(u, 0.0f), right - 0.5f), cv = std::min(std::max(v, 0.0f), bottom - 0.5f);
    const float su = std::min(std::max(cu - 0.5f, 0.0f), right - 1);
    const float sv = std::min(std::max(cv - 0.5f, 0.0f), bottom - 1);
    // Indices are clamped as integers too: cameras whose products overflow give NaN, which passes the clamps above.
    const int nu = clamped(static_cast<int>(cu), width), nv = clamped(static_cast<int>(cv), height);
    const int u0 = clamped(static_cast<int>(su), width), v0 = clamped(static_cast<int>(sv), height);
    const int u1 = std::min(u0 + 1, width - 1), v1 = std::min(v0 + 1, height - 1);
    const float au = su - static_cast<float>(u0), av = sv - static_cast<float>(v0);
    const float d00 = depth[v0 * width + u0], d01 = depth[v0 * width + u1];
    const float d10 = depth[v1 * width + u0], d11 = depth[v1 * width + u1];
    const float low = std::min(std::min(d00, d01), std::min(d10, d11));
    const float high = std::max(std::max(d00, d01), std::max(d10, d11));
    const float top = d00 + au * (d01 - d00), under = d10 + au * (d11 - d10);
    const bool smooth = high <= low + truncation;  // the four pixels see one surface
    const float nearest = depth[nv * width + nu], given = weight[nv * width + nu];
    const float d = (smooth & (high < INFINITY)) ? top + av * (under - top) : nearest;
    const float distance = d - z;
    const float w = (seen & (distance >= -truncation)) ? given : 0.0f;
    const float capped = std::min(distance * scale, 1.0f);
    sum[k] += w * std::max(capped, -1.0f);
    total[k] += w;
  }
}

void tsdf_fuse(TensorView depths, TensorView weights, TensorView viewmats, TensorView Ks, double half_extent,
               double truncation, TensorView tsdf, TensorView weight) {
  const float* d = data<float>(depths, "depths", {ANY, ANY, ANY});
  const int64_t C = depths.size(0), H = depths.size(1), W = depths.size(2);
  const float* w = data<float>(weights, "weights", {C, H, W});
  const float* w2c = data<float>(viewmats, "viewmats", {C, 4, 4});
  const float* K = data<float>(Ks, "Ks", {C, 3, 3});
  float* out = data<float>(tsdf, "tsdf", {ANY, ANY, ANY});
  const int64_t R = tsdf.size(0);
  data<float>(tsdf, "tsdf", {R, R, R});
  float* out_weight = data<float>(weight, "weight", {R, R, R});
  if (C && (H < 1 || W < 1 || H > 32768 || W > 32768)) fail("depths: expected maps of 1 to 32768 pixels a side");
  if (!(half_extent > 0) || !(truncation > 0)) fail("half_extent, truncation: expected positive lengths");

  const float cell = static_cast<float>(2 * half_extent / static_cast<double>(std::max<int64_t>(R, 1)));
  const float corner = static_cast<float>(-half_extent) + 0.5f * cell, trunc = static_cast<float>(truncation);
#pragma omp parallel if (R * R * R * C > 1 << 16)
  {
    std::vector<float> sum(R), total(R);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < R * R; ++row) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(total.begin(), total.end(), 0.0f);
      const float x = corner + cell * static_cast<float>(row / R), y = corner + cell * static_cast<float>(row % R);
      for (int64_t c = 0; c < C; ++c) {
        const float* m = w2c + 16 * c;
        float start[3], step[3];
        for (int i = 0; i < 3; ++i) {
          start[i] = m[4 * i] * x + m[4 * i + 1] * y + m[4 * i + 2] * corner + m[4 * i + 3];
          step[i] = m[4 * i + 2] * cell;
        }
        const View view{d + c * H * W, w + c * H * W, m, K + 9 * c, static_cast<int>(H), static_cast<int>(W)};
        add_view(view, start, step, static_cast<int>(R), trunc, sum.data(), total.data());
      }
      for (int64_t z = 0; z < R; ++z) {
        out[row * R + z] = total[z] > 0 ? sum[z] / total[z] : 0.0f;
        out_weight[row * R + z] = total[z];
      }
    }
  }
}

}  // namespace
}  // namespace sv3d

TVM_FFI_DLL_EXPORT_TYPED_FUNC(tsdf_fuse, sv3d::tsdf_fuse);
