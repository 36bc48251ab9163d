// Mesh rasterisation on the CPU: bands of rows of every picture in parallel, each with a depth buffer of its own.
#include "mesh_raster.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "mesh_raster_arguments.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#define SV3D_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace {

using namespace sv3d::raster;
using sv3d::ANY;
using sv3d::data;
using tvm::ffi::TensorView;

constexpr int64_t PARALLEL_FROM = 20000;  // samples and faces; under this a parallel region costs more than it saves

int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

/// Rows [y0, y1) of one picture, and where a thread draws them.
struct Band {
  int image, object, y0, y1;
};

struct Canvas {
  std::vector<Corner> corners;  // of the picture's object
  std::vector<float> depth;     // of the band's samples, +inf where nothing is
  std::vector<int32_t> face;    // within the batch, -1 where nothing is
};

SV3D_CLONES void draw_triangle(const Triangle& t, int32_t face, double near_plane, int y0, int y1, int width,
                               float* depth, int32_t* faces) {
  for (int y = y0; y < y1; ++y) {
    double a[3], row[3];
    for (int i = 0; i < 3; ++i) a[i] = t.a[i], row[i] = on_row(t.b[i], t.c[i], y);
    const double inverse = on_row(t.inverse_b, t.inverse_c, y);
    const bool s0 = t.positive & 1, s1 = t.positive & 2, s2 = t.positive & 4;
    float* depth_row = depth + static_cast<int64_t>(y - y0) * width;
    int32_t* face_row = faces + static_cast<int64_t>(y - y0) * width;
    bool entered = false;
    for (int x = t.x0; x < t.x1; ++x) {
      const bool inside =
          ((at(a[0], row[0], x) >= 0) == s0) & ((at(a[1], row[1], x) >= 0) == s1) & ((at(a[2], row[2], x) >= 0) == s2);
      if (!inside) {
        if (entered) break;  // a triangle is convex
        continue;
      }
      entered = true;
      float z;
      if (depth_at(t, at(t.inverse_a, inverse, x), near_plane, z) && z < depth_row[x])
        depth_row[x] = z, face_row[x] = face;
    }
  }
}

bool find_corners(const Scene& s, int object, const Canvas& canvas, int64_t face, int64_t vertex[3], Corner corner[3]) {
  if (!corners_of(s, object, face, vertex)) return false;
  for (int i = 0; i < 3; ++i) corner[i] = canvas.corners[vertex[i] - s.first_vertex(object)];
  return true;
}

/// Faces are drawn in order, so that of two at one depth the lower stays.
void draw_band(const Scene& s, const Band& band, Canvas& canvas) {
  const int64_t samples = static_cast<int64_t>(band.y1 - band.y0) * s.width;
  std::fill_n(canvas.depth.begin(), samples, std::numeric_limits<float>::infinity());
  std::fill_n(canvas.face.begin(), samples, -1);
  const int64_t first = s.first_vertex(band.object), last = s.last_vertex(band.object);
  for (int64_t v = first; v < last; ++v) canvas.corners[v - first] = project(s, band.image, v);
  int64_t vertex[3];
  Corner corner[3];
  Triangle t;
  for (int64_t f = s.first_face(band.object); f < s.last_face(band.object); ++f) {
    if (!find_corners(s, band.object, canvas, f, vertex, corner)) continue;
    if (!prepare(corner, s.width, s.height, s.near_plane, t)) continue;
    const int y0 = std::max(t.y0, band.y0), y1 = std::min(t.y1, band.y1);
    if (y0 >= y1) continue;
    const int64_t offset = static_cast<int64_t>(y0 - band.y0) * s.width;
    draw_triangle(t, static_cast<int32_t>(f), s.near_plane, y0, y1, s.width, canvas.depth.data() + offset,
                  canvas.face.data() + offset);
  }
}

/// Makes `surface` that of `face`; true if it was not. Neighbouring samples mostly show the same face.
bool switch_to(const Scene& s, const Band& band, const Canvas& canvas, int64_t face, Surface& surface) {
  if (surface.face == face) return false;
  Corner corner[3];
  surface.face = face;
  find_corners(s, band.object, canvas, face, surface.vertex, corner);
  connect(corner, surface.triangle);
  return true;
}

/// Every face in order, every vertex in range: the CPU can afford to look before it draws.
void check_indices(const Scene& s) {
  const auto offsets = [](const int64_t* o, int objects, int64_t count, const char* message) {
    if (!o) return;
    bool good = o[0] == 0 && o[objects] == count;
    for (int i = 0; i < objects; ++i) good = good && o[i] <= o[i + 1];
    expect(good, message);
  };
  offsets(s.vertex_offsets, s.objects, s.vertex_count, "vertex_offsets: expected to rise from 0 to the vertex count");
  offsets(s.face_offsets, s.objects, s.face_count, "face_offsets: expected to rise from 0 to the face count");
  for (int o = 0; o < s.objects; ++o) {
    const int64_t vertices = s.last_vertex(o) - s.first_vertex(o);
    for (int64_t i = 3 * s.first_face(o); i < 3 * s.last_face(o); ++i)
      if (s.faces[i] < 0 || s.faces[i] >= vertices)
        sv3d::fail("faces: expected indices in [0, " + std::to_string(vertices) + "), got " +
                   std::to_string(s.faces[i]) + " in face " + std::to_string(i / 3));
  }
}

/// Runs `finish(band, canvas)` on the drawn bands of all pictures; a band starts at a multiple of `unit` rows.
template <typename Finish>
void for_bands(const Scene& s, int unit, const Finish& finish) {
  check_indices(s);
  const int64_t images = int64_t{s.objects} * s.views, rows = s.height / unit;
  if (images == 0) return;
  // A picture is cut only where there are too few to keep every thread busy: each band prepares all faces again.
  const int64_t wanted = std::clamp<int64_t>(2 * threads() / images, 1, std::max<int64_t>(1, s.height / 32));
  const int64_t band_rows = (rows + wanted - 1) / wanted, bands = (rows + band_rows - 1) / band_rows;
  int64_t most_vertices = 0;
  for (int o = 0; o < s.objects; ++o) most_vertices = std::max(most_vertices, s.last_vertex(o) - s.first_vertex(o));
  const int64_t work = images * (int64_t{s.height} * s.width + s.face_count);
  const bool parallel = work > PARALLEL_FROM;
  std::vector<Canvas> canvases(parallel ? threads() : 1);
  for (Canvas& canvas : canvases) {
    canvas.corners.resize(most_vertices);
    canvas.depth.resize(band_rows * unit * s.width);
    canvas.face.resize(band_rows * unit * s.width);
  }
#pragma omp parallel for schedule(dynamic, 1) if (parallel)
  for (int64_t task = 0; task < images * bands; ++task) {
    const int64_t image = task / bands, first = task % bands * band_rows;
    const Band band{static_cast<int>(image), static_cast<int>(image / s.views), static_cast<int>(first * unit),
                    static_cast<int>(std::min(first + band_rows, rows) * unit)};
    Canvas& canvas = canvases[thread()];
    draw_band(s, band, canvas);
    finish(band, canvas);
  }
}

SV3D_CLONES void resolve_band(const Scene& s, const Band& band, const Canvas& canvas, int32_t* ids, float* weights,
                              float* depth) {
  const int64_t start = (int64_t{band.image} * s.height + band.y0) * s.width;
  Surface surface;
  surface.face = -1;
  int64_t sample = 0;
  for (int y = band.y0; y < band.y1; ++y)
    for (int x = 0; x < s.width; ++x, ++sample) {
      const int32_t face = canvas.face[sample];
      Weights w{0, 0};
      if (face >= 0) {
        switch_to(s, band, canvas, face, surface);
        w = weights_at(surface.triangle, x, y);
      }
      ids[start + sample] = face;
      depth[start + sample] = canvas.depth[sample];
      weights[2 * (start + sample)] = w.first;
      weights[2 * (start + sample) + 1] = w.second;
    }
}

SV3D_CLONES void shade_band(const Scene& s, const Look& look, const Band& band, const Canvas& canvas, int supersample,
                            uint8_t* rgb, uint8_t* alpha) {
  const int size = s.width / supersample;
  const float share = 1.0f / (supersample * supersample);
  const float* background = look.background + int64_t{3} * band.object;
  Surface surface;
  surface.face = -1;
  for (int y = band.y0 / supersample; y < band.y1 / supersample; ++y)
    for (int x = 0; x < size; ++x) {
      float sum[3] = {0, 0, 0};
      int covered = 0;
      for (int j = y * supersample; j < (y + 1) * supersample; ++j)
        for (int i = x * supersample; i < (x + 1) * supersample; ++i) {
          const int32_t face = canvas.face[static_cast<int64_t>(j - band.y0) * s.width + i];
          if (face < 0) continue;
          if (switch_to(s, band, canvas, face, surface)) light_face(s, look, band.object, surface);
          float color[3];
          shade(look, band.object, surface, weights_at(surface.triangle, i, j), color);
          for (int c = 0; c < 3; ++c) sum[c] += color[c];
          ++covered;
        }
      const int64_t pixel = (int64_t{band.image} * size + y) * size + x;
      const float coverage = covered * share;
      for (int c = 0; c < 3; ++c) rgb[3 * pixel + c] = to_byte(sum[c] * share + 255 * (1 - coverage) * background[c]);
      alpha[pixel] = to_byte(255 * coverage);
    }
}

void mesh_raster(TensorView vertices, TensorView faces, TensorView viewmats, TensorView intrinsics, double near_plane,
                 TensorView ids, TensorView weights, TensorView depth) {
  data<int32_t>(ids, "triangle_id", {1, ANY, ANY, ANY});
  const int64_t height = ids.size(2), width = ids.size(3);
  const Scene s = scene_of<kDLCPU>(vertices, faces, {}, {}, viewmats, intrinsics, height, width, near_plane);
  int32_t* id = data<int32_t>(ids, "triangle_id", {1, s.views, height, width});
  float* weight = data<float>(weights, "barycentrics", {1, s.views, height, width, 2});
  float* z = data<float>(depth, "depth", {1, s.views, height, width});
  for_bands(s, 1, [&](const Band& band, const Canvas& canvas) { resolve_band(s, band, canvas, id, weight, z); });
}

void mesh_render(TensorView vertices, TensorView faces, Optional vertex_offsets, Optional face_offsets, TensorView uvs,
                 TensorView textures, Optional normals, TensorView viewmats, TensorView intrinsics, TensorView lights,
                 TensorView ambient, TensorView background, double near_plane, int64_t supersample, TensorView rgb,
                 TensorView alpha) {
  data<uint8_t>(rgb, "rgb", {ANY, ANY, ANY, ANY, 3});
  const int64_t size = rgb.size(2), samples = samples_of(size, supersample);
  const Scene s = scene_of<kDLCPU>(vertices, faces, vertex_offsets, face_offsets, viewmats, intrinsics, samples,
                                   samples, near_plane, supersample);
  const Look look = look_of<kDLCPU>(s, uvs, textures, normals, lights, ambient, background);
  uint8_t* colors = data<uint8_t>(rgb, "rgb", {s.objects, s.views, size, size, 3});
  uint8_t* coverage = data<uint8_t>(alpha, "alpha", {s.objects, s.views, size, size});
  const int factor = static_cast<int>(supersample);
  for_bands(s, factor, [&](const Band& band, const Canvas& canvas) {
    shade_band(s, look, band, canvas, factor, colors, coverage);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mesh_raster, mesh_raster);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mesh_render, mesh_render);
