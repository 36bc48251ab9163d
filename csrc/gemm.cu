// The matrix product on Hopper GPUs, from Python: checks, and the choice among the ways of cutting it.
#include "gemm_launch.h"
#include "half_tensors.h"

namespace sv3d::gemm {
namespace {

constexpr int64_t MAX_EXTENT = int64_t{1} << 31;

using Launch = void (*)(const void*, const void*, Product, int, cudaStream_t);

/// A way of cutting the product: `height` rows of a block at once (streamed) or of a warp group (resident).
struct Way {
  int64_t height, columns, resident;
  Launch plain, gated;
};

template <int Columns, int Rows, int Stages, int Resident = 0>
constexpr Way way() {
  Launch gated = nullptr;
  if constexpr (Columns % 64 == 0) gated = launch<Columns, Rows, Stages, Resident, Form::GATED>;
  return {Resident ? Rows : 2 * Rows, Columns, Resident ? 1 : 0, launch<Columns, Rows, Stages, Resident, Form::PLAIN>,
          gated};
}

constexpr Way WAYS[] = {
    way<256, 64, 4>(),  way<192, 64, 5>(),    way<160, 64, 6>(),     way<160, 128, 4>(),
    way<128, 128, 4>(), way<256, 64, 8, 5>(), way<160, 64, 12, 5>(), way<128, 64, 8, 10>(),
};

}  // namespace

/// x (orbits, length, k), weight (n, taps * k), bias (n,), rows (groups, width), residual as out, scale (1,), out
/// (orbits, length, width); width is n, or n / 2 with geglu. Raises ValueError for what it can't take.
void multiply(TensorView x, TensorView weight, Optional bias, Optional rows, Optional residual, Optional scale,
              TensorView out, int64_t taps, int64_t shift, bool geglu, bool gelu, int64_t height, int64_t columns,
              bool resident, int64_t band, int64_t lag) {
  if (x.ndim() != 3 || weight.ndim() != 2) fail("x, weight: expected three and two dimensions");
  const int64_t orbits = x.size(0), length = x.size(1), k = x.size(2), n = weight.size(0), width = geglu ? n / 2 : n;
  if (taps < 1 || taps % 2 == 0 || weight.size(1) != taps * k) fail("weight: expected (n, taps * k), taps odd");
  if (k < 8 || k % 8 || n < 32 || n % (geglu ? 64 : 32))
    fail("k, n: expected multiples of 8 and 32, n of 64 with geglu");
  if (orbits * length >= MAX_EXTENT || n >= MAX_EXTENT || taps * k >= MAX_EXTENT) fail("x, weight: too large");
  if (geglu && (rows.has_value() || residual.has_value() || gelu))
    fail("geglu: expected nothing but a bias and a scale with it");
  if (band < 1 || lag < 0) fail("band, lag: expected at least 1 and 0");
  const int64_t count = orbits * length;
  if (count == 0) return;
  Product p{};
  const void* a = halves(x, "x", count * k, 16);
  const void* b = halves(weight, "weight", n * taps * k, 16);
  p.bias = halves(bias, "bias", n, 16);
  p.residual = halves(residual, "residual", count * width, 16);
  p.scale = halves(scale, "scale", 1, 2);
  p.out = halves(out, "out", count * width, 16);
  p.row_period = 1;
  if (rows.has_value()) {
    const int64_t sets = rows.value().size(0);
    if (sets < 1 || count % sets) fail("rows: expected a divisor of the number of rows of x");
    p.rows = halves(rows, "rows", sets * width, 16), p.row_period = static_cast<int>(count / sets);
  }
  p.orbits = static_cast<int>(orbits), p.length = static_cast<int>(length), p.k = static_cast<int>(k);
  p.n = static_cast<int>(n), p.width = static_cast<int>(width);
  p.taps = static_cast<int>(taps), p.shift = static_cast<int>(shift);
  p.band = static_cast<int>(band), p.lag = static_cast<int>(lag), p.gelu = gelu;
  const Way* found = std::find_if(std::begin(WAYS), std::end(WAYS), [&](const Way& way) {
    return way.height == height && way.columns == columns && way.resident == resident;
  });
  if (found == std::end(WAYS) || (geglu && !found->gated))
    fail("tiles: no kernel was compiled for " + std::to_string(height) + " x " + std::to_string(columns));
  tvm::ffi::CUDADeviceGuard guard(x.device().device_id);
  const int multiprocessors = hopper_multiprocessors(x.device().device_id);
  (geglu ? found->gated : found->plain)(a, b, p, multiprocessors, stream_of(x));
}

/// x (images, tall, wide, k), weight (4 * width, 4 * k), the rows of a parity on end and a pixel's taps beside each
/// other, bias (width,), out (images, 2 * tall, 2 * wide, width). Raises ValueError for what it can't take.
void upsample(TensorView x, TensorView weight, TensorView bias, TensorView out) {
  if (x.ndim() != 4 || weight.ndim() != 2) fail("x, weight: expected four and two dimensions");
  const int64_t images = x.size(0), tall = x.size(1), wide = x.size(2), k = x.size(3), width = weight.size(0) / 4;
  const int64_t count = images * tall * wide;
  if (k < 8 || k % 8 || weight.size(1) != 4 * k) fail("weight: expected (4 * width, 4 * k), k a multiple of 8");
  if (width < 1 || width % 128) fail("width: expected a multiple of 128");  // a tile has columns of one parity
  if (4 * count >= MAX_EXTENT || 4 * width >= MAX_EXTENT) fail("x, weight: too large");
  if (count == 0) return;
  Product p{};
  const void* a = halves(x, "x", count * k, 16);
  const void* b = halves(weight, "weight", 16 * width * k, 16);
  p.bias = halves(bias, "bias", width, 16);
  p.out = halves(out, "out", 4 * count * width, 16);
  p.orbits = 1, p.length = static_cast<int>(count), p.k = static_cast<int>(k), p.n = static_cast<int>(4 * width);
  p.width = static_cast<int>(width), p.tall = static_cast<int>(tall), p.wide = static_cast<int>(wide);
  p.taps = 4, p.row_period = 1, p.band = 8;
  tvm::ffi::CUDADeviceGuard guard(x.device().device_id);
  const Launch run = width % 256 ? launch<128, 128, 4, 0, Form::UPSAMPLED> : launch<256, 64, 4, 0, Form::UPSAMPLED>;
  run(a, b, p, hopper_multiprocessors(x.device().device_id), stream_of(x));
}

}  // namespace sv3d::gemm

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_upsample, sv3d::gemm::upsample);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_multiply, sv3d::gemm::multiply);
