// Depthwise convolutions: lanes are channels, and up to kDepthwisePixels neighbours of a line of
// output share the register of a weight. Taps outside of the image are left out: lines of output
// are cut where another column of the kernel enters or leaves the image.
// Packed weight: [tap][K, whole panels].

constexpr int kDepthwisePixels = 12;  // sums in registers, beside a weight and what it multiplies

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
        const int64_t blocks = ceil_div(segment.end - segment.begin, kDepthwisePixels);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t width = segment.end - segment.begin;
          const int64_t ox = segment.begin + part_begin(width, blocks, b);
          const int64_t pixels = segment.begin + part_begin(width, blocks, b + 1) - ox;
          const int64_t ix = ox * conv.stride_w - conv.pad_w + segment.s0 * conv.dilation_w;
          // Without a tap inside nothing is read.
          taps.x = taps.rows ? conv.x.at(n, iy + r0 * conv.dilation_h, ix) : conv.x.data;
          taps.ahead = taps.rows && next < conv.H ? conv.x.at(n, next, ix) : taps.x;
          some_pixels<kDepthwisePixels>(conv, taps, pixels, conv.y.at(n, oy, ox),
                                        conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr,
                                        c_begin, c_end);
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
    const float* weight;
    int64_t weight_row, weight_column;
  };

  template <int P>
  FASTSEG_INLINE void some_pixels(const Conv& conv, const Taps& taps, int64_t pixels, T* y,
                                  const T* residual, int64_t c, int64_t c_end) {
    if constexpr (P > 0) {
      if (pixels == P) return all_channels<P>(conv, taps, y, residual, c, c_end);
      some_pixels<P - 1>(conv, taps, pixels, y, residual, c, c_end);
    }
  }

  template <int P>
  static void all_channels(const Conv& conv, const Taps& taps, T* y, const T* residual, int64_t c,
                           int64_t c_end) {
    for (; c + kLanes <= c_end; c += kLanes) {
      some_channels<P, true>(conv, taps, y, residual, c, kLanes);
    }
    if (c < c_end) some_channels<P, false>(conv, taps, y, residual, c, c_end - c);
  }

  // P pixels, `lanes` channels from c on.
  template <int P, bool kWhole>
  FASTSEG_INLINE void some_channels(const Conv& conv, const Taps& taps, T* y, const T* residual,
                                    int64_t c, int64_t lanes) {
    Vec acc[P];
    const Vec bias = load(conv.bias + c);
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) acc[p] = bias;
    const int64_t step = conv.stride_w * conv.x.pixel;
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) __builtin_prefetch(taps.ahead + p * step + c, 0, 2);
    const T* line = taps.x + c;
    const float* weights = taps.weight + c;
    for (int64_t r = 0; r < taps.rows; ++r) {
      const T* x = line;
      const float* w = weights;
      for (int64_t s = 0; s < taps.columns; ++s) {
        const Vec weight = load(w);
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p) {
          acc[p] += (kWhole ? load(x + p * step) : load_part(x + p * step, lanes)) * weight;
        }
        x += conv.dilation_w * conv.x.pixel;
        w += taps.weight_column;
      }
      line += conv.dilation_h * conv.x.row;
      weights += taps.weight_row;
    }
    if (conv.activation > Activation::kHardSigmoid) {  // too long for P copies
      alignas(64) float sums[P * kLanes];
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) store(sums + p * kLanes, acc[p]);
      for (int p = 0; p < P; ++p) {
        finish<kWhole>(conv, load(sums + p * kLanes), p, y, residual, c, lanes,
                       [&](Vec v) { return activate_long(v, conv.activation); });
      }
      return;
    }
    dispatch_activation(conv.activation, [&](auto kind) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        finish<kWhole>(
            conv, acc[p], p, y, residual, c, lanes, [&](Vec v) __attribute__((always_inline)) {
              return activate_as<kind <= Activation::kHardSigmoid ? kind : Activation::kNone>(
                  v, conv.slope);
            });
      }
    });
  }

  // Residual and activation of pixel p, on the way to memory.
  template <bool kWhole, class Activate>
  FASTSEG_INLINE void finish(const Conv& conv, Vec v, int p, T* y, const T* residual, int64_t c,
                             int64_t lanes, const Activate& activate) {
    if (residual) {
      const T* from = residual + p * conv.residual.pixel + c;
      const Vec added = kWhole ? load(from) : load_part(from, lanes);
      v = conv.residual_last ? activate(v) + added : activate(v + added);
    } else {
      v = activate(v);
    }
    T* to = y + p * conv.y.pixel + c;
    if (kWhole) {
      store_output(conv, v, to);
    } else {
      store_part(to, lanes, v);
    }
  }
};
