// From accumulators to memory. A tile's columns are dealt out (see `Deal`) so that a lane's accumulators of a row are
// eight successive values of the result: it reads the residual and writes the result 16 bytes at a time, and four lanes
// together 64 bytes of a row, without a way through shared memory.
#pragma once

#include "gemm_product.h"
#include "hopper.h"

namespace sv3d::gemm {

using namespace hopper;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// x * Phi(x) * f, from x / 4 and 2 * f, as x * f / 2 * (1 + tanh(w)): w is nearly a cubic in x, and its slope beyond
/// |x| = 4, where Phi is near 0 or 1, is left as it is there. Quarters, since a product is cut to 0..1 at no cost. The
/// polynomial is right to 2.6e-5, the hardware's tangent to 2^-11 of itself.
__device__ inline float gated(float quarter, float twice) {
  const float square = __saturatef(quarter * quarter);
  const float w = quarter * fmaf(fmaf(-0.360015846f, square, 2.36838545f), square, 3.19002988f);
  float tangent;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tangent) : "f"(w));
  const float half = quarter * twice;
  return fmaf(half, tangent, half);
}
__device__ inline float gelu(float x) { return gated(0.25f * x, 2.0f); }

__device__ inline float2 unpacked(uint32_t both) { return __half22float2(*reinterpret_cast<const __half2*>(&both)); }

__device__ inline uint32_t times(uint32_t both, float low, float high) {
  const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&both), __floats2half2_rn(low, high));
  return *reinterpret_cast<const uint32_t*>(&scaled);
}

/// Eight halves.
struct Eight {
  uint32_t pairs[4];
};

/// Those from `at` on, or zeros.
__device__ inline Eight read(const void* values, int64_t at, bool there) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (there) v = *reinterpret_cast<const uint4*>(static_cast<const __half*>(values) + at);
  return {{v.x, v.y, v.z, v.w}};
}

/// Everything that follows 64 rows of a tile, `d` (64 x Columns) as `product` leaves it in a warp group. Rows: of the
/// tile that the group holds.
template <int Columns, int Rows, Form F>
class Epilogue {
 public:
  static constexpr bool GATED = F == Form::GATED;
  using D = Deal<GATED>;
  static constexpr int BLOCKS = Columns / D::BLOCK;  // of 32 values of the result
  // blocks of the residual that registers can hold, and whether they hold all that is added
  static constexpr int AHEAD = Rows * Columns > 128 * 128 ? 2 : Columns == 256 ? 4 : BLOCKS;
  static constexpr bool EARLY = GATED || (Columns <= 160 && Rows == 64);
  static_assert(Columns % D::BLOCK == 0);

  /// `first`: of the group's 64 rows. `scale`: what p.scale holds, or 1.
  __device__ Epilogue(const Product& p, int warp, const Tile& tile, int first, float scale) : p(p), scale(scale) {
    const int lane = threadIdx.x % 32, own = lane % 4 * 8, inside = first + 16 * warp + lane / 4;
    const int parity = F == Form::UPSAMPLED ? tile.column / p.width : 0, start = tile.column - parity * p.width;
    blocks = (p.n - tile.column) / D::BLOCK;
    column = start + own * (GATED ? 2 : 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      there[h] = inside + 8 * h < p.length;
      int row = tile.orbit * p.length + inside + 8 * h;
      if (F == Form::UPSAMPLED)  // rows of the larger images, of all of them on end
        row = (row / p.wide * 2 + parity / 2) * 2 * p.wide + row % p.wide * 2 + parity % 2;
      at[h] = int64_t{row} * p.width + (GATED ? start / 2 : start) + own;
      if (!GATED && p.rows) set_at[h] = int64_t{row / p.row_period} * p.width + column;
    }
  }

  /// Reads what is added later, as far as registers hold it, while the last products are still at work.
  __device__ void prepare() {
    if (!GATED && p.residual) {
#pragma unroll
      for (int b = 0; b < AHEAD; ++b) fetch(b);
    }
    if constexpr (EARLY) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        if (p.bias) {
          biases[b][0] = read(p.bias, column + b * D::BLOCK, b < blocks);
          if (GATED) {
            biases[b][1] = read(p.bias, column + b * D::BLOCK + 8, b < blocks);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              uint32_t& both = biases[b][i / 4].pairs[i % 4];
              both = times(both, 2.0f, 0.25f);  // in range up to 32,751
            }
          }
        }
        if (!GATED && p.rows) {
#pragma unroll
          for (int h = 0; h < 2; ++h) sets[b][h] = set(b, h);
        }
      }
    }
  }

  __device__ void run(float (&d)[Columns / 2]) {
    if constexpr (GATED) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) store(b, h, products(d + b * D::BLOCK / 2 + 2 * h, biases[b]));
      return;
    }
    if (p.bias) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        // the index stays inside where nothing was read early
        const Eight bias = EARLY ? biases[EARLY * b][0] : read(p.bias, column + 32 * b, b < blocks);
        add(d, b, 0, bias), add(d, b, 1, bias);
      }
    }
    if (p.gelu)
#pragma unroll
      for (float& x : d) x = gelu(x);
    if (p.scale)
#pragma unroll
      for (float& x : d) x *= scale;
    if (p.rows) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) add(d, b, h, EARLY ? sets[EARLY * b][h] : set(b, h));
    }
    if (p.residual) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) add(d, b, h, residual[b % AHEAD][h]);
        if (b + AHEAD < BLOCKS) fetch(b + AHEAD);
      }
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        Eight result;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = d + 16 * b + 4 * i + 2 * h;
          result.pairs[i] = packed(pair[0], pair[1]);
        }
        store(b, h, result);
      }
  }

 private:
  __device__ void fetch(int b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) residual[b % AHEAD][h] = read(p.residual, at[h] + 32 * b, there[h] && b < blocks);
  }

  /// What p.rows holds for a block of one of this lane's two rows.
  __device__ Eight set(int b, int h) const { return read(p.rows, set_at[h] + 32 * b, there[h] && b < blocks); }

  __device__ void store(int b, int h, const Eight& v) const {
    if (there[h] && b < blocks)
      *reinterpret_cast<uint4*>(static_cast<__half*>(p.out) + at[h] + 32 * b) =
          make_uint4(v.pairs[0], v.pairs[1], v.pairs[2], v.pairs[3]);
  }

  /// To this lane's accumulators of a block and a row.
  __device__ static void add(float (&d)[Columns / 2], int b, int h, const Eight& more) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = unpacked(more.pairs[i]);
      float* pair = d + 16 * b + 4 * i + 2 * h;
      pair[0] += both.x, pair[1] += both.y;
    }
  }

  /// A lane's eight pairs of a value and its gate.
  __device__ Eight products(const float* from, const Eight (&bias)[2]) const {
    Eight result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int g = 2 * i + e;
        const float2 b = unpacked(bias[g / 4].pairs[g % 4]);
        v[e] = gated(fmaf(from[4 * g + 1], 0.25f, b.y), fmaf(from[4 * g], 2.0f * scale, b.x * scale));
      }
      result.pairs[i] = packed(v[0], v[1]);
    }
    return result;
  }

  const Product& p;
  float scale;
  int column, blocks;        // of this lane's first values in the weight; whole ones from the tile's first column on
  int64_t at[2], set_at[2];  // of its first values in the result and in p.rows
  bool there[2];
  Eight residual[GATED ? 1 : AHEAD][2];
  Eight biases[EARLY ? BLOCKS : 1][GATED ? 2 : 1] = {};
  Eight sets[EARLY && !GATED ? BLOCKS : 1][2];
};

#endif

}  // namespace sv3d::gemm
