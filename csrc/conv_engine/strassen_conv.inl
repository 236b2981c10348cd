// 1x1 convolutions as a matrix product by strassen.inl: rows are output pixels, the reduction is
// the channels, a pair of panels is 2 * kPanel output channels side by side.
// Packed weight: [pair of panels][product][C / 2][kPanel].

template <class Conv>
struct StrassenKernel {
  using T = typename Conv::Storage;

  // An upper and a lower block of pixels, and where the products read.
  struct Pair {
    int64_t rows[2];
    const T* x[2 * kRows];
    Patch<float> operands[kStrassenProducts];
    PixelAddress<T> pixels[2][kRows];
    StrassenSums sums;
  };

  static int64_t pairs(const Conv& conv) { return ceil_div(conv.pixels(), 2 * kRows); }
  static int64_t pair_bytes() { return sizeof(Pair); }
  // Floats of the operands of a pair that do not lie in the image.
  static int64_t operands_size(const Conv& conv) {
    return (in_place(conv) ? kStrassenSums : kStrassenProducts) * kRows * operand_row(conv);
  }

  // Pairs of pixel blocks [begin, end), pairs of panels [panel_begin, panel_end). Each product of
  // all pairs of blocks follows the one before, so that the weights pass by once. `next` is the
  // pair with which the next task of the thread probably begins: its pixels come to L2 meanwhile.
  static void run(const Conv& conv, int64_t begin, int64_t end, int64_t next, int64_t panel_begin,
                  int64_t panel_end, float* operands, void* memory) {
    Pair* pairs = static_cast<Pair*>(memory);
    const int64_t count = end - begin, size = operands_size(conv);
    for (int64_t i = 0; i < count; ++i) {
      place(conv, begin + i, pairs[i]);
      prepare(conv, operands + i * size, pairs[i]);
    }
    const int64_t part = conv.C / 4 * kPanel;  // what one turn of a pair fetches
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int product = 0; product < kStrassenProducts; ++product) {
        for (int64_t i = 0; i < count; ++i) {
          if (i + 1 < count) {
            fetch_pixels(conv, pairs[i + 1], panel, product);
          } else if (product + 1 < kStrassenProducts) {
            fetch_pixels(conv, pairs[0], panel, product + 1);
          }
          // Half of the weights of the next product in the turn of each of two pairs.
          const void* ahead = weights(conv, panel, product + 1) + (i & 1) * part;
          if (panel + 1 == panel_end) {
            const int64_t turn = product * count + i;
            if (product < 4) {
              ahead = pixel(conv, part_begin(conv.pixels(), StrassenKernel::pairs(conv), next)) +
                      turn * part;
            } else {
              ahead = weights(conv, panel_begin, 0) + (turn - 4 * count) * part;
            }
          }
          multiply(conv, pairs[i], panel, product, {static_cast<const char*>(ahead), 0});
        }
      }
    }
    if (conv.stream) stream_fence();
  }

 private:
  // Whether A11, A12 and A22 can be read where they lie.
  static bool in_place(const Conv& conv) { return std::is_same_v<T, float> && conv.is_pointwise(); }
  // A line more than it needs to be, so that rows do not fall on the same cache sets.
  static int64_t operand_row(const Conv& conv) { return conv.C / 2 + kGroup; }

  static const float* weights(const Conv& conv, int64_t panel, int64_t product) {
    return conv.weight + (panel * kStrassenProducts + product) * conv.C / 2 * kPanel;
  }

  // What output pixel number `index` reads.
  static const T* pixel(const Conv& conv, int64_t index) {
    const int64_t line = index / conv.Wo, ox = index % conv.Wo;
    return conv.x.at(line / conv.Ho, line % conv.Ho * conv.stride_h, ox * conv.stride_w);
  }

  static void place(const Conv& conv, int64_t index, Pair& pair) {
    const int64_t pairs = StrassenKernel::pairs(conv);
    const int64_t first = part_begin(conv.pixels(), pairs, index);
    const int64_t rows = part_begin(conv.pixels(), pairs, index + 1) - first;
    pair.rows[0] = ceil_div(rows, 2);
    pair.rows[1] = rows / 2;
    int64_t line = first / conv.Wo, ox = first % conv.Wo;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = line / conv.Ho, oy = line % conv.Ho;
      PixelAddress<T>& to = pair.pixels[r >= pair.rows[0]][r % pair.rows[0]];
      to.y = conv.y.at(n, oy, ox);
      to.residual = conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr;
      pair.x[r] = conv.x.at(n, oy * conv.stride_h, ox * conv.stride_w);
      if (++ox == conv.Wo) ox = 0, ++line;
    }
  }

  // The left operands.
  static void prepare(const Conv& conv, float* buffer, Pair& pair) {
    const int64_t half = conv.C / 2, row = operand_row(conv), upper = pair.rows[0];
    float* made[kStrassenProducts] = {};
    for (const int operand : {2, 3, 5, 6}) made[operand] = buffer, buffer += kRows * row;
    if (!in_place(conv)) {
      for (const int operand : {0, 1, 4}) made[operand] = buffer, buffer += kRows * row;
    }
    for (int i = 0; i < kStrassenProducts; ++i) {
      pair.operands[i] = {made[i], row, 0, 0, 1, 1, half};
    }
    for (int64_t r = 0; r < upper; ++r) {
      const T* above = pair.x[r];
      const T* below = r < pair.rows[1] ? pair.x[upper + r] : nullptr;
      strassen_sums(above, above + half, below, below ? below + half : nullptr, half,
                    made[5] + r * row, made[2] + r * row, made[3] + r * row, made[6] + r * row);
      if (made[0]) {
        copy_run(above, made[0] + r * row, half);
        copy_run(above + half, made[1] + r * row, half);
        if (below) copy_run(below + half, made[4] + r * row, half);
      }
    }
    if constexpr (std::is_same_v<T, float>) {
      if (!made[0]) {
        const int64_t stride = conv.flat_stride();
        pair.operands[0] = {pair.x[0], stride, 0, 0, 1, 1, half};
        pair.operands[1] = {pair.x[0] + half, stride, 0, 0, 1, 1, half};
        pair.operands[4] = {pair.x[upper] + half, stride, 0, 0, 1, 1, half};
      }
    }
  }

  // The lines that a product will add and those that it will write, see gemm_conv.inl.
  static void fetch_pixels(const Conv& conv, const Pair& pair, int64_t panel, int product) {
    if (!kStrassen[product].writes) return;
    const bool lower = kStrassen[product].lower;
    const int64_t k = (2 * panel + kStrassen[product].right) * kPanel;
    for (int64_t r = 0; r < pair.rows[lower]; ++r) {
      fetch_pixel(conv, pair.pixels[lower][r], k);
    }
  }

  static void multiply(const Conv& conv, Pair& pair, int64_t panel, int product, NextRuns ahead) {
    const bool lower = kStrassen[product].lower;
    const int64_t rows = pair.rows[lower];
    if (rows == 0) return;
    const int64_t k = (2 * panel + kStrassen[product].right) * kPanel;
    const float* b = weights(conv, panel, product);
    const Patch<float>& whole = pair.operands[product];
    const auto multiply = [&](auto tile) {
      alignas(64) float pieces[kRows * kPanel];
      int64_t d = 0;
      for (; d + kGemmPiece < whole.length; d += kGemmPiece, tile.base = pieces) {
        patch_tile(rows, kPanel, piece(whole, d), b + d * kPanel, from_step(ahead, 0, d),
                   StoreTile{pieces, false, kPanel, tile.base});
      }
      patch_tile(rows, kPanel, piece(whole, d), b + d * kPanel, from_step(ahead, 0, d), tile);
    };
    const PixelAddress<T>* pixels = pair.pixels[lower];
    if (is_short(conv.activation)) {
      const OutputPixels<Conv> out(conv, k, pixels);
      return strassen_product(product, pair.sums, out, multiply);
    }
    alignas(64) float sums[kRows * kPanel];
    strassen_product(product, pair.sums, StoreTile{sums}, multiply);
    if (!kStrassen[product].writes) return;
    for (int64_t r = 0; r < rows; ++r) {
      finish_pixel(conv, k, kPanel, sums + r * kPanel, pixels[r].y, pixels[r].residual);
    }
  }

  static Patch<float> piece(const Patch<float>& whole, int64_t d) {
    Patch<float> piece = whole;
    piece.data += d;
    piece.length = std::min(whole.length - d, kGemmPiece);
    return piece;
  }
};
