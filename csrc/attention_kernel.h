// Attention for Hopper at 64 channels a head: one warp group loads, three own 64 queries each and see all keys.
//
// The online softmax of Dao, "FlashAttention-2", 2023, arranged as in Shah et al., "FlashAttention-3", 2024: the
// products of the next keys are on their way while a group turns the last ones into weights, and the groups take turns
// at the tensor cores, so that one's exponentials pass under the others' products. Weights refer to the maximum of the
// first keys that a query sees; only where their sums show that they outgrow float16, all is scaled anew. No other
// maximum is sought: to find it takes a good part of the time between two products.
#pragma once

#include <cstdint>

#include "hopper.h"

namespace sv3d::attention {

using namespace hopper;

constexpr int HEAD = 64;             // channels
constexpr int ROW_BYTES = 2 * HEAD;  // of a query, key or value in shared memory
constexpr int GROUPS = 3, QUERIES = 64 * GROUPS, KEYS = 128;
constexpr int STAGES = 4;  // of keys, and of values
constexpr int THREADS = GROUP_THREADS * (GROUPS + 1);
constexpr int LOADER_REGISTERS = 32, WORKER_REGISTERS = 160;  // together the 512 that a multiprocessor has for 128
constexpr float LARGE_SUM = 8192, LARGEST_SUM = 0x1p100f;     // of a thread's weights: what float16 and float32 hold
constexpr float NEVER = -1e30f;                               // a logit without weight; finite, so that differences are

// shared memory: two tiles of queries, the rings of keys and of values, and a pair of barriers for each of them
constexpr int QUERY_BYTES = QUERIES * ROW_BYTES, KEY_BYTES = KEYS * ROW_BYTES;
constexpr int KEYS_AT = 2 * QUERY_BYTES, VALUES_AT = KEYS_AT + STAGES * KEY_BYTES;
constexpr int BARRIERS_AT = VALUES_AT + STAGES * KEY_BYTES;
constexpr int SHARED_BYTES = BARRIERS_AT + 8 * (4 + 4 * STAGES);
static_assert(SHARED_BYTES <= 227 * 1024);

struct Problem {
  void* out;  // (batch, length, heads, HEAD)
  int batch, heads, length;
  int query_tiles, key_tiles;  // of one head
  float scale;                 // of logits, for powers of two
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

extern __shared__ __align__(1024) char memory[];

/// Of the four threads that share a row.
__device__ inline float widest(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

using Logits = float[KEYS / 2];          // a thread's part of 64 x KEYS
using Results = float[HEAD / 2];         // of 64 x HEAD
using Weights = uint32_t[KEYS / 16][4];  // of 64 x KEYS, in pairs

struct Block {
  const CUtensorMap *queries, *others;
  const Problem& p;

  // the n-th use of a ring of stages: which one, and the parity of its barriers
  __device__ static int stage(int n) { return n % STAGES; }
  __device__ static uint32_t parity(int n) { return n / STAGES & 1; }

  __device__ static uint32_t start() { return shared_address(memory); }
  __device__ static uint32_t query(int n) { return start() + n % 2 * QUERY_BYTES; }
  __device__ static uint32_t key(int n) { return start() + KEYS_AT + stage(n) * KEY_BYTES; }
  __device__ static uint32_t value(int n) { return start() + VALUES_AT + stage(n) * KEY_BYTES; }
  __device__ static uint32_t barrier(int i) { return start() + BARRIERS_AT + 8 * i; }
  __device__ static uint32_t query_full(int n) { return barrier(n % 2); }
  __device__ static uint32_t query_empty(int n) { return barrier(2 + n % 2); }
  __device__ static uint32_t key_full(int n) { return barrier(4 + stage(n)); }
  __device__ static uint32_t key_empty(int n) { return barrier(4 + STAGES + stage(n)); }
  __device__ static uint32_t value_full(int n) { return barrier(4 + 2 * STAGES + stage(n)); }
  __device__ static uint32_t value_empty(int n) { return barrier(4 + 3 * STAGES + stage(n)); }

  __device__ int tiles() const { return p.batch * p.heads * p.query_tiles; }
  __device__ int first_query(int tile) const { return tile % p.query_tiles * QUERIES; }
  __device__ int head(int tile) const { return tile / p.query_tiles % p.heads; }
  __device__ int image(int tile) const { return tile / p.query_tiles / p.heads; }

  __device__ static void init() {
    if (start() % 1024) __trap();  // swizzled copies begin at multiples of it
    for (int i = 0; i < 2; ++i) {
      barrier_init(query_full(i), 1);
      barrier_init(query_empty(i), 4 * GROUPS);  // a warp each
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(key_full(i), 1), barrier_init(key_empty(i), 4 * GROUPS);
      barrier_init(value_full(i), 1), barrier_init(value_empty(i), 4 * GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }

  /// Fills all rings; by one thread. The last keys come first, since they may be fewer.
  __device__ void load() const {
    int n = 0, round = 0;
    const int channels = p.heads * HEAD;
    for (int tile = blockIdx.x; tile < tiles(); tile += gridDim.x, ++round) {
      const int channel = head(tile) * HEAD;
      barrier_wait(query_empty(round), (round / 2 & 1) ^ 1);
      barrier_expect(query_full(round), QUERY_BYTES);
      copy_box(query(round), queries, query_full(round), channel, first_query(tile), image(tile));
      for (int step = p.key_tiles - 1; step >= 0; --step, ++n) {
        barrier_wait(key_empty(n), parity(n) ^ 1);
        barrier_expect(key_full(n), KEY_BYTES);
        copy_box(key(n), others, key_full(n), channels + channel, step * KEYS, image(tile));
        barrier_wait(value_empty(n), parity(n) ^ 1);
        barrier_expect(value_full(n), KEY_BYTES);
        copy_box(value(n), others, value_full(n), 2 * channels + channel, step * KEYS, image(tile));
      }
    }
  }

  /// Waits for a group's turn at the tensor cores, and ends it. The loading group gives the first turn; what the last
  /// group passes on in the end stays unused.
  __device__ static void turn_wait(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
  __device__ static void turn_pass(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group + 1) % GROUPS) : "memory");
  }

  __device__ static void compare(Logits& s, uint32_t queries, uint32_t keys) {
    products_begin();
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i) product(s, matrix(queries) + 2 * i, matrix(keys) + 2 * i, i > 0);
    products_commit();
  }

  __device__ static void mix(Results& o, const Weights& weights, uint32_t values, bool add) {
    products_begin();
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i)
      product(o, weights[i], matrix(values) + i * (16 * ROW_BYTES >> 4), add || i > 0);
    products_commit();
  }

  /// What a thread knows of its two rows: what weights refer to, in powers of two, its part of the weights' sum, and
  /// by what earlier results are scaled, where they are.
  struct Rows {
    float reference[2] = {NEVER, NEVER}, sum[2] = {0, 0}, factor[2] = {1, 1};
  };

  /// Weights of the part of the logits from `FROM` on, in place; adds them to sums.
  template <int FROM, int TO>
  __device__ void soften(Logits& s, const Rows& rows, float (&sum)[2]) const {
#pragma unroll
    for (int i = FROM; i < TO; ++i) {
      s[i] = power_of_two(fmaf(s[i], p.scale, -rows.reference[i / 2 % 2]));
      sum[i / 2 % 2] += s[i];
    }
  }

  /// The same of all of them, after what they refer to has been raised to each row's maximum.
  __device__ void soften_anew(Logits& s, Rows& rows) const {
    float top[2] = {NEVER, NEVER};
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float reference = fmaxf(rows.reference[h], widest(top[h]) * p.scale);
      rows.factor[h] = power_of_two(rows.reference[h] - reference);
      rows.sum[h] *= rows.factor[h];
      rows.reference[h] = reference;
    }
    soften<0, KEYS / 2>(s, rows, rows.sum);
  }

  /// Where weights have grown beyond what float16 holds: what they refer to is raised, by powers of two, and weights,
  /// sums and earlier results become smaller. Logits so large that float32 doesn't hold their weights are formed again.
  __device__ void raise(Logits& s, Rows& rows, float (&sum)[2], uint32_t queries, uint32_t keys) const {
    if (__any_sync(~0u, !(fmaxf(sum[0], sum[1]) < LARGEST_SUM))) {
      compare_again(s, queries, keys);
      sum[0] = sum[1] = 0;
      return soften_anew(s, rows);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int exponent = __float_as_int(widest(sum[h])) >> 23;  // and 127
      const float factor = __int_as_float((254 - max(exponent, 127)) << 23);
      rows.reference[h] += max(exponent, 127) - 127;
      rows.factor[h] = factor, rows.sum[h] *= factor, sum[h] *= factor;
    }
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] *= rows.factor[i / 2 % 2];
  }

  /// As `compare`, from shared memory without the tensor cores, by each warp for itself.
  __device__ static void compare_again(Logits& s, uint32_t queries, uint32_t keys) {
    const int query = threadIdx.x % GROUP_THREADS / 32 * 16 + threadIdx.x % 32 / 4, key = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] = 0;
#pragma unroll 1
    for (int channel = 0; channel < HEAD; ++channel) {
      const float q[2] = {element(queries, query, channel), element(queries, query + 8, channel)};
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i)
        s[i] = fmaf(q[i / 2 % 2], element(keys, key + 8 * (i / 4) + i % 2, channel), s[i]);
    }
  }

  /// Of a tile in the swizzle of bulk copies.
  __device__ static float element(uint32_t tile, int row, int channel) {
    uint16_t bits;
    const uint32_t at = tile + row * ROW_BYTES + ((channel / 8 ^ row % 8) * 8 + channel % 8) * 2;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(at));
    return __half2float(__ushort_as_half(bits));
  }

  template <int FROM, int TO>
  __device__ static void round(const Logits& s, Weights& weights) {
#pragma unroll
    for (int i = FROM / 2; i < TO / 2; ++i) weights[i / 4][i % 4] = packed(s[2 * i], s[2 * i + 1]);
  }

  /// Keeps what products read in its registers until here.
  __device__ static void keep(Weights& weights) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) asm volatile("" : "+r"(weights[i / 4][i % 4])::"memory");
  }

  /// Multiplies and stores; by one of the groups.
  __device__ void work(int group) const {
    const bool signals = threadIdx.x % 32 == 0;
    int n = 0, turns = 0;  // stages and tiles so far
    for (int tile = blockIdx.x; tile < tiles(); tile += gridDim.x, ++turns) {
      Logits s;
      Results o;
      Weights weights;
      Rows rows;
      const uint32_t own = query(turns) + group * 64 * ROW_BYTES;
      barrier_wait(query_full(turns), turns / 2 & 1);
      barrier_wait(key_full(n), parity(n));
      turn_wait(group);
      compare(s, own, key(n));
      turn_pass(group);
      products_wait<0>();
      hold(s);
      if (signals) barrier_arrive(key_empty(n));
      const int there = p.length - (p.key_tiles - 1) * KEYS;  // of the last keys
      if (there < KEYS) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i)
          if (8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2 >= there) s[i] = NEVER;
      }
      soften_anew(s, rows);
      round<0, KEYS / 2>(s, weights);
      ++n;
#pragma unroll 1
      for (int step = 1; step < p.key_tiles; ++step, ++n) {
        barrier_wait(key_full(n), parity(n));
        turn_wait(group);
        compare(s, own, key(n));
        barrier_wait(value_full(n - 1), parity(n - 1));
        mix(o, weights, value(n - 1), step > 1);
        turn_pass(group);
        products_wait<1>();
        hold(s);
        float sum[2] = {0, 0};
        soften<0, KEYS / 4>(s, rows, sum);
        hold(s);
        products_wait<0>();
        hold(o);
        keep(weights);
        if (signals) barrier_arrive(value_empty(n - 1));
        soften<KEYS / 4, KEYS / 2>(s, rows, sum);
        round<0, KEYS / 2>(s, weights);
        if (__any_sync(~0u, fmaxf(sum[0], sum[1]) > LARGE_SUM)) {
          raise(s, rows, sum, own, key(n));
          round<0, KEYS / 2>(s, weights);
#pragma unroll
          for (int i = 0; i < HEAD / 2; ++i) o[i] *= rows.factor[i / 2 % 2];
        }
        if (signals) barrier_arrive(key_empty(n));
        rows.sum[0] += sum[0], rows.sum[1] += sum[1];
      }
      if (signals) barrier_arrive(query_empty(turns));
      barrier_wait(value_full(n - 1), parity(n - 1));
      mix(o, weights, value(n - 1), p.key_tiles > 1);
      products_wait<0>();
      hold(o);
      keep(weights);
      if (signals) barrier_arrive(value_empty(n - 1));
      store(o, rows, tile, group);
    }
  }

  __device__ void store(const Results& o, const Rows& rows, int tile, int group) const {
    const int query = first_query(tile) + 64 * group + threadIdx.x % GROUP_THREADS / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = rows.sum[h] + __shfl_xor_sync(~0u, rows.sum[h], 1);
      const float share = 1.0f / (sum + __shfl_xor_sync(~0u, sum, 2));
      if (query + 8 * h >= p.length) continue;
      const int64_t row = int64_t{image(tile)} * p.length + query + 8 * h;
      __half* to = static_cast<__half*>(p.out) + (row * p.heads + head(tile)) * HEAD + 2 * (threadIdx.x % 4);
#pragma unroll
      for (int g = 0; g < HEAD / 8; ++g)
        *reinterpret_cast<uint32_t*>(to + 8 * g) = packed(o[4 * g + 2 * h] * share, o[4 * g + 2 * h + 1] * share);
    }
  }
};

#endif

__global__ void __launch_bounds__(THREADS, 1)
    kernel(const __grid_constant__ CUtensorMap queries, const __grid_constant__ CUtensorMap others,
           const __grid_constant__ Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Block block{&queries, &others, p};
  const int group = threadIdx.x / GROUP_THREADS;
  if (threadIdx.x == 0) Block::init();
  __syncthreads();
  if (group == 0) {
    registers_down<LOADER_REGISTERS>();
    Block::turn_pass(GROUPS - 1);
    if (threadIdx.x == 0) block.load();
  } else {
    registers_up<WORKER_REGISTERS>();
    block.work(group - 1);
  }
#endif
}

}  // namespace sv3d::attention
