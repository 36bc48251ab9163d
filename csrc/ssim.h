// Structural similarity: the maths of one pixel, shared by the CPU and the CUDA path. kernels/ssim.py defines it.
#pragma once

#include <cmath>

#include "host_device.h"

namespace sv3d::ssim {

constexpr int RADIUS = 5, TAPS = 2 * RADIUS + 1;
constexpr float C1 = 0.01f * 0.01f, C2 = 0.03f * 0.03f;

/// A Gaussian of sigma 1.5 whose taps sum to 1.
struct Window {
  float taps[TAPS];

  Window() {
    double sum = 0, values[TAPS];
    for (int i = 0; i < TAPS; ++i) sum += values[i] = std::exp(-(i - RADIUS) * (i - RADIUS) / (2 * 1.5 * 1.5));
    for (int i = 0; i < TAPS; ++i) taps[i] = static_cast<float>(values[i] / sum);
  }
};

/// Similarity at a pixel and its derivatives by the filtered x, x x and x y.
struct Similarity {
  float value, by_x, by_xx, by_xy;
};

/// From the filtered x, y, x x, y y and x y.
SV3D_HD Similarity compare(float mx, float my, float xx, float yy, float xy) {
  const float vx = xx - mx * mx, vy = yy - my * my, covariance = xy - mx * my;
  const float a = 2 * mx * my + C1, b = 2 * covariance + C2, c = mx * mx + my * my + C1, d = vx + vy + C2;
  const float inverse = 1 / (c * d), value = a * b * inverse;
  return {value, 2 * (my * (b - a) * inverse + mx * value * (1 / d - 1 / c)), -value / d, 2 * a * inverse};
}

/// Gradient by x of the sum of a map, from its filtered derivatives: the window is its own mirror image.
SV3D_HD float gradient_of(float by_x, float by_xx, float by_xy, float x, float y) {
  return by_x + 2 * x * by_xx + y * by_xy;
}

}  // namespace sv3d::ssim
