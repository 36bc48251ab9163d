// The arguments of the mesh rasteriser, checked, as the plain pointers its two paths work on.
#pragma once

#include "checks.h"
#include "mesh_raster.h"

namespace sv3d::raster {

using Optional = tvm::ffi::Optional<TensorView>;

constexpr int64_t MAX_SAMPLES = 16384;  // a side, in samples
constexpr int64_t MAX_COUNT = int64_t{1} << 31;

inline void expect(bool condition, const char* message) {
  if (!condition) fail(message);
}

template <DLDeviceType Device>
Scene scene_of(const TensorView& vertices, const TensorView& faces, const Optional& vertex_offsets,
               const Optional& face_offsets, const TensorView& viewmats, const TensorView& intrinsics, int64_t height,
               int64_t width, double near_plane, int64_t scale = 1) {
  Scene s{};
  s.vertices = data<float>(vertices, "vertices", {ANY, 3}, Device);
  s.faces = data<int32_t>(faces, "faces", {ANY, 3}, Device);
  s.viewmats = data<float>(viewmats, "viewmats", {ANY, ANY, 4, 4}, Device);
  const int64_t objects = viewmats.size(0), views = viewmats.size(1);
  s.intrinsics = data<float>(intrinsics, "Ks", {objects, views, 3, 3}, Device);
  expect(vertex_offsets.has_value() == face_offsets.has_value(),
         "vertex_offsets and face_offsets: expected both or neither");
  if (vertex_offsets.has_value()) {
    s.vertex_offsets = data<int64_t>(vertex_offsets.value(), "vertex_offsets", {objects + 1}, Device);
    s.face_offsets = data<int64_t>(face_offsets.value(), "face_offsets", {objects + 1}, Device);
  } else {
    expect(objects == 1, "vertex_offsets and face_offsets: expected for more than one object");
  }
  s.vertex_count = vertices.size(0), s.face_count = faces.size(0);
  expect(height > 0 && height <= MAX_SAMPLES && width > 0 && width <= MAX_SAMPLES,
         "size: expected 1 to 16384 samples a side, supersampling included");
  expect(near_plane > 0 && near_plane < 1e30, "near: expected a positive distance");
  expect(s.vertex_count < MAX_COUNT && s.face_count < MAX_COUNT && objects * views < MAX_COUNT,
         "vertices, faces, viewmats: expected fewer than 2^31 of each");
  s.objects = static_cast<int>(objects), s.views = static_cast<int>(views);
  s.height = static_cast<int>(height), s.width = static_cast<int>(width);
  s.near_plane = near_plane, s.scale = static_cast<double>(scale);
  return s;
}

template <DLDeviceType Device>
Look look_of(const Scene& s, const TensorView& uvs, const TensorView& textures, const Optional& normals,
             const TensorView& lights, const TensorView& ambient, const TensorView& background) {
  Look look{};
  look.uvs = data<float>(uvs, "uvs", {s.face_count, 3, 2}, Device);
  look.textures = data<uint8_t>(textures, "texture", {s.objects, ANY, ANY, 3}, Device);
  expect(textures.size(1) == textures.size(2) && textures.size(1) > 0 && textures.size(1) <= 65536,
         "texture: expected a square of 1 to 65536 texels a side");
  look.size = static_cast<int>(textures.size(1));
  if (normals.has_value()) look.normals = data<float>(normals.value(), "normals", {s.vertex_count, 3}, Device);
  look.lights = data<float>(lights, "lights", {s.objects, ANY, 4}, Device);
  expect(lights.size(1) < MAX_COUNT, "lights: expected fewer than 2^31");
  look.light_count = static_cast<int>(lights.size(1));
  look.ambient = data<float>(ambient, "ambient", {s.objects}, Device);
  look.background = data<float>(background, "background", {s.objects, 3}, Device);
  return look;
}

/// Samples along a side of a picture of `size` pixels.
inline int64_t samples_of(int64_t size, int64_t supersample) {
  expect(size > 0 && size <= MAX_SAMPLES, "size: expected 1 to 16384 pixels");
  expect(supersample >= 1 && supersample <= 16, "supersample: expected 1 to 16");
  return size * supersample;
}

}  // namespace sv3d::raster
