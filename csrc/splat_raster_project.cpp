// Splat rasteriser, first part: perspective EWA projection of every splat into every view, and which tiles it
// reaches; last part: the gradients of the splats from those of their projections.
#include "splat_raster.h"

namespace sv3d::splat {
namespace {

constexpr double SLACK = 1e-2;  // pixels by which a tile's reach is widened against rounding

/// Row-major 3x3 rotation of a quaternion (w first) of any length; `inverse_norm` is what it was multiplied by.
struct Rotation {
  float r[9];
  float q[4];
  float inverse_norm;

  explicit Rotation(const float* quat) {
    double squared = 0;
    for (int i = 0; i < 4; ++i) squared += static_cast<double>(quat[i]) * quat[i];
    inverse_norm = static_cast<float>(1.0 / std::max(std::sqrt(squared), 1e-12));
    for (int i = 0; i < 4; ++i) q[i] = quat[i] * inverse_norm;
    const float w = q[0], x = q[1], y = q[2], z = q[3];
    r[0] = 1 - 2 * (y * y + z * z), r[1] = 2 * (x * y - w * z), r[2] = 2 * (x * z + w * y);
    r[3] = 2 * (x * y + w * z), r[4] = 1 - 2 * (x * x + z * z), r[5] = 2 * (y * z - w * x);
    r[6] = 2 * (x * z - w * y), r[7] = 2 * (y * z + w * x), r[8] = 1 - 2 * (x * x + y * y);
  }

  /// Gradient of the quaternion as given from that of the matrix; through q / |q|.
  void backward(const float* v, float* v_quat) const {
    const float w = q[0], x = q[1], y = q[2], z = q[3];
    const float u[4] = {
        2 * (x * (v[7] - v[5]) + y * (v[2] - v[6]) + z * (v[3] - v[1])),
        2 * (w * (v[7] - v[5]) - 2 * x * (v[4] + v[8]) + y * (v[1] + v[3]) + z * (v[2] + v[6])),
        2 * (w * (v[2] - v[6]) + x * (v[1] + v[3]) - 2 * y * (v[0] + v[8]) + z * (v[5] + v[7])),
        2 * (w * (v[3] - v[1]) + x * (v[2] + v[6]) + y * (v[5] + v[7]) - 2 * z * (v[0] + v[4])),
    };
    const float along = u[0] * w + u[1] * x + u[2] * y + u[3] * z;
    for (int i = 0; i < 4; ++i) v_quat[i] = (u[i] - along * q[i]) * inverse_norm;
  }
};

struct Camera {
  float r[9], t[3];  // world to camera
  float fx, fy, cx, cy;
  float left, right, up, down;  // limits of x / z and y / z in the Jacobian

  Camera(const float* viewmat, const float* K, int64_t width, int64_t height) {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) r[3 * i + j] = viewmat[4 * i + j];
      t[i] = viewmat[4 * i + 3];
    }
    fx = K[0], cx = K[2], fy = K[4], cy = K[5];
    const float w = static_cast<float>(width), h = static_cast<float>(height);
    left = -(cx + FRUSTUM_MARGIN * w) / fx, right = (w - cx + FRUSTUM_MARGIN * w) / fx;
    up = -(cy + FRUSTUM_MARGIN * h) / fy, down = (h - cy + FRUSTUM_MARGIN * h) / fy;
  }

  void transform(const float* mean, float* point) const {
    for (int i = 0; i < 3; ++i) point[i] = r[3 * i] * mean[0] + r[3 * i + 1] * mean[1] + r[3 * i + 2] * mean[2] + t[i];
  }
};

/// The linearised projection of one splat: camera-frame factor of its covariance and the screen-space half of it.
struct Linear {
  float x, y, z, u, v;
  float j00, j02, j11, j12;
  float factor[9];  // W R S
  float half[6];    // J W R S: covariance = half half^T + eps2d

  Linear(const Camera& camera, const float* point, const float* rs) : x(point[0]), y(point[1]), z(point[2]) {
    u = std::min(std::max(x / z, camera.left), camera.right);
    v = std::min(std::max(y / z, camera.up), camera.down);
    j00 = camera.fx / z, j02 = -camera.fx * u / z, j11 = camera.fy / z, j12 = -camera.fy * v / z;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        factor[3 * i + j] = camera.r[3 * i] * rs[j] + camera.r[3 * i + 1] * rs[3 + j] + camera.r[3 * i + 2] * rs[6 + j];
    for (int j = 0; j < 3; ++j) {
      half[j] = j00 * factor[j] + j02 * factor[6 + j];
      half[3 + j] = j11 * factor[3 + j] + j12 * factor[6 + j];
    }
  }
};

/// Screen-space covariance, dilated. In double, because the determinant of a needle is a small difference.
struct Covariance {
  double xx, xy, yy, determinant;

  Covariance(const float* half, double eps2d) : xx(eps2d), xy(0), yy(eps2d) {
    for (int i = 0; i < 3; ++i) {
      const double x = half[i], y = half[3 + i];
      xx += x * x, xy += x * y, yy += y * y;
    }
    determinant = xx * yy - xy * xy;
  }
};

void scale_columns(const float* matrix, const float* scales, float* out) {
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) out[3 * i + j] = matrix[3 * i + j] * scales[j];
}

/// Projects one splat; leaves `p` empty where it reaches no pixel. Returns its `reach`: max of d^T conic d.
float project(const Camera& camera, const float* mean, const float* rs, float opacity, float near, double eps2d,
              const Grid& grid, Projected& p, float& depth) {
  p = {0, 0, 0, 0, 0, 0, 1, 0, 1, 0};
  depth = 0;
  float point[3];
  camera.transform(mean, point);
  if (!(point[2] >= near) || !(opacity >= ALPHA_MIN)) return 0;
  const Linear linear(camera, point, rs);
  const auto [xx, xy, yy, determinant] = Covariance(linear.half, eps2d);
  if (!(determinant > 0) || !std::isfinite(determinant)) return 0;
  const Projected candidate{camera.fx * linear.x / linear.z + camera.cx,
                            camera.fy * linear.y / linear.z + camera.cy,
                            static_cast<float>(yy / determinant),
                            static_cast<float>(-xy / determinant),
                            static_cast<float>(xx / determinant),
                            opacity,
                            1,
                            0,
                            1,
                            0};
  if (!std::isfinite(candidate.x + candidate.y + candidate.xx + candidate.xy + candidate.yy)) return 0;
  // opacity exp(-q / 2) >= 1/255 where q <= 2 ln(255 opacity); a little more covers the rasteriser's rounding.
  const float reach = 2 * std::log(opacity / ALPHA_MIN) * 1.0001f + 1e-3f;
  const auto high = static_cast<float>(std::sqrt(reach * yy)), wide = static_cast<float>(std::sqrt(reach * xx));
  p = candidate;
  p.first_column = std::max(std::ceil(p.x - wide - 0.5f), 0.0f);
  p.last_column = std::min(std::floor(p.x + wide - 0.5f), static_cast<float>(grid.width - 1));
  p.first_row = std::max(std::ceil(p.y - high - 0.5f), 0.0f);
  p.last_row = std::min(std::floor(p.y + high - 0.5f), static_cast<float>(grid.height - 1));
  depth = point[2];
  return reach;
}

bool finite(const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!std::isfinite(values[i])) return false;
  return true;
}

}  // namespace

Span tile_span(const Projected& p, float reach, int64_t row, const Grid& grid) {
  if (!(p.first_column <= p.last_column)) return {0, 0};
  const Span box{tile_column(p.first_column, grid), tile_column(p.last_column, grid) + 1};
  if (box.begin + 1 == box.end || tile_row(p.first_row, grid) == tile_row(p.last_row, grid)) return box;
  // At height d the ellipse spans (-xy d +- sqrt(reach xx - det d^2)) / xx, widest at d = -+xy sqrt(reach / yy det).
  const double xx = p.xx, xy = p.xy, yy = p.yy, determinant = xx * yy - xy * xy;
  if (!(determinant > 0)) return box;  // a needle beyond float32: its true extent is lost
  const double first = std::max(static_cast<float>(row * TILE), p.first_row) + 0.5 - p.y;
  const double last = std::min(static_cast<float>(row * TILE + TILE - 1), p.last_row) + 0.5 - p.y;
  const double extreme = -xy * std::sqrt(reach / (yy * determinant));
  const auto half = [&](double d) { return std::sqrt(std::max(reach * xx - determinant * d * d, 0.0)); };
  const double d_right = std::min(std::max(extreme, first), last), d_left = std::min(std::max(-extreme, first), last);
  const double right = p.x - 0.5 + (-xy * d_right + half(d_right)) / xx + SLACK;
  const double left = p.x - 0.5 + (-xy * d_left - half(d_left)) / xx - SLACK;
  const double edge = static_cast<double>(grid.width - 1);
  if (!(right >= 0) || !(left <= edge)) return {0, 0};
  const auto begin = static_cast<int64_t>(std::ceil(std::max(left, 0.0)));
  const auto end = static_cast<int64_t>(std::floor(std::min(right, edge)));
  if (begin > end) return {0, 0};
  return {begin / TILE, end / TILE + 1};
}

/// Fills projected (C,N,10), keys (C,N,2) = depth and reach, base (C N + 1) = where the tiles of each start.
/// Returns the number of (splat, tile) pairs.
int64_t project_forward(TensorView means, TensorView quats, TensorView scales, TensorView opacities, TensorView colors,
                        TensorView viewmats, TensorView Ks, int64_t width, int64_t height, double near, double eps2d,
                        TensorView projected, TensorView keys, TensorView base) {
  const float* m = data<float>(means, "means", {ANY, 3});
  const int64_t n = means.size(0);
  const float* q = data<float>(quats, "quats", {n, 4});
  const float* s = data<float>(scales, "scales", {n, 3});
  const float* o = data<float>(opacities, "opacities", {n});
  const float* c = data<float>(colors, "colors", {n, ANY});
  const int64_t channels = colors.size(1);
  const float* w = data<float>(viewmats, "viewmats", {ANY, 4, 4});
  const int64_t views = viewmats.size(0);
  const float* k = data<float>(Ks, "Ks", {views, 3, 3});
  check_image(views, width, height);
  if (n * views > INT32_MAX) fail("means: expected views times splats below 2^31");
  auto* p = reinterpret_cast<Projected*>(data<float>(projected, "projected", {views, n, PROJECTED}));
  float* key = data<float>(keys, "keys", {views, n, 2});
  int32_t* starts = data<int32_t>(base, "base", {views * n + 1});
  const Grid grid(views, width, height);

#pragma omp parallel for schedule(static) if (n * views > PARALLEL)
  for (int64_t g = 0; g < n; ++g) {
    const bool valid = finite(m + 3 * g, 3) && finite(q + 4 * g, 4) && finite(s + 3 * g, 3) && finite(o + g, 1) &&
                       finite(c + channels * g, channels);
    float rs[9];
    scale_columns(Rotation(q + 4 * g).r, s + 3 * g, rs);
    for (int64_t view = 0; view < views; ++view) {
      const int64_t i = view * n + g;
      const Camera camera(w + 16 * view, k + 9 * view, width, height);
      const float opacity = valid ? o[g] : 0.0f;
      key[2 * i + 1] = project(camera, m + 3 * g, rs, opacity, static_cast<float>(near), eps2d, grid, p[i], key[2 * i]);
      int32_t tiles = 0;
      for_each_tile(p[i], key[2 * i + 1], grid, [&](int64_t) { ++tiles; });
      starts[i + 1] = tiles;
    }
  }
  int64_t total = 0;
  starts[0] = 0;
  for (int64_t i = 1; i <= views * n; ++i) {
    total += starts[i];
    if (total > INT32_MAX) fail("means: the splats reach over 2^31 tiles; render fewer or smaller ones at a time");
    starts[i] = static_cast<int32_t>(total);
  }
  return total;
}

/// From `moments` (pairs, 6 + D), one row per (splat, tile) pair, to the gradients of the splats.
void project_backward(TensorView means, TensorView quats, TensorView scales, TensorView viewmats, TensorView Ks,
                      int64_t width, int64_t height, double eps2d, TensorView projected, TensorView base,
                      TensorView moments, TensorView v_means, TensorView v_quats, TensorView v_scales,
                      TensorView v_opacities, TensorView v_colors) {
  const float* m = data<float>(means, "means", {ANY, 3});
  const int64_t n = means.size(0);
  const float* q = data<float>(quats, "quats", {n, 4});
  const float* s = data<float>(scales, "scales", {n, 3});
  const float* w = data<float>(viewmats, "viewmats", {ANY, 4, 4});
  const int64_t views = viewmats.size(0);
  const float* k = data<float>(Ks, "Ks", {views, 3, 3});
  check_image(views, width, height);
  const auto* p = reinterpret_cast<Projected*>(data<float>(projected, "projected", {views, n, PROJECTED}));
  const float* sums = data<float>(moments, "moments", {ANY, ANY});
  const int64_t stride = moments.size(1), channels = stride - MOMENTS;
  if (channels < 1 || channels > MAX_CHANNELS) fail("moments: expected 7 to 22 columns");
  const int32_t* starts = data<int32_t>(base, "base", {views * n + 1});
  check_offsets(starts, views * n, moments.size(0), "base");
  float* vm = data<float>(v_means, "v_means", {n, 3});
  float* vq = data<float>(v_quats, "v_quats", {n, 4});
  float* vs = data<float>(v_scales, "v_scales", {n, 3});
  float* vo = data<float>(v_opacities, "v_opacities", {n});
  float* vc = data<float>(v_colors, "v_colors", {n, channels});

#pragma omp parallel for schedule(dynamic, 256) if (n * views > PARALLEL)
  for (int64_t g = 0; g < n; ++g) {
    float v_mean[3] = {0}, v_rs[9] = {0}, v_opacity = 0, v_color[MAX_CHANNELS] = {0};
    const Rotation rotation(q + 4 * g);
    float rs[9];
    scale_columns(rotation.r, s + 3 * g, rs);
    bool seen = false;
    for (int64_t view = 0; view < views; ++view) {
      const int64_t i = view * n + g;
      if (starts[i] == starts[i + 1]) continue;
      seen = true;
      float total[MOMENTS + MAX_CHANNELS] = {0};
      for (int64_t pair = starts[i]; pair < starts[i + 1]; ++pair)
        for (int64_t j = 0; j < stride; ++j) total[j] += sums[pair * stride + j];
      for (int64_t j = 0; j < channels; ++j) v_color[j] += total[MOMENTS + j];
      const float a = p[i].xx, b = p[i].xy, c = p[i].yy;
      v_opacity -= total[0] / p[i].opacity;
      const float v_x = a * total[1] + b * total[2], v_y = b * total[1] + c * total[2];
      const Camera camera(w + 16 * view, k + 9 * view, width, height);
      float point[3];
      camera.transform(m + 3 * g, point);
      const Linear l(camera, point, rs);
      // Of the conic Q as a symmetric matrix V; then of the covariance: -Q V Q; then of its half: 2 (-Q V Q) half.
      // In double: a needle's terms cancel.
      const Covariance covariance(l.half, eps2d);
      const double d = covariance.determinant;
      const double A = covariance.yy / d, B = -covariance.xy / d, C = covariance.xx / d;
      const double va = 0.5 * total[3], vb = 0.5 * total[4], vc = 0.5 * total[5];
      const double qa = A * va + B * vb, qb = A * vb + B * vc, qc = B * va + C * vb, qd = B * vb + C * vc;
      const auto ga = static_cast<float>(-2 * (qa * A + qb * B)), gb = static_cast<float>(-2 * (qa * B + qb * C)),
                 gc = static_cast<float>(-2 * (qc * B + qd * C));
      float v_half[6], v_factor[9];
      float v00 = 0, v02 = 0, v11 = 0, v12 = 0;
      for (int j = 0; j < 3; ++j) {
        v_half[j] = ga * l.half[j] + gb * l.half[3 + j];
        v_half[3 + j] = gb * l.half[j] + gc * l.half[3 + j];
        v_factor[j] = l.j00 * v_half[j];
        v_factor[3 + j] = l.j11 * v_half[3 + j];
        v_factor[6 + j] = l.j02 * v_half[j] + l.j12 * v_half[3 + j];
        v00 += v_half[j] * l.factor[j], v02 += v_half[j] * l.factor[6 + j];
        v11 += v_half[3 + j] * l.factor[3 + j], v12 += v_half[3 + j] * l.factor[6 + j];
      }
      const float rz = 1 / l.z, fx = camera.fx * rz, fy = camera.fy * rz;
      float v_point[3] = {fx * v_x, fy * v_y, -rz * (fx * l.x * v_x + fy * l.y * v_y)};
      v_point[2] += rz * (fx * (l.u * v02 - v00) + fy * (l.v * v12 - v11));
      const float v_u = -fx * v02, v_v = -fy * v12;
      const float u = l.x / l.z, v = l.y / l.z;
      if (u >= camera.left && u <= camera.right) v_point[0] += v_u * rz, v_point[2] -= v_u * rz * u;
      if (v >= camera.up && v <= camera.down) v_point[1] += v_v * rz, v_point[2] -= v_v * rz * v;
      for (int j = 0; j < 3; ++j)
        for (int r = 0; r < 3; ++r) {
          v_mean[j] += camera.r[3 * r + j] * v_point[r];
          for (int col = 0; col < 3; ++col) v_rs[3 * j + col] += camera.r[3 * r + j] * v_factor[3 * r + col];
        }
    }
    float v_rotation[9], v_scale[3] = {0}, v_quat[4] = {0};
    if (seen) {  // an unseen splat may hold NaN, which zero times it would spread
      for (int i = 0; i < 9; ++i) {
        v_scale[i % 3] += v_rs[i] * rotation.r[i];
        v_rotation[i] = v_rs[i] * s[3 * g + i % 3];
      }
      rotation.backward(v_rotation, v_quat);
    }
    std::copy(v_quat, v_quat + 4, vq + 4 * g);
    std::copy(v_mean, v_mean + 3, vm + 3 * g);
    std::copy(v_scale, v_scale + 3, vs + 3 * g);
    std::copy(v_color, v_color + channels, vc + channels * g);
    vo[g] = v_opacity;
  }
}

}  // namespace sv3d::splat

TVM_FFI_DLL_EXPORT_TYPED_FUNC(splat_raster_project, sv3d::splat::project_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(splat_raster_project_backward, sv3d::splat::project_backward);
