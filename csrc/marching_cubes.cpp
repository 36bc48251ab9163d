// Marching cubes over a dense float field.
//
// Vertices are numbered by the grid edge that they lie on, 3 * voxel + axis. Work is split into planes of constant x:
// one pass counts what each plane emits, a second writes it at known offsets. A thread keeps the vertex indices of two
// planes only; beside them, one byte a voxel is all that is allocated.
#include "marching_cubes.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace sv3d::marching_cubes {
namespace {

constexpr int64_t PARALLEL_ABOVE = 1 << 15;  // voxels

struct Grid {
  const float* field;
  float level;
  int64_t X, Y, Z;

  Grid(const TensorView& t, double level_)
      : field(data<float>(t, "field", {ANY, ANY, ANY})),
        level(static_cast<float>(level_)),
        X(t.size(0)),
        Y(t.size(1)),
        Z(t.size(2)) {}
  int64_t plane() const { return Y * Z; }
};

__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void classify(const float* values,
                                                                                            int64_t n, float level,
                                                                                            uint8_t* inside) {
  for (int64_t i = 0; i < n; ++i) inside[i] = values[i] < level;
}

// Cases of one row of cells from the rows of inside flags at (x, y), (x+1, y), (x, y+1), (x+1, y+1).
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void row_cases(
    const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, int64_t cells, uint8_t* cases) {
  for (int64_t z = 0; z < cells; ++z)
    cases[z] = static_cast<uint8_t>(a[z] | b[z] << 1 | c[z] << 2 | d[z] << 3 | a[z + 1] << 4 | b[z + 1] << 5 |
                                    c[z + 1] << 6 | d[z + 1] << 7);
}

__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) int64_t differing(const uint8_t* a,
                                                                                                const uint8_t* b,
                                                                                                int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] ^ b[i];
  return sum;
}

// Calls visit(z) for every z whose byte is neither 0 nor 255: most of a field is far from the surface.
template <typename Visit>
void for_active(const uint8_t* bytes, int64_t n, Visit visit) {
  int64_t z = 0;
  for (; z + 8 <= n; z += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + z, 8);
    if (word == 0 || word == ~uint64_t{0}) continue;
    for (int64_t k = z; k < z + 8; ++k)
      if (bytes[k] != 0 && bytes[k] != 255) visit(k);
  }
  for (; z < n; ++z)
    if (bytes[z] != 0 && bytes[z] != 255) visit(z);
}

std::vector<uint8_t> inside_flags(const Grid& g) {
  std::vector<uint8_t> inside(g.X * g.plane());
#pragma omp parallel for if (g.X * g.plane() > PARALLEL_ABOVE)
  for (int64_t x = 0; x < g.X; ++x) classify(g.field + x * g.plane(), g.plane(), g.level, &inside[x * g.plane()]);
  return inside;
}

// Per plane of constant x: where its vertices and its cells' triangles start in the output; totals come last.
std::vector<std::array<int64_t, 2>> offsets(const Grid& g, const Table& table, const uint8_t* inside) {
  std::vector<std::array<int64_t, 2>> first(g.X + 1);
#pragma omp parallel if (g.X * g.plane() > PARALLEL_ABOVE)
  {
    std::vector<uint8_t> cases(g.Z);
#pragma omp for schedule(static)
    for (int64_t x = 0; x < g.X; ++x) {
      const uint8_t *a = inside + x * g.plane(), *b = a + g.plane();
      const bool more = x + 1 < g.X;
      int64_t vertices = more ? differing(a, b, g.plane()) : 0, triangles = 0;
      vertices += differing(a, a + g.Z, g.plane() - g.Z);
      for (int64_t y = 0; y < g.Y; ++y) vertices += differing(a + y * g.Z, a + y * g.Z + 1, g.Z - 1);
      for (int64_t r = 0; more && r + g.Z < g.plane(); r += g.Z) {
        row_cases(a + r, b + r, a + r + g.Z, b + r + g.Z, g.Z - 1, cases.data());
        for_active(cases.data(), g.Z - 1, [&](int64_t z) { triangles += table.triangles[cases[z]]; });
      }
      first[x + 1] = {vertices, triangles};
    }
  }
  for (int64_t x = 0; x < g.X; ++x)
    for (int k = 0; k < 2; ++k) first[x + 1][k] += first[x][k];
  return first;
}

// Bit `axis` is set where the edge from a voxel of the row to its neighbour along the axis is crossed.
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void row_crossings(
    const uint8_t* row, const uint8_t* along_x, const uint8_t* along_y, int64_t n, uint8_t* crossed) {
  for (int64_t z = 0; z < n; ++z) crossed[z] = static_cast<uint8_t>((row[z] ^ along_x[z]) | (row[z] ^ along_y[z]) << 1);
  for (int64_t z = 0; z + 1 < n; ++z) crossed[z] |= static_cast<uint8_t>((row[z] ^ row[z + 1]) << 2);
}

// Numbers the vertices on the edges that start in plane x, from `number` on; writes them unless `vertices` is null.
void number_plane(const Grid& g, const uint8_t* inside, int64_t x, int64_t number, float nudge, uint8_t* crossed,
                  int32_t* index, float* vertices) {
  const int64_t stride[3] = {g.plane(), g.Z, 1};
  for (int64_t y = 0; y < g.Y; ++y) {
    const int64_t start = x * g.plane() + y * g.Z;
    const uint8_t* row = inside + start;
    row_crossings(row, x + 1 < g.X ? row + g.plane() : row, y + 1 < g.Y ? row + g.Z : row, g.Z, crossed);
    for_active(crossed, g.Z, [&](int64_t z) {
      for (int axis = 0; axis < 3; ++axis) {
        if (!(crossed[z] >> axis & 1)) continue;
        index[3 * (y * g.Z + z) + axis] = static_cast<int32_t>(number);
        if (vertices) {
          const float a = g.field[start + z], b = g.field[start + z + stride[axis]];
          float* v = vertices + 3 * number;
          v[0] = static_cast<float>(x), v[1] = static_cast<float>(y), v[2] = static_cast<float>(z);
          v[axis] += std::min(std::max((g.level - a) / (b - a), nudge), 1 - nudge);
        }
        ++number;
      }
    });
  }
}

// Writes the triangles of the cells between planes x and x + 1, whose vertex indices are `here` and `next`.
void write_cells(const Grid& g, const Table& table, const uint8_t* inside, int64_t x, const int32_t* here,
                 const int32_t* next, uint8_t* cases, int32_t* out) {
  const uint8_t *a = inside + x * g.plane(), *b = a + g.plane();
  const int32_t* index[2] = {here, next};
  for (int64_t y = 0; y + 1 < g.Y; ++y) {
    const int64_t r = y * g.Z;
    row_cases(a + r, b + r, a + r + g.Z, b + r + g.Z, g.Z - 1, cases);
    for_active(cases, g.Z - 1, [&](int64_t z) {
      const uint8_t* edges = table.rows + cases[z] * table.width;
      for (int k = 0; k < 3 * table.triangles[cases[z]]; ++k) {
        const int corner = LOWER_CORNER[edges[k]];
        const int64_t voxel = (y + (corner >> 1 & 1)) * g.Z + z + (corner >> 2);
        *out++ = index[corner & 1][3 * voxel + edges[k] / 4];
      }
    });
  }
}

void count(TensorView field, double level, TensorView table, TensorView totals) {
  const Grid grid(field, level);
  const Table cases(table);
  int64_t* out = data<int64_t>(totals, "totals", {2});
  out[0] = out[1] = 0;
  if (!grid.X || !grid.plane()) return;
  const auto last = offsets(grid, cases, inside_flags(grid).data()).back();
  out[0] = last[0], out[1] = last[1];
}

void fill(TensorView field, double level, TensorView table, double nudge_, TensorView vertices, TensorView faces) {
  const Grid g(field, level);
  const Table cases(table);
  const float nudge = static_cast<float>(nudge_);
  float* v = data<float>(vertices, "vertices", {ANY, 3});
  int32_t* f = data<int32_t>(faces, "faces", {ANY, 3});
  if (!g.X || !g.plane()) return;
  const auto inside = inside_flags(g);
  const auto first = offsets(g, cases, inside.data());
  if (first[g.X][0] > std::numeric_limits<int32_t>::max()) fail("field: the surface has over 2^31 vertices");
  if (first[g.X][0] != vertices.size(0)) fail("vertices: expected as many rows as were counted");
  if (first[g.X][1] != faces.size(0)) fail("faces: expected as many rows as were counted");

  const int64_t slabs = g.X * g.plane() > PARALLEL_ABOVE ? std::min<int64_t>(omp_get_max_threads(), g.X) : 1;
#pragma omp parallel for schedule(static, 1) num_threads(slabs)
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t begin = slab * g.X / slabs, end = (slab + 1) * g.X / slabs;
    std::vector<uint8_t> row(g.Z);
    std::vector<int32_t> here(3 * g.plane()), next(3 * g.plane());
    number_plane(g, inside.data(), begin, first[begin][0], nudge, row.data(), here.data(), v);
    for (int64_t x = begin; x < end && x + 1 < g.X; ++x) {
      const bool own = x + 1 < end;
      number_plane(g, inside.data(), x + 1, first[x + 1][0], nudge, row.data(), next.data(), own ? v : nullptr);
      write_cells(g, cases, inside.data(), x, here.data(), next.data(), row.data(), f + 3 * first[x][1]);
      std::swap(here, next);
    }
  }
}

}  // namespace
}  // namespace sv3d::marching_cubes

TVM_FFI_DLL_EXPORT_TYPED_FUNC(marching_cubes_count, sv3d::marching_cubes::count);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(marching_cubes_fill, sv3d::marching_cubes::fill);
