// Hopper's own instructions, as far as products need them: barriers that count bytes, bulk copies of tiles, products of
// a warp group. Names and meaning as in the PTX manual (ISA 8.0 and later, sm_90a).
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sv3d::hopper {

constexpr int GROUP_THREADS = 128;            // of a warp group
constexpr int CHUNK = 64;                     // channels of a stage: 128 bytes, the widest swizzle
constexpr int CHUNK_BYTES = 2 * CHUNK;        // of a row
constexpr long long HANG_CYCLES = 1LL << 33;  // about five seconds: a barrier that takes longer is a mistake

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives, and lets the barrier wait for `bytes` that bulk copies bring.
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(passed)
               : "r"(barrier), "r"(parity)
               : "memory");
  return passed;
}

/// Waits until the phase of this parity has ended. A program that would hang ends with a CUDA error instead.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  if (barrier_passed(barrier, parity)) return;
  const long long start = clock64();
  while (!barrier_passed(barrier, parity))
    if (clock64() - start > HANG_CYCLES) __trap();
}

/// A box of a three-dimensional tensor into shared memory; what lies outside arrives as zeros, and counts as bytes.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

/// The same of a five-dimensional tensor.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y, int z, int u,
                                int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v)
      : "memory");
}

/// Successive pixels of a tensor of images, as many as its map says, from (x, y) of an image on, each read `right` and
/// `down` of where it lies; pixels before an image's first and after its last arrive as zeros.
__device__ inline void copy_pixels(uint32_t to, const CUtensorMap* map, uint32_t barrier, int channel, int x, int y,
                                   int image, int right, int down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image), "h"(static_cast<uint16_t>(right)),
      "h"(static_cast<uint16_t>(down))
      : "memory");
}

__device__ inline void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/// A matrix of 128-byte rows, 64 channels each, in the 128-byte swizzle that bulk copies write: groups of eight rows
/// are 1024 bytes apart. A start 32 bytes further on is the next 16 channels.
__device__ inline uint64_t matrix(uint32_t address) {
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int REGISTERS>
__device__ inline void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two values rounded to halves, the lower one first.
__device__ inline uint32_t packed(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

/// Keeps the compiler from moving what uses these registers across this place.
template <int COUNT>
__device__ inline void hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (64 x N, a warp group's) = a (64 x 16) b (N x 16)^T, plus d itself with `add`. Thread t holds d[4g + 2h + e] at row
// 16 (t / 32) + t % 32 / 4 + 8h, column 8g + 2 (t % 4) + e.
#define SV3D_OUT8(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SV3D_OUT32(i) SV3D_OUT8(i), SV3D_OUT8(i + 8), SV3D_OUT8(i + 16), SV3D_OUT8(i + 24)
#define SV3D_NAMES32_0                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SV3D_NAMES32_1                                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SV3D_NAMES16_2 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SV3D_NAMES16_2B ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SV3D_NAMES32_3                                                                                               \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SV3D_PRODUCT(N, NAMES, A, B, ADD, ...)                                                        \
  __device__ inline void product(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32.f16.f16 {" NAMES "}, " A ", " B ", p, 1, 1, 0, 0;\n}"                       \
                 : __VA_ARGS__                                                                        \
                 : "l"(a), "l"(b), "r"(add));                                                         \
  }
SV3D_PRODUCT(128, SV3D_NAMES32_0 SV3D_NAMES32_1, "%64", "%65", "%66", SV3D_OUT32(0), SV3D_OUT32(32))
SV3D_PRODUCT(160, SV3D_NAMES32_0 SV3D_NAMES32_1 SV3D_NAMES16_2, "%80", "%81", "%82", SV3D_OUT32(0), SV3D_OUT32(32),
             SV3D_OUT8(64), SV3D_OUT8(72))
SV3D_PRODUCT(192, SV3D_NAMES32_0 SV3D_NAMES32_1 SV3D_NAMES16_2 SV3D_NAMES16_2B, "%96", "%97", "%98", SV3D_OUT32(0),
             SV3D_OUT32(32), SV3D_OUT32(64))
SV3D_PRODUCT(256, SV3D_NAMES32_0 SV3D_NAMES32_1 SV3D_NAMES16_2 SV3D_NAMES16_2B SV3D_NAMES32_3, "%128", "%129", "%130",
             SV3D_OUT32(0), SV3D_OUT32(32), SV3D_OUT32(64), SV3D_OUT32(96))
#undef SV3D_PRODUCT

/// d (64 x 64, a warp group's) = a (64 x 16, in registers) b (16 x 64, rows of a matrix), plus d itself with `add`. A
/// thread holds of `a` what it holds of two groups of eight columns of an accumulator, rounded in pairs.
__device__ inline void product(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" SV3D_NAMES32_0
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
      : SV3D_OUT32(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

#endif

}  // namespace sv3d::hopper
