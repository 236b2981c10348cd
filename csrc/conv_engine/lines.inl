// What the kernels of convolutions in groups have in common: lines of output cut into blocks of
// pixels, and the end of a block.

// What the pixels of a block read of the image.
template <class Conv>
struct Taps {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;
  int64_t lines;                            // of output
  int64_t first, rows, columns;             // of the kernel; two lines together read one row more
  const T* x;                               // the first of the first pixel
  int64_t step;                             // from one pixel that is read to the next
  int64_t reads, inside_begin, inside_end;  // how many, and which of them lie in the image
  const E* weight;
  int64_t weight_row, weight_column;

  // Whether the image has all that `kTaps` taps of each pixel read, or with 0 those of a segment.
  bool are_inside(int64_t kTaps) const {
    return inside_begin == 0 && (kTaps == 0 || inside_end >= reads);
  }
};

// And where they go.
template <typename T>
struct Pixels {
  int64_t count;
  T* y;
  int64_t step;
  const T* residual;
  int64_t residual_step;
};

// Calls block(taps, pixels, k, k_end) for all of lines [begin, end) of output, counted over (image,
// row): `most` pixels at a time, of two lines where `paired`, of up to `kept` output channels of
// [k_begin, k_end). Pixels that share what they read lie as far apart as the taps.
template <class Conv, class Block>
FASTSEG_INLINE void for_each_block(const Conv& conv, const std::vector<LineSegment>& segments,
                                   int64_t most, bool paired, int64_t begin, int64_t end,
                                   int64_t kept, int64_t k_begin, int64_t k_end,
                                   const Block& block) {
  using T = typename Conv::Storage;
  const int64_t column = round_up(conv.groups * conv.K, kPanel) * conv.C;  // weights of a tap
  for (int64_t line = begin, rows; line < end; line += rows) {
    const int64_t n = line / conv.Ho, oy = line % conv.Ho;
    rows = paired && line + 1 < end && oy + 1 < conv.Ho ? 2 : 1;
    const int64_t iy = oy * conv.stride_h - conv.pad_h, kernel_rows = conv.R + rows - 1;
    const int64_t above = ceil_div(std::max<int64_t>(-iy, 0), conv.dilation_h);
    const int64_t inside = ceil_div(std::max<int64_t>(conv.H - iy, 0), conv.dilation_h);
    const int64_t r0 = std::min(above, kernel_rows), r1 = std::clamp(inside, r0, kernel_rows);
    for (int64_t k = k_begin; k < k_end; k += kept) {
      for (const LineSegment& segment : segments) {
        Taps<Conv> taps;
        taps.lines = rows, taps.first = r0;
        taps.rows = segment.s0 < segment.s1 ? r1 - r0 : 0;
        taps.columns = segment.s1 - segment.s0;
        taps.weight = conv.weight + (r0 * conv.S + segment.s0) * column;
        taps.weight_row = conv.S * column, taps.weight_column = column;
        const int64_t apart = segment.shared && conv.stride_w == 1 ? conv.dilation_w : 1;
        taps.step = (segment.shared ? apart : conv.stride_w) * conv.x.pixel;
        for (int64_t first = 0; first < std::min(apart, segment.end - segment.begin); ++first) {
          const int64_t width = ceil_div(segment.end - segment.begin - first, apart);
          const int64_t start = segment.begin + first;
          const int64_t ix = start * conv.stride_w - conv.pad_w + segment.s0 * conv.dilation_w;
          // Reads outside of the image on the left, and those before its right end.
          const int64_t outside = ceil_div(std::max<int64_t>(-ix, 0), apart);
          const int64_t before = ceil_div(std::max<int64_t>(conv.W - ix, 0), apart);
          // Without a tap inside nothing is read.
          const T* x = taps.rows ? conv.x.at(n, iy + r0 * conv.dilation_h, ix) : conv.x.data;
          Pixels<T> to{0, conv.y.at(n, oy, start), apart * conv.y.pixel,
                       conv.residual.data ? conv.residual.at(n, oy, start) : nullptr,
                       apart * conv.residual.pixel};
          for (int64_t from = 0; from < width; from += to.count) {
            // Whole blocks, and of the rest two that are nearly as long.
            const int64_t left = width - from, read = from * conv.stride_w;
            to.count = left >= 3 * most / 2 ? most : left > most ? ceil_div(left, 2) : left;
            taps.reads = (to.count - 1) * (conv.stride_w == 2 ? 2 : 1) + conv.S;
            taps.inside_begin = std::max<int64_t>(outside - read, 0);
            taps.inside_end = std::max<int64_t>(before - read, 0);
            taps.x = x + (taps.rows ? read * apart * conv.x.pixel : 0);
            block(taps, to, k, std::min(k + kept, k_end));
            to.y += to.count * to.step;
            if (to.residual) to.residual += to.count * to.residual_step;
          }
        }
      }
    }
  }
}

// The first n <= kLanes values at p.
template <typename T>
FASTSEG_INLINE Vec load_lanes(const T* p, int64_t n) {
  return FASTSEG_ISA_LEVEL < 2 && n == kLanes ? load(p) : load_part(p, n);
}

// Residual and activation of `lanes` channels from k on of `count` of these pixels of line l, in
// their registers on the way to memory; kPart: not of all.
template <bool kPart, class Conv, int kCount>
FASTSEG_INLINE void finish_pixels(const Conv& conv, Vec (&sums)[kCount], int64_t l,
                                  const Pixels<typename Conv::Storage>& to, int64_t k,
                                  int64_t lanes) {
  using T = typename Conv::Storage;
  const auto add_residual = [&]() __attribute__((always_inline)) {
    const T* from = to.residual + l * conv.residual.row + k;
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p) {
      if (kPart && p >= to.count) break;
      sums[p] += kPart ? load_lanes(from + p * to.residual_step, lanes)
                       : load(from + p * to.residual_step);
    }
  };
  if (to.residual && !conv.residual_last) add_residual();
  if (conv.activation > Activation::kHardSigmoid) {
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p) sums[p] = activate_long(sums[p], conv.activation);
  } else {
    dispatch_activation(conv.activation, [&](auto kind) __attribute__((always_inline)) {
      constexpr Activation kKind = kind <= Activation::kHardSigmoid ? kind : Activation::kNone;
#pragma GCC unroll 16
      for (int p = 0; p < kCount; ++p) sums[p] = activate_as<kKind>(sums[p], conv.slope);
    });
  }
  if (to.residual && conv.residual_last) add_residual();
  T* y = to.y + l * conv.y.row + k;
  constexpr bool kWholeLines = kLanes * sizeof(T) == 64;
  if (!kPart && kWholeLines && conv.stream) {
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p) store_stream(y + p * to.step, sums[p]);
    return;
  }
#pragma GCC unroll 16
  for (int p = 0; p < kCount; ++p) {
    if (kPart && p >= to.count) break;
    if (kPart && lanes < kLanes) {
      store_part(y + p * to.step, lanes, sums[p]);
    } else {
      store(y + p * to.step, sums[p]);
    }
  }
}
