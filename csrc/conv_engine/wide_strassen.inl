// The products of strassen.inl by the wide tile: a pair of blocks is 2 * kWideRows pixels, a pair
// of columns two pairs of panels, packed as for strassen_conv.inl.

template <class Conv>
struct WideStrassenKernel {
  static constexpr int64_t kPixels = 2 * kWideRows;
  static constexpr int64_t kColumns = 2 * kWideColumns;

  struct Pair {
    int64_t first, rows[2];          // pixels: the first, and those of either block
    WideRun<float> x[2];             // all channels of both blocks of the one and the other image
    float* made[kStrassenProducts];  // left operands that do not lie in the images
    alignas(64) float u[kWideSums], v[kWideSums], w[kWideSums];
  };

  // The last pair shall not be mostly empty where there are few of them.
  static bool fits(const Conv& conv) {
    return conv.K % kColumns == 0 && 8 * pairs(conv) * kPixels <= 9 * conv.pixels();
  }
  static int64_t pairs(const Conv& conv) { return ceil_div(conv.pixels(), kPixels); }
  static int64_t pair_bytes() { return sizeof(Pair); }
  // Floats of the operands of a pair, and of copies of its pixels, which most need not.
  static int64_t operands_size(const Conv& conv) {
    return kStrassenSums * kWideRows * operand_row(conv);
  }
  static int64_t copy_size(const Conv& conv) { return kPixels * (conv.C + conv.C2); }

  // Pairs of blocks [begin, end), pairs of columns [column_begin, column_end). Each product of all
  // pairs of blocks follows the one before, so that the weights pass by once.
  static void run(const Conv& conv, int64_t begin, int64_t end, int64_t column_begin,
                  int64_t column_end, float* memory, void* pair_memory) {
    Pair* pairs = static_cast<Pair*>(pair_memory);
    const int64_t count = end - begin;
    const bool in_place = reads_flat(conv), writes = writes_flat(conv) && ends_wide(conv);
    for (int64_t i = 0; i < count; ++i) {
      place(conv, begin + i, in_place, memory, pairs[i]);
      memory += operands_size(conv) + copy_size(conv);
    }
    // Each turn of a pair fetches its share of the next weights.
    const int64_t lines = ceil_div(2 * kWideSteps, count);
    const int64_t share = lines * half(conv) / kWideSteps * kGroup;
    for (int64_t column = column_begin; column < column_end; ++column) {
      for (int product = 0; product < kStrassenProducts; ++product) {
        const bool further = product + 1 < kStrassenProducts;
        const int64_t next_column = column + 1 < column_end ? column + 1 : column_begin;
        const float* ahead =
            weights(conv, further ? column : next_column, further ? product + 1 : 0);
        for (int64_t i = 0; i < count; ++i) {
          WideTile<float> tile{};
          if (writes && (i + 1 < count || further)) {
            const bool next = i + 1 == count;
            fetch_outputs(conv, pairs[next ? 0 : i + 1], column, product + next, tile);
          }
          tile.lines = i * share < half(conv) * kPanel ? lines : 0;
          tile.ahead[0] = ahead + i * share;
          tile.ahead[1] = tile.ahead[0] + panel_distance(conv);
          multiply(conv, pairs[i], column, product, writes, tile);
        }
      }
    }
  }

 private:
  static int64_t half(const Conv& conv) { return (conv.C + conv.C2) / 2; }
  // A line more than it needs to be, so that rows do not fall on the same cache sets.
  static int64_t operand_row(const Conv& conv) { return half(conv) + kGroup; }
  static int64_t panel_distance(const Conv& conv) {
    return kStrassenProducts * half(conv) * kPanel;
  }
  static const float* weights(const Conv& conv, int64_t column, int product) {
    return conv.weight + 2 * column * panel_distance(conv) + product * half(conv) * kPanel;
  }
  static int64_t channel(int64_t column, int product) {
    return column * kColumns + kStrassen[product].right * kPanel;
  }

  static void place(const Conv& conv, int64_t index, bool in_place, float* memory, Pair& pair) {
    pair.first = index * kPixels;
    const int64_t rows = std::min(conv.pixels() - pair.first, kPixels);
    pair.rows[0] = std::min<int64_t>(rows, kWideRows);
    pair.rows[1] = rows - pair.rows[0];
    const int64_t row = operand_row(conv), part = kWideRows * row;
    for (int i = 0; i < kStrassenProducts; ++i) {
      const bool lies_there = i == kUpperLeft || i == kLowerRight;
      pair.made[i] = lies_there ? nullptr : memory;
      if (!lies_there) memory += part;
    }
    if (in_place && rows == kPixels) {
      const int64_t x_row = conv.flat_stride();
      pair.x[0] = {conv.x.data + pair.first * x_row, x_row, conv.C};
      pair.x[1] = {conv.C2 ? conv.x2.data + pair.first * conv.x2.pixel : nullptr, conv.x2.pixel,
                   conv.C2};
    } else {
      pair.x[0] = {memory, conv.C, conv.C};
      pair.x[1] = {memory + kPixels * conv.C, conv.C2, conv.C2};
      std::memset(memory, 0, copy_size(conv) * sizeof *memory);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t line = (pair.first + r) / conv.Wo, ox = (pair.first + r) % conv.Wo;
        const int64_t n = line / conv.Ho, oy = line % conv.Ho;
        copy_run(conv.x.at(n, oy * conv.stride_h, ox * conv.stride_w), memory + r * conv.C, conv.C);
        if (!conv.C2) continue;
        float* to = memory + kPixels * conv.C + r * conv.C2;
        copy_run(conv.summand(n, oy, ox), to, conv.C2);
      }
    }
    for (int64_t r = 0; r < kWideRows; ++r) {
      int64_t at = r * row;
      for (const WideRun<float>& x : pair.x) {
        const float *upper = x.data + r * x.row, *lower = upper + kWideRows * x.row;
        const int64_t n = x.length / 2;
        strassen_sums(upper, upper + n, lower, lower + n, n, pair.made, at);
        at += n;
      }
    }
  }

  // What a product adds to and writes is fetched meanwhile.
  static void fetch_outputs(const Conv& conv, const Pair& pair, int64_t column, int product,
                            WideTile<float>& tile) {
    const bool lower = kStrassen[product].lower;
    if (!kStrassen[product].writes || pair.rows[lower] < kWideRows) return;
    const int64_t first = pair.first + lower * kWideRows, k = channel(column, product);
    if (conv.residual.data) {
      const int64_t row = flat_pixel(conv, conv.residual);
      tile.next_residual = {conv.residual.data + first * row + k, row, kWideColumns};
    }
    if (conv.residual.data != conv.y.data) {
      const int64_t row = flat_pixel(conv, conv.y);
      tile.next_y = {conv.y.data + first * row + k, row, kWideColumns};
    }
  }

  static void multiply(const Conv& conv, Pair& pair, int64_t column, int product, bool writes,
                       WideTile<float>& tile) {
    const bool lower = kStrassen[product].lower;
    const int64_t rows = pair.rows[lower];
    if (rows == 0) return;
    const float* made = pair.made[product];
    for (int i = 0; i < 2; ++i) {
      const int64_t n = pair.x[i].length / 2;
      if (made) {
        tile.runs[i] = {made, operand_row(conv), n};
        made += n;
      } else {
        const float* upper = pair.x[i].data;
        const float* block = lower ? upper + kWideRows * pair.x[i].row + n : upper;
        tile.runs[i] = {block, pair.x[i].row, n};
      }
    }
    tile.left = weights(conv, column, product);
    tile.right = tile.left + panel_distance(conv);
    switch (product) {
      case 0:
        tile.sums = pair.u;
        return wide_tile(tile);
      case 1:
        tile.sums = pair.v, tile.to = pair.w, tile.from = pair.u, tile.sign = 1;
        return wide_tile(tile);
      case 3:
        tile.sums = pair.v, tile.from = tile.to = pair.w, tile.sign = -1;
        return wide_tile(tile);
      case 2:
      case 4:
        tile.base = pair.v, tile.from = tile.to = pair.u, tile.sign = product == 2 ? -1 : 1;
        break;
      default:
        tile.base = product == 5 ? pair.u : pair.w;
    }
    const int64_t k = channel(column, product), first = pair.first + lower * kWideRows;
    tile.bias = conv.bias + k;
    if (!writes || rows < kWideRows) return multiply_part(conv, first, rows, k, tile);
    const int64_t y_row = flat_pixel(conv, conv.y);
    tile.y = {conv.y.data + first * y_row + k, y_row, kWideColumns};
    set_bounds(tile, conv);
    if (conv.residual.data) {
      const int64_t row = flat_pixel(conv, conv.residual);
      tile.residual = {conv.residual.data + first * row + k, row, kWideColumns};
    }
    wide_tile(tile);
  }

  // A tile of fewer rows, of pixels that do not follow each other or of another end, by way of
  // memory.
  __attribute__((noinline)) static void multiply_part(const Conv& conv, int64_t first, int64_t rows,
                                                      int64_t k, WideTile<float>& tile) {
    alignas(64) float part[kWideSums] = {};
    const auto each_pixel = [&](auto&& fn) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t line = (first + r) / conv.Wo, ox = (first + r) % conv.Wo;
        const int64_t n = line / conv.Ho, oy = line % conv.Ho;
        for (int64_t panel = 0; panel < 2; ++panel) {
          fn(n, oy, ox, k + panel * kWideColumns, part + r * kWideColumns + panel * kPanel);
        }
      }
    };
    const bool adds_last = conv.residual.data && conv.residual_last;
    if (conv.residual.data && !adds_last) {
      each_pixel([&](int64_t n, int64_t oy, int64_t ox, int64_t channel, float* to) {
        copy_run(conv.residual.at(n, oy, ox) + channel, to, kPanel);
      });
      tile.residual = {part, kWideColumns, kPanel};
    }
    alignas(64) float bias[kWideColumns];
    copy_run(tile.bias, bias, kPanel);
    copy_run(tile.bias + kWideColumns, bias + kPanel, kPanel);
    tile.bias = bias;
    tile.y = {part, kWideColumns, kPanel};
    tile.low = -__builtin_inff(), tile.high = __builtin_inff();
    wide_tile(tile);
    each_pixel([&](int64_t n, int64_t oy, int64_t ox, int64_t channel, const float* from) {
      for (int64_t c = 0; c < kPanel; c += kLanes) {
        Vec sum = activate(load(from + c), conv.activation, conv.slope);
        if (adds_last) sum += load(conv.residual.at(n, oy, ox) + channel + c);
        store(conv.y.at(n, oy, ox) + channel + c, sum);
      }
    });
  }
};
