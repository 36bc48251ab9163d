// One matrix product as both sides see it, and how it is cut into tiles.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sv3d::gemm {

/// What a product's columns make of the result. PLAIN: its columns. GATED: values and gates in turn. UPSAMPLED: the
/// four parities of an image twice as large, each from four pixels (see kernels/upsample_conv.py), with nothing but a
/// bias.
enum class Form { PLAIN, GATED, UPSAMPLED };

/// out (orbits, length, width) = x (orbits, length, k) times weight (n, taps * k), plus what follows. Null: not there.
/// UPSAMPLED: one orbit, whose rows are the pixels of all images.
struct Product {
  const void *bias, *rows, *residual, *scale;  // (n,), (groups, width), as out, (1,)
  void* out;
  int orbits, length, n, k, width;
  int taps, shift;  // tap i reads the rows (i - taps / 2) * shift further on
  int row_period;   // successive rows that share one of `rows`
  int band;         // strips of rows that go through all columns together
  int lag;          // chunks by which the second warp group follows the first
  int tall, wide;   // an image's rows and columns, with UPSAMPLED
  bool gelu;
};

/// A tile's place: its orbit, its first row there, its first column.
struct Tile {
  int orbit, first, column;
};

/// The tiles of one block, in the order in which it works them off.
///
/// Streamed: bands of `band` strips, all columns of one band before the next, dealt out to the blocks in turn.
/// Resident: a block keeps to its columns, and the blocks that share a strip of rows come to it at about the same time.
template <int Height, int Columns, bool Resident>
class Walk {
 public:
  SV3D_HD Walk(const Product& p, int block, int blocks) : p(p) {
    strips = (p.length + Height - 1) / Height;
    across = (p.n + Columns - 1) / Columns;
    down = p.orbits * strips;
    if (Resident) {
      at = block / across, step = blocks / across, end = down;
      column = block % across * Columns;
    } else {
      at = block, step = blocks, end = down * across;
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
    tile.orbit = strip / strips, tile.first = strip % strips * Height;
    at += step;
    return true;
  }

 private:
  const Product& p;
  int strips, across, down, at, step, end, column = 0;
};

/// How the columns of a tile are dealt out on their way to shared memory, in blocks that make 32 values of the result.
/// Of eight columns there, a lane's accumulators hold two, the next lane's the next two; so that what four lanes hold
/// of a block is eight successive values each, a lane's pairs lie eight columns apart. With gates a pair is a value and
/// its gate.
template <bool Gated>
struct Deal {
  static constexpr int PAIRS = Gated ? 8 : 4, BLOCK = 8 * PAIRS;  // pairs of a lane in a block, columns of it
  static constexpr uint32_t SIZES[] = {2, 4, PAIRS};              // of a block, the fastest first: pair, lane, pairs
  static constexpr uint32_t STRIDES[] = {1, 2 * PAIRS, 2};        // in columns
};

}  // namespace sv3d::gemm
