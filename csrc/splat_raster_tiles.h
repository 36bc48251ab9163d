// The two inner loops of the splat rasteriser, eight pixels of a row at a time, in GCC's portable vectors.
//
// No include guard: splat_raster_tiles.cpp includes it once per instruction set, into namespace SV3D_TARGET. GCC
// splits vectors to the function's own instruction set before it inlines or clones, so target_clones comes too late.

namespace sv3d::splat::SV3D_TARGET {

constexpr int LANES = 8, BLOCKS = TILE / LANES;

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

SV3D_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
SV3D_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
SV3D_INLINE Floats only(Ints mask, Floats a) { return reinterpret_cast<Floats>(mask & reinterpret_cast<Ints>(a)); }

SV3D_INLINE float sum_lanes(Floats a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }

// Least-squares fit of 2^x on [-0.5, 0.5], relative error 2e-9 before rounding.
constexpr float EXP2[] = {
    1.0f, 6.931472029e-01f, 2.402264791e-01f, 5.550332471e-02f, 9.618437358e-03f, 1.339887442e-03f, 1.535336188e-04f};

/// 2^x for x <= 0, to 2e-7 relative; below 2^-64 it stays there (no denormals).
SV3D_INLINE Floats exp2_negative(Floats x) {
  x = larger(x, Floats{} - 64.0f);
  const Ints whole = __builtin_convertvector(x - 0.5f, Ints);  // truncation rounds a negative number to the nearest
  const Floats f = x - __builtin_convertvector(whole, Floats);
  Floats p = Floats{} + EXP2[6];
  for (int i = 5; i >= 0; --i) p = p * f + EXP2[i];
  return p * reinterpret_cast<Floats>((whole + 127) << 23);
}

/// A splat as one tile sees it: its exponent -sigma log2(e) in powers of the offset, and the pixels it can reach.
struct Local {
  float x, y;  // centre, from the centre of the tile's first pixel
  float a, b, c;
  float opacity;
  int first_row, last_row, first_block, last_block;

  SV3D_INLINE Local(const Projected& p, int64_t x0, int64_t y0)
      : x(p.x - (static_cast<float>(x0) + 0.5f)),
        y(p.y - (static_cast<float>(y0) + 0.5f)),
        a(-0.5f * LOG2E * p.xx),
        b(-LOG2E * p.xy),
        c(-0.5f * LOG2E * p.yy),
        opacity(p.opacity),
        first_row(within(p.first_row - y0)),
        last_row(within(p.last_row - y0)),
        first_block(within(p.first_column - x0) / LANES),
        last_block(within(p.last_column - x0) / LANES) {}

  static int within(float pixel) { return static_cast<int>(std::min(std::max(pixel, 0.0f), TILE - 1.0f)); }
};

constexpr int AHEAD = 8;  // splats: a tile's are scattered over memory

template <typename Tile>
SV3D_INLINE void prefetch(const Tile& tile, int i) {
  const int64_t id = tile.ids[i];
  const char* splat = reinterpret_cast<const char*>(tile.projected + id);
  __builtin_prefetch(splat);
  __builtin_prefetch(splat + sizeof(Projected) - 1);
  __builtin_prefetch(tile.colors + id * tile.channels);
}

SV3D_INLINE Floats offsets_x(const Local& local, int block) {
  return local.x - static_cast<float>(block * LANES) - Floats{0, 1, 2, 3, 4, 5, 6, 7};
}

/// Composites front to back; D is channels rounded up to a size that is compiled.
template <int D>
void composite(const ForwardTile& tile) {
  Floats through[TILE][BLOCKS], live[TILE][BLOCKS], sums[TILE][BLOCKS][D] = {};
  Ints last[TILE][BLOCKS];
  bool row_live[TILE];
  for (int r = 0; r < TILE; ++r)
    for (int l = 0; l < TILE; ++l) {
      through[r][l / LANES][l % LANES] = 1;
      live[r][l / LANES][l % LANES] = r < tile.height && l < tile.width ? 1.0f : 0.0f;
      last[r][l / LANES][l % LANES] = -1;
    }
  for (int i = 0; i < tile.count; ++i) {
    if (i % 16 == 0) {
      bool any = false;
      for (int r = 0; r < TILE; ++r) any |= row_live[r] = sum_lanes(live[r][0] + live[r][1]) > 0;
      if (!any) break;
    }
    const int64_t id = tile.ids[i];
    prefetch(tile, std::min(i + AHEAD, tile.count - 1));
    const Local local(tile.projected[id], tile.x0, tile.y0);
    float color[D];
    for (int k = 0; k < D; ++k) color[k] = k < tile.channels ? tile.colors[id * tile.channels + k] : 0;
    for (int block = local.first_block; block <= local.last_block; ++block) {
      const Floats dx = offsets_x(local, block);
      for (int r = local.first_row; r <= local.last_row; ++r) {
        if (!row_live[r]) continue;
        const float dy = local.y - static_cast<float>(r);
        const Floats power = (local.a * dx + local.b * dy) * dx + local.c * dy * dy;
        const Floats before = through[r][block];
        const Floats alpha = smaller(local.opacity * exp2_negative(power) * live[r][block], Floats{} + ALPHA_MAX);
        const Floats used = only((power <= 0.0f) & (alpha >= ALPHA_MIN), alpha);
        const Floats after = before * (1.0f - used);
        const Ints going = after > TRANSMITTANCE_MIN;
        const Floats weight = only(going, used * before);
        live[r][block] = only(going, live[r][block]);
        through[r][block] = going ? after : before;
        last[r][block] = weight > 0.0f ? Ints{} + i : last[r][block];
        for (int k = 0; k < D; ++k) sums[r][block][k] += color[k] * weight;
      }
    }
  }
  for (int64_t r = 0; r < tile.height; ++r)
    for (int64_t l = 0; l < tile.width; ++l) {
      const int64_t pixel = r * tile.image_width + l, block = l / LANES, lane = l % LANES;
      const float left = through[r][block][lane];
      for (int k = 0; k < tile.channels; ++k)
        tile.image[pixel * tile.channels + k] =
            sums[r][block][k][lane] + (tile.background ? left * tile.background[k] : 0.0f);
      tile.alphas[pixel] = 1 - left;
      tile.transmittance[pixel] = left;
      tile.last[pixel] = last[r][block][lane];
    }
}

/// Back to front, recovering each transmittance from the one behind it. `behind` is, per pixel, what all that lies
/// behind a splat adds to the loss through the light that the splat lets pass:
///   d loss / d alpha_i = T_i (c_i . v) - behind_i / (1 - alpha_i).
template <int D>
void differentiate(const BackwardTile& tile) {
  Floats through[TILE][BLOCKS], behind[TILE][BLOCKS], v[TILE][BLOCKS][D] = {};
  Ints last[TILE][BLOCKS];
  int row_last[TILE], tile_last = -1;
  for (int r = 0; r < TILE; ++r) {
    row_last[r] = -1;
    for (int l = 0; l < TILE; ++l) {
      const int block = l / LANES, lane = l % LANES;
      through[r][block][lane] = 1, behind[r][block][lane] = 0, last[r][block][lane] = -1;
      if (r >= tile.height || l >= tile.width) continue;
      const int64_t pixel = r * tile.image_width + l;
      float v_through = -tile.v_alphas[pixel];
      for (int k = 0; k < tile.channels; ++k) {
        const float v_channel = tile.v_image[pixel * tile.channels + k];
        v[r][block][k][lane] = v_channel;
        if (tile.background) v_through += tile.background[k] * v_channel;
      }
      through[r][block][lane] = tile.transmittance[pixel];
      behind[r][block][lane] = tile.transmittance[pixel] * v_through;
      last[r][block][lane] = tile.last[pixel];
      row_last[r] = std::max(row_last[r], tile.last[pixel]);
    }
    tile_last = std::max(tile_last, row_last[r]);
  }
  const int columns = MOMENTS + tile.channels;
  tile_last = std::min(tile_last, tile.count - 1);
  for (int i = tile_last + 1; i < tile.count; ++i) {
    float* out = tile.moments + static_cast<int64_t>(tile.slots[i]) * columns;
    std::fill(out, out + columns, 0.0f);
  }
  for (int i = tile_last; i >= 0; --i) {
    const int64_t id = tile.ids[i];
    prefetch(tile, std::max(i - AHEAD, 0));
    const Local local(tile.projected[id], tile.x0, tile.y0);
    float color[D];
    for (int k = 0; k < D; ++k) color[k] = k < tile.channels ? tile.colors[id * tile.channels + k] : 0;
    Floats moments[MOMENTS] = {}, v_color[D] = {};
    for (int block = local.first_block; block <= local.last_block; ++block) {
      const Floats dx = offsets_x(local, block);
      Floats v0 = {}, v1 = {}, v2 = {};  // of v_sigma with powers of dy; dx is the same in every row
      for (int r = local.first_row; r <= local.last_row; ++r) {
        if (row_last[r] < i) continue;
        const float dy = local.y - static_cast<float>(r);
        const Floats power = (local.a * dx + local.b * dy) * dx + local.c * dy * dy;
        const Floats full = local.opacity * exp2_negative(power);
        const Ints used = (power <= 0.0f) & (full >= ALPHA_MIN) & (last[r][block] >= i);
        const Floats alpha = only(used, smaller(full, Floats{} + ALPHA_MAX));
        Floats shade = color[0] * v[r][block][0];
        for (int k = 1; k < D; ++k) shade += color[k] * v[r][block][k];
        const Floats inverse = 1.0f / (1.0f - alpha);
        const Floats before = through[r][block] * inverse;
        const Floats v_alpha = before * shade - behind[r][block] * inverse;
        const Floats v_sigma = only(used & (full <= ALPHA_MAX), -full * v_alpha);
        const Floats weight = alpha * before;
        behind[r][block] += weight * shade;
        through[r][block] = before;
        v0 += v_sigma;
        v1 += dy * v_sigma;
        v2 += dy * dy * v_sigma;
        for (int k = 0; k < D; ++k) v_color[k] += weight * v[r][block][k];
      }
      moments[0] += v0, moments[1] += dx * v0, moments[2] += v1;
      moments[3] += dx * dx * v0, moments[4] += dx * v1, moments[5] += v2;
    }
    float* out = tile.moments + static_cast<int64_t>(tile.slots[i]) * columns;
    for (int k = 0; k < MOMENTS; ++k) out[k] = sum_lanes(moments[k]);
    for (int k = 0; k < tile.channels; ++k) out[MOMENTS + k] = sum_lanes(v_color[k]);
  }
}

constexpr TileFunctions functions{
    {composite<1>, composite<3>, composite<4>, composite<8>, composite<16>},
    {differentiate<1>, differentiate<3>, differentiate<4>, differentiate<8>, differentiate<16>},
};

}  // namespace sv3d::splat::SV3D_TARGET
