// Depthwise convolutions: lanes are channels. A block is some pixels of a line of output, each of
// which is read once for all taps of a kernel row, of kernels of five columns with AVX-512 for two
// lines of output. Blocks go through all channels before the next, along whole pages of memory: the
// processor fetches those ahead better than instructions do (benchmarks/README.md).
// Packed weight: [tap][channels, whole panels].

constexpr int kBlockPixels = 8;
constexpr int kPairedLines = FASTSEG_ISA_LEVEL >= 2 ? 2 : 1;

template <class Conv>
struct DepthwiseKernel {
  using T = typename Conv::Storage;

  // Lines [begin, end) of output, counted over (image, row), channels [k_begin, k_end).
  static void run(const Conv& conv, const std::vector<LineSegment>& segments, int64_t begin,
                  int64_t end, int64_t k_begin, int64_t k_end) {
    const bool paired = kPairedLines == 2 && segments[0].shared && conv.S == 5 &&
                        conv.stride_h == 1 && conv.stride_w == 1 && conv.dilation_h == 1;
    for_each_block(conv, segments, kBlockPixels, paired, begin, end, k_end - k_begin, k_begin,
                   k_end,
                   [&](const Taps<Conv>& taps, const Pixels<T>& to, int64_t k, int64_t last) {
                     block(conv, segments[0].shared, taps, to, k, last);
                   });
    if (conv.stream) stream_fence();
  }

 private:
  static void block(const Conv& conv, bool shared, const Taps<Conv>& taps, const Pixels<T>& to,
                    int64_t k, int64_t k_end) {
    if (!shared) {
      all_channels<0, 1, 1>(conv, taps, to, k, k_end);
    } else if (conv.S == 7) {
      all_channels<7, 1, 1>(conv, taps, to, k, k_end);
    } else if (conv.S == 3) {
      conv.stride_w == 2 ? all_channels<3, 2, 1>(conv, taps, to, k, k_end)
                         : all_channels<3, 1, 1>(conv, taps, to, k, k_end);
    } else if (conv.stride_w == 2) {
      all_channels<5, 2, 1>(conv, taps, to, k, k_end);
    } else {
      taps.lines == 2 ? all_channels<5, 1, kPairedLines>(conv, taps, to, k, k_end)
                      : all_channels<5, 1, 1>(conv, taps, to, k, k_end);
    }
  }

  // kTaps: columns of the kernel, all of which each pixel has, or 0 for those that a segment has.
  // kStride: how many of the pixels read lie between two outputs. kLines: of output.
  template <int kTaps, int kStride, int kLines>
  static void all_channels(const Conv& conv, const Taps<Conv>& taps, const Pixels<T>& to, int64_t k,
                           int64_t k_end) {
    constexpr int kVectors = FASTSEG_ISA_LEVEL >= 2 && kLines == 1 ? 2 : 1;
    if (to.count == kBlockPixels && taps.are_inside(kTaps)) {
      for (; k + kVectors * kLanes <= k_end; k += kVectors * kLanes) {
        some_channels<kTaps, kStride, kLines, kVectors, false>(conv, taps, to, k, kLanes);
      }
      if (kVectors > 1 && k + kLanes <= k_end) {
        some_channels<kTaps, kStride, kLines, 1, false>(conv, taps, to, k, kLanes);
        k += kLanes;
      }
    }
    for (; k < k_end; k += kLanes) {
      const int64_t lanes = std::min<int64_t>(k_end - k, kLanes);
      some_channels<kTaps, kStride, kLines, 1, true>(conv, taps, to, k, lanes);
    }
  }

  // kVectors of channels from k on; of one of them `lanes`. kPart: some of the pixels are outside
  // of the image or not wanted, or some of the lanes.
  template <int kTaps, int kStride, int kLines, int kVectors, bool kPart>
  FASTSEG_INLINE void some_channels(const Conv& conv, const Taps<Conv>& taps, const Pixels<T>& to,
                                    int64_t k, int64_t lanes) {
    constexpr int P = kBlockPixels, V = kVectors, L = kLines;
    Vec acc[L][V][P];
#pragma GCC unroll 2
    for (int l = 0; l < L; ++l) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[l][v][p] = load(conv.bias + k + v * kLanes);
      }
    }
    const auto read = [&](const T* x) __attribute__((always_inline)) {
      return kPart ? load_lanes(x, lanes) : load(x);
    };
    const int64_t inside_end = std::min(taps.inside_end, taps.reads), step = taps.step;
    const T* x = taps.x + k;
    const float* w = taps.weight + k;
    // A row of the image for lines [from, last) of output: the kernel row of each is one above that
    // of the line before.
    const auto add_row = [&](auto from, auto last) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const T* pixel = x + v * kLanes;
        const float* columns = w + v * kLanes;
        if constexpr (kTaps > 0) {
          constexpr int kReads = (P - 1) * kStride + kTaps;
          Vec weight[L][kTaps];
#pragma GCC unroll 2
          for (int l = 0; l < L; ++l) {
            if (l < from || l >= last) continue;
#pragma GCC unroll 7
            for (int s = 0; s < kTaps; ++s) {
              weight[l][s] = load(columns - l * taps.weight_row + s * taps.weight_column);
            }
          }
#pragma GCC unroll 20
          for (int i = 0; i < kReads; ++i, pixel += step) {
            if (kPart && (i < taps.inside_begin || i >= inside_end)) continue;
            const Vec value = read(pixel);
#pragma GCC unroll 2
            for (int l = 0; l < L; ++l) {
              if (l < from || l >= last) continue;
#pragma GCC unroll 7
              for (int s = 0; s < kTaps; ++s) {
                if (i >= s && (i - s) % kStride == 0 && (i - s) / kStride < P) {
                  acc[l][v][(i - s) / kStride] += value * weight[l][s];
                }
              }
            }
          }
        } else {
          for (int64_t s = 0; s < taps.columns; ++s) {
            const Vec weight = load(columns);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
              if (kPart && p >= to.count) break;
              acc[0][v][p] += read(pixel + p * step) * weight;
            }
            pixel += conv.dilation_w * conv.x.pixel;
            columns += taps.weight_column;
          }
        }
      }
    };
    for (int64_t r = taps.first; r < taps.first + taps.rows; ++r) {
      constexpr std::integral_constant<int, 0> first;
      constexpr std::integral_constant<int, 1> second;
      if (L == 1 || r == 0) {
        add_row(first, second);
      } else if constexpr (L == 2) {
        constexpr std::integral_constant<int, 2> both;
        if (r < conv.R) {
          add_row(first, both);
        } else {
          add_row(second, both);
        }
      }
      x += conv.dilation_h * conv.x.row;
      w += taps.weight_row;
    }
#pragma GCC unroll 2
    for (int l = 0; l < L; ++l) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        finish_pixels<kPart>(conv, acc[l][v], l, to, k + v * kLanes, lanes);
      }
    }
  }
};
