// 3x3 convolution of stride 1 and any dilation by Winograd F(m x m, 3 x 3) on the tiles of
// winograd.h, of two lengths along each axis. They are grouped in blocks of up to kRows: the rows
// of a register tile, of which those take part in a point whose shape has it.
//   V (transformed input) of a piece of C, point and block: [C / kLine][rows][kLine]
//   packed weight: [piece][point][panel][C / kPerWord, of whole lines][kPanel][kPerWord]
//   M (products) of a point: [tile][output channel]
// Of a single piece of channels M of a point takes the place of V of the point before, whose
// lines are still near: that is half of the memory. Points of V and M, and tiles of M, lie a cache
// line further apart than they need to, so that they do not fall on the same cache sets.

// fn(0), ..., fn(n - 1). The transform along one axis of a tile that does not fit in registers is
// one piece of code for all its rows: that is as fast and compiles in half of the time.
template <int n, bool kInRegisters, class Fn>
FASTSEG_INLINE void for_rows(const Fn& fn) {
  if constexpr (kInRegisters) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) fn(i);
  } else {
#pragma GCC unroll 1
    for (int i = 0; i < n; ++i) fn(i);
  }
}

template <class Pair, class Conv>
struct WinogradKernel {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;
  using Result = typename Conv::Result;

  // A task from input to output: no other thread waits for it. The points come one after the other,
  // so that V and M, which may be larger than L2, pass through it once, and a point's V and weights
  // are there while all panels and blocks use them. With panels outermost every one of them read
  // all of V again: one thread took 51 instead of 31 ms for 512 channels. The blocks share the
  // fetching of the next panel: when each of them asked for all of it, the first one waited for L3
  // (160 instead of 195 GFLOP/s).
  static void run(const Conv& conv, const TileGrid& grid, const WinogradTask& task,
                  float* scratch) {
    const int64_t C = conv.channels(), begin = task.begin, row_size = task.row_size();
    const Places places(conv, task);
    const int64_t v_point = places.v_point * kPerWord<E>, m_point = places.m_point;
#if FASTSEG_ISA_LEVEL == 4
    const TileRegisters amx_tiles(kTileRows);
#endif
    E* v = reinterpret_cast<E*>(scratch + places.v);
    float* m = scratch + places.m;
    T* zeros = reinterpret_cast<T*>(scratch + places.end);
    for (int64_t c = 0; c < C; ++c) zeros[c] = 0;
    Run* parts = reinterpret_cast<Run*>(scratch + places.end + C);
    Run* runs = parts + most_parts(task.tiles());
    const int64_t count = cut(grid, begin, task.end, parts);
    for (int64_t c = 0, depth; c < C; c += depth) {
      depth = C - c < winograd_piece<E>(C) ? C - c : winograd_piece<E>(C);
      for (int64_t i = 0; i < count; ++i) {
        with_tiles(parts[i].shape, [&](auto y, auto x) {
          const auto transform = conv.x_codes.data
                                     ? transform_input<UnpooledPixel<T>, decltype(y), decltype(x)>
                                     : transform_input<PlainPixel<T>, decltype(y), decltype(x)>;
          transform(y, x, conv, grid, parts[i], c, c + depth, zeros,
                    v + parts[i].operands(begin, depth), v_point);
        });
      }
      int64_t takers = 0;
      for (int64_t point = 0; point < kPoints; ++point) {
        if (point == 0 || kShapes.of[point] != kShapes.of[point - 1]) {
          takers = join(parts, count, kShapes.of[point], runs);
        }
        const int64_t steps = takers > 0 ? ceil_div(kGroup, takers) : 0;
        const E* weight = conv.weight + (c * kPoints + point * depth) * conv.panels() * kPanel;
        for (int64_t panel = task.first_panel; panel < task.last_panel; ++panel) {
          const bool last = panel + 1 == task.last_panel;  // the next point's are next
          const E* b = weight + panel * depth * kPanel;
          const E* next =
              weight + (last ? conv.panels() + task.first_panel : panel + 1) * depth * kPanel;
          int64_t fetched = 0;  // steps of the next panel
          for (int64_t j = 0; j < takers; ++j) {
            const Run& run = runs[j];
            const int64_t left = kGroup - fetched;
            const Ahead<E> ahead{next + fetched * depth / kGroup * kPanel,
                                 steps < left ? steps : left};
            fetched += ahead.steps;
            float* products = m + point * m_point + (run.first - begin) * row_size +
                              (panel - task.first_panel) * kPanel;
            gemm_tile(run.rows, run.stride, columns(conv, panel * kPanel),
                      v + point * v_point + run.operands(begin, depth), b, ahead, depth, terms(C),
                      StoreTile{products, c > 0, row_size});
          }
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      with_tiles(parts[i].shape, [&](auto y, auto x) {
        transform_output(y, x, conv, grid, task, parts[i], m + (parts[i].first - begin) * row_size,
                         m_point);
      });
    }
    if (conv.stream) stream_fence();
  }

  // Floats of scratch memory that run() needs for a task of that size.
  static int64_t scratch_size(const Conv& conv, const WinogradTask& task) {
    constexpr int64_t kRunSize = sizeof(Run) / sizeof(float);
    return Places(conv, task).end + conv.channels() + 2 * most_parts(task.tiles()) * kRunSize;
  }

 private:
  static constexpr int kProducts = Pair::kProducts, kPoints = kProducts * kProducts;
  static constexpr PointShapes<Pair> kShapes{};
  static constexpr bool kInRegisters = FASTSEG_ISA_LEVEL >= 1 && Pair::Long::kIn <= 4;
  static constexpr bool kPools = std::is_same_v<Result, T>;
  static constexpr int64_t kFar = 1 << 20;  // bytes of products that are not in L2 any more

  // Tiles of one block that follow each other.
  struct Run {
    int64_t shape;          // of the first
    int64_t first, rows;    // tiles
    int64_t block, stride;  // the first tile of the block and how many it has

    // Where their operands begin in V, whose first tile is `begin`.
    int64_t operands(int64_t begin, int64_t depth) const {
      return (block - begin) * depth + (first - block) * kLine<E>;
    }
  };

  // Cuts tiles [begin, end) into blocks and these into parts of one shape; returns how many.
  static int64_t cut(const TileGrid& grid, int64_t begin, int64_t end, Run* parts) {
    int64_t count = 0;
    const int64_t blocks = ceil_div(end - begin, kRows);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = begin + part_begin(end - begin, blocks, i);
      const int64_t last = begin + part_begin(end - begin, blocks, i + 1);
      for (int shape = 0; shape < 4; ++shape) {
        const int64_t from = first > grid.begin[shape] ? first : grid.begin[shape];
        const int64_t to = last < grid.begin[shape + 1] ? last : grid.begin[shape + 1];
        if (from < to) parts[count++] = {shape, from, to - from, first, last - first};
      }
    }
    return count;
  }
  static int64_t most_parts(int64_t tiles) { return ceil_div(tiles, kRows) + 3; }

  // The parts of those shapes in as few runs as their blocks allow; returns how many.
  static int64_t join(const Run* parts, int64_t count, int64_t shapes, Run* runs) {
    int64_t joined = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!(shapes >> parts[i].shape & 1)) continue;
      Run* last = joined > 0 ? &runs[joined - 1] : nullptr;
      if (last && last->block == parts[i].block && last->first + last->rows == parts[i].first) {
        last->rows += parts[i].rows;
      } else {
        runs[joined++] = parts[i];
      }
    }
    return joined;
  }

  // fn(tile in y, tile in x) of a shape.
  template <class Fn>
  static void with_tiles(int64_t shape, const Fn& fn) {
    using Long = typename Pair::Long;
    using Short = typename Pair::Short;
    switch (shape) {
      case 0:
        return fn(Long{}, Short{});
      case 1:
        return fn(Long{}, Long{});
      case 2:
        return fn(Short{}, Long{});
      default:
        return fn(Short{}, Short{});
    }
  }

  // Where V and M begin in the scratch memory and end, and the distances of their points, in
  // floats.
  struct Places {
    int64_t v, m, end, v_point, m_point;

    Places(const Conv& conv, const WinogradTask& task) {
      const int64_t C = conv.channels(), piece = winograd_piece<E>(C);
      v_point = task.tiles() * piece / kPerWord<E> + kGroup;
      m_point = task.tiles() * task.row_size() + kGroup;
      if (piece == C) {
        v = v_point = m_point = v_point > m_point ? v_point : m_point;
        m = 0;
        end = (kPoints + 1) * v_point;
      } else {
        v = 0;
        m = kPoints * v_point;
        end = m + kPoints * m_point;
      }
      if (FASTSEG_ISA_LEVEL == 4) end += kRows * kGroup;  // see gemm_tile() in amx_tile.inl
    }
  };
  // Products in one sum, by how much the transforms of the result amplify its error.
  static int64_t terms(int64_t C) { return Pair::kOut < 6 ? 64 : C > 32 ? 32 : 16; }
  static int64_t columns(const Conv& conv, int64_t k) {
    return conv.K - k < kPanel ? conv.K - k : kPanel;
  }

  static int64_t first_point(const Run& part) {
    return Pair::kFirst[TileGrid::kShortY[part.shape]] * kProducts +
           Pair::kFirst[TileGrid::kShortX[part.shape]];
  }

  // Where the outputs of a tile begin, from the first of a part on.
  struct Corner {
    const TileAxis &axis_y, &axis_x;
    int length_y, length_x;
    int64_t in_y, in_x;      // tiles of an image
    int64_t tile_y, tile_x;  // this one among them
    int64_t n, y, x;

    Corner(const TileGrid& grid, const Run& part)
        : axis_y(grid.y),
          axis_x(grid.x),
          length_y(TileGrid::kShortY[part.shape]),
          length_x(TileGrid::kShortX[part.shape]),
          in_y(grid.y.count(length_y)),
          in_x(grid.x.count(length_x)) {
      const int64_t tile = part.first - grid.begin[part.shape], row = tile / in_x;
      n = row / in_y;
      tile_y = row - n * in_y;
      tile_x = tile - row * in_x;
      y = axis_y.first(length_y, tile_y);
      x = axis_x.first(length_x, tile_x);
    }
    void next() {
      if (++tile_x == in_x) {
        tile_x = 0;
        if (++tile_y == in_y) tile_y = 0, ++n;
        y = axis_y.first(length_y, tile_y);
      }
      x = axis_x.first(length_x, tile_x);
    }
  };

  // Channels [c_begin, c_end) of a part to V; input pixels outside the image are read from
  // `zeros`.
  template <class Pixel, class Y, class X>
  static void transform_input(Y tile_y, X tile_x, const Conv& conv, const TileGrid& grid,
                              const Run& part, int64_t c_begin, int64_t c_end, const T* zeros, E* v,
                              int64_t point_stride) {
    const int64_t stride = part.stride;
    v += first_point(part) * point_stride;
    Corner corner(grid, part);
    for (int64_t r = 0; r < part.rows; ++r, corner.next()) {
      const int64_t x0 = corner.x - conv.pad_w + X::kOffset * conv.dilation_w;
      const int64_t y0 = corner.y - conv.pad_h + Y::kOffset * conv.dilation_h;
      int64_t c = c_begin;
      if (Pixel::in_window(conv, y0, x0, Y::kIn, X::kIn)) {
        const auto src = Pixel::window(conv, corner.n, y0, x0);
        for (; c < c_end && c + kLine<E> <= conv.C; c += kLine<E>) {
          E* dst = v + (c - c_begin) * stride + r * kLine<E>;
          fetch_next<Y, X>(src, c);
          transform_group(tile_y, tile_x, src, c, dst, point_stride);
        }
      }
      if (c == c_end) continue;
      Pixels<Pixel, Y::kIn, X::kIn> src;
      for (int i = 0; i < Y::kIn; ++i) {
        for (int j = 0; j < X::kIn; ++j) {
          const int64_t y = y0 + i * conv.dilation_h, x = x0 + j * conv.dilation_w;
          const bool inside = y >= 0 && y < conv.H && x >= 0 && x < conv.W;
          src.at[i][j] = inside ? Pixel::at(conv, corner.n, y, x) : Pixel::of(zeros);
        }
      }
      for (; c < c_end; c += kLine<E>) {
        E* dst = v + (c - c_begin) * stride + r * kLine<E>;
        if (c + kLine<E> <= conv.C) {
          fetch_next<Y, X>(src, c);
          transform_group(tile_y, tile_x, src, c, dst, point_stride);
        } else {  // C is not a whole number of groups
          alignas(64) T last[Y::kIn * X::kIn][kLine<E>] = {};
          for (int i = 0; i < Y::kIn * X::kIn; ++i) {
            for (int64_t l = 0; l < conv.C - c; ++l) {
              last[i][l] = src.at[i / X::kIn][i % X::kIn].value(c + l);
            }
          }
          const Window<T> padded{last[0], X::kIn * kLine<E>, kLine<E>};
          transform_group(tile_y, tile_x, padded, 0, dst, point_stride);
        }
      }
    }
  }

  // The line of channels behind c: rows of pixels are more than the hardware follows, 1 to 5 %.
  template <class Y, class X, class Source>
  static void fetch_next(const Source& src, int64_t c) {
    for (int i = 0; i < Y::kIn; i += Source::kStep) {
      for (int j = 0; j < X::kIn; j += Source::kStep) {
        fetch_line(src.values_of(i, j) + c + kLine<E>);
      }
    }
  }

  // A line of channels of one tile.
  template <class Source, class Y, class X>
  static void transform_group(Y tile_y, X tile_x, const Source& src, int64_t c, E* dst,
                              int64_t point_stride) {
    constexpr int kCount = kTogether<E>;
    for (int64_t l = 0; l < kLine<E>; l += kCount * kLanes) {
      Vec columns[kCount][Y::kProducts][X::kIn];
#pragma GCC unroll 2
      for (int h = 0; h < kCount; ++h) {
        for_rows<X::kIn, kInRegisters>([&](int j) __attribute__((always_inline)) {
          Vec d[Y::kIn], v[Y::kProducts];
          src.column(j, c + l + h * kLanes, d);
          input_transform(tile_y, d, v);
#pragma GCC unroll 8
          for (int i = 0; i < Y::kProducts; ++i) columns[h][i][j] = v[i];
        });
      }
      for_rows<Y::kProducts, kInRegisters>([&](int i) __attribute__((always_inline)) {
        Vec row[X::kProducts][kCount];
#pragma GCC unroll 2
        for (int h = 0; h < kCount; ++h) {
          Vec v[X::kProducts];
          input_transform(tile_x, columns[h][i], v);
#pragma GCC unroll 8
          for (int j = 0; j < X::kProducts; ++j) row[j][h] = v[j];
        }
        E* to = dst + i * kProducts * point_stride + l;
        asm("" : "+r"(to));  // else every point takes an address of its own, kept on the stack
#pragma GCC unroll 8
        for (int j = 0; j < X::kProducts; ++j) store(to + j * point_stride, row[j]);
      });
    }
  }

  // Copies: a store to the image could change the originals, for all that the compiler knows.
  struct Epilogue {
    using Storage = T;
    using Result = typename Conv::Result;
    Activation activation;
    float slope;
    bool residual_last, stream;
  };

  // Products of a part to output pixels.
  template <class Y, class X>
  static void transform_output(Y tile_y, X tile_x, const Conv& conv, const TileGrid& grid,
                               const WinogradTask& task, const Run& part, const float* m,
                               int64_t point_stride) {
    m += first_point(part) * point_stride;
    // Halves of a line of bfloat16 that a whole tile comes between are not written past the caches.
    const bool whole =
        sizeof(Result) == sizeof(float) || (kTogether<Result> == 2 && !conv.pooled.data);
    const Epilogue epilogue{conv.activation, conv.slope, conv.residual_last, conv.stream && whole};
    const int64_t y_row = conv.dilation_h * conv.y.row, y_pixel = conv.dilation_w * conv.y.pixel;
    const int64_t r_row = conv.dilation_h * conv.residual.row;
    const int64_t r_pixel = conv.dilation_w * conv.residual.pixel;
    const int64_t first = task.first_panel * kPanel, row_size = task.row_size();
    const int64_t stop = task.last_panel * kPanel < conv.K ? task.last_panel * kPanel : conv.K;
    const bool far = kPoints * point_stride * int64_t{sizeof(float)} > kFar;
    Corner corner(grid, part);
    for (int64_t r = 0; r < part.rows; ++r, m += row_size, corner.next()) {
      const bool inside = corner.y + (Y::kOut - 1) * conv.dilation_h < conv.Ho &&
                          corner.x + (X::kOut - 1) * conv.dilation_w < conv.Wo;
      Result* y0 = inside && conv.y.data ? conv.y.at(corner.n, corner.y, corner.x) : nullptr;
      const T* residual0 =
          inside && conv.residual.data ? conv.residual.at(corner.n, corner.y, corner.x) : nullptr;
      for (int64_t k = first; k < stop; k += kPanel) {
        const float* products = m + k - first;
        if (inside && conv.pooled.data && columns(conv, k) % kLanes == 0) {
          for (int64_t l = 0; l < columns(conv, k); l += kLanes) {
            pool_channels(tile_y, tile_x, conv, epilogue, corner, k + l, products + l,
                          point_stride);
          }
          continue;
        }
        constexpr int kCount = kTogether<Result>;
        if (inside && !conv.pooled.data && columns(conv, k) % (kCount * kLanes) == 0) {
          for (int64_t l = 0; l < columns(conv, k); l += kCount * kLanes) {
            Vec bias[kCount];
#pragma GCC unroll 2
            for (int h = 0; h < kCount; ++h) bias[h] = load(conv.bias + k + l + h * kLanes);
            for (int i = 0; far && i < Y::kProducts; ++i) {
              const float* next = products + l + kCount * kLanes + i * kProducts * point_stride;
              for (int j = 0; j < X::kProducts; ++j) fetch_line(next + j * point_stride);
            }
            Result* y = y0 + k + l;
            const T* residual = residual0 ? residual0 + k + l : nullptr;
            inverse_transform<kCount>(
                tile_y, tile_x, products + l, point_stride, [&](int i, int j, Vec(&v)[kCount]) {
#pragma GCC unroll 2
                  for (int h = 0; h < kCount; ++h) {
                    Vec added{};
                    if (residual) added = load(residual + i * r_row + j * r_pixel + h * kLanes);
                    v[h] = finish(epilogue, v[h], bias[h], added);
                  }
                  Result* to = y + i * y_row;
                  asm("" : "+r"(to));  // as above
                  store_output(epilogue, v, to + j * y_pixel);
                });
          }
          continue;
        }
        alignas(64) float sums[Y::kOut][X::kOut][kPanel];
        for (int64_t l = 0; l < columns(conv, k); l += kLanes) {
          inverse_transform<1>(tile_y, tile_x, products + l, point_stride,
                               [&](int i, int j, const Vec(&v)[1]) { store(sums[i][j] + l, v); });
        }
        if constexpr (Y::kOut % 2 == 0 && X::kOut % 2 == 0 && kPools) {
          if (conv.pooled.data) {
            pool_tile<Y::kOut>(conv, corner.n, corner.y, corner.x, k, columns(conv, k), sums);
            continue;
          }
        }
        for (int i = 0; i < Y::kOut && corner.y + i * conv.dilation_h < conv.Ho; ++i) {
          for (int j = 0; j < X::kOut && corner.x + j * conv.dilation_w < conv.Wo; ++j) {
            const int64_t oy = corner.y + i * conv.dilation_h;
            const int64_t ox = corner.x + j * conv.dilation_w;
            finish_pixel(conv, k, columns(conv, k), sums[i][j], conv.y.at(corner.n, oy, ox),
                         conv.residual.data ? conv.residual.at(corner.n, oy, ox) : nullptr);
          }
        }
      }
    }
  }

  // kLanes channels of one tile, whose windows are all whole, to pooled pixels.
  template <class Y, class X>
  static void pool_channels(Y tile_y, X tile_x, const Conv& conv, const Epilogue& epilogue,
                            const Corner& corner, int64_t channel, const float* m,
                            int64_t point_stride) {
    if constexpr (Y::kOut % 2 == 0 && X::kOut % 2 == 0 && kPools) {
      const auto at = [&](auto image, int64_t y, int64_t x) {
        return image.data ? image.at(corner.n, y, x) + channel : nullptr;
      };
      const Image<T> image = conv.y, pooled_image = conv.pooled;
      const Image<const T> residual_image = conv.residual;
      const Image<uint8_t> code_image = conv.codes;
      T* y = at(image, corner.y, corner.x);
      const T* residual = at(residual_image, corner.y, corner.x);
      T* pooled = at(pooled_image, corner.y / 2, corner.x / 2);
      uint8_t* codes = at(code_image, corner.y / 2, corner.x / 2);
      const Vec bias = load(conv.bias + channel);
      Vec row[2][X::kOut];
      inverse_transform<1>(tile_y, tile_x, m, point_stride, [&](int i, int j, const Vec(&sum)[1]) {
        Vec added{};
        if (residual) added = load(residual + i * residual_image.row + j * residual_image.pixel);
        const Vec v = rounded<T>(finish(epilogue, sum[0], bias, added));
        if (y) store_output(epilogue, v, y + i * image.row + j * image.pixel);
        row[i % 2][j] = v;
        if (i % 2 == 0 || j % 2 == 0) return;
        pool_window(row[0][j - 1], row[0][j], row[1][j - 1], v,
                    pooled + i / 2 * pooled_image.row + j / 2 * pooled_image.pixel,
                    codes ? codes + i / 2 * code_image.row + j / 2 * code_image.pixel : nullptr);
      });
    }
  }

  // kCount * kLanes channels of one tile.
  template <int kCount, class Y, class X, class Out>
  FASTSEG_INLINE void inverse_transform(Y tile_y, X tile_x, const float* m, int64_t point_stride,
                                        const Out& out) {
    Vec half[kCount][Y::kOut][X::kProducts];
    for_rows<X::kProducts, kInRegisters>([&](int j) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int h = 0; h < kCount; ++h) {
        Vec p[Y::kProducts], y[Y::kOut];
        const float* column = m + j * point_stride + h * kLanes;
        asm("" : "+r"(column));
#pragma GCC unroll 8
        for (int i = 0; i < Y::kProducts; ++i) p[i] = load(column + i * kProducts * point_stride);
        output_transform(tile_y, p, y);
#pragma GCC unroll 8
        for (int i = 0; i < Y::kOut; ++i) half[h][i][j] = y[i];
      }
    });
    for_rows<Y::kOut, kInRegisters>([&](int i) __attribute__((always_inline)) {
      Vec row[X::kOut][kCount];
#pragma GCC unroll 2
      for (int h = 0; h < kCount; ++h) {
        Vec y[X::kOut];
        output_transform(tile_x, half[h][i], y);
#pragma GCC unroll 8
        for (int j = 0; j < X::kOut; ++j) row[j][h] = y[j];
      }
#pragma GCC unroll 8
      for (int j = 0; j < X::kOut; ++j) out(i, j, row[j]);
    });
  }
};
