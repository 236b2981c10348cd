// 3x3 convolution of stride 1 and any dilation by Winograd F(m x m, 3 x 3) on the tiles of
// winograd.h. Tiles are grouped in blocks of up to kRows: the rows of a register tile.
//   V (transformed input) of a piece of C, point and block: [C / kLine][rows][kLine]
//   packed weight: [piece][point][panel][C / kPerWord, of whole lines][kPanel][kPerWord]
//   M (products) of a point: [tile][output channel]
// Points of V and M, and tiles of M, lie a cache line further apart than they need to, so that they
// do not fall on the same cache sets.

template <int kOut, int kTaps, class P, int kIn>
FASTSEG_INLINE void input_transform(Winograd<kOut, kTaps, P>, const Vec (&d)[kIn], Vec (&v)[kIn]) {
  using W = Winograd<kOut, kTaps, P>;
  constexpr int kZ = W::kZero, kPairs = W::kPairs;
  constexpr auto kCoef = W::coefficients();
  Vec infinity = d[2 * kPairs + kZ];  // the leading coefficient of every polynomial is 1
#pragma GCC unroll 8
  for (int k = 0; k < kPairs; ++k) infinity += d[2 * k + kZ] * kCoef.polynomial[kPairs][k];
  v[W::kProducts - 1] = infinity;
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

template <int kOut, int kTaps, class P, int kIn>
FASTSEG_INLINE void output_transform(Winograd<kOut, kTaps, P>, const Vec (&m)[kIn],
                                     Vec (&y)[kOut]) {
  using W = Winograd<kOut, kTaps, P>;
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
  y[kOut - 1] += m[W::kProducts - 1];
}

FASTSEG_INLINE void input_transform(Bordered, const Vec (&d)[2], Vec (&v)[3]) {
  v[0] = d[0] + d[1];
  v[1] = d[1];
  v[2] = d[0];
}

FASTSEG_INLINE void output_transform(Bordered, const Vec (&m)[3], Vec (&y)[2]) {
  y[0] = m[0] + m[1];
  y[1] = m[0] + m[2];
}

template <class Scheme, class Conv>
struct WinogradKernel {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;

  // Tiles [begin, end), counted over (image, tile row, tile column), from input to output: no other
  // thread waits for them. The points come one after the other, so that V and M, which may be
  // larger than L2, pass through it once, and a point's V and weights are there while all panels
  // and blocks use them. With panels outermost every one of them read all of V again: one thread
  // took 51 instead of 31 ms for 512 channels.
  static void run(const Conv& conv, int64_t begin, int64_t end, float* scratch) {
    const int64_t C = conv.channels(), tiles = end - begin;
    const int64_t blocks = ceil_div(tiles, kRows);
    const int64_t v_point = v_point_size(conv, tiles), m_point = m_point_size(conv, tiles);
    E* v = reinterpret_cast<E*>(scratch);
    float* m = scratch + kPoints * v_point / kPerWord<E>;
    T* zeros = reinterpret_cast<T*>(m + kPoints * m_point);
    for (int64_t c = 0; c < C; ++c) zeros[c] = 0;
    const E* b = conv.weight;
    for (int64_t c = 0; c < C; c += kWinogradPiece) {
      const int64_t depth = C - c < kWinogradPiece ? C - c : kWinogradPiece;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = part_begin(tiles, blocks, i);
        const int64_t rows = part_begin(tiles, blocks, i + 1) - first;
        transform_input(conv, begin + first, rows, c, c + depth, zeros, v + first * depth, v_point);
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t k = 0; k < conv.K; k += kPanel, b += depth * kPanel) {
          for (int64_t i = 0; i < blocks; ++i) {
            const int64_t first = part_begin(tiles, blocks, i);
            const int64_t rows = part_begin(tiles, blocks, i + 1) - first;
            float* products = m + point * m_point + first * row_size(conv) + k;
            gemm_tile(rows, columns(conv, k), v + point * v_point + first * depth, b, depth,
                      StoreTile{products, c > 0, row_size(conv)});
          }
        }
      }
    }
    transform_output(conv, begin, tiles, m, m_point);
    if (conv.stream) stream_fence();
  }

  // Floats of scratch memory that run() needs for so many tiles.
  static int64_t scratch_size(const Conv& conv, int64_t tiles) {
    return kPoints * (v_point_size(conv, tiles) / kPerWord<E> + m_point_size(conv, tiles)) +
           conv.channels();
  }

  // Channels [first, first + kLine) of one panel of the weights (K, C, 3, 3) to their packed form,
  // padding included. Output channels are the lanes.
  static void pack(const float* weight, int64_t K, int64_t C, int64_t panel, int64_t first,
                   E* packed) {
    double g[kProducts][3];
    for (int i = 0; i < kProducts; ++i) Scheme::weight_row(i, g[i]);
    const int64_t panels = ceil_div(K, kPanel), columns = K - panel * kPanel;
    const int64_t piece = first / kWinogradPiece * kWinogradPiece;
    const int64_t rest = round_up(C, kLine<E>) - piece;
    const int64_t depth = rest < kWinogradPiece ? rest : kWinogradPiece;
    packed += (piece * kPoints * panels + panel * depth) * kPanel;
    for (int64_t c = first; c < first + kLine<E>; ++c) {
      double w[9][kPanel] = {}, half[kProducts][3][kPanel];
      for (int64_t k = 0; k < kPanel && k < columns && c < C; ++k) {
        const float* from = weight + ((panel * kPanel + k) * C + c) * 9;
        for (int tap = 0; tap < 9; ++tap) w[tap][k] = from[tap];
      }
      for (int i = 0; i < kProducts; ++i) {
        for (int s = 0; s < 3; ++s) {
          for (int k = 0; k < kPanel; ++k) {
            half[i][s][k] = g[i][0] * w[s][k] + g[i][1] * w[3 + s][k] + g[i][2] * w[6 + s][k];
          }
        }
      }
      const int64_t d = c - piece;
      E* dst = packed + (d / kPerWord<E> * kPanel) * kPerWord<E> + d % kPerWord<E>;
      for (int i = 0; i < kProducts; ++i) {
        for (int j = 0; j < kProducts; ++j, dst += depth * panels * kPanel) {
          for (int k = 0; k < kPanel; ++k) {
            const double u =
                g[j][0] * half[i][0][k] + g[j][1] * half[i][1][k] + g[j][2] * half[i][2][k];
            dst[k * kPerWord<E>] = static_cast<E>(static_cast<float>(u));
          }
        }
      }
    }
  }

 private:
  static constexpr int kOut = Scheme::kOut, kIn = Scheme::kIn, kProducts = Scheme::kProducts;
  static constexpr int kPoints = kProducts * kProducts;

  // Distance of the points in V and in M, and of the tiles in M.
  static int64_t v_point_size(const Conv& conv, int64_t tiles) {
    const int64_t C = conv.channels();
    return tiles * (C < kWinogradPiece ? C : kWinogradPiece) + kLine<E>;
  }
  static int64_t m_point_size(const Conv& conv, int64_t tiles) {
    return tiles * row_size(conv) + kGroup;
  }
  static int64_t row_size(const Conv& conv) { return conv.panels() * kPanel + kGroup; }
  static int64_t columns(const Conv& conv, int64_t k) {
    return conv.K - k < kPanel ? conv.K - k : kPanel;
  }

  // Channels [c_begin, c_end) of tiles [first, first + rows) to V; input pixels outside the image
  // are read from `zeros`.
  static void transform_input(const Conv& conv, int64_t first, int64_t rows, int64_t c_begin,
                              int64_t c_end, const T* zeros, E* v, int64_t point_stride) {
    const TileAxis axis_y(conv.Ho, conv.dilation_h, kOut), axis_x(conv.Wo, conv.dilation_w, kOut);
    const int64_t tiles_x = axis_x.count(), tiles_y = axis_y.count();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t tile = first + r;
      const int64_t x0 =
          axis_x.first(tile % tiles_x) - conv.pad_w + Scheme::kOffset * conv.dilation_w;
      const int64_t y0 =
          axis_y.first(tile / tiles_x % tiles_y) - conv.pad_h + Scheme::kOffset * conv.dilation_h;
      const int64_t n = tile / (tiles_x * tiles_y);
      const T* src[kIn][kIn];
      for (int i = 0; i < kIn; ++i) {
        for (int j = 0; j < kIn; ++j) {
          const int64_t y = y0 + i * conv.dilation_h, x = x0 + j * conv.dilation_w;
          const bool inside = y >= 0 && y < conv.H && x >= 0 && x < conv.W;
          src[i][j] = inside ? conv.x.at(n, y, x) : zeros;
        }
      }
      for (int64_t c = c_begin; c < c_end; c += kLine<E>) {
        E* dst = v + (c - c_begin) * rows + r * kLine<E>;
        if (c + kLine<E> <= conv.C) {
          transform_group(src, c, dst, point_stride);
        } else {
          alignas(64) T last[kIn * kIn][kLine<E>] = {};  // C is not a whole number of groups
          const T* padded[kIn][kIn];
          for (int i = 0; i < kIn * kIn; ++i) {
            padded[i / kIn][i % kIn] = last[i];
            for (int64_t l = 0; l < conv.C - c; ++l) last[i][l] = src[i / kIn][i % kIn][c + l];
          }
          transform_group(padded, 0, dst, point_stride);
        }
      }
    }
  }

  // A line of channels of one tile.
  static void transform_group(const T* const (&src)[kIn][kIn], int64_t c, E* dst,
                              int64_t point_stride) {
    for (int64_t l = 0; l < kLine<E>; l += kLanes) {
      Vec columns[kProducts][kIn];
#pragma GCC unroll 8
      for (int j = 0; j < kIn; ++j) {
        Vec d[kIn], v[kProducts];
#pragma GCC unroll 8
        for (int i = 0; i < kIn; ++i) d[i] = load(src[i][j] + c + l);
        input_transform(Scheme{}, d, v);
#pragma GCC unroll 8
        for (int i = 0; i < kProducts; ++i) columns[i][j] = v[i];
      }
#pragma GCC unroll 8
      for (int i = 0; i < kProducts; ++i) {
        Vec v[kProducts];
        input_transform(Scheme{}, columns[i], v);
#pragma GCC unroll 8
        for (int j = 0; j < kProducts; ++j) {
          store(dst + (i * kProducts + j) * point_stride + l, v[j]);
        }
      }
    }
  }

  // Products of tiles [first, first + rows) to output pixels.
  static void transform_output(const Conv& conv, int64_t first, int64_t rows, const float* m,
                               int64_t point_stride) {
    const TileAxis axis_y(conv.Ho, conv.dilation_h, kOut), axis_x(conv.Wo, conv.dilation_w, kOut);
    const int64_t tiles_x = axis_x.count(), tiles_y = axis_y.count();
    for (int64_t r = 0; r < rows; ++r, m += row_size(conv)) {
      const int64_t tile = first + r;
      const int64_t x0 = axis_x.first(tile % tiles_x);
      const int64_t y0 = axis_y.first(tile / tiles_x % tiles_y);
      const int64_t n = tile / (tiles_x * tiles_y);
      for (int64_t k = 0; k < conv.K; k += kPanel) {
        alignas(64) float sums[kOut][kOut][kPanel];
        for (int64_t l = 0; l < columns(conv, k); l += kLanes) {
          inverse_transform(m + k + l, point_stride, sums, l);
        }
        for (int i = 0; i < kOut && y0 + i * conv.dilation_h < conv.Ho; ++i) {
          for (int j = 0; j < kOut && x0 + j * conv.dilation_w < conv.Wo; ++j) {
            const int64_t oy = y0 + i * conv.dilation_h, ox = x0 + j * conv.dilation_w;
            finish_pixel(conv, k, columns(conv, k), sums[i][j], conv.y.at(n, oy, ox),
                         conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr);
          }
        }
      }
    }
  }

  // kLanes channels of one tile.
  FASTSEG_INLINE void inverse_transform(const float* m, int64_t point_stride,
                                        float (&sums)[kOut][kOut][kPanel], int64_t l) {
    Vec half[kOut][kProducts];
#pragma GCC unroll 8
    for (int j = 0; j < kProducts; ++j) {
      Vec p[kProducts], y[kOut];
#pragma GCC unroll 8
      for (int i = 0; i < kProducts; ++i) {
        p[i] = load(m + (i * kProducts + j) * point_stride);
      }
      output_transform(Scheme{}, p, y);
#pragma GCC unroll 8
      for (int i = 0; i < kOut; ++i) half[i][j] = y[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) {
      Vec y[kOut];
      output_transform(Scheme{}, half[i], y);
#pragma GCC unroll 8
      for (int j = 0; j < kOut; ++j) store(sums[i][j] + l, y[j]);
    }
  }
};
