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

/// Every tile exactly once over all blocks and groups; with Resident, one column a block.
template <int Height, int Columns, bool Resident, int Cluster = 1>
static void walks(int orbits, int length, int n, int band, int multiprocessors) {
  Product p{};
  p.orbits = orbits, p.length = length, p.n = n, p.band = band;
  const int across = (n + Columns - 1) / Columns, real = orbits * ((length + Height - 1) / Height);
  const int down = orbits * ((length + Height * Cluster - 1) / (Height * Cluster)), most = multiprocessors / Cluster;
  int blocks = Cluster * (across * down < most ? across * down : most);
  if (Resident) {
    const int lanes = multiprocessors / across, wanted = (down + 1) / 2;
    blocks = across * (lanes < wanted ? lanes : wanted);
  }
  std::set<std::tuple<int, int, int>> seen;
  for (int block = 0; block < blocks; ++block) {
    std::set<int> columns;
    for (int group = 0; group < (Resident ? 2 : 1); ++group) {
      Walk<Height, Columns, Resident, Cluster> walk(p, block, blocks, group);
      int count = 0;
      for (Tile tile; walk.next(tile); ++count) {
        expect(Cluster > 1 || tile.first < length, "past the end", tile.first, length);
        if (tile.first >= length) continue;
        expect(tile.orbit >= 0 && tile.orbit < orbits && tile.first % Height == 0, "row", tile.orbit, tile.first);
        expect(tile.column % Columns == 0 && tile.column < n, "column", tile.column, n);
        expect(seen.insert({tile.orbit, tile.first, tile.column}).second, "twice", tile.first, tile.column);
        columns.insert(tile.column);
      }
      expect(count > 0 || group == 1, "block without a tile", block, group);
    }
    expect(!Resident || columns.size() == 1, "columns of a block", block, static_cast<int>(columns.size()));
  }
  expect(static_cast<int>(seen.size()) == across * real, "tiles", static_cast<int>(seen.size()), across * real);
}

/// Banks (4 bytes each) that 32 lanes touch: none may meet itself at another address among lanes served together.
static bool conflict(const std::vector<int>& offsets, int size, int together) {
  for (size_t from = 0; from < offsets.size(); from += together) {
    std::vector<int> owner(32, -1);
    for (int i = 0; i < together; ++i)
      for (int byte = 0; byte < size; byte += 4) {
        const int word = (offsets[from + i] + byte) / 4;
        if (owner[word % 32] >= 0 && owner[word % 32] != word) return true;
        owner[word % 32] = word;
      }
  }
  return false;
}

template <int Values>
static void slice() {
  using S = Slice<Values>;
  std::set<int> places;
  for (int row = 0; row < 16; ++row)
    for (int block = 0; block < S::BLOCKS; ++block) {
      const int at = S::offset(row, block);
      expect(at % 16 == 0 && at >= 0 && at < S::BYTES && places.insert(at).second, "block", row, block);
    }
  expect(S::PER_LANE * 32 == 16 * S::BLOCKS, "blocks of a lane", S::PER_LANE, S::BLOCKS);
  for (int i = 0; i < S::PER_LANE; ++i) {  // whole blocks, eight lanes at a time
    std::vector<int> offsets;
    for (int lane = 0; lane < 32; ++lane)
      offsets.push_back(S::offset((lane + 32 * i) / S::BLOCKS, (lane + 32 * i) % S::BLOCKS));
    expect(!conflict(offsets, 16, 8), "banks of blocks", Values, i);
  }
  for (int block = 0; block < S::BLOCKS; ++block)
    for (int h = 0; h < 2; ++h) {  // as accumulators lie: a pair of columns, or one value behind a gate
      std::vector<int> pairs, gated;
      for (int lane = 0; lane < 32; ++lane) {
        pairs.push_back(S::offset(lane / 4 + 8 * h, block) + 4 * (lane % 4));
        gated.push_back(S::offset(lane / 4 + 8 * h, block) + 2 * (lane % 4));
      }
      expect(!conflict(pairs, 4, 32), "banks of pairs", Values, block);
      expect(!conflict(gated, 2, 32), "banks of gated values", Values, block);
    }
}

int main() {
  for (int multiprocessors : {1, 7, 78, 132})
    for (int length : {1, 63, 64, 65, 1000, 5184})
      for (int orbits : {1, 2, 3})
        for (int n : {16, 320, 336, 960})
          for (int band : {1, 3, 8}) {
            walks<128, 256, false>(orbits, length, n, band, multiprocessors);
            walks<256, 160, false>(orbits, length, n, band, multiprocessors);
            if (multiprocessors > 1) walks<128, 256, false, 2>(orbits, length, n, band, multiprocessors);
            if ((n + 159) / 160 <= multiprocessors) walks<64, 160, true>(orbits, length, n, band, multiprocessors);
          }
  slice<32>();
  slice<64>();
  return wrong > 0;
}
