// 1x1 convolutions as a matrix product by strassen.inl: rows are output pixels, the reduction is
// the channels, a pair of panels is 2 * kPanel output channels side by side. With a second image to
// be summed each half of the reduction is half of the channels of both.
// Packed weight: [pair of panels][product][C / 2 / kPerWord][kPanel][kPerWord].

template <class Conv>
struct StrassenKernel {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;

  // An upper and a lower block of pixels, and where the products read.
  struct Pair {
    int64_t rows[2];
    const T *x[2 * kRows], *x2[2 * kRows];
    Patch<E> operands[kStrassenProducts], summands[kStrassenProducts];
    PixelAddress<Conv> pixels[2][kRows];
    StrassenSums sums;
  };

  static int64_t pairs(const Conv& conv) { return ceil_div(conv.pixels(), 2 * kRows); }
  static int64_t pair_bytes() { return sizeof(Pair); }
  // The operands of a pair that do not lie in the image.
  static int64_t operands_size(const Conv& conv) {
    return (in_place(conv) ? kStrassenSums : kStrassenProducts) * kRows * operand_row(conv);
  }

  // Pairs of pixel blocks [begin, end), pairs of panels [panel_begin, panel_end). Each product of
  // all pairs of blocks follows the one before, so that the weights pass by once. `next` is the
  // pair with which the next task of the thread probably begins: its pixels come to L2 meanwhile.
  static void run(const Conv& conv, int64_t begin, int64_t end, int64_t next, int64_t panel_begin,
                  int64_t panel_end, E* operands, void* memory) {
    Pair* pairs = static_cast<Pair*>(memory);
    const int64_t count = end - begin, size = operands_size(conv);
    for (int64_t i = 0; i < count; ++i) {
      place(conv, begin + i, pairs[i]);
      prepare(conv, operands + i * size, pairs[i]);
    }
    // What one turn of a pair fetches of weights and of either image.
    const int64_t part = half(conv) / 2 * kPanel;
    const int64_t x_part = conv.C / 4 * kPanel, x2_part = conv.C2 / 4 * kPanel;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int product = 0; product < kStrassenProducts; ++product) {
        for (int64_t i = 0; i < count; ++i) {
          if (i + 1 < count) {
            fetch_pixels(conv, pairs[i + 1], panel, product);
          } else if (product + 1 < kStrassenProducts) {
            fetch_pixels(conv, pairs[0], panel, product + 1);
          }
          // Half of the weights of the next product in the turn of each of two pairs.
          NextRuns ahead = lines(conv, weights(conv, panel, product + 1) + (i & 1) * part);
          if (panel + 1 == panel_end) {
            const int64_t turn = product * count + i;
            if (product < 4) {
              const auto [x, x2] =
                  pixel(conv, part_begin(conv.pixels(), StrassenKernel::pairs(conv), next));
              ahead = {reinterpret_cast<const char*>(x + turn * x_part), 0,
                       reinterpret_cast<const char*>(x2 + turn * x2_part)};
            } else {
              ahead = lines(conv, weights(conv, panel_begin, 0) + (turn - 4 * count) * part);
            }
          }
          multiply(conv, pairs[i], panel, product, ahead);
        }
      }
    }
    if (conv.stream) stream_fence();
  }

 private:
  // Whether A11 and A22 can be read where they lie. Lines that are a multiple of 4 KB apart fall on
  // one set of L1, see gemm_conv.inl.
  static bool in_place(const Conv& conv) {
    const int64_t apart = conv.flat_stride() * sizeof(T);
    const bool collide = kRows > 8 && apart % 4096 == 0;
    return std::is_same_v<T, E> && conv.is_pointwise() && !collide &&
           (!conv.C2 || conv.summand_is_flat());
  }
  static int64_t half(const Conv& conv) { return (conv.C + conv.C2) / 2; }
  // A line more than it needs to be, so that rows do not fall on the same cache sets.
  static int64_t operand_row(const Conv& conv) { return half(conv) + kGroup; }

  static const E* weights(const Conv& conv, int64_t panel, int64_t product) {
    return conv.weight + (panel * kStrassenProducts + product) * half(conv) * kPanel;
  }
  // Fetches weights: a line for each step of a product.
  static NextRuns lines(const Conv& conv, const E* weights) {
    return {reinterpret_cast<const char*>(weights), 0,
            reinterpret_cast<const char*>(weights + conv.C / 2 * kGroup)};
  }

  // What output pixel number `index` reads.
  static std::pair<const T*, const T*> pixel(const Conv& conv, int64_t index) {
    const int64_t line = index / conv.Wo, ox = index % conv.Wo;
    const int64_t n = line / conv.Ho, oy = line % conv.Ho;
    return {conv.x.at(n, oy * conv.stride_h, ox * conv.stride_w), conv.summand(n, oy, ox)};
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
      PixelAddress<Conv>& to = pair.pixels[r >= pair.rows[0]][r % pair.rows[0]];
      to.y = conv.y.at(n, oy, ox);
      to.residual = conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr;
      pair.x[r] = conv.x.at(n, oy * conv.stride_h, ox * conv.stride_w);
      pair.x2[r] = conv.summand(n, oy, ox);
      if (++ox == conv.Wo) ox = 0, ++line;
    }
  }

  // The left operands.
  static void prepare(const Conv& conv, E* buffer, Pair& pair) {
    const int64_t row = operand_row(conv), upper = pair.rows[0];
    E* made[kStrassenProducts] = {};
    for (int i = 0; i < kStrassenProducts; ++i) {
      if (in_place(conv) && (i == kUpperLeft || i == kLowerRight)) continue;
      made[i] = buffer, buffer += kRows * row;
    }
    for (int i = 0; i < kStrassenProducts; ++i) {
      pair.operands[i] = {made[i], row, 0, 0, 1, 1, conv.C / 2};
      if (!conv.C2) continue;
      const E* behind = made[i] ? made[i] + conv.C / 2 : nullptr;
      pair.summands[i] = {behind, row, 0, 0, 1, 1, conv.C2 / 2};
      pair.operands[i].then = &pair.summands[i];
    }
    for (int64_t r = 0; r < upper; ++r) {
      const int64_t below = r < pair.rows[1] ? upper + r : -1;
      prepare_row(pair.x, r, below, conv.C / 2, made, r * row);
      if (conv.C2) prepare_row(pair.x2, r, below, conv.C2 / 2, made, r * row + conv.C / 2);
    }
    if constexpr (std::is_same_v<T, E>) {
      if (!made[kUpperLeft]) {
        read_in_place(pair.x, upper, conv.flat_stride(), pair.operands);
        if (conv.C2) read_in_place(pair.x2, upper, conv.x2.pixel, pair.summands);
      }
    }
  }

  // Row r of all operands, from `at` on, from row r of the upper and, unless negative, row `below`
  // of the lower block. `half` of its channels are in A11, the others in A12.
  static void prepare_row(const T* const* x, int64_t r, int64_t below, int64_t half,
                          E* const (&made)[kStrassenProducts], int64_t at) {
    const T *upper = x[r], *lower = below < 0 ? nullptr : x[below];
    strassen_sums(upper, upper + half, lower, lower ? lower + half : nullptr, half, made, at);
    if (!made[kUpperLeft]) return;
    copy_run(upper, made[kUpperLeft] + at, half);
    if (lower) copy_run(lower + half, made[kLowerRight] + at, half);
  }

  // A11 and A22 where they lie.
  static void read_in_place(const T* const* x, int64_t upper, int64_t stride,
                            Patch<E> (&operands)[kStrassenProducts]) {
    Patch<E>&left = operands[kUpperLeft], &right = operands[kLowerRight];
    left.data = x[0];
    right.data = x[upper] + right.length;
    left.row = right.row = stride;
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
    const E* b = weights(conv, panel, product);
    const auto multiply = [&](auto tile) {
      patch_tile(rows, kPanel, pair.operands[product], b, ahead, tile);
    };
    const PixelAddress<Conv>* pixels = pair.pixels[lower];
    if (is_short(conv.activation)) {
      const OutputPixels<Conv> out(conv, k, pixels);
      return strassen_product(product, pair.sums, out, multiply);
    }
    alignas(64) float sums[kRows * kPanel];
    strassen_product(product, pair.sums, StoreTile{sums}, multiply);
    if (!kStrassen[product].writes) return;
    finish_tile(conv, k, kPanel, sums, rows, pixels);
  }
};
