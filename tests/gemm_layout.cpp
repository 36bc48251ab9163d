// Checks on the host how the Hopper matrix product deals out tiles and lays out a slice of results; prints what is
// wrong.
#include <cstdio>
#include <set>
#include <tuple>
#include <vector>

#include "gemm_product.h"

using namespace sv3d::gemm;

static int wrong = 0;

static void expect(bool condition, const char* what, int a, int b) {
  if (!condition) std::printf("%s (%d, %d)\n", what, a, b), ++wrong;
}

/// Every tile exactly once over all blocks; with Resident, one column a block.
template <int Height, int Columns, bool Resident>
static void walks(int orbits, int length, int n, int band, int multiprocessors) {
  Product p{};
  p.orbits = orbits, p.length = length, p.n = n, p.band = band;
  const int across = (n + Columns - 1) / Columns;
  const int down = orbits * ((length + Height - 1) / Height);
  int blocks = across * down < multiprocessors ? across * down : multiprocessors;
  if (Resident) {
    const int lanes = multiprocessors / across, wanted = (down + 1) / 2;
    blocks = across * (lanes < wanted ? lanes : wanted);
  }
  std::set<std::tuple<int, int, int>> seen;
  for (int block = 0; block < blocks; ++block) {
    std::set<int> columns;
    Walk<Height, Columns, Resident> walk(p, block, blocks);
    int count = 0;
    for (Tile tile; walk.next(tile); ++count) {
      expect(tile.first < length, "past the end", tile.first, length);
      expect(tile.orbit >= 0 && tile.orbit < orbits && tile.first % Height == 0, "row", tile.orbit, tile.first);
      expect(tile.column % Columns == 0 && tile.column < n, "column", tile.column, n);
      expect(seen.insert({tile.orbit, tile.first, tile.column}).second, "twice", tile.first, tile.column);
      columns.insert(tile.column);
    }
    expect(count > 0, "block without a tile", block, blocks);
    expect(!Resident || columns.size() == 1, "columns of a block", block, static_cast<int>(columns.size()));
  }
  expect(static_cast<int>(seen.size()) == across * down, "tiles", static_cast<int>(seen.size()), across * down);
}

/// The columns of a block in the order in which a copy brings them: a lane's of a row are successive ones of the
/// weight.
template <bool Gated>
static void deal() {
  using D = Deal<Gated>;
  expect(D::SIZES[0] * D::SIZES[1] * D::SIZES[2] == D::BLOCK, "columns of a block", D::BLOCK, Gated);
  std::vector<int> order;
  for (uint32_t c = 0; c < D::SIZES[2]; ++c)
    for (uint32_t b = 0; b < D::SIZES[1]; ++b)
      for (uint32_t a = 0; a < D::SIZES[0]; ++a)
        order.push_back(a * D::STRIDES[0] + b * D::STRIDES[1] + c * D::STRIDES[2]);
  for (int lane = 0; lane < 4; ++lane)
    for (int i = 0; i < 2 * D::PAIRS; ++i)  // an accumulator's pairs of columns are eight apart, those of lanes two
      expect(order[i / 2 * 8 + 2 * lane + i % 2] == 2 * D::PAIRS * lane + i, "column of a lane", lane, i);
}

int main() {
  for (int multiprocessors : {1, 7, 78, 132})
    for (int length : {1, 63, 64, 65, 1000, 5184})
      for (int orbits : {1, 2, 3})
        for (int n : {16, 320, 336, 960})
          for (int band : {1, 3, 8}) {
            walks<128, 256, false>(orbits, length, n, band, multiprocessors);
            walks<256, 160, false>(orbits, length, n, band, multiprocessors);
            if ((n + 159) / 160 <= multiprocessors) walks<64, 160, true>(orbits, length, n, band, multiprocessors);
          }
  deal<false>();
  deal<true>();
  return wrong > 0;
}
