// From accumulators to memory. A warp owns 16 rows of its group's tile and handles them by itself, a slice of columns
// at a time: through a small piece of shared memory, so that memory sees whole lines, and the residual likewise.
#pragma once

#include "gemm_hopper.h"
#include "gemm_product.h"

namespace sv3d::gemm {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// x * Phi(x), Phi to 1.5e-7 (Abramowitz and Stegun, 7.1.26): max(x, 0) less what |x| leaves in the tail.
__device__ inline float gelu(float x) {
  const float t = __fdividef(1.0f, fmaf(0.23164190f, fabsf(x), 1.0f));
  float tail = fmaf(0.5307027145f, t, -0.7265760135f);
  tail = fmaf(tail, t, 0.7107068705f);
  tail = fmaf(tail, t, -0.142248368f);
  tail = fmaf(tail, t, 0.127414796f);
  tail *= t * exp2f(x * (x * -0.7213475204f));
  return fmaf(-fabsf(x), tail, fmaxf(x, 0.0f));
}

__device__ inline float2 pair(const void* values, int64_t at) {
  return __half22float2(*reinterpret_cast<const __half2*>(static_cast<const __half*>(values) + at));
}

/// The residual's part of a warp's slice on its way to shared memory: PER_LANE blocks of eight values a lane.
template <int Values>
struct Residual {
  uint4 blocks[Slice<Values>::PER_LANE];
};

/// Everything that follows 64 rows of a tile, `d` (64 x Columns) as `product` leaves it in a warp group.
template <int Columns, bool Geglu>
class Epilogue {
 public:
  // accumulated columns of a slice, and values of the result
  static constexpr int WIDE = slice_columns(Columns, Geglu);
  static constexpr int VALUES = Geglu ? WIDE / 2 : WIDE;
  static constexpr int SLICES = Columns / WIDE;
  using Part = Slice<VALUES>;
  static_assert(Columns % WIDE == 0);

  /// staging: Part::BYTES of shared memory, this warp's own. `first`: of the group's 64 rows.
  __device__ Epilogue(const Product& p, char* staging, int warp, const Tile& tile, int first)
      : p(p), staging(staging), lane(threadIdx.x % 32), column(tile.column) {
    inside = first + 16 * warp;
    row = int64_t{tile.orbit} * p.length + inside;
    left = p.length - inside;
    out_column = Geglu ? column / 2 : column;
  }

  /// Reads the first slice's residual, which then travels while the last products are still at work.
  __device__ void prepare() {
    if (p.residual) fetch(0);
  }

  __device__ void run(float (&d)[Columns / 2], float scale) {
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
      float* part = d + s * WIDE / 2;
      if (p.residual) {
#pragma unroll
        for (int i = 0; i < Part::PER_LANE; ++i) *reinterpret_cast<uint4*>(staging + own(i)) = residual.blocks[i];
        __syncwarp();
        if (s + 1 < SLICES) fetch(s + 1);
      }
      if (p.bias) add(part, -1, p.bias, 0, column + s * WIDE, p.n);
      if (Geglu) {
        store_gated(part);
      } else {
        if (p.gelu)
#pragma unroll
          for (int i = 0; i < WIDE / 2; ++i) part[i] = gelu(part[i]);
        if (p.scale)
#pragma unroll
          for (int i = 0; i < WIDE / 2; ++i) part[i] *= scale;
        if (p.rows)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int r = min(lane / 4 + 8 * h, left - 1);  // past the end too, where nothing is stored
            add(part, h, p.rows, (row + r) / p.row_period * p.width, out_column + s * VALUES, p.width);
          }
        if (p.residual) add_residual(part);
        store(part);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Part::PER_LANE; ++i)
        if (const int64_t at = place(s, i); at >= 0)
          *reinterpret_cast<uint4*>(static_cast<__half*>(p.out) + at) = *reinterpret_cast<uint4*>(staging + own(i));
      __syncwarp();
    }
  }

 private:
  /// Block i of this lane: within the staging memory, and where it belongs in the result (-1: nowhere).
  __device__ int own(int i) const {
    const int index = lane + 32 * i;
    return Part::offset(index / Part::BLOCKS, index % Part::BLOCKS);
  }
  __device__ int64_t place(int slice, int i) const {
    const int index = lane + 32 * i, r = index / Part::BLOCKS;
    const int c = out_column + slice * VALUES + index % Part::BLOCKS * 8;
    return r < left && c < p.width ? (row + r) * p.width + c : -1;
  }

  __device__ void fetch(int slice) {
#pragma unroll
    for (int i = 0; i < Part::PER_LANE; ++i) {
      const int64_t at = place(slice, i);
      residual.blocks[i] = make_uint4(0, 0, 0, 0);
      if (at >= 0) residual.blocks[i] = *reinterpret_cast<const uint4*>(static_cast<const __half*>(p.residual) + at);
    }
  }

  /// Adds to rows h and h + 8 of this lane, or both with h = -1, what `values` holds from `start` on for the slice.
  __device__ void add(float* part, int h, const void* values, int64_t start, int from, int limit) const {
    float2 v[WIDE / 8];
#pragma unroll
    for (int g = 0; g < WIDE / 8; ++g) {
      const int c = from + 8 * g + 2 * (lane % 4);
      v[g] = c < limit ? pair(values, start + c) : make_float2(0, 0);
    }
#pragma unroll
    for (int g = 0; g < WIDE / 8; ++g)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (h < 0 || i == h) part[4 * g + 2 * i] += v[g].x, part[4 * g + 2 * i + 1] += v[g].y;
  }

  __device__ void add_residual(float* part) const {
#pragma unroll
    for (int g = 0; g < WIDE / 8; ++g)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 v = pair(staging + Part::offset(lane / 4 + 8 * h, g), 2 * (lane % 4));
        part[4 * g + 2 * h] += v.x, part[4 * g + 2 * h + 1] += v.y;
      }
  }

  __device__ void store(const float* part) const {
#pragma unroll
    for (int g = 0; g < WIDE / 8; ++g)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        reinterpret_cast<__half2*>(staging + Part::offset(lane / 4 + 8 * h, g))[lane % 4] =
            __floats2half2_rn(part[4 * g + 2 * h], part[4 * g + 2 * h + 1]);
  }

  /// A thread's own two columns are a value and its gate.
  __device__ void store_gated(const float* part) const {
#pragma unroll
    for (int g = 0; g < WIDE / 8; ++g)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        reinterpret_cast<__half*>(staging + Part::offset(lane / 4 + 8 * h, g / 2))[g % 2 * 4 + lane % 4] =
            __float2half_rn(part[4 * g + 2 * h] * gelu(part[4 * g + 2 * h + 1]));
  }

  const Product& p;
  char* staging;
  int lane, column, out_column, inside, left;
  int64_t row;
  Residual<VALUES> residual;
};

#endif

}  // namespace sv3d::gemm
