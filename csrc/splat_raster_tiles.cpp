// Compiles the inner loops of splat_raster_tiles.h for each instruction set and picks one at run time.
#include "splat_raster.h"

// Vectors wider than the baseline's change how calls pass them; all functions that take them are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#define SV3D_INLINE inline __attribute__((always_inline))

#define SV3D_TARGET baseline
#include "splat_raster_tiles.h"
#undef SV3D_TARGET

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SV3D_TARGET avx2
#include "splat_raster_tiles.h"
#undef SV3D_TARGET
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")
#define SV3D_TARGET avx512
#include "splat_raster_tiles.h"
#undef SV3D_TARGET
#pragma GCC pop_options

namespace sv3d::splat {

const TileFunctions& tile_functions() {
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return has_avx512 ? avx512::functions : has_avx2 ? avx2::functions : baseline::functions;
}

}  // namespace sv3d::splat
#else
namespace sv3d::splat {

const TileFunctions& tile_functions() { return baseline::functions; }

}  // namespace sv3d::splat
#endif
