// 3x3 convolution of stride 1 and any dilation by Winograd F(m x m, 3 x 3) on the tiles of
// winograd.h. Tiles are grouped in blocks of up to kRows: the rows of a register tile.
//   V (transformed input) of a block and point: [C / kLine][rows][kLine]
//   packed weight: [panel][point][C / kPerWord, of whole lines][kPanel][kPerWord]
//   M (products) of a block, point and panel: [rows][kPanel]
// Points of V lie a cache line further apart than they need to, so that they do not fall on the
// same cache sets.

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

  // Tiles [begin, end), counted over (image, tile row, tile column), from input to output. A few
  // dozen tiles at a time keep V and M in L2, and no other thread waits for them.
  static void run(const Conv& conv, int64_t begin, int64_t end, float* scratch) {
    const int64_t C = conv.channels(), tiles = end - begin;
    const int64_t blocks = ceil_div(tiles, kRows);
    E* v = reinterpret_cast<E*>(scratch);
    float* m = scratch + blocks * v_size(conv) / kPerWord<E>;
    T* zeros = reinterpret_cast<T*>(m + blocks * kMSize);
    clear(zeros, C);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = part_begin(tiles, blocks, i);
      const int64_t rows = part_begin(tiles, blocks, i + 1) - first;
      transform_input(conv, begin + first, rows, zeros, v + i * v_size(conv), C * rows + kLine<E>,
                      false);
    }
    for (int64_t k = 0; k < conv.K; k += kPanel) {
      const E* b = conv.weight + k * kPoints * C;
      for (int64_t point = 0; point < kPoints; ++point, b += C * kPanel) {
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t rows = part_begin(tiles, blocks, i + 1) - part_begin(tiles, blocks, i);
          const E* a = v + i * v_size(conv) + point * (C * rows + kLine<E>);
          gemm_tile(rows, columns(conv, k), a, b, C,
                    StoreTile{m + i * kMSize + point * kRows * kPanel});
        }
      }
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = part_begin(tiles, blocks, i);
        const int64_t rows = part_begin(tiles, blocks, i + 1) - first;
        transform_output(conv, begin + first, rows, k, m + i * kMSize, kRows * kPanel);
      }
    }
  }

  // Floats of scratch memory that run() needs for so many tiles.
  static int64_t scratch_size(const Conv& conv, int64_t tiles) {
    return ceil_div(tiles, kRows) * (v_size(conv) / kPerWord<E> + kMSize) + conv.channels();
  }

  // Channels [first, first + kLine) of one panel of the weights (K, C, 3, 3) to their packed form,
  // padding included. Output channels are the lanes.
  static void pack(const float* weight, int64_t K, int64_t C, int64_t panel, int64_t first,
                   E* packed) {
    double g[kProducts][3];
    for (int i = 0; i < kProducts; ++i) Scheme::weight_row(i, g[i]);
    const int64_t depth = round_up(C, kLine<E>), columns = K - panel * kPanel;
    packed += panel * kPoints * depth * kPanel;
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
      E* dst = packed + (c / kPerWord<E> * kPanel) * kPerWord<E> + c % kPerWord<E>;
      for (int i = 0; i < kProducts; ++i) {
        for (int j = 0; j < kProducts; ++j, dst += depth * kPanel) {
          for (int k = 0; k < kPanel; ++k) {
            const double u =
                g[j][0] * half[i][0][k] + g[j][1] * half[i][1][k] + g[j][2] * half[i][2][k];
            dst[k * kPerWord<E>] = static_cast<E>(static_cast<float>(u));
          }
        }
      }
    }
  }

  // The same in three stages with all threads at each, for so many channels that V of a task would
  // not stay in L2: every point's weights and V are then read from memory once. The tiles of a
  // stage are [begin, begin + tiles).
  //   V: [point][block], M: [point][panel][tile][kPanel]

  static void stage_input(const Conv& conv, int64_t begin, int64_t tiles, int64_t block, E* v,
                          T* zeros) {
    const int64_t C = conv.channels(), blocks = ceil_div(tiles, kRows);
    const int64_t first = part_begin(tiles, blocks, block);
    const int64_t rows = part_begin(tiles, blocks, block + 1) - first;
    clear(zeros, C);
    transform_input(conv, begin + first, rows, zeros, v + first * C, tiles * C + kLine<E>, true);
    stream_fence();
  }

  // Blocks [block_begin, block_end) of one point, all panels. The reduction is cut into pieces of
  // which the weights of all panels stay in L2 and V in L1, so both are read from memory once; sums
  // of pieces are also more accurate than one long sum.
  static void stage_multiply(const Conv& conv, int64_t tiles, int64_t point, int64_t block_begin,
                             int64_t block_end, const E* v, float* m) {
    constexpr int64_t kPiece = 512;
    const int64_t C = conv.channels(), blocks = ceil_div(tiles, kRows);
    v += point * (tiles * C + kLine<E>);
    m += point * conv.panels() * tiles * kPanel;
    for (int64_t c = 0; c < C; c += kPiece) {
      const int64_t depth = C - c < kPiece ? C - c : kPiece;
      for (int64_t i = block_begin; i < block_end; ++i) {
        const int64_t first = part_begin(tiles, blocks, i);
        const int64_t rows = part_begin(tiles, blocks, i + 1) - first;
        for (int64_t panel = 0; panel < conv.panels(); ++panel) {
          const E* b = conv.weight + ((panel * kPoints + point) * C + c) * kPanel;
          gemm_tile(rows, columns(conv, panel * kPanel), v + first * C + c * rows, b, depth,
                    StoreTile{m + (panel * tiles + first) * kPanel, c > 0});
        }
      }
    }
  }

  static void stage_output(const Conv& conv, int64_t begin, int64_t tiles, int64_t block,
                           const float* m) {
    const int64_t blocks = ceil_div(tiles, kRows);
    const int64_t first = part_begin(tiles, blocks, block);
    const int64_t rows = part_begin(tiles, blocks, block + 1) - first;
    for (int64_t panel = 0; panel < conv.panels(); ++panel) {
      transform_output(conv, begin + first, rows, panel * kPanel,
                       m + (panel * tiles + first) * kPanel, conv.panels() * tiles * kPanel);
    }
  }

 private:
  static constexpr int kOut = Scheme::kOut, kIn = Scheme::kIn, kProducts = Scheme::kProducts;
  static constexpr int kPoints = kProducts * kProducts;
  static constexpr int64_t kMSize = kPoints * kRows * kPanel;  // of a block

  static int64_t v_size(const Conv& conv) { return kPoints * (conv.channels() * kRows + kLine<E>); }
  static int64_t columns(const Conv& conv, int64_t k) {
    return conv.K - k < kPanel ? conv.K - k : kPanel;
  }
  static void clear(T* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = 0;
  }

  // Tiles [first, first + rows) to V; input pixels outside the image are read from `zeros`.
  static void transform_input(const Conv& conv, int64_t first, int64_t rows, const T* zeros, E* v,
                              int64_t point_stride, bool stream) {
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
      for (int64_t c = 0; c < conv.C; c += kLine<E>) {
        E* dst = v + c * rows + r * kLine<E>;
        if (c + kLine<E> <= conv.C) {
          transform_group(src, c, dst, point_stride, stream);
        } else {
          alignas(64) T last[kIn * kIn][kLine<E>] = {};  // C is not a whole number of groups
          const T* padded[kIn][kIn];
          for (int i = 0; i < kIn * kIn; ++i) {
            padded[i / kIn][i % kIn] = last[i];
            for (int64_t l = 0; l < conv.C - c; ++l) last[i][l] = src[i / kIn][i % kIn][c + l];
          }
          transform_group(padded, 0, dst, point_stride, stream);
        }
      }
    }
  }

  // A line of channels of one tile.
  static void transform_group(const T* const (&src)[kIn][kIn], int64_t c, E* dst,
                              int64_t point_stride, bool stream) {
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
          E* to = dst + (i * kProducts + j) * point_stride + l;
          if (stream) {
            store_stream(to, v[j]);
          } else {
            store(to, v[j]);
          }
        }
      }
    }
  }

  // Products of tiles [first, first + rows) to output channels [k, k + kPanel).
  static void transform_output(const Conv& conv, int64_t first, int64_t rows, int64_t k,
                               const float* m, int64_t point_stride) {
    const TileAxis axis_y(conv.Ho, conv.dilation_h, kOut), axis_x(conv.Wo, conv.dilation_w, kOut);
    const int64_t tiles_x = axis_x.count(), tiles_y = axis_y.count();
    for (int64_t r = 0; r < rows; ++r, m += kPanel) {
      const int64_t tile = first + r;
      const int64_t x0 = axis_x.first(tile % tiles_x);
      const int64_t y0 = axis_y.first(tile / tiles_x % tiles_y);
      const int64_t n = tile / (tiles_x * tiles_y);
      alignas(64) float sums[kOut][kOut][kPanel];
      for (int64_t l = 0; l < columns(conv, k); l += kLanes) {
        Vec half[kOut][kProducts];
#pragma GCC unroll 8
        for (int j = 0; j < kProducts; ++j) {
          Vec p[kProducts], y[kOut];
#pragma GCC unroll 8
          for (int i = 0; i < kProducts; ++i)
            p[i] = load(m + (i * kProducts + j) * point_stride + l);
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
      for (int i = 0; i < kOut && y0 + i * conv.dilation_h < conv.Ho; ++i) {
        for (int j = 0; j < kOut && x0 + j * conv.dilation_w < conv.Wo; ++j) {
          const int64_t oy = y0 + i * conv.dilation_h, ox = x0 + j * conv.dilation_w;
          finish_pixel(conv, k, columns(conv, k), sums[i][j], conv.y.at(n, oy, ox),
                       conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr);
        }
      }
    }
  }
};
