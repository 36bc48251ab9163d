// Splat rasteriser, third part: from the gradients of the pixels to those of every (splat, tile) pair.
#include "splat_raster.h"

namespace sv3d::splat {
/// From the gradients of images (C,H,W,D) and alphas (C,H,W) to moments (pairs, 6 + D): per (splat, tile) pair the
/// sums over its pixels of v, v dx, v dy, v dx dx, v dx dy, v dy dy, where v is the gradient of the exponent sigma,
/// then the gradient of its colour. Each row is written once, by one thread: the sum does not depend on threads.
void render_backward(TensorView projected, TensorView colors, TensorView backgrounds, int64_t width, int64_t height,
                     TensorView ids, TensorView slots, TensorView offsets, TensorView transmittance, TensorView last,
                     TensorView v_images, TensorView v_alphas, TensorView moments) {
  const auto* p = reinterpret_cast<Projected*>(data<float>(projected, "projected", {ANY, ANY, PROJECTED}));
  const int64_t views = projected.size(0), n = projected.size(1);
  check_image(views, width, height);
  const Grid grid(views, width, height);
  const float* c = data<float>(colors, "colors", {n, ANY});
  const int64_t channels = colors.size(1);
  if (channels < 1 || channels > MAX_CHANNELS) fail("colors: expected 1 to 16 channels");
  const bool background = backgrounds.ndim() > 0 && backgrounds.size(0) > 0;
  const float* bg = data<float>(backgrounds, "backgrounds", {background ? views : 0, channels});
  const int32_t* id = data<int32_t>(ids, "ids", {ANY});
  const int64_t pairs = ids.size(0);
  const int32_t* slot = data<int32_t>(slots, "slots", {pairs});
  const int32_t* offset = data<int32_t>(offsets, "offsets", {views, grid.tiles() + 1});
  const float* through = data<float>(transmittance, "transmittance", {views, height, width});
  const int32_t* final = data<int32_t>(last, "last", {views, height, width});
  const float* vi = data<float>(v_images, "v_images", {views, height, width, channels});
  const float* va = data<float>(v_alphas, "v_alphas", {views, height, width});
  float* out = data<float>(moments, "moments", {pairs, MOMENTS + channels});
  check_range(id, pairs, 0, n, "ids");
  check_range(slot, pairs, 0, pairs, "slots");
  check_range(offset, views * (grid.tiles() + 1), 0, pairs + 1, "offsets");

  const TileFunctions::Backward run = tile_functions().backward[TileFunctions::size(channels)];
#pragma omp parallel for schedule(dynamic, 1) if (pairs > PARALLEL)
  for (int64_t i = 0; i < views * grid.tiles(); ++i) {
    const int64_t view = i / grid.tiles(), tile = i % grid.tiles();
    const int32_t* range = offset + view * (grid.tiles() + 1) + tile;
    const int64_t x0 = tile % grid.columns * TILE, y0 = tile / grid.columns * TILE;
    const int64_t pixel = (view * height + y0) * width + x0;
    run({p + view * n, c, background ? bg + view * channels : nullptr, static_cast<int>(channels), id + range[0],
         slot + range[0], range[1] - range[0], x0, y0, std::min<int64_t>(TILE, width - x0),
         std::min<int64_t>(TILE, height - y0), width, vi + pixel * channels, va + pixel, through + pixel, final + pixel,
         out});
  }
}

}  // namespace sv3d::splat

TVM_FFI_DLL_EXPORT_TYPED_FUNC(splat_raster_backward, sv3d::splat::render_backward);
