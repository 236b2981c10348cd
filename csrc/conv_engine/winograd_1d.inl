// k x 1 and 1 x k convolutions of stride 1 by Winograd F(5, 5) along the kernel's axis, as the
// large kernels of Peng et al. 2017, "Large Kernel Matters", need them. The taps are cut into
// groups of five, zeros added. Group g of the tile at t sees the input of group 0 of the tile at t
// + g, so each transformed input meets all groups at once, as further columns of one matrix
// product; with few output channels that also fills the panels (3 groups x 21 channels = 63
// columns).
//   lines: rows of a 1 x k, columns of a k x 1 convolution, counted over all images
//   packed weight: [panel of (group, output channel)][point][C, a whole number of lines][kPanel]
//   V: [point][C / kLine][lines][kLine]
//   P (products) of one tile: [point][line][column]; the last `groups` tiles are kept in a ring

template <class Conv>
struct Winograd1dKernel {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;

  // Lines [begin, end) from the first tile to the last.
  static void run(const Conv& conv, int64_t begin, int64_t end, float* scratch) {
    const Sizes s(conv, end - begin);
    E* v = reinterpret_cast<E*>(scratch);
    float* ring = scratch + s.v_size / kPerWord<E>;
    T* zeros = reinterpret_cast<T*>(ring + s.groups * s.p_size);
    for (int64_t c = 0; c < s.C; ++c) zeros[c] = 0;
    const int64_t blocks = ceil_div(s.lines, kRows);
    for (int64_t t = 0; t < s.tiles + s.groups - 1; ++t) {
      transform_input(conv, s, begin, t, zeros, v);
      float* p = ring + t % s.groups * s.p_size;
      for (int64_t panel = 0; panel < s.panels; ++panel) {
        const int64_t left = s.groups * conv.K - panel * kPanel;
        for (int64_t point = 0; point < kProducts; ++point) {
          const E* b = conv.weight + (panel * kProducts + point) * s.C * kPanel;
          for (int64_t i = 0; i < blocks; ++i) {
            const int64_t first = part_begin(s.lines, blocks, i);
            const int64_t rows = part_begin(s.lines, blocks, i + 1) - first;
            const E* a = v + point * s.v_point + first * s.C;
            float* out = p + (point * s.lines + first) * s.columns + panel * kPanel;
            gemm_tile(rows, left < kPanel ? left : kPanel, a, b, s.C,
                      StoreTile{out, false, s.columns});
          }
        }
      }
      if (t >= s.groups - 1) transform_output(conv, s, begin, t - (s.groups - 1), ring);
    }
  }

  // Floats of scratch memory that run() needs for so many lines.
  static int64_t scratch_size(const Conv& conv, int64_t lines) {
    const Sizes s(conv, lines);
    return s.v_size / kPerWord<E> + s.groups * s.p_size + s.C + kLanes;
  }

 private:
  using Scheme = Winograd<5, 5>;
  static constexpr int kOut = Scheme::kOut, kIn = Scheme::kIn, kProducts = Scheme::kProducts;

  struct Sizes {
    bool vertical;
    int64_t lines, C, length, outputs, pad, tiles, groups, panels, columns;
    int64_t v_point, v_size, p_size;

    Sizes(const Conv& conv, int64_t lines)
        : vertical(conv.S == 1),
          lines(lines),
          C(conv.channels()),
          length(vertical ? conv.H : conv.W),
          outputs(vertical ? conv.Ho : conv.Wo),
          pad(vertical ? conv.pad_h : conv.pad_w),
          tiles(ceil_div(outputs, kOut)),
          groups(ceil_div(vertical ? conv.R : conv.S, 5)),
          panels(ceil_div(groups * conv.K, kPanel)),
          columns(panels * kPanel),
          v_point(C * lines + kLine<E>),
          v_size(kProducts * v_point),
          p_size(kProducts * lines * columns) {}
  };

  // Tile t of every line to V, block by block of rows of the register tile.
  static void transform_input(const Conv& conv, const Sizes& s, int64_t begin, int64_t t,
                              const T* zeros, E* v) {
    const int64_t blocks = ceil_div(s.lines, kRows);
    const int64_t across = s.vertical ? conv.W : conv.H;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = part_begin(s.lines, blocks, i);
      const int64_t rows = part_begin(s.lines, blocks, i + 1) - first;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t line = begin + first + r;
        const T* src[kIn];
        for (int j = 0; j < kIn; ++j) {
          const int64_t at = t * kOut + j - s.pad;
          src[j] = at < 0 || at >= s.length ? zeros
                   : s.vertical             ? conv.x.at(line / across, at, line % across)
                                            : conv.x.at(line / across, line % across, at);
        }
        for (int64_t c = 0; c < conv.C; c += kLine<E>) {
          E* dst = v + first * s.C + c * rows + r * kLine<E>;
          if (c + kLine<E> <= conv.C) {
            transform_group(src, c, dst, s.v_point);
          } else {
            alignas(64) T last[kIn][kLine<E>] = {};  // C is not a whole number of groups
            const T* padded[kIn];
            for (int j = 0; j < kIn; ++j) {
              padded[j] = last[j];
              for (int64_t l = 0; l < conv.C - c; ++l) last[j][l] = src[j][c + l];
            }
            transform_group(padded, 0, dst, s.v_point);
          }
        }
      }
    }
  }

  static void transform_group(const T* const (&src)[kIn], int64_t c, E* dst, int64_t point_stride) {
    for (int64_t l = 0; l < kLine<E>; l += kLanes) {
      Vec d[kIn], v[kProducts];
#pragma GCC unroll 16
      for (int j = 0; j < kIn; ++j) d[j] = load(src[j] + c + l);
      input_transform(Scheme{}, d, v);
#pragma GCC unroll 16
      for (int j = 0; j < kProducts; ++j) store(dst + j * point_stride + l, v[j]);
    }
  }

  // Output tile t of every line: group g of its products is in the ring at tile t + g.
  static void transform_output(const Conv& conv, const Sizes& s, int64_t begin, int64_t t,
                               const float* ring) {
    const int64_t across = s.vertical ? conv.W : conv.H;
    const int64_t valid = s.outputs - t * kOut < kOut ? s.outputs - t * kOut : kOut;
    for (int64_t line = 0; line < s.lines; ++line) {
      const int64_t n = (begin + line) / across, at = (begin + line) % across;
      for (int64_t k = 0; k < conv.K; k += kPanel) {
        const int64_t columns = conv.K - k < kPanel ? conv.K - k : kPanel;
        alignas(64) float sums[kOut][kPanel];
        for (int64_t l = 0; l < columns; l += kLanes) {
          Vec m[kProducts], y[kOut];
          for (int j = 0; j < kProducts; ++j) {
            const float* p = ring + (j * s.lines + line) * s.columns + k + l;
            m[j] = load(p + t % s.groups * s.p_size);
            for (int64_t g = 1; g < s.groups; ++g) {
              m[j] += load(p + (t + g) % s.groups * s.p_size + g * conv.K);
            }
          }
          output_transform(Scheme{}, m, y);
#pragma GCC unroll 8
          for (int j = 0; j < kOut; ++j) store(sums[j] + l, y[j]);
        }
        for (int j = 0; j < valid; ++j) {
          const int64_t oy = s.vertical ? t * kOut + j : at, ox = s.vertical ? at : t * kOut + j;
          finish_pixel(conv, k, columns, sums[j], conv.y.at(n, oy, ox),
                       conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr);
        }
      }
    }
  }
};
