// Structural similarity (Wang et al. 2004) with an 11-tap Gaussian window of sigma 1.5, zero outside the image, and
// its gradient: means, variances and covariance are separable filters over rows of interleaved channels.
#include "ssim.h"

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "checks.h"

namespace sv3d::ssim {
namespace {

#define SV3D_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

/// Filters `count` planes of rows x columns values down their columns, from `in` to `out`; then along their rows,
/// where neighbours lie `step` values apart, back into `in`. Outside is zero.
SV3D_CLONES void filter(float* __restrict__ in, float* __restrict__ out, int64_t count, int64_t rows, int64_t columns,
                        int64_t step, const float* taps) {
  const int64_t plane = rows * columns;
  std::fill(out, out + count * plane, 0.0f);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + p * plane + r * columns;
      for (int64_t near = std::max<int64_t>(r - RADIUS, 0); near <= std::min(r + RADIUS, rows - 1); ++near) {
        const float tap = taps[near - r + RADIUS];
        const float* from = in + p * plane + near * columns;
        for (int64_t i = 0; i < columns; ++i) to[i] += tap * from[i];
      }
    }
  std::fill(in, in + count * plane, 0.0f);
  for (int64_t r = 0; r < count * rows; ++r) {
    float* to = in + r * columns;
    const float* from = out + r * columns;
    for (int t = -RADIUS; t <= RADIUS; ++t) {
      const int64_t shift = t * step, begin = std::max<int64_t>(0, -shift), end = std::min(columns, columns - shift);
      const float tap = taps[t + RADIUS];
      for (int64_t i = begin; i < end; ++i) to[i] += tap * from[i + shift];
    }
  }
}

/// Values of x, y, x x, y y, x y.
SV3D_CLONES void products(const float* __restrict__ x, const float* __restrict__ y, int64_t n,
                          float* __restrict__ planes) {
  for (int64_t i = 0; i < n; ++i) {
    planes[i] = x[i];
    planes[n + i] = y[i];
    planes[2 * n + i] = x[i] * x[i];
    planes[3 * n + i] = y[i] * y[i];
    planes[4 * n + i] = x[i] * y[i];
  }
}

/// From the filtered products, the sum of the map and, over `planes`, its derivatives by the filtered x, x x, x y.
SV3D_CLONES double compare_all(float* __restrict__ planes, int64_t n, int64_t row) {
  double total = 0;
  for (int64_t start = 0; start < n; start += row) {
    float sum = 0;
    for (int64_t i = start; i < std::min(start + row, n); ++i) {
      const Similarity s = compare(planes[i], planes[n + i], planes[2 * n + i], planes[3 * n + i], planes[4 * n + i]);
      sum += s.value;
      planes[i] = s.by_x, planes[n + i] = s.by_xx, planes[2 * n + i] = s.by_xy;
    }
    total += sum;
  }
  return total;
}

SV3D_CLONES void collect(const float* __restrict__ planes, const float* __restrict__ x, const float* __restrict__ y,
                         int64_t n, float scale, float* __restrict__ gradient) {
  for (int64_t i = 0; i < n; ++i)
    gradient[i] = scale * gradient_of(planes[i], planes[n + i], planes[2 * n + i], x[i], y[i]);
}

}  // namespace

/// Mean similarity (N,) of images x and y (N,H,W,C) and, unless it is empty, the gradient (N,H,W,C) of each by x.
void forward(TensorView x, TensorView y, TensorView means, TensorView gradient) {
  const float* px = data<float>(x, "x", {ANY, ANY, ANY, ANY});
  const int64_t images = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3);
  const float* py = data<float>(y, "y", {images, height, width, channels});
  float* mean = data<float>(means, "means", {images});
  const bool differentiate = gradient.ndim() == 4 && gradient.size(0) > 0;
  float* g = differentiate ? data<float>(gradient, "gradient", {images, height, width, channels}) : nullptr;
  const int64_t columns = width * channels, n = height * columns;
  if (n == 0) fail("x: expected images of at least one pixel and channel");
  const Window window;
  // A thread takes a whole image, and its own scratch.
  const bool parallel = images > 1 && images * n > 16384;
  const std::unique_ptr<float[]> scratch(new float[n * 10 * (parallel ? omp_get_max_threads() : 1)]);
#pragma omp parallel for schedule(dynamic, 1) if (parallel)
  for (int64_t i = 0; i < images; ++i) {
    float *planes = scratch.get() + omp_get_thread_num() * n * 10, *spare = planes + 5 * n;
    products(px + i * n, py + i * n, n, planes);
    filter(planes, spare, 5, height, columns, channels, window.taps);
    mean[i] = static_cast<float>(compare_all(planes, n, columns) / static_cast<double>(n));
    if (!differentiate) continue;
    filter(planes, spare, 3, height, columns, channels, window.taps);
    collect(planes, px + i * n, py + i * n, n, 1.0f / static_cast<float>(n), g + i * n);
  }
}

}  // namespace sv3d::ssim

TVM_FFI_DLL_EXPORT_TYPED_FUNC(ssim_forward, sv3d::ssim::forward);
