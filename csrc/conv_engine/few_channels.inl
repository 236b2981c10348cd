// 3-wide kernels over images of few channels, such as photographs: all strides in the image are
// constants, so that a kernel row of C x 3 terms is one unrolled run of multiply-adds, and a block
// of kRows pixels costs little beside them. As a matrix product like any other (gemm_conv.inl) a
// third of the time of 3 -> 64 channels went to addresses and loops.
// Packed weight: that of the matrix product, [panel][tap, channel][kPanel].

template <class Conv, int C, int kStride>
struct FewChannelsKernel {
  using T = typename Conv::Storage;
  static constexpr int kTaps = 3;
  static constexpr int kRun = kTaps * C, kStep = kStride * C;
  static constexpr int kWidth = (kRows - 1) * kStep + kRun;  // operands of a block's kernel row

  // Lines [begin, end) of output, counted over (image, row).
  static void run(const Conv& conv, int64_t begin, int64_t end) {
    alignas(64) float copy[kFewRows * kWidth];
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / conv.Ho, oy = line % conv.Ho;
      const int64_t iy = oy * kStride - conv.pad_h;
      const int64_t r0 = std::clamp<int64_t>(-iy, 0, conv.R);
      const int64_t r1 = std::clamp<int64_t>(conv.H - iy, r0, conv.R);
      const int64_t blocks = ceil_div(conv.Wo, kRows);
      for (int64_t b = 0; b < blocks; ++b) {
        // The last block begins earlier and computes some pixels again.
        const int64_t ox = std::min(b * kRows, conv.Wo - kRows), ix = ox * kStride - conv.pad_w;
        const float* x = copy;
        int64_t row = kWidth;
        if (std::is_same_v<T, float> && ix >= 0 && (ix + kWidth / C) <= conv.W) {
          x = reinterpret_cast<const float*>(conv.x.at(n, iy + r0, ix));
          row = conv.x.row;
        } else {
          for (int64_t r = r0; r < r1; ++r) {
            copy_pixels(conv, n, iy + r, ix, copy + (r - r0) * kWidth);
          }
        }
        T* y = conv.y.at(n, oy, ox);
        for (int64_t k = 0; k < conv.K; k += 2 * kLanes) {
          const float* weight =
              conv.weight + k / kPanel * kPanel * conv.depth() + r0 * kRun * kPanel + k % kPanel;
          if (conv.K - k > kLanes) {
            tile<2>(conv, x, row, r1 - r0, weight, k, y);
          } else {
            tile<1>(conv, x, row, r1 - r0, weight, k, y);
          }
        }
      }
    }
    if (conv.stream) stream_fence();
  }

 private:
  // kRows pixels, V vectors of output channels from k on.
  template <int V>
  static void tile(const Conv& conv, const float* x, int64_t row, int64_t rows, const float* weight,
                   int64_t k, T* y) {
    Vec acc[kRows][V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec bias = load(conv.bias + k + v * kLanes);
#pragma GCC unroll 14
      for (int p = 0; p < kRows; ++p) acc[p][v] = bias;
    }
    for (int64_t r = 0; r < rows; ++r, x += row, weight += kRun * kPanel) {
#pragma GCC unroll 12
      for (int d = 0; d < kRun; ++d) {
        asm("" : "+r"(x));  // else values that several pixels read are kept, and sums spilled
        Vec panel[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) panel[v] = load(weight + d * kPanel + v * kLanes);
#pragma GCC unroll 14
        for (int p = 0; p < kRows; ++p) {
          const Vec scalar = broadcast(load_word(x + p * kStep + d));
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[p][v] = multiply_add(acc[p][v], scalar, panel[v]);
        }
      }
    }
    const Activation activation = conv.activation;
    const bool stream = conv.stream;
    const float slope = conv.slope;
    const int64_t pixel = conv.y.pixel;
    y += k;
    if (is_short(activation)) {
#pragma GCC unroll 14
      for (int p = 0; p < kRows; ++p, y += pixel) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const Vec sums = activate_short(acc[p][v], activation, slope);
          if (stream) {
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
        for (int v = 0; v < V; ++v) {
          const Vec value = activate_long(load(sums + (p * V + v) * kLanes), activation);
          store_output(conv, value, y + v * kLanes);
        }
      }
    }
  }

  // What a block reads of a line of the image, zeros where that is outside.
  static void copy_pixels(const Conv& conv, int64_t n, int64_t iy, int64_t ix, float* dst) {
    constexpr int64_t kPixels = kWidth / C;
    const int64_t left = std::clamp<int64_t>(-ix, 0, kPixels);
    const int64_t right = std::clamp<int64_t>(conv.W - ix, left, kPixels);
    std::memset(dst, 0, left * C * sizeof *dst);
    if (left < right) {
      copy_run(conv.x.at(n, iy, ix + left), dst + left * C, (right - left) * C);
    }
    std::memset(dst + right * C, 0, (kPixels - right) * C * sizeof *dst);
  }
};
