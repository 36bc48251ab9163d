// Mesh rasterisation on CUDA. Keys of depth and face compete for each sample by atomic minimum: depths are positive,
// so their bits sort as they do, and of two faces at one depth the lower wins. Nothing here waits for the GPU.
#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include <algorithm>

#include "mesh_raster_arguments.h"

namespace {

using namespace sv3d::raster;
using sv3d::ANY;
using sv3d::data;
using tvm::ffi::TensorView;
using Key = unsigned long long;

constexpr int WARPS = 4;                 // a block of draw_small
constexpr int TILE_X = 8, TILE_Y = 4;    // samples that a warp tests at once
constexpr int LARGE = 4096;              // samples; a larger box goes to draw_large
constexpr int STRIPES = 16, LANES = 66;  // the grid of draw_large: blocks a triangle, triangles at once
constexpr Key NOTHING = ~Key{0};

/// Face and view of work item `item`; items run over the faces of a view first.
struct Item {
  int64_t face;
  int object, image;
};

__device__ Item item_of(const Scene& s, int64_t item) {
  const int view = static_cast<int>(item / s.face_count);
  const int64_t face = item - view * s.face_count;
  int low = 0, high = s.objects - 1;  // the last object whose first face is not after this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (s.face_offsets[middle] <= face)
      low = middle;
    else
      high = middle - 1;
  }
  return {face, low, low * s.views + view};
}

__device__ bool find_corners(const Scene& s, int object, int image, int64_t face, int64_t vertex[3], Corner corner[3]) {
  if (!corners_of(s, object, face, vertex)) return false;
  for (int i = 0; i < 3; ++i) corner[i] = project(s, image, vertex[i]);
  return true;
}

__device__ bool prepare_item(const Scene& s, const Item& work, Triangle& t) {
  int64_t vertex[3];
  Corner corner[3];
  return find_corners(s, work.object, work.image, work.face, vertex, corner) &&
         prepare(corner, s.width, s.height, s.near_plane, t);
}

__device__ void switch_to(const Scene& s, int object, int image, int64_t face, Surface& surface) {
  Corner corner[3];
  surface.face = face;
  find_corners(s, object, image, face, surface.vertex, corner);
  connect(corner, surface.triangle);
}

__device__ void draw_sample(const Scene& s, const Triangle& t, uint32_t face, int x, int y, Key* picture) {
  float depth;
  if (!covers(t, x, y, s.near_plane, depth)) return;
  const Key key = static_cast<Key>(__float_as_uint(depth)) << 32 | face;
  Key* at = picture + static_cast<int64_t>(y) * s.width + x;
  if (key < *at) atomicMin(at, key);  // a stale read only costs the atomic
}

/// A thread prepares a triangle, then its warp draws the 32 of them one after the other, 32 samples at once.
/// queue[0] counts the triangles left to draw_large, whose items follow.
__global__ void __launch_bounds__(32 * WARPS) draw_small(Scene s, Key* keys, uint32_t* queue) {
  __shared__ Triangle prepared[WARPS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * WARPS + warp) * 32 + lane;
  Item work{};
  bool small = false;
  if (item < s.face_count * s.views) {
    work = item_of(s, item);
    Triangle& t = prepared[warp][lane];
    if (prepare_item(s, work, t)) {
      small = static_cast<int64_t>(t.x1 - t.x0) * (t.y1 - t.y0) <= LARGE;
      if (!small) queue[1 + atomicAdd(queue, 1u)] = static_cast<uint32_t>(item);
    }
  }
  __syncwarp();
  for (unsigned left = __ballot_sync(~0u, small); left; left &= left - 1) {
    const int source = __ffs(left) - 1;
    const Triangle& t = prepared[warp][source];
    const uint32_t face = __shfl_sync(~0u, static_cast<uint32_t>(work.face), source);
    const int image = __shfl_sync(~0u, work.image, source);
    Key* picture = keys + static_cast<int64_t>(image) * s.height * s.width;
    for (int y = t.y0 + lane / TILE_X; y < t.y1; y += TILE_Y)
      for (int x = t.x0 + lane % TILE_X; x < t.x1; x += TILE_X) draw_sample(s, t, face, x, y, picture);
  }
}

/// Blocks share the rows of each queued triangle, so that one that fills the picture takes no longer than many.
__global__ void draw_large(Scene s, Key* keys, const uint32_t* queue) {
  for (uint32_t i = blockIdx.y; i < queue[0]; i += gridDim.y) {
    const Item work = item_of(s, queue[1 + i]);
    Triangle t;
    if (!prepare_item(s, work, t)) continue;
    Key* picture = keys + static_cast<int64_t>(work.image) * s.height * s.width;
    for (int y = t.y0 + blockIdx.x * blockDim.y + threadIdx.y; y < t.y1; y += gridDim.x * blockDim.y)
      for (int x = t.x0 + threadIdx.x; x < t.x1; x += blockDim.x)
        draw_sample(s, t, static_cast<uint32_t>(work.face), x, y, picture);
  }
}

__global__ void resolve(Scene s, const Key* keys, int64_t samples, int32_t* ids, float2* weights, float* depth) {
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (sample >= samples) return;
  const Key key = keys[sample];
  const int x = static_cast<int>(sample % s.width), y = static_cast<int>(sample / s.width % s.height);
  const int image = static_cast<int>(sample / s.width / s.height);
  Weights w{0, 0};
  if (key != NOTHING) {
    Surface surface;
    switch_to(s, image / s.views, image, static_cast<int64_t>(key & 0xffffffffu), surface);
    w = weights_at(surface.triangle, x, y);
  }
  ids[sample] = key == NOTHING ? -1 : static_cast<int32_t>(key & 0xffffffffu);
  weights[sample] = make_float2(w.first, w.second);
  depth[sample] = key == NOTHING ? __int_as_float(0x7f800000) : __uint_as_float(static_cast<uint32_t>(key >> 32));
}

/// One thread a pixel: shades its samples and averages them over the background.
__global__ void shade_pixels(Scene s, Look look, const Key* keys, int supersample, uint8_t* rgb, uint8_t* alpha) {
  const int size = s.width / supersample;
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= size || y >= size) return;
  for (int image = blockIdx.z; image < s.objects * s.views; image += gridDim.z) {
    const int object = image / s.views;
    const Key* picture = keys + static_cast<int64_t>(image) * s.height * s.width;
    float sum[3] = {0, 0, 0};
    int covered = 0;
    Surface surface;
    surface.face = -1;
    for (int j = y * supersample; j < (y + 1) * supersample; ++j)
      for (int i = x * supersample; i < (x + 1) * supersample; ++i) {
        const Key key = picture[static_cast<int64_t>(j) * s.width + i];
        if (key == NOTHING) continue;
        const int64_t face = static_cast<int64_t>(key & 0xffffffffu);
        if (face != surface.face) {
          switch_to(s, object, image, face, surface);
          light_face(s, look, object, surface);
        }
        float color[3];
        shade(look, object, surface, weights_at(surface.triangle, i, j), color);
        for (int c = 0; c < 3; ++c) sum[c] += color[c];
        ++covered;
      }
    const int64_t pixel = (static_cast<int64_t>(image) * size + y) * size + x;
    const float share = 1.0f / (supersample * supersample), coverage = covered * share;
    const float* background = look.background + 3 * object;
    for (int c = 0; c < 3; ++c) rgb[3 * pixel + c] = to_byte(sum[c] * share + 255 * (1 - coverage) * background[c]);
    alpha[pixel] = to_byte(255 * coverage);
  }
}

struct Launch {
  Key* keys;  // (objects * views, height, width)
  cudaStream_t stream;
};

/// Draws all triangles into the keys. `scratch`: bytes for the keys, then for the queue of large triangles.
Launch draw(const Scene& s, const TensorView& scratch) {
  const int64_t samples = int64_t{s.objects} * s.views * s.height * s.width, items = s.face_count * s.views;
  expect(items < MAX_COUNT, "faces, viewmats: expected fewer than 2^31 faces times views");
  uint8_t* bytes = data<uint8_t>(scratch, "scratch", {8 * samples + 4 * (items + 1)}, kDLCUDA);
  const DLDevice device = scratch.device();
  Launch launch{reinterpret_cast<Key*>(bytes),
                static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id))};
  uint32_t* queue = reinterpret_cast<uint32_t*>(bytes + 8 * samples);
  TVM_FFI_CHECK_CUDA_ERROR(cudaMemsetAsync(launch.keys, 0xff, 8 * samples, launch.stream));
  if (samples == 0 || items == 0) return launch;
  TVM_FFI_CHECK_CUDA_ERROR(cudaMemsetAsync(queue, 0, 4, launch.stream));
  const unsigned blocks = static_cast<unsigned>((items + 32 * WARPS - 1) / (32 * WARPS));
  draw_small<<<blocks, 32 * WARPS, 0, launch.stream>>>(s, launch.keys, queue);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
  draw_large<<<dim3(STRIPES, LANES), dim3(32, 8), 0, launch.stream>>>(s, launch.keys, queue);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
  return launch;
}

void mesh_raster(TensorView vertices, TensorView faces, TensorView viewmats, TensorView intrinsics, double near_plane,
                 TensorView scratch, TensorView ids, TensorView weights, TensorView depth) {
  data<int32_t>(ids, "triangle_id", {1, ANY, ANY, ANY}, kDLCUDA);
  const int64_t height = ids.size(2), width = ids.size(3);
  const Scene s = scene_of<kDLCUDA>(vertices, faces, {}, {}, viewmats, intrinsics, height, width, near_plane);
  int32_t* id = data<int32_t>(ids, "triangle_id", {1, s.views, height, width}, kDLCUDA);
  float* weight = data<float>(weights, "barycentrics", {1, s.views, height, width, 2}, kDLCUDA);
  float* z = data<float>(depth, "depth", {1, s.views, height, width}, kDLCUDA);
  const int64_t samples = s.views * height * width;
  if (samples == 0) return;
  tvm::ffi::CUDADeviceGuard guard(ids.device().device_id);
  const Launch launch = draw(s, scratch);
  resolve<<<static_cast<unsigned>((samples + 255) / 256), 256, 0, launch.stream>>>(
      s, launch.keys, samples, id, reinterpret_cast<float2*>(weight), z);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

void mesh_render(TensorView vertices, TensorView faces, Optional vertex_offsets, Optional face_offsets, TensorView uvs,
                 TensorView textures, Optional normals, TensorView viewmats, TensorView intrinsics, TensorView lights,
                 TensorView ambient, TensorView background, double near_plane, int64_t supersample, TensorView scratch,
                 TensorView rgb, TensorView alpha) {
  data<uint8_t>(rgb, "rgb", {ANY, ANY, ANY, ANY, 3}, kDLCUDA);
  const int64_t size = rgb.size(2), samples = samples_of(size, supersample);
  const Scene s = scene_of<kDLCUDA>(vertices, faces, vertex_offsets, face_offsets, viewmats, intrinsics, samples,
                                    samples, near_plane, supersample);
  const Look look = look_of<kDLCUDA>(s, uvs, textures, normals, lights, ambient, background);
  uint8_t* colors = data<uint8_t>(rgb, "rgb", {s.objects, s.views, size, size, 3}, kDLCUDA);
  uint8_t* coverage = data<uint8_t>(alpha, "alpha", {s.objects, s.views, size, size}, kDLCUDA);
  const int images = s.objects * s.views;
  if (images == 0) return;
  tvm::ffi::CUDADeviceGuard guard(rgb.device().device_id);
  const Launch launch = draw(s, scratch);
  const unsigned across = static_cast<unsigned>((size + 15) / 16);
  shade_pixels<<<dim3(across, across, std::min(images, 65535)), dim3(16, 16), 0, launch.stream>>>(
      s, look, launch.keys, static_cast<int>(supersample), colors, coverage);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mesh_raster, mesh_raster);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mesh_render, mesh_render);
