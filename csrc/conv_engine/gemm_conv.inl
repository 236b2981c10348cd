// Any convolution as one matrix product: rows are output pixels, the reduction is (tap, channel).
// A block of rows reads the image where it lies; at its left and right border, and where operands
// are another type than images, a small copy with zeros around. There is no im2col matrix. With a
// second image to be summed the reduction of a 1x1 kernel goes on with the channels of that.
// Packed weight: [panel][depth / kPerWord][kPanel][kPerWord].

// Operands that a step of the products takes, so that runs are a multiple of it.
template <typename E>
constexpr int64_t kRunStep = FASTSEG_ISA_LEVEL == 4 ? kLine<E> : kPerWord<E>;

// Output channels [k, k + kPanel) of a block of pixels, straight from the registers. Sums start
// from the residual: that hides its latency under the loads of the first operands. Added at the
// end, between stores to rows that lie whole pages apart just like theirs, the residual took 256 ->
// 1024 channels from 5.6 to 7.6 ms.
template <class Conv>
struct OutputPixels {
  const PixelAddress<Conv>* pixels;
  const float* base;  // sums to add at the end, kRows x kPanel, or null
  int64_t k;
  // Copies: a store to the image could change the originals, for all that the compiler knows.
  const float* bias;
  Activation activation;
  float slope;
  bool add_first, add_last, stream;  // the residual before or behind the activation

  OutputPixels(const Conv& conv, int64_t k, const PixelAddress<Conv>* pixels)
      : pixels(pixels),
        base(nullptr),
        k(k),
        bias(conv.bias + k),
        activation(conv.activation),
        slope(conv.slope),
        add_first(conv.residual.data && !conv.residual_last),
        add_last(conv.residual.data && conv.residual_last),
        stream(conv.stream) {}

  FASTSEG_MEMBER_INLINE Vec biases(int64_t column) const { return load(bias + column); }
  FASTSEG_MEMBER_INLINE Vec residual(int r, int64_t column) const {
    return load(pixels[r].residual + k + column);
  }
  FASTSEG_MEMBER_INLINE Vec start(int r, int64_t column) const {
    return add_first ? biases(column) + residual(r, column) : biases(column);
  }
  FASTSEG_MEMBER_INLINE void finish(int r, int64_t column, Vec v) const {
    if (base) v += load(base + r * kPanel + column);
    v = activate_short(v, activation, slope);
    if (add_last) v += residual(r, column);
    auto* y = pixels[r].y + k + column;
    if (stream) {
      store_stream(y, v);
    } else {
      store(y, v);
    }
  }
};

// The lines of a pixel that a tile will add and those that it will write: no hardware prefetcher
// follows rows that lie pages apart.
template <class Conv>
FASTSEG_INLINE void fetch_pixel(const Conv& conv, const PixelAddress<Conv>& pixel, int64_t k) {
  const auto fetch = [&](auto* values) __attribute__((always_inline)) {
    for (int64_t i = 0; i < kPanel; i += 64 / sizeof *values) fetch_line(values + i);
  };
  if (conv.residual.data) fetch(pixel.residual + k);
  if (!conv.stream) fetch(pixel.y + k);
}

// One convolution on one instruction set.
template <class Conv>
struct GemmKernel {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;

  // Output pixels that a register tile computes at once, and where they read.
  struct Block {
    int64_t rows;
    Patch<E> patch, summand;  // the latter of the second image
    int64_t skipped;          // runs before the first of the patch that lie outside of the image
    const E* ahead;           // what to fetch into L2 during the block before
    PixelAddress<Conv> pixels[kRows];
  };

  // lines: blocks shall not reach over the end of a line.
  static GemmForm form(const Conv& conv, bool lines) {
    constexpr bool kSame = std::is_same_v<T, E>;
    GemmForm form{};
    const bool dense = conv.x.pixel == conv.C || !kSame;
    form.taps = conv.dilation_w == 1 && dense ? conv.S : 1;
    const bool whole = form.taps * conv.C % kRunStep<E> == 0;
    const bool flat =
        !lines && kSame && whole && conv.is_pointwise() && conv.Ho == conv.H && conv.Wo == conv.W;
    // Where pixels lie a multiple of 4 KB apart, lines of 14 of them are more than a set of L1
    // holds: 2048 -> 512 channels took 26 instead of 20 ms in bfloat16, 1024 -> 16 in float32 1.26
    // instead of 0.96.
    const int64_t apart = flat ? conv.flat_stride() : conv.stride_w * conv.x.pixel;
    const bool collide =
        kRows > 8 && kSame && (flat || FASTSEG_ISA_LEVEL < 4) && apart * sizeof(E) % 4096 == 0;
    const bool copied = collide || conv.scale;
    if (flat && !copied) {
      form.rows = GemmForm::kFlat;
      form.blocks = ceil_div(conv.pixels(), kRows);
    } else if (whole && 2 * conv.Wo > kRows && !copied) {
      form.rows = GemmForm::kLines;
      form.line_blocks = ceil_div(conv.Wo, kRows);
      form.blocks = conv.N * conv.Ho * form.line_blocks;
      const int64_t rows = ceil_div(conv.Wo, form.line_blocks);
      form.width = form.taps == 1 ? rows : (rows - 1) * conv.stride_w + form.taps;
      form.copy = conv.R * (conv.S / form.taps) * form.width * conv.C;
    } else {
      form.rows = GemmForm::kGathered;
      form.blocks = ceil_div(conv.pixels(), kRows);
      form.row = conv.depth() + (conv.depth() * sizeof(E) % 1024 == 0 ? kLine<E> : 0);
      form.copy = kRows * form.row + kLine<E>;
    }
    form.summand_copy = form.copy;
    if (conv.C2 && !(kSame && conv.summand_is_flat())) form.copy += kRows * conv.C2;
    int64_t rows = ceil_div(conv.pixels(), form.blocks);
    form.operands = rows * conv.depth();
#if FASTSEG_ISA_LEVEL == 4
    if (form.rows == GemmForm::kLines) {
      rows = ceil_div(conv.Wo, form.line_blocks);
      // Taps read the same pixels. At this rate a task of few lines would wait for the weights.
      const int64_t lines = conv.dilation_h == 1 ? std::min(conv.stride_h, conv.R) : conv.R;
      form.operands = rows * conv.C * lines * std::min(conv.stride_w, conv.S) + rows * conv.C2;
    }
    form.height = ceil_div(rows, 2);
#endif
    return form;
  }

  // Blocks [begin, end), panels [panel_begin, panel_end). `copies` takes those of one block, or of
  // all where the panels come first, `blocks` all blocks.
  static void run(const Conv& conv, const GemmForm& form, int64_t begin, int64_t end,
                  int64_t panel_begin, int64_t panel_end, E* copies, void* memory) {
    Block* blocks = static_cast<Block*>(memory);
    const int64_t count = end - begin;
#if FASTSEG_ISA_LEVEL == 4
    const TileRegisters tiles(form.height);
#endif
    if (form.panels_first) {
      for (int64_t i = 0; i < count; ++i) {
        place(conv, form, begin + i, copies + i * form.copy, blocks[i]);
      }
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const E* weight = conv.weight + (panel + 1) * kPanel * conv.depth();
        for (int64_t i = 0; i < count; ++i) {
          if (i + 1 < count) fetch_pixels(conv, blocks[i + 1], panel);
          if (panel == panel_begin && i + 1 < count) {
            multiply(conv, blocks[i], panel, ahead_of(blocks[i + 1]));
          } else {
            // Half of the next panel in the turn of each of two blocks.
            multiply(conv, blocks[i], panel,
                     ahead_of(conv, weight + (i & 1) * kPanel / 2 * conv.depth()));
          }
        }
      }
    } else {
      place(conv, form, begin, copies, blocks[0]);
      for (int64_t i = 0; i < count; ++i) {
        const Block& block = blocks[i & 1];
        Block& next = blocks[~i & 1];
        if (i + 1 < count) place(conv, form, begin + i + 1, copies + (~i & 1) * form.copy, next);
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
          if (panel + 1 < panel_end) {
            fetch_pixels(conv, block, panel + 1);
          } else if (i + 1 < count) {
            fetch_pixels(conv, next, panel_begin);
          }
          multiply(conv, block, panel,
                   ahead_of(panel == panel_begin && i + 1 < count ? next : block));
        }
      }
    }
    if (conv.stream) stream_fence();
  }

  static int64_t block_bytes() { return sizeof(Block); }

 private:
  static NextRuns ahead_of(const Block& block) {
    return {reinterpret_cast<const char*>(block.ahead),
            block.patch.run_h * static_cast<int64_t>(sizeof(E)),
            reinterpret_cast<const char*>(block.summand.data)};
  }
  static NextRuns ahead_of(const Conv& conv, const E* weight) {
    const char* lines = reinterpret_cast<const char*>(weight);
    return {lines, 0, lines + conv.C / kPerWord<E> * 64};
  }

  FASTSEG_INLINE void fetch_pixels(const Conv& conv, const Block& block, int64_t panel) {
    for (int64_t r = 0; r < block.rows; ++r) fetch_pixel(conv, block.pixels[r], panel * kPanel);
  }

  // One panel of a block.
  static void multiply(const Conv& conv, const Block& block, int64_t panel, NextRuns ahead) {
    const int64_t k = panel * kPanel, rows = block.rows;
    const int64_t columns = conv.K - k < kPanel ? conv.K - k : kPanel;
    const E* b = conv.weight + k * conv.depth() + block.skipped * block.patch.length * kPanel;
    if (columns % kLanes == 0 && is_short(conv.activation)) {
      return patch_tile(rows, columns, block.patch, b, ahead,
                        OutputPixels<Conv>(conv, k, block.pixels));
    }
    alignas(64) float sums[kRows * kPanel];
    patch_tile(rows, columns, block.patch, b, ahead, StoreTile{sums});
    finish_tile(conv, k, columns, sums, rows, block.pixels);
  }

  // Where block number `index` reads and writes; `copy` takes what it cannot read where it lies.
  static void place(const Conv& conv, const GemmForm& form, int64_t index, E* copy, Block& block) {
    int64_t n, oy, ox;  // of the first pixel
    block.skipped = 0;
    if (form.rows == GemmForm::kLines) {
      const int64_t line = index / form.line_blocks, part = index % form.line_blocks;
      ox = part_begin(conv.Wo, form.line_blocks, part);
      block.rows = part_begin(conv.Wo, form.line_blocks, part + 1) - ox;
      n = line / conv.Ho, oy = line % conv.Ho;
      place_line(conv, form, n, oy, ox, copy, block);
    } else {
      const int64_t first = part_begin(conv.pixels(), form.blocks, index);
      block.rows = part_begin(conv.pixels(), form.blocks, index + 1) - first;
      const int64_t line = first / conv.Wo;
      ox = first % conv.Wo, oy = line % conv.Ho, n = line / conv.Ho;
      if (form.rows == GemmForm::kFlat) {
        const E* data = reinterpret_cast<const E*>(conv.x.at(n, oy, ox));
        block.patch = {data, conv.flat_stride(), 0, 0, 1, 1, conv.C};
      } else {
        const int64_t length = round_up(conv.R * conv.S * conv.C, kRunStep<E>);
        block.patch = {copy, form.row, 0, 0, 1, 1, length};
      }
    }
    block.ahead = block.patch.data;
    block.patch.height = form.height;
    block.summand = {};
    if (conv.C2) place_summand(conv, n, oy, ox, copy + form.summand_copy, block);
    for (int64_t r = 0; r < block.rows;) {
      const int64_t run = std::min(block.rows - r, conv.Wo - ox);
      auto* y = conv.y.at(n, oy, ox);
      for (int64_t i = 0; i < run; ++i) block.pixels[r + i].y = y + i * conv.y.pixel;
      if (conv.residual.data) {
        const T* residual = conv.residual.at(n, oy, ox);
        for (int64_t i = 0; i < run; ++i) {
          block.pixels[r + i].residual = residual + i * conv.residual.pixel;
        }
      } else {
        for (int64_t i = 0; i < run; ++i) block.pixels[r + i].residual = nullptr;
      }
      if (form.rows == GemmForm::kGathered) {
        for (int64_t i = 0; i < run; ++i) {
          E* row = copy + (r + i) * form.row;
          conv.scale ? gather_scaled(conv, n, oy, ox + i, row) : gather(conv, n, oy, ox + i, row);
        }
        if constexpr (std::is_same_v<T, E>) {
          // These are read by now: what the block after them will be copied from.
          if (!form.panels_first && conv.is_pointwise()) {
            block.ahead = conv.x.at(n, oy, ox) + run * conv.x.pixel;
          }
        }
      }
      r += run;
      ox = 0;
      if (++oy == conv.Ho) oy = 0, ++n;
    }
  }

  // Pixels of one line of output: taps above and below the image are left out.
  static void place_line(const Conv& conv, const GemmForm& form, int64_t n, int64_t oy, int64_t ox,
                         E* copy, Block& block) {
    const int64_t iy = oy * conv.stride_h - conv.pad_h, ix = ox * conv.stride_w - conv.pad_w;
    const int64_t above = ceil_div(std::max<int64_t>(-iy, 0), conv.dilation_h);
    const int64_t inside = ceil_div(std::max<int64_t>(conv.H - iy, 0), conv.dilation_h);
    const int64_t h0 = std::min(above, conv.R), h1 = std::clamp(inside, h0, conv.R);
    Patch<E>& patch = block.patch;
    patch.then = nullptr;
    patch.runs_h = h1 - h0;
    patch.runs_w = conv.S / form.taps;
    patch.length = form.taps * conv.C;
    block.skipped = h0 * patch.runs_w;
    const int64_t end = ix + (block.rows - 1) * conv.stride_w + (conv.S - 1) * conv.dilation_w + 1;
    const int64_t y0 = iy + h0 * conv.dilation_h;
    if constexpr (std::is_same_v<T, E>) {
      if (ix >= 0 && end <= conv.W) {
        patch.data = conv.x.at(n, y0, ix);
        patch.row = conv.stride_w * conv.x.pixel;
        patch.run_h = conv.dilation_h * conv.x.row;
        patch.run_w = conv.dilation_w * conv.x.pixel;
        return;
      }
    }
    // Of single taps only the pixels that are read, of whole lines all that lie between as well.
    const int64_t step = form.taps == 1 ? conv.stride_w : 1;
    const int64_t width =
        form.taps == 1 ? block.rows : (block.rows - 1) * conv.stride_w + form.taps;
    patch.data = copy;
    patch.row = (form.taps == 1 ? 1 : conv.stride_w) * conv.C;
    patch.run_w = width * conv.C;
    patch.run_h = patch.runs_w * patch.run_w;
    for (int64_t h = 0; h < patch.runs_h; ++h) {
      for (int64_t w = 0; w < patch.runs_w; ++w, copy += width * conv.C) {
        copy_pixels(conv, n, y0 + h * conv.dilation_h, ix + w * conv.dilation_w, step, width, copy);
      }
    }
  }

  // The pixels of the second image, from that of output (oy, ox) on.
  static void place_summand(const Conv& conv, int64_t n, int64_t oy, int64_t ox, E* copy,
                            Block& block) {
    block.patch.then = &block.summand;
    if constexpr (std::is_same_v<T, E>) {
      if (ox + block.rows <= conv.Wo || conv.summand_is_flat()) {
        block.summand = {
            conv.summand(n, oy, ox), conv.stride2_w * conv.x2.pixel, 0, 0, 1, 1, conv.C2};
        return;
      }
    }
    block.summand = {copy, conv.C2, 0, 0, 1, 1, conv.C2};
    for (int64_t r = 0; r < block.rows; ++r, copy += conv.C2) {
      copy_run(conv.summand(n, oy, ox), copy, conv.C2);
      if (++ox < conv.Wo) continue;
      ox = 0;
      if (++oy == conv.Ho) oy = 0, ++n;
    }
  }

  // Pixels x, x + step, ... of a line of the image, zeros where they are outside of it.
  static void copy_pixels(const Conv& conv, int64_t n, int64_t y, int64_t x, int64_t step,
                          int64_t count, E* dst) {
    const int64_t C = conv.C;
    const int64_t left = std::min(ceil_div(std::max<int64_t>(-x, 0), step), count);
    const int64_t right = std::clamp(ceil_div(std::max<int64_t>(conv.W - x, 0), step), left, count);
    std::memset(dst, 0, left * C * sizeof *dst);
    if (step == 1 && conv.x.pixel == C) {
      copy_run(conv.x.at(n, y, x + left), dst + left * C, (right - left) * C);
    } else {
      for (int64_t i = left; i < right; ++i) {
        copy_run(conv.x.at(n, y, x + i * step), dst + i * C, C);
      }
    }
    std::memset(dst + right * C, 0, (count - right) * C * sizeof *dst);
  }

  // The scaled channels of one output pixel, zeros behind them.
  static void gather_scaled(const Conv& conv, int64_t n, int64_t oy, int64_t ox, E* row) {
    const T *x = conv.x.at(n, oy, ox), *scale = conv.scale + n * conv.scale_batch;
    int64_t c = 0;
    for (; c + kLanes <= conv.C; c += kLanes) store(row + c, load(x + c) * load(scale + c));
    if (c < conv.C) {
      store(row + c, load_part(x + c, conv.C - c) * load_part(scale + c, conv.C - c));
      c += kLanes;
    }
    for (; c < conv.depth(); c += kLanes) store(row + c, Vec{});
  }

  // All taps of one output pixel side by side, zeros behind them.
  static void gather(const Conv& conv, int64_t n, int64_t oy, int64_t ox, E* row) {
    const int64_t iy = oy * conv.stride_h - conv.pad_h, ix = ox * conv.stride_w - conv.pad_w;
#if FASTSEG_ISA_LEVEL >= 2
    // Kernel rows of few channels: a line each, whose end the next one overwrites.
    const int64_t run = conv.S * conv.C;
    if (std::is_same_v<T, BFloat16> && std::is_same_v<E, BFloat16> && run < kLine<E> &&
        conv.dilation_w == 1 && conv.x.pixel == conv.C && ix >= 0 && ix + conv.S <= conv.W) {
      const auto mask = static_cast<__mmask32>((1u << run) - 1);
      _mm512_storeu_si512(row + conv.depth() - kLine<E>, __m512i{});
      for (int64_t r = 0; r < conv.R; ++r, row += run) {
        const int64_t y = iy + r * conv.dilation_h;
        const bool inside = y >= 0 && y < conv.H;
        const __m512i taps =
            inside ? _mm512_maskz_loadu_epi16(mask, conv.x.at(n, y, ix)) : __m512i{};
        _mm512_storeu_si512(row, taps);
      }
      return;
    }
#endif
    const int64_t filled = conv.R * conv.S * conv.C;
    std::memset(row + filled, 0, (conv.depth() - filled) * sizeof *row);
    for (int64_t r = 0; r < conv.R; ++r, row += conv.S * conv.C) {
      const int64_t y = iy + r * conv.dilation_h;
      if (y < 0 || y >= conv.H) {
        std::memset(row, 0, conv.S * conv.C * sizeof *row);
      } else {
        copy_pixels(conv, n, y, ix, conv.dilation_w, conv.S, row);
      }
    }
  }
};
