// Mesh rasterisation: the maths of one corner, one triangle and one sample, shared by the CPU and the CUDA path.
//
// Triangles are rasterised in homogeneous pixel coordinates (Olano and Greer, "Triangle Scan Conversion using 2D
// Homogeneous Coordinates", 1997): with u_i = K (R v_i + t), the edge functions e_i(p) = det(p, u_j, u_k) of the
// pixel p = (x, y, 1) have one sign inside, e_i / (e_0 + e_1 + e_2) is the perspective-correct weight of corner i and
// det(u_0, u_1, u_2) / (e_0 + e_1 + e_2) the depth. Nothing is divided by a depth, so a triangle that crosses the near
// plane needs no clipping: samples nearer than the plane are dropped one by one.
//
// Coverage is watertight: an edge is evaluated in one canonical direction, so the two triangles at an edge compute
// bitwise the same number, and a sample exactly on it belongs to the one on its positive side. For this, and for
// equal pictures on both devices, the double arithmetic must not be contracted or reordered: `mul` and `add` see to it
// on the GPU, the source's compile options on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace sv3d::raster {

/// A batch of objects and their cameras. Faces index the vertices of their own object.
struct Scene {
  const float* vertices;          // (vertex_count, 3)
  const int32_t* faces;           // (face_count, 3)
  const int64_t* vertex_offsets;  // (objects + 1), null for one object
  const int64_t* face_offsets;    // (objects + 1), null for one object
  const float* viewmats;          // (objects, views, 4, 4)
  const float* intrinsics;        // (objects, views, 3, 3)
  int64_t vertex_count, face_count;
  int objects, views, height, width;  // height and width in samples
  double near_plane, scale;           // scale: samples a pixel, along a side

  SV3D_HD int64_t first_vertex(int object) const { return vertex_offsets ? vertex_offsets[object] : 0; }
  SV3D_HD int64_t last_vertex(int object) const { return vertex_offsets ? vertex_offsets[object + 1] : vertex_count; }
  SV3D_HD int64_t first_face(int object) const { return face_offsets ? face_offsets[object] : 0; }
  SV3D_HD int64_t last_face(int object) const { return face_offsets ? face_offsets[object + 1] : face_count; }
};

/// What a surface looks like. The arrays over vertices and faces run over the whole batch.
struct Look {
  const float* uvs;         // (face_count, 3, 2)
  const uint8_t* textures;  // (objects, size, size, 3), row 0 at v = 1
  const float* normals;     // (vertex_count, 3), null for face normals
  const float* lights;      // (objects, light_count, 4)
  const float* ambient;     // (objects)
  const float* background;  // (objects, 3)
  int size, light_count;
};

/// A vertex in homogeneous pixels: (x, y, w) with w the camera depth, and its pixel (px, py) where w > 0.
struct Corner {
  double x, y, w, px, py;
};

struct Triangle {
  double a[3], b[3], c[3];                 // edge i, opposite to corner i, in its canonical direction: a x + b y + c
  double inverse_a, inverse_b, inverse_c;  // 1 / depth, as a function of the pixel
  double nearest, farthest;                // depths of the corners
  int positive;                            // bit i: the triangle lies on the positive side of edge i
  int flipped;                             // bit i: edge i runs against the triangle's winding
  int x0, x1, y0, y1;                      // half-open box of the samples it may cover
  bool crosses_near, front;                // front: the winding is counter-clockwise seen from the camera
};

/// A covered sample: perspective-correct weights of corners 0 and 1.
struct Weights {
  float first, second;
};

SV3D_HD double mul(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

SV3D_HD double add(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

SV3D_HD double dot(double ax, double ay, double az, double bx, double by, double bz) {
  return add(add(mul(ax, bx), mul(ay, by)), mul(az, bz));
}

SV3D_HD double smaller(double a, double b) { return a < b ? a : b; }
SV3D_HD double larger(double a, double b) { return a > b ? a : b; }

/// `value` in [low, high]; NaN becomes low.
template <typename T>
SV3D_HD T clamp(T value, T low, T high) {
  return value > low ? (value < high ? value : high) : low;
}

SV3D_HD bool finite(const Corner& c) { return fabs(c.x) < 1e90 && fabs(c.y) < 1e90 && fabs(c.w) < 1e90; }

/// Vertex `vertex` of the batch in the samples of picture `image`.
SV3D_HD Corner project(const Scene& s, int image, int64_t vertex) {
  const float *viewmat = s.viewmats + 16 * int64_t{image}, *k = s.intrinsics + 9 * int64_t{image};
  const float* v = s.vertices + 3 * vertex;
  double camera[3];
  for (int i = 0; i < 3; ++i) {
    const float* row = viewmat + 4 * i;
    camera[i] = add(dot(row[0], row[1], row[2], v[0], v[1], v[2]), row[3]);
  }
  Corner out;
  out.x = mul(s.scale, dot(k[0], k[1], k[2], camera[0], camera[1], camera[2]));
  out.y = mul(s.scale, dot(k[3], k[4], k[5], camera[0], camera[1], camera[2]));
  out.w = camera[2];
  out.px = out.w > 0 ? out.x / out.w : out.x;
  out.py = out.w > 0 ? out.y / out.w : out.y;
  return out;
}

/// The canonical direction of an edge: left to right, top to bottom on a tie. It breaks ties between samples and
/// edges as an infinitesimal shift of the samples would, so a vertex on a sample belongs to one triangle of its fan.
SV3D_HD bool precedes(const Corner& a, const Corner& b) {
  if (a.px != b.px) return a.px < b.px;
  if (a.py != b.py) return a.py < b.py;
  return a.w < b.w;
}

/// The samples whose centres lie in [low, high] pixels, as a half-open range within [0, size].
SV3D_HD void sample_range(double low, double high, int size, int& first, int& last) {
  const double slack = 1e-6;  // rounding of the projected corners
  first = static_cast<int>(clamp(ceil(low - 0.5 - slack), 0.0, static_cast<double>(size)));
  last = static_cast<int>(clamp(floor(high - 0.5 + slack) + 1.0, 0.0, static_cast<double>(size)));
}

/// Box and depths of the triangle of three corners; false if no sample is in reach or a corner is not finite.
SV3D_HD bool bound(const Corner corner[3], int width, int height, double near_plane, Triangle& t) {
  double low_x = 1e300, high_x = -1e300, low_y = 1e300, high_y = -1e300;
  t.nearest = 1e300;
  t.farthest = -1e300;
  for (int i = 0; i < 3; ++i) {
    if (!finite(corner[i])) return false;
    t.nearest = smaller(t.nearest, corner[i].w);
    t.farthest = larger(t.farthest, corner[i].w);
  }
  if (t.farthest < near_plane) return false;
  t.crosses_near = t.nearest < near_plane;
  for (int i = 0; i < 3; ++i) {
    const Corner &p = corner[i], &q = corner[i == 2 ? 0 : i + 1];
    if (p.w >= near_plane) {
      low_x = smaller(low_x, p.px), high_x = larger(high_x, p.px);
      low_y = smaller(low_y, p.py), high_y = larger(high_y, p.py);
    }
    if ((p.w >= near_plane) != (q.w >= near_plane)) {
      const double s = (near_plane - p.w) / (q.w - p.w);
      const double x = add(p.x, mul(s, q.x - p.x)) / near_plane, y = add(p.y, mul(s, q.y - p.y)) / near_plane;
      low_x = smaller(low_x, x), high_x = larger(high_x, x);
      low_y = smaller(low_y, y), high_y = larger(high_y, y);
    }
  }
  sample_range(low_x, high_x, width, t.x0, t.x1);
  sample_range(low_y, high_y, height, t.y0, t.y1);
  return t.x0 < t.x1 && t.y0 < t.y1;
}

/// Edge functions of the triangle, and its determinant: 0 for a triangle without area.
SV3D_HD double connect(const Corner corner[3], Triangle& t) {
  t.flipped = 0;
  for (int i = 0; i < 3; ++i) {
    const Corner &j = corner[i == 2 ? 0 : i + 1], &k = corner[i == 0 ? 2 : i - 1];
    const bool flip = precedes(k, j);
    const Corner &from = flip ? k : j, &to = flip ? j : k;
    t.a[i] = add(mul(from.y, to.w), -mul(from.w, to.y));
    t.b[i] = add(mul(from.w, to.x), -mul(from.x, to.w));
    t.c[i] = add(mul(from.x, to.y), -mul(from.y, to.x));
    t.flipped |= static_cast<int>(flip) << i;
  }
  double determinant = dot(t.a[0], t.b[0], t.c[0], corner[0].x, corner[0].y, corner[0].w);
  if (t.flipped & 1) determinant = -determinant;
  t.front = determinant < 0;
  t.positive = (t.front ? t.flipped : ~t.flipped) & 7;
  return determinant;
}

/// Prepares the triangle of three corners for drawing; false if it can't cover a sample.
SV3D_HD bool prepare(const Corner corner[3], int width, int height, double near_plane, Triangle& t) {
  if (!bound(corner, width, height, near_plane, t)) return false;
  const double determinant = connect(corner, t);
  if (determinant == 0) return false;
  t.inverse_a = t.inverse_b = t.inverse_c = 0;
  for (int i = 0; i < 3; ++i) {
    const bool flip = t.flipped >> i & 1;
    t.inverse_a = add(t.inverse_a, flip ? -t.a[i] : t.a[i]);
    t.inverse_b = add(t.inverse_b, flip ? -t.b[i] : t.b[i]);
    t.inverse_c = add(t.inverse_c, flip ? -t.c[i] : t.c[i]);
  }
  t.inverse_a /= determinant, t.inverse_b /= determinant, t.inverse_c /= determinant;
  return true;
}

/// The part of a x + b y + c that a row of samples shares.
SV3D_HD double on_row(double b, double c, int y) { return add(mul(b, y + 0.5), c); }

/// a x + b y + c at a sample, `row` being on_row(b, c, y).
SV3D_HD double at(double a, double row, int x) { return add(mul(a, x + 0.5), row); }

/// Depth of the triangle at a covered sample; false if it lies before the near plane.
/// A triangle seen almost edge-on has a depth of rounding errors: it is kept between the corners'.
SV3D_HD bool depth_at(const Triangle& t, double inverse, double near_plane, float& depth) {
  const double z = 1.0 / inverse;
  if (t.crosses_near && !(z >= near_plane)) return false;
  depth = static_cast<float>(clamp(z, t.crosses_near ? near_plane : t.nearest, t.farthest));
  return true;
}

/// Whether the triangle covers sample (x, y), and at which depth.
SV3D_HD bool covers(const Triangle& t, int x, int y, double near_plane, float& depth) {
  for (int i = 0; i < 3; ++i)
    if ((at(t.a[i], on_row(t.b[i], t.c[i], y), x) >= 0) != ((t.positive >> i & 1) != 0)) return false;
  return depth_at(t, at(t.inverse_a, on_row(t.inverse_b, t.inverse_c, y), x), near_plane, depth);
}

SV3D_HD Weights weights_at(const Triangle& t, int x, int y) {
  double e[3];
  for (int i = 0; i < 3; ++i) e[i] = fabs(at(t.a[i], on_row(t.b[i], t.c[i], y), x));
  const double sum = add(add(e[0], e[1]), e[2]);
  if (!(sum > 0)) return {1.0f / 3, 1.0f / 3};
  return {static_cast<float>(e[0] / sum), static_cast<float>(e[1] / sum)};
}

/// The vertices of face `face` of `object`, as indices into the whole batch; false if one is out of range.
SV3D_HD bool corners_of(const Scene& s, int object, int64_t face, int64_t vertex[3]) {
  const int64_t first = s.first_vertex(object), last = s.last_vertex(object);
  if (first < 0 || last > s.vertex_count) return false;
  for (int i = 0; i < 3; ++i) {
    const int32_t local = s.faces[3 * face + i];
    vertex[i] = first + local;
    if (local < 0 || vertex[i] >= last) return false;
  }
  return true;
}

SV3D_HD float length(const float v[3]) { return sqrtf(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]); }

/// A face as a sample shows it: ready for weights, and its unit normal on the camera's side (zero without area).
struct Surface {
  Triangle triangle;  // edges only
  int64_t face, vertex[3];
  float normal[3], light;  // light: without vertex normals, all that the face receives
};

SV3D_HD float light_on(const Look& look, int object, const float normal[3]) {
  float light = look.ambient[object];
  const float* lights = look.lights + int64_t{4} * look.light_count * object;
  for (int i = 0; i < look.light_count; ++i) {
    const float* l = lights + 4 * i;
    const float cosine = normal[0] * l[0] + normal[1] * l[1] + normal[2] * l[2];
    light += l[3] * (cosine > 0 ? cosine : 0.0f);
  }
  return clamp(light, 0.0f, 1.0f);
}

/// Fills in the normal and the light of a surface whose triangle and vertices are known.
SV3D_HD void light_face(const Scene& s, const Look& look, int object, Surface& f) {
  const float* p[3];
  for (int i = 0; i < 3; ++i) p[i] = s.vertices + 3 * f.vertex[i];
  float d[3], e[3];
  for (int i = 0; i < 3; ++i) d[i] = p[1][i] - p[0][i], e[i] = p[2][i] - p[0][i];
  const float cross[3] = {d[1] * e[2] - d[2] * e[1], d[2] * e[0] - d[0] * e[2], d[0] * e[1] - d[1] * e[0]};
  const float size = length(cross), scale = size > 0 ? (f.triangle.front ? 1 : -1) / size : 0.0f;
  for (int i = 0; i < 3; ++i) f.normal[i] = scale * cross[i];
  f.light = look.normals ? 0 : light_on(look, object, f.normal);
}

/// Light at a point of a surface, from the vertex normals. They are turned to the side of the face's normal: near a
/// silhouette an interpolated normal may point away from the camera by right.
SV3D_HD float smooth_light(const Look& look, int object, const Surface& f, const float w[3]) {
  float smooth[3], agreement = 0;
  for (int i = 0; i < 3; ++i) {
    smooth[i] = 0;
    for (int c = 0; c < 3; ++c) smooth[i] += w[c] * look.normals[3 * f.vertex[c] + i];
    agreement += smooth[i] * f.normal[i];
  }
  const float size = length(smooth);
  if (!(size > 0)) return light_on(look, object, f.normal);
  const float scale = (agreement < 0 ? -1 : 1) / size;
  for (int i = 0; i < 3; ++i) smooth[i] *= scale;
  return light_on(look, object, smooth);
}

/// Bilinear lookup, clamped at the border, in 0..255; texel centres lie at (i + 0.5) / size.
SV3D_HD void texel_at(const uint8_t* texture, int size, float u, float v, float color[3]) {
  const float last = static_cast<float>(size - 1);
  const float x = clamp(u * size - 0.5f, 0.0f, last), y = clamp((1 - v) * size - 0.5f, 0.0f, last);
  const int x0 = static_cast<int>(x), y0 = static_cast<int>(y);
  const int x1 = x0 + 1 < size ? x0 + 1 : x0, y1 = y0 + 1 < size ? y0 + 1 : y0;
  const float fx = x - x0, fy = y - y0;
  const uint8_t *row0 = texture + int64_t{3} * size * y0, *row1 = texture + int64_t{3} * size * y1;
  for (int i = 0; i < 3; ++i) {
    const float top = row0[3 * x0 + i] * (1 - fx) + row0[3 * x1 + i] * fx;
    const float bottom = row1[3 * x0 + i] * (1 - fx) + row1[3 * x1 + i] * fx;
    color[i] = top * (1 - fy) + bottom * fy;
  }
}

/// Colour in 0..255 of a point of a surface: albedo * clamp(ambient + sum of intensity * max(0, n . l), 0, 1).
SV3D_HD void shade(const Look& look, int object, const Surface& f, Weights at, float color[3]) {
  const float w[3] = {at.first, at.second, 1 - at.first - at.second};
  const float* uv = look.uvs + 6 * f.face;
  const float u = w[0] * uv[0] + w[1] * uv[2] + w[2] * uv[4], v = w[0] * uv[1] + w[1] * uv[3] + w[2] * uv[5];
  texel_at(look.textures + int64_t{3} * look.size * look.size * object, look.size, u, v, color);
  const float light = look.normals ? smooth_light(look, object, f, w) : f.light;
  for (int i = 0; i < 3; ++i) color[i] *= light;
}

/// A value in 0..255 as a byte, rounded.
SV3D_HD uint8_t to_byte(float value) { return static_cast<uint8_t>(clamp(value, 0.0f, 255.0f) + 0.5f); }

}  // namespace sv3d::raster
