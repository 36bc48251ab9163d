// Marching cubes on CUDA, in the CPU's order. Voxels are handled in words: 32 of a row along z, one bit each, set where
// the field is inside. A first pass makes the words, a second counts what each word emits, a scan (in Python) turns
// counts into places, a third writes. The number of a vertex is its word's place plus the rank of its bit among the
// word's crossed edges, so no index per edge is kept: beside the field all this takes under one byte a voxel.
#include "cuda_launch.h"
#include "marching_cubes.h"

namespace sv3d::marching_cubes {
namespace {

constexpr int THREADS = 256, WORD = 32;
constexpr int AT_ONCE = 4;  // words that a warp reads before it uses the first
constexpr int MAX_TRIANGLES = 5;
constexpr int64_t MAX_WORDS = int64_t{1} << 28, MAX_VERTICES = int64_t{1} << 31;

constexpr uint64_t packed_corners() {
  uint64_t packed = 0;
  for (int edge = 0; edge < 12; ++edge) packed |= static_cast<uint64_t>(LOWER_CORNER[edge]) << 4 * edge;
  return packed;
}
constexpr uint64_t LOWER_CORNERS = packed_corners();

/// The case table, four bits an edge; the number of triangles stands in the top four.
struct Cases {
  uint64_t packed[256];

  explicit Cases(const TensorView& tensor) {
    const Table table(tensor);
    for (int c = 0; c < 256; ++c) {
      if (table.triangles[c] > MAX_TRIANGLES) fail("table: expected at most 5 triangles a case");
      packed[c] = static_cast<uint64_t>(table.triangles[c]) << 60;
      for (int k = 0; k < 3 * table.triangles[c]; ++k)
        packed[c] |= static_cast<uint64_t>(table.rows[c * table.width + k]) << 4 * k;
    }
  }
};

__device__ int triangles_of(uint64_t cell) { return static_cast<int>(cell >> 60); }

struct Grid {
  const float* field;  // (X, Y, Z)
  uint32_t* inside;    // (X, Y, words a row)
  float level;
  uint32_t X, Y, Z, per_row, words;

  Grid(const TensorView& field_, double level_, const TensorView& inside_)
      : field(data<float>(field_, "field", {ANY, ANY, ANY}, kDLCUDA)), level(static_cast<float>(level_)) {
    const int64_t x = field_.size(0), y = field_.size(1), z = field_.size(2);
    if (z > MAX_WORDS || x * y * groups(z, WORD) > MAX_WORDS) fail("field: expected at most 2^28 words of 32 voxels");
    inside = reinterpret_cast<uint32_t*>(data<int32_t>(inside_, "inside", {x, y, groups(z, WORD)}, kDLCUDA));
    X = static_cast<uint32_t>(x), Y = static_cast<uint32_t>(y), Z = static_cast<uint32_t>(z);
    per_row = static_cast<uint32_t>(groups(z, WORD)), words = X * Y * per_row;
  }
};

/// A word and its place.
struct Word {
  uint32_t x, y, w;

  __device__ Word(const Grid& g, uint32_t word) : x(word / g.per_row / g.Y), y(word / g.per_row % g.Y) {
    w = word % g.per_row;
  }
  __device__ Word(uint32_t x_, uint32_t y_, uint32_t w_) : x(x_), y(y_), w(w_) {}
  __device__ uint32_t number(const Grid& g) const { return (x * g.Y + y) * g.per_row + w; }

  /// The voxels of the word that have a neighbour along z.
  __device__ uint32_t followed(const Grid& g) const { return w + 1 < g.per_row ? ~0u : (1u << (g.Z - 1) % WORD) - 1; }
};

/// The word moved on by one voxel along z: bit i is that of voxel i + 1.
__device__ uint32_t one_up(const Grid& g, const Word& at, uint32_t number) {
  return __funnelshift_r(g.inside[number], at.w + 1 < g.per_row ? g.inside[number + 1] : 0u, 1);
}

/// Which edges that start in a word's voxels the surface crosses, per axis.
struct Crossed {
  uint32_t along[3];

  __device__ Crossed(const Grid& g, const Word& at) {
    const uint32_t number = at.number(g), own = g.inside[number];
    along[0] = at.x + 1 < g.X ? own ^ g.inside[number + g.Y * g.per_row] : 0;
    along[1] = at.y + 1 < g.Y ? own ^ g.inside[number + g.per_row] : 0;
    along[2] = (own ^ one_up(g, at, number)) & at.followed(g);
  }
  __device__ uint32_t any() const { return along[0] | along[1] | along[2]; }
  __device__ int total() const { return __popc(along[0]) + __popc(along[1]) + __popc(along[2]); }

  /// How many crossed edges come before the one of `voxel` along `axis`.
  __device__ int rank(uint32_t voxel, uint32_t axis) const {
    int before = 0;
    for (uint32_t a = 0; a < 3; ++a)
      before += __popc(along[a] & ((1u << voxel) - 1)) + (a < axis && along[a] >> voxel & 1);
    return before;
  }
};

/// The cells whose lowest corners are a word's voxels.
struct Cells {
  uint32_t corner[8] = {}, active = 0;  // active: the surface passes through

  __device__ Cells(const Grid& g, const Word& at) {
    if (at.x + 1 >= g.X || at.y + 1 >= g.Y) return;
    uint32_t any = 0, all = ~0u;
    for (int c = 0; c < 4; ++c) {
      const uint32_t number = Word(at.x + (c & 1), at.y + (c >> 1), at.w).number(g);
      corner[c] = g.inside[number], corner[c + 4] = one_up(g, at, number);
      any |= corner[c] | corner[c + 4], all &= corner[c] & corner[c + 4];
    }
    active = any & ~all & at.followed(g);
  }
  __device__ uint32_t index(uint32_t voxel) const {
    uint32_t index = 0;
    for (int c = 0; c < 8; ++c) index |= (corner[c] >> voxel & 1) << c;
    return index;
  }
};

/// Makes the words; sets `broken` where the field is not finite.
__global__ void __launch_bounds__(THREADS) mark_inside(Grid g, int32_t* broken) {
  const uint32_t lane = threadIdx.x % WORD, warp = (blockIdx.x * THREADS + threadIdx.x) / WORD;
  float value[AT_ONCE];
#pragma unroll
  for (uint32_t k = 0; k < AT_ONCE; ++k) {
    const uint32_t word = warp * AT_ONCE + k, z = word % g.per_row * WORD + lane;
    value[k] = word < g.words && z < g.Z ? g.field[int64_t{word / g.per_row} * g.Z + z] : g.level;
  }
#pragma unroll
  for (uint32_t k = 0; k < AT_ONCE; ++k) {
    const uint32_t word = warp * AT_ONCE + k, bits = __ballot_sync(~0u, value[k] < g.level);
    if (lane == 0 && word < g.words) g.inside[word] = bits;
    if (!(fabsf(value[k]) < INFINITY)) *broken = 1;
  }
}

/// One thread a word: vertices to counts[word], triangles to counts[words + word].
__global__ void __launch_bounds__(THREADS) count_words(Grid g, const __grid_constant__ Cases cases, int32_t* counts) {
  const uint32_t word = blockIdx.x * THREADS + threadIdx.x;
  if (word >= g.words) return;
  const Word at(g, word);
  const Crossed crossed(g, at);
  counts[word] = crossed.total();
  const Cells cells(g, at);
  int triangles = 0;
  for (uint32_t left = cells.active; left; left &= left - 1)
    triangles += triangles_of(cases.packed[cells.index(__ffs(left) - 1)]);
  counts[int64_t{g.words} + word] = triangles;
}

/// Where a word's output starts, from the running sums of all counts, those of triangles behind those of vertices.
__device__ int64_t first_vertex(const int64_t* ends, uint32_t word) { return word ? ends[word - 1] : 0; }
__device__ int64_t first_triangle(const Grid& g, const int64_t* ends, uint32_t word) {
  return ends[int64_t{g.words} + word - 1] - ends[g.words - 1];
}

__device__ void write_vertices(const Grid& g, const Word& at, const Crossed& crossed, float nudge, float* out) {
  const int64_t start = (int64_t{at.x} * g.Y + at.y) * g.Z, stride[3] = {int64_t{g.Y} * g.Z, g.Z, 1};
  for (uint32_t left = crossed.any(); left; left &= left - 1) {
    const uint32_t voxel = __ffs(left) - 1, z = at.w * WORD + voxel;
    const float a = g.field[start + z];
    for (int axis = 0; axis < 3; ++axis) {
      if (!(crossed.along[axis] >> voxel & 1)) continue;
      const float b = g.field[start + z + stride[axis]];
      const float t = fminf(fmaxf((g.level - a) / (b - a), nudge), 1 - nudge);
      out[0] = static_cast<float>(at.x) + (axis == 0 ? t : 0.0f);
      out[1] = static_cast<float>(at.y) + (axis == 1 ? t : 0.0f);
      out[2] = static_cast<float>(z) + (axis == 2 ? t : 0.0f);
      out += 3;
    }
  }
}

__device__ void write_triangles(const Grid& g, const Cases& cases, const int64_t* ends, const Word& at,
                                const Cells& cells, int32_t* out) {
  for (uint32_t left = cells.active; left; left &= left - 1) {
    const uint32_t voxel = __ffs(left) - 1;
    uint64_t edges = cases.packed[cells.index(voxel)];
    for (int k = 3 * triangles_of(edges); k > 0; --k, edges >>= 4) {
      const uint32_t edge = edges & 15, corner = LOWER_CORNERS >> 4 * edge & 15;
      const uint32_t z = at.w * WORD + voxel + (corner >> 2);
      const Word owner(at.x + (corner & 1), at.y + (corner >> 1 & 1), z / WORD);
      *out++ = static_cast<int32_t>(first_vertex(ends, owner.number(g)) + Crossed(g, owner).rank(z % WORD, edge / 4));
    }
  }
}

__global__ void __launch_bounds__(THREADS) write_words(Grid g, const __grid_constant__ Cases cases, const int64_t* ends,
                                                       float nudge, float* vertices, int32_t* faces) {
  const uint32_t word = blockIdx.x * THREADS + threadIdx.x;
  if (word >= g.words) return;
  const Word at(g, word);
  const int64_t vertex = first_vertex(ends, word), triangle = first_triangle(g, ends, word);
  if (ends[word] > vertex) write_vertices(g, at, Crossed(g, at), nudge, vertices + 3 * vertex);
  if (ends[int64_t{g.words} + word] - ends[g.words - 1] > triangle)
    write_triangles(g, cases, ends, at, Cells(g, at), faces + 3 * triangle);
}

}  // namespace

/// Fills `inside` and `counts`: per word its vertices, then per word its triangles, then 1 if a value is not finite.
void count(TensorView field, double level, TensorView table, TensorView inside, TensorView counts) {
  const Grid g(field, level, inside);
  const Cases cases(table);
  int32_t* out = data<int32_t>(counts, "counts", {2 * int64_t{g.words} + 1}, kDLCUDA);
  if (!g.words) return;
  tvm::ffi::CUDADeviceGuard guard(field.device().device_id);
  const cudaStream_t stream = stream_of(field);
  int32_t* broken = out + 2 * int64_t{g.words};
  TVM_FFI_CHECK_CUDA_ERROR(cudaMemsetAsync(broken, 0, sizeof *broken, stream));
  mark_inside<<<groups(g.words, AT_ONCE * THREADS / WORD), THREADS, 0, stream>>>(g, broken);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
  count_words<<<groups(g.words, THREADS), THREADS, 0, stream>>>(g, cases, out);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

/// Writes the mesh. `inside` as count() left it, `ends`: the running sums of its counts.
void fill(TensorView field, double level, TensorView table, double nudge, TensorView inside, TensorView ends,
          TensorView vertices, TensorView faces) {
  const Grid g(field, level, inside);
  const Cases cases(table);
  const int64_t* sums = data<int64_t>(ends, "ends", {2 * int64_t{g.words} + 1}, kDLCUDA);
  float* v = data<float>(vertices, "vertices", {ANY, 3}, kDLCUDA);
  int32_t* f = data<int32_t>(faces, "faces", {ANY, 3}, kDLCUDA);
  if (vertices.size(0) >= MAX_VERTICES) fail("field: the surface has over 2^31 vertices");
  if (!g.words) return;
  tvm::ffi::CUDADeviceGuard guard(field.device().device_id);
  write_words<<<groups(g.words, THREADS), THREADS, 0, stream_of(field)>>>(g, cases, sums, static_cast<float>(nudge), v,
                                                                          f);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

}  // namespace sv3d::marching_cubes

TVM_FFI_DLL_EXPORT_TYPED_FUNC(marching_cubes_count, sv3d::marching_cubes::count);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(marching_cubes_fill, sv3d::marching_cubes::fill);
