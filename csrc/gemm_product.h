// One matrix product as both sides see it, and how it is cut into tiles.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sv3d::gemm {

/// out (orbits, length, width) = x (orbits, length, k) times weight (n, taps * k), plus what follows. Null: not there.
struct Product {
  const void *bias, *rows, *residual, *scale;  // (n,), (groups, width), as out, (1,)
  void* out;
  int orbits, length, n, k, width;
  int taps, shift;  // tap i reads the rows (i - taps / 2) * shift further on
  int row_period;   // successive rows that share one of `rows`
  int band;         // strips of rows that go through all columns together
  int lag;          // chunks by which the second warp group follows the first
  bool gelu;
};

/// A tile's place: its orbit, its first row there, its first column.
struct Tile {
  int orbit, first, column;
};

/// The tiles of one block (of one of its warp groups, with Resident), in the order in which it works them off.
///
/// Streamed: bands of `band` strips, all columns of one band before the next, dealt out to the blocks in turn.
/// Resident: a block keeps to its columns, and the blocks that share a strip of rows come to it at about the same time.
/// Blocks in a cluster have tiles below each other; the last ones may lie past the end of an orbit.
template <int Height, int Columns, bool Resident, int Cluster = 1>
class Walk {
 public:
  SV3D_HD Walk(const Product& p, int block, int blocks, int group) : p(p) {
    strips = (p.length + Height * Cluster - 1) / (Height * Cluster);
    across = (p.n + Columns - 1) / Columns;
    down = p.orbits * strips;
    if (Resident) {
      at = block / across * 2 + group, step = blocks / across * 2, end = down;
      column = block % across * Columns;
    } else {
      at = block / Cluster, step = blocks / Cluster, end = down * across;
      rank = block % Cluster;
    }
  }

  /// Whether there is another tile, which is then `tile`.
  SV3D_HD bool next(Tile& tile) {
    if (at >= end) return false;
    int strip = at;
    tile.column = column;
    if (!Resident) {
      const int size = p.band * across, start = at / size * p.band;
      const int height = down - start < p.band ? down - start : p.band;
      strip = start + at % size % height;
      tile.column = at % size / height * Columns;
    }
    tile.orbit = strip / strips, tile.first = (strip % strips * Cluster + rank) * Height;
    at += step;
    return true;
  }

 private:
  const Product& p;
  int strips, across, down, at, step, end, column = 0, rank = 0;
};

/// Columns of a tile whose results a warp handles at once, so that they make whole lines of memory.
constexpr int slice_columns(int columns, bool geglu) {
  return columns % 128 == 0 ? (geglu ? 128 : 64) : columns % 64 == 0 ? 64 : 32;
}

/// How a warp's slice of the result lies in shared memory: rows of 32 or 64 values in blocks of eight values whose
/// order changes from row to row, so that neither way of access meets itself in a bank.
template <int Values>
struct Slice {
  static constexpr int BLOCKS = Values / 8;  // of a row, 16 bytes each
  static constexpr int BYTES = 16 * 2 * Values;
  static constexpr int PER_LANE = 16 * BLOCKS / 32;

  SV3D_HD static int swizzle(int row) { return BLOCKS == 8 ? row & 7 : row >> 1 & 3; }
  SV3D_HD static int offset(int row, int block) { return row * 2 * Values + ((block ^ swizzle(row)) << 4); }
};

}  // namespace sv3d::gemm
