// Depthwise convolutions: lanes are channels, and up to kDepthwisePixels pixels of a line of output
// share the register of a weight. Taps outside of the image are left out: lines of output are cut
// where another column of the kernel enters or leaves the image.
// Packed weight: [tap][K, whole panels].

// Sums in registers, beside the weights of a kernel row and what they multiply.
constexpr int kDepthwisePixels = FASTSEG_ISA_LEVEL >= 2 ? 12 : 8;

template <class Conv>
struct DepthwiseKernel {
  using T = typename Conv::Storage;

  // Lines [begin, end) of output, counted over (image, row), channels [c_begin, c_end).
  static void run(const Conv& conv, const DepthwiseSegment* segments, int64_t count, int64_t begin,
                  int64_t end, int64_t c_begin, int64_t c_end) {
    const int64_t weights = conv.panels() * kPanel;
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / conv.Ho, oy = line % conv.Ho;
      const int64_t iy = oy * conv.stride_h - conv.pad_h;
      const int64_t above = ceil_div(std::max<int64_t>(-iy, 0), conv.dilation_h);
      const int64_t inside = ceil_div(std::max<int64_t>(conv.H - iy, 0), conv.dilation_h);
      const int64_t r0 = std::min(above, conv.R), r1 = std::clamp(inside, r0, conv.R);
      // The lowest row of the next line is what nobody has read yet.
      const int64_t next = iy + conv.stride_h + (conv.R - 1) * conv.dilation_h;
      for (int64_t i = 0; i < count; ++i) {
        const DepthwiseSegment& segment = segments[i];
        Taps taps;
        taps.rows = segment.s0 < segment.s1 ? r1 - r0 : 0;
        taps.columns = segment.s1 - segment.s0;
        taps.weight = conv.weight + (r0 * conv.S + segment.s0) * weights;
        taps.weight_row = conv.S * weights, taps.weight_column = weights;
        // Where all taps are inside and the stride is 1, the pixels of a block lie as far apart as
        // the taps: they read the same pixels of the image.
        const bool shared = conv.stride_w == 1 && taps.columns == conv.S;
        const int64_t apart = shared ? conv.dilation_w : 1;
        taps.step = conv.stride_w * apart * conv.x.pixel;
        for (int64_t first = 0; first < std::min(apart, segment.end - segment.begin); ++first) {
          const int64_t width = ceil_div(segment.end - segment.begin - first, apart);
          const int64_t blocks = ceil_div(width, kDepthwisePixels);
          for (int64_t b = 0; b < blocks; ++b) {
            const int64_t from = part_begin(width, blocks, b);
            const int64_t pixels = part_begin(width, blocks, b + 1) - from;
            const int64_t ox = segment.begin + first + from * apart;
            const int64_t ix = ox * conv.stride_w - conv.pad_w + segment.s0 * conv.dilation_w;
            // Without a tap inside nothing is read.
            taps.x = taps.rows ? conv.x.at(n, iy + r0 * conv.dilation_h, ix) : conv.x.data;
            taps.ahead = taps.rows && next < conv.H ? conv.x.at(n, next, ix) : taps.x;
            const Pixels to{conv.y.at(n, oy, ox), apart * conv.y.pixel,
                            conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr,
                            apart * conv.residual.pixel};
            if (shared && conv.S == 3) {
              some_pixels<3, kDepthwisePixels>(conv, taps, pixels, to, c_begin, c_end);
            } else if (shared && conv.S == 5) {
              some_pixels<5, kDepthwisePixels>(conv, taps, pixels, to, c_begin, c_end);
            } else {
              some_pixels<0, kDepthwisePixels>(conv, taps, pixels, to, c_begin, c_end);
            }
          }
        }
      }
    }
    if (conv.stream) stream_fence();
  }

 private:
  // Those inside of the image, the same for neighbouring pixels.
  struct Taps {
    int64_t rows, columns;
    const T *x, *ahead;  // the first of the first pixel; what to fetch meanwhile
    int64_t step;        // from pixel to pixel
    const float* weight;
    int64_t weight_row, weight_column;
  };
  struct Pixels {
    T* y;
    int64_t step;
    const T* residual;
    int64_t residual_step;
  };

  // S: columns of the kernel that are inside, where pixels lie as far apart as they, or 0.
  template <int S, int P>
  FASTSEG_INLINE void some_pixels(const Conv& conv, const Taps& taps, int64_t pixels,
                                  const Pixels& to, int64_t c, int64_t c_end) {
    if constexpr (P > 0) {
      if (pixels == P) return all_channels<S, P>(conv, taps, to, c, c_end);
      some_pixels<S, P - 1>(conv, taps, pixels, to, c, c_end);
    }
  }

  template <int S, int P>
  static void all_channels(const Conv& conv, const Taps& taps, const Pixels& to, int64_t c,
                           int64_t c_end) {
    for (; c + kLanes <= c_end; c += kLanes) {
      some_channels<S, P, true>(conv, taps, to, c, kLanes);
    }
    if (c < c_end) some_channels<0, P, false>(conv, taps, to, c, c_end - c);
  }

  // P pixels, `lanes` channels from c on.
  template <int S, int P, bool kWhole>
  FASTSEG_INLINE void some_channels(const Conv& conv, const Taps& taps, const Pixels& to, int64_t c,
                                    int64_t lanes) {
    Vec acc[P];
    const Vec bias = load(conv.bias + c);
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) acc[p] = bias;
    const int64_t step = taps.step;
    // Where the next block writes, or of many channels the next but one vector: their next block is
    // on other pages, and 672 channels took 0.34 instead of 0.28 ms.
    const T* next = to.y + c + (conv.C > 4 * kLanes ? 2 * kLanes : P * to.step);
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(taps.ahead + p * step + c, 0, 2);
      __builtin_prefetch(next + p * to.step, 1, 2);
    }
    const T* line = taps.x + c;
    const float* weights = taps.weight + c;
    for (int64_t r = 0; r < taps.rows; ++r) {
      const T* x = line;
      const float* w = weights;
      if constexpr (S > 0) {
        Vec weight[S];
#pragma GCC unroll 5
        for (int s = 0; s < S; ++s) weight[s] = load(w + s * taps.weight_column);
#pragma GCC unroll 16
        for (int i = 0; i < P + S - 1; ++i, x += step) {
          const Vec v = load(x);
#pragma GCC unroll 5
          for (int s = 0; s < S; ++s) {
            if (i - s >= 0 && i - s < P) acc[i - s] += v * weight[s];
          }
        }
      } else {
        for (int64_t s = 0; s < taps.columns; ++s) {
          const Vec weight = load(w);
#pragma GCC unroll 12
          for (int p = 0; p < P; ++p) {
            acc[p] += (kWhole ? load(x + p * step) : load_part(x + p * step, lanes)) * weight;
          }
          x += conv.dilation_w * conv.x.pixel;
          w += taps.weight_column;
        }
      }
      line += conv.dilation_h * conv.x.row;
      weights += taps.weight_row;
    }
    if (conv.activation > Activation::kHardSigmoid) {  // too long for P copies
      alignas(64) float sums[P * kLanes];
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) store(sums + p * kLanes, acc[p]);
      for (int p = 0; p < P; ++p) {
        finish<kWhole>(conv, load(sums + p * kLanes), p, to, c, lanes,
                       [&](Vec v) { return activate_long(v, conv.activation); });
      }
      return;
    }
    dispatch_activation(conv.activation, [&](auto kind) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        finish<kWhole>(conv, acc[p], p, to, c, lanes, [&](Vec v) __attribute__((always_inline)) {
          return activate_as<kind <= Activation::kHardSigmoid ? kind : Activation::kNone>(
              v, conv.slope);
        });
      }
    });
  }

  // Residual and activation of pixel p, on the way to memory.
  template <bool kWhole, class Activate>
  FASTSEG_INLINE void finish(const Conv& conv, Vec v, int p, const Pixels& to, int64_t c,
                             int64_t lanes, const Activate& activate) {
    if (to.residual) {
      const T* from = to.residual + p * to.residual_step + c;
      const Vec added = kWhole ? load(from) : load_part(from, lanes);
      v = conv.residual_last ? activate(v) + added : activate(v + added);
    } else {
      v = activate(v);
    }
    T* y = to.y + p * to.step + c;
    if (kWhole) {
      store_output(conv, v, y);
    } else {
      store_part(y, lanes, v);
    }
  }
};
