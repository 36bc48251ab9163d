// The matrix product for Hopper: one warp group loads, two multiply, and what follows one group's tile overlaps with
// the other's products.
//
// Streamed: both groups work on halves of one tile, whose chunks of both operands they share; the second group follows
// the first at a distance, so that they don't reach the epilogue together. Resident: a block keeps all channels of its
// columns of the weight in shared memory, each group has tiles and a ring of chunks of its own, and they multiply in
// turns: side by side, they would also end side by side, and leave the tensor cores idle while both store.
#pragma once

#include "gemm_epilogue.h"

namespace sv3d::gemm {

constexpr int THREADS = 3 * GROUP_THREADS;
constexpr int LOADER_REGISTERS = 40, WORKER_REGISTERS = 232;  // together the 504 that a multiprocessor has for 128

/// How a kernel is cut. Columns: of a tile. Rows: of a group's share, 64 or 128. Stages: of a ring. Resident: chunks of
/// the weight that stay, 0 for none. Cluster: blocks, 1 or 2, that bring each other a part of the weight.
template <int Columns, int Rows, int Stages, int Resident, int Cluster, bool Geglu>
struct Cut {
  static constexpr int RINGS = Resident ? 2 : 1;
  static constexpr int HEIGHT = Resident ? Rows : 2 * Rows;  // of what a stage holds of x
  static constexpr int X_BYTES = HEIGHT * CHUNK_BYTES, WEIGHT_BYTES = Columns * CHUNK_BYTES;
  static constexpr int STAGE_BYTES = X_BYTES + (Resident ? 0 : WEIGHT_BYTES);
  static constexpr int STAGING_BYTES = Slice<slice_columns(Columns, Geglu) / (Geglu ? 2 : 1)>::BYTES;  // of a warp
  static constexpr int BARRIERS = 2 * RINGS * Stages + 2 + Resident;
  static constexpr int RINGS_AT = Resident * WEIGHT_BYTES, STAGING_AT = RINGS_AT + RINGS * Stages * STAGE_BYTES;
  static constexpr int BARRIERS_AT = STAGING_AT + 8 * STAGING_BYTES;
  static constexpr int SHARED_BYTES = BARRIERS_AT + 8 * BARRIERS + 1024;  // the start is rounded up to 1024
  static_assert(SHARED_BYTES <= 227 * 1024 && WEIGHT_BYTES / Cluster % 1024 == 0 && !(Resident && Cluster > 1));
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// A place in a ring of stages, and the parity of the turn.
template <int Stages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

template <int Columns, int Rows, int Stages, int Resident, int Cluster, bool Geglu>
struct Block {
  using C = Cut<Columns, Rows, Stages, Resident, Cluster, Geglu>;
  using Order = Walk<C::HEIGHT, Columns, (Resident > 0), Cluster>;
  const CUtensorMap *x, *weight;
  const Product& p;
  char* base;  // of shared memory
  int chunks;  // of one tap

  __device__ uint32_t stage(int ring, int i) const {
    return shared_address(base) + C::RINGS_AT + (ring * Stages + i) * C::STAGE_BYTES;
  }
  __device__ uint32_t full(int ring, int i) const {
    return shared_address(base) + C::BARRIERS_AT + 8 * (ring * Stages + i);
  }
  __device__ uint32_t empty(int ring, int i) const { return full(ring, i) + 8 * C::RINGS * Stages; }
  __device__ uint32_t turn(int group) const { return full(0, 0) + 8 * (2 * C::RINGS * Stages + group); }
  __device__ uint32_t kept(int chunk) const { return turn(2 + chunk); }

  __device__ void init() const {
    for (int ring = 0; ring < C::RINGS; ++ring)
      for (int i = 0; i < Stages; ++i) {
        barrier_init(full(ring, i), 1);
        barrier_init(empty(ring, i), 8 * Cluster / C::RINGS);  // a warp each
      }
    for (int group = 0; group < 2; ++group) barrier_init(turn(group), 4);
    for (int i = 0; i < Resident; ++i) barrier_init(kept(i), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }

  /// The part of the weight that stays; by one thread.
  __device__ void load_weight(int block) const {
    Tile tile;
    if (!Order(p, block, gridDim.x, 0).next(tile)) return;
    for (int i = 0; i < p.taps * chunks; ++i) {
      barrier_expect(kept(i), C::WEIGHT_BYTES);
      copy_box(shared_address(base) + i * C::WEIGHT_BYTES, weight, kept(i), i / chunks * p.k + i % chunks * CHUNK,
               tile.column, 0);
    }
  }

  /// Fills one ring; by one warp. What a copy holds of the next tap's weight meets zeros of x.
  __device__ void load(int ring) const {
    Place<Stages> place;
    Order order(p, blockIdx.x, gridDim.x, ring);
    for (Tile tile; order.next(tile);) {
      if (p.residual) prefetch_residual(tile);
      if (threadIdx.x % 32 == 0) {
        for (int tap = 0; tap < p.taps; ++tap)
          for (int i = 0; i < chunks; ++i, place.advance()) {
            barrier_wait(empty(ring, place.stage), place.parity ^ 1);
            const uint32_t ready = full(ring, place.stage), to = stage(ring, place.stage);
            barrier_expect(ready, C::STAGE_BYTES);
            copy_box(to, x, ready, i * CHUNK, tile.first + (tap - p.taps / 2) * p.shift, tile.orbit);
            const int channel = tap * p.k + i * CHUNK;
            if (Cluster == 2) {
              const int part = blockIdx.x % 2 * (Columns / 2);
              copy_box_to(to + C::X_BYTES + part * CHUNK_BYTES, weight, ready, channel, tile.column + part, 3);
            } else if (!Resident) {
              copy_box(to + C::X_BYTES, weight, ready, channel, tile.column, 0);
            }
          }
      }
      __syncwarp();
    }
  }

  /// Brings the tile's residual to the L2 cache, long before the epilogue asks for it.
  __device__ void prefetch_residual(const Tile& tile) const {
    const int bytes = 2 * (p.width - tile.column < Columns ? p.width - tile.column : Columns);
    for (int r = threadIdx.x % 32; r < C::HEIGHT && tile.first + r < p.length; r += 32) {
      const int64_t at = (int64_t{tile.orbit} * p.length + tile.first + r) * p.width + tile.column;
      const char* line = static_cast<const char*>(p.residual) + 2 * at;
      for (int i = 0; i < bytes; i += 128) prefetch_line(line + i);
    }
  }

  /// Gives a stage back to whoever fills it; by one lane of a warp.
  __device__ void release(int ring, int i) const {
    barrier_arrive(empty(ring, i));
    if (Cluster == 2) barrier_arrive_at(empty(ring, i), 1 - blockIdx.x % 2);
  }

  /// Multiplies and stores; by warp group `group` (0 or 1).
  __device__ void work(int group) const {
    const int ring = Resident ? group : 0, warp = threadIdx.x / 32 % 4, steps = p.taps * chunks;
    const bool signals = threadIdx.x % 32 == 0;
    const float scale = p.scale ? __half2float(*static_cast<const __half*>(p.scale)) : 1.0f;
    const uint32_t own = Resident ? 0 : group * Rows * CHUNK_BYTES;  // this group's rows of a stage
    char* staging = base + C::STAGING_AT + (4 * group + warp) * C::STAGING_BYTES;
    bool lagging = !Resident && p.lag > 0;
    if (lagging && group == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
    Place<Stages> place;
    Order order(p, blockIdx.x, gridDim.x, ring);
    bool fresh = Resident > 0;    // the weight may still be on its way
    uint32_t parity = group ^ 1;  // of the next turn; the first group's first has no one before it
    for (Tile tile; order.next(tile); parity ^= 1) {
      if (Resident) barrier_wait(turn(group), parity);
      float d[Rows / 64][Columns / 2];
      int before = 0;
      for (int step = 0; step < steps; ++step) {
        barrier_wait(full(ring, place.stage), place.parity);
        if (fresh) barrier_wait(kept(step), 0);
        const uint32_t at = stage(ring, place.stage);
        const uint64_t a = matrix(at + own);
        const uint64_t b = matrix(Resident ? shared_address(base) + step * C::WEIGHT_BYTES : at + C::X_BYTES);
        products_begin();
#pragma unroll
        for (int i = 0; i < CHUNK / 16; ++i)
#pragma unroll
          for (int m = 0; m < Rows / 64; ++m)
            product(d[m], a + m * (64 * CHUNK_BYTES >> 4) + 2 * i, b + 2 * i, step > 0 || i > 0);
        products_commit();
        if (Resident && step + 1 == steps && signals) barrier_arrive(turn(1 - group));
        products_wait<1>();  // so the step before has been multiplied
        if (step > 0 && signals) release(ring, before);
        before = place.stage;
        place.advance();
        if (lagging && group == 0 && (step + 1 == p.lag || step + 1 == steps)) {
          asm volatile("bar.arrive 1, 256;" ::: "memory");
          lagging = false;
        }
      }
      fresh = false;
      Epilogue<Columns, Rows, Geglu> epilogue(p, staging, warp, tile, tile.first + (Resident ? 0 : group * Rows));
      epilogue.prepare();
      products_wait<0>();
#pragma unroll
      for (int m = 0; m < Rows / 64; ++m) hold(d[m]);
      if (signals) release(ring, before);
      epilogue.run(d[0], scale);
      if constexpr (Rows == 128) {
        Epilogue<Columns, Rows, Geglu> second(p, staging, warp, tile, tile.first + (Resident ? 0 : group * Rows) + 64);
        second.prepare();
        second.run(d[1], scale);
      }
    }
  }
};

#endif

template <int Columns, int Rows, int Stages, int Resident, int Cluster, bool Geglu>
__global__ void __launch_bounds__(THREADS, 1)
    kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
           const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char memory[];
  char* base = memory + (1024 - shared_address(memory) % 1024) % 1024;
  const Block<Columns, Rows, Stages, Resident, Cluster, Geglu> block{&x, &weight, p, base, (p.k + CHUNK - 1) / CHUNK};
  const int group = threadIdx.x / GROUP_THREADS, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) block.init();
  Cluster > 1 ? cluster_wait() : __syncthreads();
  if (group == 0) {
    registers_down<LOADER_REGISTERS>();
    if (warp < (Resident ? 2 : 1)) {
      block.load(warp);
    } else if (Resident && warp == 2 && threadIdx.x % 32 == 0) {
      block.load_weight(blockIdx.x);
    }
  } else {
    registers_up<WORKER_REGISTERS>();
    block.work(group - 1);
  }
  if (Cluster > 1) {
    __syncwarp();
    cluster_wait();  // the other block may still signal here
  }
#endif
}

}  // namespace sv3d::gemm
