// Structural similarity on CUDA. A block marches down a strip of rows of interleaved channels. Each row is filtered
// along itself out of shared memory, and goes at once into the running sums of the rows whose windows it lies in,
// which are registers; so no filtered map is ever stored. Reading is two rows ahead.
#include <cuda_pipeline_primitives.h>

#include "cuda_launch.h"
#include "ssim.h"

namespace sv3d::ssim {
namespace {

constexpr int COLUMNS = 128;      // values of a row that a block filters: its threads
constexpr int STRIP = 48;         // rows
constexpr int STAGES = 3;         // rows in shared memory: one in use, two on their way
constexpr int MAX_CHANNELS = 64;  // so that they fit

struct Images {
  int64_t count;
  int height, width, channels;  // width in values: pixels times channels

  int64_t columns() const { return groups(width, COLUMNS); }
  int64_t strips() const { return groups(height, STRIP); }
  dim3 grid() const { return dim3(columns(), strips(), count); }
  size_t row_bytes() const { return sizeof(float) * (COLUMNS + 2 * RADIUS * channels); }
};

/// Filters INPUTS images of which `spread` makes MAPS products, and calls emit(place, values) for each of the block's
/// pixels, in order of rows. Outside the image is zero.
template <int INPUTS, int MAPS, typename Spread, typename Emit>
__device__ void filter_strip(const Images& images, const float* const (&inputs)[INPUTS], const Window& window,
                             const Spread& spread, const Emit& emit) {
  extern __shared__ float rows[];  // (STAGES, INPUTS, reach)
  const int channels = images.channels, margin = RADIUS * channels, reach = COLUMNS + 2 * margin;
  const int first_column = blockIdx.x * COLUMNS, first_row = blockIdx.y * STRIP;
  const int column = first_column + threadIdx.x, end_row = min(first_row + STRIP, images.height);
  const int64_t image = int64_t{blockIdx.z} * images.height * images.width;

  const auto fetch = [&](int row) {
    float* stage = rows + (row - first_row + RADIUS) % STAGES * INPUTS * reach;
    if (row < end_row + RADIUS)
      for (int i = threadIdx.x; i < reach; i += COLUMNS) {
        const int from = first_column - margin + i;
        const bool within = row >= 0 && row < images.height && from >= 0 && from < images.width;
        const int64_t place = within ? image + int64_t{row} * images.width + from : 0;
#pragma unroll
        for (int k = 0; k < INPUTS; ++k)
          __pipeline_memcpy_async(stage + k * reach + i, inputs[k] + place, sizeof(float), within ? 0 : sizeof(float));
      }
    __pipeline_commit();
  };

  float sums[MAPS][TAPS] = {};  // [.][t]: of the window that this row is tap t from the end of; it mirrors itself
  fetch(first_row - RADIUS);
  fetch(first_row - RADIUS + 1);
  for (int row = first_row - RADIUS; row < end_row + RADIUS; ++row) {
    __pipeline_wait_prior(1);
    __syncthreads();  // the row is there, and all threads are done with the one before
    fetch(row + 2);
    const float* stage = rows + (row - first_row + RADIUS) % STAGES * INPUTS * reach + threadIdx.x;
    float across[MAPS] = {};
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
      float values[INPUTS];
#pragma unroll
      for (int k = 0; k < INPUTS; ++k) values[k] = stage[k * reach + t * channels];
      spread(values, window.taps[t], across);
    }
#pragma unroll
    for (int m = 0; m < MAPS; ++m) {
#pragma unroll
      for (int t = 0; t + 1 < TAPS; ++t) sums[m][t] = sums[m][t + 1] + window.taps[t] * across[m];
      sums[m][TAPS - 1] = window.taps[TAPS - 1] * across[m];
    }
    const int done = row - RADIUS;  // the row whose window ends here
    if (done < first_row || column >= images.width) continue;
    float values[MAPS];
#pragma unroll
    for (int m = 0; m < MAPS; ++m) values[m] = sums[m][0];
    emit(image + int64_t{done} * images.width + column, values);
  }
}

/// Sum over the block, in the same order each time; the result is thread 0's.
__device__ float block_sum(float value) {
  __shared__ float warps[COLUMNS / 32];
  for (int lane = 16; lane; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < COLUMNS / 32; ++w) sum += warps[w];
  return sum;
}

/// Writes the sum of each block's part of the map and, unless `derivatives` is null, (3, images) derivatives of it.
__global__ void __launch_bounds__(COLUMNS)
    compare_strips(Images images, Window window, const float* x, const float* y, float* partial, float* derivatives) {
  const int64_t plane = images.count * images.height * images.width;
  const float* const inputs[2] = {x, y};
  float sum = 0;
  filter_strip<2, 5>(
      images, inputs, window,
      [](const float (&in)[2], float tap, float (&out)[5]) {
        const float tx = tap * in[0], ty = tap * in[1];
        out[0] += tx, out[1] += ty, out[2] += tx * in[0], out[3] += ty * in[1], out[4] += tx * in[1];
      },
      [&](int64_t place, const float (&v)[5]) {
        const Similarity s = compare(v[0], v[1], v[2], v[3], v[4]);
        sum += s.value;
        if (!derivatives) return;
        derivatives[place] = s.by_x, derivatives[plane + place] = s.by_xx, derivatives[2 * plane + place] = s.by_xy;
      });
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(COLUMNS)
    collect_strips(Images images, Window window, const float* x, const float* y, const float* derivatives,
                   const float* scales, float* gradient) {
  const int64_t plane = images.count * images.height * images.width;
  const float* const inputs[3] = {derivatives, derivatives + plane, derivatives + 2 * plane};
  const float scale = scales[blockIdx.z];
  filter_strip<3, 3>(
      images, inputs, window,
      [](const float (&in)[3], float tap, float (&out)[3]) {
        for (int m = 0; m < 3; ++m) out[m] += tap * in[m];
      },
      [&](int64_t place, const float (&v)[3]) {
        gradient[place] = scale * gradient_of(v[0], v[1], v[2], x[place], y[place]);
      });
}

Images images_of(const TensorView& x) {
  const int64_t count = x.size(0), height = x.size(1), columns = x.size(2) * x.size(3), channels = x.size(3);
  if (count * height * columns == 0) fail("x: expected images of at least one pixel and channel");
  if (count > 65535 || height > 1 << 20 || columns > 1 << 24 || channels > MAX_CHANNELS)
    fail("x: expected at most 65535 images, 2^20 rows, 2^24 values a row and 64 channels");
  return {count, static_cast<int>(height), static_cast<int>(columns), static_cast<int>(channels)};
}

}  // namespace

/// Sums of the similarity (N, blocks) of images x and y (N, H, W, C), block by block, and, unless it is empty, its
/// derivatives (3, N, H, W, C) by the filtered x, x x and x y.
void forward(TensorView x, TensorView y, TensorView partial, TensorView derivatives) {
  const float* px = data<float>(x, "x", {ANY, ANY, ANY, ANY}, kDLCUDA);
  const int64_t count = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3);
  const float* py = data<float>(y, "y", {count, height, width, channels}, kDLCUDA);
  const Images images = images_of(x);
  float* sums = data<float>(partial, "partial", {count, images.strips() * images.columns()}, kDLCUDA);
  float* d = derivatives.size(0) > 0
                 ? data<float>(derivatives, "derivatives", {3, count, height, width, channels}, kDLCUDA)
                 : nullptr;
  tvm::ffi::CUDADeviceGuard guard(x.device().device_id);
  compare_strips<<<images.grid(), COLUMNS, STAGES * 2 * images.row_bytes(), stream_of(x)>>>(images, Window(), px, py,
                                                                                            sums, d);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

/// Gradient (N, H, W, C) by x of the sum of scales (N,) times each image's sum of the similarity.
void backward(TensorView x, TensorView y, TensorView derivatives, TensorView scales, TensorView gradient) {
  const float* px = data<float>(x, "x", {ANY, ANY, ANY, ANY}, kDLCUDA);
  const int64_t count = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3);
  const float* py = data<float>(y, "y", {count, height, width, channels}, kDLCUDA);
  const float* d = data<float>(derivatives, "derivatives", {3, count, height, width, channels}, kDLCUDA);
  const float* s = data<float>(scales, "scales", {count}, kDLCUDA);
  float* g = data<float>(gradient, "gradient", {count, height, width, channels}, kDLCUDA);
  const Images images = images_of(x);
  tvm::ffi::CUDADeviceGuard guard(x.device().device_id);
  collect_strips<<<images.grid(), COLUMNS, STAGES * 3 * images.row_bytes(), stream_of(x)>>>(images, Window(), px, py, d,
                                                                                            s, g);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

}  // namespace sv3d::ssim

TVM_FFI_DLL_EXPORT_TYPED_FUNC(ssim_forward, sv3d::ssim::forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ssim_backward, sv3d::ssim::backward);
