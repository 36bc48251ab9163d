// From accumulators to memory. A warp owns 16 rows of its group's tile and handles them by itself, a slice of columns
// at a time: through a small piece of shared memory, so that memory sees whole lines, and the residual likewise.
#pragma once

#include "gemm_product.h"
#include "hopper.h"

namespace sv3d::gemm {

using namespace hopper;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// x * Phi(x) to 2.6e-5, as x / (1 + 2^-u): u, the binary logarithm of Phi(x) / Phi(-x), is nearly a cubic in x. The
/// polynomial, fitted to the result, turns round far beyond where Phi is 0 or 1 in float32, hence the bound.
__device__ inline float gelu(float x, float factor = 1.0f) {
  const float square = fminf(x * x, 30.0f);
  const float u = x * fmaf(fmaf(1.01426306e-3f, square, -0.106775724f), square, -2.30112134f);
  float share;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.0f + power_of_two(u)));
  return factor * x * share;
}

/// Four 8 x 8 matrices of halves between a warp's registers and shared memory: a lane gives the address of a row, lane
/// 8i + r for row r of matrix i, and holds of each matrix columns 2 (lane % 4) and the next of row lane / 4.
__device__ inline void store_matrices(uint32_t row, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]), "r"(m[1]),
               "r"(m[2]), "r"(m[3])
               : "memory");
}
__device__ inline void load_matrices(uint32_t row, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

__device__ inline float2 unpacked(uint32_t both) { return __half22float2(*reinterpret_cast<const __half2*>(&both)); }

/// Two halves that nothing writes meanwhile.
__device__ inline uint32_t read_pair(const void* values, int64_t at) {
  return __ldg(reinterpret_cast<const uint32_t*>(static_cast<const __half*>(values) + at));
}

/// Everything that follows 64 rows of a tile, `d` (64 x Columns) as `product` leaves it in a warp group. Rows: of the
/// tile that the group holds.
template <int Columns, int Rows, bool Geglu>
class Epilogue {
 public:
  // accumulated columns of a slice, and values of the result
  static constexpr int WIDE = slice_columns(Columns, Geglu);
  static constexpr int VALUES = Geglu ? WIDE / 2 : WIDE;
  static constexpr int SLICES = Columns / WIDE;
  using Part = Slice<VALUES>;
  static constexpr int AHEAD = Rows * Columns > 128 * 128 ? 2
                               : Columns == 256           ? 3
                                                          : SLICES;  // of the residual: what registers can hold
  static_assert(Columns % WIDE == 0);

  /// staging: Part::BYTES of shared memory at a multiple of 128, this warp's own. `first`: of the group's 64 rows.
  __device__ Epilogue(const Product& p, char* staging, int warp, const Tile& tile, int first)
      : p(p), staging(staging), lane(threadIdx.x % 32), column(tile.column) {
    const int inside = first + 16 * warp;
    row = tile.orbit * p.length + inside;
    left = p.length - inside;
    out_column = Geglu ? column / 2 : column;
    const int matrix = lane / 8;
    matrix_row = shared_address(staging) + Part::offset(lane % 8 + matrix % 2 * 8, matrix / 2);
  }

  /// Reads what is as large as the result, or sits where the gates need it; it travels while the last products are
  /// still at work.
  __device__ void prepare() {
    if constexpr (Geglu) {
#pragma unroll
      for (int g = 0; g < Columns / 8; ++g) {
        const int c = column + 8 * g + 2 * (lane % 4);
        biases[g] = p.bias && c < p.n ? read_pair(p.bias, c) : 0;
      }
    } else if (p.residual) {
#pragma unroll
      for (int s = 0; s < AHEAD; ++s) fetch(s);
    }
  }

  __device__ void run(float (&d)[Columns / 2], float scale) {
    int64_t rows[2];  // where in p.rows this lane's two rows begin
    if (!Geglu && p.rows)
#pragma unroll
      for (int h = 0; h < 2; ++h)  // past the end too, where nothing is stored
        rows[h] = int64_t{(row + min(lane / 4 + 8 * h, left - 1)) / p.row_period} * p.width;
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
      float* part = d + s * WIDE / 2;
      if constexpr (Geglu) {
        store_gated(part, biases + s * WIDE / 8);
      } else {
        if (p.residual) {
#pragma unroll
          for (int i = 0; i < Part::PER_LANE; ++i) *reinterpret_cast<uint4*>(staging + own(i)) = residual[s % AHEAD][i];
          __syncwarp();
          if (s + AHEAD < SLICES) fetch(s + AHEAD);
        }
        if (p.bias) add(part, s, p.bias, 0, 0);
        if (p.gelu)
#pragma unroll
          for (int i = 0; i < WIDE / 2; ++i) part[i] = gelu(part[i]);
        if (p.scale)
#pragma unroll
          for (int i = 0; i < WIDE / 2; ++i) part[i] *= scale;
        if (p.rows) add(part, s, p.rows, rows[0], rows[1]);
        store(part, p.residual != nullptr);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Part::PER_LANE; ++i)
        if (const int64_t at = place(s, i); at >= 0)
          *reinterpret_cast<uint4*>(static_cast<__half*>(p.out) + at) = in_order(own(i));
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
    const int r = lane / Part::BLOCKS + 32 / Part::BLOCKS * i;
    const int c = out_column + slice * VALUES + lane % Part::BLOCKS * 8;
    return r < left && c < p.width ? int64_t{row + r} * p.width + c : -1;
  }

  __device__ void fetch(int slice) {
#pragma unroll
    for (int i = 0; i < Part::PER_LANE; ++i) {
      const int64_t at = place(slice, i);
      uint4& block = residual[slice % AHEAD][i];
      block = make_uint4(0, 0, 0, 0);
      if (at >= 0) block = *reinterpret_cast<const uint4*>(static_cast<const __half*>(p.residual) + at);
    }
  }

  /// Adds to this lane's two rows what `values` holds for the slice, from `first` on for one and `second` on for the
  /// other.
  __device__ void add(float* part, int slice, const void* values, int64_t first, int64_t second) const {
    uint32_t v[WIDE / 8][2];
#pragma unroll
    for (int g = 0; g < WIDE / 8; ++g) {
      const int c = column + slice * WIDE + 8 * g + 2 * (lane % 4);
      v[g][0] = c < p.n ? read_pair(values, first + c) : 0;
      v[g][1] = c < p.n ? read_pair(values, second + c) : 0;
    }
#pragma unroll
    for (int g = 0; g < WIDE / 8; ++g)
#pragma unroll
      for (int h = 0; h < 2; ++h) add_pair(part + 4 * g + 2 * h, v[g][h]);
  }

  __device__ static void add_pair(float* to, uint32_t both) {
    const float2 v = unpacked(both);
    to[0] += v.x, to[1] += v.y;
  }

  /// Rounds a slice into the staging memory, with `more` after adding what lies there.
  __device__ void store(float* part, bool more) const {
#pragma unroll
    for (int g = 0; g < WIDE / 8; g += 2) {
      const uint32_t at = matrix_row ^ g << 4;
      uint32_t m[4];
      if (more) {
        load_matrices(at, m);
#pragma unroll
        for (int i = 0; i < 4; ++i) add_pair(part + 4 * g + 2 * i, m[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) m[i] = packed(part[4 * g + 2 * i], part[4 * g + 2 * i + 1]);
      store_matrices(at, m);
    }
  }

  /// A thread's own two columns are a value and its gate, so two results make a pair that is four columns apart.
  __device__ void store_gated(const float* part, const uint32_t* bias) const {
#pragma unroll
    for (int j = 0; j < WIDE / 16; j += 2) {
      uint32_t m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float result[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int g = 2 * (j + i / 2) + e;
          const float2 b = unpacked(bias[g]);
          const float* both = part + 4 * g + 2 * (i % 2);
          result[e] = gelu(both[1] + b.y, both[0] + b.x);
        }
        m[i] = packed(result[0], result[1]);
      }
      store_matrices(matrix_row ^ j << 4, m);
    }
  }

  /// A block from the staging memory; with gates its columns lie there as 0, 4, 1, 5, 2, 6, 3, 7.
  __device__ uint4 in_order(int at) const {
    const uint4 v = *reinterpret_cast<const uint4*>(staging + at);
    if (!Geglu) return v;
    return make_uint4(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x5410), __byte_perm(v.x, v.y, 0x7632),
                      __byte_perm(v.z, v.w, 0x7632));
  }

  const Product& p;
  char* staging;
  uint32_t matrix_row;  // this lane's row of the first four matrices of a slice
  int lane, row, column, out_column, left;
  uint4 residual[Geglu ? 1 : AHEAD][Part::PER_LANE];
  uint32_t biases[Geglu ? Columns / 8 : 1];
};

#endif

}  // namespace sv3d::gemm
