// Splat rasteriser, middle part: sorts each view's splats by depth, deals them to tiles and composites the tiles.
#include <cstring>
#include <vector>

#include "splat_raster.h"

namespace sv3d::splat {
namespace {

/// Stable radix sort of `n` (key, value) pairs; positive floats sort like their bits. The result is in `a`.
void sort_by_key(uint64_t* a, uint64_t* b, int64_t n) {
  constexpr int BITS = 11, BUCKETS = 1 << BITS;
  for (int shift = 32; shift < 64; shift += BITS) {
    int64_t starts[BUCKETS + 1] = {0};
    for (int64_t i = 0; i < n; ++i) ++starts[((a[i] >> shift) & (BUCKETS - 1)) + 1];
    for (int j = 0; j < BUCKETS; ++j) starts[j + 1] += starts[j];
    for (int64_t i = 0; i < n; ++i) b[starts[(a[i] >> shift) & (BUCKETS - 1)]++] = a[i];
    std::swap(a, b);
  }
  std::copy(a, a + n, b);  // three passes: the result is in what came as b
}

/// Deals one view's splats, nearest first, to its tiles. `offsets` (tiles + 1) receives where each tile starts.
/// Returns false where the tiles that a splat reaches disagree with `base`.
bool deal(const Projected* p, const float* keys, const int32_t* base, int64_t n, const Grid& grid, int32_t* ids,
          int32_t* slots, int32_t* offsets, uint64_t* order, uint64_t* spare) {
  int64_t visible = 0;
  bool agree = true;
  std::fill(offsets, offsets + grid.tiles() + 1, base[0]);
  for (int64_t g = 0; g < n; ++g) {
    if (base[g] == base[g + 1]) continue;
    uint32_t bits;
    std::memcpy(&bits, keys + 2 * g, sizeof(bits));
    order[visible++] = static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(g);
    int32_t tiles = 0;
    for_each_tile(p[g], keys[2 * g + 1], grid, [&](int64_t tile) { ++offsets[tile + 1], ++tiles; });
    agree = agree && tiles == base[g + 1] - base[g];
  }
  if (!agree) return false;
  sort_by_key(order, spare, visible);
  for (int64_t tile = 0; tile < grid.tiles(); ++tile) offsets[tile + 1] += offsets[tile] - base[0];
  // Each tile's start runs on to its end while it fills, so it moves back by one tile afterwards.
  for (int64_t i = 0; i < visible; ++i) {
    const auto g = static_cast<int64_t>(order[i] & 0xffffffffu);
    int32_t slot = base[g];
    for_each_tile(p[g], keys[2 * g + 1], grid, [&](int64_t tile) {
      ids[offsets[tile]] = static_cast<int32_t>(g);
      slots[offsets[tile]++] = slot++;
    });
  }
  for (int64_t tile = grid.tiles(); tile > 0; --tile) offsets[tile] = offsets[tile - 1];
  offsets[0] = base[0];
  return true;
}

}  // namespace

/// From what splat_raster_project wrote to images (C,H,W,D) and alphas (C,H,W). Also fills what the backward
/// pass needs: ids (pairs) splat of each pair in tile and depth order, slots (pairs) its row among the splat's
/// pairs, offsets (C, tiles + 1) of the tiles, transmittance and last (C,H,W), the last pair's place in its tile.
void render_forward(TensorView projected, TensorView keys, TensorView base, TensorView colors, TensorView backgrounds,
                    int64_t width, int64_t height, TensorView ids, TensorView slots, TensorView offsets,
                    TensorView images, TensorView alphas, TensorView transmittance, TensorView last) {
  const auto* p = reinterpret_cast<Projected*>(data<float>(projected, "projected", {ANY, ANY, PROJECTED}));
  const int64_t views = projected.size(0), n = projected.size(1);
  check_image(views, width, height);
  const Grid grid(views, width, height);
  const float* key = data<float>(keys, "keys", {views, n, 2});
  const int32_t* starts = data<int32_t>(base, "base", {views * n + 1});
  const float* c = data<float>(colors, "colors", {n, ANY});
  const int64_t channels = colors.size(1);
  if (channels < 1 || channels > MAX_CHANNELS) fail("colors: expected 1 to 16 channels");
  const bool background = backgrounds.ndim() > 0 && backgrounds.size(0) > 0;
  const float* bg = data<float>(backgrounds, "backgrounds", {background ? views : 0, channels});
  int32_t* id = data<int32_t>(ids, "ids", {ANY});
  const int64_t pairs = ids.size(0);
  int32_t* slot = data<int32_t>(slots, "slots", {pairs});
  int32_t* offset = data<int32_t>(offsets, "offsets", {views, grid.tiles() + 1});
  float* image = data<float>(images, "images", {views, height, width, channels});
  float* alpha = data<float>(alphas, "alphas", {views, height, width});
  float* through = data<float>(transmittance, "transmittance", {views, height, width});
  int32_t* final = data<int32_t>(last, "last", {views, height, width});
  check_offsets(starts, views * n, pairs, "base");

  std::vector<uint64_t> scratch(2 * views * n);
  bool agree = true;
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : agree) if (views > 1 && n * views > PARALLEL)
  for (int64_t view = 0; view < views; ++view)
    agree =
        deal(p + view * n, key + 2 * view * n, starts + view * n, n, grid, id, slot, offset + view * (grid.tiles() + 1),
             scratch.data() + 2 * view * n, scratch.data() + (2 * view + 1) * n) &&
        agree;
  if (!agree) fail("base: does not agree with projected and keys");

  const TileFunctions::Forward run = tile_functions().forward[TileFunctions::size(channels)];
#pragma omp parallel for schedule(dynamic, 1) if (pairs > PARALLEL)
  for (int64_t i = 0; i < views * grid.tiles(); ++i) {
    const int64_t view = i / grid.tiles(), tile = i % grid.tiles();
    const int32_t* range = offset + view * (grid.tiles() + 1) + tile;
    const int64_t x0 = tile % grid.columns * TILE, y0 = tile / grid.columns * TILE;
    const int64_t pixel = (view * height + y0) * width + x0;
    run({p + view * n, c, background ? bg + view * channels : nullptr, static_cast<int>(channels), id + range[0],
         range[1] - range[0], x0, y0, std::min<int64_t>(TILE, width - x0), std::min<int64_t>(TILE, height - y0), width,
         image + pixel * channels, alpha + pixel, through + pixel, final + pixel});
  }
}

}  // namespace sv3d::splat

TVM_FFI_DLL_EXPORT_TYPED_FUNC(splat_raster_forward, sv3d::splat::render_forward);
