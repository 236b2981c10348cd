// Convolutions in groups of few channels, depthwise ones above all: lanes are output channels, of
// one or several groups, and up to kGroupedPixels pixels of a line of output share the register of
// a weight. Channel j of its own group gets to every lane by a load of the image (depthwise), a
// broadcast or two, or a permutation; each pixel does so once for all taps of a kernel row, and of
// depthwise layers with AVX-512 for two lines of output.
// Packed weight: [tap][channel of a group][outputs of all groups, whole panels].

// Sums in registers, beside the weights of a kernel row and what they multiply.
constexpr int kGroupedPixels = FASTSEG_ISA_LEVEL >= 2 ? 12 : 8;

// Lines of output at a time, and pixels of each where the weights are those of five taps.
constexpr int kPairedLines = FASTSEG_ISA_LEVEL >= 2 ? 2 : 1;
constexpr int kPairedPixels = 8;
// Larger pixels lie on pages of their own, too many for the TLB: 2048 channels took 0.98 instead of
// 0.71 ms, 672 channels 0.30 instead of 0.43.
constexpr int64_t kPairedBytes = 4096;

// Weights of so many bytes stay in L1 while the pixels of a line pass by.
constexpr int64_t kKeptWeights = 24 * 1024;

FASTSEG_INLINE float load_scalar(const float* p) { return *p; }
FASTSEG_INLINE float load_scalar(const BFloat16* p) {
  float value;
  copy_run(p, &value, 1);
  return value;
}

// Lane l of the result is lane index[l] of v.
FASTSEG_INLINE Vec permute(Vec v, Words index) {
#if FASTSEG_ISA_LEVEL >= 2
  return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif FASTSEG_ISA_LEVEL == 1
  return (Vec)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  Vec permuted;
  for (int l = 0; l < kLanes; ++l) permuted[l] = v[index[l]];
  return permuted;
#endif
}

template <class Conv>
struct GroupedKernel {
  using T = typename Conv::Storage;

  static int64_t lanes() { return kLanes; }

  // Lines [begin, end) of output, counted over (image, row), output channels [k_begin, k_end).
  static void run(const Conv& conv, const LaneReads* reads, const LineSegment* segments,
                  int64_t count, int64_t begin, int64_t end, int64_t k_begin, int64_t k_end) {
    const int64_t column = round_up(conv.groups * conv.K, kPanel) * conv.C;  // weights of a tap
    const int64_t vectors = kKeptWeights / (conv.R * conv.S * conv.C * kLanes * sizeof(float));
    // Of depthwise layers a line of weights is shorter than one of the image.
    const int64_t kept = conv.C == 1 ? k_end - k_begin : std::max<int64_t>(vectors, 1) * kLanes;
    const bool paired = kPairedLines == 2 && segments[0].shared &&
                        reads[0].kind == LaneReads::kOwn && conv.stride_h == 1 &&
                        conv.stride_w == 1 && conv.dilation_h == 1 &&
                        conv.x.pixel * int64_t{sizeof(T)} < kPairedBytes;
    for (int64_t line = begin, rows; line < end; line += rows) {
      const int64_t n = line / conv.Ho, oy = line % conv.Ho;
      rows = paired && line + 1 < end && oy + 1 < conv.Ho ? 2 : 1;
      const int64_t iy = oy * conv.stride_h - conv.pad_h, kernel_rows = conv.R + rows - 1;
      const int64_t above = ceil_div(std::max<int64_t>(-iy, 0), conv.dilation_h);
      const int64_t inside = ceil_div(std::max<int64_t>(conv.H - iy, 0), conv.dilation_h);
      const int64_t r0 = std::min(above, kernel_rows), r1 = std::clamp(inside, r0, kernel_rows);
      // The lowest row of the next line is what nobody has read yet.
      const int64_t next = iy + rows * conv.stride_h + (conv.R - 1) * conv.dilation_h;
      const int64_t most = rows == 2 && conv.S == 5 ? kPairedPixels : kGroupedPixels;
      for (int64_t k = k_begin; k < k_end; k += kept) {
        for (int64_t i = 0; i < count; ++i) {
          const LineSegment& segment = segments[i];
          Taps taps;
          taps.lines = rows, taps.first = r0;
          taps.rows = segment.s0 < segment.s1 ? r1 - r0 : 0;
          taps.columns = segment.s1 - segment.s0;
          taps.weight = conv.weight + (r0 * conv.S + segment.s0) * column;
          taps.weight_row = conv.S * column, taps.weight_column = column;
          // Where pixels are shared those of a block lie as far apart as the taps.
          const int64_t apart = segment.shared && conv.stride_w == 1 ? conv.dilation_w : 1;
          taps.step = (segment.shared ? apart : conv.stride_w) * conv.x.pixel;
          for (int64_t first = 0; first < std::min(apart, segment.end - segment.begin); ++first) {
            const int64_t width = ceil_div(segment.end - segment.begin - first, apart);
            for (int64_t from = 0, pixels; from < width; from += pixels) {
              // Whole blocks, and of the rest two that are nearly as long.
              const int64_t left = width - from;
              pixels = left >= 3 * most / 2 ? most : left > most ? ceil_div(left, 2) : left;
              const int64_t ox = segment.begin + first + from * apart;
              const int64_t ix = ox * conv.stride_w - conv.pad_w + segment.s0 * conv.dilation_w;
              taps.reads = (pixels - 1) * (conv.stride_w == 2 ? 2 : 1) + conv.S;
              taps.inside_begin = ceil_div(std::max<int64_t>(-ix, 0), apart);
              taps.inside_end = ceil_div(std::max<int64_t>(conv.W - ix, 0), apart);
              // Without a tap inside nothing is read.
              taps.x = taps.rows ? conv.x.at(n, iy + r0 * conv.dilation_h, ix) : conv.x.data;
              taps.ahead = taps.rows && next < conv.H ? conv.x.at(n, next, ix) : taps.x;
              const Pixels to{pixels, conv.y.at(n, oy, ox), apart * conv.y.pixel,
                              conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr,
                              apart * conv.residual.pixel};
              block(conv, reads, segment.shared, taps, to, k, std::min(k + kept, k_end));
            }
          }
        }
      }
    }
    if (conv.stream) stream_fence();
  }

 private:
  // Those of a line of output.
  struct Taps {
    int64_t lines;                 // of output
    int64_t first, rows, columns;  // of the kernel; two lines together read one row more
    const T *x, *ahead;            // the first of the first pixel; what to fetch meanwhile
    int64_t step;                  // from one pixel that is read to the next
    int64_t reads, inside_begin, inside_end;  // how many, and which of them lie in the image
    const float* weight;
    int64_t weight_row, weight_column;
  };
  struct Pixels {
    int64_t count;
    T* y;
    int64_t step;
    const T* residual;
    int64_t residual_step;
  };

  // kTaps: columns of the kernel, all of which each pixel has, or 0 for those that a segment has.
  // kStride: how many of the pixels read lie between two outputs. kLines: of output. kPart: some of
  // the pixels are outside of the image or not wanted.
  template <int kTaps, int kStride, int kLines, bool kPart>
  struct Form {
    static constexpr int S = kTaps, stride = kStride, lines = kLines;
    static constexpr int pixels = kLines == 2 && S == 5 ? kPairedPixels : kGroupedPixels;
    static constexpr bool part = kPart;
  };

  template <int kTaps, int kStride, int kLines>
  FASTSEG_INLINE void block_of(const Conv& conv, const LaneReads* reads, const Taps& taps,
                               const Pixels& to, int64_t k, int64_t k_end) {
    using Whole = Form<kTaps, kStride, kLines, false>;
    const bool inside = taps.inside_begin == 0 && (kTaps == 0 || taps.inside_end >= taps.reads);
    if (to.count == Whole::pixels && inside) {
      all_channels<Whole>(conv, reads, taps, to, k, k_end);
    } else {
      all_channels<Form<kTaps, kStride, kLines, true>>(conv, reads, taps, to, k, k_end);
    }
  }

  static void block(const Conv& conv, const LaneReads* reads, bool shared, const Taps& taps,
                    const Pixels& to, int64_t k, int64_t k_end) {
    constexpr int L = kPairedLines;
    if (!shared) {
      block_of<0, 1, 1>(conv, reads, taps, to, k, k_end);
    } else if (conv.stride_w == 2) {
      block_of<3, 2, 1>(conv, reads, taps, to, k, k_end);
    } else if (conv.S == 3) {
      taps.lines == 2 ? block_of<3, 1, L>(conv, reads, taps, to, k, k_end)
                      : block_of<3, 1, 1>(conv, reads, taps, to, k, k_end);
    } else {
      taps.lines == 2 ? block_of<5, 1, L>(conv, reads, taps, to, k, k_end)
                      : block_of<5, 1, 1>(conv, reads, taps, to, k, k_end);
    }
  }

  template <class F>
  static void all_channels(const Conv& conv, const LaneReads* reads, const Taps& taps,
                           const Pixels& to, int64_t k, int64_t k_end) {
    for (; k < k_end; k += kLanes) {
      const LaneReads& read = reads[k / kLanes];
      const int64_t lanes = std::min<int64_t>(k_end - k, kLanes);
      if (read.kind == LaneReads::kOwn) {
        if (lanes == kLanes) {
          some_channels<LaneReads::kOwn, F, true>(conv, read, taps, to, k, lanes);
        } else {
          some_channels<LaneReads::kOwn, F, false>(conv, read, taps, to, k, lanes);
        }
      } else if constexpr (F::S != 5 && F::lines == 1) {
        if (read.kind == LaneReads::kOne) {
          some_channels<LaneReads::kOne, F, true>(conv, read, taps, to, k, lanes);
        } else if (read.kind == LaneReads::kTwo) {
          some_channels<LaneReads::kTwo, F, true>(conv, read, taps, to, k, lanes);
        } else {
          some_channels<LaneReads::kPermuted, F, true>(conv, read, taps, to, k, lanes);
        }
      }
    }
  }

  // Channel j of each lane's group of the pixel at x.
  template <LaneReads::Kind kKind, bool kWhole>
  FASTSEG_INLINE Vec operand(const T* x, const LaneReads& read, Words index, int64_t lanes) {
    if constexpr (kKind == LaneReads::kOne) {
      return broadcast(load_scalar(x));
    } else if constexpr (kKind == LaneReads::kTwo) {
      const Vec second = broadcast(load_scalar(x + read.second));
      return (Vec)(index ? (Words)second : (Words)broadcast(load_scalar(x)));
    } else if constexpr (kKind == LaneReads::kPermuted) {
      return permute(load(x), index);
    } else {
      return kWhole ? load(x) : load_part(x, lanes);
    }
  }

  // The pixels of a block, `lanes` output channels from k on.
  template <LaneReads::Kind kKind, class F, bool kWhole>
  FASTSEG_INLINE void some_channels(const Conv& conv, const LaneReads& read, const Taps& taps,
                                    const Pixels& to, int64_t k, int64_t lanes) {
    constexpr int S = F::S, L = F::lines, P = F::pixels;
    constexpr bool kOwn = kKind == LaneReads::kOwn;
    const int64_t pixels = to.count;
    Vec acc[L * P];
    const Vec bias = load(conv.bias + k);
#pragma GCC unroll 24
    for (int p = 0; p < L * P; ++p) acc[p] = bias;
    // Where the next block writes, or of many channels the next but one vector: their next block is
    // on other pages, and 672 channels took 0.34 instead of 0.28 ms.
    const T* next = to.y + k + (conv.y.pixel > 4 * kLanes ? 2 * kLanes : P * to.step);
#pragma GCC unroll 2
    for (int l = 0; l < L; ++l) {
      const T* ahead = taps.ahead + (taps.ahead == taps.x ? 0 : l * conv.x.row) + k;
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        if (F::part && p >= pixels) break;
        __builtin_prefetch(ahead + p * F::stride * taps.step, 0, 2);
        if (F::stride == 2) __builtin_prefetch(ahead + (2 * p + 1) * taps.step, 0, 2);
        __builtin_prefetch(next + l * conv.y.row + p * to.step, 1, 2);
      }
    }
    const int64_t inside_end = std::min(taps.inside_end, taps.reads);
    const int64_t step = taps.step, channels = kOwn ? 1 : conv.C;
    const int64_t weights = taps.weight_column / conv.C;
    const T* line = taps.x + read.first;
    const float* row_weights = taps.weight + k;
    const Words offset = *reinterpret_cast<const UnalignedWords*>(read.offset);
    // A row of the image for lines [from, last) of output: the kernel row of each is one above that
    // of the line before.
    const auto add_row = [&](auto from, auto last) __attribute__((always_inline)) {
      for (int64_t j = 0; j < channels; ++j) {
        const T* x = kKind == LaneReads::kPermuted ? line : line + j;
        const Words index =
            kKind == LaneReads::kPermuted ? offset + static_cast<uint32_t>(j) : offset;
        const float* w = row_weights + j * weights;
        if constexpr (S > 0) {
          constexpr int kReads = (P - 1) * F::stride + S;
          Vec weight[L][S];
#pragma GCC unroll 2
          for (int l = from; l < last; ++l) {
#pragma GCC unroll 5
            for (int s = 0; s < S; ++s) {
              weight[l][s] = load(w - l * taps.weight_row + s * taps.weight_column);
            }
          }
#pragma GCC unroll 32
          for (int i = 0; i < kReads; ++i, x += step) {
            if (F::part && (i < taps.inside_begin || i >= inside_end)) continue;
            const Vec v = operand<kKind, kWhole>(x, read, index, lanes);
#pragma GCC unroll 2
            for (int l = from; l < last; ++l) {
#pragma GCC unroll 5
              for (int s = 0; s < S; ++s) {
                constexpr int d = F::stride;
                if (i >= s && (i - s) % d == 0 && (i - s) / d < P) {
                  acc[l * P + (i - s) / d] += v * weight[l][s];
                }
              }
            }
          }
        } else {
          for (int64_t s = 0; s < taps.columns; ++s) {
            const Vec weight = load(w);
#pragma GCC unroll 12
            for (int p = 0; p < P; ++p) {
              if (F::part && p >= pixels) break;
              acc[p] += operand<kKind, kWhole>(x + p * step, read, index, lanes) * weight;
            }
            x += conv.dilation_w * conv.x.pixel;
            w += taps.weight_column;
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
      line += conv.dilation_h * conv.x.row;
      row_weights += taps.weight_row;
    }
    // In a loop where the code of each pixel would be long.
    const bool loop = F::part || conv.activation > Activation::kHardSigmoid;
    if (loop) {
      alignas(64) float sums[L * P * kLanes];
#pragma GCC unroll 24
      for (int p = 0; p < L * P; ++p) store(sums + p * kLanes, acc[p]);
      for (int l = 0; l < L; ++l) {
        for (int p = 0; p < pixels; ++p) {
          finish(conv, load(sums + (l * P + p) * kLanes), l, p, to, k, lanes,
                 [&](Vec v) { return activate(v, conv.activation, conv.slope); });
        }
      }
      return;
    }
    dispatch_activation(conv.activation, [&](auto kind) __attribute__((always_inline)) {
#pragma GCC unroll 24
      for (int p = 0; p < L * P; ++p) {
        finish(conv, acc[p], p / P, p % P, to, k, lanes, [&](Vec v) __attribute__((always_inline)) {
          return activate_as<kind <= Activation::kHardSigmoid ? kind : Activation::kNone>(
              v, conv.slope);
        });
      }
    });
  }

  // Residual and activation of pixel p of line l, on the way to memory.
  template <class Activate>
  FASTSEG_INLINE void finish(const Conv& conv, Vec v, int l, int p, const Pixels& to, int64_t k,
                             int64_t lanes, const Activate& activate) {
    if (to.residual) {
      const T* from = to.residual + l * conv.residual.row + p * to.residual_step + k;
      const Vec added = lanes == kLanes ? load(from) : load_part(from, lanes);
      v = conv.residual_last ? activate(v) + added : activate(v + added);
    } else {
      v = activate(v);
    }
    T* y = to.y + l * conv.y.row + p * to.step + k;
    if (lanes == kLanes) {
      store(y, v);
    } else {
      store_part(y, lanes, v);
    }
  }
};
