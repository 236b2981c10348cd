// 3-wide kernels over images of few channels, such as photographs: all strides in the image are
// constants, so that a kernel row of C x 3 terms is one unrolled run of multiply-adds, and a block
// of kRows pixels costs little beside them. As a matrix product like any other (gemm_conv.inl) a
// third of the time of 3 -> 64 channels went to addresses and loops.
// Packed weight: that of the matrix product, [panel][tap, channel / kPerWord][kPanel][kPerWord]. Of
// bfloat16 a row of an odd number of values ends in half a word: with three rows there are a word
// of the first row's last value and the second one's first, and one that the third one's last has
// alone. The others are read where they lie.

template <class Conv, int C, int kStride>
struct FewChannelsKernel {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;
  static constexpr bool kFloat = std::is_same_v<E, float>;
  static constexpr int kTaps = 3;
  static constexpr int kRun = kTaps * C, kStep = kStride * C;
  static constexpr int kWidth = (kRows - 1) * kStep + kRun;  // operands of a block's kernel row

  // Lines [begin, end) of output, counted over (image, row).
  static void run(const Conv& conv, int64_t begin, int64_t end) {
    alignas(64) E copy[kFewRows * kWidth];
    alignas(64) E ends[2][2 * kRows] = {};  // of bfloat16: the words that are not in the image
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / conv.Ho, oy = line % conv.Ho;
      const int64_t iy = oy * kStride - conv.pad_h;
      // Rows outside of the image are left out, of bfloat16 they are zeros.
      const int64_t r0 = kFloat ? std::clamp<int64_t>(-iy, 0, conv.R) : 0;
      const int64_t r1 = kFloat ? std::clamp<int64_t>(conv.H - iy, r0, conv.R) : conv.R;
      const bool whole = std::is_same_v<T, E> && iy + r0 >= 0 && iy + r1 <= conv.H;
      const int64_t blocks = ceil_div(conv.Wo, kRows);
      for (int64_t b = 0; b < blocks; ++b) {
        // The last block begins earlier and computes some pixels again.
        const int64_t ox = std::min(b * kRows, conv.Wo - kRows), ix = ox * kStride - conv.pad_w;
        const E* x = copy;
        int64_t row = kWidth;
        if (whole && ix >= 0 && (ix + kWidth / C) <= conv.W) {
          x = reinterpret_cast<const E*>(conv.x.at(n, iy + r0, ix));
          row = conv.x.row;
        } else {
          for (int64_t r = r0; r < r1; ++r) {
            copy_pixels(conv, n, iy + r, ix, copy + (r - r0) * kWidth);
          }
        }
        if constexpr (!kFloat) {
          const E* last = x + kRun - 1;
          for (int p = 0; p < kRows; ++p, last += kStep) {
            ends[0][2 * p] = last[0];
            ends[0][2 * p + 1] = last[row - kRun + 1];
            ends[1][2 * p] = last[2 * row];
          }
        }
        auto* y = conv.y.at(n, oy, ox);
        for (int64_t k = 0; k < conv.K; k += 2 * kLanes) {
          const E* weight = conv.weight + k / kPanel * kPanel * conv.depth() + r0 * kRun * kPanel +
                            k % kPanel * kPerWord<E>;
          if (conv.K - k > kLanes) {
            tile<2>(conv, x, row, r1 - r0, ends, weight, k, y);
          } else {
            tile<1>(conv, x, row, r1 - r0, ends, weight, k, y);
          }
        }
      }
    }
    if (conv.stream) stream_fence();
  }

 private:
  // kWords words of each pixel, whose operands lie kApart from the next one's, times those of the
  // weights, which then point behind them.
  template <int kWords, int kApart, int V>
  FASTSEG_INLINE void multiply_run(Vec (&acc)[kRows][V], const E* x, const E*& weight) {
#pragma GCC unroll 12
    for (int d = 0; d < kWords; ++d, weight += kPanel * kPerWord<E>) {
      asm("" : "+r"(x));  // else values that several pixels read are kept, and sums spilled
      decltype(load_words(weight)) panel[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) panel[v] = load_words(weight + v * kLanes * kPerWord<E>);
#pragma GCC unroll 14
      for (int p = 0; p < kRows; ++p) {
        const auto scalar = broadcast(load_word(x + p * kApart + d * kPerWord<E>));
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[p][v] = multiply_add(acc[p][v], scalar, panel[v]);
      }
    }
  }

  // kRows pixels, V vectors of output channels from k on.
  template <int V>
  static void tile(const Conv& conv, const E* x, int64_t row, int64_t rows,
                   const E (&ends)[2][2 * kRows], const E* weight, int64_t k,
                   typename Conv::Result* y) {
    const int64_t columns = conv.K - k < V * kLanes ? conv.K - k : V * kLanes;
    const bool direct = is_short(conv.activation);
    Vec acc[kRows][V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec bias = direct ? load(conv.bias + k + v * kLanes) : Vec{};
#pragma GCC unroll 14
      for (int p = 0; p < kRows; ++p) acc[p][v] = bias;
    }
    if constexpr (kFloat) {
      for (int64_t r = 0; r < rows; ++r, x += row) multiply_run<kRun, kStep>(acc, x, weight);
    } else {
      multiply_run<kRun / 2, kStep>(acc, x, weight);
      multiply_run<1, 2>(acc, ends[0], weight);
      multiply_run<kRun / 2, kStep>(acc, x + row + 1, weight);
      multiply_run<kRun / 2, kStep>(acc, x + 2 * row, weight);
      multiply_run<1, 2>(acc, ends[1], weight);
    }
    const Activation activation = conv.activation;
    const bool stream = conv.stream;
    const float slope = conv.slope;
    const int64_t pixel = conv.y.pixel;
    if (direct) {
      y += k;
#pragma GCC unroll 14
      for (int p = 0; p < kRows; ++p, y += pixel) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const Vec sums = activate_short(acc[p][v], activation, slope);
          const int64_t lanes = columns - v * kLanes;
          if (lanes < kLanes) {
            store_part(y + v * kLanes, lanes, sums);
          } else if (stream) {
            store_stream(y + v * kLanes, sums);
          } else {
            store(y + v * kLanes, sums);
          }
        }
      }
    } else {
      alignas(64) float sums[kRows * V * kLanes];
#pragma GCC unroll 14
      for (int p = 0; p < kRows; ++p) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(sums + (p * V + v) * kLanes, acc[p][v]);
      }
      for (int p = 0; p < kRows; ++p, y += pixel) {
        finish_pixel(conv, k, columns, sums + p * V * kLanes, y, nullptr);
      }
    }
  }

  // What a block reads of a line of the image, zeros where that is outside.
  static void copy_pixels(const Conv& conv, int64_t n, int64_t iy, int64_t ix, E* dst) {
    constexpr int64_t kPixels = kWidth / C;
    const bool outside = iy < 0 || iy >= conv.H;
    const int64_t left = outside ? kPixels : std::clamp<int64_t>(-ix, 0, kPixels);
    const int64_t right = std::clamp<int64_t>(conv.W - ix, left, kPixels);
    std::memset(dst, 0, left * C * sizeof *dst);
    if (left < right) {
      copy_run(conv.x.at(n, iy, ix + left), dst + left * C, (right - left) * C);
    }
    std::memset(dst + right * C, 0, (kPixels - right) * C * sizeof *dst);
  }
};
