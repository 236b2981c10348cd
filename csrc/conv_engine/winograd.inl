// 3x3 convolution of stride 1 and any dilation by Winograd F(kOut x kOut, 3 x 3) on the tiles of
// winograd.h. Tiles are grouped in blocks of up to kRows: the rows of a register tile.
//   V (transformed input) of a block: [point][C / 16][rows][16], points kPointPad floats further
//       apart than that, so that they do not fall on the same cache sets
//   packed weight: [panel][point][C, a whole number of groups][kPanel]
//   M (products) of a block: [point][kRows][kPanel]

constexpr int64_t kPointPad = 16;

template <int kOut>
FASTSEG_INLINE void input_transform(const Vec (&d)[kOut + 2], Vec (&v)[kOut + 2]) {
  using W = Winograd<kOut, 3>;
  constexpr int kZ = W::kZero, kPairs = W::kPairs;
  constexpr auto kCoef = W::coefficients();
  Vec infinity = d[2 * kPairs + kZ];  // the leading coefficient of every polynomial is 1
#pragma GCC unroll 8
  for (int k = 0; k < kPairs; ++k) infinity += d[2 * k + kZ] * kCoef.polynomial[kPairs][k];
  v[W::kAlpha - 1] = infinity;
  if constexpr (kZ == 1) {
    Vec zero = d[2 * kPairs];
#pragma GCC unroll 8
    for (int k = 0; k < kPairs; ++k) zero += d[2 * k] * kCoef.polynomial[kPairs][k];
    v[0] = zero;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) {
    Vec even = d[2 * kPairs - 1 + kZ], odd = d[2 * kPairs - 2 + kZ];
#pragma GCC unroll 8
    for (int k = 0; k < kPairs - 1; ++k) {
      even += d[2 * k + 1 + kZ] * kCoef.polynomial[i][k];
      odd += d[2 * k + kZ] * kCoef.polynomial[i][k];
    }
    v[kZ + 2 * i] = even + odd * kCoef.power[i][1];
    v[kZ + 2 * i + 1] = even - odd * kCoef.power[i][1];
  }
}

template <int kOut>
FASTSEG_INLINE void output_transform(const Vec (&m)[kOut + 2], Vec (&y)[kOut]) {
  using W = Winograd<kOut, 3>;
  constexpr auto kCoef = W::coefficients();
#pragma GCC unroll 8
  for (int i = 0; i < W::kPairs; ++i) {
    const Vec plus = m[W::kZero + 2 * i], minus = m[W::kZero + 2 * i + 1];
    const Vec even = plus + minus, odd = plus - minus;
#pragma GCC unroll 8
    for (int t = 0; t < kOut; ++t) {
      const Vec term = (t % 2 ? odd : even) * kCoef.power[i][t];
      y[t] = i == 0 ? term : y[t] + term;
    }
  }
  if constexpr (W::kZero == 1) y[0] += m[0];
  y[kOut - 1] += m[W::kAlpha - 1];
}

template <int kOut>
struct WinogradKernel {
  // Tiles [begin, end), counted over (image, tile row, tile column), from input to output. A few
  // dozen tiles at a time keep V and M in L2, and no other thread waits for them.
  static void run(const Conv& conv, int64_t begin, int64_t end, float* scratch) {
    const int64_t C = round_up(conv.C, kGroup), tiles = end - begin;
    const int64_t blocks = ceil_div(tiles, kRows);
    float* v = scratch;
    float* m = v + blocks * v_size(conv);
    float* zeros = m + blocks * kMSize;
    for (int64_t c = 0; c < C; ++c) zeros[c] = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = part_begin(tiles, blocks, i), last = part_begin(tiles, blocks, i + 1);
      transform_input(conv, begin + first, last - first, zeros, v + i * v_size(conv));
    }
    for (int64_t k = 0; k < conv.K; k += kPanel) {
      const int64_t columns = conv.K - k < kPanel ? conv.K - k : kPanel;
      const float* b = conv.weight + k * kPoints * C;
      for (int64_t point = 0; point < kPoints; ++point, b += C * kPanel) {
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t rows = part_begin(tiles, blocks, i + 1) - part_begin(tiles, blocks, i);
          const float* a = v + i * v_size(conv) + point * (C * rows + kPointPad);
          gemm_tile(rows, columns, a, b, C, StoreTile{m + i * kMSize + point * kRows * kPanel});
        }
      }
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = part_begin(tiles, blocks, i), last = part_begin(tiles, blocks, i + 1);
        transform_output(conv, begin + first, last - first, k, columns, m + i * kMSize);
      }
    }
  }

  // Floats of scratch memory that run() needs for so many tiles.
  static int64_t scratch_size(const Conv& conv, int64_t tiles) {
    return ceil_div(tiles, kRows) * (v_size(conv) + kMSize) + round_up(conv.C, kGroup);
  }

 private:
  static constexpr int kAlpha = kOut + 2;
  static constexpr int kPoints = kAlpha * kAlpha;
  static constexpr int64_t kMSize = kPoints * kRows * kPanel;  // of a block

  static int64_t v_size(const Conv& conv) {
    return kPoints * (round_up(conv.C, kGroup) * kRows + kPointPad);
  }

  // Tiles [first, first + rows) to V; input pixels outside the image are read from `zeros`.
  static void transform_input(const Conv& conv, int64_t first, int64_t rows, const float* zeros,
                              float* v) {
    const TileAxis axis_y(conv.Ho, conv.dilation_h, kOut), axis_x(conv.Wo, conv.dilation_w, kOut);
    const int64_t tiles_x = axis_x.count(), tiles_y = axis_y.count();
    const int64_t point_stride = round_up(conv.C, kGroup) * rows + kPointPad;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t tile = first + r;
      const int64_t x0 = axis_x.first(tile % tiles_x) - conv.pad_w;
      const int64_t y0 = axis_y.first(tile / tiles_x % tiles_y) - conv.pad_h;
      const int64_t n = tile / (tiles_x * tiles_y);
      const float* src[kAlpha][kAlpha];
      for (int i = 0; i < kAlpha; ++i) {
        for (int j = 0; j < kAlpha; ++j) {
          const int64_t y = y0 + i * conv.dilation_h, x = x0 + j * conv.dilation_w;
          const bool inside = y >= 0 && y < conv.H && x >= 0 && x < conv.W;
          src[i][j] = inside ? conv.x.at(n, y, x) : zeros;
        }
      }
      for (int64_t c = 0; c < conv.C; c += kGroup) {
        float* dst = v + c * rows + r * kGroup;
        if (c + kGroup <= conv.C) {
          transform_group(src, c, dst, point_stride);
        } else {
          alignas(64) float last[kPoints][kGroup] = {};  // C is not a whole number of groups
          const float* padded[kAlpha][kAlpha];
          for (int i = 0; i < kPoints; ++i) {
            padded[i / kAlpha][i % kAlpha] = last[i];
            for (int64_t l = 0; l < conv.C - c; ++l)
              last[i][l] = src[i / kAlpha][i % kAlpha][c + l];
          }
          transform_group(padded, 0, dst, point_stride);
        }
      }
    }
  }

  // 16 channels of one tile.
  static void transform_group(const float* const (&src)[kAlpha][kAlpha], int64_t c, float* dst,
                              int64_t point_stride) {
    for (int64_t l = 0; l < kGroup; l += kLanes) {
      Vec columns[kAlpha][kAlpha];
#pragma GCC unroll 8
      for (int j = 0; j < kAlpha; ++j) {
        Vec d[kAlpha], v[kAlpha];
#pragma GCC unroll 8
        for (int i = 0; i < kAlpha; ++i) d[i] = load(src[i][j] + c + l);
        input_transform<kOut>(d, v);
#pragma GCC unroll 8
        for (int i = 0; i < kAlpha; ++i) columns[i][j] = v[i];
      }
#pragma GCC unroll 8
      for (int i = 0; i < kAlpha; ++i) {
        Vec v[kAlpha];
        input_transform<kOut>(columns[i], v);
#pragma GCC unroll 8
        for (int j = 0; j < kAlpha; ++j) store(dst + (i * kAlpha + j) * point_stride + l, v[j]);
      }
    }
  }

  // Products of tiles [first, first + rows) to output channels [k, k + columns).
  static void transform_output(const Conv& conv, int64_t first, int64_t rows, int64_t k,
                               int64_t columns, const float* m) {
    const TileAxis axis_y(conv.Ho, conv.dilation_h, kOut), axis_x(conv.Wo, conv.dilation_w, kOut);
    const int64_t tiles_x = axis_x.count(), tiles_y = axis_y.count();
    for (int64_t r = 0; r < rows; ++r, m += kPanel) {
      const int64_t tile = first + r;
      const int64_t x0 = axis_x.first(tile % tiles_x);
      const int64_t y0 = axis_y.first(tile / tiles_x % tiles_y);
      const int64_t n = tile / (tiles_x * tiles_y);
      alignas(64) float sums[kOut][kOut][kPanel];
      for (int64_t l = 0; l < columns; l += kLanes) {
        Vec half[kOut][kAlpha];
#pragma GCC unroll 8
        for (int j = 0; j < kAlpha; ++j) {
          Vec p[kAlpha], y[kOut];
#pragma GCC unroll 8
          for (int i = 0; i < kAlpha; ++i) p[i] = load(m + (i * kAlpha + j) * kRows * kPanel + l);
          output_transform<kOut>(p, y);
#pragma GCC unroll 8
          for (int i = 0; i < kOut; ++i) half[i][j] = y[i];
        }
#pragma GCC unroll 8
        for (int i = 0; i < kOut; ++i) {
          Vec y[kOut];
          output_transform<kOut>(half[i], y);
#pragma GCC unroll 8
          for (int j = 0; j < kOut; ++j) store(sums[i][j] + l, y[j]);
        }
      }
      for (int i = 0; i < kOut && y0 + i * conv.dilation_h < conv.Ho; ++i) {
        for (int j = 0; j < kOut && x0 + j * conv.dilation_w < conv.Wo; ++j) {
          const int64_t oy = y0 + i * conv.dilation_h, ox = x0 + j * conv.dilation_w;
          finish_pixel(conv, k, columns, sums[i][j], conv.y.at(n, oy, ox),
                       conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr);
        }
      }
    }
  }
};
