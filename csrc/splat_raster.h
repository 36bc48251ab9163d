// What the parts of the splat rasteriser share: its constants, the projected splat and the grid of tiles.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "checks.h"

namespace sv3d::splat {

// gsplat 1.5.3's constants.
constexpr float ALPHA_MIN = 1.0f / 255.0f;
constexpr float ALPHA_MAX = 0.999f;
constexpr float TRANSMITTANCE_MIN = 1e-4f;
constexpr float FRUSTUM_MARGIN = 0.15f;

constexpr float LOG2E = 1.44269504f;

constexpr int TILE = 16;  // pixels: as gsplat's
constexpr int MAX_CHANNELS = 16;
constexpr int MOMENTS = 6;         // of the gradient to an exponent: 1, dx, dy, dx dx, dx dy, dy dy
constexpr int64_t PARALLEL = 512;  // splats below which threads cost more than they save

/// A splat in one view; first_row > last_row if it reaches no pixel.
struct Projected {
  float x, y;        // centre, pixels
  float xx, xy, yy;  // inverse of the dilated covariance
  float opacity;
  float first_row, last_row, first_column, last_column;  // of the image, whose pixel centres alpha >= 1/255 can reach
};
constexpr int PROJECTED = sizeof(Projected) / sizeof(float);

struct Grid {
  int64_t views, width, height, columns, rows;

  Grid(int64_t views, int64_t width, int64_t height)
      : views(views),
        width(width),
        height(height),
        columns((width + TILE - 1) / TILE),
        rows((height + TILE - 1) / TILE) {}

  int64_t tiles() const { return columns * rows; }
};

/// Column of tiles in which an image column lies; safe for any float.
inline int64_t tile_column(float column, const Grid& grid) {
  return static_cast<int64_t>(std::min(std::max(column, 0.0f), static_cast<float>(grid.width - 1))) / TILE;
}

/// Tiles [begin, end) of one row of tiles.
struct Span {
  int64_t begin, end;
};

/// Row of tiles in which an image row lies; safe for any float.
inline int64_t tile_row(float row, const Grid& grid) {
  return static_cast<int64_t>(std::min(std::max(row, 0.0f), static_cast<float>(grid.height - 1))) / TILE;
}

/// Tiles of row `row` that hold a pixel centre inside the ellipse d^T conic d <= reach around `p`.
/// Never inlined: both passes over the tiles must round alike.
__attribute__((noinline)) Span tile_span(const Projected& p, float reach, int64_t row, const Grid& grid);

/// Calls f(tile) for each tile that `p` reaches, row by row.
template <typename F>
inline void for_each_tile(const Projected& p, float reach, const Grid& grid, F&& f) {
  if (!(p.first_row <= p.last_row)) return;
  const int64_t last = tile_row(p.last_row, grid);
  for (int64_t row = tile_row(p.first_row, grid); row <= last; ++row) {
    const Span span = tile_span(p, reach, row, grid);
    for (int64_t column = span.begin; column < span.end; ++column) f(row * grid.columns + column);
  }
}

/// One tile's splats and where its pixels go.
struct ForwardTile {
  const Projected* projected;
  const float* colors;
  const float* background;  // or null
  int channels;
  const int32_t* ids;
  int count;
  int64_t x0, y0, width, height, image_width;  // width and height: of the part inside the image
  float *image, *alphas, *transmittance;       // at the tile's first pixel
  int32_t* last;
};

/// One tile's splats, what its forward pass left behind, and the rows of `moments` that it owns through `slots`.
struct BackwardTile {
  const Projected* projected;
  const float* colors;
  const float* background;  // or null
  int channels;
  const int32_t *ids, *slots;
  int count;
  int64_t x0, y0, width, height, image_width;
  const float *v_image, *v_alphas, *transmittance;  // at the tile's first pixel
  const int32_t* last;
  float* moments;
};

/// The loops over one tile, compiled for some numbers of channels; the tile's own is at most that.
struct TileFunctions {
  using Forward = void (*)(const ForwardTile&);
  using Backward = void (*)(const BackwardTile&);
  Forward forward[5];
  Backward backward[5];

  /// Index of the smallest compiled number of channels that holds `channels`.
  static int size(int64_t channels) {
    return channels == 1 ? 0 : channels <= 3 ? 1 : channels == 4 ? 2 : channels <= 8 ? 3 : 4;
  }
};

/// Those for this processor.
const TileFunctions& tile_functions();

inline void check_image(int64_t views, int64_t width, int64_t height) {
  if (views < 1 || width < 1 || height < 1 || width > (1 << 20) || height > (1 << 20) || views > (1 << 20))
    fail("views, width and height: expected 1 to 2^20");
}

/// Checks that `offsets` (count + 1) rise from 0 to `total`.
inline void check_offsets(const int32_t* offsets, int64_t count, int64_t total, const char* name) {
  bool good = offsets[0] == 0 && offsets[count] == total;
  for (int64_t i = 0; i < count; ++i) good = good && offsets[i] <= offsets[i + 1];
  if (!good) fail(std::string(name) + ": expected offsets that rise from 0 to the number of pairs");
}

/// Checks that every one of `values` lies in [low, high).
inline void check_range(const int32_t* values, int64_t count, int64_t low, int64_t high, const char* name) {
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) least = std::min(least, values[i]), most = std::max(most, values[i]);
  if (count && (least < low || most >= high))
    fail(std::string(name) + ": expected values in [" + std::to_string(low) + ", " + std::to_string(high) + ")");
}

}  // namespace sv3d::splat
