// Marching cubes: what its CPU and its CUDA path share. The case table comes from Python (kernels/marching_cubes.py),
// which defines it; every entry is checked here before it is used as an index.
#pragma once

#include <array>

#include "checks.h"

namespace sv3d::marching_cubes {

constexpr int NO_EDGE = 255;
constexpr int LOWER_CORNER[12] = {0, 2, 4, 6, 0, 1, 4, 5, 0, 1, 2, 3};  // where edge 4 * axis + k starts

struct Table {
  const uint8_t* rows;  // (256, width): the cell edges of each triangle's corners, NO_EDGE after the last
  int64_t width;
  std::array<int, 256> triangles;

  Table(const TensorView& table) : rows(data<uint8_t>(table, "table", {256, ANY})), width(table.size(1)) {
    for (int c = 0; c < 256; ++c) {
      int64_t n = 0;
      for (; n < width && rows[c * width + n] != NO_EDGE; ++n) {
        const int edge = rows[c * width + n];
        if (edge >= 12) fail("table: expected cell edges below 12");
        const int a = LOWER_CORNER[edge], b = a | 1 << edge / 4;
        if (((c >> a) & 1) == ((c >> b) & 1)) fail("table: a case uses an edge that the surface does not cross");
      }
      if (n % 3) fail("table: expected whole triangles");
      triangles[c] = static_cast<int>(n / 3);
    }
  }
};

}  // namespace sv3d::marching_cubes
