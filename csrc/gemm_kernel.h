// The matrix product for Hopper: one warp group loads, two multiply, and what follows one group's tile overlaps with
// the other's products.
//
// Streamed: both groups work on halves of one tile, whose chunks of both operands they share; the second group may
// follow the first at a distance, so that they don't reach the epilogue together. Resident: a block keeps all channels
// of its columns of the weight in shared memory, and its groups take tiles in turn: side by side, they would also end
// side by side, and leave the tensor cores idle while both store.
#pragma once

#include "gemm_epilogue.h"

namespace sv3d::gemm {

constexpr int THREADS = 3 * GROUP_THREADS;
constexpr int LOADER_REGISTERS = 40, WORKER_REGISTERS = 232;  // together the 504 that a multiprocessor has for 128

/// How a kernel is cut. Columns: of a tile. Rows: of a group's share, 64 or 128. Stages: of the ring. Resident: chunks
/// of the weight that stay, 0 for none.
template <int Columns, int Rows, int Stages, int Resident>
struct Cut {
  static constexpr int HEIGHT = Resident ? Rows : 2 * Rows;  // of what a stage holds of x
  static constexpr int X_BYTES = HEIGHT * CHUNK_BYTES, WEIGHT_BYTES = Columns * CHUNK_BYTES;
  static constexpr int STAGE_BYTES = X_BYTES + (Resident ? 0 : WEIGHT_BYTES);
  static constexpr int BARRIERS = 2 * Stages + 2 + Resident;
  static constexpr int RING_AT = Resident * WEIGHT_BYTES, BARRIERS_AT = RING_AT + Stages * STAGE_BYTES;
  static constexpr int SHARED_BYTES = BARRIERS_AT + 8 * BARRIERS + 1024;  // the start is rounded up to 1024
  static_assert(SHARED_BYTES <= 227 * 1024 && WEIGHT_BYTES % 1024 == 0);
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
  __device__ void skip(int count) {
    stage += count;
    parity ^= stage / Stages & 1;
    stage %= Stages;
  }
};

template <int Columns, int Rows, int Stages, int Resident, Form F>
struct Block {
  using C = Cut<Columns, Rows, Stages, Resident>;
  using Order = Walk<C::HEIGHT, Columns, (Resident > 0)>;
  const CUtensorMap *x, *weight;
  const Product& p;
  char* base;  // of shared memory
  int chunks;  // of one tap

  __device__ uint32_t stage(int i) const { return shared_address(base) + C::RING_AT + i * C::STAGE_BYTES; }
  __device__ uint32_t full(int i) const { return shared_address(base) + C::BARRIERS_AT + 8 * i; }
  __device__ uint32_t empty(int i) const { return full(Stages + i); }
  __device__ uint32_t turn(int group) const { return full(2 * Stages + group); }
  __device__ uint32_t kept(int chunk) const { return turn(2 + chunk); }

  __device__ void init() const {
    for (int i = 0; i < Stages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), Resident ? 4 : 8);  // a warp each
    }
    for (int group = 0; group < 2; ++group) barrier_init(turn(group), 4);
    for (int i = 0; i < Resident; ++i) barrier_init(kept(i), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }

  /// A chunk of a tile's columns of the weight, in the order in which they are dealt out.
  __device__ void load_columns(uint32_t to, uint32_t ready, int channel, const Tile& tile) const {
    copy_box(to, weight, ready, channel, 0, 0, 0, tile.column / Deal<F == Form::GATED>::BLOCK);
  }

  /// A chunk of the rows that a tap of a tile reads.
  __device__ void load_rows(uint32_t to, uint32_t ready, int channel, int tap, const Tile& tile) const {
    if constexpr (F == Form::UPSAMPLED) {
      const int parity = tile.column / p.width, line = tile.first / p.wide;
      copy_pixels(to, x, ready, channel, tile.first % p.wide - 1, line % p.tall - 1, line / p.tall,
                  parity % 2 + tap % 2, parity / 2 + tap / 2);
    } else {
      copy_box(to, x, ready, channel, tile.first + (tap - p.taps / 2) * p.shift, tile.orbit);
    }
  }

  /// The part of the weight that stays; by one thread.
  __device__ void load_weight(int block) const {
    Tile tile;
    if (!Order(p, block, gridDim.x).next(tile)) return;
    for (int i = 0; i < p.taps * chunks; ++i) {
      barrier_expect(kept(i), C::WEIGHT_BYTES);
      load_columns(shared_address(base) + i * C::WEIGHT_BYTES, kept(i), i / chunks * p.k + i % chunks * CHUNK, tile);
    }
  }

  /// Fills the ring; by one warp. What a copy holds of the next tap's weight meets zeros of x.
  __device__ void load() const {
    Place<Stages> place;
    Order order(p, blockIdx.x, gridDim.x);
    for (Tile tile; order.next(tile);) {
      if (p.residual) prefetch_residual(tile);
      if (threadIdx.x % 32 == 0) {
        for (int tap = 0; tap < p.taps; ++tap)
          for (int i = 0; i < chunks; ++i, place.advance()) {
            barrier_wait(empty(place.stage), place.parity ^ 1);
            const uint32_t ready = full(place.stage), to = stage(place.stage);
            barrier_expect(ready, C::STAGE_BYTES);
            load_rows(to, ready, i * CHUNK, tap, tile);
            if (!Resident) load_columns(to + C::X_BYTES, ready, tap * p.k + i * CHUNK, tile);
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

  /// Multiplies and stores; by warp group `group` (0 or 1).
  __device__ void work(int group) const {
    const int warp = threadIdx.x / 32 % 4, steps = p.taps * chunks;
    const int down = Resident ? 0 : group * Rows;  // this group's rows of a tile
    const bool signals = threadIdx.x % 32 == 0;
    const float scale = p.scale ? __half2float(*static_cast<const __half*>(p.scale)) : 1.0f;
    bool lagging = !Resident && p.lag > 0;
    if (lagging && group == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
    Place<Stages> place;
    Order order(p, blockIdx.x, gridDim.x);
    bool fresh = Resident > 0;    // the weight may still be on its way
    uint32_t parity = group ^ 1;  // of the next turn; the first group's first has no one before it
    Tile tile;
    if (Resident && group == 1 && order.next(tile)) place.skip(steps);  // the other group's
    for (; order.next(tile); parity ^= 1) {
      if (Resident) barrier_wait(turn(group), parity);
      float d[Rows / 64][Columns / 2];
      int before = 0;
      for (int step = 0; step < steps; ++step) {
        barrier_wait(full(place.stage), place.parity);
        if (fresh) barrier_wait(kept(step), 0);
        const uint32_t at = stage(place.stage);
        const uint64_t a = matrix(at + down * CHUNK_BYTES);
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
        if (step > 0 && signals) barrier_arrive(empty(before));
        before = place.stage;
        place.advance();
        if (lagging && group == 0 && (step + 1 == p.lag || step + 1 == steps)) {
          asm volatile("bar.arrive 1, 256;" ::: "memory");
          lagging = false;
        }
      }
      fresh = false;
      Epilogue<Columns, Rows, F> epilogue(p, warp, tile, tile.first + down, scale);
      epilogue.prepare();
      products_wait<0>();
#pragma unroll
      for (int m = 0; m < Rows / 64; ++m) hold(d[m]);
      if (signals) barrier_arrive(empty(before));
      epilogue.run(d[0]);
      if constexpr (Rows == 128) {
        Epilogue<Columns, Rows, F> second(p, warp, tile, tile.first + down + 64, scale);
        second.prepare();
        second.run(d[1]);
      }
      if (Resident && order.next(tile)) place.skip(steps);
    }
  }
};

#endif

template <int Columns, int Rows, int Stages, int Resident, Form F>
__global__ void __launch_bounds__(THREADS, 1)
    kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
           const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char memory[];
  char* base = memory + (1024 - shared_address(memory) % 1024) % 1024;
  const Block<Columns, Rows, Stages, Resident, F> block{&x, &weight, p, base, (p.k + CHUNK - 1) / CHUNK};
  const int group = threadIdx.x / GROUP_THREADS, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) block.init();
  __syncthreads();
  if (group == 0) {
    registers_down<LOADER_REGISTERS>();
    if (warp == 0) {
      block.load();
    } else if (Resident && warp == 1 && threadIdx.x % 32 == 0) {
      block.load_weight(blockIdx.x);
    }
  } else {
    registers_up<WORKER_REGISTERS>();
    block.work(group - 1);
  }
#endif
}

}  // namespace sv3d::gemm
