// k x 1 and 1 x k convolutions of stride 1 by Winograd F(m, m) along the kernel's axis, as the
// large kernels of Peng et al. 2017, "Large Kernel Matters", need them: m is 5, but 3 where the
// products are bfloat16's. The taps are cut into groups of m, zeros added. Group g of the tile at t
// sees the input of group 0 of the tile at t + g, so each transformed input meets all groups at
// once, as further columns of one matrix product; with few output channels that also fills the
// panels (3 groups x 21 channels = 63 columns).
//   lines: rows of a 1 x k, columns of a k x 1 convolution, counted over all images
//   rows: (tile, line); where lines are few, a step takes several tiles at once
//   packed weight: [panel of (group, output channel)][point][C / kPerWord][kPanel][kPerWord], C a
//   whole number of lines
//   V of a step and a piece of C: [point][piece / kLine][rows][kLine]
//   P (products): [point][tile][line][column], a ring of tiles

template <class Conv>
struct Winograd1dKernel {
  using T = typename Conv::Source;
  using E = typename Conv::Operand;

  // Lines [begin, end) from the first tile to the last.
  static void run(const Conv& conv, int64_t begin, int64_t end, float* scratch) {
#if FASTSEG_ISA_LEVEL == 4
    const TileRegisters amx_tiles(kTileRows);
#endif
    const Sizes s(conv, end - begin);
    E* v = reinterpret_cast<E*>(scratch);
    float* ring = scratch + s.v_size / kPerWord<E>;
    T* zeros = reinterpret_cast<T*>(ring + s.p_size);
    for (int64_t c = 0; c < s.C; ++c) zeros[c] = 0;
    int64_t done = 0;  // output tiles
    for (int64_t t = s.first_tile; t < s.last_tile || done < s.tiles; t += s.step) {
      const int64_t stop = t + s.step < s.last_tile ? t + s.step : s.last_tile;
      for (int64_t c = 0; t < stop && c < s.C; c += kPiece) {
        const int64_t depth = s.C - c < kPiece ? s.C - c : kPiece;
        transform_input(conv, s, begin, t, stop, c, depth, zeros, v);
        multiply(conv, s, t, stop, c, depth, v, ring);
      }
      for (; done < s.tiles && (done + s.groups <= stop || stop >= s.last_tile); ++done) {
        transform_output(conv, s, begin, done, ring);
      }
    }
  }

  // Floats of scratch memory that run() needs for so many lines or one less, of which a step may
  // take more tiles.
  static int64_t scratch_size(const Conv& conv, int64_t lines) {
    int64_t most = 0;
    for (int64_t n = lines > 1 ? lines - 1 : 1; n <= lines; ++n) {
      const Sizes s(conv, n);
      const int64_t size = s.v_size / kPerWord<E> + s.p_size + s.C + kLanes;
      if (size > most) most = size;
    }
    return most;
  }

 private:
  using Scheme = LineScheme<E>;
  static constexpr int kOut = Scheme::kOut, kIn = Scheme::kIn, kProducts = Scheme::kProducts;
  static_assert(kOut == Scheme::kKernel, "groups of taps are as far apart as tiles");
  // Rows of a step: the weights are read once for so many. With the channels of a piece their V
  // leaves room for weights and products in L2. The pieces are the same for any number of lines,
  // and so are the sums.
  static constexpr int64_t kStepRows = 84, kPiece = 256 * kPerWord<E>;
  static constexpr int64_t kTerms = 64;  // products in one sum

  struct Sizes {
    bool vertical;
    int64_t lines, C, length, outputs, pad, tiles, groups, panels, columns;
    int64_t first_tile, last_tile;  // tiles [first, last) see input, the others only padding
    int64_t step, slots;            // tiles of a step and of the ring
    int64_t v_point, v_size, p_point, p_size;

    Sizes(const Conv& conv, int64_t lines)
        : vertical(conv.S == 1),
          lines(lines),
          C(conv.channels()),
          length(vertical ? conv.H : conv.W),
          outputs(vertical ? conv.Ho : conv.Wo),
          pad(vertical ? conv.pad_h : conv.pad_w),
          tiles(ceil_div(outputs, kOut)),
          groups(ceil_div(vertical ? conv.R : conv.S, kOut)),
          panels(ceil_div(groups * conv.K, kPanel)),
          columns(panels * kPanel) {
      first_tile = pad < kIn ? 0 : (pad - kIn) / kOut + 1;
      last_tile = ceil_div(length + pad, kOut);
      if (last_tile > tiles + groups - 1) last_tile = tiles + groups - 1;
      step = kStepRows / lines;
      if (step > last_tile - first_tile) step = last_tile - first_tile;
      if (step < 1) step = 1;
      slots = round_up(groups - 1 + step, step);  // so that the tiles of a step are neighbours
      v_point = (C < kPiece ? C : kPiece) * lines * step + kLine<E>;
      v_size = kProducts * v_point;
      p_point = slots * lines * columns + kGroup;
      p_size = kProducts * p_point;
      if (FASTSEG_ISA_LEVEL == 4) p_size += kRows * kGroup;  // see gemm_tile() in amx_tile.inl
    }

    bool sees_input(int64_t t) const { return t >= first_tile && t < last_tile; }
    // Where the first point of tile t, line 0 begins in P.
    int64_t slot(int64_t t) const { return (t - first_tile) % slots * lines * columns; }
  };

  // Channels [c_begin, c_begin + depth) of tiles [t, stop) of every line to V, block by block of
  // rows of the register tile.
  static void transform_input(const Conv& conv, const Sizes& s, int64_t begin, int64_t t,
                              int64_t stop, int64_t c_begin, int64_t depth, const T* zeros, E* v) {
    const int64_t across = s.vertical ? conv.W : conv.H;
    const int64_t next = s.vertical ? conv.x.row : conv.x.pixel;  // along the line
    const int64_t total = (stop - t) * s.lines, blocks = ceil_div(total, kRows);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = part_begin(total, blocks, i);
      const int64_t rows = part_begin(total, blocks, i + 1) - first;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t tile = t + (first + r) / s.lines, line = begin + (first + r) % s.lines;
        const int64_t n = line / across, at_line = line - n * across;
        const T* start = s.vertical ? conv.x.at(n, 0, at_line) : conv.x.at(n, at_line, 0);
        const T* src[kIn];
        for (int j = 0; j < kIn; ++j) {
          const int64_t at = tile * kOut + j - s.pad;
          src[j] = at < 0 || at >= s.length ? zeros : start + at * next;
        }
        E* dst = v + first * depth + r * kLine<E>;
        for (int64_t c = c_begin; c < c_begin + depth; c += kLine<E>, dst += rows * kLine<E>) {
          for (int64_t l = 0; l < kLine<E>; l += kTogether<E> * kLanes) {
            Vec row[kProducts][kTogether<E>];
#pragma GCC unroll 2
            for (int h = 0; h < kTogether<E>; ++h) {
              const int64_t at = c + l + h * kLanes;
              Vec d[kIn], products[kProducts];
              if (at + kLanes <= conv.C) {
#pragma GCC unroll 16
                for (int j = 0; j < kIn; ++j) d[j] = load(src[j] + at);
              } else {
#pragma GCC unroll 16
                for (int j = 0; j < kIn; ++j) d[j] = load_part(src[j] + at, conv.C - at);
              }
              input_transform(Scheme{}, d, products);
#pragma GCC unroll 16
              for (int j = 0; j < kProducts; ++j) row[j][h] = products[j];
            }
#pragma GCC unroll 16
            for (int j = 0; j < kProducts; ++j) store(dst + j * s.v_point + l, row[j]);
          }
        }
      }
    }
  }

  // The products of channels [c, c + depth) of tiles [t, stop) with the groups that meet them. The
  // blocks share the fetching of the next point's weights.
  static void multiply(const Conv& conv, const Sizes& s, int64_t t, int64_t stop, int64_t c,
                       int64_t depth, const E* v, float* ring) {
    const int64_t total = (stop - t) * s.lines, blocks = ceil_div(total, kRows);
    const int64_t steps = ceil_div(kGroup, blocks);
    for (int64_t panel = 0; panel < s.panels; ++panel) {
      // Group g of tile t belongs to output tile t - g.
      const int64_t left = s.groups * conv.K - panel * kPanel;
      const int64_t first_group = panel * kPanel / conv.K;
      const int64_t last_group = (panel * kPanel + (left < kPanel ? left : kPanel) - 1) / conv.K;
      if (stop - 1 < first_group || t - last_group >= s.tiles) continue;
      for (int64_t point = 0; point < kProducts; ++point) {
        const E* b = conv.weight + ((panel * kProducts + point) * s.C + c) * kPanel;
        int64_t fetched = 0;
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t first = part_begin(total, blocks, i);
          const int64_t rows = part_begin(total, blocks, i + 1) - first;
          float* out = ring + point * s.p_point + s.slot(t) + first * s.columns + panel * kPanel;
          const int64_t open = kGroup - fetched;
          const Ahead<E> ahead{b + (s.C + fetched * depth / kGroup) * kPanel,
                               steps < open ? steps : open};
          fetched += ahead.steps;
          gemm_tile(rows, rows, left < kPanel ? left : kPanel,
                    v + point * s.v_point + first * depth, b, ahead, depth, kTerms,
                    StoreTile{out, c > 0, s.columns});
        }
      }
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
          Vec m[kProducts] = {}, y[kOut];
          for (int64_t g = 0; g < s.groups; ++g) {
            if (!s.sees_input(t + g)) continue;
            const float* p = ring + s.slot(t + g) + line * s.columns + g * conv.K + k + l;
#pragma GCC unroll 16
            for (int j = 0; j < kProducts; ++j) m[j] += load(p + j * s.p_point);
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
